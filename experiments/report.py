"""Makes tables, pictures, conclusions and the README.md beside this file from stored trials.

    python -m experiments.report            # makes all of them again; nothing is trained

A question's file has ARMS, `conclude`, and perhaps COLUMNS; QUESTIONS sets the order.
"""

import functools
import importlib
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from experiments import lab
from support import cli, files, flags

QUESTIONS = (
    "rank", "full", "targets", "quantisation", "batch", "loss", "dropout", "capacity", "merging",
)  # fmt: skip
README = lab.ROOT / "experiments" / "README.md"
MARK = "<!-- python -m experiments.report writes what follows -->\n"
STYLES = ("o-", "s--", "^:", "D-.", "v-", "P--", "X:", "<-.", ">-", "h--", "*:")


# -----------------------------------------------------------------------------
# What is known about an arm


@dataclass
class Finding:
    """An arm at its best learning rate, which the first seed decides."""

    trained: int  # number of parameters
    rate: float
    results: list[dict]  # by seed, at this rate
    nll: dict[float, list[float]]  # by rate and seed; infinite where training diverged

    def mean(self, name: str = "accuracy") -> float:
        return statistics.mean(self.all(name))

    def all(self, name: str = "accuracy") -> list[float]:
        return [result[name] for result in self.results if name in result]

    def nll_at(self, rate: float) -> str:
        """Returns the first seed's nll at a rate, as text: not every rate has the others."""
        if rate not in self.nll:
            return "(not tried)"
        first = self.nll[rate][0]
        return f"{first:.3f}" if math.isfinite(first) else "(diverged)"

    @property
    def is_complete(self) -> bool:
        return len(self.all()) == len(lab.SEEDS)


def find(arm: lab.Trial, store: lab.Store) -> Finding | None:
    """Returns what is stored about an arm, or None if nothing is."""
    trials = sorted(lab.stored(arm, store), key=lambda trial: (trial.learning_rate, trial.seed))
    if not trials:
        return None
    of_rate: dict[float, list[dict]] = {}
    for trial in trials:
        of_rate.setdefault(trial.learning_rate, []).append(store.results[trial])
    nll = {rate: [lab.nll_of(result) for result in found] for rate, found in of_rate.items()}
    _, best = lab.seed_0(arm, store)
    return Finding(of_rate[best][0]["trained"], best, of_rate[best], nll)


def verdict(first: Finding, second: Finding) -> str:
    """Returns "better" or "worse" if the ranges of the seeds do not overlap, else "equal"."""
    if min(first.all()) > max(second.all()):
        return "better"
    if max(first.all()) < min(second.all()):
        return "worse"
    return "equal"


def compare(
    found: dict[str, Finding], name: str, other: str, paper: str = "", expected: str = ""
) -> str:
    """Returns a sentence on two arms: the verdict, their mean accuracies, and a paper's verdict.

    `expected` is what `paper` finds: "better", "worse" or "equal".
    """
    seen = verdict(found[name], found[other])
    means = f"{found[name].mean():.3f} and {found[other].mean():.3f}"
    if seen == "equal":
        sentence = f"{name} and {other} do not differ by more than their seeds do ({means})"
    else:
        sentence = f"{name} is {seen} than {other} ({means})"
    if not paper:
        return sentence
    if seen == expected:
        return f"{sentence}, as {paper} finds"
    return f"{sentence}; {paper} finds {AS_TEXT[expected]}"


AS_TEXT = {"better": "it better", "worse": "it worse", "equal": "them equal"}


def rates(found: list[Finding]) -> str:
    return ", ".join(f"{finding.rate:.3g}" for finding in found)


def ratio(found: list[Finding]) -> float:
    """Returns the largest of the best rates divided by the smallest."""
    found_rates = [finding.rate for finding in found]
    return max(found_rates) / min(found_rates)


# -----------------------------------------------------------------------------
# A question: its table, its picture, its file


def summary(module: ModuleType, store: lab.Store) -> dict:
    """Returns what is known about a question, as its JSON file holds it."""
    found = {name: find(arm, store) for name, arm in module.ARMS.items()}
    found = {name: finding for name, finding in found.items() if finding}
    is_complete = all(lab.is_swept(arm, store) for arm in module.ARMS.values()) and all(
        finding.is_complete for finding in found.values()
    )
    columns: dict[str, Callable] = getattr(module, "COLUMNS", {})
    arms = {}
    for name, finding in found.items():
        arms[name] = {
            "trained": finding.trained,
            "learning_rate": finding.rate,
            "accuracy": finding.all(),
            "nll": finding.all("nll"),
            **{title: read(finding) for title, read in columns.items()},
            "nll_by_rate": {
                f"{rate:.3g}": [value if math.isfinite(value) else "diverged" for value in values]
                for rate, values in finding.nll.items()
            },
        }
    return {
        "question": question_of(module),
        "is_complete": is_complete,
        "columns": list(columns),
        "arms": arms,
        "conclusion": module.conclude(found) if is_complete else [],
    }


def question_of(module: ModuleType) -> str:
    return module.__doc__.splitlines()[0]


