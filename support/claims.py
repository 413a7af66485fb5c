"""Claims a folder, of a run, an evaluation or a merged model, so that one process writes there.

The process locks a file in the folder through the operating system. The lock ends with the
process, however that ends, so a killed run blocks nothing.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from support import files, processes

LOCK = ".lock"  # the file in the folder


@contextmanager
def claimed(
    folder: Path, check: Callable[[Path], None] | None = None, is_new: bool = False
) -> Iterator[Path]:
    """Yields a folder that no other process can claim meanwhile. Creates it if necessary.

    With `is_new` the folder must be new: it is `folder`, or else folder-2, folder-3 and so on.
    `check` may raise a ValueError about the contents of the folder. It is called once the
    folder is claimed, when no other process can change them. A folder that was created here
    and is still empty at the end is removed.

    If a run has several processes, call this after processes.start: only the first one claims
    the folder, and all of them yield the same one. If another run holds the folder, the first
    process raises ValueError and the others exit.
    """
    refusal = None
    with ExitStack() as stack:
        if processes.IS_FIRST:
            try:
                folder = stack.enter_context(locked(folder, is_new))
                if check:
                    check(folder)
            except (OSError, ValueError) as error:
                refusal = error
        folder, refusal = processes.gather((folder, refusal))[0]
        if refusal:
            raise refusal if processes.IS_FIRST else SystemExit(1)
        yield folder


@contextmanager
def locked(folder: Path, is_new: bool) -> Iterator[Path]:
    """Creates a folder if necessary and holds its lock, as `claimed` describes."""
    made = [path for path in folder.parents if not path.exists()]
    if is_new:
        folder = make_new(folder)
        made = [folder, *made]
    elif not folder.exists():
        files.make_folder(folder)
        made = [folder, *made]
    lock = FileLock(folder / LOCK)
    try:
        acquire(lock, folder)
        files.remove_unfinished(folder)  # from a process that was killed while writing
        yield folder
    finally:
        if lock.is_locked:
            # Before the release: after it the file could be another process's. Windows does
            # not remove open files; there the release removes it.
            with suppress(OSError):
                (folder / LOCK).unlink()
            lock.release()
        with suppress(OSError):  # stops at the first folder that is not empty
            for path in made:
                path.rmdir()


def make_new(folder: Path) -> Path:
    """Creates and returns the first of `folder`, folder-2, folder-3 ... that does not exist."""
    files.make_folder(folder.parent)
    for number in itertools.count(1):
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        # mkdir decides: if several processes try, it succeeds in only one.
        with suppress(FileExistsError):
            path.mkdir()
            return path


def acquire(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"another process is writing into {folder}: "
            "wait until it has ended, or choose another --out"
        ) from None
    except OSError as error:
        raise OSError(f"cannot write into {folder}: {error.strerror or error}") from None


def is_empty(folder: Path) -> bool:
    """Returns whether a folder is missing, or holds only what a killed process has left."""
    return not folder.exists() or all(
        path.name == LOCK or path.name.endswith(files.UNFINISHED) for path in folder.iterdir()
    )
