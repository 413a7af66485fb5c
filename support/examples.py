"""Premises, hypotheses and labels from people's files, or from the Hub.

What columns may be called stands in the table at the top, what labels may be called in
labels.py, and what files may be called in dataset_files.py: to read one more form, add a
word there. `python -m scripts.describe` shows how a dataset is read.

`datasets` takes about a second to import, so the functions that load something import it.
"""

import functools
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from support import ranks
from support.dataset_files import find_files, read_files, split_name, with_train
from support.labels import HIDDEN, LABELS, read_labels, refuse_names_elsewhere, without_names

if TYPE_CHECKING:
    from datasets import Dataset

# What a column may be called, in any case. The first that a file has is taken.
COLUMNS = {
    "premise": ("premise", "sentence1", "context"),
    "hypothesis": ("hypothesis", "sentence2", "hypo"),
    "label": ("label", "gold_label", "gold"),
}
KEPT = ("idx", "genre")  # other columns, which predictions_SPLIT.jsonl shows
TEXT = ("string", "large_string", "string_view")  # pyarrow's kinds of text
CONFIGURATIONS = {"nyu-mll/glue": "mnli"}  # of datasets on the Hub that hold several


class Reading(NamedTuple):
    """What the flags say about a dataset that the tables do not."""

    columns: tuple[str, ...] = ()  # the names of premise, hypothesis and label
    labels: tuple[str, ...] = ()  # the meanings of 0, 1 and 2, or three VALUE=MEANING
    validation: float | None = None  # the share of train that is kept for validation

    @classmethod
    def of(cls, args: Namespace) -> "Reading":
        return cls(tuple(args.columns or ()), tuple(args.labels or ()), args.validation)


BY_THE_TABLES = Reading()


# -----------------------------------------------------------------------------
# Splits


def load_from_hub(dataset: str) -> dict[str, "Dataset"]:
    """Returns all splits of a dataset on the Hub, by their names."""
    import datasets

    try:
        splits = datasets.load_dataset(dataset, CONFIGURATIONS.get(dataset))
    # The library raises these when it does not reach the Hub or find the dataset there.
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise ValueError(
            f"cannot load {dataset!r} from the Hub, and it is no directory here "
            f"({reason}); without a network, pass a directory instead: "
            "--dataset tiny/data, or one with train.* and validation*.* files"
        ) from None
    return with_train({split_name(name) or name: rows for name, rows in splits.items()})


# Cached, because a run asks for the names and for each split: it is read once.
@functools.cache
def load_splits(dataset: str, validation: float | None = None) -> dict[str, "Dataset"]:
    """Returns all splits of a directory, or of a dataset on the Hub, as they are there.

    Where none of them is for validation, `validation` is the share of train that becomes
    one. Raises ValueError when there is no such dataset or a file of it cannot be read.
    """
    from datasets import config, disable_progress_bars, logging

    logging.set_verbosity(logging.CRITICAL)  # what it logs of an error stands in the error
    # The library's bars are for what the Hub sends. What it does with files of a directory takes
    # a moment. In a log file each movement of a bar would be one more line.
    if not sys.stderr.isatty() or Path(dataset).is_dir():
        disable_progress_bars()
    try:
        Path(config.HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot write the cache of the datasets library, {config.HF_DATASETS_CACHE} "
            f"({error.strerror}): set HF_DATASETS_CACHE to a folder that can be written"
        ) from None

    if dataset and Path(dataset).is_dir():
        files = find_files(Path(dataset))
        splits = {split: read_files(paths) for split, paths in files.items()}
    elif Path(dataset).is_file():
        raise ValueError(f"{dataset} is a file: pass the folder that it is in")
    # A mistyped path is said to be one, instead of being looked for on the Hub.
    elif dataset.count("/") != 1 or dataset.startswith((".", "/", "~")):
        raise ValueError(
            f"no dataset directory {dataset!r}, and it is not a Hub id (owner/name): "
            "--dataset says where it is"
        )
    else:
        splits = load_from_hub(dataset)
    if validation and not validation_names(splits):
        splits |= cut_train(dataset, splits, validation)
    return splits


def cut_train(dataset: str, splits: dict[str, "Dataset"], share: float) -> dict[str, "Dataset"]:
    """Returns the split train in two parts, of which `share` is for validation."""
    if "train" not in splits:
        raise ValueError(
            f"{dataset} has no split train for --validation to take from, "
            f"only {', '.join(splits)}"
        )
    train = splits["train"]
    try:
        # From a seed of its own: runs that differ in theirs are measured on the same rows.
        parts = train.train_test_split(share, seed=0)
    except ValueError:
        raise ValueError(
            f"{dataset}: --validation {share} of {len(train)} rows leaves train or validation empty"
        ) from None
    return {"train": parts["train"], "validation": parts["test"]}


