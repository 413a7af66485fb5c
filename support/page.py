"""The pictures of a finished run, and report.html, which needs no other file.

The page is the template report.html.jinja. A model or a dataset may hold any text, HTML and
scripts too, so the template escapes every text: none can act on the page.
"""

import base64
from pathlib import Path

from support import files, metrics, pictures
from support.labels import LABELS

MISTAKES = 20  # how many of the most confident ones are shown
UNPARSED = 50  # how many completions without a number are shown


def write(directory: Path) -> None:
    """Writes report.html from the other files of a run, with those pictures that are there."""
    directory = Path(directory)
    args = files.read_json(directory / "args.json")
    results = files.read_json(directory / "results.json")

    # The rows to read.
    rows = [
        row | {"split": split}
        for split in results.get("finetuned", {})
        for row in metrics.read_predictions(directory / f"predictions_{split}.jsonl")
    ]
    # A confident mistake says more than a close one: a wrong label, a pattern missed.
    # -1 is not an answer, so it has no confidence and a list of its own.
    wrong = [row for row in rows if row["prediction"] not in (row["label"], -1)]
    wrong.sort(key=confidence, reverse=True)
    unparsed = [row for row in rows if row["prediction"] == -1]

    # The page.
    page = render(
        args=args,
        results=results,
        stages=list(metrics.stages(results)),
        labels=LABELS,
        pictures=read_pictures(directory),
        mistakes=wrong[:MISTAKES],
        mistakes_count=len(wrong),
        unparsed=unparsed[:UNPARSED],
        unparsed_count=len(unparsed),
    )
    with files.replacing(directory / "report.html") as temporary:
        # Half of a surrogate pair, which a tokenizer can produce, has no form in UTF-8.
        temporary.write_text(page, encoding="utf-8", errors="replace")


def draw_pictures(directory: Path) -> None:
    """Draws loss.png and confusion.png, where the run has the numbers."""
    results = files.read_json(directory / "results.json")
    rows = files.read_lines(directory / "metrics.jsonl")
    try:
        # "loss" is the training loss; a line of an evaluation has SPLIT_loss.
        if any("loss" in row for row in rows):
            pictures.draw_loss(rows, directory / "loss.png")
    finally:  # the one may be drawn where the other cannot
        if results.get("finetuned"):
            pictures.draw_confusion(results["finetuned"], directory / "confusion.png")


def read_pictures(directory: Path) -> dict[str, str]:
    """Returns the run's pictures by their headings, in base64: a page can hold them so."""
    contents = {}
    for name, heading in pictures.PICTURES.items():
        path = directory / name
        if path.is_file():
            contents[heading] = base64.b64encode(path.read_bytes()).decode()
    return contents


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
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    )
    return environment.get_template("report.html.jinja").render(values)
