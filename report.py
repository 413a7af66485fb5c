"""What a run found, for people: statistics, a table, pictures, report.html, Weights & Biases.

Read it after eval.py. The statistics are scipy's and scikit-learn's, the pictures matplotlib's, the page one jinja2 template
(report.html.jinja) in which everything a model or a dataset wrote is escaped: it may be hostile. A prediction is a dictionary,
a line of predictions_<split>.jsonl, with prompt, label, tokens, prediction (-1: no number) and what eval.py knows besides.

    python report.py out/demo                       # draws the pictures and the page of a run again
"""
import base64
import itertools
import os
from contextlib import contextmanager
from pathlib import Path

import checkpoint
import data

BINS = 15  # of confidence, in calibration
PICTURES = {"loss.png": "Training and validation loss, and the learning rate", "confusion.png": "Answers by label",
            "calibration.png": "Accuracy by the probability of the answer"}


# ---------------------------------------------------------------------------------------------------------
# Statistics

def statistics(predictions: list[dict]) -> dict:
    """What results.json says of a split: accuracy with its 95 % interval (Wilson), confusion, figures by label, genre, length.

    A completion without a number is `unparsed`, and wrong. Where the rows have scores: `score_accuracy` of the likeliest of the
    three answers, `nll` (mean -log of the label's share), `ece` (expected calibration error, arXiv:1706.04599, 15 bins).
    """
    import numpy
    from scipy.stats import binomtest
    from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support
    if not predictions:
        raise ValueError("there are no predictions to count")
    labels = numpy.array([row["label"] for row in predictions])
    answers = numpy.array([row["prediction"] if row["prediction"] in (0, 1, 2) else 3 for row in predictions])  # 3: no label
    right, n = labels == answers, len(predictions)
    interval = binomtest(int(right.sum()), n).proportion_ci(method="wilson")
    parts = precision_recall_fscore_support(labels, answers, labels=[0, 1, 2], zero_division=0)
    found = {"accuracy": float(right.mean()), "ci95": [float(interval.low), float(interval.high)], "n": n, "correct": int(right.sum()),
             "unparsed": sum(row["prediction"] == -1 for row in predictions),
             "confusion": confusion_matrix(labels, answers, labels=[0, 1, 2, 3])[:3].tolist(),
             "labels": {name: {"precision": float(p), "recall": float(r), "f1": float(f), "n": int(count)}
                        for name, p, r, f, count in zip(data.LABELS, *parts)}, "macro_f1": float(parts[2].mean())}
    if all("scores" in row for row in predictions):
        scores = numpy.array([row["scores"] for row in predictions], dtype=float)
        found["score_accuracy"] = float((scores.argmax(axis=1) == labels).mean())
        found["nll"] = float(log_loss(labels, scores / scores.sum(axis=1, keepdims=True), labels=[0, 1, 2]))
        found["ece"] = sum(share * abs(confidence - accuracy) for share, confidence, accuracy in calibration(predictions))
    if all("loss" in row for row in predictions):
        found["loss"] = float(numpy.mean([row["loss"] for row in predictions]))
    if genres := sorted({str(row["genre"]) for row in predictions if row.get("genre") is not None}):
        of = numpy.array([str(row.get("genre")) for row in predictions])
        found["genres"] = {genre: {"accuracy": float(right[of == genre].mean()), "n": int((of == genre).sum())} for genre in genres}
    if all("tokens" in row for row in predictions):
        order = numpy.argsort([row["tokens"] for row in predictions], kind="stable")
        found["lengths"] = [{"from": predictions[part[0]]["tokens"], "to": predictions[part[-1]]["tokens"],
                             "accuracy": float(right[part].mean()), "n": len(part)} for part in numpy.array_split(order, 4) if len(part)]
    return found


def calibration(predictions: list[dict]) -> list[tuple[float, float, float]]:
    """(share of the rows, mean probability of the likeliest answer, how often it is right) of each bin that has rows."""
    import numpy
    scores = numpy.array([row["scores"] for row in predictions], dtype=float)
    right, confidence = scores.argmax(axis=1) == [row["label"] for row in predictions], scores.max(axis=1)
    bins = numpy.clip((confidence * BINS).astype(int), 0, BINS - 1)
    return [(float((bins == b).mean()), float(confidence[bins == b].mean()), float(right[bins == b].mean())) for b in numpy.unique(bins)]


