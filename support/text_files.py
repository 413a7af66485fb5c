"""Reads rows from text files, as other tools write them: JSON, and tables with a separator.

The functions take the whole text of a file and return its columns by name, as lists. All
fields of a table are strings or None. They raise ValueError if they cannot find rows.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator

from support.columns import check_names, has_texts

ROWS_AT_ONCE = 1000

# -----------------------------------------------------------------------------
# JSON

# What may be between two values. Concatenated files contain byte order marks.
BETWEEN = re.compile("[ \t\n\r\ufeff]*")


def read_json(text: str) -> dict[str, list]:
    """Reads objects that follow one another, on one line each or on several, or a single value."""
    values = json_values(text.strip())
    if len(values) == 1 and isinstance(values[0], dict):
        return columns_of_object(values[0])
    rows = []
    for value in values:
        rows += value if isinstance(value, list) else [value]
    return columns_of_rows(rows)


def json_values(text: str) -> list:
    """Returns all values in a text. Raises ValueError with the line."""
    decoder = json.JSONDecoder()
    values = []
    end = 0
    # Decoded from the whole text, so that an error gives the line.
    while (end := BETWEEN.match(text, end).end()) < len(text):
        value, end = decoder.raw_decode(text, end)
        values.append(value)
    return values


def columns_of_rows(rows: list) -> dict[str, list]:
    """Returns the columns of a list of objects, one for each row."""
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(
                f"it holds no JSON object for each row: row {number} is {json.dumps(row)[:60]}; "
                'pandas\' to_json(path, orient="records") writes {"premise": ..., "label": ...}'
            )
    names = dict.fromkeys(itertools.chain.from_iterable(rows))
    return {name: [row.get(name) for row in rows] for name in names}


def columns_of_object(value: dict) -> dict[str, list]:
    """Returns the columns of an object that is the whole file, in one of these forms:

    {"premise": ["a", "b"], ...}                   a list for each column
    {"premise": {"0": "a", "1": "b"}, ...}         pandas' to_json(path)
    {"id0": {"premise": "a", ...}, ...}            pandas' orient="index"
    {"version": 1, "data": [{"premise": "a"}]}     a list of rows in a field
    {"premise": "a", ...}                          a single row
    """
    fields = [] if has_texts(value) else [name for name in value if has_rows(value[name])]
    if len(fields) > 1:
        names = " and in ".join(fields)
        raise ValueError(f"it holds rows in {names}: write each into a file of its own")
    if fields:
        return columns_of_rows(value[fields[0]])
    if all(isinstance(inner, list) for inner in value.values()):
        return value
    if all(isinstance(inner, dict) for inner in value.values()):
        return columns_of_objects(value)
    return columns_of_rows([value])


def has_rows(value) -> bool:
    """Returns whether a value is a list, not empty, of objects."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def columns_of_objects(objects: dict[str, dict]) -> dict[str, list]:
    """Returns the columns of objects that are columns, {row: value}, or rows, {column: value}."""
    inner_names = dict.fromkeys(itertools.chain.from_iterable(objects.values()))
    # Without usual names, a table is assumed to have more rows than columns.
    are_rows = has_texts(inner_names) or len(inner_names) < len(objects)
    if are_rows and not has_texts(objects):
        return columns_of_rows(list(objects.values()))
    return {name: [inner.get(row) for row in inner_names] for name, inner in objects.items()}


# -----------------------------------------------------------------------------
# Tables

# A field in quotes. A quote within it is doubled.
QUOTED = r'"[^"]*+(?:""[^"]*+)*+"'