def validation_names(splits: dict) -> list[str]:
    return [name for name in splits if name.startswith("validation")]


def validation_splits(dataset: str, reading: Reading = BY_THE_TABLES) -> list[str]:
    """Returns the names of the splits that are evaluated by default.

    In MNLI they are validation_matched and validation_mismatched.
    """
    splits = load_splits(dataset, reading.validation)
    names = validation_names(splits)
    if not names:
        cure = "--split names the one to evaluate"
        if "train" in splits:
            cure = "--validation 0.05 takes a part of train for it"
        raise ValueError(f"{dataset} has no validation split, only {', '.join(splits)}; {cure}")
    return names


# -----------------------------------------------------------------------------
# Examples


def load_examples(
    dataset: str, split: str, limit: int | None = None, reading: Reading = BY_THE_TABLES
) -> "Dataset":
    """Returns the first `limit` labelled rows: premise, hypothesis, label (0, 1, 2).

    All rows are checked, not in the middle of a training. Raises ValueError for a split or
    a column that is missing, a text that is missing, a label that has no meaning, and when
    no row is left.
    """
    rows, labels = read_split(dataset, split, reading)
    rows = rows.remove_columns("label").add_column("label", labels)
    labelled = [index for index, label in enumerate(labels) if label != HIDDEN]
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
    """Returns how many rows the files of these splits hold, without a label, and used."""
    counts = {}
    for split, rows in used.items():
        _, labels = read_split(dataset, split, reading)
        unlabelled = labels.count(HIDDEN)
        counts[split] = {"read": len(labels), "without_label": unlabelled, "used": len(rows)}
    return counts


@functools.cache
def read_split(dataset: str, split: str, reading: Reading) -> tuple["Dataset", list[int]]:
    """Returns all rows of a split, under our columns' names, and their labels as numbers."""
    splits = load_splits(dataset, reading.validation)
    if split not in splits:
        cure = ": call the file that is meant train.*" if split == "train" else ""
        raise ValueError(f"{dataset} has no split {split!r}, only {', '.join(splits)}{cure}")
    rows = splits[split]
    place = f"{dataset}, {split}"  # how every error begins
    columns = find_columns(rows.column_names, reading.columns, place)
    others = [name for name in KEPT if name not in columns.values() and is_plain(rows, name)]
    rows = rows.select_columns([*columns.values(), *others])
    rows = rows.rename_columns({name: column for column, name in columns.items()})
    check_texts(rows, place)
    if not reading.labels and without_names(rows):
        refuse_names_elsewhere(Path(dataset))
    return rows, read_labels(rows, reading.labels, place)


def is_plain(rows: "Dataset", name: str) -> bool:
    """Returns whether there is a column of this name, of texts or whole numbers."""
    kind = str(getattr(rows.features.get(name), "dtype", None))
    return kind.startswith(("int", "uint")) or kind in TEXT


def find_columns(names: list[str], given: tuple[str, ...], place: str) -> dict[str, str]:
    """Returns which of the columns `names` are premise, hypothesis and label."""
    if given and len(set(given)) < len(given):
        raise ValueError(f"--columns names one column twice: {' '.join(given)}")
    columns = {}
    for number, (column, aliases) in enumerate(COLUMNS.items()):
        wanted = given[number : number + 1] or aliases
        if given and given[number] in names:
            found = given[number]
        else:
            found = find_column(names, wanted, place)
        if found is None:
            raise ValueError(
                f"{place}: no column {' or '.join(wanted)}; there are {', '.join(names)[:300]} "
                "(a table's first line names them); --columns PREMISE HYPOTHESIS LABEL says "
                "which are meant"
            )
        columns[column] = found
    return columns


def find_column(names: list[str], aliases: tuple[str, ...], place: str) -> str | None:
    """Returns the first column that is called by one of these words, in any case."""
    lower = [name.strip().lower() for name in names]
    for alias in (text.strip().lower() for text in aliases):
        if lower.count(alias) > 1:
            raise ValueError(f"{place}: two columns are called {alias}")
        if alias in lower:
            return names[lower.index(alias)]
    return None


def check_texts(rows: "Dataset", place: str) -> None:
    """Raises ValueError for a column of anything but text, and for an empty place in it."""
    for column in ("premise", "hypothesis"):
        feature = rows.features[column]
        kind = getattr(feature, "dtype", feature)  # lists and objects have no dtype
        if kind not in TEXT:
            raise ValueError(
                f"{place}: column {column} holds {str(kind)[:60]}, not text; a json file has an "
                "object for each row, as of pandas' to_json(path, orient='records')"
            )
        texts = rows[column][:]
        if None in texts:
            raise ValueError(f"{place}, row {texts.index(None)}: no {column}")
