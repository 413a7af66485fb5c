"""Ctrl-C and SIGTERM let a training finish its step and save."""

import signal
import sys


class StopRequest:
    """Becomes true at the first Ctrl-C or SIGTERM; the second one ends the process."""

    # Ctrl-C, and what torchrun, Slurm and Docker send before they kill.
    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.received = False
        for number in self.SIGNALS:
            signal.signal(number, self.receive)

    def receive(self, _number: int, _frame) -> None:
        # Nothing is saved here: a signal may come in the middle of a step.
        self.received = True
        self.release()
        message = "\nstopping after this step; once more ends it at once"
        print(message, file=sys.stderr, flush=True)

    def __bool__(self) -> bool:
        return self.received

    def release(self) -> None:
        """Lets a signal end the process again.

        It raises KeyboardInterrupt, for SIGTERM too, so temporary files are removed.
        """
        for number in self.SIGNALS:
            signal.signal(number, signal.default_int_handler)