def mcnemar(first: list[dict], second: list[dict]) -> dict:
    """McNemar's exact test on the rows that only one of two models has right. Raises ValueError unless the rows are the same."""
    from scipy.stats import binomtest
    one, two = ({(row["idx"], row["prompt"], row["label"]): row["prediction"] == row["label"] for row in rows} for rows in (first, second))
    if one.keys() != two.keys():
        raise ValueError(f"the two sets of predictions are not of the same rows: {len(one):,} and {len(two):,} rows, "
                         f"{len(one.keys() & two.keys()):,} of them in both; the same --dataset and --limit?")
    only_first, only_second = sum(one[key] > two[key] for key in one), sum(two[key] > one[key] for key in one)
    p = binomtest(only_first, only_first + only_second).pvalue if only_first + only_second else 1.0
    return {"n": len(one), "only_first": only_first, "only_second": only_second, "p": float(p)}


def read_predictions(path: Path) -> list[dict]:
    """The rows of a predictions_<split>.jsonl. Raises ValueError, in one line, where they are none."""
    rows = checkpoint.read_lines(path)
    for number, row in enumerate(rows, 1):
        kinds = (type(row.get("prompt")), type(row.get("prediction")), type(row.get("label")))
        if kinds != (str, int, int) or not 0 <= row["label"] <= 2 or not isinstance(row.get("idx"), (int, str)):
            raise ValueError(f"{path}, line {number}: no prediction of ours, it lacks idx, prompt, label or prediction")
    return rows


def protocol(mode: str, max_new_tokens: int) -> dict:
    """What results.json says about how accuracy was measured."""
    if mode == "score":
        return {"mode": mode, "prompt": data.PROMPT, "answers": [" 0", " 1", " 2"]}
    return {"mode": mode, "prompt": data.PROMPT, "decoding": "greedy", "max_new_tokens": max_new_tokens, "parse": data.NUMBER.pattern}


def stages(results: dict) -> list[tuple[str, str, dict]]:
    """(stage, split, statistics) of what results.json holds."""
    return [(stage, split, found) for stage in ("baseline", "finetuned") for split, found in results.get(stage, {}).items()]


def table(results: dict) -> str:
    """What results.json holds, as text of at most 79 columns."""
    lines = [f"{'':9} {'split':21} {'accuracy':>8} {'95% interval':>15} {'rows':>6} {'unparsed':>8} {'scored':>6}"]
    for stage, split, found in stages(results):
        interval = "{:.4f}-{:.4f}".format(*found["ci95"]) if "ci95" in found else ""
        scored = f"{found['score_accuracy']:.4f}" if "score_accuracy" in found else ""
        counts = f"{found['n']:6,} {found['unparsed']:8,}"
        lines.append(f"{stage:9} {split[:21]:21} {found['accuracy']:8.4f} {interval:>15} {counts} {scored:>6}")
    for split, test in results.get("mcnemar", {}).items():
        lines.append(f"{split[:21]:21} McNemar p = {test['p']:.2g}: {test['only_second']:,} rows gained, {test['only_first']:,} lost")
    return "\n".join(lines)


def details(found: dict) -> str:
    """The other statistics of a split, as text of at most 79 columns."""
    lines = [f"{'label':13} {'->0':>6} {'->1':>6} {'->2':>6} {'none':>6} {'precision':>10} {'recall':>7} {'F1':>7}"]
    for row, (name, part) in zip(found["confusion"], found["labels"].items()):
        counts = " ".join(f"{count:6,}" for count in row)
        lines.append(f"{name:13} {counts} {part['precision']:10.4f} {part['recall']:7.4f} {part['f1']:7.4f}")
    lines.append(f"macro F1 {found['macro_f1']:.4f}" + "".join(f", {name} {found[key]:.4f}" for name, key in (
        ("negative log-likelihood", "nll"), ("calibration error", "ece"), ("loss", "loss")) if key in found))
    lines += [f"{part['from']:>6} to {part['to']:>4} tokens {part['accuracy']:8.4f} of {part['n']:,}" for part in found.get("lengths", [])]
    lines += [f"{genre[:20]:>20} {part['accuracy']:8.4f} of {part['n']:,}" for genre, part in found.get("genres", {}).items()]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------
