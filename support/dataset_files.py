"""Files of rows as other tools have written them: which split a file holds, and how it is read.

To read one more form, add a word to SPLITS, or a suffix and its function to READERS at the
end. What a row must hold is the matter of columns.py and labels.py.

Local files are read here, and not by load_dataset: its cache knows a file by its name and
time alone, and gives the rows of another that has the same, and its readers guess at types
and quotes.
"""

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from pathlib import Path

import pyarrow
from pyarrow import ipc, parquet

# The word in a file's name that says its split. What follows it is kept: dev_matched is
# validation_matched.
SPLITS = {"train": "train", "test": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
# The number of a part: train-00000-of-00002, also with -a09b74b3ef9c3b56 behind it; 0000;
# train_0, but not train_v1.0; part-00000-...-c000.snappy (Spark).
PART = re.compile(r"(?:^|[-_]|(?<!\d)\.)(\d+)(?:-of-(\d+))?(?:-[0-9a-f-]{16,36}(?:-c\d+.*)?)?$")
# A field in quotes, and a file in which every quote belongs to such a field.
QUOTED = re.compile(r'"[^"]*+(?:""[^"]*+)*+"')
ALL_QUOTED = re.compile(rf'(?:(?:{QUOTED.pattern}|[^"\t\n]*+)(?:\t|\r?\n|\Z))*+')


# -----------------------------------------------------------------------------
# Which files hold which split


def find_files(directory: Path) -> dict[str, list[Path]]:
    """Returns the files of each split: those in the directory, or up to two folders below."""
    for pattern in ("[!.]*", "[!.]*/[!.]*", "[!.]*/[!.]*/[!.]*"):
        splits = {}
        # Sorted, because glob has no order and the order of the rows decides the batches.
        for path in sorted(directory.glob(pattern), key=by_numbers):
            split = split_of(path, directory)
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


def by_numbers(path: Path) -> list[str | int]:
    """Returns what sorts train_2 before train_10."""
    return [int(word) if word.isdecimal() else word for word in re.split(r"(\d+)", str(path))]


def split_of(path: Path, directory: Path) -> str | None:
    """Returns the split that a file of a dataset holds, or None when its name does not say."""
    stem, suffix = stem_and_suffix(path)
    if suffix not in READERS or path.is_dir():
        return None
    stem = PART.sub("", stem)
    if stem not in ("", "data", "part"):
        return split_name(stem)
    # The folder says it: train/0000.parquet, train/part-00000.parquet,
    # train/data-00000-of-00001.arrow. save_to_disk of one split writes into any folder.
    is_one_split = suffix == ".arrow" and path.parent == directory
    return split_name(path.parent.absolute().name) or ("train" if is_one_split else None)


def split_name(name: str) -> str | None:
    """Returns "validation_matched" for multinli_1.0_dev_matched, None for notes."""
    words = re.findall("[a-z]+[0-9]*|[0-9]+", name.lower())
    for place, word in enumerate(words):
        if word in SPLITS:
            return "_".join([SPLITS[word], *words[place + 1 :]])
    return None


def with_train(splits: dict) -> dict:
    """Returns the splits, of which train_en, say, is called train where it is the only one."""
    trains = [name for name in splits if name.startswith("train")]
    return {"train" if trains == [name] else name: value for name, value in splits.items()}


def check_parts(split: str, paths: list[Path]) -> None:
    """Raises ValueError unless the files are one, or all the parts of one.

    Otherwise they are two formats of the same rows, or parts of two datasets.
    """
    names = [(path.parent, *stem_and_suffix(path)) for path in paths]
    parts = list(filter(None, (PART.search(stem) for _, stem, _ in names)))
    numbers = sorted(int(part[1]) for part in parts)
    counts = {int(part[2]) for part in parts if part[2]}
    total = len(paths)
    is_one = total == 1 and not counts  # whatever number is in its name
    is_whole = numbers in (list(range(total)), list(range(1, total + 1))) and counts <= {total}
    kinds = {(folder, PART.sub("", stem), suffix) for folder, stem, suffix in names}
    if not is_one and not (is_whole and len(kinds) == 1):
        raise ValueError(
            f"{' and '.join(map(str, paths[:3]))}: not one file, and not all parts of one, for "
            f"the split {split}; remove what is not meant, or pass the folder that is"
        )


def stem_and_suffix(path: Path) -> tuple[str, str]:
    """Returns "train" and ".jsonl" for Train.jsonl.gz."""
    name = Path(path.name.lower().removesuffix(".gz"))
    return name.stem, name.suffix


# -----------------------------------------------------------------------------
# Reading them: each function returns the columns of a file, by name


def read_file(path: Path) -> dict[str, list]:
    """Reads a file by its suffix. Raises ValueError where it cannot, and where it has no rows."""
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):  # as .gz files do, and some that are not called so
            content = gzip.decompress(content)
        if content.startswith(b"version https://git-lfs"):
            raise ValueError("it is a Git LFS pointer; `git lfs pull` fetches the file itself")
        columns = READERS[stem_and_suffix(path)[1]](content)
        if not any(columns.values()):
            raise ValueError("it holds no rows")
    # gzip raises EOFError and zlib's, json RecursionError.
    except (
        OSError, ValueError, EOFError, zlib.error, RecursionError, csv.Error, pyarrow.ArrowException
    ) as error:
        cure = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}{cure}") from None
    return columns


