"""A script that is forked behaves as one that a new Python runs, so the tests may fork."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import script, start_script
from forks import python_command

PROGRAM = """
import atexit, os, random, signal, sys, threading
first_line = [__name__, sys.argv[-2:], os.getcwd(), sys.path, os.environ["OF_THE_TEST"]]
print(*first_line, sys.stdin.read(), sys.stdout.isatty(), flush=True)
print("written to stderr", file=sys.stderr)
atexit.register(print, "at exit")
end = sys.argv[1]
if end == "return":
    import torch
    ones = torch.ones(300, 300)
    print(torch.get_num_threads(), ones.mm(ones).sum())
if end == "thread":
    threading.Timer(0.2, print, ["in a thread"]).start()
if end == "message":
    sys.exit("a message")
if end == "number":
    sys.exit(3)
if end == "error":
    raise ValueError("an error")
if end == "signal":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "random":
    print(random.random())
if end == "wait":
    print("waiting", flush=True)
    signal.pause()
"""
ENVIRONMENT = {"OF_THE_TEST": "x", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def outcome(done: subprocess.CompletedProcess) -> tuple:
    """All but the traceback's lines on how the program was started."""
    errors = done.stderr.splitlines()
    return done.returncode, sorted(done.stdout.splitlines()), errors[:1], errors[-1]


@pytest.mark.parametrize("how", [["program.py"], ["-m", "program"]], ids=["file", "module"])
@pytest.mark.parametrize("end", ["return", "thread", "message", "number", "error", "signal"])
def test_a_fork_ends_as_a_new_python_does(program, tmp_path, end, how):
    results = []
    for fresh in (False, True):
        done = script(*how, end, "--more", env=ENVIRONMENT, cwd=tmp_path, fresh=fresh)
        results.append(outcome(done))
    assert results[0] == results[1]
    assert any(f"__main__ ['{end}', '--more'] {tmp_path}" in line for line in results[0][1])


@pytest.mark.parametrize("how", [["program.py"], ["-m", "program"], ["-P", "program.py"]])
def test_a_command_ends_as_python_does_and_has_its_streams_and_its_path(program, tmp_path, how):
    (tmp_path / "folder").mkdir()
    variables = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(["folder", str(tmp_path / "other")])}
    results = []
    with python_command(tmp_path / "folder") as command:
        for python in (command, sys.executable):
            done = subprocess.run(
                [python, *how, "number", "--more"],
                cwd=tmp_path,
                env=os.environ | variables,
                input="from the pipe",
                capture_output=True,
                text=True,
            )
            results.append(outcome(done))
    assert results[0] == results[1]
    assert results[0][0] == 3
    assert "from the pipe" in results[0][1][0]


def test_the_script_of_a_command_that_is_killed_is_killed_too(program, tmp_path):
    with python_command(tmp_path) as command:
        process = subprocess.Popen(
            [command, program, "wait"],
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        while "waiting" not in process.stdout.readline():
            assert process.poll() is None
        process.kill()
        # The script has the pipe too, which is at its end only after it.
        assert process.communicate(timeout=600) == ("", None)


def test_a_fork_can_be_watched_and_ended(program):
    process = start_script(program, "wait", env=ENVIRONMENT)
    while "waiting" not in process.stdout.readline():
        assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=600) == process.poll() == -signal.SIGTERM
    assert process.communicate() == ("", "written to stderr\n")


def test_a_fork_that_takes_too_long_is_killed(program):
    # It would wait for ever, and so would who reads what it prints.
    with pytest.raises(subprocess.TimeoutExpired):
        script(program, "wait", env=ENVIRONMENT, timeout=2)


def test_forks_draw_different_random_numbers(program):
    drawn = [script(program, "random", env=ENVIRONMENT).stdout.splitlines()[1] for _ in range(2)]
    assert drawn[0] != drawn[1]
