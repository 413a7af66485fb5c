"""Prints what a dataset holds: rows, labels, token lengths, and one example of each label.

    python -m scripts.describe                        # tiny/data, or MNLI where there is a GPU
    python -m scripts.describe --dataset nyu-mll/glue --model microsoft/phi-2 --plot lengths.png

The longest prompt and answer say what --max-length has to be so that no premise is cut.
"""

import argparse
from pathlib import Path

import data
import phi2
from support import cli, flags, pictures
from support.examples import LABELS, load_examples, load_splits


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser("what a dataset holds: rows, labels, token lengths, examples")
    parser.add_argument(
        "--dataset",
        help="Hub id or directory of train.* and validation*.* (default: nyu-mll/glue, "
        "no GPU: tiny/data)",
    )
    parser.add_argument(
        "--model",
        help="the model whose tokenizer counts (default: microsoft/phi-2, no GPU: tiny/model)",
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw lengths and labels here")
    parser.add_argument("--limit", type=flags.count, help="first rows of each split only")
    return cli.parse_arguments(parser)


def token_lengths(examples, tokenizer, split: str):
    """Returns the tokens of prompt and label of each row, (rows,): what --max-length must hold."""
    import numpy
    from tqdm import tqdm

    # delay and disable: no bar for a moment's work, and none in a log file.
    rows = tqdm(examples, desc=split, leave=False, delay=2, disable=None)
    encoded = (data.encode(example, tokenizer) for example in rows)
    return numpy.array([len(prompt) + len(answer) for prompt, answer in encoded])


def describe(split: str, examples, lengths, counts) -> None:
    """Prints a split's rows by label, the percentiles of its lengths and its first examples."""
    import numpy

    by_label = ", ".join(f"{count:,} {name}" for name, count in zip(LABELS, counts))
    print(f"\n{split}: {len(examples):,} rows; {by_label}")
    percentiles = numpy.percentile(lengths, [0, 50, 95, 99, 100]).astype(int)
    shortest, median, p95, p99, longest = percentiles
    print(
        f"  tokens of prompt and answer: {shortest} to {longest}, median {median}, "
        f"95% up to {p95}, 99% up to {p99}"
    )
    for label, name in enumerate(LABELS):
        # Of few rows none may have this label.
        first = next((example for example in examples if example["label"] == label), None)
        if first is not None:
            print(f"  {label} {name}: {first['premise'][:120]} -> {first['hypothesis'][:80]}")


def main() -> None:
    import numpy

    args = parse_arguments()
    tokenizer = data.load_tokenizer(phi2.locate(args.model, ["config.json", "tokenizer.json"]))
    lengths = {}
    labels = {}
    for split in load_splits(args.dataset):
        if split.startswith("test"):  # GLUE publishes no labels for its test splits
            continue
        examples = load_examples(args.dataset, split, args.limit)
        lengths[split] = token_lengths(examples, tokenizer, split)
        labels[split] = numpy.bincount(examples["label"], minlength=3)
        describe(split, examples, lengths[split], labels[split])
    if args.plot:
        pictures.draw_lengths(lengths, labels, args.dataset, args.plot)
        print(f"\nlengths and labels are drawn in {args.plot}")


if __name__ == "__main__":
    cli.run(main)
