"""Does a higher rank help, and should alpha grow with it?

LoRA (arXiv:2106.09685, section 7.2) finds that a rank of 1 to 8 is enough. It scales B A by
alpha / rank (section 4.1), so that the learning rate can stay when the rank changes. rsLoRA
(arXiv:2312.03732) objects that this factor holds high ranks back. "LoRA Without Regret"
(Schulman et al., 2025) finds that at a fixed alpha the best rate is about the same for
every rank. So each arm is shown at its own best rate, and the rates are compared: we
prefer the choice of alpha with which one rate serves all ranks.

    python -m experiments.rank              # about 20 minutes on two cores
"""

from experiments import report
from experiments.lab import Trial

RANKS = (1, 4, 8, 16, 64)
FIXED = [f"rank {rank}, alpha 16" for rank in RANKS]
GROWING = [f"rank {rank}, alpha {2 * rank}" for rank in RANKS]  # the same at rank 8
# These two show how much of rank 64's gain comes from its larger alpha.
LARGER = {f"rank 8, alpha {alpha}": Trial(alpha=float(alpha)) for alpha in (32, 128)}
ARMS = {name: Trial(rank=rank) for rank, name in zip(RANKS, FIXED)} | {
    name: Trial(rank=rank, alpha=2.0 * rank) for rank, name in zip(RANKS, GROWING)
}
ARMS |= LARGER


def conclude(found: dict[str, report.Finding]) -> list[str]:
    fixed = [found[name] for name in FIXED]
    growing = [found[name] for name in GROWING]
    return [
        rates("alpha 16", fixed),
        rates("alpha = 2 * rank", growing),
        report.compare(found, FIXED[-1], FIXED[0], "LoRA", "equal"),
        report.compare(found, GROWING[-1], GROWING[0], "LoRA", "equal"),
        report.compare(found, GROWING[-1], FIXED[-1], "rsLoRA", "better"),
        *(report.compare(found, name, "rank 8, alpha 16") for name in LARGER),
        report.compare(found, GROWING[-1], "rank 8, alpha 128"),
    ]


def rates(name: str, arms: list[report.Finding]) -> str:
    """Returns a sentence on the best rates of all ranks, and on keeping that of rank 8."""
    if report.ratio(arms) == 1:
        return f"{name}: the best rate of every rank is {arms[0].rate:g}"
    kept = arms[RANKS.index(8)].rate
    ranks = ", ".join(map(str, RANKS))
    losses = ", ".join(
        f"{arm.nll_at(kept)} instead of {arm.nll_at(arm.rate)} at rank {rank}"
        for rank, arm in zip(RANKS, arms)
        if arm.rate != kept
    )
    return (
        f"{name}: the best rates of ranks {ranks} are {report.rates(arms)}; at rank 8's, "
        f"{kept:g}, nll (first seed) is {losses}"
    )


if __name__ == "__main__":
    report.main(__name__)
