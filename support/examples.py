"""Premises, hypotheses and labels from people's files, or from the Hub.

What files, columns and labels may be called stands in tables in dataset_files.py, columns.py
and labels.py: to read one more form, add a word there. `python -m scripts.describe` shows
how a dataset is read.

`datasets` takes about a second to import, so the functions that use it import it.
"""

import functools
import re
import stat
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow
from pyarrow import compute

from support import hub, ranks
from support.columns import Column, as_numbers, as_texts, different, find_columns, types_in
from support.dataset_files import (
    READERS,
    find_files,
    read_file,
    split_name,
    table_columns,
    with_train,
)
from support.fingerprint import digest_rows
from support.labels import (
    LABELS,
    NO_LABEL,
    as_word,
    check_meanings,
    label_numbers,
    refuse_names_in_card,
)
from support.rows import Rows, cut_by_premise

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

KEPT = ("idx", "genre")  # other columns, which predictions_SPLIT.jsonl shows
CONFIGURATIONS = {"nyu-mll/glue": "mnli"}  # of datasets on the Hub that hold several


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
def find_splits(
    dataset: str, revision: str | None = None
) -> "dict[str, dict[str, Path | Dataset]]":
    """Returns the parts of each split, by their places.

    A part is a file, or a table from the Hub; its place is what an error calls it. Raises
    ValueError when there is no such dataset.
    """
    directory = Path(dataset)
    try:
        if dataset and is_folder(directory):
            hub.refuse_revision("dataset", dataset, revision)
            splits = find_files(directory)
            return {split: {str(path): path for path in paths} for split, paths in splits.items()}
    except PermissionError as error:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}") from None
    if directory.is_file():
        raise ValueError(f"{dataset} is a file: pass the folder that it is in")
    hub.require_repository("dataset", dataset)
    tables = load_from_hub(dataset, revision)
    found = [split_name(name) or name for name in tables]
    splits = {}
    for split, (name, rows) in zip(found, tables.items()):
        # snli_dev and mnli_dev are both validation: validation_snli_dev, validation_mnli_dev.
        is_shared = found.count(split) > 1 and name != split
        splits[f"{split}_{name}" if is_shared else split] = {f"{dataset}, {name}": rows}
    return with_train(splits)


def is_folder(path: Path) -> bool:
    """Returns whether a path is a folder. Raises PermissionError where that cannot be known."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)  # is_dir may answer no where it may not look
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def load_from_hub(dataset: str, revision: str | None) -> "DatasetDict":
    import datasets
    import huggingface_hub

    # Their errors and their tries are told below.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    huggingface_hub.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():  # in a log file each movement of a bar would be one more line
        datasets.disable_progress_bars()
    try:
        commit = resolve(dataset, revision) if revision else None
        tables = datasets.load_dataset(dataset, CONFIGURATIONS.get(dataset), revision=commit)
    # A cache that cannot be written (HF_DATASETS_CACHE) is an OSError with its path, files that
    # cannot be read are a DatasetsError, a repository that holds a script a RuntimeError.
    except (*hub.errors(), datasets.exceptions.DatasetsError, RuntimeError) as error:
        while isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
            error = error.__cause__  # of itself it says only that there was one
        raise hub.failure("dataset", dataset, revision, error) from None
    first = next(iter(tables.values()))
    # `datasets` reads tables as text by pandas: quotes in a tsv may swallow rows, as in GLUE's
    # files, and None is a missing value. Which files they were it does not say.
    if first.info.builder_name == "csv" and ranks.FIRST:
        print(
            f"{dataset} holds csv or tsv, in which `datasets` may take quotes and words such as "
            "None for what they are not: compare the numbers of rows, or download the repository "
            "and pass its folder, which is read as it stands",
            file=sys.stderr,
        )
    found = commit_of(first)
    if commit and found != commit:  # without a network `datasets` takes the latest of its cache
        raise ValueError(
            f"the cache of {dataset!r} holds the commit {found}, not {commit}, "
            "and the Hub cannot be reached"
        )
    return tables


def resolve(dataset: str, revision: str) -> str:
    """Returns the commit that a branch or a tag stands for. A commit is returned as it is."""
    import huggingface_hub

    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    folder = huggingface_hub.snapshot_download(
        dataset, repo_type="dataset", revision=revision, allow_patterns=["README.md"]
    )
    return Path(folder).name  # called like the commit, without a network too


def commit_of(table: "Dataset") -> str:
    """Returns the commit that a table from the Hub is of: the name of its folder in the cache."""
    return Path(table.cache_files[0]["filename"]).parent.name


def hub_commit(dataset: str, revision: str | None) -> str | None:
    """Returns the commit of a dataset that has come from the Hub, None of a directory."""
    if Path(dataset).is_dir():
        return None
    first_split = next(iter(find_splits(dataset, revision).values()))
    return commit_of(next(iter(first_split.values())))


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
            cure = "--validation 0.05 takes a part of train for it"
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
    if ranks.FIRST:
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
    absent = absent_labels(labelled)
    if absent:
        line += f", none of {' or '.join(absent)}"
    line += f"; {len(taken):,} taken"
    # They are the first ones, and of rows that are sorted these are all alike.
    left_out = [name for name in absent_labels(taken) if name not in absent]
    if left_out:
        line += f", none of {' or '.join(left_out)}: take more, or shuffle the rows"
    return line


def absent_labels(table: pyarrow.Table) -> list[str]:
    """Returns the labels that no row has."""
    present = compute.unique(table["label"]).to_pylist()
    return [name for number, name in enumerate(LABELS) if number not in present]


def count_rows(dataset: str, used: dict[str, Rows], reading: Reading) -> dict:
    """Returns for each split how many rows it has, how many without a label, and how many used."""
    counts = {}
    for split, rows in used.items():
        every_row, _ = read_split(dataset, split, reading)
        unlabelled = every_row["label"].count(NO_LABEL)
        counts[split] = {"read": len(every_row), "without_label": unlabelled, "used": len(rows)}
    return counts


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
        cure = ""
        if split == "train":
            cure = f": call the file that is meant train.* ({', '.join(READERS)})"
        raise ValueError(f"{dataset} has no split {split!r}, only {', '.join(names)}{cure}")
    is_cut = len(names) > len(splits)
    if is_cut and split in ("train", "validation"):
        train, validation, columns = cut_train(dataset, reading)
        return (train if split == "train" else validation), columns
    try:
        return join_parts(dataset, split, reading)
    except UnicodeError as error:  # of a label
        raise ValueError(f"{dataset}, {split}: {error}") from None


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

    An error begins with the part or the split that it is about.
    """
    parts = read_parts(find_splits(dataset, reading.revision)[split])
    first = next(iter(parts))
    columns = find_columns(list(parts[first]), reading.columns, first)
    if len(set(columns.values())) < len(columns):  # "text Text" are one column, too
        raise ValueError(f"--columns names one column twice: {' '.join(reading.columns)}")
    shown = shown_columns(parts)
    tables = []
    words = set()
    for place, part in parts.items():
        table, labels = table_of(part, columns, shown, reading, place)
        tables.append(table)
        words |= set(map(as_word, labels))
    # Texts may be of two types, and what labels are written as is numbered in each part anew.
    table = pyarrow.concat_tables(tables, promote_options="permissive").unify_dictionaries()
    check_meanings(words, len(table), reading.labels, f"{dataset}, {split}")
    # Of a dataset on the Hub the names are in its columns already.
    is_local = Path(dataset).is_dir()
    if is_local and not reading.labels and any(word.isdigit() for word in words):
        refuse_names_in_card(Path(dataset))
    return Rows(table), columns


