"""Runs scripts on the fake GPU, in forks of one process that has it and the libraries already.

The fake GPU has to be there before torch is imported, so the server of forks.py has none. Each
line on standard input is a job in JSON: the arguments of `python`, and the file for what is
printed. The answer is a line with the exit status.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import sys
import traceback

import tools.count  # noqa: F401  (the fake GPU, then torch and the project)

# isort: split
import quant
from support import page

quant.kernels()  # imports bitsandbytes
# What torch imports for its first fake tensors, and a run for its report.
for library in ("torch._meta_registrations", "torch._refs", "jinja2"):
    importlib.import_module(library)
page.draw_pictures = lambda directory: None  # takes a second, and no GPU


def run(arguments: list[str], path: str) -> int:
    """Does in a fork what `python ARGUMENTS` does. Returns the exit status."""
    with open(path, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    first, *others = arguments
    status = 0
    try:
        if first == "-m":
            sys.argv = others
            runpy.run_module(others[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    except BaseException:  # noqa: BLE001 (all that Python itself would print)
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return status


def main() -> None:
    gc.freeze()  # the collector leaves alone what has been imported
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(run(**job))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
