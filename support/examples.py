"""Premises, hypotheses and labels from people's files, or from the Hub.

Tables in dataset_files.py, columns.py and labels.py list the names that files, columns and labels
may have; to support another name, add it there. `python -m scripts.describe` shows how a
dataset is read.

A dataset on the Hub is downloaded (hub_datasets.py) and read like any other folder.
"""

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
    refuse_names_in_card,
    said_labels,
)
from support.rows import Rows, cut_by_premise


class Reading(NamedTuple):
    """How a dataset is read: what its flags say beyond the tables."""

    columns: tuple[str, ...] = ()  # the names of premise, hypothesis and label
    labels: tuple[str, ...] = ()  # the meanings of 0, 1 and 2, or three VALUE=MEANING
    validation: float | None = None  # the share of train that is kept for validation
    revision: str | None = None  # of a dataset on the Hub

    @classmethod
    def of(cls, args: Namespace) -> "Reading":
        """Returns what these arguments say. An argument may be missing."""
        columns = tuple(getattr(args, "columns", None) or ())
        labels = tuple(getattr(args, "labels", None) or ())
        validation = getattr(args, "validation", None)
        return cls(columns, labels, validation, getattr(args, "dataset_revision", None))

    def flags(self) -> list[str]:
        """Returns the same settings as words of a command line."""
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


# Cached, because a run needs the names of the splits and then each split.
@functools.cache
def find_splits(dataset: str, revision: str | None = None) -> dict[str, list[Path]]:
    """Returns the files of each split. Raises ValueError if there is no such dataset."""
    directory = Path(dataset)
    if directory.is_file():
        raise ValueError(f"{dataset} is a file: call it train{directory.suffix}, pass its folder")
    if not dataset or not directory.is_dir():
        return hub_datasets.find_splits(dataset, revision)
    hub.refuse_revision("dataset", dataset, revision)
    return find_files(directory)


def hub_commit(dataset: str, revision: str | None) -> str | None:
    """Returns the commit of a dataset from the Hub, or None for a directory."""
    if Path(dataset).is_dir():
        return None
    return hub_datasets.download(dataset, revision).name  # in the Hub's cache, the commit


def split_names(dataset: str, reading: Reading) -> list[str]:
    """Returns the names of all splits, including one that --validation takes from train."""
    names = list(find_splits(dataset, reading.revision))
    is_cut = reading.validation and not any(name.startswith("validation") for name in names)
    return [*names, "validation"] if is_cut else names


def validation_splits(dataset: str, reading: Reading = BY_THE_TABLES) -> list[str]:
    """Returns the names of the splits that are evaluated by default.

    In MNLI these are validation_matched and validation_mismatched.
    """
    names = split_names(dataset, reading)
    found = [name for name in names if name.startswith("validation")]
    if not found:
        raise ValueError(
            f"{dataset} has no validation split, only {', '.join(names)}; --validation 0.05 (0.2 "
            "for a few hundred rows) takes a part of train; eval.py --split evaluates any other"
        )
    return found


# -----------------------------------------------------------------------------
# Examples


def load_examples(
    dataset: str, split: str, limit: int | None = None, reading: Reading = BY_THE_TABLES
) -> Rows:
    """Returns the first `limit` labelled rows: premise, hypothesis, label (0, 1, 2).

    All rows are checked here, so that none can stop a training halfway. Raises ValueError for
    a missing split, column or text, for a label without a meaning, and if no labelled row is
    left.
    """
    every_row, _ = read_split(dataset, split, reading)
    table = every_row.table.drop_columns("written")
    is_labelled = compute.not_equal(table["label"], NO_LABEL)
    labelled = table if compute.all(is_labelled).as_py() else table.filter(is_labelled)
    if not len(labelled):
        raise ValueError(f"{dataset}, {split}: no labelled row")
    taken = labelled.slice(0, limit)
    if processes.IS_FIRST:
        print(f"{split}: {describe_rows(table, labelled, taken)}", file=sys.stderr)
    return Rows(taken)


def describe_rows(table: pyarrow.Table, labelled: pyarrow.Table, taken: pyarrow.Table) -> str:
    """Returns a line that counts a split's rows, those without a label, and those taken."""
    line = f"{len(table):,} rows"
    if len(labelled) < len(table):
        line += f", {len(table) - len(labelled):,} without a label dropped"
    line += f"; {len(taken):,} taken"
    present = compute.unique(taken["label"]).to_pylist()
    absent = [name for number, name in enumerate(LABELS) if number not in present]
    if absent:
        line += f", none of {' or '.join(absent)}"
    return line


def count_rows(dataset: str, used: dict[str, Rows], reading: Reading) -> dict:
    """Returns for each split its number of rows, of rows without a label, and of rows used."""
    counts = {}
    for split, rows in used.items():
        every_row, _ = read_split(dataset, split, reading)
        unlabelled = every_row["label"].count(NO_LABEL)
        counts[split] = {"read": len(every_row), "without_label": unlabelled, "used": len(rows)}
    return counts


def label_words(reading: Reading) -> list[str]:
    """Returns the words that --labels names for 0, 1 and 2, or else the usual ones."""
    words = list(LABELS)
    for text in reading.labels:
        word, _, meaning = text.rpartition("=")
        # A number here could be mistaken for the number that the model answers.
        if word and not as_word(word).lstrip("-").isdigit():
            words[NUMBERS[as_word(meaning)]] = word
    return words


def digest_split(dataset: str, split: str, reading: Reading) -> str:
    """Returns a digest of all rows of a split, regardless of --limit."""
    rows, _ = read_split(dataset, split, reading)
    return digest_rows(rows)


@functools.cache
def read_split(dataset: str, split: str, reading: Reading) -> tuple[Rows, dict[str, str]]:
    """Returns all rows of a split, and the names of the file's columns that they come from.

    A row has premise, hypothesis, label, and the label as `written` in the file.
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
    """Returns what --validation leaves of train, what it takes, and the names of the columns."""
    rows, columns = read_split(dataset, "train", reading._replace(validation=None))
    return *cut_by_premise(rows, reading.validation), columns


def join_parts(dataset: str, split: str, reading: Reading) -> tuple[Rows, dict[str, str]]:
    """Returns what `read_split` returns, for a split that the dataset has.

    Error messages begin with the file or the split that they are about.
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
    """Returns the names for a column's numbers in the card of a dataset on the Hub.

    Returns no names for a directory, or if --labels says what the numbers mean.
    """
    if Path(dataset).is_dir() or any(map(str.isdigit, said_labels(reading.labels))):
        return ()
    return hub_datasets.read_card(dataset, reading.revision).names.get(column, ())


def read_parts(paths: list[Path]) -> dict[Path, dict[str, Column]]:
    """Returns the columns of each file. Raises ValueError if they are not the same."""
    parts = {path: read_file(path) for path in paths}
    first = paths[0]
    for path, columns in parts.items():
        differing = sorted(columns.keys() ^ parts[first].keys())
        if differing:
            raise ValueError(f"{path} and {first} differ in columns: {', '.join(differing)}")
    return parts
