"""Compares runs of train.py: how their settings differ, and with what results.

    python -m scripts.runs out/*                              # the best accuracy first
    python -m scripts.runs out/* --plot losses.svg            # draws their losses in one picture

Settings that all runs share are printed once, above the table. Accuracies are in percent, with
their 95 % interval. The loss is the validation loss, as a mean over the splits. Differences smaller
than the intervals may be chance: eval.py --compare tests two runs row by row.
"""

import argparse
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python scripts/runs.py`

from support import cli, flags, pictures, records
from support.letters import ends, printable
from support.records import Record

# The entries of args.json that are shown first, and those that do not change what a run computes.
FIRST = ("rank", "alpha", "targets", "learning_rate", "model", "dataset")
HIDDEN = {
    "out", "command", "started_in", "resume", "debug", "push", "wandb", "wandb_run", "torchrun",
    "versions", "commit", "digests", "label_words", "base_parameters", "total_steps",
    "save_every", "log_every", "eval_every", "keep_best", "graphs", "device",
}  # fmt: skip
LONGEST = 24  # characters of a name in the table
MISSING = "-"


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser("compares runs of train.py")
    parser.add_argument("runs", nargs="+", type=flags.path, help="folders of runs")
    parser.add_argument(
        "--plot", type=flags.path, metavar="FILE", help="draw the losses into FILE.svg or FILE.png"
    )
    args = parser.parse_args()
    if args.plot and args.plot.suffix not in (".svg", ".png"):
        parser.error(f"--plot {args.plot}: the name must end in .svg or .png")
    return args


def read_runs(folders: list[Path]) -> list[Record]:
    """Returns the finished runs among these folders. Prints a line on what cannot be read."""
    runs = []
    for folder in folders:
        try:
            run = records.read(folder)
            if not run.is_finished:
                raise ValueError(f"{folder} is not finished: step {run.step:,}")
            results([run])
            runs.append(run)
        except (ValueError, OSError) as error:
            print(printable(f"left out: {error}"), file=sys.stderr)
        except (LookupError, TypeError, AttributeError, ArithmeticError):  # files in another form
            reason = "it is not as this version of train.py writes a run"
            print(printable(f"left out: {folder}: {reason}"), file=sys.stderr)
    if not runs:
        raise ValueError("there is no finished run to compare")
    return sorted(runs, key=lambda run: mean(run, "accuracy"), reverse=True)


def mean(run: Record, key: str) -> float:
    """Returns a figure of a finished run, as a mean over its splits."""
    splits = run.results["finetuned"].values()
    return sum(result[key] for result in splits) / len(splits)


# -----------------------------------------------------------------------------
# The table


def table(runs: list[Record]) -> str:
    """Returns the settings that all runs share, and a line for each run."""
    common = []
    columns = [("run", ends([printable(str(run.folder)) for run in runs], LONGEST))]
    for name in dict.fromkeys([*FIRST, *(name for run in runs for name in run.args)]):
        values = [as_text(run.args.get(name)) for run in runs]
        title = name.replace("_", " ")
        if name in HIDDEN:
            continue
        if len(set(values)) > 1:
            columns.append((title, ends(values, LONGEST)))
        elif values[0] not in (MISSING, "False"):
            common.append(f"{title} {values[0]}")
    above = textwrap.fill("all: " + ", ".join(common), 79, break_on_hyphens=False)
    below = "loss: of validation; accuracy: in percent, with its 95 % interval in brackets"
    return "\n".join([above, "", *aligned([*columns, *results(runs)]), "", below])


def aligned(columns: list[tuple[str, list[str]]]) -> list[str]:
    """Returns the lines of a table: the titles, then a line for each run."""
    padded = []
    for title, values in columns:
        cells = [title, *values]
        width = max(map(len, cells))
        padded.append([cell.rjust(width) for cell in cells])
    return [" ".join(line) for line in zip(*padded)]


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
    minutes = [f"{run.seconds / 60:.1f}" for run in runs]
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
    print(table(runs))
    if args.plot:
        names = {printable(str(run.folder)): run.entries for run in runs}
        pictures.draw_runs(names, args.plot)
        print(f"losses: {args.plot}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
