"""Runs the project's scripts in forks of a process that has imported the libraries.

Python needs seconds to import torch and matplotlib, and the tests run scripts more than a hundred
times. multiprocessing's fork server imports them once. It runs no tensor operation, whose threads
would be missing in a fork. A fork of it has the command line, the folder, the environment and the
outputs that a new Python would have, and imports the project's modules itself.

The tests import `script` and `start_script` from conftest.py.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent

SERVER = multiprocessing.get_context("forkserver")
# Neither bitsandbytes, which prints a message that the project silences, nor what reads variables
# of the Hub when it is imported.
SERVER.set_forkserver_preload(
    [
        "torch",
        "torch._inductor.compile_fx",  # bitsandbytes needs it
        "safetensors.torch",
        "tokenizers",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",  # which writes PNGs
        "matplotlib.backends.backend_svg",
        "jinja2",
        "pandas",
        "pyarrow.parquet",
        "httpx2",
    ]
)
# torch then asks for GPUs in a way that a fork survives.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


class ForkedScript:
    """A running script, with the part of subprocess.Popen's interface that the tests use."""

    def __init__(self, arguments: list[str], cwd: Path, environment: dict[str, str]):
        self.stdout, output = make_pipe()
        self.stderr, errors = make_pipe()
        self.args = arguments
        self.process = SERVER.Process(
            target=run, args=(arguments, cwd, environment, output, errors)
        )
        self.process.start()
        self.pid = self.process.pid
        output.close()
        errors.close()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Returns what the script writes to its two outputs from now on until its end."""
        # Both are read at once, or the script may wait for the one that is not.
        with ThreadPoolExecutor() as pool, self.stdout, self.stderr:
            output = pool.submit(self.stdout.read)
            errors = pool.submit(self.stderr.read)
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()  # which ends the reading
                raise
            return output.result(), errors.result()


def make_pipe() -> tuple[TextIO, Connection]:
    """Returns the end to read, and the end to write as multiprocessing passes it to a process."""
    reader, writer = os.pipe()
    return open(reader), Connection(writer, readable=False)


def run(
    arguments: list[str], cwd: Path, environment: dict[str, str], *outputs: Connection
) -> None:
    """Does in a fork what Python does with such a command line."""
    import torch

    gc.freeze()  # the collector leaves alone what the server has imported
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    for number, output in enumerate(outputs, 1):
        os.dup2(output.fileno(), number)
        output.close()
    # Python's objects for them still describe the server's streams.
    encoding = os.environ.get("PYTHONIOENCODING")
    sys.stdin = open(0, encoding=encoding, closefd=False)
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)
    sys.stderr = open(2, "w", buffering=1, encoding=encoding, closefd=False)
    if "OMP_NUM_THREADS" in os.environ:  # OpenMP has read the server's
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    # Without the folders that pytest and the tests have added for themselves.
    libraries = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    first, *others = arguments
    try:
        if first == "-m":
            sys.argv = others
            sys.path[:] = [os.getcwd(), *libraries]
            runpy.run_module(others[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path[:] = [str(Path(first).resolve().parent), *libraries]
            runpy.run_path(first, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends a process without them


def start_script(
    *arguments, env: dict[str, str] | None = None, cwd: Path = ROOT, fresh: bool = False
) -> ForkedScript | subprocess.Popen:
    """Starts `python ARGUMENTS`, with `env` added to the environment.

    It is a new Python for -c and other options of Python's own but -m, and with `fresh`: for
    variables in `env` that Python or a library reads when it starts, and for scripts that have to
    import something before torch.
    """
    command = [str(argument) for argument in arguments]
    environment = os.environ | (env or {})
    is_option = command[0].startswith("-") and command[0] != "-m"
    if not fresh and not is_option:
        return ForkedScript(command, cwd, environment)
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def script(*arguments, timeout: float = 900, **options) -> subprocess.CompletedProcess:
    """Runs `python ARGUMENTS` as a user would, to its end. For `options` see start_script."""
    process = start_script(*arguments, **options)
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