# Pictures, told apart by the style of their lines, so that they can be printed in black and white

@contextmanager
def draw(path: Path, columns: int = 1, size: tuple[float, float] = (7, 4)):
    """Gives the axes of a picture, in an array, and at the end writes it, whole or not at all."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, columns, figsize=(size[0] * columns, size[1]), squeeze=False, layout="constrained")
    try:
        yield axes[0]
        with checkpoint.replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    finally:
        pyplot.close(figure)


def draw_loss(metrics: list[dict], path: Path) -> None:
    """The lines of metrics.jsonl: losses on the left, the learning rate on the right."""
    with draw(path) as (axes,):
        lines, marks = itertools.cycle(("--", ":", "-.")), itertools.cycle("osd^")
        train = [row for row in metrics if "loss" in row]
        steps = [row["step"] for row in train]
        shown = axes.plot(steps, [row["loss"] for row in train], "k-", label="training")
        for key in sorted({key for row in metrics for key in row if key.endswith("_loss")}):
            rows = [row for row in metrics if key in row and row["step"]]  # the base's, before step 1, would flatten the others
            shown += axes.plot([row["step"] for row in rows], [row[key] for row in rows], next(lines), color="0.35", marker=next(marks),
                               label=key.removesuffix("_loss"))
        axes.set(xlabel="step", ylabel="loss, a token", ylim=(0, None))
        right = axes.twinx()
        shown += right.plot(steps, [row["learning_rate"] for row in train], color="0.7", linewidth=1, label="learning rate (right)")
        right.set(ylim=(0, None))
        right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.legend(handles=shown)


def draw_confusion(splits: dict[str, dict], path: Path) -> None:
    """Counts, and shares of each label's rows, by answer; a field is the darker the larger its share."""
    with draw(path, len(splits), (4.6, 3.4)) as axes:
        for axis, (split, found) in zip(axes, splits.items()):
            shares = [[count / max(1, sum(row)) for count in row] for row in found["confusion"]]
            axis.imshow(shares, cmap="Greys", vmin=0, vmax=1, aspect="auto")
            for y, row in enumerate(found["confusion"]):
                for x, count in enumerate(row):
                    color = "white" if shares[y][x] > 0.5 else "black"
                    axis.text(x, y, f"{count:,}\n{shares[y][x]:.0%}", ha="center", va="center", color=color)
            names = [f"{label} {name}" for label, name in enumerate(data.LABELS)]
            axis.set(xticks=range(4), xticklabels=["0", "1", "2", "none"], yticks=range(3), yticklabels=names, xlabel="answer", title=split)


def draw_calibration(splits: dict[str, list[dict]], path: Path) -> None:
    """How often the likeliest answer is right, by its probability; the larger the mark, the more rows."""
    with draw(path, len(splits), (4.6, 4)) as axes:
        for axis, (split, predictions) in zip(axes, splits.items()):
            share, confidence, accuracy = zip(*calibration(predictions))
            axis.plot((0, 1), (0, 1), ":", color="0.5", label="as sure as right")
            axis.plot(confidence, accuracy, "k-", linewidth=1)
            sizes = [20 + 400 * part for part in share]
            axis.scatter(confidence, accuracy, sizes, color="white", edgecolors="black", zorder=3, label="a bin, as large as its rows")
            axis.set(xlabel="probability of the likeliest answer", ylabel="how often it is right", title=split, xlim=(0.3, 1.02),
                     ylim=(0, 1.04))
            axis.legend(loc="lower right")


