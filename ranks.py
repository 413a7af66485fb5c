"""Several devices, several machines: what the processes that torchrun starts say to one another.

Read it after train.py. Each process, a rank, holds the whole model on a device of its own and takes every WORLD-th row of
each step. Only the gradients of the adapter are added up: 10 MB for phi-2 at rank 8, in one message, so that nothing needs to
be hidden behind the backward pass. What the ranks must agree on is a number or a few bytes: nothing is ever pickled.
Without torchrun there is one rank, and every function here returns what it was given. A rank that dies takes the others down:
torchrun ends them, and with --max-restarts starts all anew, to go on from the last save.

    torchrun --nproc-per-node 8 train.py --rank 8
"""
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
FIRST = RANK == 0  # the one that prints and writes
COMMAND = "python" if WORLD == 1 else f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"  # that a script was started with
# How often torchrun may start all ranks anew, and how often it has
MAX_RESTARTS, RESTARTS = (int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("MAX_RESTARTS", "RESTART_COUNT"))


def start(device: str, used: bool = True) -> torch.device:
    """The device of this rank, after all have met: NCCL joins GPUs, gloo CPUs. From here on the first alone prints.

    Raises ValueError for a device that is not there, or, where it will not be `used`, for what is no device at all.
    """
    try:
        torch.empty(0, device=device if used else torch.device(device) and "meta")
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that it does not know, or was not built for
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    if "RANK" not in os.environ:
        return torch.device(device)
    if not FIRST:
        sys.stdout = open(os.devnull, "w")
    if device == "cuda":
        device = f"cuda:{LOCAL_RANK}"
        torch.cuda.set_device(device)
    backend, store = "nccl" if device.startswith("cuda") else "gloo", None
    if RESTARTS and os.environ["GROUP_WORLD_SIZE"] == "1":  # torchrun's store still holds the addresses of the ranks that died
        store = dist.PrefixStore(f"restart {RESTARTS}", next(dist.rendezvous("env://"))[0])
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD, timeout=timedelta(minutes=10))
    return torch.device(device)


def fast_dtype() -> str:
    """"bf16" on a GPU and on CPUs with AVX-512 or better; on others PyTorch multiplies in bf16 some ten times slower than in fp32."""
    fast = torch.cuda.is_available() or torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if fast else "fp32"


def stop() -> None:
    """At the end of a script that ended well: after an error this could wait for a rank that is no more."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def one_line():
    """What NCCL or gloo raise when another rank is gone, as an error that a script prints."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(f"another rank has ended, whose own error says why ({str(error).splitlines()[0][:150]})") from None


@one_line()
def total(device: torch.device, *numbers: float | Tensor) -> list[float]:
    """Each number, added up over all ranks."""
    if WORLD == 1:
        return [float(number) for number in numbers]
    sums = torch.tensor([float(number) for number in numbers], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


@one_line()
def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds up the gradients of all ranks, in place. A rank that had no row in this step adds zeros."""
    if WORLD == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    for gradient, part in zip(gradients, together.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))


@one_line()
def gather(content: Tensor) -> list[Tensor]:
    """The bytes, (n,) uint8, of every rank, n of its own; on the CPU, in the order of the ranks."""
    if WORLD == 1:
        return [content]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(WORLD)]
    dist.all_gather(sizes, torch.tensor([len(content)], device=device))
    longest = int(max(sizes))
    found = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(WORLD)]
    dist.all_gather(found, nn.functional.pad(content.to(device), (0, longest - len(content))))
    return [part[:size].cpu() for part, size in zip(found, sizes)]


def gather_rows(rows: list) -> list:
    """The rows of all ranks, one list of what JSON can hold."""
    if WORLD == 1:
        return rows
    content = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8)
    return [row for part in gather(content) for row in json.loads(part.numpy().tobytes())]


def environment(device: torch.device) -> dict:
    """What a result depends on besides its arguments: versions, commit, device."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    packages = ("torch", "bitsandbytes", "safetensors", "tokenizers", "datasets")
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"versions": versions, "commit": git.stdout.strip() or None, "device_name": name, "ranks": WORLD}
