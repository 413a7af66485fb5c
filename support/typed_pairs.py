"""Pairs of premise and hypothesis that are typed, or come in through standard input."""

from collections.abc import Iterator
from io import BufferedIOBase
from queue import Queue
from threading import Thread

from support import files
from support.letters import printable

CHUNK = 2**20  # bytes that are read at once, where as many have come
AHEAD = 16  # chunks that are read before they are needed


def batches(stream: BufferedIOBase, size: int) -> Iterator[list[dict]]:
    """Yields the pairs in a stream of JSON lines, `size` at a time, or as many as have come.

    So a program may write a line, wait for its answer, and write the next one. Empty lines are
    skipped. Raises ValueError, with the line's number, for a line that is no pair, once the
    pairs before it have been yielded.
    """
    # A thread waits for the stream: Windows cannot ask a pipe whether more has come.
    chunks = Queue(AHEAD)
    Thread(target=read_ahead, args=(stream, chunks), daemon=True).start()
    batch = []
    number = 0
    for lines in iter(chunks.get, None):
        if isinstance(lines, OSError):
            raise lines
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
        if batch and chunks.empty():
            yield batch
            batch = []
    if batch:
        yield batch


def read_ahead(stream: BufferedIOBase, chunks: Queue) -> None:
    """Puts the lines of a stream into a queue as they come; at its end None, or the error."""
    # Without the buffer of a file: it would wait until it is full, and lock while it waits.
    read_some = getattr(stream, "raw", stream).read
    begun = b""  # a line whose end is still to come
    try:
        while chunk := read_some(CHUNK):
            *lines, begun = (begun + chunk).split(b"\n")
            chunks.put(lines)
        if chunk is None:
            raise OSError("standard input does not wait")
        chunks.put([begun])
        chunks.put(None)
    except OSError as error:
        chunks.put(error)


def read(line: bytes, place: str) -> list[dict]:
    """Returns the pair in a line, or none of an empty line. Raises ValueError for another one."""
    if not line.strip():
        return []
    pair = files.parse_line(line, place)
    check(pair, place)
    return [pair]


def check(pair: dict, place: str) -> None:
    """Raises ValueError if a pair holds what no tokenizer can read."""
    for key in ("premise", "hypothesis"):
        if not isinstance(pair.get(key), str):
            there = printable(", ".join(pair))[:60] or "none"
            raise ValueError(
                f"{place} has no text as {key}: it needs premise and hypothesis; its keys are "
                f"{there}"
            )
        # Half of a surrogate pair, from JSON, or bytes of a command line that are no UTF-8.
        if any("\ud800" <= letter <= "\udfff" for letter in pair[key]):
            raise ValueError(f"{place} has a {key} that is not Unicode, {pair[key]!r}")
