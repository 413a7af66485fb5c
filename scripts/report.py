"""Draws the pictures of a run again, and writes its report.html, finished or not.

    python -m scripts.report out/demo

train.py does this during a run and at its end. Use this script after a change of the template or of
a picture, or for a run that was killed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python scripts/report.py`

from support import cli, flags, page, records
from support.extras import Extras


def main() -> None:
    parser = cli.Parser("draws the pictures of a run and writes its report.html again")
    parser.add_argument("run", type=flags.path, help="the folder of a run")
    args = parser.parse_args()
    run = records.read(args.run)  # raises if the folder holds no run, or a file is damaged
    extras = Extras()
    with extras.attempt("the pictures"):
        page.draw_pictures(run)
    with extras.attempt("report.html"):  # with the pictures that exist
        page.write(run)
        print(run.folder / "report.html")
    if extras.failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
