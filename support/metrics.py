"""The statistics of an evaluation, and tables of them for a terminal.

A prediction is one line of predictions_<split>.jsonl, a dictionary:

    idx, prompt, label     the row's number, the text of the prompt, the right answer
    prediction             the number that the model wrote, or -1 if it wrote none
    completion             what the model wrote, in mode "generate"
    scores                 the model's probabilities of the three answers
    tokens                 the prompt's length in tokens
    genre                  the kind of text, if known

The statistics are computed with numpy. tests/test_metrics.py compares them with scipy and
scikit-learn.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy

from support import files
from support.labels import LABELS
from support.letters import printable

Z = 1.959963984540054  # 95 % of a normal distribution is within Z standard deviations of the mean
OTHER = 3  # the column of the confusion matrix for every answer that is not 0, 1 or 2


# -----------------------------------------------------------------------------
# Statistics


def statistics(predictions: list[dict]) -> dict:
    """Returns the statistics of one split for results.json.

    These are accuracy, ci95, n, correct, unparsed, majority (the accuracy of always answering
    the most frequent label), confusion, labels, macro_f1, score_accuracy, ties, nll, lengths,
    and genres if any row has one. Raises ValueError if there are no predictions.
    """
    if not predictions:
        raise ValueError("there are no predictions to count; is --limit above 0?")
    result = count_correct(predictions) | by_label(predictions) | by_scores(predictions)
    if any(row.get("genre") is not None for row in predictions):
        result["genres"] = by_genre(predictions)
    return result | {"lengths": by_length(predictions)}


def is_right(row: dict) -> bool:
    """Returns whether the model wrote the right number. No number (-1) is wrong."""
    return row["prediction"] == row["label"]


def accuracy(rows: list[dict]) -> dict:
    """Returns the accuracy over these rows, and the number of rows."""
    return {"accuracy": sum(map(is_right, rows)) / len(rows), "n": len(rows)}


def count_correct(predictions: list[dict]) -> dict:
    """Returns the accuracy and its 95 % confidence interval. Unparsed rows count as wrong."""
    correct = sum(map(is_right, predictions))
    return {
        **accuracy(predictions),
        "ci95": wilson_interval(correct, len(predictions)),
        "correct": correct,
        "unparsed": sum(row["prediction"] == -1 for row in predictions),
    }


def wilson_interval(correct: int, n: int) -> list[float]:
    """Returns the ends of the 95 % confidence interval of the share correct / n.

    This is Wilson's interval. Unlike the usual p +- 2 sqrt(p (1 - p) / n), it stays between 0
    and 1, and does not shrink to a point if all rows are right or all are wrong.
    """
    share = correct / n
    shrinkage = 1 + Z**2 / n
    middle = (share + Z**2 / (2 * n)) / shrinkage
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / shrinkage
    # If the share is 0 or 1, one end must equal it, also in the last bit.
    return [min(middle - half, share), max(middle + half, share)]


def by_label(predictions: list[dict]) -> dict:
    """Returns the confusion matrix; precision, recall and F1 of each label; and their summaries.

    confusion[i][j] counts the rows with label i and answer j; the last column is `OTHER`. The
    summaries are macro_f1, the mean F1, and majority, the share of the most frequent label.
    """
    confusion = numpy.zeros((3, 4), dtype=int)
    for row in predictions:
        answer = row["prediction"] if row["prediction"] in (0, 1, 2) else OTHER
        confusion[row["label"], answer] += 1
    right = confusion.diagonal()
    counts = confusion.sum(axis=1)  # rows of each label
    answered = confusion.sum(axis=0)[:3]  # how often each label was the answer
    # A label without rows gets recall 0, and one that is never answered gets precision 0.
    precision = right / numpy.maximum(answered, 1)
    recall = right / numpy.maximum(counts, 1)
    f1 = 2 * right / numpy.maximum(counts + answered, 1)

    # numpy numbers are converted to Python numbers, which json can write.
    figures = {
        name: {
            "precision": float(precision[label]),
            "recall": float(recall[label]),
            "f1": float(f1[label]),
            "n": int(counts[label]),
        }
        for label, name in enumerate(LABELS)
    }
    return {
        "majority": int(counts.max()) / len(predictions),
        "confusion": confusion.tolist(),
        "labels": figures,
        # The mean over labels, not over rows: a rare label counts as much as a frequent one.
        "macro_f1": float(f1.mean()),
    }


def by_scores(predictions: list[dict]) -> dict:
    """Returns statistics of the probabilities, regardless of what the model wrote.

    score_accuracy is the accuracy of the likeliest of the three answers. ties counts the rows
    in which two answers are equally likely and likeliest; score_accuracy uses the first of them.
    nll is the mean negative log-likelihood of the label among the three answers.
    """
    labels = numpy.array([row["label"] for row in predictions])
    scores = numpy.array([row["scores"] for row in predictions], dtype=float)
    ordered = numpy.sort(scores, axis=1)
    ties = ordered[:, 2] == ordered[:, 1]
    scores /= scores.sum(axis=1, keepdims=True)  # they are rounded in the file
    likeliest = scores.argmax(axis=1)
    of_labels = scores[numpy.arange(len(labels)), labels]
    of_labels = numpy.maximum(of_labels, numpy.finfo(float).eps)  # 0 has no logarithm
    return {
        "ties": int(ties.sum()),
        "score_accuracy": float((likeliest == labels).mean()),
        "nll": float(-numpy.log(of_labels).mean()),
    }


def by_genre(predictions: list[dict]) -> dict[str, dict]:
    """Returns the accuracy of each genre (in MNLI: fiction, telephone, ...) by its name."""
    genres: dict[str, list[dict]] = {}
    for row in predictions:
        if row.get("genre") is not None:
            # A string, because JSON has no other keys.
            genres.setdefault(str(row["genre"]), []).append(row)
    return {genre: accuracy(genres[genre]) for genre in sorted(genres)}


def by_length(predictions: list[dict]) -> list[dict]:
    """Returns the accuracy of each quarter of the rows, the shortest prompts first."""
    ordered = sorted(predictions, key=lambda row: row["tokens"])
    quarters = []
    # Quarters of the rows, not of the range of lengths, so that each is equally reliable.
    for number in range(4):
        start = len(ordered) * number // 4
        end = len(ordered) * (number + 1) // 4
        rows = ordered[start:end]
        if rows:  # with fewer than four rows some quarters are empty
            tokens = {"from": rows[0]["tokens"], "to": rows[-1]["tokens"]}
            quarters.append(tokens | accuracy(rows))
    return quarters


# -----------------------------------------------------------------------------
# Two runs, row by row


def compare(first: list[dict], second: list[dict]) -> dict:
    """Returns McNemar's exact test: could two models' accuracies differ by chance alone?

    Rows that both models answer correctly, or both wrongly, say nothing about this. If the
    models were equally good, each of the other rows would be the toss of a fair coin. p is None
    if most completions of one model contain no number, because the test would then compare the
    form of the answers. Raises ValueError unless both sets of predictions are for the same rows.
    """
    check_same_rows(first, second)
    # The two sets may differ in order, so rows are paired by their content.
    is_second_right = {row_of(row): is_right(row) for row in second}
    pairs = [(is_right(row), is_second_right[row_of(row)]) for row in first]
    only_first = pairs.count((True, False))
    only_second = pairs.count((False, True))
    p = coin_p(only_first, only_second)
    if is_unreadable(first) or is_unreadable(second):
        p = None
    return {
        "n": len(pairs),
        "first_accuracy": accuracy(first)["accuracy"],
        "only_first": only_first,
        "only_second": only_second,
        "p": p,
    }


def coin_p(heads: int, tails: int) -> float:
    """Returns the probability that a fair coin falls at least as unevenly; 1 without a toss."""
    tosses = heads + tails
    ways = 1  # to get `number` heads; math.comb would count each from the beginning, in seconds
    total = 1  # to get up to `number` heads
    for number in range(1, min(heads, tails) + 1):
        ways = ways * (tosses - number + 1) // number
        total += ways
    return min(1.0, 2 * total / 2**tosses)


def is_unreadable(predictions: list[dict]) -> bool:
    """Returns whether most completions contain no number."""
    return sum(row["prediction"] == -1 for row in predictions) > len(predictions) / 2


def check_same_rows(first: list[dict], second: list[dict]) -> None:
    """Raises ValueError unless both are for the same rows, in any order."""
    rows = {row_of(row) for row in first}
    others = {row_of(row) for row in second}
    if rows != others:
        raise ValueError(
            f"the two sets of predictions are not of the same rows: {len(rows):,} and "
            f"{len(others):,} rows, {len(rows & others):,} of them in both; both must use the "
            "same --dataset and --limit (--eval-limit in train.py)"
        )


def row_of(prediction: dict) -> tuple:
    """Returns what identifies a row. Its number alone could be that of another dataset's row."""
    return prediction["idx"], prediction["prompt"], prediction["label"]


