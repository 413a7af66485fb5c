"""experiments/: what a trial trains, what is stored and resumed, and that the pages are of it."""

import json
import math
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, distance, read_json, reference

import eval as evaluation
import train
from experiments import lab, report
from support import files

SMALL = lab.Trial(steps=2, batch_size=4, train_rows=40, eval_rows=6, targets="q_proj v_proj")


class Bar:
    """A progress bar after whose first step Ctrl-C is pressed, where `stops` is True."""

    def __init__(self, stops: bool = False):
        self.stops = stops

    def update(self) -> None:
        if self.stops:
            raise KeyboardInterrupt


# -----------------------------------------------------------------------------
# A trial


def test_the_full_arm_trains_every_weight_with_the_gradients_of_transformers(tiny):
    _, encoded = lab.training_rows(4)
    (batch,) = train.collated(encoded, lab.tokenizer(), lab.arguments(SMALL))
    model = evaluation.load_model(lab.MODEL, "none", "fp32", "cpu")
    trained = lab.add_arm(model, replace(SMALL, arm="full"))
    assert len(trained) == len(list(model.parameters()))
    train.batch_loss(model, batch).backward()

    theirs = reference(tiny, torch.float32)
    for prompt, answer in encoded:
        ids = torch.tensor([prompt + answer])
        logits = theirs(ids).logits[0, -3:-1]
        F.cross_entropy(logits, ids[0, -2:], reduction="sum").backward()
    expected = dict(theirs.named_parameters())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.any(), name
        # fp32, sums of some hundred tokens in another order. (A key's bias moves all scores of
        # a query alike but for the rotation, so that little of its gradient is left.)
        assert distance(gradient, expected[name].grad) < 1e-4, name


def test_the_full_arm_takes_no_base_whose_weights_have_no_gradient():
    for settings in ({"quant": "nf4"}, {"dtype": "bf16"}):
        with pytest.raises(ValueError, match="has to be in fp32"):
            lab.run(replace(SMALL, arm="full", **settings))


def test_a_trial_trains_measures_and_merges():
    result = lab.run(replace(SMALL, quant="nf4", merges=True, learning_rate=0.01))
    assert result["trained"] == 6 * 2 * 8 * (192 + 192)
    assert result["losses"][1] < result["losses"][0]
    mean = (result["matched"] + result["mismatched"]) / 2
    assert result["accuracy"] == pytest.approx(mean, abs=1e-4)  # they have four digits
    assert 0 < result["nll"] < 20
    lost = {name: merged["lost"] for name, merged in result["merged"].items()}
    assert 0 < lost["bf16"] < lost["nf4"]


def test_a_trial_that_diverges_says_where():
    result = lab.run(replace(SMALL, learning_rate=1e30))
    assert result["diverged"] in ("at step 2", "at step 1") or "not finite" in result["diverged"]
    assert "accuracy" not in result


# -----------------------------------------------------------------------------
# What is stored


def test_an_experiment_that_was_stopped_runs_only_what_is_missing(tmp_path):
    path = tmp_path / "trials.jsonl"
    trials = [replace(SMALL, seed=seed) for seed in (0, 1)]
    with pytest.raises(KeyboardInterrupt):
        lab.run_missing(trials, lab.Store(path), 1, Bar(stops=True))
    (kept,) = path.read_text().splitlines()

    store = lab.Store(path)
    assert list(store.results) == trials[:1]
    lab.run_missing(trials, store, 1, Bar())
    lines = path.read_text().splitlines()
    assert lines[0] == kept
    assert len(lines) == 2
    resumed = lab.Store(path).results
    assert resumed == store.results
    # As if it had never been stopped.
    assert resumed[trials[1]] == lab.run(trials[1])
    assert resumed[trials[1]] != resumed[trials[0]]


def test_results_of_another_base_or_other_rows_are_not_taken(tmp_path):
    path = tmp_path / "trials.jsonl"
    store = lab.Store(path)
    store.add(SMALL, {"nll": 1.0})
    assert SMALL in lab.Store(path).results
    line = json.loads(path.read_text()) | {"inputs": "another"}
    path.write_text(json.dumps(line) + "\n")
    assert not lab.Store(path).results


# -----------------------------------------------------------------------------
# The best rate


def result_at(best: float, rate: float, seed: int = 0) -> dict:
    """A result whose nll is least at the rate `best`, and infinite far above it."""
    octaves = math.log2(rate / best)
    if octaves > 3:
        return {"trained": 10, "diverged": "at step 7"}
    nll = 0.5 + 0.1 * abs(octaves) + 0.01 * seed
    return {"trained": 10, "weights": 2**20, "nll": nll, "accuracy": 1 - nll}


