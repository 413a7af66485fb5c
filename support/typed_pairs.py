"""Pairs of premise and hypothesis that are typed, or come in through standard input."""

from collections.abc import Iterator
from io import BufferedIOBase
from queue import Queue
from threading import Thread

from support import files

CHUNK = 2**20  # bytes that are read at once, where as many have come
AHEAD = 16  # chunks that are read before they are needed


def batches(stream: BufferedIOBase, size: int) -> Iterator[list[dict]]:
    """Yields the pairs in a stream of JSON lines, `size` at a time, or as many as have come.

    So a program may write a line, wait for its answer, and write the next one. Empty lines are
    skipped. Raises ValueError, with the line's number, for a line that is no pair, once the
    pairs before it have been yielded.
    """
    batch = []
    number = 0
    for line in lines(stream):
        if line is not None:
            number += 1
            try:
                batch += read(line, f"line {number} of standard input")
            except ValueError:
                if batch:
                    yield batch
                raise
        if batch and (line is None or len(batch) == size):
            yield batch
            batch = []


def lines(stream: BufferedIOBase) -> Iterator[bytes | None]:
    """Yields the lines of a stream, and None whenever the next one has not come yet."""
    # A thread waits for the stream: Windows cannot ask a pipe whether more has come.
    chunks = Queue(AHEAD)
    Thread(target=read_ahead, args=(stream, chunks), daemon=True).start()
    begun = b""  # a line whose end is still to come
    chunk = None
    while chunk != b"":  # which is the end of the stream
        if chunks.empty():
            yield None
        chunk = chunks.get()
        if isinstance(chunk, OSError):
            raise chunk
        *whole, begun = (begun + chunk).split(b"\n")
        yield from whole
    yield begun
    yield None


def read_ahead(stream: BufferedIOBase, chunks: Queue) -> None:
    """Puts what a stream holds into a queue as it comes, and at its end b"" or the error."""
    # Without the buffer of a file: it would wait until it is full, and lock while it waits.
    read_some = getattr(stream, "raw", stream).read
    try:
        while chunk := read_some(CHUNK):
            chunks.put(chunk)
        chunks.put(OSError("standard input does not wait") if chunk is None else b"")
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
    """Raises ValueError where a pair holds what no tokenizer can read."""
    for key in ("premise", "hypothesis"):
        if not isinstance(pair.get(key), str):
            raise ValueError(f"{place} has no text as {key}")
        # Half of a surrogate pair, from JSON, or bytes of a command line that are no UTF-8.
        if any("\ud800" <= letter <= "\udfff" for letter in pair[key]):
            raise ValueError(f"{place} has a {key} that is not Unicode, {pair[key]!r}")