def read_parts(parts: "dict[str, Path | Dataset]") -> dict[str, dict[str, Column]]:
    """Returns the columns of each part. Raises ValueError where they are not the same."""
    columns = {place: read_part(part) for place, part in parts.items()}
    first = next(iter(columns))
    # Spark writes parts without a row: a header, or a type for each column.
    if not any(len(values) for names in columns.values() for values in names.values()):
        raise ValueError(f"cannot read {first}: it holds no rows")
    for place, names in columns.items():
        differing = sorted(names.keys() ^ columns[first].keys())
        if differing:
            raise ValueError(f"{place} and {first} differ in columns: {', '.join(differing)}")
    return columns


def read_part(part: "Path | Dataset") -> dict[str, Column]:
    """Returns the columns of a part, by name."""
    if isinstance(part, Path):
        return read_file(part)
    return table_columns(part.with_format("arrow")[:])


def shown_columns(parts: dict[str, dict[str, Column]]) -> dict[str, type]:
    """Returns those columns of KEPT whose values are int in all parts, or str in all.

    A column has one type. These are only shown, so one that has several is left out.
    """
    shown = {}
    for name in KEPT:
        kinds = set().union(*(types_in(part.get(name, [])) for part in parts.values()))
        if kinds in ({int}, {str}):
            shown[name] = kinds.pop()
    return shown


def table_of(
    part: dict[str, Column],
    columns: dict[str, str],
    shown: dict[str, type],
    reading: Reading,
    place: str,
) -> tuple[pyarrow.Table, list]:
    """Returns a part as a table under our names, with labels as numbers, and its different labels.

    Raises ValueError for a row that does not fit.
    """
    values = {
        column: as_texts(part[columns[column]], column, place)
        for column in ("premise", "hypothesis")
    }
    labels, label_of_row = different(part[columns["label"]])
    numbers = label_numbers(labels, label_of_row, reading.labels, place)
    values["label"] = pyarrow.array(numbers, pyarrow.int8()).take(label_of_row)
    written = pyarrow.array(map(repr, labels), pyarrow.string())
    values["written"] = pyarrow.DictionaryArray.from_arrays(label_of_row, written)
    for name, kind in shown.items():
        if kind is int:
            values[name] = as_numbers(part[name], name, place)
        else:
            values[name] = as_texts(part[name], name, place, may_lack=True)
    return pyarrow.table(values), labels
