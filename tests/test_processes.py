"""Several processes train and answer as one does; one that dies ends the run, or it is resumed."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import distance, read_json, script, start_script
from safetensors.torch import load_file

from support import best, claims, loss_scale, processes, resume

RUN = (
    "--model", "tiny/model",
    "--dataset", "tiny/data",
    "--limit", 97,
    "--eval-limit", 13,
    "--max-new-tokens", 3,
    "--learning-rate", 1e-3,
    "--dtype", "fp32",
    "--quant", "none",  # NF4 would be the same on every process, and takes each 2 s to import
)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # as torchrun sets it: the same sums in the same order
TWO_RANKS = ("--nproc-per-node", 2)
TORCHRUN = ("-m", "torch.distributed.run")
# torchrun then forks the processes, which import nothing again. Without it each is a new Python,
# as in the first test in which one dies.
FORKED = ("--run-path", "--start-method", "fork")


def torchrun(*arguments, options=TWO_RANKS) -> subprocess.CompletedProcess:
    return script(*TORCHRUN, *FORKED, *options, *arguments, env=ONE_THREAD)


def start_training(*arguments, options=()) -> subprocess.Popen:
    """Starts two processes of train.py and does not wait for them."""
    command = (*TORCHRUN, *options, *TWO_RANKS, "train.py", *arguments)
    return start_script(*command, env=ONE_THREAD)


def saved_step(out: Path) -> int:
    """Returns the step of a run's last save, 0 before the first one."""
    if not (out / resume.NAME).exists():
        return 0
    return resume.load(out).state.progress.step


