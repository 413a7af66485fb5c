"""Prints how a dataset is read: files, columns, labels, lengths, and an example of each label.

    python -m scripts.describe                        # tiny/data, or MNLI where there is a GPU
    python -m scripts.describe --dataset nyu-mll/glue --model microsoft/phi-2
    python -m scripts.describe --dataset my-rows --columns text claim verdict
    python -m scripts.describe --ids 0                # the tokens of the first row

The examples show a wrong column or a wrong order of the labels before a long training. The largest
length of prompt and answer is the smallest --max-length that cuts no premise.
"""

import argparse
import shutil
import sys
import textwrap
from pathlib import Path

import numpy
from tokenizers import Tokenizer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python scripts/describe.py`

import data
import phi2
from support import checkpoints, cli, examples, flags
from support.labels import LABELS, NO_LABEL
from support.letters import printable
from support.rows import Rows

ROWS_AT_ONCE = 5000  # to tokenise


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser("prints how a dataset is read: files, columns, labels, lengths, examples")
    flags.add_dataset(parser)
    flags.add_model(parser)  # whose tokenizer is used
    parser.add_argument(
        "--limit", type=flags.count, help="how many rows of each split to use (default: all)"
    )
    parser.add_argument(
        "--ids", type=flags.count_from_0, metavar="ROW",
        help="print only the tokens of this row of the first split, as the model sees them",
    )  # fmt: skip
    return cli.parse_arguments(parser)


def describe_reading(dataset: str, split: str, reading: examples.Reading) -> None:
    """Prints the files of a split, and how its columns and its labels are read."""
    for place in examples.find_splits(dataset, reading.revision).get(split, []):
        print(printable(f"  file {place}"))
    rows, columns = examples.read_split(dataset, split, reading)
    named = ", ".join(f"{name} (the {column})" for column, name in columns.items())
    print(printable(f"  columns {named}"))
    counts = rows.table.group_by(["written", "label"]).aggregate([([], "count_all")])
    for row in sorted(Rows(counts), key=lambda row: row["written"]):
        label = row["label"]
        meaning = "no label" if label == NO_LABEL else f"{label} {LABELS[label]}"
        print(f"  label {row['written']}: {meaning}, {row['count_all']:,} rows")


def token_lengths(rows: Rows, tokenizer: Tokenizer, split: str) -> list[int]:
    """Returns the number of tokens of prompt and answer for each row."""
    lengths = []
    # delay and disable: no bar if the work is short, and none in a log file.
    with tqdm(total=len(rows), desc=split, unit="row", leave=False, delay=1, disable=None) as bar:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = list(Rows(rows.table.slice(start, ROWS_AT_ONCE)))
            encoded = data.encode_batch(some, tokenizer)
            lengths += [len(prompt) + len(answer) for prompt, answer in encoded]
            bar.update(len(some))
    return lengths


def describe_rows(rows: Rows, lengths: list[int]) -> None:
    """Prints the number of rows by label, percentiles of lengths, and an example of each label."""
    labels = rows["label"]
    counts = numpy.bincount(labels, minlength=3)
    by_label = ", ".join(f"{count:,} {name}" for name, count in zip(LABELS, counts))
    print(f"  {len(rows):,} rows taken: {by_label}")
    # "higher": a length that occurs, not one between the lengths of two rows.
    percentiles = numpy.percentile(lengths, [0, 50, 95, 99, 100], method="higher")
    shortest, median, p95, p99, longest = percentiles
    print(
        f"  tokens of prompt and answer: {shortest} to {longest}, median {median}, "
        f"95% up to {p95}, 99% up to {p99}"
    )
    for label, name in enumerate(LABELS):
        if label in labels:  # among few rows a label may be missing
            first = rows[labels.index(label)]
            example = f"{first['premise'][:120]} -> {first['hypothesis'][:80]}"
            print(printable(f"  {label} {name}: {example}"))


# -----------------------------------------------------------------------------
# The tokens of a row


def print_tokens(rows: Rows, number: int, tokenizer: Tokenizer, split: str) -> None:
    """Prints the tokens of a row with their ids: the shared prefix, the prompt, the targets."""
    if number >= len(rows):
        raise ValueError(f"--ids {number}: {split} has the rows 0 to {len(rows) - 1:,}")
    prefix, _, _ = data.fixed_ids(tokenizer)
    prompt, answer = data.encode(rows[number], tokenizer)
    parts = {
        "prefix, which all rows share: it goes through the model once per batch": prefix,
        "rest of the prompt, for this row alone": prompt[len(prefix) :],
        "targets of the loss, each predicted from all tokens before it": answer,
    }
    print(f"  row {number:,}: {len(prompt) + len(answer)} tokens, with their ids; a dot is a space")
    for title, ids in parts.items():
        print(f"\n  {title} ({len(ids)})")
        cells = []
        for token in ids:
            text = printable(tokenizer.decode([token], skip_special_tokens=False))
            cells.append(f"{text}={token}".replace(" ", "\u00b7"))
        lines = textwrap.wrap(
            " ".join(cells),
            width=shutil.get_terminal_size().columns - 4,
            break_long_words=False,
            break_on_hyphens=False,
        )
        print(textwrap.indent("\n".join(lines), "    "))


def main() -> None:
    args = parse_arguments()
    directory = checkpoints.find(
        args.model, phi2.read_config, checkpoints.DESCRIPTION, args.model_revision
    )
    tokenizer = data.load_tokenizer(directory, phi2.read_config(directory).vocab_size)
    reading = examples.Reading.of(args)
    splits = examples.split_names(args.dataset, reading)
    # Show test splits, for which GLUE publishes no labels, only if there is no other split.
    shown = [name for name in splits if not name.startswith("test")] or splits
    for split in shown:
        print(f"\n{split}")
        rows = examples.load_examples(args.dataset, split, args.limit, reading)
        if args.ids is not None:
            return print_tokens(rows, args.ids, tokenizer, split)
        describe_reading(args.dataset, split, reading)
        describe_rows(rows, token_lengths(rows, tokenizer, split))


if __name__ == "__main__":
    cli.run(main)
