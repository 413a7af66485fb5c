"""The columns of a dataset: which are premise, hypothesis and label, and what they hold.

To read one more name, add it to COLUMNS. --columns says any other.
"""

from collections.abc import Iterable

import pyarrow
from pyarrow import types

from support.labels import label_numbers
from support.letters import plain

# What a column may be called, in any case. The first that a file has is taken.
COLUMNS = {
    "premise": ("premise", "sentence1", "context"),
    "hypothesis": ("hypothesis", "sentence2", "hypo"),
    "label": ("label", "gold_label", "gold"),
}
KEPT = ("idx", "genre")  # other columns, which predictions_SPLIT.jsonl shows

# A column of a file: Arrow's, or Python's values, which may be of several types.
Column = pyarrow.ChunkedArray | list


def has_texts(names: Iterable[str]) -> bool:
    """Returns whether both texts are among columns of these names, under usual names."""
    words = set(map(plain, names))
    return all(words & set(COLUMNS[column]) for column in ("premise", "hypothesis"))


def find_columns(names: list[str], given: tuple[str, ...], place: str) -> dict[str, str]:
    """Returns what a file that has the columns `names` calls premise, hypothesis and label.

    `given` is what --columns says. An error begins with `place`.
    """
    columns = {}
    for number, (column, aliases) in enumerate(COLUMNS.items()):
        wanted = given[number : number + 1] or aliases
        # What --columns says is first looked for as it is typed.
        found = [name for name in given[number : number + 1] if name in names]
        for alias in wanted:
            found = found or [name for name in names if plain(name) == plain(alias)]
        if len(found) != 1:
            raise ValueError(
                f"{place}: {len(found) or 'no'} columns are called {' or '.join(wanted)}; it has "
                f"{str(names)[:300]} (a table's first line); --columns P H L says which are meant"
            )
        columns[column] = found[0]
    if len(set(columns.values())) < len(columns):  # "text Text" are one column, too
        raise ValueError(f"--columns names one column twice: {' '.join(given)}")
    return columns


def table_of(
    part: dict[str, Column], columns: dict[str, str], given: tuple[str, ...], place: str
) -> tuple[pyarrow.Table, list]:
    """Returns the rows of a file as a table, and the different labels that it has.

    The table has premise, hypothesis, label as a number, and the label as `written`. `given`
    is what --labels says. Raises ValueError, with `place`, for a row that does not fit.
    """
    values = {
        column: as_texts(part[columns[column]], column, place)
        for column in ("premise", "hypothesis")
    }
    try:
        labels, label_of_row = different(part[columns["label"]])
    except pyarrow.ArrowException as error:  # bytes that are no UTF-8
        raise ValueError(f"{place}: the label: {error}") from None
    numbers = label_numbers(labels, label_of_row, given, place)
    values["label"] = pyarrow.array(numbers, pyarrow.int8()).take(label_of_row)
    written = pyarrow.array(map(repr, labels), pyarrow.string())
    values["written"] = pyarrow.DictionaryArray.from_arrays(label_of_row, written)
    return pyarrow.table(values), labels


def joined(tables: list[pyarrow.Table]) -> pyarrow.Table:
    """Returns the rows of all tables. Their columns may be of two types, as int32 and int64."""
    return pyarrow.concat_tables(tables, promote_options="permissive").unify_dictionaries()


def shown_columns(parts: Iterable[dict[str, Column]]) -> dict[str, pyarrow.ChunkedArray]:
    """Returns those columns of KEPT that hold whole numbers in all parts, or texts in all.

    They are only shown, so one that holds anything else is left out.
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
    """Returns a column of texts in Arrow. Raises ValueError for the first row that has none."""
    try:
        texts = in_arrow(values)
        if not is_text(texts.type):  # other types may hold texts, too
            texts = pyarrow.chunked_array([texts.to_pylist()], pyarrow.string())
        if not texts.null_count:
            return texts
    except (pyarrow.ArrowException, OverflowError, UnicodeError):
        pass  # which row it is, the next lines find
    for row, value in enumerate(values):
        problem = problem_of(value)
        if problem:
            raise ValueError(f"{place}, row {row}: the {column} {problem}")


def is_text(kind: pyarrow.DataType) -> bool:
    return types.is_string(kind) or types.is_large_string(kind)


def in_arrow(values: Column) -> pyarrow.ChunkedArray:
    """Returns a column in Arrow. Raises ArrowException and others where it cannot."""
    if isinstance(values, list):
        return pyarrow.table({"": values})[""]  # chunked, whatever its length
    if types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    values.validate(full=True)  # files may hold bytes that are no UTF-8
    return values


def problem_of(value) -> str | None:
    """Returns why a value, Python's or Arrow's, is no text; None if it is one."""
    try:
        text = value.as_py() if isinstance(value, pyarrow.Scalar) else value
        if text is None:
            return "is missing"
        if not isinstance(text, str):
            return f"is {str(text)[:60]}, not text"
        text.encode()
    except UnicodeError as error:  # a damaged file, or half of an emoji that was cut
        return f"is not UTF-8: {error}; remove that character"
    return None


def different(values: Column) -> tuple[list, pyarrow.IntegerArray]:
    """Returns the different values of a column, in their order, and which of them a row has."""
    if isinstance(values, pyarrow.ChunkedArray):
        try:
            # In one chunk: Arrow cannot unify the dictionaries of several where a value is missing.
            encoded = in_arrow(values).combine_chunks().dictionary_encode("encode")
            return encoded.dictionary.to_pylist(), encoded.indices
        except pyarrow.ArrowNotImplementedError:  # of lists, for example
            values = values.to_pylist()
    # By how they are written: 1, 1.0 and True are equal, and a list has no hash.
    written = list(map(repr, values))
    value_of = dict(zip(written, values))
    encoded = pyarrow.array(written, pyarrow.string()).dictionary_encode()
    return [value_of[text] for text in encoded.dictionary.to_pylist()], encoded.indices
