"""report.html: a run on one page, which needs no other file and can be watched during training.

The template is report.html.jinja. Texts from models and datasets may contain HTML and scripts, so
the template escapes every text.
"""

import base64
import math
from collections import Counter
from datetime import timedelta
from pathlib import Path

from support import files, metrics, pictures
from support.records import Record, words_of

MISTAKES = 20  # how many of the most confident mistakes are shown
UNPARSED = 20  # how many completions without a number are shown
COMPLETIONS = 6  # how many of the base's most frequent completions are shown
RELOAD = 20  # seconds after which a browser reloads the page of a running training


def write(run: Record, is_under_way: bool = False) -> None:
    """Writes report.html from the other files of a run, finished or not.

    With `is_under_way` a browser reloads the page by itself until the run is finished.
    """
    # A confident mistake is more informative than a close one: it may be a wrong label or a
    # pattern that was not learned. -1 is not an answer, so it has no confidence.
    rows = predictions_of(run, "finetuned", "predictions")
    wrong = [row for row in rows if row["prediction"] not in (row["label"], -1)]
    wrong.sort(key=confidence, reverse=True)
    unparsed = [row for row in rows if row["prediction"] == -1]
    of_base = predictions_of(run, "baseline", "baseline")
    picture = run.folder / pictures.PICTURES[0]
    page = render(
        run=run,
        args=run.args,
        results=run.results,
        words=words_of(run.args),
        verdict=verdict(run),
        progress=progress(run),
        reload=RELOAD if is_under_way else None,
        duration=timedelta(seconds=round(run.seconds)),
        chance=chance(run.args),
        # Embedded in the page. Scripts in an SVG do not run if it is shown as a picture.
        picture=base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else None,
        of_base=of_base,
        completions=commonest(of_base),
        mistakes=wrong[:MISTAKES],
        mistakes_count=len(wrong),
        unparsed=unparsed[:UNPARSED],
        unparsed_count=len(unparsed),
    )
    with files.replacing(run.folder / "report.html") as temporary:
        # A path on the command line may have bytes that are not UTF-8.
        temporary.write_text(page, encoding="utf-8", errors="replace")


def draw_pictures(run: Record) -> None:
    """Draws the losses of a run, if it has any."""
    # "loss" is the training loss; a line about an evaluation has SPLIT_loss instead.
    if any("loss" in entry for entry in run.entries):
        paths = [run.folder / name for name in pictures.PICTURES]
        pictures.draw_loss(run.entries, chance(run.args), *paths)


def chance(args: dict) -> float | None:
    """Returns the loss of guessing evenly among three labels, or None for the full loss.

    The loss is a mean over two ids, the label and the end of text, and the second is certain.
    """
    return math.log(3) / 2 if args["loss"] == "answer" else None


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
    text = f"Step {run.step:,} of {run.steps:,}"
    losses = [entry["loss"] for entry in run.entries if "loss" in entry]
    if losses:
        text += f", training loss {losses[-1]:.3g}"
    evaluated = [entry for entry in run.entries if "loss" not in entry and entry["step"] > 0]
    if evaluated:
        entry = evaluated[-1]
        accuracies = [
            f"{key.removesuffix('_accuracy')} {percent(value)}"
            for key, value in entry.items()
            if key.endswith("_accuracy")
        ]
        text += f"; accuracy after step {entry['step']:,}: {', '.join(accuracies)}"
    return text + "."


def percent(share: float) -> str:
    """Returns a share in percent, with one digit; more would be noise on any test set."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


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
    counts = Counter((row["completion"], row["prediction"]) for row in rows)
    return [(*written, count) for written, count in counts.most_common(COMPLETIONS)]


def confidence(row: dict) -> float:
    """Returns the probability of the answer that was given, or 0 if it is none of the three."""
    return row["scores"][row["prediction"]] if row["prediction"] in (0, 1, 2) else 0.0


def render(**values) -> str:
    """Returns the template with these values filled in."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,  # jinja's default, False, would let scripts in texts run
        # These two prevent empty lines from lines with only {% ... %}.
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    )
    environment.filters["percent"] = percent
    return environment.get_template("report.html.jinja").render(values)
