"""report.html shows a whole run, and what a model or a dataset wrote cannot act on it."""

import html.parser
import json
import shutil
import sys

import pytest
from conftest import in_process, read_json, script

import data
from scripts import report
from support import files, metrics, page, pictures

SPLITS = ("validation_matched", "validation_mismatched")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real run, with an evaluation on the way."""
    out = tmp_path_factory.mktemp("run") / "run"
    command = ["train.py", "--model", "tiny/model", "--dataset", "tiny/data", "--out", out]
    command += ["--steps", 60, "--batch-size", 8, "--learning-rate", 3e-3]
    command += ["--eval-limit", 30, "--eval-every", 30, "--max-new-tokens", 4]
    command += ["--keep-dequantized"]  # the same bits in less time
    done = script(*command)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


class Page(html.parser.HTMLParser):
    """Collects the tags of a page, all that they load, link to or run, and the text."""

    def __init__(self, content: str):
        super().__init__()
        self.tags = []
        self.links = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "action", "data") or name.startswith("on"):
                self.links.append(value)

    def handle_data(self, text):
        self.text += text


def assert_harmless(shown: Page) -> None:
    """The page holds no script and loads nothing but the pictures within it."""
    assert "script" not in shown.tags
    assert shown.tags.count("img") == len(pictures.PICTURES)
    for link in shown.links:
        assert link.startswith("data:image/png;base64,")


def test_the_page_of_a_run_shows_all_of_it_and_links_to_nothing(run):
    shown = Page((run / "report.html").read_text())
    assert_harmless(shown)
    results = read_json(run / "results.json")
    for split in SPLITS:
        result = results["finetuned"][split]
        low, high = result["ci95"]
        assert result["n"] == 30
        assert f"{result['accuracy']:.4f}" in shown.text
        assert f"{low:.4f} to {high:.4f}" in shown.text
    for expected in (
        *("rank 8, alpha 16", "learning rate 0.003", "60 steps of 8"),
        *("The most confident mistakes", "Rows that did not parse", "negation"),
    ):
        assert expected in shown.text


@pytest.mark.parametrize("stage, name", [("baseline", "baseline"), ("finetuned", "predictions")])
def test_the_statistics_of_a_run_are_those_of_its_predictions(run, stage, name):
    results = read_json(run / "results.json")
    assert results[stage].keys() == set(SPLITS)
    for split, result in results[stage].items():
        for key in ("loss", "cut"):  # measured by train.py; the predictions do not hold them
            del result[key]
        predictions = metrics.read_predictions(run / f"{name}_{split}.jsonl")
        assert metrics.statistics(predictions) == result


def test_the_most_confident_mistakes_come_first(copy):
    path = copy / "predictions_validation_matched.jsonl"
    rows = metrics.read_predictions(path)
    wrong = (rows[0]["label"] + 1) % 3
    rows[0]["prediction"] = wrong
    rows[0]["scores"] = [0.0, 0.0, 0.0]
    rows[0]["scores"][wrong] = 1.0
    rows[1]["prediction"] = -1
    files.write_lines(path, rows)
    page.write(copy)
    shown = Page((copy / "report.html").read_text())
    first = shown.text.split("The most confident mistakes")[1].split("label")[0]
    assert f"validation_matched, row {rows[0]['idx']}" in first
    unparsed = shown.text.split("Rows that did not parse")[1]
    assert f"validation_matched, row {rows[1]['idx']}" in unparsed


def test_pictures_show_something(run):
    from matplotlib import image

    for name in pictures.PICTURES:
        pixels = image.imread(run / name)[..., :3]
        assert min(pixels.shape[:2]) > 300, name
        assert pixels.std() > 0.05, name


def test_a_notebooks_way_to_show_pictures_does_not_matter(copy):
    """It stays in the environment of the commands that a notebook runs."""
    before = (copy / "loss.png").read_bytes()
    (copy / "loss.png").unlink()
    variables = {"MPLBACKEND": "module://matplotlib_inline.no_such_backend"}
    done = script("-m", "scripts.report", copy, env=variables, fresh=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (copy / "loss.png").read_bytes() == before


@pytest.mark.parametrize(
    "setting",
    [{"text.usetex": True}, {"font.family": "no such font"}, {"savefig.dpi": 20}],
    ids=str,
)
def test_a_users_matplotlibrc_does_not_change_the_pictures(copy, setting):
    import matplotlib

    before = {name: (copy / name).read_bytes() for name in pictures.PICTURES}
    with matplotlib.rc_context(setting):
        page.draw_pictures(copy)
    assert {name: (copy / name).read_bytes() for name in pictures.PICTURES} == before


def test_a_name_with_dollars_is_no_formula(run, tmp_path):
    """matplotlib would refuse the first, and leave the dollars of the second out."""
    result = read_json(run / "results.json")["finetuned"]["validation_matched"]
    pixels = []
    for name in (r"$\frac$", "$a$", "a"):
        pictures.draw_confusion({name: result}, tmp_path / "picture.png")
        pixels.append((tmp_path / "picture.png").read_bytes())
        entries = [{"step": 1, "loss": 1.0, "learning_rate": 1.0, f"{name}_loss": 1.0}]
        pictures.draw_loss(entries, tmp_path / "picture.png")
    assert len(set(pixels)) == 3


def test_a_picture_that_cannot_be_drawn_is_one_line_and_the_others_are_there(copy, capsys):
    for name in pictures.PICTURES:
        (copy / name).unlink()
    (copy / "report.html").unlink()
    (copy / "loss.png").mkdir()
    with pytest.raises(SystemExit) as stopped:
        in_process(report, copy)
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: the pictures: cannot write {copy / 'loss.png'}: ")
    assert (copy / "confusion.png").is_file()
    shown = Page((copy / "report.html").read_text())
    assert shown.tags.count("img") == 1


def test_without_matplotlib_a_line_says_what_to_install_and_all_else_is_there(
    copy, capsys, monkeypatch
):
    for name in pictures.PICTURES:
        (copy / name).unlink()
    (copy / "report.html").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it now fails
    with pytest.raises(SystemExit) as stopped:
        in_process(report, copy)
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the pictures: ")
    assert line.endswith(": pip install matplotlib")
    shown = Page((copy / "report.html").read_text())
    assert "Accuracy" in shown.text
    assert "img" not in shown.tags


def test_what_a_model_or_a_dataset_wrote_is_text_on_the_page(copy):
    hostile = (
        "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>{{ 7 * 7 }}"
        "\x00\x1b[31m\u202e\ud800"
    )
    path = copy / "predictions_validation_matched.jsonl"
    rows = metrics.read_predictions(path)
    prompt = data.PROMPT.format(premise=hostile, hypothesis=hostile)
    rows[0] |= {"prompt": prompt, "completion": hostile, "prediction": -1}
    # Whoever writes the file may also leave the prompt's form and the kinds of the other values.
    wrong = (rows[1]["label"] + 1) % 3
    rows[1] |= {"prompt": hostile, "completion": hostile, "idx": hostile}
    rows[1] |= {"prediction": wrong, "scores": [1 / 3] * 3}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # JSON escapes the surrogate
    args = read_json(copy / "args.json")
    files.write_json(copy / "args.json", args | {"model": hostile, "dataset": hostile})

    done = script("-m", "scripts.report", copy)
    assert done.returncode == 0, done.stderr
    shown = Page((copy / "report.html").read_text())
    assert_harmless(shown)
    assert shown.text.count("<script>alert(1)</script>") >= 6
    assert "{{ 7 * 7 }}" in shown.text


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("predictions_validation_matched.jsonl", '{"idx": 0}\n', "line 1: not a prediction"),
        ("predictions_validation_matched.jsonl", None, "is not there"),
        ("metrics.jsonl", '{"step": 1}\n{"st', "line 2 is not JSON"),
        ("args.json", "[]", "holds no JSON object"),
        ("results.json", None, "has no results.json"),
    ],
)
def test_a_damaged_run_is_one_line(copy, capsys, name, content, message):
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_text(content)
    with pytest.raises(SystemExit) as raised:
        in_process(report, copy)
    printed = capsys.readouterr().err
    assert raised.value.code == 1 or not printed
    (line,) = (printed or raised.value.code).splitlines()
    assert line.startswith("error: ")
    assert message in line
