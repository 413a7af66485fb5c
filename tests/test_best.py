"""--keep-best: RUN/best/ holds the adapter of the best evaluation, an adapter like any other."""

import itertools
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import in_process, read_json
from safetensors.torch import load_file

import eval as evaluation
import train
from support import best, cli, files, hub, page

TINY = ("--model", "tiny/model", "--dataset", "tiny/data")
# At this learning rate an evaluation on the way is better than the last one.
RUN = (
    *TINY,
    "--dtype", "fp32",
    "--rank", 4,
    "--steps", 40,
    "--batch-size", 8,
    "--learning-rate", 2e-2,
    "--warmup-steps", 0,
    "--eval-limit", 24,
    "--max-new-tokens", 1,
    "--keep-dequantized",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    in_process(train, *RUN, "--eval-every", 8, "--keep-best", "--out", out)
    return out


def evaluations(run: Path) -> dict[int, dict]:
    """Returns the lines of metrics.jsonl that are of an evaluation after the first step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" not in line and line["step"] > 0}


def mean(line: dict, kind: str) -> float:
    return (line[f"validation_matched_{kind}"] + line[f"validation_mismatched_{kind}"]) / 2


def test_the_best_is_the_highest_mean_accuracy_over_the_splits_and_then_the_lowest_loss(run):
    lines = evaluations(run)
    assert sorted(lines) == [8, 16, 24, 32, 40]
    accuracies = {step: round(mean(line, "accuracy"), 9) for step, line in lines.items()}
    losses = {step: mean(line, "loss") for step, line in lines.items()}
    step = max(lines, key=lambda step: (accuracies[step], -losses[step]))
    line = lines[step]
    assert read_json(run / "results.json")["best"] == {
        "step": step,
        "accuracy": pytest.approx(mean(line, "accuracy"), abs=1e-12),
        "loss": pytest.approx(mean(line, "loss"), abs=1e-12),
        "splits": {
            split: {"accuracy": line[f"{split}_accuracy"], "loss": line[f"{split}_loss"]}
            for split in ("validation_matched", "validation_mismatched")
        },
    }


def test_eval_finds_its_accuracy_and_its_settings_again(run, tmp_path):
    out = tmp_path / "results"
    flags = ("--limit", 24, "--max-new-tokens", 1, "--out", out)
    in_process(evaluation, "--adapter", run / best.FOLDER, *flags)
    kept = read_json(run / "results.json")["best"]
    for split, result in read_json(out / "results.json")["finetuned"].items():
        assert result["accuracy"] == kept["splits"][split]["accuracy"]
    assert read_json(run / "best" / "args.json") == read_json(run / "args.json")


def test_it_has_the_tensors_of_its_step(run, tmp_path, monkeypatch):
    step = read_json(run / "results.json")["best"]["step"]
    assert step < 40, "the adapter at the end is another one, or this says little"
    # The same run, stopped and saved at this step.
    calls = itertools.count(1)
    training_step = train.training_step

    def stopped_at_the_step(*arguments):
        if next(calls) == step:
            signal.raise_signal(signal.SIGUSR1)
        return training_step(*arguments)

    monkeypatch.setattr(train, "training_step", stopped_at_the_step)
    in_process(train, *RUN, "--eval-limit", 1, "--out", tmp_path / "run")
    expected = load_file(tmp_path / "run" / "adapter_model.safetensors")
    found = load_file(run / "best" / "adapter_model.safetensors")
    last = load_file(run / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert not torch.equal(found[name], last[name]), name


def test_a_run_prints_and_shows_which_adapter_was_the_best(run, capsys):
    in_process(train, "--resume", run)  # only the evaluation is left to do
    kept = read_json(run / "results.json")["best"]
    accuracy = f"{kept['accuracy']:.4f}"
    line = f"the best adapter, of step {kept['step']} (accuracy {accuracy}, "
    assert line in capsys.readouterr().out
    content = (run / "report.html").read_text()
    assert f"The best adapter is that of step {kept['step']}, kept in best/" in content
    share = page.percent(kept["splits"]["validation_matched"]["accuracy"])
    assert f"validation_matched {share}" in content


def test_a_run_with_a_best_adapter_is_found_as_one_adapter(run):
    assert hub.find_adapter(str(run)) == run
    assert hub.find_adapter(str(run.parent)) == run
    assert hub.find_adapter(str(run / "best")) == run / "best"


def kept(accuracy: float, loss: float, step: int = 1) -> dict:
    return best.figures(step, {"a": {"accuracy": accuracy, "loss": loss}})


@pytest.mark.parametrize(
    "new, old, is_better",
    [
        (kept(0.5, 9.0), None, True),
        (kept(0.6, 9.0), kept(0.5, 1.0), True),
        (kept(0.4, 1.0), kept(0.5, 9.0), False),
        (kept(0.5, 1.0), kept(0.5, 2.0), True),
        (kept(0.5, 2.0), kept(0.5, 1.0), False),
        (kept(0.5, 1.0, step=2), kept(0.5, 1.0), False),  # a step that is taken again
        (kept(0.5, math.nan), kept(0.5, 1.0), False),
        # Seven of 24 twice, or six and eight: the same mean, but for rounding.
        (kept((7 / 24 + 7 / 24) / 2, 2.0), kept((6 / 24 + 8 / 24) / 2, 1.0), False),
        (kept((6 / 24 + 8 / 24) / 2, 2.0), kept((7 / 24 + 7 / 24) / 2, 1.0), False),
    ],
)
def test_the_accuracy_decides_then_the_loss_and_then_the_earlier_step(new, old, is_better):
    assert best.is_better(new, old) == is_better


def test_a_damaged_best_adapter_is_one_line(run, tmp_path):
    shutil.copytree(run / "best", tmp_path / "best")
    path = tmp_path / "best" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    line = re.escape(f"{path} is damaged or cut short (") + r".*\): remove it"
    with pytest.raises(ValueError, match=line):
        best.read(tmp_path)
    shutil.copy(run / "adapter_model.safetensors", path)  # one that says nothing of itself
    with pytest.raises(ValueError, match="its evaluation is not JSON"):
        best.read(tmp_path)


def test_a_damaged_best_adapter_ends_a_resume_before_it_trains(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "best" / "adapter_model.safetensors").write_bytes(b"")
    monkeypatch.setattr(evaluation, "load_model", None)
    with pytest.raises(SystemExit, match="adapter_model.safetensors is damaged or cut short"):
        in_process(train, "--resume", copy, "--steps", 48)
    assert read_json(copy / "results.json") == read_json(run / "results.json")


def test_what_a_kill_has_left_in_best_is_removed(tmp_path):
    (tmp_path / "args.json").write_text("{}")
    unfinished = tmp_path / "best" / f".save.1{files.UNFINISHED}"
    unfinished.mkdir(parents=True)
    (unfinished / "adapter_model.safetensors").write_bytes(b"half of it")
    with best.replacing(tmp_path):
        pass
    assert os.listdir(tmp_path / "best") == ["args.json"]


def test_keep_best_without_evaluations_is_refused(capsys, tmp_path):
    for flags in ((*TINY, "--out", tmp_path / "run"), ("--resume", begun(tmp_path / "begun"))):
        with pytest.raises(SystemExit) as stopped:
            in_process(train, *flags, "--keep-best")
        assert stopped.value.code == 2
        line = "error: --keep-best needs --eval-every, which says when to evaluate; "
        assert capsys.readouterr().err.startswith(line)
    assert not (tmp_path / "run").exists()


def begun(run: Path) -> Path:
    """Returns the folder of a run that was stopped before its first save."""
    run.mkdir()
    arguments = cli.as_json(cli.train_arguments([*TINY, "--rank", "4"]))
    (run / "args.json").write_text(json.dumps(arguments))
    return run


def test_a_folder_called_best_that_is_no_runs_is_not_written_into(tmp_path):
    (tmp_path / "best").mkdir()
    with pytest.raises(SystemExit, match="holds a best already"):
        in_process(train, *RUN, "--out", tmp_path)
