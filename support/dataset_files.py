"""Files of rows as other tools have written them: which split a file holds, and how it is read.

Formats are parquet and arrow, and json, jsonl, csv and tsv, these with .gz or without. To read
one more form, add a word to a table. What a row must hold is the matter of examples.py.
"""

import csv
import glob
import gzip
import io
import itertools
import re
import zlib
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from support import files

if TYPE_CHECKING:
    from datasets import Dataset

# The word in a file's name that says its split. What follows it is kept: dev_matched is
# validation_matched.
SPLITS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
# How a file is read, by its suffix: by a loader of `datasets`, or as a table, by its separator.
LOADERS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json"}
SEPARATORS = {".csv": ",;\t", ".tsv": "\t"}  # of several, the one that its header has most of
# train-00000-of-00002, in older uploads train-00000-of-00002-a09b74b3ef9c3b56
SHARD = re.compile(r"-(\d+)-of-(\d+)(?:-[0-9a-f]{16})?$")
# A field in quotes, and a file in which every quote belongs to such a field.
QUOTED = rb'"[^"]*+(?:""[^"]*+)*+"'
ALL_QUOTED = re.compile(rb'(?:(?:%b|[^"\t\r\n]*+)(?:\t|\r?\n|\Z))*+' % QUOTED)


# -----------------------------------------------------------------------------
# Which files hold which split


def find_files(directory: Path) -> dict[str, list[Path]]:
    """Returns the files of each split: those in the directory, or up to two folders below."""
    state = directory / "state.json"
    # One split that save_to_disk has written. It leaves the files of an earlier call, so only
    # those that it lists count.
    if state.is_file() and (directory / "dataset_info.json").is_file():
        split = split_name(directory.name.lower())
        listed = [directory / entry["filename"] for entry in files.read_json(state)["_data_files"]]
        return {split if split in SPLITS else "train": listed}
    for depth in (1, 2, 3):
        splits = {}
        # Sorted, because glob has no order and the order of the rows decides the batches.
        for path in sorted(directory.glob("/".join(["[!.]*"] * depth))):
            split = split_of(path)
            if split:
                splits.setdefault(split, []).append(path)
        for split, paths in splits.items():
            check_parts(split, paths)
        if splits:
            return with_train(splits)
    others = sorted(path.name for path in directory.iterdir())
    raise ValueError(
        f"{directory} holds no train.* or validation*.* file "
        f"({', '.join(LOADERS | SEPARATORS)}), only {', '.join(others)[:200] or 'nothing'}"
    )


def split_of(path: Path) -> str | None:
    """Returns the split that a file holds, or None when its name does not say."""
    stem, suffix = stem_and_suffix(path)
    if suffix not in LOADERS | SEPARATORS or not path.is_file():
        return None
    stem = SHARD.sub("", stem)
    if stem == "data" or stem.isdigit():  # train/0000.parquet
        stem = path.parent.name.lower()
    return split_name(stem)


def split_name(name: str) -> str | None:
    """Returns "validation_matched" for multinli_1.0_dev_matched, None for notes."""
    words = re.findall("[a-z]+[0-9]*|[0-9]+", name)
    for place, word in enumerate(words):
        for split, aliases in SPLITS.items():
            if word in aliases:
                return "_".join([split, *words[place + 1 :]])
    return None


def with_train(splits: dict) -> dict:
    """Returns the splits, of which train_en, say, is called train where it is the only one."""
    names = [name for name in splits if name.startswith("train")]
    return {"train" if [name] == names else name: value for name, value in splits.items()}


def check_parts(split: str, paths: list[Path]) -> None:
    """Raises ValueError unless the files are one, or all the parts of one.

    Otherwise they are two formats of the same rows, two datasets, or of two exports.
    """
    kinds = set()
    numbers = []
    for path in paths:
        stem, _ = stem_and_suffix(path)
        number, parts = 0, 1
        shard = SHARD.search(stem)
        if shard:
            number, parts = int(shard[1]), int(shard[2])
        elif stem.isdigit():  # the name does not say how many there are
            number, parts = int(stem), len(paths)
        numbers.append(number)
        kinds.add((path.parent, path.suffix, parts))
    is_one_kind = kinds == {(paths[0].parent, paths[0].suffix, len(paths))}
    first = min(numbers)
    if not is_one_kind or sorted(numbers) != list(range(first, first + len(paths))):
        names = " and ".join(dict.fromkeys([str(paths[0]), str(paths[-1])]))
        raise ValueError(
            f"{names}: not one file, and not all parts of one, for the split {split}; "
            "remove what is not meant, or pass the folder that is"
        )


def stem_and_suffix(path: Path) -> tuple[str, str]:
    """Returns "train" and ".jsonl" for Train.jsonl.gz."""
    name = Path(path.name.lower().removesuffix(".gz"))
    return name.stem, name.suffix


# -----------------------------------------------------------------------------
# Reading them


def read_files(paths: list[Path]) -> "Dataset":
    """Reads the files of one split, which must have the same columns."""
    import datasets

    parts = [read_file(path) for path in paths]
    for path, part in zip(paths, parts):
        differing = sorted(set(part.column_names) ^ set(parts[0].column_names))
        if differing:
            raise ValueError(f"{path} and {paths[0]} differ in columns: {', '.join(differing)}")
    try:
        return datasets.concatenate_datasets(parts)
    except ValueError as error:  # labels that are numbers in one part and words in another
        raise ValueError(f"{paths[0]} to {paths[-1]} do not fit together: {error}") from None


