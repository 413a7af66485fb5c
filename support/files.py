"""Atomic writes, and reading JSON that people may have edited.

A file is written into a temporary folder, flushed to the disk, and renamed. So if a run ends in
a kill or on a full disk, what it saved before is still there.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

UNFINISHED = ".unfinished"  # the suffix of temporary folders


# -----------------------------------------------------------------------------
# Writing


@contextmanager
def replacing_files(directory: Path) -> Iterator[Path]:
    """Yields a temporary folder. On success all files in it are moved into `directory`.

    All of them are on the disk before the first is moved, so a full disk changes none.
    Raises OSError, in one line, if one of them cannot be written.
    """
    try:
        # Within the directory, because a rename cannot cross file systems.
        with tempfile.TemporaryDirectory(
            dir=directory, prefix=".", suffix=UNFINISHED, ignore_cleanup_errors=True
        ) as private:
            folder = Path(private) / "files"
            folder.mkdir()
            yield folder
            paths = sorted(folder.iterdir())
            for path in paths:
                # The umask decides about `folder`, but safetensors lets only the owner read.
                with suppress(OSError):  # a file system without permissions, as on a USB stick
                    path.chmod(folder.stat().st_mode & 0o666)
                flush(path)
            # A rename is atomic: a reader sees either the old or the new file.
            for path in paths:
                os.replace(path, directory / path.name)
    except (OSError, SafetensorError) as error:
        # strerror is the reason without the temporary name. safetensors' own errors have none.
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"cannot write into {directory}: {reason}; what was saved before is unchanged"
        ) from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path. On success it is flushed to the disk and renamed to `path`."""
    with replacing_files(path.parent) as folder:
        yield folder / path.name


def flush(path: Path) -> None:
    """Waits until a file's content is on the disk. A later rename could otherwise precede it."""
    # "+", because some systems only flush files that are open for writing.
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def remove_unfinished(directory: Path) -> None:
    """Removes temporary folders that killed processes have left in a directory."""
    for path in directory.glob(f".*{UNFINISHED}"):
        shutil.rmtree(path, ignore_errors=True)


# -----------------------------------------------------------------------------
# Tensors


@contextmanager
def open_tensors(path: Path, framework: str = "numpy") -> Iterator[safe_open]:
    """Yields an open safetensors file. Raises ValueError if it is damaged."""
    try:
        with safe_open(path, framework) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error})") from None


# -----------------------------------------------------------------------------
# JSON


def read_json(path: Path) -> dict:
    """Returns the object in a JSON file. Raises ValueError if the file holds anything else."""
    return parse_line(path.read_bytes(), str(path))


def write_json(path: Path, value) -> None:
    """Writes a value as indented JSON, so that people can read and compare it."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_lines(path: Path) -> list[dict]:
    """Returns the objects in a JSON Lines file. Empty lines are skipped.

    Raises ValueError if a line holds anything else.
    """
    return [
        parse_line(line, f"{path}, line {number}")
        # Bytes, because a str would also be split at U+2028, which a line may contain.
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1)
        if line.strip()
    ]


def write_lines(path: Path, rows: list[dict]) -> None:
    """Writes one JSON object per line, in UTF-8, readable in any language."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parse_line(line: bytes | str, place: str) -> dict:
    """Returns the JSON object in a line. Error messages begin with `place`, where it is from."""
    try:
        value = json.loads(line)
    # RecursionError comes from thousands of nested brackets.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{place} holds no JSON object")
    return value
