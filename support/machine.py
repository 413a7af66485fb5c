"""What a run depends on besides its arguments: the processor or GPU, the versions, the memory."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from support import ranks

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "bitsandbytes", "safetensors", "tokenizers", "datasets")
STATUS = Path("/proc/self/status")  # what Linux says about this process
RESET = Path("/proc/self/clear_refs")  # a "5" written here starts its peak of memory again


def fast_dtype() -> str:
    """Returns "bf16", or "fp32" on a CPU without instructions for bf16, some ten times slower."""
    import torch

    if torch.cuda.is_available():
        return "bf16"
    mkldnn = torch.backends.mkldnn.is_available()
    return "bf16" if mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def environment(device: torch.device) -> dict:
    """Returns versions, the project's commit, the name of the device and the number of ranks."""
    return {
        "versions": versions(),
        "commit": commit(),
        "device_name": device_name(device),
        "ranks": ranks.WORLD,
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python and of those libraries that are installed."""
    numbers = {}
    for package in PACKAGES:
        try:
            numbers[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # bitsandbytes is not needed without NF4
            continue
    return numbers | {"python": platform.python_version()}


def commit() -> str | None:
    """Returns the commit of this project, or None without git or outside a repository."""
    try:
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            check=False,
        )
    except OSError:
        return None
    return git.stdout.strip() or None


def device_name(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def peak_memory(device: torch.device, reset: bool = False) -> int | None:
    """Returns the most bytes so far: allocated on a GPU, resident on a CPU.

    With `reset` it starts again from what is in use now. None where the system does not say.
    """
    if device.type == "cuda":
        return peak_of_gpu(device, reset)
    try:
        if reset:
            RESET.write_text("5")
        peak = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    except OSError:  # no Linux, or a container that hides it
        return None
    return int(peak[1]) * 1024 if peak else None


def peak_of_gpu(device: torch.device, reset: bool) -> int:
    import torch

    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.max_memory_allocated(device)