def arrow_columns(table: pyarrow.Table) -> dict[str, list]:
    """Returns the columns of a table. Numbers that have names in it become the names."""
    columns = table.to_pydict()
    # Here `datasets` keeps the names.
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features") or {}
    for column, feature in features.items():
        if column in columns and isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            names = dict(enumerate(feature["names"]))
            columns[column] = [names.get(value, value) for value in columns[column]]
    return columns


def read_parquet(content: bytes) -> dict[str, list]:
    return arrow_columns(parquet.read_table(io.BytesIO(content)))


def read_arrow(content: bytes) -> dict[str, list]:
    if content.startswith(b"ARROW1"):  # as pandas' to_feather writes it
        return arrow_columns(ipc.open_file(content).read_all())
    if not content.endswith(b"\xff\xff\xff\xff\0\0\0\0"):
        raise ValueError("its end is missing")
    return arrow_columns(ipc.open_stream(content).read_all())


def read_json(content: bytes) -> dict[str, list]:
    """Reads an array of objects, or one object after another, on a line each or on several."""
    text = content.decode("utf-8-sig").strip()
    decoder = json.JSONDecoder()
    rows = []
    end = 0
    while end < len(text):
        # Over the whole text, so that an error says its line.
        value, end = decoder.raw_decode(text, json.decoder.WHITESPACE.match(text, end).end())
        rows += value if isinstance(value, list) else [value]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("it holds no JSON object for each row")
    if len(rows) == 1 and all(isinstance(value, dict) for value in rows[0].values()):
        # One object for each column, as pandas' to_json(path) writes them: {row: value}.
        keys = dict.fromkeys(itertools.chain.from_iterable(rows[0].values()))
        rows = [{name: values.get(key) for name, values in rows[0].items()} for key in keys]
    names = dict.fromkeys(itertools.chain.from_iterable(rows))
    return {name: [row.get(name) for row in rows] for name in names}


def read_table(content: bytes) -> dict[str, list]:
    """Reads a table whose separator is what its header has most of: comma, semicolon or tab.

    Between tabs a quote is a character like any other, as in GLUE's files.
    """
    text = content.decode("utf-8-sig").strip("\r\n")  # without the mark that Excel puts first
    separator = max(",;\t", key=first_line(text).count)
    if separator != "\t":
        return read_quoted(text, separator)
    lines = [line.removesuffix("\r").split("\t") for line in text.split("\n")]
    return read_quoted(text, "\t") if has_spreadsheets_quotes(text, lines) else as_columns(lines)


def first_line(text: str) -> str:
    return re.split(r"[\r\n]", text, maxsplit=1)[0]


def has_spreadsheets_quotes(text: str, lines: list[list[str]]) -> bool:
    """Returns whether a spreadsheet has put the quotes into a table with tabs.

    It puts a field in quotes where it holds a quote, which is then doubled, a tab, a line
    end or a comma, where it is empty, or it puts all texts in quotes. So all quotes have to
    be of that kind, and one of these reasons has to be there. `lines` are the fields without
    regard to quotes.
    """
    if '"' not in text or not ALL_QUOTED.fullmatch(text):
        return False
    fields = [field[1:-1] for field in QUOTED.findall(text)]
    if any(map(re.compile(r"[\t\n]").search, fields)):
        quoted = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))
        return is_even(quoted) and not is_even(lines)
    are_all_texts = len(fields) >= 2 * (len(lines) - 1)
    has_reason = any(map(re.compile(r'""|\r|^$').search, fields))
    has_commas = all("," in field for field in fields) and "," not in QUOTED.sub("", text)
    return are_all_texts or has_reason or has_commas


def is_even(lines: list[list[str]]) -> bool:
    """Returns whether all lines have as many fields as the first."""
    return all(len(line) == len(lines[0]) for line in lines if any(line))


def read_quoted(text: str, separator: str) -> dict[str, list]:
    """Reads a table in which a field may stand in quotes."""
    lines = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        # Where people put a space behind each comma, a quote after it opens a field too.
        skipinitialspace=re.search(rf'(?m)^("?)[^"\n]*\1{separator} "[^"\n]+"{separator}', text)
        or all(name[:1] == " " for name in first_line(text).split(separator)[1:]),
        # Most quotes that are left open, which take the next rows into their field, are
        # then errors.
        strict=True,
    )
    try:
        return as_columns(list(lines))
    except csv.Error as error:
        raise ValueError(
            f"line {lines.line_num}: {error}; a quote within a field in quotes is doubled"
        ) from None


def as_columns(lines: list[list[str]]) -> dict[str, list]:
    """Returns the columns of lines of fields, of which the first is the header.

    All fields are text: 007 is not 7, and null is a word. An empty field is a missing one,
    and so is one at the end of a row that has fewer fields than the header.
    """
    header, *rows = list(filter(any, lines)) or [[]]
    while header and not header[-1]:  # fields that a spreadsheet puts at the end of each line
        header.pop()
    columns = {}
    for name, *fields in itertools.zip_longest(header, *rows, fillvalue=""):
        if name in columns:
            raise ValueError(f"its header has {name} twice")
        if name:
            columns[name] = [field or None for field in fields]
    for number, row in enumerate(rows):
        if any(row[len(header) :]):
            raise ValueError(f"row {number} has {len(row)} fields, the header {len(header)}")
    return columns


READERS = {".parquet": read_parquet, ".arrow": read_arrow, ".feather": read_arrow}
READERS |= dict.fromkeys((".jsonl", ".ndjson", ".json"), read_json)
READERS |= dict.fromkeys((".csv", ".tsv"), read_table)
