"""Runs every question, one after another. Stored trials are not run again.

    python -m experiments --workers 2       # takes the flags of a question
"""

from experiments import report
from support import cli


def main() -> None:
    for name in report.QUESTIONS:
        report.answer(report.question(name))


if __name__ == "__main__":
    cli.run(main)
