"""Rows from files of text, as other tools write them: JSON, and tables with a separator.

The functions take the whole text of a file and return its columns by name, as lists. All
fields of a table are texts, or None. Raises ValueError if there are no rows to be seen.
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

# What may stand between two values. Files that were put one behind another hold marks.
BETWEEN = re.compile("[ \t\n\r\ufeff]*")
# What is wrong where this letter is the first that is no JSON.
CURES = {
    "'": "; a text stands in double quotes, as json.dumps writes it",
    ",": "; no comma stands between objects, unless all are within [ ]",
}


def read_json(text: str) -> dict[str, list]:
    """Reads objects one after another, on a line each or on several, or what one value holds."""
    values = json_values(text.strip())
    if len(values) == 1 and isinstance(values[0], dict):
        return columns_of_object(values[0])
    rows = []
    for value in values:
        rows += value if isinstance(value, list) else [value]
    return columns_of_rows(rows)


def json_values(text: str) -> list:
    """Returns all values of a text. Raises ValueError with the line and, where known, the cure."""
    decoder = json.JSONDecoder()
    values = []
    end = BETWEEN.match(text).end()
    try:
        while end < len(text):
            # Over the whole text, so that an error says its line.
            value, end = decoder.raw_decode(text, end)
            values.append(value)
            end = BETWEEN.match(text, end).end()
    except json.JSONDecodeError as error:
        cure = CURES.get(text[error.pos : error.pos + 1], "")
        raise ValueError(f"{error}{cure}") from None
    return values


def columns_of_rows(rows: list) -> dict[str, list]:
    """Returns the columns of a list of objects, each of which is a row or has one in a field."""
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
    """Returns the columns of a file's only object. It may have one of these forms:

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
        # All fields are columns or rows, or those are that count.
        fields = {name: inner for name, inner in value.items() if isinstance(inner, kind)}
        if has_texts(fields) or len(fields) == len(value):
            return columns_of(fields)
    return columns_of_rows([value])


def field_of_rows(value: dict) -> str | None:
    """Returns the name of the field of an object that holds a file's rows, if one does."""
    if has_texts(value):
        return None
    fields = [name for name, inner in value.items() if has_usual_texts(inner)]
    # Under other names: a list of objects. Beside usual names it may describe the columns.
    fields = fields or [name for name, inner in value.items() if is_list(inner) or is_split(inner)]
    if len(fields) > 1:
        names = " and in ".join(fields)
        raise ValueError(f"it holds rows in {names}: write each into a file of its own")
    return fields[0] if fields else None


def has_usual_texts(value) -> bool:
    """Returns whether a value is rows, or columns, with both texts under their usual names."""
    if isinstance(value, dict):
        columns = (name for name, inner in value.items() if isinstance(inner, (list, dict)))
        return has_texts(columns) or any(map(is_row, value.values()))
    return is_list(value) and (has_texts(value[0]) or any(map(is_row, value[0].values())))


def is_row(value) -> bool:
    """Returns whether a value is an object with two texts under their usual names."""
    return isinstance(value, dict) and has_texts(
        name for name, inner in value.items() if isinstance(inner, str)
    )


def is_list(value, kind: type = dict) -> bool:
    """Returns whether a value is a list of objects, or of another kind. An empty one is none."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, kind) for row in value)


def is_split(value) -> bool:
    """Returns whether a value is an object in the form of pandas' orient="split"."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("columns"), list)
        and is_list(value.get("data"), list)
    )


def columns_of_lists(columns: dict[str, list]) -> dict[str, list]:
    """Returns columns as they are. Raises ValueError unless all have as many values."""
    if len(set(map(len, columns.values()))) > 1:
        lengths = ", ".join(f"{name} {len(values)}" for name, values in columns.items())
        raise ValueError(f"its columns are not of one length: {lengths}")
    return columns


