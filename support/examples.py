"""Premises, hypotheses and labels from people's files, or from the Hub.

What files, columns and labels may be called stands in tables in dataset_files.py, columns.py
and labels.py: to read one more form, add a word there. `python -m scripts.describe` shows
how a dataset is read.

`datasets` takes about a second to import, so the functions that use it import it.
"""

import functools
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from support import card, hub, ranks
from support.columns import check_texts, find_columns
from support.dataset_files import arrow_columns, find_files, read_file, split_name, with_train
from support.fingerprint import digest_rows
from support.labels import (
    LABELS,
    NO_LABEL,
    as_word,
    check_meanings,
    label_numbers,
    refuse_names_in_card,
)

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
    if dataset and directory.is_dir():
        hub.refuse_revision("dataset", dataset, revision)
        splits = find_files(directory)
        return {split: {str(path): path for path in paths} for split, paths in splits.items()}
    if directory.is_file():
        raise ValueError(f"{dataset} is a file: pass the folder that it is in")
    if not card.is_repository(dataset):
        raise ValueError(
            f"no dataset directory {dataset!r}, and it is not a Hub id (owner/name): "
            "say with --dataset where it is"
        )
    tables = load_from_hub(dataset, revision)
    found = [split_name(name) or name for name in tables]
    splits = {}
    for split, (name, rows) in zip(found, tables.items()):
        # snli_dev and mnli_dev are both validation: validation_snli_dev, validation_mnli_dev.
        is_shared = found.count(split) > 1 and name != split
        splits[f"{split}_{name}" if is_shared else split] = {f"{dataset}, {name}": rows}
    return with_train(splits)


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
        name = f"{dataset!r} at revision {revision!r}" if revision else repr(dataset)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"cannot load {name} from the Hub, and it is no directory here "
            f"({reason}); without a network, pass a directory instead: "
            "--dataset tiny/data, or one with train.* and validation*.* files"
        ) from None
    found = commit_of(next(iter(tables.values())))
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
) -> "Dataset":
    """Returns the first `limit` labelled rows: premise, hypothesis, label (0, 1, 2).

    All rows are checked here, so that none stops a training in its middle. Raises ValueError
    for a split or a column that is missing, a text that is missing, a label that has no
    meaning, and when no row is left.
    """
    rows, _ = read_split(dataset, split, reading)
    rows = rows.remove_columns("written")
    labels = rows["label"][:]
    labelled = [index for index, label in enumerate(labels) if label != NO_LABEL]
    if not labelled:
        raise ValueError(f"{dataset}, {split}: no labelled row")
    dropped = len(labels) - len(labelled)
    reason = f", {dropped:,} without a label dropped" if dropped else ""
    missing = [name for number, name in enumerate(LABELS) if number not in labels]
    if missing:
        reason += f", none of {' or '.join(missing)}"
    chosen = labelled[:limit]
    if ranks.FIRST:
        print(f"{split}: {len(labels):,} rows{reason}; {len(chosen):,} taken", file=sys.stderr)
    # `select` adds a table of indices, through which every later access would go.
    return rows if len(chosen) == len(rows) else rows.select(chosen)


def count_rows(dataset: str, used: dict[str, "Dataset"], reading: Reading) -> dict:
    """Returns for each split how many rows it has, how many without a label, and how many used."""
    counts = {}
    for split, rows in used.items():
        every_row, _ = read_split(dataset, split, reading)
        labels = every_row["label"][:]
        unlabelled = labels.count(NO_LABEL)
        counts[split] = {"read": len(labels), "without_label": unlabelled, "used": len(rows)}
    return counts


def digest_split(dataset: str, split: str, reading: Reading) -> str:
    """Returns a digest of all rows of a split, whatever --limit takes of them."""
    rows, _ = read_split(dataset, split, reading)
    return digest_rows(rows)


