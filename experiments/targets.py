"""Which layers should get adapters?

LoRA (arXiv:2106.09685, section 7.1) divides a fixed number of parameters among the
attention's matrices, and finds q and v with a lower rank better than one with a higher.
It leaves the MLP alone. QLoRA (arXiv:2305.14314, section 4, figure 2) needs adapters on
all layers to match full fine-tuning. "LoRA Without Regret" (2025): attention alone is
worse than the MLP alone, at equal parameters too.

The ranks make the numbers equal to 3 %: in tiny, as in phi-2, fc1 and fc2 are four times
as wide as the other layers. alpha is 2 rank, so that the factor is the same.

    python -m experiments.targets           # about 15 minutes on two cores
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
