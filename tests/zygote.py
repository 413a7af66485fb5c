"""Runs the project's scripts in processes that fork from one that has imported the libraries.

Python needs seconds to import torch, what bitsandbytes needs of it, and matplotlib, and the tests
run scripts more than a hundred times. So one process, the zygote, imports them once. It runs no
tensor operation, whose threads would be missing in a fork. For each run it forks a keeper, and the
keeper forks the script's process, reports its pid, waits for its end and reports how it ended:

    pytest --- zygote --- keeper --- script

The script's process has the command line, the folder, the environment and the files that a new
Python would have. It imports the project's modules itself, and ends as Python ends.

The tests import `script` and `start_script` from conftest.py. As a program,
`python tests/zygote.py LIBRARY FD FD`, this file is the zygote.
"""

import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent

# What is imported beforehand. Not bitsandbytes itself, which prints a message that the project has
# to silence.
LIBRARIES = [
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "tqdm",
    "safetensors.torch",
    "tokenizers",
    "matplotlib.pyplot",
    "jinja2",
    "pandas",
    "pyarrow.parquet",
    "fsspec",
    "httpx",
]
# These read HF_* variables when they are imported. So there are two zygotes, and that for runs in
# which such a variable differs has not imported them. The second is a fork of the first.
HUB_LIBRARIES = ["huggingface_hub.hf_api", "datasets"]

# How the environment variables begin that no library has read before a script runs. A run that is
# given another one gets a new Python.
LATE = (
    "CUDA_VISIBLE_DEVICES",
    "HF_",
    "HUGGING_FACE_",
    "LOCAL_",
    "MASTER_",
    "NETRC",
    "OMP_NUM_THREADS",
    "PYTHONIOENCODING",
    "RANK",
    "WANDB_",
    "WORLD_SIZE",
)

LONGEST_REQUEST = 2**20  # bytes

# What the environment of all scripts begins as.
START = dict(os.environ)


# -----------------------------------------------------------------------------
# The tests' side


