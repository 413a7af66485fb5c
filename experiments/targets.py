"""Which layers should get adapters?

LoRA (arXiv:2106.09685, section 7.1) divides a fixed number of parameters among the
attention matrices, and finds that q and v at a lower rank are better than one matrix at a
higher rank. It does not adapt the MLP. QLoRA (arXiv:2305.14314, section 4, figure 2) needs
adapters on all layers to match full fine-tuning. "LoRA Without Regret" (2025) finds that
adapting attention alone is worse than adapting the MLP alone, even with equally many
parameters.

In the first four arms the ranks make the numbers of parameters equal to within 3 %: in
tiny/, as in phi-2, fc1 and fc2 have one side that is four times as wide. alpha is 2 * rank,
so the scale is the same in all arms.

    python -m experiments.targets           # about 10 minutes on two cores
"""

from experiments import report
from experiments.lab import Trial

QV = "q_proj v_proj"
ATTENTION = "q_proj k_proj v_proj dense"
MLP = "fc1 fc2"


def arm(targets: str, rank: int) -> Trial:
    return Trial(targets=targets, rank=rank, alpha=2.0 * rank)


ARMS = {
    "q and v, rank 18": arm(QV, 18),
    "attention, rank 9": arm(ATTENTION, 9),
    "MLP, rank 7": arm(MLP, 7),
    "all layers, rank 4": arm("all-linear", 4),
    "q and v, rank 4": arm(QV, 4),
    "MLP, rank 4": arm(MLP, 4),
}


def conclude(found: dict[str, report.Finding]) -> list[str]:
    every = "all layers, rank 4"
    regret = "LoRA Without Regret"
    return [
        report.compare(found, every, "q and v, rank 18", "QLoRA", "better"),
        report.compare(found, every, "attention, rank 9", regret, "better"),
        report.compare(found, every, "MLP, rank 7", regret, "equal"),
        report.compare(found, "MLP, rank 7", "attention, rank 9", regret, "better"),
        report.compare(found, "q and v, rank 18", "q and v, rank 4", "LoRA", "equal"),
    ]


if __name__ == "__main__":
    report.main(__name__)
