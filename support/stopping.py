"""Ctrl-C and SIGTERM let a training finish its step and save."""

import signal
import sys


class StopRequest:
    """Becomes true at the first Ctrl-C or SIGTERM; the second one ends the process at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.received = False
        for number in self.SIGNALS:
            signal.signal(number, self.receive)

    def receive(self, number: int, _frame) -> None:
        self.received = True
        signal.signal(number, signal.default_int_handler)
        print("\nstopping after this step; once more ends it at once", file=sys.stderr, flush=True)

    def __bool__(self) -> bool:
        return self.received

    def release(self) -> None:
        """From here on a signal ends the process: everything is saved."""
        for number in self.SIGNALS:
            signal.signal(number, signal.default_int_handler)