# -----------------------------------------------------------------------------
# predictions_<split>.jsonl


def read_predictions(path: Path) -> list[dict]:
    """Returns the predictions in a file. Raises ValueError if a line is not a prediction."""
    predictions = files.read_lines(path)
    for number, row in enumerate(predictions, 1):
        if not {"idx", "prompt", "label", "prediction"} <= row.keys():
            raise ValueError(
                f"{path}, line {number}: not a prediction, which has idx, prompt, "
                "label and prediction; write it with eval.py --out"
            )
    return predictions


# -----------------------------------------------------------------------------
# Tables of at most 79 columns


def stages(results: dict) -> Iterable[tuple[str, str, dict]]:
    """Yields (stage, split, statistics) from results.json, the baseline first."""
    for stage in ("baseline", "finetuned"):
        for split, result in results.get(stage, {}).items():
            yield stage, split, result


def accuracies(splits: dict[str, dict]) -> str:
    """Returns the accuracy of each split in one line, from {split: its statistics}."""
    parts = [f"{split} {result['accuracy']:.4f}" for split, result in splits.items()]
    return ", ".join(parts)


def table(results: dict) -> str:
    """Returns a line for each stage and split of results.json, and for each comparison."""
    # validation_mismatched, the longest name in MNLI, has 21 characters.
    lines = [
        f"{'':21} {'accuracy':>8} {'majority':>8} {'95% interval':>13} "
        f"{'rows':>6} {'unparsed':>8} {'scored':>6}"
    ]
    for stage, split, result in stages(results):
        if stage not in lines:
            lines.append(stage)
        low, high = result["ci95"]
        lines.append(
            f"{split[:21]:21} {result['accuracy']:8.4f} {result['majority']:8.4f} "
            f"{low:.4f}-{high:.4f} {result['n']:6,} {result['unparsed']:8,} "
            f"{result['score_accuracy']:6.4f}"
        )
    for split, test in results.get("compared", {}).items():
        run = printable(test["run"])
        lines.append(f"{split[:21]} against {run} ({test['first_accuracy']:.4f}):")
        rows = f"{test['only_second']:,} rows right only here, {test['only_first']:,} only there"
        if test["p"] is None:
            lines.append(f"  {rows}; most of one are unparsed: no p")
        else:
            lines.append(f"  {rows}, McNemar p = {test['p']:.2g}")
    return "\n".join(lines)


