"""Does dropout on the adapter's input help?

QLoRA (arXiv:2305.14314, appendix A) finds that a dropout of 0.05 helps models of 7 and 13
billion parameters, but not larger ones. Dropout works against memorising rows, so it is
tried where rows are seen once (3,200 of 4,000) and where they are seen eight times (400).

    python -m experiments.dropout           # about 10 minutes on two cores
"""

from experiments import report
from experiments.lab import Trial

SHARES = (0.0, 0.05, 0.2)
ROWS = (4000, 400)
NAMES = {(rows, share): f"{rows:,} rows, dropout {share:g}" for rows in ROWS for share in SHARES}
ARMS = {name: Trial(train_rows=rows, dropout=share) for (rows, share), name in NAMES.items()}


def conclude(found: dict[str, report.Finding]) -> list[str]:
    sentences = []
    for rows in ROWS:
        without, little, much = (NAMES[rows, share] for share in SHARES)
        sentences += [
            report.compare(found, little, without, "QLoRA", "better"),
            report.compare(found, much, without),
        ]
    return sentences


if __name__ == "__main__":
    report.main(__name__)