def kill_second_process(agent: subprocess.Popen, out: Path, step: int) -> None:
    """Waits until a run has saved `step`, then kills a process that does not write."""
    while saved_step(out) < step:
        assert agent.poll() is None, agent.communicate()
        time.sleep(0.05)
    children = subprocess.run(
        ["pgrep", "-P", str(agent.pid)], capture_output=True, text=True, check=True
    )
    _, second = children.stdout.split()
    os.kill(int(second), signal.SIGKILL)


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same run by one process and by two: 14 steps of 8 rows, of which the 13th has one row.

    Returns both folders, and what the two processes printed.
    """
    folder = tmp_path_factory.mktemp("pair")
    command = ("train.py", *RUN, "--dropout", 0, "--steps", 14, "--eval-every", 7, "--keep-best")
    alone = script(*command, "--batch-size", 8, "--out", folder / "one", env=ONE_THREAD)
    assert alone.returncode == 0, alone.stderr
    done = torchrun(*command, "--batch-size", 4, "--out", folder / "two")
    assert done.returncode == 0, done.stderr
    return folder / "one", folder / "two", done.stdout


# -----------------------------------------------------------------------------
# Two processes do what one does


@pytest.fixture(scope="module")
def gradients(tmp_path_factory) -> tuple[dict, dict]:
    """What process_gradients.py saves, with one process and with two."""
    one = tmp_path_factory.mktemp("gradients") / "one.safetensors"
    two = one.with_name("two.safetensors")
    alone = script("tests/process_gradients.py", one, env=ONE_THREAD)
    assert alone.returncode == 0, alone.stderr
    done = torchrun("tests/process_gradients.py", two)
    assert done.returncode == 0, done.stderr
    return load_file(one), load_file(two)


def test_two_processes_have_the_gradients_of_one(gradients):
    """On both losses, of seven rows and of one.

    fp32 rounds each sum to 6e-8 of it: 1e-6 leaves room for another order.
    """
    expected, found = gradients
    assert found.keys() == expected.keys()
    names = [name for name in found if "rows" in name]
    assert len(names) == 4 * 24  # two losses, two numbers of rows, A and B of 12 layers
    for name in names:
        assert expected[name].norm() > 0
        assert distance(found[name], expected[name]) < 1e-6, name


def test_two_processes_skip_a_step_that_overflows_in_one_of_them(gradients):
    """In fp16. Before it they take one of which the second has no row, and so scales nothing."""
    for found in gradients:
        assert found["taken norm"].isfinite().all()
        assert not found["skipped norm"].isfinite().any()
        assert set(found["taken scale"].tolist()) == {loss_scale.START}
        assert set(found["skipped scale"].tolist()) == {loss_scale.START / 2}
        for adapter in (*found["taken adapter"], *found["skipped adapter"]):
            assert torch.equal(adapter, found["taken adapter"][0])
    one, two = gradients
    assert len(two["taken scale"]) == 2
    # AdamW divides by the gradient's size, which magnifies rounding.
    assert distance(two["taken adapter"][0], one["taken adapter"][0]) < 1e-6


def test_two_processes_train_and_answer_as_one_does(pair):
    one, two, _ = pair
    expected = load_file(one / "adapter_model.safetensors")
    adapter = load_file(two / "adapter_model.safetensors")
    for name in expected:
        # Adam divides by the gradient's size, which magnifies rounding.
        assert distance(adapter[name], expected[name]) < 1e-3, name
    for split in ("validation_matched", "validation_mismatched"):
        rows = read_rows(two / f"predictions_{split}.jsonl")
        expected_rows = read_rows(one / f"predictions_{split}.jsonl")
        assert len(rows) == len(expected_rows) == 13
        for row, expected_row in zip(rows, expected_rows):
            for key in ("idx", "prompt", "completion", "prediction"):
                assert row[key] == expected_row[key]


def test_two_processes_keep_the_best_adapter_of_one(pair):
    one, two, _ = pair
    kept = best.read(two)
    expected = best.read(one)
    assert (kept["step"], kept["accuracy"]) == (expected["step"], expected["accuracy"])
    assert kept["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def test_all_processes_end_where_the_first_one_finds_the_folder_in_use(tmp_path):
    out = tmp_path / "run"
    with claims.claimed(out):
        done = torchrun("train.py", *RUN, "--steps", 1, "--out", out)
        evaluated = torchrun("eval.py", *RUN[:4], "--out", out)
    for refused in (done, evaluated):
        assert refused.returncode != 0
        line = f"error: process 0: another process is writing into {out}: "
        assert refused.stderr.count(line) == 1
        assert "error: process 1" not in refused.stderr
    assert not out.exists()


def test_the_first_process_alone_prints_and_writes(pair):
    one, two, printed = pair
    for folder in (".", best.FOLDER):
        assert sorted(os.listdir(two / folder)) == sorted(os.listdir(one / folder))
    assert printed.count("baseline:") == 1
    assert printed.count("layers adapted") == 1
    assert len(read_rows(two / "metrics.jsonl")) == len(read_rows(one / "metrics.jsonl"))
    assert read_json(two / "args.json")["processes"] == 2


def test_eval_on_two_processes_counts_every_row_once(pair, tmp_path):
    one, _, _ = pair
    command = ("eval.py", "--adapter", one, "--limit", 13)
    alone = script(*command, "--out", tmp_path / "one", env=ONE_THREAD)
    assert alone.returncode == 0, alone.stderr
    done = torchrun(*command, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("layers adapted") == 1

    statistics = {}
    for name in ("one", "two"):
        results = read_json(tmp_path / name / "results.json")
        statistics[name] = results["finetuned"]["validation_matched"]
    assert statistics["one"]["n"] == 13
    for key in ("n", "correct", "unparsed"):
        assert statistics["two"][key] == statistics["one"][key]


def test_another_number_of_processes_would_be_another_run(pair):
    _, two, _ = pair
    done = script("train.py", "--resume", two)
    assert done.returncode == 1
    assert "another number of rows in a step of all processes (8, here 4)" in done.stderr


# -----------------------------------------------------------------------------
# A process dies


def test_a_process_that_dies_ends_the_run_within_a_minute_and_the_last_save_is_resumed(tmp_path):
    out = tmp_path / "run"
    agent = start_training(
        *RUN, "--steps", 2000, "--batch-size", 4, "--save-every", 2, "--eval-limit", 2,
        "--out", out,
    )  # fmt: skip
    kill_second_process(agent, out, 2)
    # Within a minute on a quiet machine. Ranks that wait for a dead one would take ten.
    _, errors = agent.communicate(timeout=500)
    assert agent.returncode != 0
    assert "error: process 0: another process has ended" in errors
    assert "Signal 9 (SIGKILL)" in errors

    step = saved_step(out)
    done = torchrun("train.py", "--resume", out, "--steps", step + 1)
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {step} of {step + 1}" in done.stdout


def test_a_run_that_torchrun_starts_again_ends_with_the_same_adapter(tmp_path):
    """With dropout, which each process draws from a state of its own."""
    command = (*RUN, "--steps", 20, "--batch-size", 2, "--save-every", 2, "--eval-limit", 2)
    whole = torchrun("train.py", *command, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "run"
    agent = start_training(*command, "--out", out, options=(*FORKED, "--max-restarts", "1"))
    kill_second_process(agent, out, 4)
    output, errors = agent.communicate(timeout=600)
    assert agent.returncode == 0, errors
    assert "resuming after step" in output

    expected = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    adapter = load_file(out / "adapter_model.safetensors")
    assert adapter.keys() == expected.keys()
    for name in expected:
        assert torch.equal(adapter[name], expected[name]), name


# -----------------------------------------------------------------------------
# Devices and environments


@pytest.mark.parametrize(
    "left_over",
    [
        {"WORLD_SIZE": "8"},
        {"RANK": "1"},
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"},
    ],
)
def test_variables_that_are_left_over_make_no_process(left_over, tmp_path):
    """Schedulers and earlier commands leave some of torchrun's variables, or odd ones."""
    program = tmp_path / "program.py"
    program.write_text("""
import os, sys
sys.path.insert(0, os.getcwd())
from support import processes
device = processes.start("cpu")
print(processes.NUMBER, processes.COUNT, processes.IS_FIRST, processes.COMMAND)
print(processes.gather(5), device)
processes.stop()
""")
    done = script(program, env=left_over)
    assert (done.returncode, done.stdout) == (0, "0 1 True python\n[5] cpu\n"), done.stderr


