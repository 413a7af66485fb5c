"""Commands that are printed. Each can be pasted in the folder where it is printed."""

import os
import shlex
import subprocess
from pathlib import Path

from support import processes

ROOT = Path(__file__).resolve().parent.parent


def command(script: str, *words, program: str = "python") -> str:
    """Returns the command line of "eval.py", or of "scripts.push", with these words."""
    path = ROOT / script
    if script.startswith("scripts."):
        path = ROOT / "scripts" / f"{path.suffix.removeprefix('.')}.py"
    return f"{program} {quoted(*name_of(path), *words)}"


def name_of(path: Path) -> list[str]:
    """Returns the words that stand for a script behind "python"."""
    # -m finds the package scripts in the current folder alone.
    if path.parent.name == "scripts" and from_here(path.parent.parent) == ".":
        return ["-m", f"scripts.{path.stem}"]
    return [from_here(path)]


def resume(run: Path) -> str:
    """Returns the command that resumes a run of train.py, on as many processes as this one has."""
    return command("train.py", "--resume", run, program=processes.COMMAND)


def quoted(*words) -> str:
    """Returns words of a command line, in quotes where a shell would take them apart."""
    texts = [str(word) for word in words]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


def from_here(path: Path) -> str:
    """Returns the shorter of two: a path from the current folder, or the whole path."""
    try:
        relative = os.path.relpath(path)
    except (ValueError, OSError):  # another drive of Windows, or a folder that was removed
        return str(path)
    return min(relative, str(path), key=len)
