"""What a run depends on besides its arguments: processor or GPU, versions, memory.

torch takes seconds to import, so only the functions that need it import it.
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
RESET = Path("/proc/self/clear_refs")  # writing "5" here resets the process's memory peak


# -----------------------------------------------------------------------------
# Hardware and versions


def fast_dtype(device: str) -> str:
    """Returns the fastest --dtype with instructions on a device: "bf16", "fp16" or "fp32".

    fp16 is only chosen on GPUs that lack bf16. A missing GPU counts as a recent one.
    """
    if device.startswith("cuda"):
        return dtype_of_gpu(device)
    return "bf16" if device.startswith("cpu") and cpu_computes("bf16") else "fp32"


def dtype_of_gpu(device: str) -> str:
    """Returns the `fast_dtype` of a CUDA device, from its compute capability."""
    import torch

    try:
        major, _ = torch.cuda.get_device_capability(device)
    except (RuntimeError, AssertionError):  # no such GPU; processes.start will report it
        return "bf16"
    # 7 is Volta and Turing, with tensor cores for fp16. torch emulates bf16 there.
    if major == 7:
        return "fp16"
    return "bf16" if major > 7 else "fp32"


def cpu_computes(dtype: str) -> bool:
    """Returns whether torch has kernels that use this CPU's instructions for bf16 or fp16.

    Without such kernels a 16-bit dtype is ten times slower than fp32 or worse. Only these private
    operators tell.
    """
    import torch

    if not torch.backends.mkldnn.is_available():
        return False
    return getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported")()


def emulates(dtype: str, device: str) -> bool:
    """Returns whether a device has no instructions for a --dtype, so that it is slow."""
    if dtype == "fp16":  # for which every GPU has instructions
        return device.startswith("cpu") and not cpu_computes(dtype)
    return dtype == "bf16" and fast_dtype(device) != "bf16"


def environment(device: torch.device) -> dict:
    """Returns versions, the project's commit, the device's name and the number of processes."""
    return {
        "versions": versions(),
        "commit": commit(),
        "device_name": device_name(device),
        "processes": processes.COUNT,
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python and of those PACKAGES that are installed."""
    # From the packages' metadata, because importing them would take seconds.
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
            # this project's repository, not the user's current one
            cwd=Path(__file__).parent,
            # outside a repository git fails and prints nothing on standard output
            check=False,
        )
    except OSError:  # no git
        return None
    return git.stdout.strip() or None


def device_name(device: torch.device) -> str:
    """Returns the name of a GPU, or what is known about the CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    # On many Linux systems processor() is empty, and machine() says x86_64 or aarch64.
    return platform.processor() or platform.machine()


# -----------------------------------------------------------------------------
# Memory


def peak_memory(device: torch.device, reset: bool = False) -> int | None:
    """Returns the peak of memory so far in bytes: allocated on a GPU, resident on a CPU.

    With `reset`, starts a new peak from what is in use now. (Not on macOS, where the peak is
    always that of the whole process.) Returns None if the system does not tell, as on Windows.
    """
    if device.type == "cuda":
        import torch

        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        # Only tensors. nvidia-smi also shows the CUDA context and what torch reserves.
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "darwin":
        import resource  # which Windows lacks

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes there
    try:
        # Reset first, so that the number returned is what is in use now, as a baseline.
        if reset:
            RESET.write_text("5")
        # "high water mark"; its kB are 1024 bytes
        peak = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    except OSError:  # no Linux, or a container that hides it
        return None
    return int(peak[1]) * 1024 if peak else None


def free_memory(device: str | torch.device) -> int:
    """Returns how many bytes of memory a GPU has free, or 0 for a CPU."""
    import torch

    if torch.device(device).type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free
