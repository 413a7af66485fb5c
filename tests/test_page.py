"""report.html shows a whole run, and what a model or a dataset wrote cannot act on it."""

import html.parser
import json
import re
import shutil
import sys
import time
from argparse import Namespace
from xml.etree import ElementTree

import pytest
import torch
from conftest import in_process, read_json, script

import data
import train
from scripts import report, runs
from support import files, metrics, page, pictures, records, runlog

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
    (link,) = shown.links
    assert link.startswith("data:image/svg+xml;base64,")


def test_the_page_of_a_run_shows_all_of_it_and_links_to_nothing(run):
    shown = Page((run / "report.html").read_text())
    assert_harmless(shown)
    results = read_json(run / "results.json")
    for split in SPLITS:
        result = results["finetuned"][split]
        low, high = result["ci95"]
        assert result["n"] == 30
        assert page.percent(result["accuracy"]) in shown.text
        assert f"{100 * low:.1f} to {100 * high:.1f}" in shown.text
    for expected in (
        *("rank 8, alpha 16", "learning rate 0.003", "training\n60 of 60 steps of 8", "negation"),
        *("The right answer is  ", "guesses evenly", "the CPU ("),
        *("--eval-limit 30", "36,864 parameters, 1.2 % of the base's 3,061,504", " GiB in "),
        *("The most confident mistakes", "Rows that did not parse", "0 entailment"),
        *(files.read_lines(run / "baseline_validation_matched.jsonl")[0]["prompt"], "no number"),
    ):
        assert expected in shown.text


def test_the_verdict_is_of_all_rows_together(run):
    """And says of so many rows what an interval allows."""
    shown = records.read(run)
    splits = shown.results["finetuned"]
    correct = sum(result["correct"] for result in splits.values())
    text = page.verdict(shown).replace("\N{NO-BREAK SPACE}", " ")
    assert text.startswith("Of 60 validation rows the base answers 0 right (0.0 %), ")
    assert f"model {correct} ({100 * correct / 60:.1f} %; 95 % interval " in text
    for right, judgement in ((30, "better than"), (10, "No difference"), (0, "worse than")):
        for result in splits.values():
            result |= {"correct": right, "majority": 0.36}
        assert judgement in page.verdict(shown), right


def test_what_the_base_wrote_most_often_is_counted(run):
    rows = [row for split in SPLITS for row in files.read_lines(run / f"baseline_{split}.jsonl")]
    written = [row["completion"] for row in rows]
    found = page.commonest(rows)
    assert found[0][2] == max(map(written.count, written))
    for text, read, count in found:
        assert count == written.count(text)
        assert read == data.parse(text)


def test_no_part_of_the_page_needs_a_wide_screen(run):
    """Looked at with a browser 420 pixels wide; this keeps what made it fit."""
    content = (run / "report.html").read_text()
    assert "min-width" not in content
    for table in content.split("<table>")[1:]:
        for line in table.split("</table>")[0].split("<tr>")[1:]:
            assert line.count("<td") + line.count("<th") <= 5


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
    page.write(records.read(copy))
    shown = Page((copy / "report.html").read_text())
    first = shown.text.split("The most confident mistakes")[1].split("label")[0]
    assert f"validation_matched, row {rows[0]['idx']}" in first
    unparsed = shown.text.split("Rows that did not parse")[1]
    assert f"validation_matched, row {rows[1]['idx']}" in unparsed


def test_pictures_show_something(run):
    from matplotlib import image

    pixels = image.imread(run / "loss.png")
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., 3].std() > 0.05, "the background is transparent"
    picture = ElementTree.parse(run / "loss.svg")
    comments = [text for text in re.findall("<!-- (.+?) -->", (run / "loss.svg").read_text())]
    for text in ("training", "guessing", *SPLITS, "step"):
        assert text in comments
    assert picture.getroot().get("viewBox")


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
        page.draw_pictures(records.read(copy))
    assert {name: (copy / name).read_bytes() for name in pictures.PICTURES} == before