def read_table(text: str) -> dict[str, list]:
    """Reads a table. The separator is the most frequent of , ; | and tab in its header."""
    # No field is longer than the text. Python's default limit is 131,072.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    text = text.strip("\r\n")
    header = re.match(r"[^\r\n]*", text)[0]
    separator = max(",;|\t", key=header.count)
    # MySQL and Spark write a quote within a field after a backslash, and do not double it.
    if '\\"' in text and not is_quoted(text, separator):
        doubled = re.sub(r'\\(["\\])', lambda found: found[1].replace('"', '""'), text)
        text = doubled if is_quoted(doubled, separator) else text
    if separator == "\t":
        if "\n" not in text:  # line ends of old Macs, and of Excel for them
            text = text.replace("\r", "\n")
        lines = [line.removesuffix("\r").split("\t") for line in text.split("\n")]
        if not has_quoted_fields(text, lines):
            return as_columns(lines)
    return as_columns(split_quoted(text, separator))


def is_quoted(text: str, separator: str) -> bool:
    """Returns whether every quote in a table belongs to a field in quotes."""
    field = rf'(?:{QUOTED}|[^"{separator}\n]*+)'
    return bool(re.fullmatch(rf"(?:{field}(?:[{separator}]|\r?\n|\Z))*+", text))


def has_quoted_fields(text: str, lines: list[list[str]]) -> bool:
    """Returns whether the quotes in a table with tabs surround fields, as spreadsheets write them.

    Otherwise, as in GLUE's files, a quote is an ordinary character, and the fields are `lines`.
    """
    if '"' not in text or not is_quoted(text, "\t"):
        return False
    if not any(re.search(r"[\t\n]", field) for field in re.findall(QUOTED, text)):
        return True
    # Two ordinary quotes, lines apart, would make one field of all that is between them.
    quoted = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))
    return is_even(quoted) and not is_even(lines)


def is_even(lines: list[list[str]]) -> bool:
    """Returns whether all lines that are not empty have as many fields as the first one."""
    return all(len(line) == len(lines[0]) for line in lines if any(line))


def split_quoted(text: str, separator: str) -> Iterator[list[str]]:
    """Yields the fields of each row. Some may be in quotes, and a quote in these is doubled.

    If a space follows each separator in one of the first two lines, such spaces are skipped.
    Raises ValueError with the line where an invalid row begins.
    """
    is_spaced = any(
        line.count(separator) == line.count(f"{separator} ") > 1
        for line in text.split("\n", maxsplit=2)[:2]
    )
    lines = csv.reader(
        # (A StringIO takes four bytes per character, and more time.)
        io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8", newline=""),
        delimiter=separator,
        skipinitialspace=is_spaced,
        # With strict, most unclosed quotes, which would swallow the rows after them, are errors.
        strict=True,
    )
    start = 1
    try:
        for row in lines:
            yield row
            start = lines.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"line {start}: {error}; a quote within a field in quotes must be doubled"
        ) from None


def as_columns(lines: Iterable[list[str]]) -> dict[str, list]:
    """Returns the columns of lines of fields. The first line is the header.

    All fields are text: 007 is not 7, and null is a word. An empty field becomes None, and so
    does a missing field at the end of a row.
    """
    lines = filter(any, lines)
    header = list(next(lines, []))
    while header and not header[-1]:  # empty fields that a spreadsheet adds to each line
        header.pop()
    check_names(list(filter(None, header)))
    rows = of_one_length(lines, len(header))
    columns = [[] for _ in header]
    # Some rows at a time, because lists of fields take much more memory than columns.
    while some := list(itertools.islice(rows, ROWS_AT_ONCE)):
        for column, fields in zip(columns, zip(*some)):
            column += [field or None for field in fields]
    return {name: column for name, column in zip(header, columns) if name}


def of_one_length(rows: Iterable[list], length: int) -> Iterator[list]:
    """Yields rows with `length` fields each: adds empty fields at the end, or removes them."""
    for number, row in enumerate(rows):
        if len(row) != length:
            if any(row[length:]):
                raise ValueError(
                    f"row {number} has {len(row)} fields, the header (its first line) {length}"
                )
            row = row[:length] + [None] * (length - len(row))
        yield row
