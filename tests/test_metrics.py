"""The statistics are what their names say: each is worked out here another way."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from support import metrics


def predictions(labels, answers, **columns) -> list[dict]:
    """Rows as a predictions_<split>.jsonl holds them, with any further or other columns."""
    rows = []
    for idx, (label, answer) in enumerate(zip(labels, answers)):
        prompt = data.PROMPT.format(premise=f"premise {idx}", hypothesis="h")
        row = {"idx": idx, "prompt": prompt, "label": label, "prediction": answer}
        row |= {"scores": [0.5, 0.3, 0.2], "tokens": 70}
        rows.append(row | {name: values[idx] for name, values in columns.items()})
    return rows


# ---- Statistics


def test_counts_precision_recall_and_f1_by_hand():
    """Label 0 is answered 0, 0 and 1; label 1 is answered 1 and with no number; label 2 with 10."""
    result = metrics.statistics(predictions([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, -1, 10]))
    assert result["n"] == 6
    assert result["correct"] == 3
    assert result["unparsed"] == 1
    assert result["accuracy"] == 0.5
    assert result["confusion"] == [[2, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1]]
    two_thirds = pytest.approx(2 / 3)
    assert result["labels"] == {
        "entailment": {"precision": 1.0, "recall": two_thirds, "f1": pytest.approx(0.8), "n": 3},
        "neutral": {"precision": 0.5, "recall": 0.5, "f1": 0.5, "n": 2},
        "contradiction": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "n": 1},
    }
    assert result["macro_f1"] == pytest.approx((0.8 + 0.5 + 0) / 3)


@pytest.mark.parametrize("correct, n", [(8417, 9832), (0, 50), (50, 50), (1, 3)])
def test_the_interval_is_wilsons(correct, n):
    """By its formula, also at the ends, where the usual interval would be empty."""
    z = 1.959963984540054  # 95 % of the normal distribution is within z of its mean
    p = correct / n
    scale = 1 + z * z / n
    middle = (p + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    rows = predictions([0] * n, [0] * correct + [1] * (n - correct))
    expected = [middle - half, middle + half]
    assert metrics.statistics(rows)["ci95"] == pytest.approx(expected, abs=1e-9)


def test_likelihood_and_scored_accuracy():
    """nll is torch's cross-entropy of the logits from which the scores were made."""
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(3, (40,), generator=torch.Generator().manual_seed(1))
    scores = logits.softmax(dim=-1).tolist()
    result = metrics.statistics(predictions(labels.tolist(), [0] * 40, scores=scores))
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert result["nll"] == pytest.approx(loss.item(), rel=1e-5)
    accuracy = (logits.argmax(dim=-1) == labels).double().mean()
    assert result["score_accuracy"] == pytest.approx(accuracy.item())


@given(
    pairs=st.lists(st.tuples(st.integers(0, 2), st.sampled_from([-1, 0, 1, 2, 7])), min_size=1),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_statistics_are_scipys_and_scikit_learns(pairs, seed):
    """They differ by what the order of sums rounds."""
    from scipy.stats import binomtest
    from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support

    labels, answers = map(list, zip(*pairs))
    scores = torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(seed))
    scores = scores.double().softmax(dim=-1).tolist()
    result = metrics.statistics(predictions(labels, answers, scores=scores))

    interval = binomtest(result["correct"], len(labels)).proportion_ci(method="wilson")
    assert result["ci95"] == pytest.approx([interval.low, interval.high], abs=1e-12)
    columns = [answer if answer in (0, 1, 2) else 3 for answer in answers]
    confusion = confusion_matrix(labels, columns, labels=[0, 1, 2, 3])
    assert result["confusion"] == confusion[:3].tolist()
    expected = precision_recall_fscore_support(labels, columns, labels=[0, 1, 2], zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "n"), expected):
        found = [figures[name] for figures in result["labels"].values()]
        assert found == pytest.approx(values.tolist(), abs=1e-12)
    assert result["macro_f1"] == pytest.approx(expected[2].mean(), abs=1e-12)
    assert result["nll"] == pytest.approx(log_loss(labels, scores, labels=[0, 1, 2]), rel=1e-9)


