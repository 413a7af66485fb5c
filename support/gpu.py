"""NVIDIA GPUs that are present but that this torch cannot use: why, and what helps.

If the driver is too old, torch reports no CUDA device, and a run would train on the CPU. If a
GPU is too old or too new, torch reports nothing before the first kernel runs.
"""

import os
import subprocess

# The quotes work in bash, cmd and PowerShell. --force-reinstall, because otherwise pip considers
# the installed torch to be the requested one. torch 2.14 is the last with wheels for CUDA 12.6,
# which are for the oldest drivers and for compute capability 5 to 9.
CURE = (
    'pip install --force-reinstall "torch<2.15" --index-url '
    "https://download.pytorch.org/whl/cu126 (cu130 for GPUs of 2024 and later)"
)


def unusable() -> str | None:
    """Returns a line that says why torch cannot use the GPU that is present, with the cure.

    Returns None if torch finds a CUDA device, if there is no GPU, or if the user has hidden it.
    """
    import torch  # which takes seconds

    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):  # it finds no driver, or hangs
        return None
    if not done.stdout.startswith(b"GPU"):  # such as "No devices were found"
        return None
    reason = ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition(".")[0]  # without its advice
    return f"there is a GPU, and torch cannot use it ({reason}): update its driver, or {CURE}"
