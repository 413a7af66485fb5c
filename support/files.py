"""Atomic writes, and reading JSON that people may have edited.

A file is written under a temporary name, flushed to the disk, and renamed. So if a run ends in
a kill or on a full disk, what it saved before is still there.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

UNFINISHED = ".unfinished"  # the suffix of temporary names


# -----------------------------------------------------------------------------
# Writing


def make_folder(path: Path) -> None:
    """Creates a folder and its parents if they are missing. Raises OSError in one line.

    If the path goes through a link to a missing folder, creates the folder the link points to.
    """
    try:
        Path(os.path.realpath(path)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {path}: {error.strerror}") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path. On success it is flushed to the disk and renamed to `path`.

    Raises OSError, in one line, if it cannot be written; then `path` is unchanged.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        yield temporary
        flush(temporary)
        # A rename within a directory is atomic: a reader sees either the old or the new file.
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(failure(f"cannot write {path}", error)) from None
    finally:
        # It still exists if something was raised, Ctrl-C included.
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_files(directory: Path) -> Iterator[Path]:
    """Yields a temporary folder. On success all files in it are moved into `directory`.

    All of them are on the disk before the first is moved, so a full disk changes none.
    Raises OSError, in one line, if one of them cannot be written.
    """
    directory = Path(directory)
    folder = temporary_path(directory / "save")
    try:
        folder.mkdir()
        yield folder
        apply_umask(folder)
        paths = sorted(folder.iterdir())
        for path in paths:
            flush(path)
        for path in paths:
            os.replace(path, directory / path.name)
    except (OSError, SafetensorError) as error:
        raise OSError(failure(f"cannot write into {directory}", error)) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def apply_umask(folder: Path) -> None:
    """Gives the files in a new folder the permissions that new files usually get.

    safetensors lets only the owner read its files. The folder's own permissions follow the
    umask; the files get these, but without the right to execute.
    """
    for path in folder.iterdir():
        with suppress(OSError):  # a file system without permissions, as on a USB stick
            path.chmod(folder.stat().st_mode & 0o666)


def temporary_path(path: Path) -> Path:
    """Returns a hidden path beside `path` that no other process uses."""
    # Beside it, because a rename cannot cross file systems.
    return path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")


def flush(path: Path) -> None:
    """Waits until a file's content is on the disk. A later rename could otherwise precede it."""
    # "+", because some systems only flush files that are open for writing.
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def failure(what: str, error: Exception) -> str:
    """Returns a one-line message about a failed write."""
    # strerror is the reason without the temporary name. safetensors' own errors have none.
    reason = getattr(error, "strerror", None) or error
    return f"{what}: {reason}; what was saved before is unchanged"


def remove_unfinished(directory: Path) -> None:
    """Removes temporary files that killed processes have left in a directory."""
    for path in Path(directory).glob(f".*{UNFINISHED}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


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
    return parse_line(Path(path).read_bytes(), str(path))


def write_json(path: Path, value) -> None:
    """Writes a value as indented JSON, so that people can read and compare it."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_lines(path: Path) -> list[dict]:
    """Returns the objects in a JSON Lines file. Empty lines are skipped.

    Raises ValueError if the file is missing, or if a line holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
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
        # A tokenizer can produce half of a surrogate pair, which UTF-8 cannot encode. JSON can,
        # as a backslash, u and the number; "backslashreplace" writes exactly this.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


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
