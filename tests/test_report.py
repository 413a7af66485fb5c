"""The statistics are what their names say, worked out another way; the page shows a run and lets nothing in it act."""
import html.parser
import json
import math
import shutil

import pytest
import torch
from conftest import read_json, script
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import data
import report


def rows(labels, predictions, **columns) -> list[dict]:
    found = [{"idx": i, "prompt": data.PROMPT.format(premise=f"premise {i}", hypothesis="h"), "label": label, "prediction": prediction}
             for i, (label, prediction) in enumerate(zip(labels, predictions))]
    return [row | {name: values[row["idx"]] for name, values in columns.items()} for row in found]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real run, with evaluations on the way."""
    out = tmp_path_factory.mktemp("run") / "run"
    done = script("train.py", "--model", "tiny/model", "--dataset", "tiny/data", "--steps", 60, "--batch-size", 8, "--eval-limit", 30, "--eval-every", 30,
                  "--max-new-tokens", 4, "--learning-rate", 3e-3, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


# ---- Statistics

def test_counts_precision_recall_and_f1_by_hand():
    """Six rows: label 0 answered 0, 0, 1; label 1 answered 1, and nothing; label 2 answered 10."""
    found = report.statistics(rows([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, -1, 10]))
    assert (found["n"], found["correct"], found["unparsed"]) == (6, 3, 1) and found["accuracy"] == 0.5
    assert found["confusion"] == [[2, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1]]
    assert found["labels"]["entailment"] == {"precision": 1.0, "recall": pytest.approx(2 / 3), "f1": pytest.approx(0.8), "n": 3}
    assert found["labels"]["neutral"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "n": 2}
    assert found["labels"]["contradiction"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "n": 1}
    assert found["macro_f1"] == pytest.approx((0.8 + 0.5 + 0) / 3)


def test_the_interval_is_wilsons():
    """By its formula, for 8,417 of 9,832 and at the ends, where the simple interval would be empty."""
    z = 1.959963984540054
    for correct, n in ((8417, 9832), (0, 50), (50, 50), (1, 3)):
        p = correct / n
        middle, half = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        found = report.statistics(rows([0] * n, [0] * correct + [1] * (n - correct)))["ci95"]
        assert found == pytest.approx([middle - half, middle + half], abs=1e-9)


def test_likelihood_and_calibration():
    """nll is torch's cross-entropy of the three logits; ece, by hand: 2 of 4 rows 90 % sure and right, 2 rows 60 % sure, one of them right."""
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(3, (40,), generator=torch.Generator().manual_seed(1))
    found = report.statistics(rows(labels.tolist(), [0] * 40, scores=logits.softmax(-1).tolist()))
    assert found["nll"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["score_accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    scores = [[0.9, 0.05, 0.05], [0.9, 0.05, 0.05], [0.6, 0.2, 0.2], [0.6, 0.2, 0.2]]
    assert report.statistics(rows([0, 0, 0, 1], [0] * 4, scores=scores))["ece"] == pytest.approx(0.5 * 0.1 + 0.5 * 0.1)


def test_accuracy_by_genre_and_by_quarter_of_length():
    found = report.statistics(rows([0] * 8, [0, 0, 0, 1, 1, 1, 1, 0], genre=["a"] * 4 + ["b"] * 4, tokens=[80, 70, 60, 50, 40, 30, 20, 10]))
    assert found["genres"] == {"a": {"accuracy": 0.75, "n": 4}, "b": {"accuracy": 0.25, "n": 4}}
    assert [(part["from"], part["to"], part["accuracy"], part["n"]) for part in found["lengths"]] == [(10, 20, 0.5, 2), (30, 40, 0, 2), (50, 60, 0.5, 2), (70, 80, 1, 2)]


def test_mcnemar_is_the_binomial_test_of_the_rows_that_differ():
    """Ten rows right in one alone, two in the other: p = 2 (C(12,0) + C(12,1) + C(12,2)) / 2^12."""
    first, second = rows([0] * 20, [0] * 10 + [1] * 2 + [0] * 8), rows([0] * 20, [1] * 10 + [0] * 2 + [0] * 8)
    assert report.mcnemar(first, second) == {"n": 20, "only_first": 10, "only_second": 2, "p": pytest.approx(2 * (1 + 12 + 66) / 2 ** 12)}
    assert report.mcnemar(first, first)["p"] == 1
    for other in (first[:-1], rows([1] * 20, [0] * 20)):
        with pytest.raises(ValueError, match="not of the same rows: 20 and"):
            report.mcnemar(first, other)


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([-1, 0, 1, 2, 3, 10 ** 12])), min_size=1, max_size=30))
@settings(deadline=None, max_examples=60)
def test_any_answers_give_counts_that_agree(pairs):
    found = report.statistics(rows(*zip(*pairs)))
    assert sum(map(sum, found["confusion"])) == found["n"] == len(pairs)
    assert found["correct"] == sum(found["confusion"][i][i] for i in range(3))
    assert found["unparsed"] <= sum(row[3] for row in found["confusion"])
    assert 0 <= found["ci95"][0] <= found["accuracy"] <= found["ci95"][1] <= 1
    assert json.loads(json.dumps(found)) == found


