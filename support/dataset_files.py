"""Files of rows as other tools have written them: which split a file holds, and how it is read.

To read one more form, add a word to SPLITS, or a suffix and its function to READERS at the
end. What a row must hold is the matter of columns.py and labels.py.

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
from typing import NamedTuple

# The word in a file's name that says its split. What follows it is kept: dev_matched is
# validation_matched.
SPLITS = {"train": "train", "test": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
# The number of a part: train-00000-of-00002, also with -a09b74b3ef9c3b56 behind it; 0000;
# train_0; part-00000-...-c000.snappy (Spark).
PART = re.compile(r"(?:^|[-_.])(\d+)(?:-of-(\d+))?(?:-[0-9a-f-]{16,36}(?:-c\d+.*)?)?$")
# A field in quotes, and a file in which every quote belongs to such a field.
QUOTED = re.compile(r'"[^"]*+(?:""[^"]*+)*+"')
ALL_QUOTED = re.compile(rf'(?:(?:{QUOTED.pattern}|[^"\t\n]*+)(?:\t|\r?\n|\Z))*+')

SPACE = re.compile(r"\s*")


# -----------------------------------------------------------------------------
# Which files hold which split


def find_files(directory: Path) -> dict[str, list[Path]]:
    """Returns the files of each split: those in the directory, or up to two folders below."""
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
    if suffix not in READERS or path.is_dir():
        return None
    stem = PART.sub("", stem)
    # train/0000.parquet, train/data-00000-of-00001.arrow, train/part-00000.parquet
    return split_name(path.parent.name if stem in ("", "data", "part") else stem)


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
    numbers, counts = zip(*map(part_of, paths))
    kinds = {(path.parent, path.suffix) for path in paths}
    whole_runs = [list(range(first, first + len(paths))) for first in (0, 1)]
    is_one_file = counts == (0,)  # whatever number is in its name
    are_parts = set(counts) <= {0, len(paths)} and sorted(numbers) in whole_runs
    if len(kinds) > 1 or not (is_one_file or are_parts):
        names = " and ".join(dict.fromkeys([str(paths[0]), str(paths[-1])]))
        raise ValueError(
            f"{names}: not one file, and not all parts of one, for the split {split}; "
            "remove what is not meant, or pass the folder that is"
        )


def part_of(path: Path) -> tuple[int, int]:
    """Returns the number of a part, and of how many: -1 and 0 where its name does not say."""
    stem, _ = stem_and_suffix(path)
    part = PART.search(stem)
    return (int(part[1]), int(part[2] or 0)) if part else (-1, 0)


def stem_and_suffix(path: Path) -> tuple[str, str]:
    """Returns "train" and ".jsonl" for Train.jsonl.gz."""
    name = Path(path.name.lower().removesuffix(".gz"))
    return name.stem, name.suffix


# -----------------------------------------------------------------------------
# Reading them


class Table(NamedTuple):
    """The columns of a file, by name."""

    columns: dict  # lists, or pyarrow's columns, which become lists only where they are needed
    label_names: dict[str, list[str]]  # of the columns whose numbers have names in the file

    def values(self, column: str) -> list:
        """Returns a column. Numbers that have names become the names."""
        values = self.columns[column]
        if not isinstance(values, list):
            values = values.to_pylist()
        names = self.label_names.get(column, [])
        places = range(len(names))
        return [names[int(value)] if value in places else value for value in values]


def read_files(paths: list[Path]) -> dict[str, Table]:
    """Returns the parts of one split, by their paths. They must have the same columns."""
    parts = {str(path): read_file(path) for path in paths}
    first = parts[str(paths[0])].columns
    for path, part in parts.items():
        differing = sorted(part.columns.keys() ^ first.keys())
        if differing:
            raise ValueError(f"{path} and {paths[0]} differ in columns: {', '.join(differing)}")
    return parts


def read_file(path: Path) -> Table:
    """Reads a file by its suffix. Raises ValueError where it cannot, and where it has no rows."""
    _, suffix = stem_and_suffix(path)
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):  # as .gz files do, and some that are not called so
            content = gzip.decompress(content)
        if content.startswith(b"version https://git-lfs"):
            raise ValueError("it is a Git LFS pointer; `git lfs pull` fetches the file itself")
        table = READERS[suffix](content)
        if not any(len(values) for values in table.columns.values()):
            raise ValueError("it holds no rows")
    # pyarrow's errors are ValueErrors, those of gzip the last two.
    except (ValueError, OSError, RecursionError, EOFError, zlib.error) as error:
        cure = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}{cure}") from None
    return table


def arrow_table(table) -> Table:
    """Returns a pyarrow.Table as ours. `datasets` writes names of labels into its metadata."""
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features") or {}
    names = {name: feature["names"] for name, feature in features.items() if "names" in feature}
    return Table(dict(zip(table.column_names, table.columns)), names)


def read_parquet(content: bytes) -> Table:
    from pyarrow import parquet

    return arrow_table(parquet.read_table(io.BytesIO(content)))


def read_arrow(content: bytes) -> Table:
    from pyarrow import ipc

    if content.startswith(b"ARROW1"):  # as pandas' to_feather writes it
        return arrow_table(ipc.open_file(content).read_all())
    if not content.endswith(b"\xff\xff\xff\xff\0\0\0\0"):
        raise ValueError("its end is missing")
    return arrow_table(ipc.open_stream(content).read_all())


def as_text(content: bytes) -> str:
    """Decodes a file's text. Raises ValueError where it is empty or not in UTF-8."""
    text = content.decode("utf-8-sig")  # without the mark that Excel puts first
    if "\0" in text:
        raise ValueError("it holds the byte 0; save it as UTF-8")
    if not text.strip():
        raise ValueError("it is empty")
    return text


