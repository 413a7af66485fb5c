"""On Ctrl-C, SIGTERM or a warning signal, a training finishes its step, saves, and stops."""

import os
import signal
import sys


class StopRequest:
    """Becomes true at the first signal that asks the process to end.

    Signals that were already ignored stay ignored, such as SIGHUP under nohup.
    """

    # Ctrl-C, and what torchrun, Slurm and Docker send before they kill. If one of these arrives
    # after the first signal, it ends the process.
    ENDS = (signal.SIGINT, signal.SIGTERM)
    # A closed terminal, and the warnings of Slurm and Grid Engine, which Windows lacks. These may
    # arrive twice: the shell and the system both report a closed terminal.
    NAMES = ("SIGHUP", "SIGUSR1", "SIGUSR2")
    WARNS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
    SIGNALS = ENDS + WARNS

    def __init__(self):
        self.received = False
        for number in self.SIGNALS:
            listen(number, self.receive)

    def receive(self, _number: int, _frame) -> None:
        if self.received:
            return
        # Nothing is saved here, because a signal may arrive in the middle of a step.
        self.received = True
        for number in self.ENDS:
            listen(number, signal.default_int_handler)
        try:
            message = "\nstopping after this step; a second Ctrl-C stops at once"
            print(message, file=sys.stderr, flush=True)
        except OSError:  # the terminal is closed
            discard_closed_outputs()
        except RuntimeError:  # the signal arrived while something else was being printed
            pass

    def __bool__(self) -> bool:
        return self.received

    def release(self) -> None:
        """Lets signals end the process again, including one that came after the last step.

        All of them raise KeyboardInterrupt, so that temporary files are removed.
        """
        for number in self.SIGNALS:
            listen(number, signal.default_int_handler)
        if self.received:
            raise KeyboardInterrupt


def listen(number: signal.Signals, handler) -> None:
    """Makes `handler` receive a signal, unless the signal is ignored."""
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, handler)


def discard_closed_outputs() -> None:
    """Discards further output to a terminal or pipe that has been closed.

    Otherwise each further line would raise an error, and so would Python's flush at exit.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except RuntimeError:  # a signal came while a line is printed there, which fails by itself
            pass
