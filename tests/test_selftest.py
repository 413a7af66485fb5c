"""scripts/selftest.py: what agrees, what differs and what fails on a machine is each a line."""

import re
import shutil
import sys
from pathlib import Path

from conftest import ROOT, in_process, read_json

import eval as evaluation
from scripts import selftest

SMALL = ["--device", "cpu", "--dtype", "fp32", "--rows", 4]
LINE = re.compile(r"(?P<what>.+?) +fp32 +(?P<figures>(?:[\d.,e-]+ +)*)(?P<status>\S.*)")


def run(out: Path, *arguments) -> int:
    """Runs the script in this process, and returns its exit status."""
    try:
        in_process(selftest, *SMALL, "--out", out / "selftest.json", *arguments)
    except SystemExit as end:
        return end.code
    return 0


def lines_of(printed: str) -> dict[str, tuple[str, list[str]]]:
    """Returns the status and the figures of each line: none, one, or one and its bound."""
    found = map(LINE.fullmatch, printed.splitlines())
    return {line["what"]: (line["status"], line["figures"].split()) for line in found if line}


def test_by_default_it_goes_through_fp32_and_the_fastest_dtype(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["selftest.py", "--device", "cpu"])
    args = selftest.parse_arguments()
    assert args.dtype[0] == "fp32"
    assert set(args.dtype) <= evaluation.DTYPES.keys()
    assert args.random_phi_2 is None
    monkeypatch.setattr(sys, "argv", ["selftest.py", "--device", "cuda"])
    assert selftest.parse_arguments().random_phi_2 == 32


def test_everything_agrees_here(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(selftest, "TIMES", 1)  # nobody reads these times
    assert run(tmp_path) == 0
    printed = capsys.readouterr().out
    lines = lines_of(printed)
    others = {what: status for what, (status, _) in lines.items() if status != "ok"}
    assert others == {"CUDA graphs": "skipped: only CUDA has graphs"}
    compared = [figures for _, figures in lines.values() if len(figures) == 2]
    # NF4's three, attention, and four results of tiny/ with NF4 and without.
    assert len(compared) == 3 + 1 + 2 * 4
    assert all(float(figure) <= float(bound) for figure, bound in compared)
    assert re.search(r"^versions: .*'torch': ", printed, re.MULTILINE)
    saved = read_json(tmp_path / "selftest.json")
    assert saved["machine"]["versions"]["torch"]
    assert {line["what"]: line["status"] for line in saved["lines"]} == {
        what: status for what, (status, _) in lines.items()
    }

    table = (ROOT / "docs" / "benchmarks.md").read_text().split("## By machine")[1]
    heading = next(line for line in table.splitlines() if line.startswith("| machine"))
    _, _, _, *measured, _, _ = heading.strip("| ").split(" | ")
    measured.remove("peak memory in training, GiB")  # of a GPU
    assert len(measured) == 4
    for title in measured:
        (figure,) = lines[title][1]
        assert float(figure.replace(",", "")) > 0


def test_a_stage_that_fails_is_a_line_and_the_others_follow(tiny, tmp_path, capsys):
    """A model whose weights are cut short, as after a download that was broken off."""
    shutil.copytree(tiny, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert run(tmp_path, "--model", tmp_path / "cut") == 1

    printed = capsys.readouterr().out
    status_of = {what: status for what, (status, _) in lines_of(printed).items()}
    failed = {what for what, status in status_of.items() if status.startswith("failed: ")}
    assert failed == {"beside transformers + PEFT", "times and memory"}
    assert "is damaged or cut short" in status_of["times and memory"]
    assert status_of["NF4, share of indices off plain torch"] == "ok"
    assert printed.count("Traceback") >= len(failed)


def test_what_is_beyond_its_bound_differs(monkeypatch, capsys, tmp_path):
    """Attention is never fp64's to the bit."""
    monkeypatch.setattr(selftest, "ATTENTION_BOUNDS", {"fp32": 0.0})
    monkeypatch.setattr(selftest, "STAGES", {"attention": selftest.check_attention})
    assert run(tmp_path) == 1
    assert {status for status, _ in lines_of(capsys.readouterr().out).values()} == {"differs"}
    assert selftest.checked("a number", float("nan"), 1.0).status == "differs"


def test_without_the_reference_libraries_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    (line,) = selftest.check_beside_transformers(None)
    assert line.status == "skipped: pip install peft"
