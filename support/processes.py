"""Several GPUs or machines: what the processes started by torchrun exchange.

Each process holds the whole model on its own device and takes every COUNT-th row of each
step. The processes sum only the gradients of the adapter: 10 MB for phi-2 with --rank 8, in
one message, too little to be worth overlapping with the backward pass. Without torchrun there
is one process, and sums and lists have only its own values. (torchrun calls a process a rank;
here rank always means LoRA's.)

If a process dies, torchrun ends the others. With --max-restarts it starts all of them again,
and they resume from the last save.

    torchrun --nproc-per-node 8 train.py --rank 8

torch is imported where it is used, so that --help need not wait for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from support import gpu

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# -----------------------------------------------------------------------------
# What torchrun sets in the environment

# All five variables are needed, because a shell may have one or two left over from other programs.
IN_TORCHRUN = bool(os.environ.get("MASTER_ADDR")) and all(
    os.environ.get(name, "").isdecimal()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
)
IN_TORCHRUN = IN_TORCHRUN and int(os.environ["RANK"]) < int(os.environ["WORLD_SIZE"])


def number_from_torchrun(name: str, alone: int) -> int:
    """Returns a number that torchrun has set, or `alone` in a process without torchrun."""
    value = os.environ.get(name, "")
    return int(value) if IN_TORCHRUN and value.isdecimal() else alone


COUNT = number_from_torchrun("WORLD_SIZE", 1)  # processes on all machines
NUMBER = number_from_torchrun("RANK", 0)  # the number of this process, over all machines
LOCAL_NUMBER = number_from_torchrun("LOCAL_RANK", 0)  # the number of this process on its machine
LOCAL_COUNT = number_from_torchrun("LOCAL_WORLD_SIZE", COUNT)  # processes on this machine
IS_FIRST = NUMBER == 0  # the process that prints and writes

# The program that starts scripts, for the commands that are printed.
COMMAND = "python" if COUNT == 1 else f"torchrun --nproc-per-node {LOCAL_COUNT}"

# How often torchrun may restart all processes, how often it has done so, and its run id, which a
# restart does not change.
MAX_RESTARTS = number_from_torchrun("TORCHELASTIC_MAX_RESTARTS", 0)
RESTARTS = number_from_torchrun("TORCHELASTIC_RESTART_COUNT", 0)
TORCHRUN = os.environ.get("TORCHELASTIC_RUN_ID") if IN_TORCHRUN else None


# -----------------------------------------------------------------------------
# Start and end


def start(device: str) -> torch.device:
    """Returns this process's device, once all processes are connected. Silences all but the first.

    Raises ValueError for a device that does not exist, that torch cannot use, or that several
    processes would share.
    """
    own = own_device(device)
    if COUNT == 1:
        return own
    # Otherwise each line would be printed COUNT times. Errors go to stderr from every process.
    if not IS_FIRST:
        sys.stdout = open(os.devnull, "w")
    meet(own)
    return own


def own_device(name: str) -> torch.device:
    """Returns the device that --device names, and makes it this process's default GPU.

    The default must be set before anything is allocated. Otherwise every process would also
    allocate memory on the first GPU.
    """
    import torch

    if LOCAL_COUNT > 1 and name.startswith("cuda:"):
        raise ValueError(
            f"--device {name} is one GPU for {LOCAL_COUNT} processes; "
            "with --device cuda each takes its own"
        )
    if COUNT > 1 and name == "cuda":
        name = f"cuda:{LOCAL_NUMBER}"
    if not name.startswith(("cpu", "cuda")):
        raise ValueError(
            f"--device {name}: only cpu and cuda are supported, not Apple's GPUs (mps) and others; "
            "pass --device cpu"
        )
    if name.startswith("cuda") and not torch.cuda.is_available():
        reason = gpu.unusable() or "torch finds no CUDA device here; pass --device cpu"
        raise ValueError(f"--device {name}: {reason}")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        # cuDNN's attention makes a plan for each new shape, and nearly every batch has one.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # The first kernel. If the device does not exist, or this torch has no kernels for it, it
        # fails here and not after the model has been downloaded.
        torch.ones(1, device=device)
    except RuntimeError as error:
        words = str(error).splitlines()[0][:100]
        raise ValueError(
            f"--device {name}: torch cannot use it ({words}); {gpu.cure(error, name)}"
        ) from None
    return device


def meet(device: torch.device) -> None:
    """Waits until all processes are connected: GPUs by NCCL, CPUs by gloo."""
    import torch.distributed as dist

    store = None
    if RESTARTS and os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun's store still holds the addresses of the processes that died, so the new ones
        # use a prefix. On several machines docs/running.md sets a variable for this instead.
        old_store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"restart {RESTARTS}", old_store)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        # torch reads these two itself, but not if it is given a store
        rank=NUMBER,
        world_size=COUNT,
        # NCCL's default; gloo's default is to wait half an hour for a dead machine
        timeout=timedelta(minutes=10),
    )


def stop() -> None:
    """Disconnects the processes. Only after success: it could wait for a process that failed."""
    if COUNT == 1:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


# -----------------------------------------------------------------------------
# The exchange. All processes must make the same calls in the same order, or they wait forever


@contextmanager
def blaming_another_process() -> Iterator[None]:
    """Turns the error that NCCL or gloo raises if another process has ended into one line."""
    try:
        yield
    except RuntimeError as error:
        # ConnectionError is an OSError, which cli.run prints without a traceback.
        reason = str(error).splitlines()[0][:150]
        raise ConnectionError(
            f"another process has ended, and its own error says why ({reason})"
        ) from None


def total(device: torch.device, *numbers: float | Tensor) -> list[float]:
    """Returns the sum of each number over all processes. `device` is this process's device.

    Tensors must be on this device. The function waits for it only once, for all numbers.
    """
    import torch
    import torch.distributed as dist

    if COUNT == 1 and not any(isinstance(number, torch.Tensor) for number in numbers):
        return [float(number) for number in numbers]
    # fp64 represents whole numbers up to 2^53 exactly, so counts stay exact. torch.full runs on
    # the device; copying a number there would wait for the device.
    values = []
    for number in numbers:
        if not isinstance(number, torch.Tensor):
            number = torch.full((), float(number), dtype=torch.float64, device=device)
        values.append(number.double())
    sums = torch.stack(values)
    if COUNT > 1:
        with blaming_another_process():
            dist.all_reduce(sums)
    return sums.tolist()


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sums the gradients over all processes, in place."""
    if COUNT == 1:
        return
    import torch
    import torch.distributed as dist

    parameters = list(parameters)
    for parameter in parameters:
        # The last step of an epoch may have fewer rows than there are processes. A process
        # without rows adds zeros, because the others wait for a message of the same length.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)

    # One message, because each message has a latency, and each adapted layer has two gradients.
    gradients = [parameter.grad for parameter in parameters]
    message = torch.cat([gradient.flatten() for gradient in gradients])
    with blaming_another_process():
        dist.all_reduce(message)

    # The sums replace the gradients, which the optimiser reads.
    parts = message.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))


def gather(value: Any) -> list:
    """Returns the values of all processes, in process order. Tensors must be on the CPU."""
    if COUNT == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * COUNT
    with blaming_another_process():
        # This uses pickle, but only between processes of one run. No file is ever unpickled.
        dist.all_gather_object(values, value)
    return values
