"""A run that was stopped, killed or out of disk resumes from its last save, to the same numbers.

And a resume that is refused changes nothing.
"""

import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    forget_what_was_read,
    full_disk,
    in_process,
    read_json,
    script,
    start_script,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import train
from support import best, files, pictures, resume
from support.examples import load_examples
from support.stopping import StopRequest

KILLS = int(os.environ.get("KILLS", 5))  # make torture: 25
STEPS = max(18, 3 * KILLS)  # so that each kill can come at a later step
# With dropout, accumulation, and steps that are not all alike: an epoch of 50 rows, 4 a step, ends
# with a step of 2. Each evaluation has a save of its own, beside every fifth step.
RUN = (
    "--model", "tiny/model",
    "--dataset", "tiny/data",
    "--steps", STEPS,
    "--batch-size", 2,
    "--accumulate", 2,
    "--limit", 50,
    "--eval-limit", 2,
    "--max-new-tokens", 1,
    "--dropout", 0.1,
    "--residual-dropout", 0.1,
    "--learning-rate", 1e-3,
    "--save-every", 5,
    "--eval-every", 6,
    "--keep-best",
)


# -----------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """One thread everywhere: other processes then sum in the same order as this one."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    in_process(train, *RUN, "--out", out)
    return out


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A copy of it, to be resumed."""
    return shutil.copytree(whole, tmp_path / "run")


def start(out: Path, *more) -> subprocess.Popen:
    """Starts the run in a process of its own, or resumes it there."""
    if (out / "args.json").exists():
        return start_script("train.py", "--resume", out, *more)
    return start_script("train.py", *RUN, "--out", out, *more)


def refusal(*arguments, cwd: Path = ROOT) -> str:
    """Returns the one line of a run that is refused."""
    with pytest.raises(SystemExit) as stopped:
        in_process(train, *arguments, cwd=cwd)
    line = stopped.value.code
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


def saved_step(out: Path) -> int:
    """Returns the step of a run's last save, 0 before the first one."""
    path = out / resume.NAME
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["state"])["progress"]["step"]


def wait_for(out: Path, step: int, process: subprocess.Popen, seconds: float = 600) -> None:
    """Waits until a run has saved `step` or has ended, and no longer than `seconds`."""
    end = time.monotonic() + seconds
    while saved_step(out) < step and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)


def metrics(out: Path) -> list[dict]:
    """Returns the lines of metrics.jsonl without what a clock or the memory says."""
    return without_times((out / "metrics.jsonl").read_bytes())


def without_times(lines: bytes) -> list[dict]:
    return [
        {
            key: value
            for key, value in json.loads(line).items()
            if "second" not in key and "memory" not in key
        }
        for line in lines.splitlines()
    ]


