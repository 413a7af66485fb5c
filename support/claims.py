"""One process at a time writes into a folder: that of a run, an evaluation or a merged model.

The process holds a lock of the operating system on a file in the folder. The lock ends with
its process, whatever ends that, so a killed run blocks nothing.
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
    """Yields a folder that no other process claims until the end; it is made where it is not.

    With `is_new` it is one that was not there: `folder`, or folder-2, folder-3 and so on.
    `check` may raise a ValueError about what the folder holds. It is called once the folder
    is claimed, so no other process changes that any more. A folder that was made and is
    still empty at the end is removed.

    Of several processes of a run the first alone claims, after processes.start. All of them
    yield the same folder. Raises ValueError where another run has it, in the first process; the
    others end.
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
    """Makes a folder and holds its lock, as `claimed` says."""
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
        files.remove_unfinished(folder)  # of a process that was killed while it wrote
        yield folder
    finally:
        if lock.is_locked:
            # Before the release, or it could be another process's. Windows removes no file
            # that is open; there the release removes it.
            with suppress(OSError):
                (folder / LOCK).unlink()
            lock.release()
        with suppress(OSError):  # the first that is not empty
            for path in made:
                path.rmdir()


def make_new(folder: Path) -> Path:
    """Makes and returns the first of `folder`, folder-2, folder-3 ... that is not there."""
    files.make_folder(folder.parent)
    for number in itertools.count(1):
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        # mkdir decides: of several processes one makes it.
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
    """Returns whether a folder is not there, or holds nothing but what a killed process left."""
    return not folder.exists() or all(
        path.name == LOCK or path.name.endswith(files.UNFINISHED) for path in folder.iterdir()
    )
