"""The columns of a dataset: which are premise, hypothesis and label, and what they hold.

To read one more name, add it to COLUMNS. --columns says any other.
"""

from collections.abc import Iterable

import pyarrow
from pyarrow import types

from support.letters import plain

# What a column may be called, in any case. The first that a file has is taken.
COLUMNS = {
    "premise": ("premise", "sentence1", "context"),
    "hypothesis": ("hypothesis", "sentence2", "hypo"),
    "label": ("label", "gold_label", "gold"),
}

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
    return columns


def as_texts(
    values: Column, column: str, place: str, may_lack: bool = False
) -> pyarrow.ChunkedArray:
    """Returns a column of texts in Arrow.

    Raises ValueError for the first row that holds no text. `may_lack`: None will do. An
    error begins with `place` and the row.
    """
    try:
        texts = in_arrow(values)
    except (pyarrow.ArrowException, UnicodeError):
        texts = None
    if texts is None or (texts.null_count and not may_lack):
        for row, value in enumerate(values):
            problem = problem_of(value)
            if problem and not (may_lack and problem == MISSING):
                raise ValueError(f"{place}, row {row}: the {column} {problem}")
    return texts


def in_arrow(values: Column) -> pyarrow.ChunkedArray:
    """Returns texts in Arrow. Raises ArrowException or UnicodeError for any other values."""
    if isinstance(values, pyarrow.ChunkedArray):
        if types.is_string(values.type) or types.is_large_string(values.type):
            values.validate(full=True)  # files may hold bytes that are no UTF-8
            return values
        values = values.to_pylist()  # of other types that hold texts, too
    texts = pyarrow.array(values, pyarrow.string())
    # Of more than 2 GB it is chunked already.
    return texts if isinstance(texts, pyarrow.ChunkedArray) else pyarrow.chunked_array([texts])


MISSING = "is missing"


def problem_of(value) -> str | None:
    """Returns why a value, Python's or Arrow's, is no text; None where it is one."""
    try:
        text = value.as_py() if isinstance(value, pyarrow.Scalar) else value
        if text is None:
            return MISSING
        if not isinstance(text, str):
            return f"is {str(text)[:60]}, not text"
        text.encode()
    except UnicodeDecodeError as error:  # Arrow's, of a damaged file
        return f"is not UTF-8: {error}"
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        return f"holds {half!r}, half of a character (as of an emoji that was cut): remove it"
    return None


def as_numbers(values: Column, column: str, place: str) -> pyarrow.ChunkedArray:
    """Returns a column of whole numbers in Arrow; some may be missing."""
    try:
        if isinstance(values, list):
            return pyarrow.chunked_array([pyarrow.array(values, pyarrow.int64())])
        return values.cast(pyarrow.int64())
    except (OverflowError, pyarrow.ArrowInvalid):
        raise ValueError(f"{place}: the {column} has a number of more than 64 bits") from None


def types_in(values: Column) -> set[type]:
    """Returns int, str, both or others: the types of the values that are not missing."""
    if isinstance(values, list):
        return set(map(type, values)) - {type(None)}
    kind = values.type.value_type if types.is_dictionary(values.type) else values.type
    if types.is_null(kind):
        return set()
    if types.is_integer(kind):
        return {int}
    is_text = types.is_string(kind) or types.is_large_string(kind)
    return {str} if is_text else {object}


def different(values: Column) -> tuple[list, pyarrow.IntegerArray]:
    """Returns the different values of a column, in their order, and which of them a row has."""
    if isinstance(values, pyarrow.ChunkedArray):
        if types.is_dictionary(values.type):  # it may hold more than the rows have
            values = values.cast(values.type.value_type)
        try:
            encoded = values.dictionary_encode("encode").unify_dictionaries().combine_chunks()
            return encoded.dictionary.to_pylist(), encoded.indices
        except pyarrow.ArrowNotImplementedError:  # of lists, for example
            values = values.to_pylist()
    # By how they are written: 1, 1.0 and True are equal, and a list has no hash.
    written = list(map(repr, values))
    value_of = dict(zip(written, values))
    encoded = pyarrow.array(written, pyarrow.string()).dictionary_encode()
    return [value_of[text] for text in encoded.dictionary.to_pylist()], encoded.indices
