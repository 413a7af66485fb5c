"""Runs every question, one after another; what is stored is not run again.

    python -m experiments --workers 2       # the flags are those of each question
"""

import subprocess
import sys

from experiments.report import QUESTIONS

if __name__ == "__main__":
    for name in QUESTIONS:
        done = subprocess.run([sys.executable, "-m", f"experiments.{name}", *sys.argv[1:]])
        if done.returncode:
            sys.exit(done.returncode)
