"""Uploads a run to the Hugging Face Hub, with its model card.

    hf auth login
    python -m scripts.push --adapter out/demo --repo me/phi-2-mnli

It uploads no row of the data and no path of this machine: see support/upload.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python scripts/push.py`

from data import PROMPT
from support import cli, flags, hub, upload


def main() -> None:
    parser = cli.Parser("uploads the adapter, the card and the results of a run to the Hub")
    parser.add_argument("--adapter", type=flags.path, required=True, help="the folder of a run")
    parser.add_argument(
        "--repo",
        type=hub.repository,
        required=True,
        metavar="OWNER/NAME",
        help="the repository on the Hub; it is created if it does not exist",
    )
    parser.add_argument("--private", action="store_true", help="create it as a private repository")
    args = parser.parse_args()
    print(upload.push(args.adapter, args.repo, PROMPT, args.private))


if __name__ == "__main__":
    cli.run(main)
