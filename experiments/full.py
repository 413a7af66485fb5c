"""How far is LoRA from full fine-tuning, and how do their learning rates differ?

"LoRA Without Regret" (Schulman et al., 2025) finds that on small data LoRA on all layers
learns as well as full fine-tuning, at ten times its learning rate (about 15 times in short
runs), with alpha 32. At another alpha we expect another factor: for small steps the update
is proportional to rate * alpha, so at alpha 16 a higher rate does the same.

The full arm trains every weight of the base, including embeddings, norms and the output
head. It stores 16 bytes per weight. LoRA stores 16 bytes per number of A and B, and the
frozen weights.

    python -m experiments.full              # about 10 minutes on two cores, after rank
"""

from experiments import report
from experiments.lab import Trial

QV = "q_proj v_proj"
FULL = Trial(arm="full", learning_rate=2.5e-4)
ARMS = {
    "full": FULL,
    "LoRA, rank 1": Trial(rank=1),
    "LoRA, rank 8": Trial(rank=8),
    "LoRA, rank 8, alpha 32": Trial(rank=8, alpha=32.0),
    "LoRA, rank 64": Trial(rank=64),
    "LoRA, rank 8, q and v alone": Trial(rank=8, targets=QV),
}


def conclude(found: dict[str, report.Finding]) -> list[str]:
    full = found["full"]
    sentences = []
    for name, arm in found.items():
        if name != "full":
            compared = report.compare(found, name, "full")
            share = arm.trained / full.trained
            ratio = arm.rate / full.rate
            sentences.append(
                f"{compared}; it trains {share:.1%} of the numbers, at {ratio:g} times the rate"
            )
    sentences.append(
        "LoRA Without Regret finds LoRA on all layers equal to full fine-tuning, and on attention "
        "alone worse"
    )
    ratio = found["LoRA, rank 8, alpha 32"].rate / full.rate
    sentences.append(
        f"at alpha 32 LoRA's best rate is {ratio:g} times that of full fine-tuning; LoRA Without "
        "Regret reports 10 times, and 15 times for short runs"
    )
    return sentences


if __name__ == "__main__":
    report.main(__name__)
