"""The pictures of a run: its losses, and its answers by label.

What is drawn together differs in its line or marker and not in its colour alone, so that it can
be told apart in print and by readers who see colours differently. matplotlib takes about a
second to import, so only `draw` imports it.
"""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support import files
from support.labels import LABELS

# What page.draw_pictures draws into a run's directory, and the heading of each picture
PICTURES = {
    "loss.png": "Training and validation loss, and the learning rate",
    "confusion.png": "Answers by label",
}
# Of validation losses, as matplotlib calls lines (dashed, dotted, both) and markers (square,
# diamond, triangle). There are rarely more than three splits; then they start again.
STYLES = (("--", "s"), (":", "d"), ("-.", "^"))


@contextmanager
def draw(path: Path, columns: int, width: float, height: float) -> Iterator:
    """Yields the axes of a picture, one for each column, of width x height inches; writes it."""
    # A notebook leaves in MPLBACKEND how it shows pictures, which its scripts cannot import.
    # A figure that is only written needs no backend.
    os.environ.pop("MPLBACKEND", None)
    import matplotlib
    from matplotlib.figure import Figure

    # matplotlib's own settings, not those of the user's matplotlibrc, such as TeX for texts.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # Texts as they are: a split may hold $, and what is between two of them would be read
        # as a formula.
        matplotlib.rcParams["text.parse_math"] = False
        figure = Figure(figsize=(width * columns, height), layout="constrained")
        # squeeze=False: always rows of axes, even when there is one
        yield figure.subplots(1, columns, squeeze=False)[0]
        with files.replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)


def draw_loss(entries: list[dict], path: Path) -> None:
    """Draws the losses of metrics.jsonl, and the learning rate on an axis at the right."""
    training = [entry for entry in entries if "loss" in entry]
    steps = [entry["step"] for entry in training]
    with draw(path, columns=1, width=7, height=4) as (left,):
        losses = [entry["loss"] for entry in training]
        # The dots are for a run so short that it has only one of them.
        left.plot(steps, losses, "k.-", markersize=3, label="training")
        draw_validation_losses(left, entries)
        # From 0, so that a small change does not look like a large one.
        left.set(xlabel="step", ylabel="loss per target token", ylim=(0, None))
        # The rate, thin and grey: it explains the loss and is not the subject.
        right = left.twinx()
        rates = [entry["learning_rate"] for entry in training]
        label = "learning rate (right axis)"
        right.plot(steps, rates, color="0.7", linewidth=1, label=label)
        right.set(ylim=(0, None))
        right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        # One legend for both axes. Inside them there is no place that is free in every run.
        left.figure.legend(loc="outside upper center", ncols=4, fontsize="small")


def draw_validation_losses(axis, entries: list[dict]) -> None:
    """Draws a line for each key SPLIT_loss of the entries."""
    keys = sorted({key for entry in entries for key in entry if key.endswith("_loss")})
    for key, (line, marker) in zip(keys, itertools.cycle(STYLES)):
        # Step 0 is the base model: its loss is so large that it would flatten all lines.
        shown = [entry for entry in entries if key in entry and entry["step"] > 0]
        axis.plot(
            [entry["step"] for entry in shown],
            [entry[key] for entry in shown],
            linestyle=line,
            marker=marker,
            color="0.35",
            label=key.removesuffix("_loss"),
        )


def draw_confusion(splits: dict[str, dict], path: Path) -> None:
    """Draws the confusion matrix of each split, from {split: its statistics}."""
    with draw(path, columns=len(splits), width=4.6, height=3.4) as axes:
        for axis, (split, result) in zip(axes, splits.items()):
            draw_matrix(axis, result["confusion"])
            # confusion[label][answer]: lines are labels, columns answers.
            axis.set(
                title=split,
                xlabel="answer",
                xticks=range(4),
                xticklabels=["0", "1", "2", "other"],
                yticks=range(3),
                yticklabels=[f"{label} {name}" for label, name in enumerate(LABELS)],
            )


def draw_matrix(axis, confusion: list[list[int]]) -> None:
    """Draws each count with its share of the label's rows, darker for a larger share."""
    # Shares of the label and not of all rows: a frequent label would be darker throughout.
    shares = []
    for counts in confusion:
        total = max(1, sum(counts))  # a label may have no rows
        shares.append([count / total for count in counts])
    # vmin and vmax: a grey means the same share in each split's picture.
    axis.imshow(shares, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for y, counts in enumerate(confusion):
        for x, count in enumerate(counts):
            color = "white" if shares[y][x] > 0.5 else "black"
            text = f"{count:,}\n{shares[y][x]:.0%}"
            axis.text(x, y, text, ha="center", va="center", color=color)
