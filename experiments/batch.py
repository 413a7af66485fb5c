"""Does LoRA mind large batches more than full fine-tuning does?

"LoRA Without Regret" (2025) finds that LoRA's loss grows faster with the batch size than
that of full fine-tuning, at any rank, because a product of two matrices trains differently
from W. All arms see 3,200 rows, so batches of 128 leave only 25 steps, and a larger batch
is worse for both.

    python -m experiments.batch             # about 8 minutes on two cores
"""

from experiments import report
from experiments.lab import Trial

ROWS = 3200
BATCHES = (16, 128)


def arm(batch_size: int, **settings) -> Trial:
    return Trial(batch_size=batch_size, steps=ROWS // batch_size, **settings)


ARMS = {f"LoRA, batches of {size}": arm(size) for size in BATCHES} | {
    f"full, batches of {size}": arm(size, arm="full", learning_rate=2.5e-4) for size in BATCHES
}


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
        f"from batches of 16 to batches of 128 nll rises by {losses['LoRA']:.3f} with LoRA and by "
        f"{losses['full']:.3f} with full fine-tuning, {agrees} LoRA Without Regret reports"
    )
    return sentences


if __name__ == "__main__":
    report.main(__name__)
