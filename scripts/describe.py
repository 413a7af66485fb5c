"""Prints how a dataset is read: files, columns, labels, lengths, and an example of each label.

    python -m scripts.describe                        # tiny/data, or MNLI where there is a GPU
    python -m scripts.describe --dataset nyu-mll/glue --model microsoft/phi-2
    python -m scripts.describe --dataset my-rows --columns text claim verdict
    python -m scripts.describe --ids 0                # the tokens of the first row

The examples show a wrong column or a wrong order of the labels before a long training. The largest
length of prompt and answer is the smallest --max-length that cuts no premise.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import numpy
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python scripts/describe.py`

import data
import phi2
from support import checkpoints, cli, examples, flags
from support.labels import LABELS, NO_LABEL
from support.letters import printable
from support.rows import Rows

TEXTS_AT_ONCE = 5000  # to tokenise
# Escape sequences for the colours of a terminal, and for its normal state
MAGENTA = "\x1b[35m"
CYAN = "\x1b[36m"
GREEN = "\x1b[1;32m"
NORMAL = "\x1b[0m"


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
    return cli.complete(parser, parser.typed())


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


def token_lengths(rows: Rows, tokenizer, split: str):
    """Returns the number of tokens of prompt and answer for each row, (rows,).

    Each distinct text is tokenised once. MNLI has three hypotheses per premise, so this saves half
    the work. The tokens of the two texts and of the headings, which all prompts share, are those of
    the whole prompt. Only a text that ends in white space may merge with what follows it.
    """
    prefix, _, _ = data.fixed_ids(tokenizer)
    heading, end = data.heading_ids(tokenizer)
    lengths = numpy.full(len(rows), len(prefix) + len(heading) + len(end) + 2)  # 2: the answer
    may_grow = numpy.zeros(len(rows), dtype=bool)
    columns = [
        rows.table[column].dictionary_encode().unify_dictionaries().combine_chunks()
        for column in ("premise", "hypothesis")
    ]
    total = sum(len(column.dictionary) for column in columns)
    # delay and disable: no bar if the work is short, and none in a log file.
    with tqdm(total=total, desc=split, unit="text", leave=False, delay=1, disable=None) as bar:
        for column in columns:
            counts, ends_in_space = count_tokens(column.dictionary, tokenizer, bar)
            lengths += counts[column.indices]
            may_grow |= ends_in_space[column.indices]
    for number in numpy.flatnonzero(may_grow).tolist():
        prompt, answer = data.encode(rows[number], tokenizer)
        lengths[number] = len(prompt) + len(answer)
    return lengths


def count_tokens(texts, tokenizer, bar: tqdm):
    """Returns how many tokens each text has after a space, and whether it ends in white space."""
    counts = []
    ends_in_space = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        batch = [" " + text for text in texts.slice(start, TEXTS_AT_ONCE).to_pylist()]
        counts += [len(encoded) for encoded in tokenizer.encode_batch_fast(batch)]
        ends_in_space += [text[-1].isspace() for text in batch]
        bar.update(len(batch))
    return numpy.array(counts), numpy.array(ends_in_space)


def describe_rows(rows, lengths) -> None:
    """Prints the number of rows by label, percentiles of lengths, and an example of each label."""
    counts = numpy.bincount(rows["label"], minlength=3)
    by_label = ", ".join(f"{count:,} {name}" for name, count in zip(LABELS, counts))
    print(f"  {len(rows):,} rows taken: {by_label}")
    # "higher": a length that occurs, not one between the lengths of two rows.
    percentiles = numpy.percentile(lengths, [0, 50, 95, 99, 100], method="higher")
    shortest, median, p95, p99, longest = percentiles
    print(
        f"  tokens of prompt and answer: {shortest} to {longest}, median {median}, "
        f"95% up to {p95}, 99% up to {p99}"
    )
    labels = rows["label"]
    for label, name in enumerate(LABELS):
        if label in labels:  # among few rows a label may be missing
            first = rows[labels.index(label)]
            example = f"{first['premise'][:120]} -> {first['hypothesis'][:80]}"
            print(printable(f"  {label} {name}: {example}"))


# -----------------------------------------------------------------------------
# The tokens of a row


def print_tokens(rows: Rows, number: int, tokenizer, split: str) -> None:
    """Prints the tokens of a row with their ids: the shared prefix, the prompt, the targets."""
    if number >= len(rows):
        raise ValueError(f"--ids {number}: {split} has the rows 0 to {len(rows) - 1:,}")
    prefix, _, _ = data.fixed_ids(tokenizer)
    prompt, answer = data.encode(rows[number], tokenizer)
    parts = (
        (MAGENTA, "prefix, which all rows share: it goes through the model once per batch", prefix),
        (CYAN, "rest of the prompt, for this row alone", prompt[len(prefix) :]),
        (GREEN, "targets of the loss, each predicted from all tokens before it", answer),
    )
    print(f"  row {number:,}: {len(prompt) + len(answer)} tokens, with their ids; a dot is a space")
    for color, title, ids in parts:
        print(f"\n  {title} ({len(ids)})")
        print_cells([as_cell(token, tokenizer) for token in ids], ids, color)


def as_cell(token: int, tokenizer) -> str:
    """Returns a token's text, with visible spaces, line ends and parts of a letter."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    if "\ufffd" in text:  # a part of a letter, which is shown as the vocabulary writes it
        text = tokenizer.id_to_token(token)
    return printable(text).replace(" ", "\u00b7")


def print_cells(texts: list[str], ids: list[int], color: str) -> None:
    """Prints texts in a colour, with their ids below, in lines no wider than the terminal."""
    width = shutil.get_terminal_size().columns - 4
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        color = ""
    above = ""
    below = ""
    for text, token in zip(texts, ids):
        cell = max(len(text), len(str(token))) + 1
        if above and len(above) + cell > width:
            print_line(above, below, color)
            above = ""
            below = ""
        above += text.ljust(cell)
        below += str(token).ljust(cell)
    print_line(above, below, color)


def print_line(above: str, below: str, color: str) -> None:
    print(f"    {color}{above.rstrip()}{NORMAL if color else ''}\n    {below.rstrip()}")


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
