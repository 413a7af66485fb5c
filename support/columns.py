"""The columns of a dataset: which are premise, hypothesis and label, and what they hold.

To read one more name, add it to COLUMNS. --columns says any other.
"""

# What a column may be called, in any case. The first that a file has is taken.
COLUMNS = {
    "premise": ("premise", "sentence1", "context"),
    "hypothesis": ("hypothesis", "sentence2", "hypo"),
    "label": ("label", "gold_label", "gold"),
}


def find_columns(names: list[str], given: tuple[str, ...], place: str) -> dict[str, str]:
    """Returns which of the columns `names` are premise, hypothesis and label."""
    if len(set(given)) < len(given):
        raise ValueError(f"--columns names one column twice: {' '.join(given)}")
    by_lower = {name.strip().lower(): name for name in names}
    columns = {}
    for number, (column, aliases) in enumerate(COLUMNS.items()):
        wanted = given[number : number + 1] or aliases
        exact = [name for name in wanted if name in names]
        found = exact or [by_lower[name.lower()] for name in wanted if name.lower() in by_lower]
        if not found:
            raise ValueError(
                f"{place}: no column {' or '.join(wanted)}; there are {', '.join(names)[:300]} "
                "(a table's first line names them); --columns PREMISE HYPOTHESIS LABEL says "
                "which are meant"
            )
        columns[column] = found[0]
    return columns


def check_texts(values: dict[str, list], place: str) -> None:
    """Raises ValueError for a premise or a hypothesis that is missing, or no text."""
    for column in ("premise", "hypothesis"):
        for row, text in enumerate(values[column]):
            if not isinstance(text, str):
                problem = "is missing" if text is None else f"is {str(text)[:60]}, not text"
                raise ValueError(f"{place}, row {row}: the {column} {problem}")


def is_plain(values: list) -> bool:
    """Returns whether a column holds texts, or whole numbers of 64 bits, and may have gaps."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int}:
        return all(value is None or abs(value) < 2**63 for value in values)
    return kinds == {str}
