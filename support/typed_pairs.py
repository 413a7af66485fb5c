"""Pairs of premise and hypothesis from the command line or from standard input, and answers."""

import json
from collections.abc import Iterator
from io import BufferedIOBase

from support import files
from support.letters import printable

CHUNK = 2**20  # the most bytes that are read at once


def batches(stream: BufferedIOBase, size: int) -> Iterator[list[dict]]:
    """Yields the pairs in a stream of JSON lines, `size` at a time or as many as have arrived.

    So a program may write a line, wait for its answer, and write the next line. Empty lines
    are skipped. For a line that is not a pair, raises ValueError with the line number, after
    the pairs before it have been yielded.
    """
    number = 0
    for lines in arriving_lines(stream):
        batch = []
        for line in lines:
            number += 1
            try:
                batch += read(line, f"line {number} of standard input")
            except ValueError:
                if batch:
                    yield batch
                raise
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch


def arriving_lines(stream: BufferedIOBase) -> Iterator[list[bytes]]:
    """Yields the lines of a stream, each time all that have arrived."""
    read_some = getattr(stream, "raw", stream).read  # a buffer would wait until it is full
    begun = b""  # a line whose end has not arrived yet
    while chunk := read_some(CHUNK):
        *lines, begun = (begun + chunk).split(b"\n")
        yield lines
    if chunk is None:
        raise OSError("standard input is in non-blocking mode")
    yield [begun]


def read(line: bytes, place: str) -> list[dict]:
    """Returns [pair] for a line, or [] for an empty one. Raises ValueError if it holds no pair."""
    if not line.strip():
        return []
    pair = files.parse_line(line, place)
    check(pair, place)
    return [pair]


def check(pair: dict, place: str) -> None:
    """Raises ValueError if a text is missing from a pair, or contains invalid Unicode."""
    for key in ("premise", "hypothesis"):
        if not isinstance(pair.get(key), str):
            there = printable(", ".join(pair))[:60] or "none"
            raise ValueError(
                f"{place} has no text as {key}: it needs premise and hypothesis; its keys are "
                f"{there}"
            )
        # Half of a surrogate pair, from JSON or from command-line bytes that are not UTF-8.
        if any("\ud800" <= letter <= "\udfff" for letter in pair[key]):
            raise ValueError(f"{place} has a {key} that is not Unicode, {pair[key]!r}")


# -----------------------------------------------------------------------------
# Answers


def print_prediction(prediction: dict, words: list[str], max_length: int) -> None:
    """Prints the prediction for one pair, with a line for each label."""
    if "cut" in prediction:
        print(f"the pair was cut to --max-length {max_length}")
    if "completion" in prediction:
        print(f"completion: {prediction['completion']!r}")
    words = list(map(printable, words))
    width = max(map(len, words)) + 1
    scores = prediction["scores"]
    for label, share in enumerate(scores):
        mark = "  <-" if share == max(scores) else ""
        print(f"{label} {words[label]:{width}} {share:.4f}{mark}")


def print_lines(pairs: list[dict], predictions: list[dict], words: list[str]) -> None:
    """Prints each pair with its prediction, and its label in words, as a JSON object."""
    for pair, prediction in zip(pairs, predictions):
        # None if the model has written no number, or one other than 0, 1 and 2.
        word = dict(enumerate(words)).get(prediction["prediction"])
        line = pair | prediction | {"answer": word}
        print(printable(json.dumps(line, ensure_ascii=False)))
