"""Commands that scripts print. Each can be pasted into a shell in the current folder."""

import os
import shlex
import subprocess
from pathlib import Path

from support import processes

ROOT = Path(__file__).resolve().parent.parent


def command(script: str, *words, program: str = "python") -> str:
    """Returns the command line that runs "eval.py" or "scripts/push.py", say, with these words."""
    return f"{program} {quoted(from_here(ROOT / script), *words)}"


def resume(run: Path) -> str:
    """Returns the command that resumes a run of train.py, with the current number of processes."""
    return command("train.py", "--resume", run, program=processes.COMMAND)


def quoted(*words) -> str:
    """Returns words as a command line, with quotes where a shell needs them."""
    texts = [str(word) for word in words]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


def from_here(path: Path) -> str:
    """Returns the path, relative to the current folder if it is in it."""
    return str(path).removeprefix(f"{os.getcwd()}{os.sep}")