def content(out: Path) -> dict[str, bytes]:
    """Returns every file of a run by its name, hidden ones too, and those of best/."""
    paths = [path for path in out.rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def assert_same_tensors(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_same(out: Path, whole: Path) -> None:
    """Asserts that two runs have come to the same end, to the last bit."""
    # The tensors, not the files: these hold paths too.
    for name in ("adapter_model.safetensors", "best/adapter_model.safetensors"):
        assert_same_tensors(load_file(out / name), load_file(whole / name))
    assert best.read(out) == best.read(whole)
    found = resume.load(out)
    expected = resume.load(whole)
    assert_same_tensors(found.tensors, expected.tensors)
    assert found.state.progress == expected.state.progress
    assert found.state.baseline == expected.state.baseline
    assert metrics(out) == metrics(whole)
    for key in ("baseline", "finetuned", "best"):
        assert read_json(out / "results.json")[key] == read_json(whole / "results.json")[key]
    for split in ("validation_matched", "validation_mismatched"):
        predictions = f"predictions_{split}.jsonl"
        assert (out / predictions).read_bytes() == (whole / predictions).read_bytes()


def test_the_same_seed_gives_the_same_run_bit_for_bit(whole, tmp_path):
    """In another process too, which draws and sums as this one does."""
    done = script("train.py", *RUN, "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "again", whole)


def test_the_same_run_gives_the_same_bytes(tmp_path):
    """In processes that number what they hash in another way, and in one folder: files name it.

    A fork has the numbers of its server, a new Python those of the variable. Without NF4, which
    takes a new Python two seconds to import and writes no file.
    """
    out = tmp_path / "run"
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    contents = []
    for options in ({}, {"env": {"PYTHONHASHSEED": other}, "fresh": True}):
        less = ("--steps", 6, "--eval-every", 3, "--quant", "none")
        done = script("train.py", *RUN, *less, "--out", out, **options)
        assert done.returncode == 0, done.stderr
        contents.append(content(out))
        shutil.rmtree(out)
    first, second = contents
    assert first.keys() == second.keys()
    assert {"loss.png", "README.md", "best/adapter_model.safetensors"} <= first.keys()
    for name, file in first.items():
        if name == "metrics.jsonl":  # it holds times and memory
            assert without_times(file) == without_times(second[name])
        elif name == "report.html":
            times = rb"\d+:\d+:\d+|[\d.]+ GiB"
            assert re.sub(times, b"", file) == re.sub(times, b"", second[name])
        elif name == "results.json":
            memory = {"training_memory_gib": None}
            assert json.loads(file) | memory == json.loads(second[name]) | memory
        else:
            assert file == second[name], name


# -----------------------------------------------------------------------------
# Signals


def test_a_signal_ends_the_step_saves_and_says_how_to_resume_to_the_same_bits(whole, tmp_path):
    out = tmp_path / "run"
    step = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(out, "--save-every", 1)
        before = step
        wait_for(out, before + 2, process)
        process.send_signal(number)
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        assert "stopping after this step; a second Ctrl-C stops at once" in errors
        step = saved_step(out)
        in_time = before + 2 <= step < STEPS
        assert in_time, "the signal must come while it trains, or this test says little"
        assert output.splitlines()[-1] == (
            f"stopped and saved after step {step} of {STEPS}; "
            f"to resume: python train.py --resume {out}"
        )
    in_process(train, "--resume", out, "--save-every", 5)
    assert_same(out, whole)


def interrupt(
    monkeypatch,
    name: str,
    call: int,
    then: Callable[[], None] = lambda: None,
    first: int = signal.SIGINT,
) -> None:
    """Makes call number `call` of train's function `name` begin with a Ctrl-C, then `then`.

    `first` may be another signal than that of Ctrl-C.
    """
    function = getattr(train, name)
    calls = 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(first)
            then()
        return function(*arguments)

    monkeypatch.setattr(train, name, interrupted)


@pytest.mark.parametrize("number", StopRequest.WARNS)
def test_a_closed_terminal_and_a_warning_save_too_however_often_they_come(
    tmp_path, monkeypatch, number
):
    """The shell and the system both say that a terminal is closed."""
    out = tmp_path / "run"

    def twice() -> None:
        signal.raise_signal(number)
        signal.raise_signal(number)

    interrupt(monkeypatch, "training_step", 3, twice, first=number)
    in_process(train, *RUN, "--out", out)
    assert saved_step(out) == 3


def test_a_signal_that_is_ignored_stays_ignored():
    """As nohup ignores SIGHUP, and a shell SIGINT for what it starts in the background."""
    for number in StopRequest.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    stop = StopRequest()
    for number in StopRequest.SIGNALS:
        signal.raise_signal(number)
    assert not stop
    stop.release()
    for number in StopRequest.SIGNALS:
        assert signal.getsignal(number) is signal.SIG_IGN


def test_a_signal_after_the_last_step_ends_the_process_once_all_is_saved():
    stop = StopRequest()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        stop.release()


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_after_the_training_each_signal_ends_the_process_with_what_it_has_to_tidy_up(number):
    stop = StopRequest()
    stop.release()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert not stop


# The first argument is a terminal, which becomes that of a session of the script's own.
IN_TERMINAL = """
import os, runpy, sys
os.setsid()
terminal = os.open(sys.argv[1], os.O_RDWR)
for number in range(3):
    os.dup2(terminal, number)
os.close(terminal)
sys.stdout = open(1, "w", buffering=1, closefd=False)
del sys.argv[:2]
sys.path[0] = os.getcwd()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_terminal_that_is_closed_loses_nothing_that_was_trained(tmp_path):
    """Its end is a SIGHUP, and from then on an error for each line that is printed."""
    out = tmp_path / "run"
    terminal, end = pty.openpty()
    (tmp_path / "in_terminal.py").write_text(IN_TERMINAL)
    command = ("train.py", *RUN, "--steps", 20_000, "--save-every", 10_000, "--out", out)
    process = start_script(tmp_path / "in_terminal.py", os.ttyname(end), *command)
    printed = b""
    while b"step      6" not in printed:  # the first evaluation
        assert process.poll() is None, printed.decode()
        if select.select([terminal], [], [], 1)[0]:
            printed += os.read(terminal, 4096)
    os.close(end)
    os.close(terminal)
    assert process.wait(timeout=600) == 0
    assert saved_step(out) >= 6
    evaluated = [line["step"] for line in metrics(out) if "loss" not in line]
    assert evaluated[:2] == [0, 6]


def test_nobody_who_reads_what_is_printed_does_not_end_a_run(tmp_path):
    """As `| head -1` does."""
    out = tmp_path / "run"
    process = start_script("train.py", *RUN, "--steps", 3, "--out", out)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=600) == 0, errors
    assert "roken pipe" not in errors
    assert (out / "results.json").is_file()


def test_ctrl_c_answers_at_once_with_a_line_and_loses_nothing(
    whole, tmp_path, monkeypatch, capsys
):
    """Not even where flags change on the way that cost memory or time: the bits stay."""
    out = tmp_path / "run"
    answers = []
    in_step_8 = 8
    # The step is not over when the answer is read: its gradients are still to be computed.
    interrupt(
        monkeypatch, "training_step", in_step_8, lambda: answers.append(capsys.readouterr())
    )
    in_process(train, *RUN, "--out", out)
    (answer,) = answers
    assert answer.err.endswith("\nstopping after this step; a second Ctrl-C stops at once\n")
    assert saved_step(out) == 8
    in_process(train, "--resume", out, "--keep-dequantized", "--checkpointing", "--save-every", 3)
    assert f"resuming after step 8 of {STEPS}" in capsys.readouterr().out
    assert_same(out, whole)


def test_a_second_ctrl_c_ends_the_run_at_once_and_the_last_save_stays(
    whole, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    interrupt(
        monkeypatch, "training_step", 8, lambda: signal.raise_signal(signal.SIGINT)
    )
    with pytest.raises(SystemExit) as stopped:
        in_process(train, *RUN, "--out", out)
    assert stopped.value.code == "interrupted"
    assert saved_step(out) == 6, "before its evaluation"
    in_process(train, "--resume", out)
    assert_same(out, whole)


def test_lines_of_steps_that_are_taken_again_are_dropped(tmp_path, monkeypatch):
    """The last save is of step 5, the last line of step 7."""
    out = tmp_path / "run"
    more = ["--steps", 9, "--eval-every", 20, "--log-every", 7]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt(
            patch, "training_step", 8, lambda: signal.raise_signal(signal.SIGINT)
        )
        in_process(train, *RUN, *more, "--out", out)
    assert saved_step(out) == 5
    assert [line["step"] for line in metrics(out)] == [0, 7]
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": \xff}\n{"step": 5, "lo')  # damaged, and cut short by a kill
    in_process(train, "--resume", out)
    # Step 9 has a line for its training and one for the last evaluation.
    assert [line["step"] for line in metrics(out)] == [0, 7, 9, 9]


def test_ctrl_c_at_a_step_with_an_evaluation_does_not_lose_that(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, "training_step", 2)
        in_process(train, *RUN, "--eval-every", 2, "--out", out)
    in_process(train, "--resume", out, "--steps", 4)
    evaluated = [line["step"] for line in metrics(out) if "loss" not in line]
    assert evaluated == [0, 2, 4]


def test_an_evaluation_that_a_kill_prevents_after_its_save_is_made_up_for(
    whole, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    first_on_the_way = 2  # the base is evaluated before
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt(
            patch, "evaluate", first_on_the_way, lambda: signal.raise_signal(signal.SIGINT)
        )
        in_process(train, *RUN, "--save-every", 1000, "--out", out)
    assert saved_step(out) == 6
    assert [line["step"] for line in metrics(out) if "loss" not in line] == [0]
    in_process(train, "--resume", out, "--save-every", 5)
    assert_same(out, whole)


def test_ctrl_c_in_the_last_evaluation_loses_nothing_that_was_trained(
    whole, copy, monkeypatch, capsys
):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        interrupt(patch, "validation_loss", 1)
        in_process(train, "--resume", copy)
    assert stopped.value.code == f"interrupted; to resume: python train.py --resume {copy}"
    assert len(metrics(copy)) == len(metrics(whole)) - 1
    capsys.readouterr()
    in_process(train, "--resume", copy)
    assert "only the evaluation is left to do" in capsys.readouterr().out
    assert_same(copy, whole)


def test_ctrl_c_before_the_first_step_leaves_a_run_that_starts_anew(whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        interrupt(patch, "validation_loss", 2)
        in_process(train, *RUN, "--out", out)
    assert stopped.value.code == f"interrupted; to resume: python train.py --resume {out}"
    assert not (out / resume.NAME).exists()
    # Also with lines of steps that no save has kept.
    (out / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text())
    in_process(train, "--resume", out)
    assert_same(out, whole)


# -----------------------------------------------------------------------------
# Kills and full disks


def test_kills_at_random_moments_lose_no_more_than_the_steps_since_the_last_save(whole, tmp_path):
    """kill -9, at times within a save, which follows each step.

    The run never goes back, can always be resumed, and ends the same.
    """
    out = tmp_path / "run"
    draw = random.Random(KILLS)
    reached = 0
    for number in range(KILLS):
        process = start(out, "--save-every", 1)
        if number == 0:  # while it loads or evaluates, or in its first steps
            wait_for(out, 2, process, seconds=draw.uniform(0, 6))
        else:
            wait_for(out, min(reached + 1, STEPS - 1), process)
            time.sleep(draw.uniform(0, 0.15))  # one to three steps on a quiet machine
        process.kill()
        _, errors = process.communicate()
        now = saved_step(out)
        assert now >= reached
        reached = now
        if process.returncode == 0:  # on a busy machine it may have come to its end
            break
        assert process.returncode == -signal.SIGKILL, errors
    # A kill in the middle of a write is rare. This is what it leaves.
    (out / f".1{files.UNFINISHED}").mkdir()
    for _ in range(2):  # the second time nothing is left to do but the evaluation
        in_process(train, "--resume", out, "--save-every", 5)
        assert_same(out, whole)
    hidden = [path.name for path in out.iterdir() if path.name.startswith(".")]
    assert hidden == [], "what a killed save has left is removed"


def test_a_full_disk_is_one_line_and_the_last_save_still_loads(tmp_path):
    """There is room for the adapter and the first save, and none for an optimiser's tensors."""
    out = tmp_path / "run"
    with full_disk(300_000):
        line = refusal(*RUN, "--out", out)
    assert line.startswith(f"error: cannot write into {out}: ")
    assert line.endswith("; what was saved before is unchanged")
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    assert saved_step(out) == 0
    # The adapter had room, but both files are of the same step.
    for key, tensor in load_file(out / "adapter_model.safetensors").items():
        assert "lora_A" in key or not tensor.any(), "B is zero before the first step"
    in_process(train, "--resume", out, "--steps", 3)
    assert saved_step(out) == 3


def test_a_loss_that_is_not_finite_stops_at_its_step_and_names_its_rows(tmp_path):
    out = tmp_path / "run"
    diverging = ["--learning-rate", 1e6, "--alpha", 1e6]
    diverging += ["--max-grad-norm", 1e30, "--weight-decay", 0]
    line = refusal(*RUN, *diverging, "--save-every", 1, "--out", out)
    assert "norm of its gradient" in line
    assert line.endswith(f"{out} keeps the last save")
    step = int(line.split("step ")[1].split(":")[0])
    assert saved_step(out) == step - 1
    for name, tensor in resume.load(out).tensors.items():
        if name.startswith("adapter."):
            assert tensor.isfinite().all(), name

    # The rows that it names are those of this step.
    rows = load_examples("tiny/data", "train", 50)
    *_, last = zip(range(step), data.rows_of_steps(rows, size=4, seed=0))
    assert f"with the rows {sorted(row['row'] for row in last[1])} of train" in line


# -----------------------------------------------------------------------------
# What may change, and what may not


def test_more_steps_may_be_asked_for_and_the_new_schedule_is_named(copy, capsys):
    in_process(train, "--resume", copy, "--steps", STEPS + 3)
    assert f"{STEPS + 3} steps instead of {STEPS}" in capsys.readouterr().out
    assert saved_step(copy) == STEPS + 3
    before = content(copy)
    line = refusal("--resume", copy, "--steps", STEPS + 2)
    assert line.endswith(f"has taken {STEPS + 3} steps already, more than {STEPS + 2}")
    assert content(copy) == before


def test_no_results_of_the_shorter_run_stay_beside_the_adapter_of_a_longer_one(copy, monkeypatch):
    kept = {
        "adapter_config.json", "adapter_model.safetensors", "args.json", "best", "metrics.jsonl",
        "baseline_validation_matched.jsonl", "baseline_validation_mismatched.jsonl", resume.NAME,
    }  # fmt: skip
    assert {path.name for path in copy.iterdir()} > {*kept, "results.json", "README.md"}
    with monkeypatch.context() as patch:
        interrupt(patch, "training_step", 2)
        in_process(train, "--resume", copy, "--steps", STEPS + 10)
    assert saved_step(copy) == STEPS + 2
    # A run that takes longer has a page on the way.
    way = {"report.html", *pictures.PICTURES}
    assert {path.name for path in copy.iterdir()} - way == kept
    if (copy / "report.html").exists():
        assert "Step " in (copy / "report.html").read_text()


def test_predictions_that_cannot_be_written_do_not_lose_the_results(copy, whole, capsys):
    path = copy / "predictions_validation_matched.jsonl"
    path.unlink()
    path.mkdir()
    with pytest.raises(SystemExit) as stopped:
        in_process(train, "--resume", copy)
    assert stopped.value.code == 1
    output = capsys.readouterr()
    assert f"error: the predictions: cannot write into {path.parent}: Is a directory" in output.err
    assert f"to write all of them again: python train.py --resume {copy}" in output.out
    expected = read_json(whole / "results.json")
    assert read_json(copy / "results.json")["finetuned"] == expected["finetuned"]


@pytest.fixture
def project(tmp_path) -> Iterator[Path]:
    """A folder in which tiny/model and tiny/data are copies that a test may change."""
    forget_what_was_read()  # it knows tiny/data by this name, not by the folder
    shutil.copytree(ROOT / "tiny", tmp_path / "project" / "tiny")
    yield tmp_path / "project"
    forget_what_was_read()


def lose_rows(project: Path) -> None:
    path = project / "tiny" / "data" / "train.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:40]))


def change_labels(project: Path) -> None:
    path = project / "tiny" / "data" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"label": 1}) + "\n" for row in rows))


