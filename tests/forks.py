"""Runs the project's scripts in forks of a process that has imported the libraries.

Python needs seconds to import torch and matplotlib, and the tests run scripts more than a hundred
times. multiprocessing's fork server imports them once. It runs no tensor operation, whose threads
would be missing in a fork. A fork of it has the command line, the folder, the environment and the
outputs that a new Python would have, and imports the project's modules itself.

The tests import `script` and `start_script` from conftest.py. `python_command` is for what starts
Pythons itself.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection, Listener, wait
from multiprocessing.reduction import recv_handle
from pathlib import Path
from threading import Thread
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
        nothing = Connection(os.open(os.devnull, os.O_RDONLY), writable=False)
        self.args = arguments
        self.process = start_fork(arguments, cwd, environment, [nothing, output, errors])
        self.pid = self.process.pid

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


def start_fork(
    arguments: list[str], cwd: Path, environment: dict[str, str], streams: list[Connection]
) -> multiprocessing.Process:
    """Starts a fork with these three standard streams, and closes them here."""
    with ExitStack() as stack:
        for stream in streams:
            stack.enter_context(stream)
        process = SERVER.Process(target=run, args=(arguments, cwd, environment, *streams))
        process.start()
    return process


def run(
    arguments: list[str], cwd: Path, environment: dict[str, str], *streams: Connection
) -> None:
    """Does in a fork what Python does with such a command line."""
    import torch

    gc.freeze()  # the collector leaves alone what the server has imported
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
        stream.close()
    # Python's objects for them still describe the server's streams.
    encoding = os.environ.get("PYTHONIOENCODING")
    sys.stdin = open(0, encoding=encoding, closefd=False)
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)
    sys.stderr = open(2, "w", buffering=1, encoding=encoding, closefd=False)
    if "OMP_NUM_THREADS" in os.environ:  # OpenMP has read the server's
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    has_no_folder = arguments[0] == "-P"  # sys.path then begins with PYTHONPATH
    first, *others = arguments[has_no_folder:]
    folder = os.getcwd() if first == "-m" else str(Path(first).resolve().parent)
    named = os.environ.get("PYTHONPATH")
    # Without the folders that pytest and the tests have added for themselves.
    libraries = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    folders = [] if has_no_folder else [folder]
    folders += map(os.path.abspath, named.split(os.pathsep) if named else [])
    sys.path[:] = [*dict.fromkeys([*folders, *libraries])]
    try:
        if first == "-m":
            sys.argv = others
            runpy.run_module(others[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *others]
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


# -----------------------------------------------------------------------------
# For what starts Pythons itself: a notebook's cells, the benchmark

COMMAND = """#!{python} -IS
import os, sys
from multiprocessing.connection import Client
from multiprocessing.reduction import send_handle

with Client({address!r}) as connection:
    connection.send((sys.argv[1:], os.getcwd(), dict(os.environ)))
    for number in range(3):
        send_handle(connection, number, None)
    sys.exit(connection.recv())
"""


@contextmanager
def python_command(folder: Path) -> Iterator[Path]:
    """Yields a command in `folder` that is called as `python` is, and whose scripts are forks.

    They have its streams, its folder and its environment, and it has their exit status. It takes
    no options but -m and -P.
    """
    command = folder / "python"
    with Listener(family="AF_UNIX") as listener:
        command.write_text(COMMAND.format(python=sys.executable, address=listener.address))
        command.chmod(0o755)
        Thread(target=accept, args=[listener], daemon=True).start()
        yield command


def accept(listener: Listener) -> None:
    """Serves one command after the other, until the listener is closed."""
    while True:
        try:
            connection = listener.accept()
        except OSError:
            return
        Thread(target=serve, args=[connection], daemon=True).start()


def serve(connection: Connection) -> None:
    """Runs what a command asks for, and sends it the exit status."""
    with connection:
        arguments, cwd, environment = connection.recv()
        streams = [Connection(recv_handle(connection)) for _ in range(3)]
        process = start_fork(arguments, cwd, environment, streams)
        if process.sentinel in wait([process.sentinel, connection]):
            connection.send(process.exitcode)
        else:
            process.kill()  # as the command was
