"""Draws losses: of one run, for its page and its card, and of several runs together.

Lines in one picture differ in dashes or markers, not only in colour. The colours are of medium
lightness and the background is transparent, so that a picture is readable on light and dark
pages. matplotlib takes about a second to import, so only the functions that draw import it.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support import files
from support.letters import ends

# The files of a run's losses: an SVG for report.html, which is sharp at any width, and a PNG for
# the model card.
PICTURES = ("loss.svg", "loss.png")
GREY = "#7a7a7a"  # its contrast is 4.3 to 1 with white and 4.9 to 1 with black
# What differs from matplotlib's defaults
STYLE = {
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    # In a split's name a part between two $ would otherwise be read as a formula.
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 160,
    "savefig.transparent": True,
    "svg.hashsalt": "flora",  # the same picture gives the same bytes
}
COLORS = ("#1f77b4", "#d95f02", "#2ca02c", "#c44fa0")
DASHES = ("-", "--", ":", "-.")
# For validation losses, which have few points: square, diamond, triangle
MARKERS = ("s", "D", "^")
WIDE_RANGE = 5  # if the largest loss is so many times the smallest, the axis is logarithmic
NAME_LENGTH = 32  # characters of a name in the legend


@contextmanager
def draw(*paths: Path) -> Iterator:
    """Yields the axes of a picture, then writes it to each path, in the format of its suffix."""
    from matplotlib import style
    from matplotlib.figure import Figure

    # "default", because a user's matplotlibrc may use TeX for texts, say.
    with style.context(("default", STYLE)):
        # Small, so that texts are still readable when a phone shows it at half the size.
        figure = Figure(figsize=(5.5, 3.6), layout="constrained")
        axis = figure.subplots()
        yield axis
        # Outside the axes, because no place inside them is free in every run.
        figure.legend(loc="outside upper left", ncols=2, fontsize="small", frameon=False)
        # Laid out once: matplotlib would do it twice for each form, which takes half of the time.
        figure.draw_without_rendering()
        figure.set_layout_engine(None)
        for path in paths:
            with files.replacing(path) as temporary:
                figure.savefig(temporary, format=path.suffix[1:], metadata={"Date": None})


def draw_loss(entries: list[dict], chance: float | None, *paths: Path) -> None:
    """Draws the losses in metrics.jsonl, with a line at `chance`, the loss of guessing."""
    with draw(*paths) as axis:
        # The dots are for a run so short that its line has only one point.
        plot(axis, entries, "loss", label="training", color=COLORS[0], marker=".", markersize=3)
        splits = sorted({key for entry in entries for key in entry if key.endswith("_loss")})
        names = ends([key.removesuffix("_loss") for key in splits], NAME_LENGTH)
        styles = itertools.cycle(zip(COLORS[1:], DASHES[1:], MARKERS))
        for key, name, (color, dashes, marker) in zip(splits, names, styles):
            plot(
                axis, entries, key, label=name, color=color, linestyle=dashes, marker=marker,
                markersize=4,
            )  # fmt: skip
        if chance is not None:
            axis.axhline(chance, color=GREY, linewidth=0.8, label="guessing")
        set_axes(axis)


def draw_runs(runs: dict[str, list[dict]], *paths: Path) -> None:
    """Draws the training losses of several runs, from {name: lines of metrics.jsonl}."""
    with draw(*paths) as axis:
        # All colours with the first dashes, then all colours with the next dashes.
        styles = itertools.cycle(itertools.product(DASHES, COLORS))
        names = ends(list(runs), NAME_LENGTH)
        for name, entries, (dashes, color) in zip(names, runs.values(), styles):
            plot(axis, entries, "loss", label=name, color=color, linestyle=dashes, linewidth=1.2)
        set_axes(axis)


def plot(axis, entries: list[dict], key: str, label: str, **style) -> None:
    """Draws a line through the entries that have a number for `key`."""
    shown = [entry for entry in entries if entry.get(key) is not None]
    steps = [entry["step"] for entry in shown]
    axis.plot(steps, [entry[key] for entry in shown], label=label, **style)


def set_axes(axis) -> None:
    """Labels the axes. The loss axis is logarithmic for a wide range, otherwise it starts at 0."""
    axis.set(xlabel="step", ylabel="loss per predicted token")
    losses = [loss for line in axis.get_lines() for loss in line.get_ydata()]
    if not losses or min(losses) <= 0 or max(losses) < WIDE_RANGE * min(losses):
        axis.set_ylim(0, None)  # so that a small change does not look like a large one
        return
    # The base's loss may be so large that all progress after it would look flat.
    from matplotlib import ticker

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())
