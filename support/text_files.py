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

from support.columns import has_texts

ROWS_AT_ONCE = 1000

# -----------------------------------------------------------------------------
# JSON

# What may be between two values. Concatenated files contain byte order marks.
BETWEEN = re.compile("[ \t\n\r\ufeff]*")
# Advice, by the first character that is not JSON.
CURES = {
    "'": "; texts must be in double quotes, as json.dumps writes them",
    ",": "; there is no comma between objects, unless all are within [ ]",
}


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
    """Returns all values in a text. Raises ValueError with the line and, if known, the cure."""
    decoder = json.JSONDecoder()
    values = []
    end = BETWEEN.match(text).end()
    try:
        while end < len(text):
            # Decoded from the whole text, so that an error gives the line.
            value, end = decoder.raw_decode(text, end)
            values.append(value)
            end = BETWEEN.match(text, end).end()
    except json.JSONDecodeError as error:
        cure = CURES.get(text[error.pos : error.pos + 1], "")
        raise ValueError(f"{error}{cure}") from None
    return values


def columns_of_rows(rows: list) -> dict[str, list]:
    """Returns the columns of a list of objects, each a row or an object with a row in a field."""
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(
                f"it holds no JSON object for each row: row {number} is {json.dumps(row)[:60]}; "
                'pandas\' to_json(path, orient="records") writes {"premise": ..., "label": ...}'
            )
    names = dict.fromkeys(itertools.chain.from_iterable(rows))
    if rows and not has_texts(names):
        fields = [name for name, inner in rows[0].items() if is_row(inner)]
        if len(fields) == 1:
            return columns_of_rows([row.get(fields[0]) for row in rows])
    return {name: [row.get(name) for row in rows] for name in names}


def columns_of_object(value: dict) -> dict[str, list]:
    """Returns the columns of an object that is the whole file, in one of these forms:

    {"premise": ["a", "b"], ...}                            a list for each column
    {"premise": {"0": "a", "1": "b"}, ...}                  pandas' to_json(path)
    {"id0": {"premise": "a", ...}, ...}                     pandas' orient="index"
    {"columns": ["premise", ...], "data": [["a", ...]]}     pandas' orient="split"
    {"version": 1, "data": [{"premise": "a", ...}, ...]}    rows, or one of these forms, in a field
    {"premise": "a", ...}                                   a single row
    """
    if is_split(value):
        names = map(str, value["columns"])
        rows = of_one_length(value["data"], len(value["columns"]))
        return {name: list(values) for name, values in zip(names, zip(*rows))}
    field = field_of_rows(value)
    if field is not None:
        inner = value[field]
        return columns_of_rows(inner) if isinstance(inner, list) else columns_of_object(inner)
    for kind, columns_of in ((list, columns_of_lists), (dict, columns_of_objects)):
        # Either all fields are columns or rows, or those of this type include the usual texts.
        fields = {name: inner for name, inner in value.items() if isinstance(inner, kind)}
        if has_texts(fields) or len(fields) == len(value):
            return columns_of(fields)
    return columns_of_rows([value])


def field_of_rows(value: dict) -> str | None:
    """Returns the name of the field that holds a file's rows, or None if there is none."""
    if has_texts(value):
        return None
    fields = [name for name, inner in value.items() if has_usual_texts(inner)]
    # With unusual names: a list of objects. Beside usual names such a list may describe columns.
    fields = fields or [name for name, inner in value.items() if is_list(inner) or is_split(inner)]
    if len(fields) > 1:
        names = " and in ".join(fields)
        raise ValueError(f"it holds rows in {names}: write each into a file of its own")
    return fields[0] if fields else None


def has_usual_texts(value) -> bool:
    """Returns whether a value is rows or columns that have both texts under usual names."""
    if isinstance(value, dict):
        columns = (name for name, inner in value.items() if isinstance(inner, (list, dict)))
        return has_texts(columns) or any(map(is_row, value.values()))
    return is_list(value) and (has_texts(value[0]) or any(map(is_row, value[0].values())))


def is_row(value) -> bool:
    """Returns whether a value is an object with both texts under usual names."""
    return isinstance(value, dict) and has_texts(
        name for name, inner in value.items() if isinstance(inner, str)
    )


def is_list(value, kind: type = dict) -> bool:
    """Returns whether a value is a list, not empty, whose elements are all of type `kind`."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, kind) for row in value)


def is_split(value) -> bool:
    """Returns whether a value is an object in the form of pandas' orient="split"."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("columns"), list)
        and is_list(value.get("data"), list)
    )


