"""What of an adapter survives merging, in 16 bits and in 4?

QLoRA (arXiv:2305.14314) keeps its adapters unmerged. Merging rounds W + B A to the type
that stores it. In NF4 the distance between two levels is a large share of a block's
largest weight, and most of an update is smaller than that. All arms are trained over NF4.
"lost" is the norm of what rounding changes, divided by the norm of B A, as a mean over all
layers (scripts/merge.py): 1 means as much as the adapter itself.

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
    """Returns a figure that was measured after merging, as a mean over the seeds."""
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
        f"{name}: accuracy {arm.mean():.3f} unmerged, {merged(arm, 'bf16', 'accuracy'):.3f} merged "
        f"into bf16, {merged(arm, 'nf4', 'accuracy'):.3f} merged into NF4"
        for name, arm in found.items()
    ]


if __name__ == "__main__":
    report.main(__name__)
