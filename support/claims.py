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
    folder is claimed, when no other process can change them. A folder that is still empty at
    the end is removed.

    If a run has several processes, call this after processes.start: only the first one claims
    its folder, and all of them yield that one. If another run holds the folder, the first
    process raises ValueError and the others exit.
    """
    refusal = None
    with ExitStack() as stack:
        if processes.IS_FIRST:
            try:
                folder = make_new(folder) if is_new else folder
                stack.enter_context(locked(folder))
                if check:
                    check(folder)
            except (OSError, ValueError) as error:
                refusal = error
        folder, refusal = processes.gather((folder, refusal))[0]
        if refusal:
            raise refusal if processes.IS_FIRST else SystemExit(1)
        yield folder


def make_new(folder: Path) -> Path:
    """Creates and returns the first of `folder`, folder-2, folder-3 ... that does not exist."""
    # resolve() follows a link to a missing folder, which mkdir would report as existing.
    folder.parent.resolve().mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        # mkdir decides: if several processes try, it succeeds in only one.
        with suppress(FileExistsError):
            path.mkdir()
            return path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Creates a folder if necessary and holds its lock, as `claimed` describes."""
    folder.resolve().mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK).acquire(blocking=False):
            files.remove_unfinished(folder)  # from a process that was killed while writing
            try:
                yield
            finally:
                # Before the release: after it the file could be another process's. Windows does
                # not remove open files; there the release removes it.
                with suppress(OSError):
                    (folder / LOCK).unlink()
    except Timeout:
        raise ValueError(
            f"another process is writing into {folder}: "
            "wait until it has ended, or choose another --out"
        ) from None
    finally:
        with suppress(OSError):  # it is not empty
            folder.rmdir()