def reverse_validation(project: Path) -> None:
    path = project / "tiny" / "data" / "validation_matched.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


def exchange_tokens(project: Path) -> None:
    path = project / "tiny" / "model" / "tokenizer.json"
    tokenizer = read_json(path)
    vocabulary = tokenizer["model"]["vocab"]
    first = vocabulary["\u0120the"]  # the character stands for a space
    vocabulary["\u0120the"] = vocabulary["\u0120a"]
    vocabulary["\u0120a"] = first
    path.write_text(json.dumps(tokenizer))


def change_weights(project: Path) -> None:
    path = project / "tiny" / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.fc1.weight"] += 0.01
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    "change, message",
    [
        (lose_rows, "was trained with another number of training rows (50, here 40)"),
        (change_labels, "was trained with another set of training rows ("),
        (reverse_validation, "was trained with another set of validation rows ("),
        (exchange_tokens, "was trained with another tokenizer ("),
        (change_weights, "was trained with another base weights ("),
    ],
)
def test_other_rows_another_tokenizer_and_other_weights_would_make_another_run(
    copy, project, change, message
):
    change(project)
    before = content(copy)
    names = ("--model", "tiny/model", "--dataset", "tiny/data")  # those of this folder
    assert message in refusal("--resume", copy, *names, cwd=project)
    assert content(copy) == before


