"""Nothing is lost: a run that was stopped, killed or out of disk goes on from its last save, to the same bytes."""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, script
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint

KILLS = int(os.environ.get("KILLS", 5))  # make torture: 25
RUN = ("--model", "tiny/model", "--dataset", "tiny/data", "--steps", 40, "--batch-size", 4, "--accumulate", 2, "--limit", 100, "--eval-limit", 2,
       "--max-new-tokens", 1, "--dropout", 0.1, "--residual-dropout", 0.1, "--learning-rate", 1e-3, "--save-every", 7)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbs: 40 steps, with dropout, accumulation and a ragged last batch (100 rows, 8 a step)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert script("train.py", *RUN, "--out", out).returncode == 0
    return out


def start(out, *more, limit: int | None = None) -> subprocess.Popen:
    arguments = RUN + ("--out", out) if not (out / "args.json").exists() else ("--resume", out)
    before = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    return subprocess.Popen([sys.executable, "train.py", *map(str, arguments + more)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, preexec_fn=before)


def step_of(out) -> int:
    return checkpoint.load(out)[1]["step"] if (out / checkpoint.NAME).exists() else 0


def wait_for(out, step: int, process) -> None:
    while step_of(out) < step and process.poll() is None:
        time.sleep(0.02)


def metrics(out) -> list[dict]:
    return [{key: value for key, value in json.loads(line).items() if "second" not in key and "memory" not in key} for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same(out, whole) -> None:
    assert (out / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    (mine, state), (theirs, expected) = checkpoint.load(out), checkpoint.load(whole)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (state["step"], state["loop"]) == (expected["step"], expected["loop"])
    assert metrics(out) == metrics(whole)
    assert (out / "predictions_validation_matched.jsonl").read_bytes() == (whole / "predictions_validation_matched.jsonl").read_bytes()


def test_the_same_seed_gives_the_same_run_byte_for_byte(whole, tmp_path):
    assert script("train.py", *RUN, "--out", tmp_path / "again").returncode == 0
    assert_same(tmp_path / "again", whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on_to_the_same_bytes(whole, tmp_path, number):
    out = tmp_path / "run"
    process = start(out)
    wait_for(out, 7, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    assert f"python train.py --resume {out}" in output.splitlines()[-1] and f"after step {step_of(out)} of 40" in output.splitlines()[-1]
    assert 7 <= step_of(out) < 40, "the signal must come while it trains, or this test says little"
    assert script("train.py", "--resume", out).returncode == 0
    assert_same(out, whole)


def test_kills_at_random_moments_lose_no_more_than_the_steps_since_the_last_save(whole, tmp_path):
    """kill -9, some within a save: each is after one step. It never goes back, it can always go on, and it ends the same."""
    out, draw, reached = tmp_path / "run", random.Random(KILLS), 0
    for number in range(KILLS):
        process = start(out, "--save-every", 1)
        wait_for(out, 0 if number == 0 else min(reached + 1, 39), process)
        time.sleep(draw.uniform(0, 6 if number == 0 else 0.4))
        process.kill()
        process.communicate()
        now = step_of(out)
        assert now >= reached
        reached = now
    for _ in range(2):  # the second: a run that has ended says so again, and changes nothing
        done = start(out, "--save-every", 7)
        assert done.wait(120) == 0, done.communicate()[1]
    assert metrics(out) == metrics(whole), "the last evaluation is told once"
    assert not list(out.glob(".*")), "what a killed save left behind is cleared away"
    assert checkpoint.load(out)[1]["step"] == 40
    assert (out / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_a_full_disk_is_one_line_and_the_last_save_still_loads(whole, tmp_path):
    """A limit on the size of files: room for the adapter and for the first state, none for a state with an optimiser's tensors."""
    out = tmp_path / "run"
    process = start(out, limit=300_000)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in errors
    assert f"error: cannot write {out / checkpoint.NAME}" in errors.splitlines()[-1] and "is as it was" in errors.splitlines()[-1]
    assert step_of(out) == 0 and sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []
    assert script("train.py", "--resume", out).returncode == 0
    assert_same(out, whole)


def test_what_would_make_another_run_is_refused_with_the_difference(whole):
    for more, expected in ((("--rank", 4), "--rank 4 (it has 8)"), (("--seed", 5), "--seed 5 (it has 0)"), (("--model", "tiny/other"), "--model tiny/other (it has"),
                           (("--dataset", "other"), "--dataset other (it has tiny/data)")):
        done = script("train.py", "--resume", whole, *more)
        assert done.returncode == 1 and expected in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_more_steps_may_be_asked_for_and_the_new_schedule_is_named(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    done = script("train.py", "--resume", out, "--steps", 45)
    assert done.returncode == 0 and "45 steps instead of 40" in done.stdout and step_of(out) == 45
    done = script("train.py", "--resume", out, "--steps", 44)
    assert done.returncode == 1 and done.stderr.endswith("has taken 45 steps already, more than 44\n") and step_of(out) == 45


def test_a_run_that_ended_before_its_first_step_starts_anew(whole, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "args.json").write_text((whole / "args.json").read_text())
    assert script("train.py", "--resume", out).returncode == 0
    assert_same(out, whole)


def test_a_loss_that_is_not_finite_stops_at_its_step_and_names_its_rows(tmp_path):
    done = script("train.py", *RUN, "--learning-rate", 1e30, "--max-grad-norm", 1e30, "--weight-decay", 0, "--out", tmp_path / "run")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr and "norm of its gradient" in last and "with the rows [" in last
    step = int(last.split("step ")[1].split(":")[0])
    assert f"after step {step_of(tmp_path / 'run'):,}" in last and step_of(tmp_path / "run") < step
    tensors, _ = checkpoint.load(tmp_path / "run")
    assert all(tensor.isfinite().all() for name, tensor in tensors.items() if name.startswith("adapter."))


def test_fp16_is_refused_with_the_reason():
    done = script("train.py", "--dtype", "fp16")
    assert done.returncode == 2 and "65,504" in done.stderr and len(done.stderr.splitlines()) == 1


# ---- Damaged files of a run

@given(st.data())
@settings(deadline=None, max_examples=int(os.environ.get("CASES", 200)) // 4)
def test_a_flipped_bit_or_a_cut_in_a_runs_tensors_is_found(whole, data):
    name = data.draw(st.sampled_from([checkpoint.NAME, "adapter_model.safetensors"]))
    content = bytearray((whole / name).read_bytes())
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(content) * 8 - 1))
        content[place // 8] ^= 1 << place % 8
    else:
        del content[data.draw(st.integers(0, len(content) - 1)):]
    damaged = whole / "damaged.safetensors"
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.read_tensors(damaged)


def test_every_single_flipped_bit_of_a_small_file_is_found(tmp_path):
    """All of them: a flip within the name of the checksum's own key once made the file look like one that carries none."""
    path = tmp_path / "small.safetensors"
    checkpoint.write_tensors(path, {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3])}, {"state": "{}"})
    content = path.read_bytes()
    for place in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="damaged"):
            checkpoint.read_tensors(path)
