"""Draws the pictures of a finished run and writes its report.html once more.

    python -m scripts.report out/demo

train.py does this at the end of a run. Repeat it when the template or a picture has changed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python scripts/report.py`

from support import cli, flags, page
from support.extras import Extras


def main() -> None:
    parser = cli.Parser("draws the pictures and writes report.html of a run again")
    parser.add_argument("run", type=flags.path, help="the directory of a finished run")
    args = parser.parse_args()
    for name in ("args.json", "results.json"):
        if not (args.run / name).is_file():
            raise ValueError(f"{args.run} is not a finished run of train.py: it has no {name}")
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
