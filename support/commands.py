"""Commands that scripts print. Each can be pasted into a shell in the current folder."""

import os
import shlex
import subprocess
from pathlib import Path

from support import processes

ROOT = Path(__file__).resolve().parent.parent


def command(script: str, *words, program: str = "python") -> str:
    """Returns the command line that runs "eval.py" or "scripts.push", say, with these words."""
    path = ROOT / script
    if script.startswith("scripts."):
        path = ROOT / "scripts" / f"{path.suffix.removeprefix('.')}.py"
    return f"{program} {quoted(*name_of(path), *words)}"


def name_of(path: Path) -> list[str]:
    """Returns the words that follow "python" to run a script."""
    # -m only finds the package scripts in the current folder.
    if path.parent.name == "scripts" and from_here(path.parent.parent) == ".":
        return ["-m", f"scripts.{path.stem}"]
    return [from_here(path)]


def resume(run: Path) -> str:
    """Returns the command that resumes a run of train.py, with the current number of processes."""
    return command("train.py", "--resume", run, program=processes.COMMAND)


def quoted(*words) -> str:
    """Returns words as a command line, with quotes where a shell needs them."""
    texts = [str(word) for word in words]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


def from_here(path: Path) -> str:
    """Returns the path relative to the current folder or the path as it is, the shorter one."""
    try:
        relative = os.path.relpath(path)
    except (ValueError, OSError):  # another drive on Windows, or a folder that was removed
        return str(path)
    return min(relative, str(path), key=len)
