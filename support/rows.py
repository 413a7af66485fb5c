"""Rows in an Arrow table: even millions take little more memory than their file."""

import random
from collections.abc import Iterator

import numpy
import pyarrow
from pyarrow import compute


class Rows:
    """The rows of a table. Values are converted to Python on access.

    rows[3] is a row as a dictionary; rows["premise"] is a column as a list.
    """

    def __init__(self, table: pyarrow.Table):
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def __iter__(self) -> Iterator[dict]:
        for batch in self.table.to_batches(max_chunksize=1000):
            yield from batch.to_pylist()

    def __getitem__(self, key: int | str) -> dict | list:
        if isinstance(key, str):
            return self.table[key].to_pylist()
        return {
            name: values[key].as_py()
            for name, values in zip(self.table.column_names, self.table.columns)
        }

    def select(self, numbers: list[int]) -> "Rows":
        """Returns the rows with these numbers, in this order."""
        return Rows(self.table.take(pyarrow.array(numbers, pyarrow.int64())))


def essence(texts: pyarrow.Array) -> pyarrow.Array:
    """Returns only the letters and digits of texts, in lower case, to compare texts by."""
    # NFKC, because an accented e may be one character or two.
    small = compute.utf8_lower(compute.utf8_normalize(texts, "NFKC"))
    return compute.replace_substring_regex(small, r"[^\pL\pM\pN]+", "")


def cut_by_premise(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """Splits off about `share` of the rows. Returns the rest, and the rows split off.

    Rows with the same premise stay together, so no row in one part reveals an answer in the
    other. The split depends only on the rows, so runs with different seeds are measured on the
    same rows. Raises ValueError if all rows have the same premise.
    """
    premises = rows.table["premise"].dictionary_encode().unify_dictionaries().combine_chunks()
    groups = essence(premises.dictionary).dictionary_encode()
    premise_of_row = groups.indices.take(premises.indices)
    sizes = numpy.bincount(premise_of_row).tolist()
    if len(sizes) < 2:
        raise ValueError("--validation keeps a premise together, and all rows have the same")

    # Premises are taken in random order, as long as their rows fit into the share.
    draw = random.Random(0)
    premises_drawn = draw.sample(range(len(sizes)), len(sizes))
    room = max(1, min(round(share * len(rows)), len(rows) - 1))
    is_taken = numpy.zeros(len(sizes), dtype=bool)
    for premise in premises_drawn:
        if sizes[premise] <= room:
            is_taken[premise] = True
            room -= sizes[premise]
    if not is_taken.any():
        is_taken[sizes.index(min(sizes))] = True

    is_taken = is_taken[premise_of_row]
    rest = Rows(rows.table.filter(pyarrow.array(~is_taken)))
    taken = Rows(rows.table.filter(pyarrow.array(is_taken)))
    # Shuffled, so that --eval-limit takes a fair sample even if the rows are sorted by label.
    return rest, taken.select(draw.sample(range(len(taken)), len(taken)))
