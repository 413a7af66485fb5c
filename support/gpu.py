"""NVIDIA's GPUs that are there and that this torch cannot use: why not, and what helps.

Where the driver is too old torch says that there is no CUDA device, and a run would train on the
CPU. Where a card is too old, or too new, it says nothing before the first kernel.

torch takes seconds to import, so the functions that ask it import it.
"""

import os
import shutil
import subprocess

# The quotes are for bash, for cmd and for PowerShell. By force, because pip takes the torch that
# is installed for the one that is asked for.
INSTALL = (
    'pip install --force-reinstall "torch<2.15" --index-url https://download.pytorch.org/whl/{}'
)
OLDEST = "cu126"  # the wheels for the oldest drivers and cards. torch 2.14 is the last to have it
NEWEST = "cu130"


def unusable() -> str | None:
    """Returns a line on a GPU that is there, and why torch finds no CUDA device, with the cure.

    Returns None if torch finds one, where there is none, and where the user hides it.
    """
    if shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    import torch

    if torch.cuda.is_available():
        return None
    name = listed_by_driver()
    if name is None:
        return None
    if torch.version.cuda is None:
        return f"there is a GPU ({name}), and this torch is for CPUs: {INSTALL.format(NEWEST)}"
    return (
        f"there is a GPU ({name}), and torch cannot use it ({reason()}): update its driver for "
        f"CUDA {torch.version.cuda}, or {INSTALL.format(OLDEST)}"
    )


def listed_by_driver() -> str | None:
    """Returns the name of the first GPU that nvidia-smi lists, None if it lists none."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):  # it finds no driver, or waits for one
        return None
    name = done.stdout.decode(errors="replace").strip().partition("\n")[0]
    # Some drivers say so instead of a name, without a failure.
    return None if name in ("", "No devices were found") else name


def reason() -> str:
    """Returns torch's own words on why there is no CUDA device, without its advice."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).partition(".")[0]
    return "no CUDA device"


def cure(error: Exception, device: str) -> str:
    """Returns what helps where a GPU's first kernel has failed."""
    if "no kernel image" not in str(error):
        return "pass --device cpu"
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    # CUDA 13 has dropped what is below 7.5, and the last wheels for CUDA 12.6 lack what is above 8.
    build = NEWEST if major >= 9 else OLDEST
    return f"it has none for compute capability {major}.{minor}: {INSTALL.format(build)}"
