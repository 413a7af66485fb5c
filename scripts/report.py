"""Draws the pictures of a run and writes its report.html once more, as far as it has come.

    python -m scripts.report out/demo

train.py does this as a run grows and at its end. Repeat it when the template or a picture has
changed, or for a run that was killed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python scripts/report.py`

from support import cli, flags, page, records
from support.extras import Extras
from support.letters import printable


def main() -> None:
    parser = cli.Parser("draws the pictures and writes report.html of a run again")
    parser.add_argument("run", type=flags.path, help="the folder of a run")
    args = parser.parse_args()
    run = records.read(args.run)  # raises for another folder, or a damaged file
    if run.damage:
        print(printable(run.damage), file=sys.stderr)
    extras = Extras()
    with extras.attempt("the pictures"):
        page.draw_pictures(args.run)
    with extras.attempt("report.html"):  # with those pictures that are there
        page.write(args.run)
        print(args.run / "report.html")
    if extras.failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
