"""Run by test_count.py: what the scripts do on cards that are not there, of several sizes.

    python tests/fake_cards.py FOLDER

Writes FOLDER/found.json. It has to be a process by itself, because the fake GPU precedes torch.
"""

import gc
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import count  # noqa: E402  (before torch)

# isort: split
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import phi2  # noqa: E402
import train  # noqa: E402
from scripts import plan  # noqa: E402
from support import cli, examples, files, page  # noqa: E402
from tiny import mnli_lengths  # noqa: E402

FOLDER = Path(sys.argv[1])
MIB = 2**20
TOKENIZER = data.load_tokenizer(ROOT / "tiny" / "model")
PREFIX, _, _ = data.fixed_ids(TOKENIZER)


@contextmanager
def card(gpu: count.FakeGpu, memory: int) -> Iterator[None]:
    """Gives the fake GPU so many bytes for tensors."""
    gc.collect()  # a model is a circle
    gpu.bytes.limit = memory
    with gpu:
        yield


# -----------------------------------------------------------------------------
# A quarter of phi-2's layers, on a card with a quarter of the memory

QUARTER = phi2.Phi2Config(num_hidden_layers=8)


def load(directory: Path, dtype: str) -> phi2.Phi2:
    """Loads a model as eval.py does, but for the numbers of its weights: no file holds them."""

    def load_weights(model, directory, device, dtype) -> None:
        count.fill(model, dtype)

    with (
        patch.object(phi2, "load_weights", load_weights),
        patch.object(phi2, "not_quantized", lambda directory: ("lm_head",)),
    ):
        return evaluation.load_model(directory, "nf4", dtype, "cuda", keep=None)


def try_card(gpu: count.FakeGpu, dtype: str, gigabytes: int) -> dict:
    """Returns what a card decides, and how an evaluation of the longest rows goes."""
    directory = FOLDER / "quarter"
    directory.mkdir(exist_ok=True)
    files.write_json(directory / "config.json", vars(QUARTER) | {"model_type": "phi"})
    itemsize = evaluation.DTYPES[dtype].itemsize
    # Embedding and head, which are not quantised, stay whole.
    whole = 2 * itemsize * QUARTER.vocab_size * QUARTER.hidden_size
    memory = whole + (plan.for_tensors(gigabytes) - whole) // 4
    with card(gpu, memory):
        model = load(directory, dtype)
        protocol = evaluation.Settings()
        printed = io.StringIO()
        with redirect_stderr(printed):
            prompts = mnli_lengths.longest_prompts(PREFIX)
            answers = evaluation.predict(model, TOKENIZER, prompts, protocol)
    return {
        "kept": model.model.layers[0].mlp.fc1.kept is not None,
        "recomputes": model.model.recomputes_attention,
        "rows": protocol.batch_size,
        "answers": len(answers),
        "printed": printed.getvalue(),
    }


# -----------------------------------------------------------------------------
# The scripts on the embedded model, where a card is too small for it

TINY = ["--model", str(ROOT / "tiny" / "model"), "--dataset", str(FOLDER / "data")]
TINY += ["--device", "cuda", "--dtype", "bf16", "--keep-dequantized", "--max-new-tokens", "1"]
TRAINING = [*TINY, "--batch-size", "64", "--steps", "1", "--out", str(FOLDER / "run")]
PAIR = ["--premise", "Anna bought a rose.", "--hypothesis", "Anna bought a flower."]


def run(gpu: count.FakeGpu, memory: int, module: ModuleType, *arguments: str) -> str:
    """Runs a script on a card with so many bytes. Returns its error, or "" if there is none."""
    sys.argv = [module.__file__, *arguments]
    drawing = patch.object(page, "draw_pictures")  # takes a second, and no GPU
    with card(gpu, memory), redirect_stdout(io.StringIO()), drawing:
        try:
            cli.run(module.main)
        except SystemExit as stopped:
            return str(stopped.code)
    return ""


def write_rows() -> None:
    """Writes the rows of one step, and one to evaluate."""
    (FOLDER / "data").mkdir()
    rows = examples.load_examples(str(ROOT / "tiny" / "data"), "train", 65)
    files.write_lines(FOLDER / "data" / "train.jsonl", list(rows)[:64])
    files.write_lines(FOLDER / "data" / "validation.jsonl", list(rows)[64:])


def planned(*flags: str) -> int:
    """Returns how many bytes scripts.plan counts for a step of TRAINING with these flags too."""
    args = cli.train_arguments([*TRAINING, *flags])
    rows = plan.LongestRows.read(args, TOKENIZER)
    return plan.Plan(ROOT / "tiny" / "model", args).step(rows.training, rows.shared)["sum"]


def try_to_train(gpu: count.FakeGpu) -> dict:
    """Returns how a training ends that has too little memory, and how it resumes with a flag."""
    write_rows()
    memory = (planned() + planned("--no-keep-dequantized")) // 2
    error = run(gpu, memory, train, *TRAINING)
    flags = ["--resume", str(FOLDER / "run"), "--no-keep-dequantized"]
    return {
        "too little": error,
        "resumed": run(gpu, memory, train, *flags),
        "is finished": (FOLDER / "run" / "results.json").is_file(),
    }


def main() -> None:
    gpu = count.FakeGpu()
    count.install(gpu)
    gc.freeze()  # what was imported: every collection would look through it
    cards = {
        f"{dtype}, {gigabytes} GB": try_card(gpu, dtype, gigabytes)
        for dtype, gigabytes in (("bf16", 8), ("bf16", 24), ("fp32", 12))
    }
    errors = try_to_train(gpu) | {
        "no room for the model": run(gpu, 7 * MIB, evaluation, *TINY, *PAIR),
        "no room for a pair": run(gpu, 31 * MIB // 4, evaluation, *TINY, *PAIR),
    }
    files.write_json(FOLDER / "found.json", {"cards": cards, "errors": errors})


if __name__ == "__main__":
    main()
