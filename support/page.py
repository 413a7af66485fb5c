"""report.html: a run on one page, which needs no other file and can be watched during training.

The template is report.html.jinja. Texts from models and datasets may contain HTML and scripts, so
the template escapes every text.
"""

import base64
import math
import re
import time
from collections import Counter
from pathlib import Path

from support import files, letters, metrics, pictures, records
from support.records import Record

MISTAKES = 20  # how many of the most confident mistakes are shown
UNPARSED = 20  # how many completions without a number are shown
COMPLETIONS = 6  # how many of the base's most frequent completions are shown
RELOAD = 20  # seconds after which a browser reloads the page of a running training
WATCHED = 3600  # seconds after the last write in which it does: a killed run writes no more


def write(
    directory: Path, stopped: tuple[int, str] | None = None, is_under_way: bool = False
) -> None:
    """Writes report.html from the other files of a run, finished or not.

    For a run that was stopped, `stopped` is its last step and the command that resumes it.
    With `is_under_way` a browser reloads the page by itself.
    """
    directory = Path(directory)
    run = records.read(directory)

    # The rows that are shown.
    rows = predictions_of(run, "finetuned", "predictions")
    # A confident mistake is more informative than a close one: it may be a wrong label or a
    # pattern that was not learned. -1 is not an answer, so it has no confidence.
    wrong = [row for row in rows if row["prediction"] not in (row["label"], -1)]
    wrong.sort(key=confidence, reverse=True)
    unparsed = [row for row in rows if row["prediction"] == -1]
    of_base = predictions_of(run, "baseline", "baseline")
    picture = directory / pictures.PICTURES[0]

    # The page.
    page = render(
        run=run,
        args=run.args,
        results=run.results,
        words=run.words,
        verdict=verdict(run),
        progress=progress(run),
        stopped=stopped,
        reload=RELOAD if is_under_way else None,
        watched_until=time.time() + WATCHED,
        chance=chance(run.args),
        # Embedded in the page. Scripts in an SVG do not run if it is shown as a picture.
        picture=base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else None,
        example=of_base[0] if of_base else None,
        of_base=len(of_base),
        completions=commonest(of_base),
        mistakes=wrong[:MISTAKES],
        mistakes_count=len(wrong),
        unparsed=unparsed[:UNPARSED],
        unparsed_count=len(unparsed),
    )
    with files.replacing(directory / "report.html") as temporary:
        # A path on the command line may have bytes that are not UTF-8.
        temporary.write_text(page, encoding="utf-8", errors="replace")


def draw_pictures(directory: Path) -> None:
    """Draws the losses of a run, if it has any."""
    directory = Path(directory)
    entries, _ = records.read_entries(directory / "metrics.jsonl")
    # "loss" is the training loss; a line about an evaluation has SPLIT_loss instead.
    if any("loss" in entry for entry in entries):
        paths = [directory / name for name in pictures.PICTURES]
        pictures.draw_loss(entries, chance(files.read_json(directory / "args.json")), *paths)


def chance(args: dict) -> float | None:
    """Returns the loss of guessing evenly among three labels, or None for the full loss.

    The loss is a mean over two ids, the label and the end of text, and the second is certain.
    """
    return math.log(3) / 2 if args.get("loss") == "answer" else None


# -----------------------------------------------------------------------------
# Sentences


def verdict(run: Record) -> str:
    """Returns sentences on what fine-tuning has changed, over the rows of all splits."""
    base = total(run.results.get("baseline", {}))
    tuned = total(run.results.get("finetuned", {}))
    if not base["n"]:
        return "The base has not been evaluated yet."
    guessing = (
        f"Always giving the most frequent label would get {percent(base['majority'] / base['n'])}."
    )
    of_base = f"the base answers {base['correct']:,} right ({percent(base['correct'] / base['n'])})"
    if not tuned["n"]:
        return f"Of {base['n']:,} validation rows {of_base}. {guessing}"
    low, high = metrics.wilson_interval(tuned["correct"], tuned["n"])
    majority = tuned["majority"] / tuned["n"]
    comparison = "No difference from guessing can be shown with so few rows."
    if low > majority:
        comparison = "The fine-tuned model is better than guessing."
    elif high < majority:
        comparison = "The fine-tuned model is worse than guessing."
    return (
        f"Of {tuned['n']:,} validation rows {of_base}, the fine-tuned model {tuned['correct']:,} "
        f"({percent(tuned['correct'] / tuned['n'])}; 95 % interval {100 * low:.1f} to "
        f"{percent(high)}). {guessing} {comparison}"
    )


def total(splits: dict[str, dict]) -> dict:
    """Returns the total number of rows, right answers, and rows with the most frequent label."""
    return {
        "n": sum(result["n"] for result in splits.values()),
        "correct": sum(result["correct"] for result in splits.values()),
        "majority": sum(result["majority"] * result["n"] for result in splits.values()),
    }


def progress(run: Record) -> str | None:
    """Returns how far a run is, with its last loss and accuracies, or None if it is finished."""
    if run.is_finished:
        return None
    text = f"Step {run.step:,}"
    if run.steps:
        text += f" of {run.steps:,}"
    losses = [entry["loss"] for entry in run.entries if entry.get("loss") is not None]
    if losses:
        text += f", training loss {losses[-1]:.3g}"
    evaluated = [entry for entry in run.entries if "loss" not in entry and entry["step"] > 0]
    if evaluated:
        entry = evaluated[-1]
        accuracies = [
            f"{key.removesuffix('_accuracy')} {percent(value)}"
            for key, value in entry.items()
            if key.endswith("_accuracy") and value is not None
        ]
        text += f"; accuracy after step {entry['step']:,}: {', '.join(accuracies)}"
    return text + "."


def percent(share: float) -> str:
    """Returns a share in percent, with one digit; more would be noise on any test set."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def arguments(command) -> list[str]:
    """Returns the words of a command line, with their quotes."""
    return re.findall(r"""(?:'[^']*'|"[^"]*"|\S)+""", str(command))


def duration(seconds: float) -> str:
    """Returns a duration in seconds, minutes or hours, whichever is readable."""
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    if seconds < 6000:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"


# -----------------------------------------------------------------------------
# Rows


def predictions_of(run: Record, stage: str, prefix: str) -> list[dict]:
    """Returns the predictions of all splits in a stage, each with the name of its split."""
    return [
        row | {"split": split}
        for split in run.results.get(stage, {})
        for row in metrics.read_predictions(run.folder / f"{prefix}_{split}.jsonl")
    ]


def commonest(rows: list[dict]) -> list[tuple[str, int, int]]:
    """Returns (completion, its prediction, number of rows) for the most frequent completions."""
    counts = Counter((row.get("completion", ""), row["prediction"]) for row in rows)
    return [(text, read, count) for (text, read), count in counts.most_common(COMPLETIONS)]


def confidence(row: dict) -> float:
    """Returns the probability of the answer that was given, or 0 if it is not known."""
    # `scores` only covers 0, 1 and 2, but a model may answer 7.
    if "scores" not in row or row["prediction"] not in (0, 1, 2):
        return 0.0
    return row["scores"][row["prediction"]]


def render(**values) -> str:
    """Returns the template with these values filled in."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,  # jinja's default, False, would let scripts in texts run
        # These two prevent empty lines from lines with only {% ... %}.
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=letters.harmless,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    )
    environment.filters["percent"] = percent
    environment.filters["arguments"] = arguments
    environment.filters["duration"] = duration
    return environment.get_template("report.html.jinja").render(values)