def swept(store: lab.Store, arm: lab.Trial, best: float) -> list[float]:
    """Runs a sweep of invented results. Returns the rates that were tried with the first seed."""
    while wanted := lab.climb(arm, store):
        for trial in wanted:
            assert trial not in store.results
            store.results[trial] = result_at(best, trial.learning_rate)
    rates, _ = lab.seed_0(arm, store)
    for trial in lab.repeats(arm, store):
        store.results[trial] = result_at(best, trial.learning_rate, trial.seed)
    return rates


@pytest.mark.parametrize("octaves", [-5, -1, 0, 1, 4])
def test_the_climb_ends_where_the_best_rate_has_a_worse_one_on_each_side(tmp_path, octaves):
    store = lab.Store(tmp_path / "trials.jsonl")
    best = lab.START * 2.0**octaves
    rates = swept(store, SMALL, best)
    assert {best / 2, best, best * 2} <= {*rates}
    found = report.find(SMALL, store)
    assert found.rate == best
    assert found.all("nll") == pytest.approx([0.5, 0.51, 0.52])
    assert found.is_complete


def test_the_climb_ends_at_its_bounds(tmp_path):
    store = lab.Store(tmp_path / "trials.jsonl")
    rates = swept(store, SMALL, lab.LEAST_RATE / 8)
    assert rates == [lab.LEAST_RATE * 2.0**octave for octave in range(8)]


# -----------------------------------------------------------------------------
# A whole question


def test_a_question_is_asked_answered_and_asked_again(tmp_path, monkeypatch, capsys):
    # No rate but the first three: these are trained, two steps each.
    monkeypatch.setattr(lab, "LEAST_RATE", lab.START)
    monkeypatch.setattr(lab, "MOST_RATE", lab.START)
    monkeypatch.setattr(lab, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "QUESTIONS", ("small",))
    report.README.write_text(f"Written by hand.\n{report.MARK}old")
    module = ModuleType("small", "Is it small?")
    module.__file__ = "small.py"
    module.ARMS = {"small": SMALL}
    module.conclude = lambda found: [f"rate {found['small'].rate:g}"]
    monkeypatch.setitem(sys.modules, "small", module)
    monkeypatch.setattr(sys, "argv", ["small", "--workers", "1"])
    report.main("small")
    printed = capsys.readouterr().out
    found = read_json(tmp_path / "small.json")
    assert found["is_complete"]
    assert len(found["arms"]["small"]["accuracy"]) == 3
    assert report.table(found) in printed
    assert f"- {found['conclusion'][0]}." in printed
    assert report.table(found) in report.README.read_text()
    assert report.README.read_text().startswith("Written by hand.")
    assert "old" not in report.README.read_text()
    assert (tmp_path / "small.svg").is_file()

    # Nothing is left to run.
    trials = (tmp_path / "trials.jsonl").read_text()
    report.main("small")
    assert capsys.readouterr().out == printed
    assert (tmp_path / "trials.jsonl").read_text() == trials


# -----------------------------------------------------------------------------
# The pages


@pytest.fixture(scope="module")
def stored() -> lab.Store:
    return lab.Store()


def test_what_is_stored_is_of_the_model_and_the_rows_in_tiny(stored):
    lines = files.read_lines(stored.path)
    assert len(stored.results) > 10
    assert {line["inputs"] for line in lines} == {stored.inputs}
    # None was run twice.
    assert len(lines) == len(stored.results)


@pytest.mark.parametrize("name", report.QUESTIONS)
def test_the_table_of_a_question_is_made_of_what_is_stored(name, stored):
    module = report.question(name)
    path = lab.RESULTS / f"{name}.json"
    assert read_json(path) == json.loads(json.dumps(report.summary(module, stored)))
    assert f"python -m experiments.{name} " in module.__doc__
    assert "minutes" in module.__doc__


def test_the_page_is_made_of_the_questions_files():
    text = report.README.read_text()
    assert text == report.readme(text)
    for name in report.QUESTIONS:
        assert f"`python -m experiments.{name}`" in text


def test_every_file_is_a_question_or_what_they_share():
    names = {path.stem for path in (ROOT / "experiments").glob("*.py")}
    assert names == {*report.QUESTIONS, "lab", "report", "__init__", "__main__"}


