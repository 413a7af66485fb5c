"""Should the loss be on the answer alone, or on the whole prompt?

QLoRA (arXiv:2305.14314, appendix B) trains on the answer alone, which is better for its
instruction data. The original FLoRA trained on every token. Then about 75 tokens of a row
have a loss, and only two of them are the answer's, which hardly count in the mean. It also
costs more, because rows with a loss on the prefix cannot share the prefix.

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