def draw_lengths(lengths: dict, labels: dict, title: str, path: Path) -> None:
    """For data.py: tokens of prompt and label, and how often each label occurs, by split."""
    import numpy
    with draw(path, 2, (6, 4)) as (left, right):
        low, high = min(map(min, lengths.values())), max(map(max, lengths.values()))
        bins = numpy.arange(low, high + 2 + (high - low) // 60, 1 + (high - low) // 60) - 0.5
        for (split, values), line in zip(lengths.items(), itertools.cycle(("-", "--", ":", "-."))):
            left.hist(values, bins=bins, density=True, histtype="step", linestyle=line, label=f"{split} ({len(values):,} rows)")
        left.set(xlabel="tokens of prompt and label", ylabel="share of rows for each token of length", title=title)
        left.legend()
        for number, ((split, counts), hatch) in enumerate(zip(labels.items(), itertools.cycle(("", "///", "...", "xxx")))):
            places = numpy.arange(3) + number * 0.8 / len(labels)
            right.bar(places, counts / counts.sum(), 0.8 / len(labels), color="white" if number else "0.6", edgecolor="black", hatch=hatch,
                      label=split)
        right.set(xticks=numpy.arange(3) + 0.4 - 0.4 / len(labels), xticklabels=data.LABELS, ylabel="share of the rows", title="labels")
        right.margins(y=0.4)  # room for the legend
        right.legend(loc="upper right")


# ---------------------------------------------------------------------------------------------------------
# The page, and Weights & Biases

def write(directory: Path) -> None:
    """Draws loss.png, confusion.png, calibration.png and writes report.html into a run's folder, of the files that lie there."""
    import jinja2
    directory = Path(directory)
    args, results = (checkpoint.read_json(directory / name) for name in ("args.json", "results.json"))
    metrics = checkpoint.read_lines(directory / "metrics.jsonl")
    tuned = results.get("finetuned", {})
    predictions = {split: read_predictions(directory / f"predictions_{split}.jsonl") for split in tuned}
    if any("loss" in row for row in metrics):
        draw_loss(metrics, directory / "loss.png")
    if tuned and all("confusion" in found for found in tuned.values()):
        draw_confusion(tuned, directory / "confusion.png")
    scored = {split: rows for split, rows in predictions.items() if rows and all("scores" in row for row in rows)}
    if scored:
        draw_calibration(scored, directory / "calibration.png")
    rows = [row | {"split": split, "sure": max(row.get("scores", [0]))} for split, found in predictions.items() for row in found]
    wrong = sorted((row for row in rows if row["prediction"] != row["label"] and row["prediction"] != -1), key=lambda row: -row["sure"])
    pictures = [(text, base64.b64encode((directory / name).read_bytes()).decode()) for name, text in PICTURES.items()
                if (directory / name).is_file()]
    environment = jinja2.Environment(autoescape=True, loader=jinja2.FileSystemLoader(Path(__file__).parent))
    page = environment.get_template("report.html.jinja").render(
        args=args, results=results, stages=stages(results), tuned=tuned, labels=data.LABELS, pictures=pictures, wrong=wrong[:20],
        wrong_count=len(wrong), unparsed=[row for row in rows if row["prediction"] == -1])
    with checkpoint.replacing(directory / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")


def start_wandb(args, record: dict):
    """A W&B run that never asks for a key: without one it is kept offline, in a folder beside the other output."""
    import wandb
    try:
        offline = "WANDB_MODE" not in os.environ and not wandb.login(prompt=False)
    except wandb.Error as error:
        print(f"W&B: {str(error).splitlines()[0]}")
        offline = True
    if offline:
        print(f"W&B: not logged in, so this run is kept offline in {args.out}/wandb; send it later with `wandb sync`")
    return wandb.init(project="flora", name=args.out.name, dir=args.out, config=record, mode="offline" if offline else None)


def finish_wandb(run, results: dict, directory: Path) -> None:
    """Logs the final table and the pictures, and ends the run."""
    import wandb
    columns = ["accuracy", "n", "correct", "unparsed", "macro_f1", "nll", "ece"]
    rows = [[stage, split, *(found.get(key) for key in columns)] for stage, split, found in stages(results)]
    run.log({"results": wandb.Table(columns=["stage", "split", *columns], data=rows)}
            | {name.replace(".png", "_picture"): wandb.Image(str(directory / name)) for name in PICTURES if (directory / name).is_file()})
    run.finish()


def main() -> None:
    parser = data.Parser("draws the pictures and writes report.html of a run again")
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if not (args.run / "results.json").is_file():
        raise ValueError(f"{args.run} holds no run that has ended: it has no results.json")
    write(args.run)
    print(f"{args.run / 'report.html'}")


if __name__ == "__main__":
    data.run(main)