def details(result: dict) -> str:
    """Returns the other statistics of a split: by label, by length, by genre."""
    # The confusion matrix: how often rows of each label were answered 0, 1, 2 or anything else.
    lines = [
        f"{'label':13} {'->0':>6} {'->1':>6} {'->2':>6} {'other':>6} "
        f"{'precision':>10} {'recall':>7} {'F1':>7}"
    ]
    for counts, (name, figures) in zip(result["confusion"], result["labels"].items()):
        columns = " ".join(f"{count:6,}" for count in counts)
        lines.append(
            f"{name:13} {columns} "
            f"{figures['precision']:10.4f} {figures['recall']:7.4f} {figures['f1']:7.4f}"
        )
    lines.append(
        f"macro F1 {result['macro_f1']:.4f}, negative log-likelihood {result['nll']:.4f}"
    )
    if result["ties"]:
        lines.append(f"{result['ties']:,} rows in which two answers are equally likely")
    # Quarters by length, then genres, in one column so that accuracies line up.
    for part in result["lengths"]:
        lengths = f"{part['from']:>6} to {part['to']:>4} tokens"
        lines.append(f"{lengths} {part['accuracy']:8.4f} of {part['n']:,}")
    for genre, part in result.get("genres", {}).items():
        lines.append(f"{printable(genre)[:20]:>20} {part['accuracy']:8.4f} of {part['n']:,}")
    return "\n".join(lines)
