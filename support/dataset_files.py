"""Files of rows, as other tools write them: which split each file holds, and how to read it.

To support another form, add a word to SPLITS, or a suffix and its function to READERS at the
end. columns.py and labels.py check the contents of the rows; text_files.py reads JSON and tables
of text.

Local files are read here rather than by load_dataset. Its cache identifies a file by name and
time only, so it may return the rows of another file, and its readers guess types and quotes.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pyarrow
from pyarrow import ipc, parquet

from support.columns import Column, check_names, different
from support.labels import as_word
from support.text_files import read_json, read_table

# Words in a file's name that name its split. What follows the word is kept: dev_matched becomes
# validation_matched.
SPLITS = {"train": "train", "test": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
# The number of a part: train-00000-of-00002, also with -a09b74b3ef9c3b56 after it; 0000;
# train_0, but not train_v1.0; part-00000-...-c000.snappy (Spark).
PART = re.compile(r"(?:^|[-_]|(?<!\d)\.)(\d+)(?:-of-(\d+))?(?:-[0-9a-f-]{16,36}(?:-c\d+.*)?)?$")
# The start of the placeholder for a file in a clone without Git LFS.
LFS_POINTER = b"version https://git-lfs"


# -----------------------------------------------------------------------------
# Which files hold which split


def find_files(directory: Path) -> dict[str, list[Path]]:
    """Returns the files of each split, from the directory itself or up to two levels below it."""
    folders = [directory]
    others = []
    for _ in range(3):
        # Not glob, which silently leaves out folders that cannot be read.
        paths = [path for folder in folders for path in folder.iterdir()]
        paths = [path for path in paths if not path.name.startswith(".")]
        splits = group_by_split(paths, directory)
        if splits:
            return splits
        folders = [path for path in paths if path.is_dir()]
        others += [str(path.relative_to(directory)) for path in paths if not path.is_dir()]
    others = ", ".join(sorted(others))
    raise ValueError(
        f"{directory} holds no train.* or validation*.* file ({', '.join(READERS)}), "
        f"only {others[:200] or 'nothing'}"
    )


def group_by_split(paths: list[Path], directory: Path) -> dict[str, list[Path]]:
    """Returns the files that hold a split, by the name of the split."""
    splits = {}
    # Sorted, because a folder has no order, but the order of rows decides the batches.
    for path in sorted(paths, key=by_numbers):
        split = split_of(path, directory)
        if split:
            splits.setdefault(split, []).append(path)
    for split, parts in splits.items():
        check_parts(split, parts)
    return with_train(splits)


def with_train(splits: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """Returns the splits; one such as train_en is called train if there is no other."""
    trains = [split for split in splits if split.startswith("train")]
    return {"train" if trains == [split] else split: parts for split, parts in splits.items()}


def by_numbers(path: Path) -> list[str | int]:
    """Returns a sort key that puts train_2 before train_10."""
    return [int(word) if word.isdecimal() else word for word in re.split(r"(\d+)", str(path))]


def split_of(path: Path, directory: Path) -> str | None:
    """Returns the split that a file of a dataset holds, or None if its name does not say."""
    stem, suffix = stem_and_suffix(path)
    if suffix not in READERS or path.is_dir():
        return None
    stem = PART.sub("", stem)
    if stem not in ("", "data", "part"):
        return split_name(stem)
    # The folder names the split: train/0000.parquet, train/part-00000.parquet,
    # train/data-00000-of-00001.arrow. save_to_disk may write a single split into any folder.
    is_one_split = suffix == ".arrow" and path.parent == directory
    return split_name(path.parent.absolute().name) or ("train" if is_one_split else None)


def split_name(name: str) -> str | None:
    """Returns "validation_matched" for multinli_1.0_dev_matched, None for notes."""
    words = re.findall("[a-z]+[0-9]*|[0-9]+", name.lower())
    for place, word in enumerate(words):
        if word in SPLITS:
            return "_".join([SPLITS[word], *words[place + 1 :]])
    return None


def check_parts(split: str, paths: list[Path]) -> None:
    """Raises ValueError unless there is one file, or all parts of one.

    Otherwise the files may be the same rows in two formats, or parts of two datasets.
    """
    count = len(paths)
    kinds = set()
    numbers = []
    totals = set()
    for path in paths:
        stem, suffix = stem_and_suffix(path)
        part = PART.search(stem)
        number, total = part.groups() if part else (-1, None)
        kinds.add((path.parent, PART.sub("", stem), suffix))
        numbers.append(int(number))
        totals.add(int(total or count))
    # One file may have any number in its name.
    are_all = count == 1 or sorted(numbers) in (list(range(count)), list(range(1, count + 1)))
    if len(kinds) > 1 or totals != {count} or not are_all:
        raise ValueError(
            f"{' and '.join(map(str, paths[:3]))}: not one file, and not all parts of one, for "
            f"the split {split}; remove the files that you do not mean, or pass another folder"
        )


def stem_and_suffix(path: Path) -> tuple[str, str]:
    """Returns "train" and ".jsonl" for Train.jsonl.gz."""
    name = Path(path.name.lower().removesuffix(".gz"))
    return name.stem, name.suffix


# -----------------------------------------------------------------------------
# Reading files: each function returns the columns of a file, by name


def read_file(path: Path) -> dict[str, Column]:
    """Returns the columns of a file, read by its suffix. Raises ValueError on failure."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
            file.seek(0)
            if start == LFS_POINTER:
                raise ValueError("it is a Git LFS pointer; `git lfs pull` fetches the file itself")
            is_packed = start.startswith(b"\x1f\x8b")  # gzip, whatever the file's suffix
            content = io.BytesIO(gzip.decompress(file.read())) if is_packed else file
            columns = READERS[stem_and_suffix(path)[1]](content)
        if not columns:
            raise ValueError("it holds no rows")
    # gzip may raise EOFError and zlib.error, json RecursionError.
    except (
        OSError, ValueError, EOFError, zlib.error, RecursionError, pyarrow.ArrowException
    ) as error:
        cure = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"cannot read {path}: {reason}{cure}") from None
    return columns


