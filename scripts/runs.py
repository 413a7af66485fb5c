"""Compares runs of train.py: how their settings differ, and with what results.

    python -m scripts.runs out/*                              # the best accuracy first
    python -m scripts.runs out/* --plot losses.svg            # draws their losses in one picture
    python -m scripts.runs out/* --json > runs.json

Settings that all runs share are printed once, above the table. Accuracies are in percent, with
their 95 % interval. The loss is the validation loss, as a mean over the splits. Differences smaller
than the intervals may be chance: eval.py --compare tests two runs row by row.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python scripts/runs.py`

from support import card, cli, flags, pictures, records
from support.letters import ends, printable
from support.records import Record

# The settings that define a run, the most important first.
FIRST = ("rank", "alpha", "scale", "targets", "learning_rate", "model", "dataset")
SETTINGS = tuple(dict.fromkeys(FIRST + card.SETTINGS + ("eval_limit", "device_name")))
# Any other entry of args.json becomes a column if the runs differ in it, except these, which do not
# change what a run computes.
HIDDEN = {
    "out", "command", "started_in", "resume", "debug", "push", "wandb", "wandb_run", "torchrun",
    "versions", "commit", "digests", "label_words", "base_parameters", "total_steps",
    "save_every", "log_every", "device",
}  # fmt: skip
SHORT = {"learning_rate": "rate", "batch_size": "batch", "targets": "on", "loss": "loss on"}
LONGEST = 24  # characters of a name in the table
MISSING = "-"


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser("compares runs of train.py")
    parser.add_argument("runs", nargs="+", type=flags.path, help="folders of runs")
    parser.add_argument("--json", action="store_true", help="print JSON, with every setting")
    parser.add_argument(
        "--plot", type=flags.path, metavar="FILE", help="draw the losses into FILE.svg or FILE.png"
    )
    args = parser.parse_args()
    if args.plot and args.plot.suffix not in (".svg", ".png", ".pdf"):
        parser.error(f"--plot {args.plot}: the name must end in .svg, .png or .pdf")
    return args


def read_runs(folders: list[Path]) -> list[Record]:
    """Returns the finished runs among these folders. Prints a line on what cannot be read."""
    runs = []
    for folder in dict.fromkeys(folders):  # each once
        try:
            run = records.read(folder)
            if not run.is_finished:
                steps = f" of {run.steps:,}" if run.steps else ""
                raise ValueError(f"{folder} is not finished: step {run.step:,}{steps}")
            summary(run)
            runs.append(run)
        except (ValueError, OSError) as error:
            print(printable(f"left out: {error}"), file=sys.stderr)
        except (KeyError, TypeError, AttributeError):  # statistics in another form
            reason = "its results.json is not as train.py writes it"
            print(printable(f"left out: {folder}: {reason}"), file=sys.stderr)
    if not runs:
        raise ValueError("there is no finished run to compare")
    return sorted(runs, key=accuracy, reverse=True)


def accuracy(run: Record) -> float:
    """Returns the accuracy of a finished run, as a mean over its splits."""
    return mean(run, "accuracy")


def mean(run: Record, key: str) -> float:
    splits = run.results["finetuned"].values()
    return sum(result[key] for result in splits) / len(splits)


def summary(run: Record) -> dict:
    """Returns what --json prints about a run."""
    return {
        "run": str(run.folder),
        "settings": {name: run.args.get(name) for name in SETTINGS},
        "trained": run.trained,
        "loss": mean(run, "loss"),
        "splits": {
            split: {key: result[key] for key in ("accuracy", "ci95", "n", "majority", "loss")}
            for split, result in run.results["finetuned"].items()
        },
        "seconds": run.seconds,
        "memory_gib": run.memory,
    }


# -----------------------------------------------------------------------------
# The table


def table(runs: list[Record]) -> str:
    """Returns the settings that all runs share, and a line for each run.

    Settings that are not among the main ones come last, where a narrow terminal may break lines.
    """
    common = []
    main = []  # columns: (title, a text for each run)
    others = []
    settings = [settings_of(run, runs) for run in runs]
    for name in dict.fromkeys(SETTINGS + tuple(name for values in settings for name in values)):
        values = ends([as_text(values.get(name)) for values in settings], LONGEST)
        title = name.replace("_", " ")
        if name not in HIDDEN and len(set(values)) > 1:
            columns = main if name in FIRST else others
            columns.append((SHORT.get(name, title), values))
        elif name in SETTINGS and values[0] not in (MISSING, "False"):
            # textwrap does not break lines at these spaces, so a name and its value stay together.
            common.append(f"{title} {values[0]}".replace(" ", "\N{NO-BREAK SPACE}"))
    names = [printable(run.folder.resolve().name) for run in runs]
    if len(set(names)) < len(names):
        names = [printable(str(run.folder)) for run in runs]
    above = textwrap.fill(
        "all: " + ", ".join(common), 79, subsequent_indent="     ", break_on_hyphens=False
    )
    above = above.replace("\N{NO-BREAK SPACE}", " ")
    lines = aligned([("run", ends(names, LONGEST)), *main, *results(runs), *others])
    below = ["loss: of validation; accuracy: in percent, with its 95 % interval in brackets"]
    if any("scale" in values for values in settings):
        below.append("scale: alpha / rank, by which the update is multiplied")
    return "\n".join([above, "", *lines, "", *below])


def settings_of(run: Record, runs: list[Record]) -> dict:
    """Returns the arguments of a run and, if the runs differ in rank, the scale of its update."""
    alpha = run.args.get("alpha")
    rank = run.args.get("rank")
    if not alpha or not rank or all(other.args.get("rank") == rank for other in runs):
        return run.args
    return run.args | {"scale": alpha / rank}


def aligned(columns: list[tuple[str, list[str]]]) -> list[str]:
    """Returns the lines of a table: titles and rows, with the first column left-aligned."""
    columns = [(title, *values) for title, values in columns]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for first, *others in zip(*columns):
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append(" ".join(cells).rstrip())
    return lines


def as_text(value) -> str:
    """Returns a setting as the table shows it."""
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{value:.12g}"  # 0.3 for 0.1 + 0.2
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return printable(text.replace("_proj", ""))


def results(runs: list[Record]) -> list[tuple[str, list[str]]]:
    """Returns the columns of what was measured: (title, a text for each run)."""
    columns = [
        ("trained", [f"{run.trained:,}" if run.trained else MISSING for run in runs]),
        ("loss", [f"{mean(run, 'loss'):.3f}" for run in runs]),
    ]
    for split in dict.fromkeys(split for run in runs for split in run.results["finetuned"]):
        title = split.removeprefix("validation").strip("_")[:LONGEST] or "accuracy"
        columns.append((title, [shares(run.results["finetuned"].get(split)) for run in runs]))
    minutes = [f"{run.seconds / 60:.1f}" if run.seconds else MISSING for run in runs]
    memory = [f"{run.memory:.2f}" if run.memory else MISSING for run in runs]
    return [*columns, ("min", minutes), ("GiB", memory)]


def shares(result: dict | None) -> str:
    """Returns accuracy and interval in percent: "72.3 (68-76)"."""
    if result is None:
        return MISSING
    low, high = result["ci95"]
    return f"{100 * result['accuracy']:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def main() -> None:
    args = parse_arguments()
    runs = read_runs(args.runs)
    if args.json:
        print(json.dumps([summary(run) for run in runs], indent=2))
    else:
        print(table(runs))
    if args.plot:
        names = {printable(str(run.folder)): run.entries for run in runs}
        pictures.draw_runs(names, args.plot)
        print(f"losses: {args.plot}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