@pytest.mark.parametrize("name", report.QUESTIONS)
def test_a_question_that_is_answered_has_a_table_a_picture_and_a_conclusion(name, tmp_path):
    module = report.question(name)
    store = lab.Store(tmp_path / "trials.jsonl")
    for number, arm in enumerate(module.ARMS.values()):
        swept(store, arm, arm.learning_rate * 2.0 ** (number % 2))
    found = report.summary(module, store)
    assert found["is_complete"]
    assert len(found["conclusion"]) >= 2
    assert all(sentence and not sentence.endswith(".") for sentence in found["conclusion"])
    lines = report.table(found).splitlines()
    assert len(lines) == 2 + len(found["arms"])
    assert "| 0.490 (0.480 to 0.500) |" in lines[2]
    assert "0.510 (0.500 to 0.520)" in lines[2]


def test_a_training_that_diverged_is_named(tmp_path):
    module = report.question("full")
    store = lab.Store(tmp_path / "trials.jsonl")
    full = module.ARMS["full"]
    swept(store, full, full.learning_rate / 16)  # twice the guess is far above the best
    found = report.summary(module, store)
    expected = "Diverged: full at 0.00025, full at 0.0005."
    assert report.failures(found).startswith(expected)
    assert not found["is_complete"]
    assert not found["conclusion"]
    assert "Not finished" in report.section("full", found)


def test_an_arm_whose_best_rate_is_at_the_end_of_the_search_is_named(tmp_path):
    module = report.question("full")
    store = lab.Store(tmp_path / "trials.jsonl")
    swept(store, module.ARMS["full"], lab.LEAST_RATE / 2)
    swept(store, module.ARMS["LoRA, rank 1"], lab.START)
    found = report.summary(module, store)
    assert report.failures(found).endswith("first or last of the search: full.")


def test_the_picture_of_a_question_is_the_same_from_the_same_numbers(tmp_path):
    store = lab.Store(tmp_path / "trials.jsonl")
    arms = report.question("full").ARMS
    for arm in arms.values():
        swept(store, arm, arm.learning_rate)
    found = report.summary(report.question("full"), store)
    report.draw(found, tmp_path / "full.svg")
    drawn = (tmp_path / "full.svg").read_bytes()
    report.draw(found, tmp_path / "full.svg")
    assert drawn == (tmp_path / "full.svg").read_bytes()
    assert all(name.encode() in drawn for name in arms)


def test_two_arms_differ_where_no_seed_of_one_is_within_the_others():
    def finding(*accuracies: float) -> report.Finding:
        results = [{"accuracy": accuracy} for accuracy in accuracies]
        return report.Finding(10, 0.001, results, {})

    found = {
        "high": finding(0.8, 0.82, 0.84),
        "between": finding(0.78, 0.8, 0.81),
        "low": finding(0.7, 0.75, 0.779),
    }

    def compare(*words: str) -> str:
        return report.compare(found, *words)

    assert compare("high", "low") == "high is better than low (0.820 and 0.743)"
    assert compare("low", "high").startswith("low is worse than high (0.743 and 0.820")
    assert compare("high", "between").startswith("high and between do not differ by more than")
    assert compare("high", "low", "X", "better").endswith("), as X finds")
    assert compare("high", "low", "X", "equal").endswith("); X finds them equal")


def test_what_is_said_in_short_is_in_the_results():
    def rates(question: str, *arms: str) -> set[float]:
        stored = read_json(lab.RESULTS / f"{question}.json")["arms"]
        return {stored[arm]["learning_rate"] for arm in arms}

    fixed = [f"rank {rank}, alpha 16" for rank in (1, 4, 8, 16, 64)]
    assert rates("rank", *fixed) == {0.001}
    assert rates("full", "full") == {0.00025}
    assert rates("full", "LoRA, rank 8, q and v alone") == {0.004}
    assert rates("targets", "q and v, rank 18", "q and v, rank 4") == {0.004, 0.008}
    # In lora.py: with alpha = 2 * rank the best rate falls eightfold.
    assert rates("rank", "rank 1, alpha 2") == {8 * 0.0005}
    assert rates("rank", "rank 64, alpha 128") == {0.0005}
    model = evaluation.load_model(lab.MODEL, "none", "fp32", "cpu")
    base = lab.measure(model, 600)
    # Another processor rounds otherwise, and may answer a row otherwise.
    assert base["accuracy"] == pytest.approx(0.610, abs=0.003)
    assert base["nll"] == pytest.approx(0.879, abs=0.001)