def read_parquet(file: BinaryIO) -> dict[str, Column]:
    # One megabyte and one column at a time. Otherwise much of the file would be in memory twice.
    with parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False) as content:
        batches = content.iter_batches(use_threads=False)
        return table_columns(pyarrow.Table.from_batches(batches, content.schema_arrow))


def read_arrow(file: BinaryIO) -> dict[str, Column]:
    content = file.read()
    if content.startswith(b"ARROW1"):  # as pandas' to_feather writes it
        return table_columns(ipc.open_file(content).read_all())
    if not content.endswith(b"\xff\xff\xff\xff\0\0\0\0"):
        raise ValueError("it is not an Arrow file of version 2, or its end is missing")
    return table_columns(ipc.open_stream(content).read_all())


def table_columns(table: pyarrow.Table) -> dict[str, Column]:
    """Returns the columns of a table. Numbers that `datasets` has named become their names."""
    check_names(table.column_names)
    columns = dict(zip(table.column_names, table.columns))
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", "{}"))
    try:
        for column, feature in (metadata.get("info", {}).get("features") or {}).items():
            is_label = isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
            if is_label and column in columns:
                columns[column] = named(columns[column], feature["names"])
    except (AttributeError, KeyError, TypeError):
        raise ValueError("its huggingface metadata is not as `datasets` writes it") from None
    return columns


def named(numbers: Column, names: Sequence[str]) -> pyarrow.ChunkedArray:
    """Returns the name of each number. A number without one, such as -1, becomes its text."""
    values, value_of_row = different(numbers)
    name_of = dict(enumerate(names))
    name_of |= {str(number): name for number, name in enumerate(names)}  # for a table of text
    keys = [value if isinstance(value, (int, float)) else as_word(value) for value in values]
    texts = [
        None if value is None else str(name_of.get(key, value))
        for key, value in zip(keys, values)
    ]
    texts = pyarrow.array(texts, pyarrow.string())
    return pyarrow.chunked_array([pyarrow.DictionaryArray.from_arrays(value_of_row, texts)])


def read_text(read: Callable[[str], dict[str, list]], file: BinaryIO) -> dict[str, list]:
    """Reads a UTF-8 file, without the byte order mark that Excel writes first.

    Also drops zero bytes at the end, which a crash of the machine can leave.
    """
    return read(file.read().decode("utf-8-sig").rstrip("\0\r\n"))


READERS = {".parquet": read_parquet, ".arrow": read_arrow, ".feather": read_arrow}
READERS |= dict.fromkeys((".jsonl", ".ndjson", ".json"), partial(read_text, read_json))
READERS |= dict.fromkeys((".csv", ".tsv"), partial(read_text, read_table))
