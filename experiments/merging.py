"""What of an adapter survives merging, in 16 bits and in 4?

QLoRA (arXiv:2305.14314) keeps its adapters apart. Merged, W + B A is rounded to the type
that it is stored in. In NF4 a step between two levels is a good part of a block's largest
weight, and most of an update is smaller. All arms are trained over NF4. "lost" is the
norm of what rounding changes over that of B A, the mean of all layers
(scripts/merge.py): 1 is as much as the adapter itself.

    python -m experiments.merging           # about 10 minutes on two cores
"""

from experiments import report
from experiments.lab import Trial

RANKS = (1, 8, 64)
ARMS = {
    f"rank {rank}": Trial(rank=rank, alpha=2.0 * rank, quant="nf4", dtype="bf16", merges=True)
    for rank in RANKS
}


def merged(found: report.Finding, dtype: str, name: str) -> float:
    """Returns the mean over the seeds of what was measured after merging."""
    values = [result["merged"][dtype][name] for result in found.results if "merged" in result]
    return round(sum(values) / max(1, len(values)), 3)


COLUMNS = {
    "merged, bf16": lambda found: merged(found, "bf16", "accuracy"),
    "lost, bf16": lambda found: merged(found, "bf16", "lost"),
    "merged, NF4": lambda found: merged(found, "nf4", "accuracy"),
    "lost, NF4": lambda found: merged(found, "nf4", "lost"),
}


def conclude(found: dict[str, report.Finding]) -> list[str]:
    return [
        f"{name}: {arm.mean():.3f} beside the base, {merged(arm, 'bf16', 'accuracy'):.3f} merged "
        f"into bf16, {merged(arm, 'nf4', 'accuracy'):.3f} into NF4"
        for name, arm in found.items()
    ]


if __name__ == "__main__":
    report.main(__name__)