@functools.cache
def read_split(dataset: str, split: str, reading: Reading) -> tuple["Dataset", dict[str, str]]:
    """Returns all rows of a split, and which columns of its files they are.

    A row has premise, hypothesis, label, and the label as `written`.
    """
    splits = find_splits(dataset, reading.revision)
    names = split_names(dataset, reading)
    if split not in names:
        cure = ": call the file that is meant train.*" if split == "train" else ""
        raise ValueError(f"{dataset} has no split {split!r}, only {', '.join(names)}{cure}")
    is_cut = len(names) > len(splits)
    if is_cut and split in ("train", "validation"):
        return cut_train(dataset, split, reading)
    try:
        return join_parts(dataset, split, reading)
    # Half of a pair of surrogates, which JSON can hold, or an idx of more than 64 bits.
    except (UnicodeError, OverflowError) as error:
        raise ValueError(f"{dataset}, {split}: {error}") from None


def join_parts(dataset: str, split: str, reading: Reading) -> tuple["Dataset", dict[str, str]]:
    """Returns what `read_split` does, of a split that is there.

    An error begins with the part or the split that it is about.
    """
    from datasets import Dataset

    tables = read_parts(find_splits(dataset, reading.revision)[split])
    first = next(iter(tables))
    columns = find_columns(list(tables[first]), reading.columns, first)
    if len(set(columns.values())) < len(columns):  # "text Text" are one column, too
        raise ValueError(f"--columns names one column twice: {' '.join(reading.columns)}")
    rows = {}
    words = set()
    for place, table in tables.items():
        words |= {as_word(label) for label in table[columns["label"]]}
        for column, values in rows_of(table, columns, reading, place).items():
            rows.setdefault(column, []).extend(values)
    check_meanings(words, len(rows["label"]), reading.labels, f"{dataset}, {split}")
    # Of a dataset on the Hub the names are in its columns already.
    is_local = Path(dataset).is_dir()
    if is_local and not reading.labels and any(word.isdigit() for word in words):
        refuse_names_in_card(Path(dataset))
    for name in KEPT:
        kinds = set(map(type, rows.get(name, ()))) - {type(None)}
        if kinds not in ({int}, {str}):  # a column has one type; these are only shown
            rows.pop(name, None)
    return Dataset.from_dict(rows), columns


def read_parts(parts: "dict[str, Path | Dataset]") -> dict[str, dict[str, list]]:
    """Returns the columns of each part. Raises ValueError where they are not the same."""
    tables = {place: read_part(part) for place, part in parts.items()}
    first = next(iter(tables))
    for place, table in tables.items():
        differing = sorted(table.keys() ^ tables[first].keys())
        if differing:
            raise ValueError(f"{place} and {first} differ in columns: {', '.join(differing)}")
    return tables


def rows_of(
    table: dict[str, list], columns: dict[str, str], reading: Reading, place: str
) -> dict[str, list]:
    """Returns a part's columns under our names, checked, with the labels as numbers."""
    names = {name: name for name in KEPT if name in table} | columns
    values = {column: table[name] for column, name in names.items()}
    check_texts(values, place)
    values["written"] = [repr(label) for label in values["label"]]
    values["label"] = label_numbers(values["label"], reading.labels, place)
    return values


def read_part(part: "Path | Dataset") -> dict[str, list]:
    """Returns the columns of a part, by name."""
    if isinstance(part, Path):
        return read_file(part)
    return arrow_columns(part.with_format("arrow")[:])


def cut_train(dataset: str, split: str, reading: Reading) -> tuple["Dataset", dict[str, str]]:
    """Returns what --validation leaves of train, or takes from it for `validation`."""
    train, columns = read_split(dataset, "train", reading._replace(validation=None))
    try:
        # From a seed of its own: runs that differ in theirs are measured on the same rows.
        cut = train.train_test_split(reading.validation, seed=0)
    except ValueError as error:
        raise ValueError(f"{dataset}: --validation leaves no rows: {error}") from None
    return cut["train" if split == "train" else "test"], columns
