"""Premises, hypotheses and labels from a directory of files or from the Hub.

A directory holds a file for each split, train.* and validation*.*, or several of them, such
as train-00000-of-00002.parquet and train-00001-of-00002.parquet.

`datasets` takes about a second to import, so the functions that load something import it.
"""

import functools
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

LABELS = ("entailment", "neutral", "contradiction")  # stored and answered as 0, 1, 2
HIDDEN = -1  # the label of GLUE's test rows
COLUMNS = ("premise", "hypothesis", "label")

# How a file is read, by its suffix: the loader's name in `datasets`, and options for it.
FORMATS = {
    ".parquet": ("parquet", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
}
SPLIT_FILE = re.compile("train|validation|test")  # how its name begins
SHARD = re.compile(r"-\d+-of-\d+$")  # how its name ends, before the suffix
CONFIGURATIONS = {"nyu-mll/glue": "mnli"}  # of datasets on the Hub that hold several


# -----------------------------------------------------------------------------
# Splits


# Cached, because a run asks for each split and for their names: it is read once.
@functools.cache
def load_splits(dataset: str) -> dict[str, "Dataset"]:
    """Returns all splits of a directory, or of a dataset on the Hub, by their names.

    Raises ValueError when there is no such dataset or a file of it cannot be read.
    """
    import datasets

    # In a log file each movement of a bar would be one more line.
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    directory = Path(dataset)
    if directory.is_dir():
        files = split_files(directory)
        return {split: read_files(paths) for split, paths in files.items()}
    # A mistyped path is said to be one, instead of being looked for on the Hub.
    if dataset.count("/") != 1 or dataset.startswith((".", "/", "~")):
        raise ValueError(
            f"no dataset directory {dataset!r}, and it is not a Hub id (owner/name)"
        )
    return load_from_hub(dataset)


def split_files(directory: Path) -> dict[str, list[Path]]:
    """Returns the files of each split, in the order of their names."""
    files = {}
    # Sorted, because iterdir has no order and the order of the rows decides the batches.
    for path in sorted(directory.iterdir()):
        if path.suffix in FORMATS and SPLIT_FILE.match(path.name):
            split = SHARD.sub("", path.stem)
            files.setdefault(split, []).append(path)
    if not files:
        suffixes = ", ".join(FORMATS)
        raise ValueError(f"{directory} holds no train.* or validation*.* file ({suffixes})")
    return files


def read_files(paths: list[Path]) -> "Dataset":
    """Reads the files of one split, which all have the format of the first."""
    import datasets

    # Of an empty JSON file the library makes a StopIteration without a message.
    if not any(path.stat().st_size for path in paths):
        raise ValueError(f"{paths[0]} is empty")
    loader, options = FORMATS[paths[0].suffix]
    names = [str(path) for path in paths]
    try:
        # A loader that is given a plain list calls the whole of it "train".
        return datasets.load_dataset(loader, data_files=names, split="train", **options)
    # pyarrow's errors are ValueErrors.
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        # The library says only that reading failed; why is in the error that it came from.
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"cannot read {paths[0]}: {reason}") from None


def load_from_hub(dataset: str) -> dict[str, "Dataset"]:
    """Returns all splits of a dataset on the Hub, by their names."""
    import datasets

    try:
        return dict(datasets.load_dataset(dataset, CONFIGURATIONS.get(dataset)))
    # The library raises these when it does not reach the Hub or find the dataset there.
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        raise ValueError(
            f"cannot load {dataset!r} from the Hub, and it is no directory here "
            f"({reason}); without a network, pass a directory instead: "
            "--dataset tiny/data, or one with train.* and validation*.* files"
        ) from None


def validation_splits(dataset: str) -> list[str]:
    """Returns the names of the splits that are evaluated by default.

    In MNLI they are validation_matched and validation_mismatched.
    """
    splits = load_splits(dataset)
    names = [name for name in splits if name.startswith("validation")]
    if not names:
        raise ValueError(f"{dataset} has no validation split, only {', '.join(splits)}")
    return names


# -----------------------------------------------------------------------------
# Examples


def load_examples(dataset: str, split: str, limit: int | None = None) -> "Dataset":
    """Returns the first `limit` labelled rows: premise, hypothesis, label (0, 1, 2).

    Labels may be numbers or the words of LABELS. Rows with GLUE's hidden label are dropped,
    and a line on stderr says so. Raises ValueError for a split or a column that is missing,
    for any other label, for a text that is missing, and when no row is left.
    """
    splits = load_splits(dataset)
    if split not in splits:
        raise ValueError(f"{dataset} has no split {split!r}, only {', '.join(splits)}")
    rows = splits[split]
    place = f"{dataset}, {split}"  # how every error begins

    # All rows are checked before the first is used, not in the middle of a training.
    check_columns(rows, place)
    raw = rows["label"][:]  # a list: the library's column would read each value anew
    labels = [
        label_number(label, f"{place}, row {index}") for index, label in enumerate(raw)
    ]
    check_texts(rows, place)

    # Rows without a label go.
    labelled = [index for index, label in enumerate(labels) if label != HIDDEN]
    if not labelled:
        raise ValueError(f"{place}: no labelled row")
    dropped = len(labels) - len(labelled)
    if dropped:
        print(f"{split}: {dropped} rows without a label dropped", file=sys.stderr)
    # From here on every label is an int, whatever the file holds.
    if any(type(label) is not int for label in raw):  # words, or numbers with a point
        rows = rows.remove_columns("label").add_column("label", labels)
    chosen = labelled[:limit]
    # `select` adds a table of indices, through which every later access would go.
    if len(chosen) == len(rows):
        return rows
    return rows.select(chosen)


def check_columns(rows: "Dataset", place: str) -> None:
    """Raises ValueError when a column is missing."""
    names = rows.column_names
    missing = sorted(set(COLUMNS) - set(names))
    if missing:
        raise ValueError(
            f"{place}: no column {', '.join(missing)}; there are {', '.join(names)}"
        )


def label_number(label, place: str) -> int:
    """Returns a label as 0, 1, 2, or HIDDEN. Raises ValueError for any other."""
    if label in LABELS:
        return LABELS.index(label)
    # True is 1 and False is 0 to Python, but nobody means that by a label.
    if label not in (HIDDEN, 0, 1, 2) or isinstance(label, bool):
        raise ValueError(f"{place}: label {label!r} is not 0, 1, 2 or {', '.join(LABELS)}")
    return int(label)  # 1.0 is in (0, 1, 2) too


def check_texts(rows: "Dataset", place: str) -> None:
    """Raises ValueError for a column of anything but text, and for an empty place in it."""
    for column in ("premise", "hypothesis"):
        feature = rows.features[column]
        kind = getattr(feature, "dtype", feature)  # lists and objects have no dtype
        # pyarrow's two kinds of text, with offsets of 32 and of 64 bits.
        if kind not in ("string", "large_string"):
            raise ValueError(f"{place}: column {column} holds {kind}, not text")
        texts = rows[column][:]
        if None in texts:
            raise ValueError(f"{place}, row {texts.index(None)}: no {column}")
