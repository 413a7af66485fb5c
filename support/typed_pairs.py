"""Pairs of premise and hypothesis that are typed, or come in through standard input."""

from collections.abc import Iterable, Iterator

from support import files


def read(lines: Iterable[bytes]) -> Iterator[dict]:
    """Yields the JSON object of each line. Empty lines are skipped.

    Raises ValueError, with the line's number, for a line that is no pair.
    """
    for number, line in enumerate(lines, 1):
        place = f"line {number} of standard input"
        if not line.strip():
            continue
        pair = files.parse_line(line, place)
        check(pair, place)
        yield pair


def check(pair: dict, place: str) -> None:
    """Raises ValueError where a pair holds what no tokenizer can read."""
    for key in ("premise", "hypothesis"):
        if not isinstance(pair.get(key), str):
            raise ValueError(f"{place} has no text as {key}")
        # Half of a surrogate pair, from JSON, or bytes of a command line that are no UTF-8.
        if any("\ud800" <= letter <= "\udfff" for letter in pair[key]):
            raise ValueError(f"{place} has a {key} that is not Unicode, {pair[key]!r}")