def test_a_name_with_dollars_is_no_formula(tmp_path):
    """matplotlib would refuse the first, and leave the dollars of the second out."""
    pixels = []
    for name in (r"$\frac$", "$a$", "a"):
        entries = [{"step": 1, "loss": 1.0}, {"step": 1, f"{name}_loss": 1.0}]
        pictures.draw_loss(entries, None, tmp_path / "picture.png")
        pixels.append((tmp_path / "picture.png").read_bytes())
    assert len(set(pixels)) == 3


def test_a_picture_that_cannot_be_written_is_one_line_and_the_page_is_there(copy, capsys):
    for name in pictures.PICTURES:
        (copy / name).unlink()
    (copy / "report.html").unlink()
    (copy / "loss.png").mkdir()
    with pytest.raises(SystemExit) as stopped:
        in_process(report, copy)
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: the pictures: cannot write into {copy}: ")
    shown = Page((copy / "report.html").read_text())
    assert shown.tags.count("img") == 1, "loss.svg is written before"


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
        ("predictions_validation_matched.jsonl", None, "No such file or directory"),
        ("metrics.jsonl", None, "No such file"),
        ("args.json", "[]", "holds no JSON object"),
        ("args.json", None, "has no args.json"),
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


@pytest.mark.parametrize("program", [report, runs], ids=["report", "runs"])
def test_a_damaged_line_of_a_run_is_said_and_all_else_is_shown(copy, capsys, program):
    path = copy / "metrics.jsonl"
    before = records.read(copy).entries
    path.write_bytes(b"\xff\n" + path.read_bytes() + b'{"st')
    in_process(program, copy)
    printed = capsys.readouterr()
    assert printed.err == f"{path} is read without 2 damaged lines\n"
    assert copy.name in printed.out
    assert records.read(copy).entries == before


# -----------------------------------------------------------------------------
# While it grows


