"""Should the loss be on the answer alone, or on the whole prompt?

QLoRA (arXiv:2305.14314, appendix B) trains on the answer alone, which is better for its
instruction data. The notebooks that this project follows trained on every token. There
some 75 tokens have a loss, two of which are the answer's: their mean hardly shows it. It
also costs more, because rows with a loss on the prefix cannot share it.

    python -m experiments.loss              # about 10 minutes on two cores
"""

from experiments import report
from experiments.lab import Trial

ARMS = {
    "answer": Trial(),
    "every token": Trial(loss="full", learning_rate=2e-3),
}


def conclude(found: dict[str, report.Finding]) -> list[str]:
    return [
        report.compare(found, "answer", "every token", "QLoRA", "better"),
        f"best rates {report.rates(list(found.values()))}",
    ]


if __name__ == "__main__":
    report.main(__name__)