def read_file(path: Path) -> "Dataset":
    import datasets

    _, suffix = stem_and_suffix(path)
    try:
        content = read_bytes(path)
        # Where the first value is none of these, pyarrow's JSON reader crashes.
        is_json = LOADERS.get(suffix) == "json"
        if is_json:
            content.decode()  # for its error: the library finds it later, and names no file
            if content.lstrip()[:1] not in (b"{", b"["):
                raise ValueError("it holds no JSON object")
        if suffix in SEPARATORS:
            rows = read_table(content, suffix)
        else:
            # Escaped, because the library takes a name with brackets for a pattern. Its cache
            # goes by name and time, which copies of other content can share: hence a folder
            # for each content.
            cache = Path(datasets.config.HF_DATASETS_CACHE) / sha256(content).hexdigest()[:16]
            name = glob.escape(str(path.absolute()))
            # By chunks, the columns of the first would have to be those of all rows.
            options = {"chunksize": len(content) + 1} if is_json else {}
            # A loader that is given a file alone calls it "train".
            rows = datasets.load_dataset(
                LOADERS[suffix], data_files=name, split="train", cache_dir=str(cache), **options
            )
    # pyarrow's errors are ValueErrors, those of gzip the last two.
    except (
        datasets.exceptions.DatasetGenerationError, ValueError, OSError, EOFError, zlib.error,
    ) as error:
        # The library says only that reading failed; why is in the error that it came from.
        reason = " ".join(str(error.__cause__ or error).split())
        if "corresponds to no data" in reason or "BatchSize must be" in reason:
            reason = "it holds no rows"
        if isinstance(error, UnicodeDecodeError):
            reason += "; save it as UTF-8"
        raise ValueError(f"cannot read {path}: {reason}") from None
    if not len(rows):
        raise ValueError(f"{path} holds no rows")
    return rows


def read_bytes(path: Path) -> bytes:
    """Returns the content of a file, of a .gz file unpacked. Raises ValueError for nothing."""
    open_file = gzip.open if path.suffix.lower() == ".gz" else open
    with open_file(path, "rb") as file:
        content = file.read().removeprefix(b"\xef\xbb\xbf")  # the mark that Excel puts first
    if not content.strip():
        raise ValueError("it is empty")
    if content.startswith(b"version https://git-lfs"):
        raise ValueError("it is a Git LFS pointer; `git lfs pull` fetches the file itself")
    return content


def read_table(content: bytes, suffix: str) -> "Dataset":
    """Reads a .csv or .tsv file. All its fields are text: 007 is not 7, and null is a word.

    An empty field is a missing one, and so is one at the end of a row that has fewer fields
    than the header.
    """
    import datasets

    header, *rows = [fields for fields in read_lines(content, suffix) if any(fields)]
    for name in filter(None, header):
        if header.count(name) > 1:
            raise ValueError(f"its header has {name} twice")
    for number, row in enumerate(rows):
        if any(row[len(header) :]):
            raise ValueError(f"row {number} has {len(row)} fields, the header {len(header)}")
    columns = {}
    for name, *fields in itertools.zip_longest(header, *rows, fillvalue=""):
        columns.setdefault(name, [field or None for field in fields])
    return datasets.Dataset.from_dict(columns)


def read_lines(content: bytes, suffix: str) -> list[list[str]]:
    """Returns the fields of each line of a .csv or .tsv file, the header first."""
    text = content.decode()
    if suffix == ".tsv" and not is_spreadsheets(content):
        # GLUE's files know no quoting: a quote is a character like any other.
        return [line.removesuffix("\r").split("\t") for line in text.split("\n")]
    header, _, _ = text.partition("\n")
    separator = max(SEPARATORS[suffix], key=header.count)
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        # Where people put a space behind each comma, a quote after it opens a field too.
        skipinitialspace=f"{separator} " in header,
        # Most quotes that are left open, which take the next rows into their field, are
        # then errors.
        strict=True,
    )
    try:
        return list(reader)
    except csv.Error as error:
        raise ValueError(
            f"line {reader.line_num}: {error}; a quote within a field in quotes is doubled"
        ) from None


def is_spreadsheets(content: bytes) -> bool:
    """Returns whether the quotes of a .tsv file are a spreadsheet's.

    A spreadsheet puts a field in quotes where it holds a quote, which is then doubled, a
    tab or a line end, and some put all in quotes, the header too. So all quotes must be of
    that kind, and one of these reasons must be there. Where each line has as many tabs as
    the header there is no tab or line end within a field.
    """
    if not ALL_QUOTED.fullmatch(content):
        return False
    quoted = [field[1:-1] for field in re.findall(QUOTED, content)]
    has_quoted_header = content.startswith(b'"')
    has_doubled = any(b'""' in field for field in quoted)
    has_break = any(b"\t" in field or b"\n" in field for field in quoted)
    tabs = {line.count(b"\t") for line in content.split(b"\n") if line.strip()}
    return has_quoted_header or has_doubled or (has_break and len(tabs) > 1)