def test_a_run_can_be_watched_from_its_first_evaluation_on(tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(runlog, "PAGE_AFTER", 0)
    monkeypatch.setattr(runlog, "PAGE_SHARE", 1e9)  # at each line
    shown = []
    write = page.write

    def write_and_read(run, is_under_way):
        write(run, is_under_way)
        shown.append((run.folder / "report.html").read_text())

    monkeypatch.setattr(page, "write", write_and_read)
    flags = ["--model", "tiny/model", "--dataset", "tiny/data", "--steps", 2, "--batch-size", 2]
    flags += ["--eval-limit", 4, "--max-new-tokens", 2, "--keep-dequantized"]
    in_process(train, *flags, "--out", out)
    base, first, *_, last = shown
    for content, expected, steps in (
        (base, "Step 0 of 2.", "0 of 2 steps of 2 rows"),
        (first, "Step 1 of 2, training loss 1", "1 of 2 steps of 2 rows"),
    ):
        assert expected in content
        assert steps in content
        assert 'http-equiv="refresh"' in content
        assert "no number" in content, "what the base wrote"
    assert "<img" in first
    assert "refresh" not in last
    assert "the fine-tuned model" in last


def test_a_page_takes_a_small_part_of_the_time_and_none_of_trainings_memory(copy):
    log = runlog.RunLog(Namespace(out=copy), None, torch.device("cpu"))
    log.file = copy / "metrics.jsonl"
    before = log.memory_before
    log.page_due = 0
    started = time.perf_counter()
    log.update_page()
    seconds = time.perf_counter() - started
    assert log.page_due - time.perf_counter() > 50 * seconds
    assert before is None or log.memory_before >= before - 2**20
    page_before = (copy / "report.html").stat().st_mtime_ns
    log.update_page()
    assert (copy / "report.html").stat().st_mtime_ns == page_before


def test_what_fails_again_and_again_is_said_once_and_forgotten_when_it_succeeds(copy, capsys):
    log = runlog.RunLog(Namespace(out=copy), None, torch.device("cpu"))
    (copy / "report.html").unlink()
    (copy / "report.html").mkdir()
    for _ in range(2):
        log.write_page()
    assert log.extras.failed == ["report.html"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: report.html: cannot write into ")
    (copy / "report.html").rmdir()
    log.write_page()
    assert log.extras.failed == []


def test_a_killed_run_has_a_page_as_far_as_it_came(copy):
    (copy / "results.json").unlink()
    in_process(report, copy)
    content = (copy / "report.html").read_text()
    assert "Step 60 of 60, training loss 0." in content
    assert "accuracy after step 60: validation_matched " in content
    assert "refresh" not in content


# -----------------------------------------------------------------------------
# scripts.runs


@pytest.fixture
def two(run, tmp_path):
    """The run, and one of another rank that is better."""
    other = shutil.copytree(run, tmp_path / "other")
    args = read_json(other / "args.json") | {"rank": 4, "alpha": 8.0, "dropout": 0.1}
    files.write_json(other / "args.json", args)
    results = read_json(other / "results.json")
    for result in results["finetuned"].values():
        result |= {"accuracy": 0.9, "ci95": [0.851, 0.949]}
    files.write_json(other / "results.json", results)
    return run, other


def test_runs_are_compared_best_first_by_what_differs(two, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    in_process(runs, *two, tmp_path / "empty", "--plot", tmp_path / "losses.svg")
    printed = capsys.readouterr()
    common, table, below = printed.out.split("\n\n")
    assert "learning rate 0.003" in common
    assert "95 % interval" in below
    assert "rank" not in common
    titles, best, other = table.splitlines()
    assert titles.split()[:5] == ["run", "rank", "alpha", "dropout", "trained"]
    assert titles.split()[-2:] == ["min", "GiB"]
    assert best.split()[0].endswith("/other")
    assert best.split()[1:5] == ["4", "8", "0.1", "36,864"]
    assert "90.0 (85-95)" in best
    assert other.split()[0].endswith("/run")
    assert other.split()[1:4] == ["8", "16", "0.05"]
    matched = read_json(two[0] / "results.json")["finetuned"]["validation_matched"]
    assert f"{100 * matched['accuracy']:.1f} (" in other
    assert all(len(line) < 80 for line in common.splitlines())
    assert f"{tmp_path / 'empty'} is not a run of train.py" in printed.err
    assert "other -->" in (tmp_path / "losses.svg").read_text()


def test_runs_that_differ_at_the_beginning_of_long_names_are_told_apart(two, tmp_path, capsys):
    folders = []
    for number, folder in enumerate(two):
        copied = shutil.copytree(folder, tmp_path / f"{number}_{'x' * 40}")
        differs = {"dataset": f"{number}/{'y' * 40}", "weight_decay": 0.1 + number * 1e-9}
        files.write_json(copied / "args.json", read_json(copied / "args.json") | differs)
        folders.append(copied)
    in_process(runs, *folders, "--plot", tmp_path / "losses.svg")
    common, table, _ = capsys.readouterr().out.split("\n\n")
    assert "dataset" not in common and "decay" not in common
    for number, line in enumerate(reversed(table.splitlines()[1:])):
        assert f"{number}_xxx" in line
        assert f" {number}/yyy" in line
        assert f"{folders[number]} -->" in (tmp_path / "losses.svg").read_text()


@pytest.mark.parametrize("text", ['{"finetuned": {"validation": {}}}', '{"finetuned": 1}'])
def test_a_run_in_another_form_is_left_out_with_one_line(two, copy, capsys, text):
    (copy / "results.json").write_text(text)
    in_process(runs, copy, *two)
    printed = capsys.readouterr()
    assert printed.err.startswith(f"left out: {copy}: ")
    assert printed.err.count("\n") == 1
    assert len(printed.out.split("\n\n")[1].splitlines()) == 1 + 2


def test_no_finished_run_is_one_line(copy, capsys):
    (copy / "results.json").unlink()
    with pytest.raises(SystemExit, match="error: there is no finished run to compare"):
        in_process(runs, copy)
    assert capsys.readouterr().err == f"left out: {copy} is not finished: step 60\n"