def table(summary: dict) -> str:
    """Returns the arms as a Markdown table, with the lowest and highest seed in brackets."""
    titles = ["arm", "trained", "best rate", "accuracy", "nll", *summary["columns"], "seeds"]
    lines = [titles, ["---"] * len(titles)]
    for name, arm in summary["arms"].items():
        extra = [str(arm[title]) for title in summary["columns"]]
        rate = f"{arm['learning_rate']:.3g}"
        accuracy = spread(arm["accuracy"])
        seeds = str(len(arm["accuracy"]))
        cells = [f"{arm['trained']:,}", rate, accuracy, spread(arm["nll"]), *extra, seeds]
        lines.append([name, *cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def failures(summary: dict) -> str:
    """Returns which trainings diverged and which arms have no best rate, or "" if none."""
    sentences = []
    places = [
        f"{name} at {rate}"
        for name, arm in summary["arms"].items()
        for rate, values in arm["nll_by_rate"].items()
        if "diverged" in values
    ]
    if places:
        sentences.append(f"Diverged: {', '.join(places)}.")
    unfound = [
        name
        for name, arm in summary["arms"].items()
        if arm["learning_rate"] in (lab.LEAST_RATE, lab.MOST_RATE)
    ]
    if unfound:
        sentences.append(f"The best rate is the first or last of the search: {', '.join(unfound)}.")
    return " ".join(sentences)


def spread(values: list[float]) -> str:
    if not values:
        return "diverged"
    mean = f"{statistics.mean(values):.3f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.3f} to {max(values):.3f})"


def draw(summary: dict, path: Path) -> None:
    """Draws the first seed's nll by rate, and the accuracy at the best rate, as an SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    arms = summary["arms"]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # Text stays text, and the same numbers give the same file.
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": path.stem})
        matplotlib.rcParams["font.family"] = "sans-serif"
        # One above the other, narrow enough to be read on a phone.
        height = 1 + 0.3 * len(arms)
        figure = Figure(figsize=(6, 3.4 + height), layout="constrained")
        rates_axes, accuracy_axes = figure.subplots(2, 1, height_ratios=(3.4, height))
        for number, arm in enumerate(arms.values()):
            style = STYLES[number % len(STYLES)]
            color = f"C{number % 10}"
            points = sorted(
                (float(rate), values[0])
                for rate, values in arm["nll_by_rate"].items()
                if values[0] != "diverged"
            )
            if points:  # otherwise every rate has diverged
                rates_axes.plot(*zip(*points), style, color=color, markersize=4, linewidth=1)
            accuracy = arm["accuracy"]
            accuracy_axes.plot(accuracy, [number] * len(accuracy), style[0] + "-", color=color)
        tried = sorted({float(rate) for arm in arms.values() for rate in arm["nll_by_rate"]})
        rates_axes.set_xscale("log", base=2)
        rates_axes.set_xticks(tried, [f"{1000 * rate:.2g}" for rate in tried])
        rates_axes.set(xlabel="learning rate, thousandths", ylabel="nll, first seed")
        rates_axes.axhline(math.log(3), color="0.7", linewidth=0.8)  # guessing
        accuracy_axes.set(xlabel="accuracy at the best rate, by seed", yticks=range(len(arms)))
        accuracy_axes.set_yticklabels(list(arms))
        accuracy_axes.invert_yaxis()
        accuracy_axes.grid(axis="x", color="0.9")
        with files.replacing(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def write(module: ModuleType, store: lab.Store) -> dict:
    """Writes the question's JSON, its picture, and README.md. Returns the summary."""
    name = Path(module.__file__).stem
    found = summary(module, store)
    files.write_json(lab.RESULTS / f"{name}.json", found)
    if found["arms"]:
        draw(found, lab.RESULTS / f"{name}.svg")
    with files.replacing(README) as temporary:
        temporary.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    return found


# -----------------------------------------------------------------------------
# README.md


def readme(text: str) -> str:
    """Returns README.md, with the part after MARK made again from the questions' JSON files."""
    written, mark, _ = text.partition(MARK)
    parts = []
    for name in QUESTIONS:
        path = lab.RESULTS / f"{name}.json"
        if path.is_file():
            parts.append(section(name, files.read_json(path)))
    return written + mark + "\n" + "\n".join(parts)


def section(name: str, found: dict) -> str:
    lines = [f"## {found['question']}", "", f"`python -m experiments.{name}`", ""]
    if not found["is_complete"]:
        lines += ["Not finished: the same command continues.", ""]
    lines += [f"- {sentence}." for sentence in found["conclusion"]]
    if found["conclusion"]:
        lines.append("")
    if found["arms"]:
        picture = f"![{found['question']}](results/{name}.svg)"
        lines += [table(found), ""]
        if failures(found):
            lines += [failures(found), ""]
        lines += [picture, ""]
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# The script of every question


def main(name: str) -> None:
    """Answers a module's question: runs what is missing, prints the table, writes the files."""
    cli.run(functools.partial(answer, sys.modules[name]))


def answer(module: ModuleType) -> None:
    parser = cli.Parser(question_of(module))
    parser.add_argument(
        "--workers", type=flags.count, default=2, help="number of processes, with one thread each"
    )
    parser.add_argument("--stored", action="store_true", help="run nothing; show what is stored")
    args = parser.parse_args()
    store = lab.Store()
    if not args.stored:
        try:
            lab.sweep(module.ARMS, store, args.workers)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped; finished trials are in {store.path}, and the same command resumes"
            ) from None
    found = write(module, store)
    print(f"{found['question']}\n\n{table(found)}\n")
    for sentence in found["conclusion"]:
        print(f"- {sentence}.")
    if failures(found):
        print(failures(found))


def question(name: str) -> ModuleType:
    return importlib.import_module(f"experiments.{name}")


def write_all() -> None:
    store = lab.Store()
    for name in QUESTIONS:
        write(question(name), store)


if __name__ == "__main__":
    cli.run(write_all)
