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
    """Returns what a file that has the columns `names` calls premise, hypothesis and label.

    `given` is what --columns says. An error begins with `place`.
    """
    columns = {}
    for number, (column, aliases) in enumerate(COLUMNS.items()):
        wanted = given[number : number + 1] or aliases
        # What --columns says is first looked for as it is typed.
        found = [name for name in given[number : number + 1] if name in names]
        for alias in wanted:
            found = found or [name for name in names if name.strip().lower() == alias.lower()]
        if len(found) != 1:
            raise ValueError(
                f"{place}: {len(found) or 'no'} columns are called {' or '.join(wanted)}; it has "
                f"{str(names)[:300]} (a table's first line); --columns P H L says which are meant"
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