def columns_of_objects(objects: dict[str, dict]) -> dict[str, list]:
    """Returns the columns of objects that are columns, {row: value}, or rows, {column: value}."""
    inner_names = dict.fromkeys(itertools.chain.from_iterable(objects.values()))
    # Under other names than the usual a table is taken to have more rows than columns.
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
    """Reads a table whose separator is what its header has most of: , ; | or a tab.

    Between tabs a quote is a character like any other, as in GLUE's files.
    """
    # Files that were put one behind another hold marks, and some for Excel begin with "sep=;".
    text = re.sub("\\Asep=.[\r\n]+", "", text.strip("\r\n").replace("\n\ufeff", "\n"))
    header = re.match(r"[^\r\n]*", text)[0]
    separator = max(",;|\t", key=header.count)
    if separator == "\t":
        if "\n" not in text:  # as an old Mac, and Excel for it, ends lines
            text = text.replace("\r", "\n")
        lines = [line.removesuffix("\r").split("\t") for line in text.split("\n")]
        # A CR may stand for a quote behind a backslash: either gives a field a reason for quotes.
        forms = (text, text.replace('\\"', "\r"))
        if not any(has_spreadsheets_quotes(form, lines) for form in forms):
            return as_columns(lines)
    try:
        return as_columns(split_quoted(text, separator, header))
    except ValueError as error:
        if '\\"' not in text:
            raise
        # As MySQL and Spark write a quote within a field: behind a backslash, and not doubled.
        # A backslash before any other letter is a letter: it becomes two.
        escaped = re.sub(r'(\\["\\])|\\', lambda found: found[1] or r"\\", text)
        try:
            return as_columns(split_quoted(escaped, separator, header, escapechar="\\"))
        except ValueError:
            raise error from None


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


def split_quoted(
    text: str, separator: str, header: str, escapechar: str | None = None
) -> Iterator[list[str]]:
    """Yields the fields of each row, of which some stand in quotes. A quote in these is doubled.

    Raises ValueError with the line where a wrong row begins.
    """
    # No field is longer than the text. Python's limit is at 131,072.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    lines = csv.reader(
        # (A StringIO takes four bytes for each letter, and longer.)
        io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8", newline=""),
        delimiter=separator,
        escapechar=escapechar,
        skipinitialspace=has_spaces(text, separator, header),
        # Most quotes that are left open, which take the next rows into their field, are
        # then errors.
        strict=True,
    )
    start = 1
    try:
        for row in lines:
            yield row
            start = lines.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"line {start}: {error}; a quote within a field in quotes is doubled"
        ) from None


def has_spaces(text: str, separator: str, header: str) -> bool:
    """Returns whether a space stands behind each separator, so that a quote after it opens a field.

    It does if the header has them, or if a row has one behind a field in quotes, or its first.
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
    """Returns the columns of lines of fields, of which the first is the header.

    All fields are text: 007 is not 7, and null is a word. An empty field is a missing one,
    and so is one at the end of a row that has fewer fields than the header.
    """
    lines = filter(any, lines)
    first = next(lines, [])
    header = list(first)
    while header and not header[-1]:  # fields that a spreadsheet puts at the end of each line
        header.pop()
    for number, name in enumerate(header):
        if name and name in header[:number]:
            raise ValueError(f"its header has {name} twice")
    # Where files were put one behind another the header comes again.
    rows = of_one_length((row for row in lines if row != first), len(header))
    columns = [[] for _ in header]
    # Some at a time: as lists of fields the rows take much more memory than as columns.
    while some := list(itertools.islice(rows, ROWS_AT_ONCE)):
        for column, fields in zip(columns, zip(*some)):
            column += [field or None for field in fields]
    return {name: column for name, column in zip(header, columns) if name}


def of_one_length(rows: Iterable[list], length: int) -> Iterator[list]:
    """Yields rows with as many fields as the header: empty ones at the end come, or go."""
    for number, row in enumerate(rows):
        if len(row) != length:
            if any(row[length:]):
                raise ValueError(
                    f"row {number} has {len(row)} fields, the header (its first line) {length}"
                )
            row = row[:length] + [None] * (length - len(row))
        yield row
