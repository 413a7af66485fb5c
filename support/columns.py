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
    columns = {}
    for number, (column, aliases) in enumerate(COLUMNS.items()):
        wanted = given[number : number + 1] or aliases
        if given and given[number] in names:
            found = given[number]
        else:
            found = find_column(names, wanted, place)
        if found is None:
            raise ValueError(
                f"{place}: no column {' or '.join(wanted)}; there are {', '.join(names)[:300]} "
                "(a table's first line names them); --columns PREMISE HYPOTHESIS LABEL says "
                "which are meant"
            )
        columns[column] = found
    return columns


def find_column(names: list[str], aliases: tuple[str, ...], place: str) -> str | None:
    """Returns the first column that is called by one of these words, in any case."""
    lower = [name.strip().lower() for name in names]
    for alias in (text.strip().lower() for text in aliases):
        if lower.count(alias) > 1:
            raise ValueError(f"{place}: two columns are called {alias}")
        if alias in lower:
            return names[lower.index(alias)]
    return None


def check_texts(values: dict[str, list], place: str) -> None:
    """Raises ValueError for a premise or a hypothesis that is missing, or no text."""
    for column in ("premise", "hypothesis"):
        for row, text in enumerate(values[column]):
            if not isinstance(text, str):
                problem = "is missing"
                if text is not None:
                    problem = (
                        f"is {str(text)[:60]}, not text; a json file has an object for each row, "
                        "as of pandas' to_json(path, orient='records')"
                    )
                raise ValueError(f"{place}, row {row}: the {column} {problem}")


def is_plain(values: list) -> bool:
    """Returns whether a column holds texts, or whole numbers of 64 bits, and may have gaps."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int}:
        return all(value is None or abs(value) < 2**63 for value in values)
    return kinds == {str}