class ForkedScript:
    """A running script that a zygote has forked.

    It has the part of subprocess.Popen's interface that the tests use.
    """

    def __init__(
        self, arguments: list[str], cwd: Path, environment: dict[str, str], zygote: socket.socket
    ):
        output, output_end = os.pipe()
        errors, errors_end = os.pipe()
        report, report_end = os.pipe()
        with open(os.devnull) as nothing:
            request = {"arguments": arguments, "cwd": str(cwd), "environment": environment}
            files = [nothing.fileno(), output_end, errors_end, report_end]
            socket.send_fds(zygote, [json.dumps(request).encode()], files)
        for end in (output_end, errors_end, report_end):
            os.close(end)

        self.args = arguments
        self.returncode: int | None = None
        self.stdout: TextIO = open(output)
        self.stderr: TextIO = open(errors)
        self.report: TextIO = open(report)
        self.pid = int(self.report.readline())
        self.ended = threading.Event()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        self.returncode = int(self.report.readline())
        self.report.close()
        self.ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self.ended.wait(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Returns what the script writes to its two outputs from now on until its end."""
        errors = []
        # Both pipes must be read at once, or the script may wait for the one that is not.
        reader = threading.Thread(target=lambda: errors.append(self.stderr.read()), daemon=True)
        reader.start()
        killer = threading.Timer(timeout or threading.TIMEOUT_MAX, self.kill)
        killer.start()
        output = self.stdout.read()
        reader.join()
        self.wait()
        is_late = not killer.is_alive()
        killer.cancel()
        if is_late:
            raise subprocess.TimeoutExpired(self.args, timeout, output, errors[0])
        self.stdout.close()
        self.stderr.close()
        return output, errors[0]


@functools.cache
def start_zygotes(first_library: str) -> list[socket.socket]:
    """Starts both zygotes at their first use. The one without HUB_LIBRARIES is the first.

    They end with the process of the tests.
    """
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    numbers = [theirs.fileno() for _, theirs in pairs]
    subprocess.Popen(
        [sys.executable, __file__, first_library, *map(str, numbers)],
        pass_fds=numbers,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        # torch then asks for GPUs in a way that a fork survives.
        env=START | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
    )
    for _, theirs in pairs:
        theirs.close()
    return [mine for mine, _ in pairs]


def start_script(
    *arguments,
    env: dict[str, str] | None = None,
    cwd: Path = ROOT,
    fresh: bool = False,
    first_library: str = "torch",
) -> ForkedScript | subprocess.Popen:
    """Starts `python ARGUMENTS`, with `env` added to the environment.

    It is a new Python with `fresh`, for -c and other options of Python's own but -m, and with a
    variable in `env` that a library may have read already. `first_library` is what the script has
    to import before all others.
    """
    command = [str(argument) for argument in arguments]
    changes = changed_variables(env or {})
    environment = START | changes
    is_option = command[0].startswith("-") and command[0] != "-m"
    is_late = all(name.startswith(LATE) for name in changes)
    if fresh or is_option or not is_late:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    before_hub, after_hub = start_zygotes(first_library)
    reads_hub_variables = any(name.startswith(("HF_", "HUGGING_FACE_")) for name in changes)
    zygote = before_hub if reads_hub_variables else after_hub
    return ForkedScript(command, cwd, environment, zygote)


def changed_variables(env: dict[str, str]) -> dict[str, str]:
    """Returns the variables that are to differ from START: those of `env`, and some others.

    A test may set those of LATE for its own process too. Other changes there are by libraries.
    """
    late = {name: value for name, value in os.environ.items() if name.startswith(LATE)}
    asked = late | env
    return {name: value for name, value in asked.items() if START.get(name) != value}


def script(
    *arguments,
    timeout: float = 900,
    **options,
) -> subprocess.CompletedProcess:
    """Runs `python ARGUMENTS` as a user would, to its end. For `options` see start_script."""
    process = start_script(*arguments, **options)
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


# -----------------------------------------------------------------------------
# The zygote's side


def serve(connection: socket.socket) -> dict:
    """Forks for each request. Returns the request in the process that has to run it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    while True:
        message, files, *_ = socket.recv_fds(connection, LONGEST_REQUEST, 4)
        if not message:  # the tests have ended
            sys.exit()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            connection.close()
            keep(files)
            return json.loads(message)
        for file in files:
            os.close(file)


def keep(files: list[int]) -> None:
    """Forks the script's process and returns in it. The keeper waits for its end, and ends too."""
    *streams, report = files
    pid = os.fork()
    if pid == 0:
        for number, file in enumerate(streams):  # become the standard streams 0, 1 and 2
            os.dup2(file, number)
        for file in files:
            os.close(file)
        return
    for file in streams:
        os.close(file)
    with open(report, "w") as lines:
        print(pid, file=lines, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=lines)
    os._exit(0)


def run(request: dict) -> None:
    """Does what Python does with such a command line."""
    import torch

    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    # Python's objects for them still describe the zygote's own streams.
    encoding = os.environ.get("PYTHONIOENCODING")
    sys.stdin = open(0, encoding=encoding, closefd=False)
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)
    sys.stderr = open(2, "w", buffering=1, encoding=encoding, closefd=False)
    if "OMP_NUM_THREADS" in os.environ:  # OpenMP has read the zygote's
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    first, *others = request["arguments"]
    if first == "-m":
        sys.argv = others
        sys.path[0] = os.getcwd()
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *others]
        sys.path[0] = str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


def become_zygote(first_library: str, before_hub: int, after_hub: int) -> socket.socket:
    """Imports the libraries, in two processes. Returns the socket that each of them serves."""
    sys.path.append(str(ROOT))  # the first may be a module of the project
    importlib.import_module(first_library)
    sys.path.remove(str(ROOT))
    for library in LIBRARIES:
        importlib.import_module(library)
    if os.fork() == 0:
        os.close(before_hub)
        for library in HUB_LIBRARIES:
            importlib.import_module(library)
        return socket.socket(fileno=after_hub)
    os.close(after_hub)
    return socket.socket(fileno=before_hub)


if __name__ == "__main__":
    connection = become_zygote(sys.argv[1], *map(int, sys.argv[2:]))
    # The forks then leave these objects alone when they end, which saves 1.5 s for each.
    gc.collect()
    gc.freeze()
    run(serve(connection))