def test_another_prompt_would_make_another_run(copy, monkeypatch):
    monkeypatch.setattr(data, "PROMPT", data.PROMPT.replace("### Label:", "### Answer:"))
    before = content(copy)
    assert "was trained with another prompt (" in refusal("--resume", copy)
    assert content(copy) == before


def test_a_run_whose_model_has_only_moved_is_resumed(copy, project, capsys):
    """What counts is what the folders hold, not where they are."""
    names = ("--model", "tiny/model", "--dataset", "tiny/data")  # those of this folder
    in_process(train, "--resume", copy, "--steps", STEPS + 1, *names, cwd=project)
    assert f"resuming after step {STEPS} of {STEPS + 1}" in capsys.readouterr().out
    assert saved_step(copy) == STEPS + 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--rank", 4), "--rank 4 (it has 8)"),
        (("--seed", 5), "--seed 5 (it has 0)"),
        (("--dataset", "tiny/model"), "tiny/model holds no train.* or validation*.* file"),
        (("--steps", STEPS - 1), f"has taken {STEPS} steps already, more than {STEPS - 1}"),
        (("--epochs", 0.5), f"has taken {STEPS} steps already, more than 7"),
        (("--device", "mps:7"), "--device mps:7"),
    ],
)
def test_what_would_make_another_run_is_refused_and_nothing_is_changed(copy, flags, message):
    before = content(copy)
    assert message in refusal("--resume", copy, *flags)
    assert content(copy) == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is mapped")
