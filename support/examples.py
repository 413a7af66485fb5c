"""Premises, hypotheses and labels from people's files, or from the Hub.

What files, columns and labels may be called stands in tables in dataset_files.py, columns.py
and labels.py: to read one more form, add a word there. `python -m scripts.describe` shows
how a dataset is read.

A dataset on the Hub is downloaded (hub_datasets.py), and read like any other folder.
"""

import ast
import functools
import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import pyarrow
from pyarrow import compute

from support import hub, hub_datasets, processes
from support.columns import Column, find_columns, joined, shown_columns, table_of
from support.dataset_files import find_files, named, read_file
from support.fingerprint import digest_rows
from support.labels import (
    LABELS,
    NO_LABEL,
    NUMBERS,
    as_word,
    check_meanings,
    is_number,
    refuse_names_in_card,
    said_labels,
)
from support.rows import Rows, cut_by_premise


class Reading(NamedTuple):
    """What the flags say about a dataset that the tables do not."""

    columns: tuple[str, ...] = ()  # the names of premise, hypothesis and label
    labels: tuple[str, ...] = ()  # the meanings of 0, 1 and 2, or three VALUE=MEANING
    validation: float | None = None  # the share of train that is kept for validation
    revision: str | None = None  # of a dataset on the Hub

    @classmethod
    def of(cls, args: Namespace) -> "Reading":
        """Returns what these arguments say. One that is missing says nothing."""
        columns = tuple(getattr(args, "columns", None) or ())
        labels = tuple(getattr(args, "labels", None) or ())
        validation = getattr(args, "validation", None)
        return cls(columns, labels, validation, getattr(args, "dataset_revision", None))

    def flags(self) -> list[str]:
        """Returns the words of a command line that say the same."""
        words = []
        if self.columns:
            words += ["--columns", *self.columns]
        if self.labels:
            words += ["--labels", *self.labels]
        if self.validation:
            words += ["--validation", str(self.validation)]
        if self.revision:
            words += ["--dataset-revision", self.revision]
        return words


BY_THE_TABLES = Reading()


# -----------------------------------------------------------------------------
# Splits


# Cached, because a run asks for the names and for each split.
@functools.cache
def find_splits(dataset: str, revision: str | None = None) -> dict[str, list[Path]]:
    """Returns the files of each split. Raises ValueError when there is no such dataset."""
    directory = Path(dataset)
    try:
        if directory.is_file():
            name = f"train{directory.suffix}"
            raise ValueError(
                f"{dataset} is a file: put it as {name} into a folder of its own, and pass that "
                "folder"
            )
        if not dataset or not directory.is_dir():
            return hub_datasets.find_splits(dataset, revision)
        hub.refuse_revision("dataset", dataset, revision)
        return find_files(directory)
    except OSError as error:  # a permission that is denied, or a repository without such files
        raise ValueError(f"cannot read {error.filename}: {error.strerror}") from None


def hub_commit(dataset: str, revision: str | None) -> str | None:
    """Returns the commit of a dataset that has come from the Hub, None of a directory."""
    if Path(dataset).is_dir():
        return None
    return hub_datasets.download(dataset, revision).name  # the Hub's cache calls it so


def split_names(dataset: str, reading: Reading) -> list[str]:
    """Returns the names of all splits, also of one that --validation cuts from train."""
    names = list(find_splits(dataset, reading.revision))
    is_cut = reading.validation and not any(name.startswith("validation") for name in names)
    return [*names, "validation"] if is_cut else names


def validation_splits(dataset: str, reading: Reading = BY_THE_TABLES) -> list[str]:
    """Returns the names of the splits that are evaluated by default.

    In MNLI they are validation_matched and validation_mismatched.
    """
    names = split_names(dataset, reading)
    found = [name for name in names if name.startswith("validation")]
    if not found:
        cure = "--split names the one to evaluate"
        if "train" in names:
            cure = "--validation 0.05 (of a few hundred rows 0.2) takes a part of train for it"
        raise ValueError(f"{dataset} has no validation split, only {', '.join(names)}; {cure}")
    return found


# -----------------------------------------------------------------------------
# Examples


def load_examples(
    dataset: str, split: str, limit: int | None = None, reading: Reading = BY_THE_TABLES
) -> Rows:
    """Returns the first `limit` labelled rows: premise, hypothesis, label (0, 1, 2).

    All rows are checked here, so that none stops a training in its middle. Raises ValueError
    for a split or a column that is missing, a text that is missing, a label that has no
    meaning, and when no row is left.
    """
    every_row, _ = read_split(dataset, split, reading)
    table = every_row.table.drop_columns("written")
    is_labelled = compute.not_equal(table["label"], NO_LABEL)
    labelled = table if compute.all(is_labelled).as_py() else table.filter(is_labelled)
    if not len(labelled):
        raise ValueError(f"{dataset}, {split}: no labelled row")
    taken = labelled.slice(0, limit)
    if processes.IS_FIRST:
        line = f"{split}: {describe_rows(table, labelled, taken)}"
        splits = find_splits(dataset, reading.revision)
        if reading.validation and split.startswith("validation") and split in splits:
            line += "; there is this split, so --validation takes nothing of train"
        print(line, file=sys.stderr)
    return Rows(taken)


