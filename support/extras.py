"""The optional parts of a run: pictures, page and card, W&B, an upload.

If one of them fails, that is reported in one line. The run goes on, and so do the other parts.
"""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from support.stopping import discard_closed_outputs


class Extras:
    """Attempts that may fail. `failed` lists the names of those whose last attempt failed."""

    def __init__(self):
        self.failed = []

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Turns an error in its body into one line on stderr, and with --debug a traceback.

        A page is written many times: if it fails each time, one line says so.
        """
        try:
            yield
        # Any error of any library: a bug in a drawing library must not cost a finished run.
        except Exception as error:
            if "--debug" in sys.argv:
                traceback.print_exc()
            if what not in self.failed:
                self.failed.append(what)
                say(what, error)
        else:
            if what in self.failed:
                self.failed.remove(what)


def say(what: str, error: Exception) -> None:
    # Some libraries raise errors of several lines, and some without a message.
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError):  # matplotlib or wandb
        reason += f": pip install {error.name}"
    try:
        print(f"error: {what}: {reason}", file=sys.stderr, flush=True)
    except OSError:
        discard_closed_outputs()
