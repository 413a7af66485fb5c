"""What does a base in NF4 cost, beside one in 16 or 32 bits?

QLoRA (arXiv:2305.14314, section 4, tables 2 to 4) finds no loss compared with 16 bits: the
adapter learns to compensate for the rounding. Memory is that of the tensors of weights,
including A, B and an output head in 16 bits. With its values kept, NF4 takes more memory
than 16 bits, and must give the same result to the last digit.

A processor without instructions for bf16 takes ten times as long.

    python -m experiments.quantisation      # about 10 minutes on two cores
"""

from experiments import report
from experiments.lab import Trial

ARMS = {
    "fp32": Trial(),
    "bf16": Trial(dtype="bf16"),
    "NF4, computed in bf16": Trial(quant="nf4", dtype="bf16"),
    "NF4, values kept": Trial(quant="nf4", dtype="bf16", keep=True),
}
COLUMNS = {"MiB of weights": lambda found: round(found.mean("weights") / 2**20, 2)}


def conclude(found: dict[str, report.Finding]) -> list[str]:
    nf4 = "NF4, computed in bf16"
    is_same = found[nf4].nll == found["NF4, values kept"].nll
    return [
        report.compare(found, nf4, "bf16", "QLoRA", "equal"),
        report.compare(found, "bf16", "fp32"),
        f"with its values kept NF4 gives {'the same nll' if is_same else 'another nll'}, compared "
        "in every trial to the last digit that is stored",
    ]


if __name__ == "__main__":
    report.main(__name__)
