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
    {"columns": ["premise"], "data": [["a"]]}      pandas' orient="split"
    {"version": 1, "data": [{"premise": "a"}]}     a list of rows in a field
    {"premise": "a", ...}                          a single row
    """
    if is_split(value):
        rows = of_one_length(value["data"], len(value["columns"]))
        return dict(zip(value["columns"], map(list, zip(*rows))))
    fields = [] if has_texts(value) else [name for name in value if has_elements(value[name], dict)]
    if len(fields) > 1:
        names = " and in ".join(fields)
        raise ValueError(f"it holds rows in {names}: write each into a file of its own")
    if fields:
        return columns_of_rows(value[fields[0]])
    if all(isinstance(inner, list) for inner in value.values()):
        if len(set(map(len, value.values()))) > 1:
            raise ValueError("its columns differ in length")
        return value
    if all(isinstance(inner, dict) for inner in value.values()):
        return columns_of_objects(value)
    return columns_of_rows([value])


def has_elements(value, kind: type) -> bool:
    """Returns whether a value is a list, not empty, whose elements are all of type `kind`."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, kind) for row in value)


def is_split(value: dict) -> bool:
    """Returns whether an object is in the form of pandas' orient="split"."""
    return has_elements(value.get("columns"), str) and has_elements(value.get("data"), list)


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

# A field in quotes. A quote within it is doubled, or follows a backslash.
QUOTED = r'"[^"]*+(?:""[^"]*+)*+"'
ESCAPED = r'"[^"\\]*+(?:(?:\\[\s\S]|"")[^"\\]*+)*+"'


def read_table(text: str) -> dict[str, list]:
    """Reads a table. The separator is the most frequent of , ; | and tab in its header.

    In a table with tabs a quote is an ordinary character, as in GLUE's files, unless a
    spreadsheet has written it.
    """
    # No field is longer than the text. Python's default limit is 131,072.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    # Concatenated files contain byte order marks, and some files for Excel begin with "sep=;".
    text = re.sub("\\Asep=.[\r\n]+", "", text.strip("\r\n").replace("\n\ufeff", "\n"))
    header = re.match(r"[^\r\n]*", text)[0]
    separator = max(",;|\t", key=header.count)
    if separator == "\t" and "\n" not in text:  # line ends of old Macs, and of Excel for them
        text = text.replace("\r", "\n")
    doubled = with_doubled_quotes(text, separator)
    if separator == "\t":
        lines = [line.removesuffix("\r").split("\t") for line in text.split("\n")]
        if not has_spreadsheets_quotes(doubled, lines):
            return as_columns(lines)
    return as_columns(split_quoted(doubled, separator, header))


def with_doubled_quotes(text: str, separator: str) -> str:
    """Returns a table with doubled quotes where MySQL and Spark write a backslash before them."""
    has_backslashes = '\\"' in text and not is_quoted(text, separator, QUOTED)
    if not has_backslashes or not is_quoted(text, separator, ESCAPED):
        return text
    return re.sub(r'\\(["\\])', lambda found: found[1].replace('"', '""'), text)


def is_quoted(text: str, separator: str, quoted: str) -> bool:
    """Returns whether every quote in a table belongs to a field in quotes, as in `quoted`."""
    field = rf'(?:{quoted}|[^"{separator}\n]*+)'
    return bool(re.fullmatch(rf"(?:{field}(?:[{separator}]|\r?\n|\Z))*+", text))


def has_spreadsheets_quotes(text: str, lines: list[list[str]]) -> bool:
    """Returns whether the quotes in a table with tabs come from a spreadsheet.

    A spreadsheet quotes a field that is empty or contains a quote (which is doubled), a tab, a
    line end or a comma, or it quotes all texts. So every quote must be of this form, and one of
    these reasons must be present. `lines` are the fields if quotes are ordinary characters.
    """
    if '"' not in text or not is_quoted(text, "\t", QUOTED):
        return False
    fields = [field[1:-1] for field in re.findall(QUOTED, text)]
    if any(re.search(r"[\t\n]", field) for field in fields):
        quoted = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))
        return is_even(quoted) and not is_even(lines)
    are_all_texts = len(fields) >= 2 * (len(lines) - 1)
    has_reason = any(re.search(r'""|\r|^$', field) for field in fields)
    has_commas = all("," in field for field in fields) and "," not in re.sub(QUOTED, "", text)
    return are_all_texts or has_reason or has_commas


def is_even(lines: list[list[str]]) -> bool:
    """Returns whether all lines that are not empty have as many fields as the first one."""
    return all(len(line) == len(lines[0]) for line in lines if any(line))


def split_quoted(text: str, separator: str, header: str) -> Iterator[list[str]]:
    """Yields the fields of each row. Some may be in quotes, and a quote in these is doubled.

    Raises ValueError with the line where an invalid row begins.
    """
    lines = csv.reader(
        # (A StringIO takes four bytes per character, and more time.)
        io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8", newline=""),
        delimiter=separator,
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
    before = re.compile(rf'[^"\n]*|{QUOTED}')
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
    check_names(list(filter(None, header)))
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
