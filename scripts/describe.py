"""Prints how a dataset is read: files, columns, labels, token lengths, an example of each label.

    python -m scripts.describe                        # tiny/data, or MNLI where there is a GPU
    python -m scripts.describe --dataset nyu-mll/glue --model microsoft/phi-2
    python -m scripts.describe --dataset my-rows --columns text claim verdict

A wrong column or a wrong order of the labels shows in the examples, before a long training. The
longest prompt and answer say what --max-length has to be so that no premise is cut.
"""

import argparse
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

TEXTS_AT_ONCE = 5000  # that are tokenised


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser("how a dataset is read: files, columns, labels, lengths, examples")
    flags.add_dataset(parser)
    flags.add_model(parser)  # whose tokenizer counts
    parser.add_argument(
        "--limit", type=flags.count, help="the first so many rows of each split (default: all)"
    )
    return cli.parse_arguments(parser)


def describe_reading(dataset: str, split: str, reading: examples.Reading) -> None:
    """Prints the files of a split, and what its columns and its labels are taken for."""
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
    """Returns how many tokens prompt and answer of each row have, (rows,).

    Each text is tokenised once: MNLI has three hypotheses to a premise, and half the work is
    saved. Together with the titles, which all prompts have, the texts give the same tokens as
    the whole prompt. Only where one ends in white space may it grow together with what follows.
    """
    prefix, _, _ = data.fixed_ids(tokenizer)
    title, end = data.title_ids(tokenizer)
    lengths = numpy.full(len(rows), len(prefix) + len(title) + len(end) + 2)  # 2: the answer
    may_grow = numpy.zeros(len(rows), dtype=bool)
    columns = [
        rows.table[column].dictionary_encode().unify_dictionaries().combine_chunks()
        for column in ("premise", "hypothesis")
    ]
    total = sum(len(column.dictionary) for column in columns)
    # delay and disable: no bar for a moment's work, and none in a log file.
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
    """Returns how many tokens each text has behind a space, and whether it ends in white space."""
    counts = []
    ends_in_space = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        batch = [" " + text for text in texts.slice(start, TEXTS_AT_ONCE).to_pylist()]
        counts += [len(encoded) for encoded in tokenizer.encode_batch_fast(batch)]
        ends_in_space += [text[-1].isspace() for text in batch]
        bar.update(len(batch))
    return numpy.array(counts), numpy.array(ends_in_space)


def describe_rows(rows, lengths) -> None:
    """Prints a split's rows by label, percentiles of their lengths, an example of each label."""
    counts = numpy.bincount(rows["label"], minlength=3)
    by_label = ", ".join(f"{count:,} {name}" for name, count in zip(LABELS, counts))
    print(f"  {len(rows):,} rows taken: {by_label}")
    # "higher": a length that some row has, not one between two rows'.
    percentiles = numpy.percentile(lengths, [0, 50, 95, 99, 100], method="higher")
    shortest, median, p95, p99, longest = percentiles
    print(
        f"  tokens of prompt and answer: {shortest} to {longest}, median {median}, "
        f"95% up to {p95}, 99% up to {p99}"
    )
    labels = rows["label"]
    for label, name in enumerate(LABELS):
        if label in labels:  # of few rows none may have it
            first = rows[labels.index(label)]
            example = f"{first['premise'][:120]} -> {first['hypothesis'][:80]}"
            print(printable(f"  {label} {name}: {example}"))


def main() -> None:
    args = parse_arguments()
    directory = checkpoints.find(
        args.model, phi2.read_config, checkpoints.DESCRIPTION, args.model_revision
    )
    tokenizer = data.load_tokenizer(directory, phi2.read_config(directory).vocab_size)
    reading = examples.Reading.of(args)
    splits = examples.split_names(args.dataset, reading)
    # Test splits, for which GLUE publishes no labels, only where there is nothing else.
    shown = [name for name in splits if not name.startswith("test")] or splits
    for split in shown:
        print(f"\n{split}")
        describe_reading(args.dataset, split, reading)
        rows = examples.load_examples(args.dataset, split, args.limit, reading)
        describe_rows(rows, token_lengths(rows, tokenizer, split))


if __name__ == "__main__":
    cli.run(main)
