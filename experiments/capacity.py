"""When does an adapter become too small for its data?

"LoRA Without Regret" (2025) finds that LoRA equals full fine-tuning as long as the adapter
can hold what the data teaches; beyond that a higher rank helps. All arms take 320 steps of
16 rows: they see 320 rows 16 times, or 5,120 rows once.

    python -m experiments.capacity          # about 15 minutes on two cores
"""

from dataclasses import replace

from experiments import report
from experiments.lab import Trial

ROWS = (320, 5120)
KINDS = {
    "rank 1": Trial(rank=1, alpha=2.0),
    "rank 64": Trial(rank=64, alpha=128.0),
    "full": Trial(arm="full", learning_rate=2.5e-4),
}
NAMES = {(kind, rows): f"{kind}, {rows:,} rows" for rows in ROWS for kind in KINDS}


def arm(kind: str, rows: int) -> Trial:
    return replace(KINDS[kind], train_rows=rows, steps=320)


ARMS = {name: arm(kind, rows) for (kind, rows), name in NAMES.items()}


def conclude(found: dict[str, report.Finding]) -> list[str]:
    sentences = []
    for rows in ROWS:
        one, many, full = (NAMES[kind, rows] for kind in KINDS)
        sentences += [
            report.compare(found, many, one),
            report.compare(found, many, full, "LoRA Without Regret", "equal"),
        ]
    return sentences


if __name__ == "__main__":
    report.main(__name__)
