"""What a run can do without: its pictures, page and card, W&B, an upload.

Whatever goes wrong there is one line, and neither ends the run nor keeps the rest of it from
being done.
"""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from support.stopping import discard_closed_outputs


class Extras:
    """Attempts that may fail. `failed` holds the names of those that did, at their last try."""

    def __init__(self):
        self.failed = []
        self.said = set()  # a page that is written again and again may fail as often

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Turns an error in here into one line on stderr; with --debug into a traceback."""
        try:
            yield
            if what in self.failed:
                self.failed.remove(what)
        # Any error of any library: a bug in one that draws is not worth a finished run.
        except Exception as error:
            if what not in self.failed:
                self.failed.append(what)
            if "--debug" in sys.argv:
                traceback.print_exc()
            # Libraries raise errors of several lines, and some without a word.
            reason = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, ModuleNotFoundError):  # matplotlib or wandb
                reason += f": pip install {error.name}"
            line = f"error: {what}: {reason}"
            if line in self.said:
                return
            self.said.add(line)
            try:
                print(line, file=sys.stderr, flush=True)
            except OSError:
                discard_closed_outputs()
