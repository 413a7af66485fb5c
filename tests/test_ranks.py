"""Several ranks train and answer as one does; one that dies ends the run, or it starts anew from the last save."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, distance, read_json, script
from safetensors.torch import load_file

import checkpoint

RUN = ("--model", "tiny/model", "--dataset", "tiny/data", "--limit", 97, "--eval-limit", 25, "--max-new-tokens", 3, "--learning-rate", 1e-3, "--dtype", "fp32")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # as torchrun sets it: the same sums in the same order


def torchrun(*arguments, options=("--nproc-per-node", 2), **more) -> subprocess.CompletedProcess:
    return script("-m", "torch.distributed.run", *options, *arguments, env=ONE_THREAD, **more)


def start(*arguments, options=()) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options, "train.py", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | ONE_THREAD)


def kill_a_rank(agent: subprocess.Popen, out, step: int) -> None:
    while not ((out / checkpoint.NAME).exists() and checkpoint.load(out)[1]["step"] >= step):
        assert agent.poll() is None, agent.communicate()
        time.sleep(0.05)
    workers = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[1]), signal.SIGKILL)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same 26 steps of 8 rows (the 13th has one, so the second rank has none) by one rank and by two."""
    folder = tmp_path_factory.mktemp("pair")
    assert script("train.py", *RUN, "--dropout", 0, "--steps", 26, "--batch-size", 8, "--out", folder / "one", env=ONE_THREAD).returncode == 0
    done = torchrun("train.py", *RUN, "--dropout", 0, "--steps", 26, "--batch-size", 4, "--out", folder / "two")
    assert done.returncode == 0, done.stderr
    return folder / "one", folder / "two", done.stdout


def test_two_ranks_have_the_gradients_of_one(tmp_path):
    """On both losses, of seven rows and of one. fp32 rounds each sum to 6e-8 of it: 1e-6 leaves room for another order."""
    found = []
    for count in (1, 2):
        path = tmp_path / f"{count}.safetensors"
        done = torchrun("tests/rank_gradients.py", path, options=("--nproc-per-node", count))
        assert done.returncode == 0, done.stderr
        found.append(load_file(path))
    assert found[0]
    for name, expected in found[0].items():
        assert expected.norm() > 0 and distance(found[1][name], expected) < 1e-6, name


def test_two_ranks_train_and_answer_as_one_does(pair):
    one, two, _ = pair
    adapters = [load_file(run / "adapter_model.safetensors") for run in (one, two)]
    for name, expected in adapters[0].items():
        assert distance(adapters[1][name], expected) < 1e-3, name  # Adam divides by the gradient's size, which magnifies rounding
    for split in ("matched", "mismatched"):
        texts = [(run / f"predictions_validation_{split}.jsonl").read_text().splitlines() for run in (one, two)]
        assert len(texts[0]) == 25
        for mine, theirs in zip(*texts):
            mine, theirs = (json.loads(line) for line in (mine, theirs))
            assert [mine[key] for key in ("idx", "completion", "prediction")] == [theirs[key] for key in ("idx", "completion", "prediction")]


def test_the_first_rank_alone_prints_and_writes(pair):
    one, two, printed = pair
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert printed.count("baseline:") == 1 and printed.count("layers adapted") == 1
    assert len((two / "metrics.jsonl").read_text().splitlines()) == len((one / "metrics.jsonl").read_text().splitlines())
    assert read_json(two / "args.json")["ranks"] == 2


def test_eval_on_two_ranks_counts_every_row_once(pair, tmp_path):
    one, _, _ = pair
    alone = script("eval.py", "--adapter", one, "--limit", 25, "--out", tmp_path / "one", env=ONE_THREAD)
    done = torchrun("eval.py", "--adapter", one, "--limit", 25, "--out", tmp_path / "two")
    assert alone.returncode == done.returncode == 0, alone.stderr + done.stderr
    assert done.stdout.count("modules adapted") == 1
    found = [read_json(tmp_path / name / "results.json")["finetuned"]["validation_matched"] for name in ("one", "two")]
    assert [found[1][key] for key in ("n", "correct", "unparsed")] == [found[0][key] for key in ("n", "correct", "unparsed")] and found[0]["n"] == 25


def test_a_rank_that_dies_ends_the_run_within_a_minute_and_the_last_save_goes_on(tmp_path):
    out = tmp_path / "run"
    agent = start(*RUN, "--steps", 2000, "--batch-size", 4, "--save-every", 2, "--out", out)
    kill_a_rank(agent, out, 2)
    begin = time.monotonic()
    _, errors = agent.communicate(timeout=60)
    assert agent.returncode != 0 and time.monotonic() - begin < 60
    assert "error: rank 0: another rank has ended" in errors and "Signal 9 (SIGKILL)" in errors
    step = checkpoint.load(out)[1]["step"]
    done = torchrun("train.py", "--resume", out, "--steps", step + 1)
    assert done.returncode == 0 and f"going on after step {step} of {step + 1}" in done.stdout, done.stderr


def test_a_run_started_anew_by_torchrun_goes_on_to_the_same_bytes(tmp_path):
    """With dropout, which each rank draws from a state of its own."""
    steps = (*RUN, "--steps", 60, "--batch-size", 2, "--save-every", 3)
    assert torchrun("train.py", *steps, "--out", tmp_path / "whole").returncode == 0
    agent = start(*steps, "--out", tmp_path / "run", options=("--max-restarts", "1"))
    kill_a_rank(agent, tmp_path / "run", 6)
    output, errors = agent.communicate(timeout=120)
    assert agent.returncode == 0 and "going on after step" in output, errors
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == (tmp_path / "whole" / "adapter_model.safetensors").read_bytes()


def test_restarts_need_a_folder_to_find_again():
    done = torchrun("train.py", *RUN, options=("--nproc-per-node", 1, "--max-restarts", 1))
    assert done.returncode != 0 and "--max-restarts needs --out" in done.stderr


def test_another_number_of_ranks_would_be_another_run(pair):
    done = script("train.py", "--resume", pair[1])
    assert done.returncode == 1 and "was trained with 8 rows a step, on 1 processes there are 4" in done.stderr
