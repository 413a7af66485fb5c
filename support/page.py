"""report.html: a run on one page, which needs no other file, and can be watched while it grows.

The page is the template report.html.jinja. A model or a dataset may hold any text, HTML and
scripts too, so the template escapes every text: none can act on the page.
"""

import base64
import math
import re
import time
from collections import Counter
from pathlib import Path

from support import files, letters, metrics, pictures, records
from support.records import Record

MISTAKES = 20  # how many of the most confident ones are shown
UNPARSED = 20  # how many completions without a number are shown
COMPLETIONS = 6  # how many of what the base wrote most often are shown
RELOAD = 20  # seconds after which a browser reads the page of a run under way again
WATCHED = 3600  # seconds after its last line in which it does: a run that was killed writes none


def write(
    directory: Path, stopped: tuple[int, str] | None = None, is_under_way: bool = False
) -> None:
    """Writes report.html from the other files of a run, as far as it has come.

    `stopped` is the last step of a run that has been stopped, and the command that resumes it.
    With `is_under_way` a browser reads the page again by itself.
    """
    directory = Path(directory)
    run = records.read(directory)

    # The rows to read.
    rows = predictions_of(run, "finetuned", "predictions")
    # A confident mistake says more than a close one: a wrong label, a pattern missed.
    # -1 is not an answer, so it has no confidence and a list of its own.
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
        # A page can hold a picture so; as a picture no SVG runs a script.
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
        # Half of a surrogate pair, which a tokenizer can produce, has no form in UTF-8.
        temporary.write_text(page, encoding="utf-8", errors="replace")


def draw_pictures(directory: Path) -> None:
    """Draws the losses of a run, where it has some."""
    directory = Path(directory)
    entries, _ = records.read_entries(directory / "metrics.jsonl")
    # "loss" is the training loss; a line of an evaluation has SPLIT_loss.
    if any("loss" in entry for entry in entries):
        paths = [directory / name for name in pictures.PICTURES]
        pictures.draw_loss(entries, chance(files.read_json(directory / "args.json")), *paths)


def chance(args: dict) -> float | None:
    """Returns the loss of guessing evenly among three labels; None for a loss on all tokens.

    The loss is a mean over two ids, the label and the end of text, and the latter is certain.
    """
    return math.log(3) / 2 if args.get("loss") == "answer" else None


# -----------------------------------------------------------------------------
# Sentences


def verdict(run: Record) -> str:
    """Returns what fine-tuning has changed, over the rows of all splits together."""
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
    comparison = "No difference from guessing can be told from so few rows."
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
    """Returns rows, right answers, and rows of each split's most frequent label, in all."""
    return {
        "n": sum(result["n"] for result in splits.values()),
        "correct": sum(result["correct"] for result in splits.values()),
        "majority": sum(result["majority"] * result["n"] for result in splits.values()),
    }


def progress(run: Record) -> str | None:
    """Returns how far a run has come, with its last loss and accuracies; None of a finished one."""
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
            if key.endswith("_accuracy")
        ]
        text += f"; accuracy after step {entry['step']:,}: {', '.join(accuracies)}"
    return text + "."


def percent(share: float) -> str:
    """Returns a share in percent. A digit more would be within the interval of any test set."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def arguments(command) -> list[str]:
    """Returns the arguments of a command line, with their quotes."""
    return re.findall(r"""(?:'[^']*'|"[^"]*"|\S)+""", str(command))


def duration(seconds: float) -> str:
    """Returns a time as people say it."""
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    if seconds < 6000:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"


# -----------------------------------------------------------------------------
# Rows


def predictions_of(run: Record, stage: str, prefix: str) -> list[dict]:
    """Returns the predictions of all splits of a stage, each with its split."""
    return [
        row | {"split": split}
        for split in run.results.get(stage, {})
        for row in metrics.read_predictions(run.folder / f"{prefix}_{split}.jsonl")
    ]


def commonest(rows: list[dict]) -> list[tuple[str, int, int]]:
    """Returns (completion, what was read of it, number of rows) of the commonest completions."""
    counts = Counter((row.get("completion", ""), row["prediction"]) for row in rows)
    return [(text, read, count) for (text, read), count in counts.most_common(COMPLETIONS)]


def confidence(row: dict) -> float:
    """Returns the probability of the answer that was given, and 0 where it is not known."""
    # `scores` has a place for 0, 1 and 2 only, and a model may answer 7.
    if "scores" not in row or row["prediction"] not in (0, 1, 2):
        return 0.0
    return row["scores"][row["prediction"]]


def render(**values) -> str:
    """Returns the template with these values filled in."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,  # jinja's default is False, and would let every text act
        # These two leave no empty lines where a line holds only {% ... %}.
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=letters.harmless,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    )
    environment.filters["percent"] = percent
    environment.filters["arguments"] = arguments
    environment.filters["duration"] = duration
    return environment.get_template("report.html.jinja").render(values)