def describe_rows(table: pyarrow.Table, labelled: pyarrow.Table, taken: pyarrow.Table) -> str:
    """Returns a line on all rows of a split, those that have a label, and those that are taken."""
    line = f"{len(table):,} rows"
    if len(labelled) < len(table):
        line += f", {len(table) - len(labelled):,} without a label dropped"
    line += f"; {len(taken):,} taken"
    present = compute.unique(taken["label"]).to_pylist()
    absent = [name for number, name in enumerate(LABELS) if number not in present]
    if absent:
        line += f", none of {' or '.join(absent)}"
        # They are the first ones, and of rows that are sorted these are all alike.
        if len(present) < len(compute.unique(labelled["label"])):
            line += ": take more, or shuffle the rows"
    return line


def count_rows(dataset: str, used: dict[str, Rows], reading: Reading) -> dict:
    """Returns for each split how many rows it has, how many without a label, and how many used."""
    counts = {}
    for split, rows in used.items():
        every_row, _ = read_split(dataset, split, reading)
        unlabelled = every_row["label"].count(NO_LABEL)
        counts[split] = {"read": len(every_row), "without_label": unlabelled, "used": len(rows)}
    return counts


def label_words(dataset: str, split: str, reading: Reading) -> list[str]:
    """Returns what the rows of a split call the labels 0, 1 and 2.

    Of several words it is the most frequent one. LABELS has it where the rows have numbers, and
    where all words are read without --labels.
    """
    rows, _ = read_split(dataset, split, reading)
    counts = rows.table.group_by(["label", "written"]).aggregate([([], "count_all")])
    words = {}
    for row in sorted(Rows(counts), key=lambda row: (row["count_all"], row["written"])):
        if row["label"] == NO_LABEL or row["written"][0] not in "'\"":  # which repr gives texts
            continue
        word = ast.literal_eval(row["written"])
        # Another number would be taken for the one that the model answers.
        if not is_number(word):
            words[row["label"]] = word
    is_known = all(as_word(word) in NUMBERS for word in words.values())
    return [name if is_known else words.get(number, name) for number, name in enumerate(LABELS)]


def digest_split(dataset: str, split: str, reading: Reading) -> str:
    """Returns a digest of all rows of a split, whatever --limit takes of them."""
    rows, _ = read_split(dataset, split, reading)
    return digest_rows(rows)


@functools.cache
def read_split(dataset: str, split: str, reading: Reading) -> tuple[Rows, dict[str, str]]:
    """Returns all rows of a split, and which columns of its files they are.

    A row has premise, hypothesis, label, and the label as `written`.
    """
    splits = find_splits(dataset, reading.revision)
    names = split_names(dataset, reading)
    if split not in names:
        raise ValueError(f"{dataset} has no split {split!r}, only {', '.join(names)}")
    is_cut = len(names) > len(splits)
    if is_cut and split in ("train", "validation"):
        train, validation, columns = cut_train(dataset, reading)
        return (train if split == "train" else validation), columns
    return join_parts(dataset, split, reading)


@functools.cache
def cut_train(dataset: str, reading: Reading) -> tuple[Rows, Rows, dict[str, str]]:
    """Returns what --validation leaves of train, what it takes from it, and the columns."""
    rows, columns = read_split(dataset, "train", reading._replace(validation=None))
    try:
        train, validation = cut_by_premise(rows, reading.validation)
    except ValueError as error:
        raise ValueError(f"{dataset}: {error}") from None
    return train, validation, columns


def join_parts(dataset: str, split: str, reading: Reading) -> tuple[Rows, dict[str, str]]:
    """Returns what `read_split` does, of a split that is there.

    An error begins with the file or the split that it is about.
    """
    parts = read_parts(find_splits(dataset, reading.revision)[split])
    first = next(iter(parts))
    columns = find_columns(list(parts[first]), reading.columns, first)
    tables = []
    words = set()
    names = names_in_card(dataset, columns["label"], reading)
    for path, part in parts.items():
        if names:
            part[columns["label"]] = named(part[columns["label"]], names)
        table, labels = table_of(part, columns, reading.labels, path)
        tables.append(table)
        words |= set(map(as_word, labels))
    table = joined(tables)
    for name, values in shown_columns(parts.values()).items():
        table = table.append_column(name, values)
    check_meanings(words, len(table), reading.labels, f"{dataset}, {split}")
    if Path(dataset).is_dir() and not reading.labels and any(map(str.isdigit, words)):
        refuse_names_in_card(Path(dataset))
    return Rows(table), columns


def names_in_card(dataset: str, column: str, reading: Reading) -> tuple[str, ...]:
    """Returns what the numbers of a column are called by the card of a dataset on the Hub.

    It returns nothing where --labels says what the numbers mean.
    """
    said = said_labels(reading.labels) if reading.labels else {}
    if Path(dataset).is_dir() or any(map(str.isdigit, said)):
        return ()
    return hub_datasets.read_card(dataset, reading.revision).names.get(column, ())


def read_parts(paths: list[Path]) -> dict[Path, dict[str, Column]]:
    """Returns the columns of each file. Raises ValueError where they are not the same."""
    parts = {path: read_file(path) for path in paths}
    first = paths[0]
    # Spark writes parts without a row: a header, or a type for each column.
    if not any(len(values) for columns in parts.values() for values in columns.values()):
        raise ValueError(f"cannot read {first}: it holds no rows")
    for path, columns in parts.items():
        differing = sorted(columns.keys() ^ parts[first].keys())
        if differing:
            raise ValueError(f"{path} and {first} differ in columns: {', '.join(differing)}")
    return parts