def test_a_save_that_was_loaded_is_not_mapped_so_that_windows_can_replace_it(whole):
    saved = resume.load(whole)
    assert resume.NAME not in Path("/proc/self/maps").read_text()
    assert len(saved.tensors) == 24 * 4 + 1  # A and B of 12 layers, AdamW's three, the generators


def test_a_run_that_an_older_version_has_saved_is_resumed(whole, copy):
    """It wrote "format" beside the state, and knew no --keep-best."""
    path = copy / resume.NAME
    state = resume.load(copy).state
    arguments = {name: value for name, value in state.arguments.items() if name != "keep_best"}
    rewrite(path, load_file(path), {"format": "pt"}, arguments=arguments)
    shutil.rmtree(copy / best.FOLDER)
    in_process(train, "--resume", copy)
    assert "best" not in read_json(copy / "results.json")
    in_process(train, "--resume", copy, "--keep-best")  # its last evaluation is the first to count
    assert best.read(copy)["step"] == STEPS


def test_a_finished_adapter_without_a_save_is_never_written_over(copy):
    """As after a push and a download, or where somebody has deleted the largest file."""
    (copy / resume.NAME).unlink()
    before = content(copy)
    line = refusal("--resume", copy)
    assert f"{copy} holds a finished adapter and no trainer.safetensors" in line
    assert content(copy) == before