@pytest.mark.parametrize("heads, tails", [(0, 1), (3, 3), (0, 40), (12, 31), (2000, 2200)])
def test_the_p_value_is_that_of_the_binomial_test(heads, tails):
    from scipy.stats import binomtest

    expected = binomtest(heads, heads + tails).pvalue
    assert metrics.coin_p(heads, tails) == pytest.approx(expected, rel=1e-9)
    assert metrics.coin_p(tails, heads) == metrics.coin_p(heads, tails)


def test_rows_in_which_two_answers_are_the_likeliest_are_counted():
    """A tie for the last place is none."""
    scores = [[0.4, 0.4, 0.2], [0.2, 0.4, 0.4], [1 / 3] * 3, [0.2, 0.6, 0.2], [0.3, 0.2, 0.5]]
    result = metrics.statistics(predictions([0, 2, 1, 1, 2], [0] * 5, scores=scores))
    assert result["ties"] == 3
    assert result["score_accuracy"] == 3 / 5
    assert "3 rows in which two answers are equally likely" in metrics.details(result)
    assert "likely" not in metrics.details(metrics.statistics(predictions([0], [0])))


def test_accuracy_by_genre_and_by_quarter_of_length():
    rows = predictions(
        [0] * 8,
        [0, 0, 0, 1, 1, 1, 1, 0],
        genre=["a"] * 4 + ["b"] * 4,
        tokens=[80, 70, 60, 50, 40, 30, 20, 10],
    )
    result = metrics.statistics(rows)
    assert result["genres"] == {"a": {"accuracy": 0.75, "n": 4}, "b": {"accuracy": 0.25, "n": 4}}
    assert result["lengths"] == [
        {"from": 10, "to": 20, "accuracy": 0.5, "n": 2},
        {"from": 30, "to": 40, "accuracy": 0.0, "n": 2},
        {"from": 50, "to": 60, "accuracy": 0.5, "n": 2},
        {"from": 70, "to": 80, "accuracy": 1.0, "n": 2},
    ]


@pytest.mark.parametrize("n", range(1, 10))
def test_the_quarters_of_length_hold_each_row_once(n):
    rows = predictions([0] * n, [0] * n, tokens=list(range(n)))
    quarters = metrics.statistics(rows)["lengths"]
    held = [token for part in quarters for token in range(part["from"], part["to"] + 1)]
    assert held == list(range(n))
    sizes = [part["n"] for part in quarters]
    assert sum(sizes) == n
    assert max(sizes) - min(sizes) <= 1


def test_what_the_rows_do_not_hold_is_not_in_the_statistics():
    always = {"accuracy", "n", "ci95", "correct", "unparsed", "majority", "confusion", "labels"}
    always |= {"macro_f1", "score_accuracy", "ties", "nll", "lengths"}
    assert metrics.statistics(predictions([0], [0])).keys() == always
    with pytest.raises(ValueError, match="no predictions to count"):
        metrics.statistics([])


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from([-1, 0, 1, 2, 3, 10**12])),
        min_size=1,
        max_size=30,
    )
)
@settings(deadline=None, max_examples=60)
def test_any_answers_give_counts_that_agree(pairs):
    result = metrics.statistics(predictions(*zip(*pairs)))
    confusion = result["confusion"]
    assert result["n"] == sum(map(sum, confusion)) == len(pairs)
    assert result["correct"] == sum(confusion[label][label] for label in range(3))
    assert result["unparsed"] <= sum(counts[metrics.OTHER] for counts in confusion)
    low, high = result["ci95"]
    assert 0 <= low <= result["accuracy"] <= high <= 1
    assert json.loads(json.dumps(result)) == result


# ---- Two sets of predictions