def read_json(content: bytes) -> Table:
    """Reads an array of objects, or one object after another, on a line each or on several."""
    text = as_text(content).strip()
    decoder = json.JSONDecoder()
    rows = []
    end = 0
    while end < len(text):
        # Over the whole text, so that an error says its line.
        value, end = decoder.raw_decode(text, SPACE.match(text, end).end())
        rows += value if isinstance(value, list) else [value]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("it holds no JSON object for each row")
    names = dict.fromkeys(itertools.chain.from_iterable(rows))
    return Table({name: [row.get(name) for row in rows] for name in names}, {})


def read_csv(content: bytes) -> Table:
    text = as_text(content).lstrip("\r\n")
    separator = max(",;\t", key=first_line(text).count)
    return read_tsv(content) if separator == "\t" else read_quoted(text, separator)


def first_line(text: str) -> str:
    return re.split(r"[\r\n]", text, maxsplit=1)[0]


def read_tsv(content: bytes) -> Table:
    """Reads a table with tabs. A quote is a character like any other, as in GLUE's files."""
    text = as_text(content).lstrip("\r\n")
    lines = [line.removesuffix("\r").split("\t") for line in text.split("\n") if line.strip()]
    return read_quoted(text, "\t") if is_spreadsheets(text, lines) else as_table(lines)


def is_spreadsheets(text: str, lines: list[list[str]]) -> bool:
    """Returns whether the quotes of a table with tabs were put there by a spreadsheet.

    It puts a field in quotes where it holds a quote, which is then doubled, a tab, a line
    end or a comma, or it puts all in quotes, the header too. So all quotes have to be of
    that kind, and one of these reasons has to be there. `lines` are the fields without
    regard to quotes.
    """
    if '"' not in text or not ALL_QUOTED.fullmatch(text):
        return False
    fields = [field[1:-1] for field in QUOTED.findall(text)]
    if any(map(re.compile(r"[\t\n]").search, fields)):
        # Where each line has the header's fields, no tab or line end was within one of them.
        return is_ragged(lines)
    has_reason = any(map(re.compile(r'""|\r|^$').search, fields))
    has_commas = all("," in field for field in fields) and "," not in QUOTED.sub("", text)
    return text.startswith('"') or has_reason or has_commas


def is_ragged(lines: list[list[str]]) -> bool:
    """Returns whether a line has fewer fields than the first, or more."""
    width = len(lines[0])
    return any(len(line) < width or any(line[width:]) for line in lines)


def read_quoted(text: str, separator: str) -> Table:
    """Reads a table in which a field may stand in quotes."""
    csv.field_size_limit(2**31 - 1)
    names = first_line(text).split(separator)
    lines = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        # Where people put a space behind each comma, a quote after it opens a field too.
        skipinitialspace=all(name.startswith(" ") for name in names[1:]),
        # Most quotes that are left open, which take the next rows into their field, are
        # then errors.
        strict=True,
    )
    try:
        return as_table([line for line in lines if any(line)])
    except csv.Error as error:
        raise ValueError(
            f"line {lines.line_num}: {error}; a quote within a field in quotes is doubled"
        ) from None


def as_table(lines: list[list[str]]) -> Table:
    """Returns the columns of lines of fields, of which the first is the header.

    All fields are text: 007 is not 7, and null is a word. An empty field is a missing one,
    and so is one at the end of a row that has fewer fields than the header.
    """
    header, *rows = lines
    while not header[-1]:  # fields that a spreadsheet puts at the end of each line
        header.pop()
    for name in filter(None, header):
        if header.count(name) > 1:
            raise ValueError(f"its header has {name} twice")
    for number, row in enumerate(rows):
        if any(row[len(header) :]):
            raise ValueError(f"row {number} has {len(row)} fields, the header {len(header)}")
    columns = itertools.zip_longest(header, *rows, fillvalue="")
    fields_of = {name: [field or None for field in fields] for name, *fields in columns if name}
    return Table(fields_of, {})


READERS = {
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
}