# -----------------------------------------------------------------------------
# Damaged files of a run


@pytest.mark.parametrize("kept", [0, 7, 300, 0.5, -1])
def test_a_save_that_was_cut_short_is_named_and_nothing_is_changed(copy, kept):
    path = copy / resume.NAME
    whole = path.read_bytes()
    length = int(kept * len(whole)) if isinstance(kept, float) else kept
    path.write_bytes(whole[:length])
    before = content(copy)
    assert f"{path} is damaged or cut short" in refusal("--resume", copy)
    assert content(copy) == before


def rewrite(path: Path, tensors: dict, more: dict | None = None, **changes) -> None:
    """Writes a save with other tensors, with more metadata, and with changes in its state."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = json.loads(metadata["state"]) | changes
    save_file(tensors, path, metadata | {"state": json.dumps(state)} | (more or {}))


def lose_a_moment(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if name != "optimizer.3.exp_avg"}


def widen_the_adapter(tensors: dict) -> dict:
    return tensors | {min(tensors): torch.zeros(9, 9)}


def shrink_to_what_torch_would_repeat(tensors: dict) -> dict:
    name = min(tensors)
    return tensors | {name: tensors[name][:1].contiguous()}


def lose_the_random_state(tensors: dict) -> dict:
    return tensors | {"random": torch.zeros_like(tensors["random"])}


@pytest.mark.parametrize(
    "change, message",
    [
        (lose_a_moment, "does not hold the tensors of this adapter"),
        (widen_the_adapter, "does not hold the tensors of this adapter"),
        (shrink_to_what_torch_would_repeat, "does not hold the tensors of this adapter"),
        (lose_the_random_state, "does not fit this run (RuntimeError("),
    ],
)
def test_a_save_with_other_tensors_is_refused_and_nothing_is_changed(copy, change, message):
    path = copy / resume.NAME
    rewrite(path, change(load_file(path)))
    before = content(copy)
    assert f"error: {path} {message}" in refusal("--resume", copy)
    assert content(copy) == before


def test_numbers_that_are_not_finite_are_not_saved_over_those_that_are(copy):
    """The last step, after which no loss would show them."""
    path = copy / resume.NAME
    tensors = load_file(path)
    tensors["optimizer.3.exp_avg"][0, 0] = float("nan")
    rewrite(path, tensors)
    before = content(copy)
    steps = read_json(copy / "args.json")["steps"] + 1
    error = refusal("--resume", copy, "--steps", str(steps))
    assert "holds numbers that are not finite, and is not saved" in error
    for name in ("adapter_model.safetensors", resume.NAME):
        assert content(copy)[name] == before[name]


@pytest.mark.parametrize("change", [{"a_field_of_the_future": 1}, {"progress": []}], ids=str)
def test_the_state_of_another_version_is_refused_and_nothing_is_changed(copy, change):
    path = copy / resume.NAME
    rewrite(path, load_file(path), **change)
    before = content(copy)
    assert "was not written by this version of train.py" in refusal("--resume", copy)
    assert content(copy) == before