def test_the_comparison_is_the_binomial_test_of_the_rows_that_differ():
    """Two of 12 rows are right in the first alone: p = 2 (C(12,0) + C(12,1) + C(12,2)) / 2^12."""
    first = predictions([0] * 20, [0] * 2 + [1] * 10 + [0] * 8)
    second = predictions([0] * 20, [1] * 2 + [0] * 10 + [0] * 8)
    p = pytest.approx(2 * (1 + 12 + 66) / 2**12)
    expected = {"n": 20, "only_first": 2, "only_second": 10, "p": p}
    expected["first_accuracy"] = 10 / 20
    assert metrics.compare(first, second) == expected
    assert metrics.compare(first, first)["p"] == 1


def test_answers_that_cannot_be_read_have_no_p_value():
    """Against a base that writes no numbers any adapter would be significant."""
    first = predictions([0] * 20, [-1] * 11 + [0] * 9)
    second = predictions([0] * 20, [0] * 20)
    expected = {"n": 20, "only_first": 0, "only_second": 11, "p": None}
    expected["first_accuracy"] = 9 / 20
    assert metrics.compare(first, second) == expected
    table = metrics.table({"compared": {"validation": expected | {"run": "out/other"}}})
    assert "validation against out/other (0.4500):\n  11 rows right only here, 0 only" in table
    assert "; most of one are unparsed: no p" in table
    readable = predictions([0] * 20, [-1] * 10 + [0] * 10)
    assert metrics.compare(readable, second)["p"] < 0.01


def test_majority_is_the_accuracy_of_always_answering_the_most_frequent_label():
    labels = [2, 2, 0, 1, 2]
    assert metrics.statistics(predictions(labels, [0] * 5))["majority"] == 0.6
    assert metrics.statistics(predictions(labels, [2] * 5))["accuracy"] == 0.6


@pytest.mark.parametrize("other", ["a row is missing", "other labels", "other prompts"])
def test_only_predictions_of_the_same_rows_are_compared(other):
    first = predictions([0] * 20, [0] * 20)
    second = {
        "a row is missing": first[:-1],
        "other labels": predictions([1] * 20, [0] * 20),
        "other prompts": [row | {"prompt": "Is it so?"} for row in first],
    }[other]
    with pytest.raises(ValueError, match="not of the same rows: 20 and"):
        metrics.compare(first, second)


def test_a_line_that_is_no_prediction_is_named(tmp_path):
    path = tmp_path / "predictions_validation.jsonl"
    (row,) = predictions([0], [0])
    path.write_text(f'{json.dumps(row)}\n{{"idx": 1}}\n')
    with pytest.raises(ValueError, match=r"predictions_validation.jsonl, line 2: not a prediction"):
        metrics.read_predictions(path)


# ---- Tables


def test_tables_fit_a_terminal():
    """In 79 columns, with the longest names and counts that MNLI has."""
    n = 9831
    result = metrics.statistics(
        predictions(
            [0, 1, 2] * (n // 3),
            [0, 1, -1] * (n // 3),
            scores=[[0.2, 0.3, 0.5]] * n,
            tokens=[400] * n,
            genre=["face-to-face"] * n,
        )
    )
    test = {"only_first": 4000, "only_second": 5000, "n": n, "p": 1e-300}
    test |= {"run": "out/other", "first_accuracy": 0.5}
    results = {
        "baseline": {"validation_matched": metrics.statistics(predictions([0], [-1]))},
        "finetuned": {"validation_mismatched": result | {"loss": 1.0}},
        "compared": {"validation_mismatched": test},
    }
    table = metrics.table(results)
    details = metrics.details(results["finetuned"]["validation_mismatched"])
    assert f"validation_mismatched   {2 / 3:.4f}   {1 / 3:.4f} " in table
    assert "5,000 rows right only here, 4,000 only there, McNemar p = 1e-300" in table
    assert "3,277" in details
    assert "face-to-face" in details
    assert metrics.accuracies(results["finetuned"]) == f"validation_mismatched {2 / 3:.4f}"
    for line in f"{table}\n{details}".splitlines():
        assert len(line) <= 79, line
