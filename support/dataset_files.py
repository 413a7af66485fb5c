"""Files of rows as other tools have written them: which split a file holds, and how it is read.

To read one more form, add a word to SPLITS, or a suffix and its function to READERS at the
end. What a row must hold is the matter of examples.py.

Local files are read here, and not by load_dataset: its cache goes by name and time, so that
copies of other content are taken for each other, and its readers guess at types and quotes.
"""

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from pathlib import Path

from support import files

# The word in a file's name that says its split. What follows it is kept: dev_matched is
# validation_matched.
SPLITS = {"train": "train", "test": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
# train-00000-of-00002, in older uploads train-00000-of-00002-a09b74b3ef9c3b56; 0000; train_0
PART = re.compile(r"(?:^|[-_])(\d+)(?:-of-(\d+))?(?:-[0-9a-f]{16})?$")
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
        listed = [directory / entry["filename"] for entry in files.read_json(state)["_data_files"]]
        return {split_name(directory.name) or "train": listed}
    for pattern in ("[!.]*", "[!.]*/[!.]*", "[!.]*/[!.]*/[!.]*"):
        splits = {}
        # Sorted, because glob has no order and the order of the rows decides the batches.
        for path in sorted(directory.glob(pattern)):
            split = split_of(path)
            if split:
                splits.setdefault(split, []).append(path)
        for split, paths in splits.items():
            check_parts(split, paths)
        if splits:
            return with_train(splits)
    others = ", ".join(sorted(path.name for path in directory.iterdir()))
    raise ValueError(
        f"{directory} holds no train.* or validation*.* file ({', '.join(READERS)}), "
        f"only {others[:200] or 'nothing'}"
    )


def split_of(path: Path) -> str | None:
    """Returns the split that a file holds, or None when its name does not say."""
    stem, suffix = stem_and_suffix(path)
    if suffix not in READERS or not path.is_file():
        return None
    stem = PART.sub("", stem)
    return split_name(path.parent.name if stem in ("", "data") else stem)  # train/0000.parquet


def split_name(name: str) -> str | None:
    """Returns "validation_matched" for multinli_1.0_dev_matched, None for notes."""
    words = re.findall("[a-z]+[0-9]*|[0-9]+", name.lower())
    for place, word in enumerate(words):
        if word in SPLITS:
            return "_".join([SPLITS[word], *words[place + 1 :]])
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
        part = PART.search(stem)
        number, count = part.groups() if part else (0, None)
        numbers.append(int(number))
        # Where the name does not say how many parts there are, those here are all.
        kinds.add((path.parent, path.suffix, int(count or len(paths))))
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


class Table(dict):
    """Columns by name, each a list: as much of a `datasets.Dataset` as is used here."""

    features = {}

    @property
    def column_names(self) -> list[str]:
        return list(self)


def read_files(paths: list[Path]) -> list:
    """Returns the parts of one split, each a Table or a Dataset, all with the same columns."""
    parts = [read_file(path) for path in paths]
    for path, part in zip(paths, parts):
        differing = sorted(set(part.column_names) ^ set(parts[0].column_names))
        if differing:
            raise ValueError(f"{path} and {paths[0]} differ in columns: {', '.join(differing)}")
    return parts


def read_file(path: Path):
    """Returns the rows of a file, as a Table or a Dataset. Raises ValueError for none."""
    _, suffix = stem_and_suffix(path)
    try:
        open_file = gzip.open if path.suffix.lower() == ".gz" else open
        with open_file(path, "rb") as file:
            content = file.read().removeprefix(b"\xef\xbb\xbf")  # the mark that Excel puts first
        if content.startswith(b"version https://git-lfs"):
            raise ValueError("it is a Git LFS pointer; `git lfs pull` fetches the file itself")
        if not content.strip():
            raise ValueError("it is empty")
        part = READERS[suffix](content)
        if not part.column_names or not len(part[part.column_names[0]]):
            raise ValueError("it holds no rows")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path}: {error}; save it as UTF-8") from None
    # pyarrow's errors are ValueErrors, those of gzip the last two.
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    return part


def read_parquet(content: bytes):
    from datasets import Dataset
    from pyarrow import parquet

    return Dataset(parquet.read_table(io.BytesIO(content)))


def read_arrow(content: bytes):
    from datasets import Dataset
    from pyarrow import ArrowInvalid, ipc

    try:
        return Dataset(ipc.open_stream(content).read_all())  # as `datasets` writes
    except ArrowInvalid:
        return Dataset(ipc.open_file(content).read_all())  # as pandas' to_feather does


def read_json(content: bytes) -> Table:
    """Reads an array of objects, or one object after another, on a line each or on several."""
    text = content.decode().strip()
    decoder = json.JSONDecoder()
    rows = []
    end = 0
    while end < len(text):
        # Over the whole text, so that an error says its line.
        row, end = decoder.raw_decode(text, re.compile(r"\s*").match(text, end).end())
        rows.append(row)
    if isinstance(rows[0], list):
        rows = rows[0]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("it holds no JSON object for each row")
    names = dict.fromkeys(itertools.chain.from_iterable(rows))
    return Table({name: [row.get(name) for row in rows] for name in names})


def read_csv(content: bytes) -> Table:
    text = content.decode()
    header, _, _ = text.partition("\n")
    separator = max(",;\t", key=header.count)
    csv.field_size_limit(2**31 - 1)
    lines = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        # Where people put a space behind each comma, a quote after it opens a field too.
        skipinitialspace=f"{separator} " in header,
        # Most quotes that are left open, which take the next rows into their field, are
        # then errors.
        strict=True,
    )
    try:
        return as_table(list(lines))
    except csv.Error as error:
        raise ValueError(
            f"line {lines.line_num}: {error}; a quote within a field in quotes is doubled"
        ) from None


def read_tsv(content: bytes) -> Table:
    """Reads a file in which a quote is a character like any other, as in GLUE's.

    A spreadsheet puts a field in quotes where it holds a quote, which is then doubled, a
    tab or a line end, and some put all in quotes, the header too. A file is taken for one
    of those where all of its quotes are of that kind, and one of these reasons is there.
    """
    quoted = re.findall(QUOTED, content) if ALL_QUOTED.fullmatch(content) else []
    has_doubled = any(b'""' in field[1:-1] for field in quoted)
    has_break = any(b"\t" in field or b"\n" in field for field in quoted)
    # Where all lines have as many tabs there is no tab or line end within a field.
    tabs = {line.count(b"\t") for line in content.split(b"\n") if line.strip()}
    if quoted and (content.startswith(b'"') or has_doubled or (has_break and len(tabs) > 1)):
        return read_csv(content)
    lines = content.decode().split("\n")
    return as_table([line.removesuffix("\r").split("\t") for line in lines])


def as_table(lines: list[list[str]]) -> Table:
    """Returns the columns of lines of fields, of which the first is the header.

    All fields are text: 007 is not 7, and null is a word. An empty field is a missing one,
    and so is one at the end of a row that has fewer fields than the header.
    """
    header, *rows = [fields for fields in lines if any(fields)]
    names = [name for name in header if name]
    if len(set(names)) < len(names):
        raise ValueError(f"its header names a column twice: {', '.join(names)}")
    for number, row in enumerate(rows):
        if any(row[len(header) :]):
            raise ValueError(f"row {number} has {len(row)} fields, the header {len(header)}")
    columns = itertools.zip_longest(header, *rows, fillvalue="")
    return Table({name: [field or None for field in fields] for name, *fields in columns if name})


READERS = {
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
}