def columns_of_lists(columns: dict[str, list]) -> dict[str, list]:
    """Returns columns unchanged. Raises ValueError unless all have the same number of values."""
    if len(set(map(len, columns.values()))) > 1:
        lengths = ", ".join(f"{name} {len(values)}" for name, values in columns.items())
        raise ValueError(f"its columns differ in length: {lengths}")
    return columns


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

# A field in quotes, and a file in which every quote belongs to such a field.
QUOTED = re.compile(r'"[^"]*+(?:""[^"]*+)*+"')
ALL_QUOTED = re.compile(rf'(?:(?:{QUOTED.pattern}|[^"\t\n]*+)(?:\t|\r?\n|\Z))*+')


def read_table(text: str) -> dict[str, list]:
    """Reads a table. The separator is the most frequent of , ; | and tab in its header.

    In a table with tabs a quote is an ordinary character, as in GLUE's files, unless a
    spreadsheet has written it.
    """
    # Concatenated files contain byte order marks, and some files for Excel begin with "sep=;".
    text = re.sub("\\Asep=.[\r\n]+", "", text.strip("\r\n").replace("\n\ufeff", "\n"))
    header = re.match(r"[^\r\n]*", text)[0]
    separator = max(",;|\t", key=header.count)
    if separator == "\t":
        if "\n" not in text:  # line ends of old Macs, and of Excel for them
            text = text.replace("\r", "\n")
        lines = [line.removesuffix("\r").split("\t") for line in text.split("\n")]
        # A CR stands in for a quote after a backslash: both are reasons to quote a field.
        forms = (text, text.replace('\\"', "\r"))
        if not any(has_spreadsheets_quotes(form, lines) for form in forms):
            return as_columns(lines)
    try:
        return as_columns(split_quoted(text, separator, header))
    except ValueError as error:
        if '\\"' not in text:
            raise
        # MySQL and Spark write a quote within a field after a backslash, and do not double it. A
        # backslash before any other character is an ordinary character, so it is doubled.
        escaped = re.sub(r'(\\["\\])|\\', lambda found: found[1] or r"\\", text)
        try:
            return as_columns(split_quoted(escaped, separator, header, escapechar="\\"))
        except ValueError:
            raise error from None


def has_spreadsheets_quotes(text: str, lines: list[list[str]]) -> bool:
    """Returns whether the quotes in a table with tabs come from a spreadsheet.

    A spreadsheet quotes a field that is empty or contains a quote (which is doubled), a tab, a
    line end or a comma, or it quotes all texts. So every quote must be of this form, and one of
    these reasons must be present. `lines` are the fields if quotes are ordinary characters.
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
    """Returns whether all lines that are not empty have as many fields as the first one."""
    return all(len(line) == len(lines[0]) for line in lines if any(line))


def split_quoted(
    text: str, separator: str, header: str, escapechar: str | None = None
) -> Iterator[list[str]]:
    """Yields the fields of each row. Some may be in quotes, and a quote in these is doubled.

    Raises ValueError with the line where an invalid row begins.
    """
    # No field is longer than the text. Python's default limit is 131,072.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    lines = csv.reader(
        # (A StringIO takes four bytes per character, and more time.)
        io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8", newline=""),
        delimiter=separator,
        escapechar=escapechar,
        skipinitialspace=has_spaces(text, separator, header),
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


def has_spaces(text: str, separator: str, header: str) -> bool:
    """Returns whether a space follows each separator, so that a quote after it opens a field.

    This is the case if the header has such spaces, or if a row has one before its first quoted
    field, or before its second field if the first one is quoted.
    """
    if all(name[:1] == " " for name in header.split(separator)[1:]):
        return True
    quoted = re.compile(rf'{re.escape(separator)} "[^"\n]+"{re.escape(separator)}')
    before = re.compile(rf'[^"\n]*|{QUOTED.pattern}')
    return any(
        before.fullmatch(text, text.rfind("\n", 0, field.start()) + 1, field.start())
        for field in quoted.finditer(text)
    )


def as_columns(lines: Iterable[list[str]]) -> dict[str, list]:
    """Returns the columns of lines of fields. The first line is the header.

    All fields are text: 007 is not 7, and null is a word. An empty field becomes None, and so
    does a missing field at the end of a row.
    """
    lines = filter(any, lines)
    first = next(lines, [])
    header = list(first)
    while header and not header[-1]:  # empty fields that a spreadsheet adds to each line
        header.pop()
    for number, name in enumerate(header):
        if name and name in header[:number]:
            raise ValueError(f"its header has {name} twice")
    # In concatenated files the header occurs again.
    rows = of_one_length((row for row in lines if row != first), len(header))
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
