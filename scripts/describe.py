"""Prints how a dataset is read: files, columns, labels, token lengths, an example of each label.

    python -m scripts.describe                        # tiny/data, or MNLI where there is a GPU
    python -m scripts.describe --dataset nyu-mll/glue --model microsoft/phi-2 --plot lengths.png
    python -m scripts.describe --dataset my-rows --columns text claim verdict

A wrong column or a wrong order of the labels shows in the examples, before a long training. The
longest prompt and answer say what --max-length has to be so that no premise is cut.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python scripts/describe.py`

import data
import phi2
from support import checkpoints, cli, examples, flags, pictures
from support.labels import LABELS, NO_LABEL


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser("how a dataset is read: files, columns, labels, lengths, examples")
    flags.add_dataset_arguments(parser)
    parser.add_argument(
        "--model",
        type=flags.name,
        help="the model whose tokenizer counts (default: microsoft/phi-2, no GPU: tiny/model)",
    )
    flags.add_model_revision(parser)
    parser.add_argument(
        "--plot", type=flags.path, metavar="PNG", help="draw lengths and labels here"
    )
    parser.add_argument("--limit", type=flags.count, help="first rows of each split only")
    return cli.parse_arguments(parser)


def describe_reading(dataset: str, split: str, reading: examples.Reading) -> None:
    """Prints the files of a split, and what its columns and its labels are taken for."""
    for place in examples.find_splits(dataset, reading.revision).get(split, []):
        print(f"  file {place}")
    rows, columns = examples.read_split(dataset, split, reading)
    print("  columns " + ", ".join(f"{name} (the {column})" for column, name in columns.items()))
    counts = Counter(zip(rows["written"], rows["label"]))
    for (written, label), count in sorted(counts.items()):
        meaning = "no label" if label == NO_LABEL else f"{label} {LABELS[label]}"
        print(f"  label {written}: {meaning}, {count:,} rows")


def token_lengths(rows, tokenizer, split: str):
    """Returns how many tokens prompt and answer of each row have, (rows,)."""
    # delay and disable: no bar for a moment's work, and none in a log file.
    bar = tqdm(rows, desc=split, leave=False, delay=2, disable=None)
    encoded = (data.encode(row, tokenizer) for row in bar)
    return numpy.array([len(prompt) + len(answer) for prompt, answer in encoded])


def describe_rows(rows, lengths, counts) -> None:
    """Prints a split's rows by label, percentiles of their lengths, an example of each label."""
    by_label = ", ".join(f"{count:,} {name}" for name, count in zip(LABELS, counts))
    print(f"  {len(rows):,} rows taken: {by_label}")
    # "higher": a length that some row has, not one between two rows'.
    percentiles = numpy.percentile(lengths, [0, 50, 95, 99, 100], method="higher")
    shortest, median, p95, p99, longest = percentiles
    print(
        f"  tokens of prompt and answer: {shortest} to {longest}, median {median}, "
        f"95% up to {p95}, 99% up to {p99}"
    )
    labels = rows["label"][:]
    for label, name in enumerate(LABELS):
        if label in labels:  # of few rows none may have it
            first = rows[labels.index(label)]
            print(f"  {label} {name}: {first['premise'][:120]} -> {first['hypothesis'][:80]}")


def main() -> None:
    args = parse_arguments()
    directory = checkpoints.find(
        args.model, phi2.read_config, checkpoints.DESCRIPTION, args.model_revision
    )
    tokenizer = data.load_tokenizer(directory, phi2.read_config(directory).vocab_size)
    reading = examples.Reading.of(args)
    lengths = {}
    counts = {}
    splits = examples.split_names(args.dataset, reading)
    # Test splits, for which GLUE publishes no labels, only where there is nothing else.
    shown = [name for name in splits if not name.startswith("test")] or splits
    for split in shown:
        print(f"\n{split}")
        describe_reading(args.dataset, split, reading)
        rows = examples.load_examples(args.dataset, split, args.limit, reading)
        lengths[split] = token_lengths(rows, tokenizer, split)
        counts[split] = numpy.bincount(rows["label"], minlength=3)
        describe_rows(rows, lengths[split], counts[split])
    if args.plot:
        pictures.draw_lengths(lengths, counts, args.dataset, args.plot)
        print(f"\nlengths and labels are drawn in {args.plot}")


if __name__ == "__main__":
    cli.run(main)
