"""A script that is forked behaves as one that a new Python runs, so the tests may fork."""

import signal
import subprocess

import pytest
from conftest import script, start_script

PROGRAM = """
import os, signal, sys, threading
first_line = [__name__, sys.argv, os.getcwd(), sys.path[0], os.environ["WANDB_OF_THE_TEST"]]
print(*first_line, sys.stdin.read(), sys.stdout.isatty(), flush=True)
print("written to stderr", file=sys.stderr)
end = sys.argv[1]
if end == "return":
    import torch
    ones = torch.ones(300, 300)
    print(torch.get_num_threads(), ones.mm(ones).sum())
if end == "thread":
    threading.Timer(0.2, print, ["after main"]).start()
if end == "message":
    sys.exit("a message")
if end == "number":
    sys.exit(3)
if end == "error":
    raise ValueError("an error")
if end == "signal":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "wait":
    print("waiting", flush=True)
    signal.pause()
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def outcome(done: subprocess.CompletedProcess) -> tuple:
    """All but the traceback's lines on how the program was started."""
    errors = done.stderr.splitlines()
    return done.returncode, done.stdout, errors[:1], errors[-1]


@pytest.mark.parametrize("end", ["return", "thread", "message", "number", "error", "signal"])
def test_a_fork_ends_as_a_new_python_does(program, tmp_path, end):
    results = []
    for fresh in (False, True):
        env = {"WANDB_OF_THE_TEST": "x", "OMP_NUM_THREADS": "1"}
        done = script("program.py", end, "--more", env=env, cwd=tmp_path, fresh=fresh)
        results.append(outcome(done))
    assert results[0] == results[1]
    assert f"__main__ ['program.py', '{end}', '--more'] {tmp_path}" in results[0][1]


def test_a_module_is_run_as_with_m(tmp_path):
    (tmp_path / "module.py").write_text("import sys; print(__name__, sys.argv, sys.path[0])")
    results = []
    for fresh in (False, True):
        results.append(script("-m", "module", "--more", cwd=tmp_path, fresh=fresh))
    assert results[0].stdout == results[1].stdout != ""


def test_a_variable_that_a_library_has_read_makes_a_new_python(tmp_path):
    (tmp_path / "program.py").write_text("import sys; print('torch' in sys.modules)")
    forked = script("program.py", cwd=tmp_path)
    new = script("program.py", cwd=tmp_path, env={"MPLBACKEND": "agg"})
    assert (forked.stdout, new.stdout) == ("True\n", "False\n")


def test_a_fork_can_be_watched_and_ended(program, tmp_path):
    process = start_script(program, "wait", env={"WANDB_OF_THE_TEST": "x"})
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
        script(program, "wait", env={"WANDB_OF_THE_TEST": "x"}, timeout=2)


def test_forks_share_no_random_state_and_no_module(tmp_path):
    (tmp_path / "module.py").write_text("count = 0")
    text = "import module, random; module.count += 1; print(module.count, random.random())"
    (tmp_path / "program.py").write_text(text)
    first = script("program.py", cwd=tmp_path).stdout.split()
    second = script("program.py", cwd=tmp_path).stdout.split()
    assert first[0] == second[0] == "1"
    assert first[1] != second[1]
