"""Ctrl-C, SIGTERM and warnings of other kinds let a training finish its step and save."""

import os
import signal
import sys


def known(*names: str) -> tuple[signal.Signals, ...]:
    """Returns those signals that this system has. Windows lacks most of them."""
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


class StopRequest:
    """Becomes true at the first signal that asks for an end.

    A signal that was ignored when the process began, as nohup ignores SIGHUP, stays ignored.
    """

    # Ctrl-C, and what torchrun, Slurm and Docker send before they kill. The second one of
    # them ends the process.
    ENDS = known("SIGINT", "SIGTERM")
    # A terminal that is closed, and the warnings of Slurm and Grid Engine. They may come
    # twice: the shell and the system both say that a terminal is closed.
    WARNS = known("SIGHUP", "SIGUSR1", "SIGUSR2")
    SIGNALS = ENDS + WARNS

    def __init__(self):
        self.received = False
        for number in self.SIGNALS:
            listen(number, self.receive)

    def receive(self, _number: int, _frame) -> None:
        if self.received:
            return
        # Nothing is saved here: a signal may come in the middle of a step.
        self.received = True
        for number in self.ENDS:
            listen(number, signal.default_int_handler)
        try:
            message = "\nstopping after this step; once more ends it at once"
            print(message, file=sys.stderr, flush=True)
        except OSError:  # the terminal is closed
            discard_closed_outputs()
        except RuntimeError:  # the signal came while something else was printed
            pass

    def __bool__(self) -> bool:
        return self.received

    def release(self) -> None:
        """Lets a signal end the process again; so does one that came after the last step.

        It raises KeyboardInterrupt, whichever it is, so temporary files are removed.
        """
        for number in self.SIGNALS:
            listen(number, signal.default_int_handler)
        if self.received:
            raise KeyboardInterrupt


def listen(number: signal.Signals, handler) -> None:
    """Makes `handler` receive a signal, unless that is ignored."""
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, handler)


def discard_closed_outputs() -> None:
    """Lets what is printed go nowhere where nobody can read it: a closed terminal or pipe.

    Otherwise each further line would raise an error, the last flush of Python too.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except RuntimeError:  # a signal came while a line is printed there, which fails by itself
            pass
