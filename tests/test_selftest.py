"""scripts/selftest.py: what agrees, what differs and what fails on a machine is each a line."""

import io
import shutil
import sys
from contextlib import redirect_stdout

import pytest
from conftest import ROOT, in_process, read_json

import eval as evaluation
from scripts import selftest

SMALL = ["--device", "cpu", "--dtype", "fp32", "--rows", 4]


def run(*arguments) -> int:
    """Runs the script in this process, and returns its exit status."""
    try:
        in_process(selftest, *SMALL, *arguments)
    except SystemExit as end:
        return end.code
    return 0


def status_of(path) -> dict[str, str]:
    return {line["what"]: line["status"] for line in read_json(path)["lines"]}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("selftest") / "new" / "report.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selftest, "TIMES", 1)  # nobody reads these times
        output = io.StringIO()
        with redirect_stdout(output):
            assert run("--out", path) == 0
    return path, output.getvalue()


def test_by_default_it_goes_through_fp32_and_the_fastest_dtype(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["selftest.py", "--device", "cpu"])
    args = selftest.parse_arguments()
    assert args.dtype[0] == "fp32"
    assert set(args.dtype) <= evaluation.DTYPES.keys()
    assert args.random_phi_2 is None
    monkeypatch.setattr(sys, "argv", ["selftest.py", "--device", "cuda"])
    assert selftest.parse_arguments().random_phi_2 == 32


def test_everything_agrees_here(report):
    path, _ = report
    lines = read_json(path)["lines"]
    states = {line["what"]: line["status"] for line in lines if line["status"] != "ok"}
    assert states == {
        "CUDA graphs": "skipped: only CUDA has graphs",
        selftest.PEAK: "skipped: only a GPU's allocator reports it",
    }
    compared = [line for line in lines if line["bound"] is not None]
    # NF4's three, attention in two ways, and four results of tiny/ with NF4 and without.
    assert len(compared) == 3 + 2 + 2 * 4
    assert all(line["figure"] <= line["bound"] for line in compared)
    assert {line["what"] for line in lines if line["figure"]} >= {
        *selftest.MEASURED
    } - {selftest.PEAK}  # fmt: skip


def test_the_last_line_is_one_of_the_table_by_machine(report):
    path, printed = report
    *_, row = printed.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    table = text.split("## By machine")[1].split("\n## ")[0]
    heading = next(line for line in table.splitlines() if line.startswith("| machine"))
    columns = [cell.strip() for cell in heading.strip("|").split("|")]
    assert columns == ["machine", "model", "dtype", *selftest.MEASURED, "checks", "with"]
    assert len(cells) == len(columns)
    of = dict(zip(columns, cells))
    machine = read_json(path)["machine"]["device_name"]
    assert (of["machine"], of["model"], of["dtype"]) == (machine, "tiny", "fp32")
    assert float(of[selftest.TRAINING].replace(",", "")) > 0
    assert of["checks"] == "17 ok, 2 skipped"
    for line in table.splitlines():
        if line.startswith("|"):  # also those of other people
            assert line.count("|") == heading.count("|"), line


def test_a_stage_that_fails_is_a_line_and_the_others_follow(tiny, tmp_path, capsys):
    """A model whose weights are cut short, as after a download that was broken off."""
    shutil.copytree(tiny, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    out = tmp_path / "report.json"
    assert run("--model", tmp_path / "cut", "--out", out) == 1

    states = status_of(out)
    failed = {what for what, status in states.items() if status.startswith("failed")}
    assert failed == {"beside transformers + PEFT", "times and memory"}
    assert "is damaged or cut short" in states["times and memory"]
    assert states["NF4, share of indices off plain torch"] == "ok"
    printed = capsys.readouterr().out
    for status in states.values():
        assert status in printed


def test_what_is_beyond_its_bound_differs(tmp_path, monkeypatch):
    """Attention is never fp64's to the bit."""
    monkeypatch.setattr(selftest, "ATTENTION_BOUNDS", {"fp32": 0.0})
    monkeypatch.setattr(selftest, "STAGES", {"attention": selftest.check_attention})
    assert run("--out", tmp_path / "report.json") == 1
    assert set(status_of(tmp_path / "report.json").values()) == {"differs"}
    assert selftest.checked("a number", "fp32", float("nan"), 1.0).status == "differs"


def test_without_the_reference_libraries_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    (line,) = selftest.check_beside_transformers(None, "fp32")
    assert line.status == "skipped: pip install peft"