def test_tables_fit_a_terminal(run):
    results = read_json(run / "results.json")
    large = report.statistics(rows([0, 1, 2] * 3277, [0, 1, -1] * 3277, scores=[[0.2, 0.3, 0.5]] * 9831, tokens=[400] * 9831, genre=["face-to-face"] * 9831))
    test = {"only_first": 4000, "only_second": 5000, "n": 9831, "p": 1e-300}
    old = {"accuracy": 0.5, "n": 4, "correct": 2, "unparsed": 0}  # of a run before there were more
    text = [report.table(results), report.details(large), report.table({"finetuned": {"validation_mismatched": large}, "baseline": {"old": old},
                                                                        "mcnemar": {"validation_mismatched": test}})]
    assert all(len(line) <= 79 for part in text for line in part.splitlines()), max((line for part in text for line in part.splitlines()), key=len)
    assert f"{results['finetuned']['validation_matched']['accuracy']:.4f}" in text[0] and "3,277" in text[1]


# ---- Pictures and the page

class Page(html.parser.HTMLParser):
    """Notes the tags, what they link to, and the text."""

    def __init__(self, content: str):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "data") or name.startswith("on")]

    def handle_data(self, text):
        self.text += text


def test_the_page_of_a_run_shows_all_of_it_and_links_to_nothing(run):
    page, results = Page((run / "report.html").read_text()), read_json(run / "results.json")
    assert page.tags.count("img") == 3 and all(link.startswith("data:image/png;base64,") for link in page.links) and "script" not in page.tags
    for split in ("validation_matched", "validation_mismatched"):
        found = results["finetuned"][split]
        assert found["n"] == 30 and f"{found['accuracy']:.4f}" in page.text and "{:.4f} to {:.4f}".format(*found["ci95"]) in page.text
        predictions = report.read_predictions(run / f"predictions_{split}.jsonl")
        assert report.statistics(predictions) == found
        baseline = report.read_predictions(run / f"baseline_{split}.jsonl")
        assert results["mcnemar"][split] == report.mcnemar(baseline, predictions)
        assert report.statistics(baseline) == results["baseline"][split]
    for expected in ("rank 8, alpha 16", "McNemar", "The most confident mistakes", "Rows that did not parse", "learning rate 0.003", "negation"):
        assert expected in page.text


def test_pictures_show_something(run):
    from matplotlib import image
    for name in report.PICTURES:
        content = image.imread(run / name)
        assert min(content.shape[:2]) > 300 and content[..., :3].std() > 0.05, name


def test_what_a_model_or_a_dataset_wrote_is_text_on_the_page(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    hostile = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>{{ 7 * 7 }}\x00\x1b[31m\u202e\ud800"
    found = report.read_predictions(copy / "predictions_validation_matched.jsonl")
    found[0] |= {"prompt": data.PROMPT.format(premise=hostile, hypothesis=hostile), "completion": hostile, "prediction": -1}
    found[1] |= {"prompt": hostile, "completion": hostile, "prediction": (found[1]["label"] + 1) % 3, "scores": [1 / 3] * 3, "idx": hostile}
    (copy / "predictions_validation_matched.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    args = read_json(copy / "args.json") | {"model": hostile, "dataset": hostile}
    checkpoint.write_json(copy / "args.json", args)
    done = script("report.py", copy)
    assert done.returncode == 0, done.stderr
    page = Page((copy / "report.html").read_text())
    assert "script" not in page.tags and page.tags.count("img") == 3 and all(link.startswith("data:") for link in page.links)
    assert page.text.count("<script>alert(1)</script>") >= 6 and "{{ 7 * 7 }}" in page.text


@pytest.mark.parametrize("name, content, message", [
    ("predictions_validation_matched.jsonl", '{"idx": 0}\n', "line 1: no prediction of ours"), ("predictions_validation_matched.jsonl", None, "is not there"),
    ("metrics.jsonl", '{"step": 1}\n{"st', "line 2 is not JSON"), ("args.json", "[]", "holds no JSON object"), ("results.json", None, "has no results.json")])
def test_a_damaged_run_is_one_line(run, tmp_path, monkeypatch, name, content, message):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / name).unlink() if content is None else (copy / name).write_text(content)
    monkeypatch.setattr("sys.argv", ["report.py", str(copy)])
    with pytest.raises(SystemExit) as error:
        data.run(report.main)
    assert message in str(error.value) and "\n" not in str(error.value)
