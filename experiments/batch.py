"""Does LoRA mind large batches more than full fine-tuning does?

"LoRA Without Regret" (2025) finds that LoRA's loss grows faster with the batch size than
that of full fine-tuning, at any rank, because a product of two matrices trains differently
from W. All arms see 3,200 rows, so a larger batch leaves fewer steps, and is worse for both.
With batches of 128, which were tried first, 25 steps teach LoRA to write a digit at every
learning rate, and not yet which digit.

    python -m experiments.batch             # about 10 minutes on two cores
"""

from experiments import report
from experiments.lab import START, Trial

ROWS = 3200
BATCHES = (8, 32)
RATES = {"LoRA": START, "full": 2.5e-4}  # first guesses for batches of 16


def arm(kind: str, batch_size: int) -> Trial:
    return Trial(
        arm=kind.lower(),
        batch_size=batch_size,
        steps=ROWS // batch_size,
        learning_rate=RATES[kind] * batch_size / 16,
    )


ARMS = {f"{kind}, batches of {size}": arm(kind, size) for kind in RATES for size in BATCHES}


def conclude(found: dict[str, report.Finding]) -> list[str]:
    sentences = []
    losses = {}
    for kind in ("LoRA", "full"):
        arms = [found[f"{kind}, batches of {size}"] for size in BATCHES]
        nll = [arm.mean("nll") for arm in arms]
        losses[kind] = nll[-1] - nll[0]
        shown = ", ".join(f"{value:.3f}" for value in nll)
        sentences.append(f"{kind}: nll {shown} at best rates {report.rates(arms)}")
    agrees = "as" if losses["LoRA"] > losses["full"] else "unlike what"
    sentences.append(
        f"from batches of 8 to batches of 32 nll rises by {losses['LoRA']:.3f} with LoRA and by "
        f"{losses['full']:.3f} with full fine-tuning, {agrees} LoRA Without Regret reports"
    )
    return sentences


if __name__ == "__main__":
    report.main(__name__)
