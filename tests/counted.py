"""Runs tools/count.py in forks of one process, which has the fake GPU and the libraries already.

The fake GPU has to be there before torch is imported, so the server of forks.py has none. Each
line on standard input is a job in JSON: the arguments, and the file for what is printed. The
answer is a line with the exit status.
"""

import atexit
import json
import os
import runpy
import sys
import traceback

import tools.count  # noqa: F401  (the fake GPU, then torch and the project)


def run(arguments: list[str], path: str) -> int:
    """Does in a fork what `python -m tools.count ARGUMENTS` does. Returns the exit status."""
    with open(path, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["count.py", *arguments]
    status = 0
    try:
        runpy.run_module("tools.count", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:  # noqa: BLE001 (all that Python itself would print)
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return status


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(run(**job))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
