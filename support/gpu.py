"""NVIDIA GPUs that are present but that this torch cannot use: why, and what helps.

If the driver is too old, torch reports no CUDA device, and a run would train on the CPU. If a
GPU is too old or too new, torch reports nothing before the first kernel runs.

torch takes seconds to import, so only the functions that need it import it.
"""

import os
import subprocess

# The quotes work in bash, cmd and PowerShell. --force-reinstall, because otherwise pip considers
# the installed torch to be the requested one.
INSTALL = (
    'pip install --force-reinstall "torch<2.15" --index-url https://download.pytorch.org/whl/{}'
)
OLDEST = "cu126"  # the wheels for the oldest drivers and GPUs; torch 2.14 is the last with them
NEWEST = "cu130"


def unusable() -> str | None:
    """Returns a line that says why torch cannot use the GPU that is present, with the cure.

    Returns None if torch finds a CUDA device, if there is no GPU, or if the user has hidden it.
    """
    import torch

    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    name = listed_by_driver()
    if name is None:
        return None
    if torch.version.cuda is None:
        return f"there is a GPU ({name}), and this torch is for CPUs: {INSTALL.format(NEWEST)}"
    reason = ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition(".")[0]  # without its advice
    return (
        f"there is a GPU ({name}), and torch cannot use it ({reason}): update its driver for "
        f"CUDA {torch.version.cuda}, or {INSTALL.format(OLDEST)}"
    )


def listed_by_driver() -> str | None:
    """Returns the name of the first GPU that nvidia-smi lists, or None if it lists none."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):  # it finds no driver, or hangs
        return None
    name = done.stdout.decode(errors="replace").strip().partition("\n")[0]
    # Some drivers print this message instead of a name, without an error status.
    return None if name in ("", "No devices were found") else name


def cure(error: Exception, device: str) -> str:
    """Returns what helps if the first kernel on a GPU has failed."""
    if "no kernel image" not in str(error):
        return "pass --device cpu"
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    # CUDA 13 dropped capabilities below 7.5; the last CUDA 12.6 wheels lack those above 8.
    build = NEWEST if major >= 9 else OLDEST
    return f"it has none for compute capability {major}.{minor}: {INSTALL.format(build)}"
