"""What a run depends on besides its arguments: processor or GPU, versions, memory.

torch takes seconds to import, so the functions that ask it import it.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from support import processes

if TYPE_CHECKING:
    import torch

# The libraries whose versions can change a result or a file.
PACKAGES = ("torch", "bitsandbytes", "safetensors", "tokenizers", "pyarrow")
STATUS = Path("/proc/self/status")  # what Linux says about this process
RESET = Path("/proc/self/clear_refs")  # a "5" written here resets its peak of memory


# -----------------------------------------------------------------------------
# What it runs on


def fast_dtype() -> str:
    """Returns "bf16", or "fp32" on a CPU without instructions for bf16."""
    import torch

    if torch.cuda.is_available():
        return "bf16"
    # Without the instructions torch emulates bf16, some ten times slower than fp32. Only
    # this private operator says which it is.
    mkldnn = torch.backends.mkldnn.is_available()
    return "bf16" if mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def environment(device: torch.device) -> dict:
    """Returns versions, the project's commit, the device's name and the number of processes."""
    return {
        "versions": versions(),
        "commit": commit(),
        "device_name": device_name(device),
        "processes": processes.COUNT,
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python and of those libraries that are installed."""
    # From the packages' metadata: importing them would take seconds.
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
            # the project's repository, not one that the user works in
            cwd=Path(__file__).parent,
            # outside a repository git fails, with nothing on standard output
            check=False,
        )
    except OSError:  # no git
        return None
    return git.stdout.strip() or None


def device_name(device: torch.device) -> str:
    """Returns the name of a GPU, or what is known of the CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    # On many Linux systems processor() is empty, and machine() says x86_64 or aarch64.
    return platform.processor() or platform.machine()


# -----------------------------------------------------------------------------
# Memory


def peak_memory(device: torch.device, reset: bool = False) -> int | None:
    """Returns the most bytes so far: allocated on a GPU, resident on a CPU.

    With `reset` it starts again from what is in use now, but on macOS, where it is always that
    of the whole process. Returns None where the system does not say, as on Windows.
    """
    if device.type == "cuda":
        import torch

        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        # By tensors. nvidia-smi shows more: the CUDA context, and what torch reserves.
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "darwin":
        import resource  # which Windows lacks

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes there
    try:
        # First, so that the number returned is what is in use now: a level to compare with.
        if reset:
            RESET.write_text("5")
        # "high water mark"; its kB are 1024 bytes
        peak = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    except OSError:  # no Linux, or a container that hides it
        return None
    return int(peak[1]) * 1024 if peak else None


def free_memory(device: str | torch.device) -> int:
    """Returns how many bytes a GPU has left. Of a CPU's nothing is promised: 0."""
    import torch

    if torch.device(device).type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free
