"""Asks every question, one after another; what is stored is not run again.

    python -m experiments --workers 2       # the flags are those of each question
"""

from experiments import report
from support import cli


def main() -> None:
    for name in report.QUESTIONS:
        report.answer(report.question(name))


if __name__ == "__main__":
    cli.run(main)