EXCHANGE = """
import os, sys
sys.path.insert(0, os.getcwd())
import torch
from support import processes

device = processes.start("cpu")
number = processes.NUMBER
gathered = processes.gather({"number": number, "bytes": torch.full((2 + number,), number)})
lengths = [len(value["bytes"]) for value in gathered]
sums = processes.total(device, 1, number, 2**53 - 1 if processes.IS_FIRST else 1)
line = f"{[value['number'] for value in gathered]} {lengths} {sums} {processes.MAX_RESTARTS}"
print(line)  # of the first process alone
print(line, file=sys.stderr)
processes.stop()
"""


def test_all_processes_receive_what_each_of_them_gives(tmp_path):
    (tmp_path / "exchange.py").write_text(EXCHANGE)
    options = ("--nproc-per-node", 3, "--max-restarts", 5)
    done = torchrun(tmp_path / "exchange.py", options=options)
    assert done.returncode == 0, done.stderr
    line = f"[0, 1, 2] [2, 3, 4] [3.0, 3.0, {float(2**53 + 1)}] 5"
    assert done.stdout.splitlines() == [line]
    assert done.stderr.count(line) == 3


@pytest.mark.parametrize(
    "device, message",
    [
        ("gpu", "--device gpu: only cpu and cuda are supported, not Apple's GPUs (mps) and others"),
        ("cudax", "--device cudax: "),
        ("cuda:99", "--device cuda:99: "),  # on a machine with GPUs and on one without
        ("", "--device : "),
    ],
)
def test_a_device_that_does_not_exist_is_one_line(device, message):
    with pytest.raises(ValueError) as raised:
        processes.start(device)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_several_processes_do_not_share_one_gpu(monkeypatch):
    monkeypatch.setattr(processes, "COUNT", 2)
    monkeypatch.setattr(processes, "LOCAL_COUNT", 2)
    with pytest.raises(ValueError, match="cuda:1 is one GPU for 2 processes; with --device cuda"):
        processes.own_device("cuda:1")


@pytest.fixture
def touched(monkeypatch) -> list[str]:
    """What own_device does on a machine with GPUs, in its order."""
    steps = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: steps.append(f"set {device}"))
    monkeypatch.setattr(torch, "ones", lambda _, device: steps.append(f"touch {device}"))
    return steps


def test_each_process_chooses_its_gpu_before_it_touches_one(monkeypatch, touched):
    """Or all of them would take memory on the first."""
    monkeypatch.setattr(processes, "COUNT", 4)
    monkeypatch.setattr(processes, "LOCAL_COUNT", 4)
    monkeypatch.setattr(processes, "LOCAL_NUMBER", 3)
    assert processes.own_device("cuda") == torch.device("cuda:3")
    assert touched == ["set cuda:3", "touch cuda:3"]


def test_a_gpu_that_is_named_becomes_the_default_one(touched):
    """bitsandbytes and generators of random numbers take the default one."""
    assert processes.own_device("cuda:1") == torch.device("cuda:1")
    assert touched == ["set cuda:1", "touch cuda:1"]
