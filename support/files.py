"""Files that are there whole or not at all, and JSON that people may have edited.

A file is written under another name, flushed to the disk, and renamed. So whatever ends a
run, a kill or a full disk, what it saved before is still there.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

UNFINISHED = ".unfinished"  # how a temporary name ends


# -----------------------------------------------------------------------------
# Writing


def make_folder(path: Path) -> None:
    """Makes a folder, with those above it, where there is none. Raises OSError in one line.

    Where the path goes through a link to a folder that is not there yet, it is that folder.
    """
    try:
        Path(os.path.realpath(path)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {path}: {error.strerror}") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path. On success it is flushed to the disk and renamed to `path`.

    Raises OSError, in one line, when it cannot be written; then `path` is as it was.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        yield temporary
        flush(temporary)
        # A rename within a directory is atomic: a reader sees the old file or the new.
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(failure(f"cannot write {path}", error)) from None
    finally:
        # It is there still when anything was raised, a Ctrl-C too.
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_files(directory: Path) -> Iterator[Path]:
    """Yields a temporary folder. On success each file in it takes its place in `directory`.

    All of them are on the disk before the first one is renamed: a full disk changes none.
    Raises OSError, in one line, when one of them cannot be written.
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
    """Lets those read the files of a new folder who may read other new files.

    safetensors lets only the owner read its files. The folder was made under the umask, and
    files are not executable.
    """
    for path in folder.iterdir():
        with suppress(OSError):  # a file system without such rights, as on a USB stick
            path.chmod(folder.stat().st_mode & 0o666)


def temporary_path(path: Path) -> Path:
    """Returns a hidden path beside `path`, which no other process uses."""
    # Beside it, because a rename cannot cross from one file system to another.
    return path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")


def flush(path: Path) -> None:
    """Waits until a file's content is on the disk: a rename may get there before it."""
    # "+", because some systems flush only what is open for writing.
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def failure(what: str, error: Exception) -> str:
    """Returns one line on a failed write."""
    # strerror is the reason without the temporary name. safetensors' own errors have none.
    reason = getattr(error, "strerror", None) or error
    return f"{what}: {reason}; what was saved before is as it was"


def remove_unfinished(directory: Path) -> None:
    """Removes what writes that were killed have left in a directory."""
    for path in Path(directory).glob(f".*{UNFINISHED}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


# -----------------------------------------------------------------------------
# JSON


def read_json(path: Path) -> dict:
    """Returns the object in a JSON file. Raises ValueError when it holds anything else."""
    return parse_line(Path(path).read_bytes(), str(path))


def write_json(path: Path, value) -> None:
    """Writes a value as indented JSON, which people read and compare."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_lines(path: Path) -> list[dict]:
    """Returns the objects of a file of JSON lines. Empty lines are skipped.

    Raises ValueError when the file is missing or a line holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    return [
        parse_line(line, f"{path}, line {number}")
        # Bytes: a text would also be split at U+2028, which a line may hold as it is.
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1)
        if line.strip()
    ]


def write_lines(path: Path, rows: list[dict]) -> None:
    """Writes one JSON object a line, in UTF-8: people can read it in any language."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with replacing(path) as temporary:
        # UTF-8 cannot hold half of a surrogate pair, which a tokenizer can produce. JSON
        # can: a backslash, u and its number, which is what "backslashreplace" writes.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def parse_line(line: bytes | str, place: str) -> dict:
    """Returns the JSON object in a line. An error begins with `place`: where it is from."""
    try:
        value = json.loads(line)
    # RecursionError: ten thousand brackets, one within the other.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{place} holds no JSON object")
    return value
