"""The columns of a dataset: which are premise, hypothesis and label, and what they contain.

To support another column name, add it to COLUMNS. Users name any other with --columns.
"""

from collections.abc import Iterable

import pyarrow
from pyarrow import types

from support.labels import label_numbers
from support.letters import plain

# The names that a column may have, in upper or lower case. The first one in a file is used.
COLUMNS = {
    "premise": ("premise", "sentence1", "context"),
    "hypothesis": ("hypothesis", "sentence2", "hypo"),
    "label": ("label", "gold_label", "gold"),
}
KEPT = ("idx", "genre")  # other columns that predictions_SPLIT.jsonl shows

# A column of a file: an Arrow array, or a list of Python values that may differ in type.
Column = pyarrow.ChunkedArray | list


def has_texts(names: Iterable[str]) -> bool:
    """Returns whether these names of columns include usual names for both texts."""
    words = set(map(plain, names))
    return all(words & set(COLUMNS[column]) for column in ("premise", "hypothesis"))


def check_names(names: list[str]) -> None:
    """Raises ValueError if two columns of a file have the same name."""
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"it has two columns of one name: {', '.join(sorted(twice))}")


def find_columns(names: list[str], given: tuple[str, ...], place: str) -> dict[str, str]:
    """Returns which of the columns `names` are premise, hypothesis and label.

    `given` is the value of --columns. Error messages begin with `place`.
    """
    columns = {}
    for number, (column, aliases) in enumerate(COLUMNS.items()):
        wanted = given[number : number + 1] or aliases
        # A name from --columns is first looked for exactly as it is typed.
        found = [name for name in given[number : number + 1] if name in names]
        for alias in wanted:
            found = found or [name for name in names if plain(name) == plain(alias)]
        if len(found) != 1:
            raise ValueError(
                f"{place}: {len(found) or 'no'} columns are called {' or '.join(wanted)}; it has "
                f"{str(names)[:300]} (a table's first line); --columns P H L says which are meant"
            )
        columns[column] = found[0]
    if len(set(columns.values())) < len(columns):  # "text" and "Text" may be one column too
        raise ValueError(f"--columns names one column twice: {' '.join(given)}")
    return columns


def table_of(
    part: dict[str, Column], columns: dict[str, str], given: tuple[str, ...], place: str
) -> tuple[pyarrow.Table, list]:
    """Returns the rows of a file as a table, and the distinct labels in the file.

    The table's columns are premise, hypothesis, label (a number) and written (the label as the
    file has it). `given` is the value of --labels. Raises ValueError, with `place` in its
    message, for a row that is not valid.
    """
    values = {
        column: as_texts(part[columns[column]], column, place)
        for column in ("premise", "hypothesis")
    }
    try:
        labels, label_of_row = different(part[columns["label"]])
    except pyarrow.ArrowException as error:  # bytes that are not UTF-8
        raise ValueError(f"{place}: the label: {error}") from None
    numbers = label_numbers(labels, label_of_row, given, place)
    values["label"] = pyarrow.array(numbers, pyarrow.int8()).take(label_of_row)
    written = pyarrow.array(map(repr, labels), pyarrow.string())
    values["written"] = pyarrow.DictionaryArray.from_arrays(label_of_row, written)
    return pyarrow.table(values), labels


def joined(tables: list[pyarrow.Table]) -> pyarrow.Table:
    """Returns the rows of all tables, whose columns may differ in type, as int32 and int64."""
    return pyarrow.concat_tables(tables, promote_options="permissive").unify_dictionaries()


def shown_columns(parts: Iterable[dict[str, Column]]) -> dict[str, pyarrow.ChunkedArray]:
    """Returns those columns of KEPT that contain only whole numbers, or only texts, in all parts.

    They are only shown, so a column with anything else is left out.
    """
    shown = {}
    for name in KEPT:
        try:
            values = joined([pyarrow.table({name: in_arrow(part[name])}) for part in parts])[name]
        except (KeyError, OverflowError, UnicodeError, pyarrow.ArrowException):
            continue
        if types.is_integer(values.type) or is_text(values.type):
            shown[name] = values
    return shown


def as_texts(values: Column, column: str, place: str) -> pyarrow.ChunkedArray:
    """Returns a column of texts as Arrow strings. Raises ValueError for the first other value."""
    try:
        texts = in_arrow(values)
        if not is_text(texts.type):  # other types may contain texts too
            texts = pyarrow.chunked_array([texts.to_pylist()], pyarrow.string())
        if not texts.null_count:
            return texts
    except (pyarrow.ArrowException, OverflowError, UnicodeError):
        pass  # the next lines find the row
    for row, value in enumerate(values):
        problem = problem_of(value)
        if problem:
            raise ValueError(f"{place}, row {row}: the {column} {problem}")


def is_text(kind: pyarrow.DataType) -> bool:
    return types.is_string(kind) or types.is_large_string(kind)


def in_arrow(values: Column) -> pyarrow.ChunkedArray:
    """Returns a column as an Arrow array. Raises ArrowException or other errors on failure."""
    if isinstance(values, list):
        return pyarrow.table({"": values})[""]  # chunked, whatever its length
    if types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    values.validate(full=True)  # files may contain bytes that are not UTF-8
    return values


def problem_of(value) -> str | None:
    """Returns why a Python or Arrow value is not a text, or None if it is one."""
    try:
        text = value.as_py() if isinstance(value, pyarrow.Scalar) else value
        if text is None:
            return "is missing"
        if not isinstance(text, str):
            return f"is {str(text)[:60]}, not text"
        text.encode()
    except UnicodeError as error:  # a damaged file, or an emoji that was cut in half
        return f"is not UTF-8: {error}; remove that character"
    return None


def different(values: Column) -> tuple[list, pyarrow.IntegerArray]:
    """Returns the distinct values of a column, in order, and for each row the index of its own."""
    if isinstance(values, pyarrow.ChunkedArray):
        try:
            # One chunk, because Arrow cannot unify dictionaries of several with missing values.
            encoded = in_arrow(values).combine_chunks().dictionary_encode("encode")
            return encoded.dictionary.to_pylist(), encoded.indices
        except pyarrow.ArrowNotImplementedError:  # for a column of lists, for example
            values = values.to_pylist()
    # Distinguished by repr, because 1, 1.0 and True are equal, and a list has no hash.
    written = list(map(repr, values))
    value_of = dict(zip(written, values))
    encoded = pyarrow.array(written, pyarrow.string()).dictionary_encode()
    return [value_of[text] for text in encoded.dictionary.to_pylist()], encoded.indices
