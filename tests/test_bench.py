"""The benchmark prints no figure unless the contenders agree, and its rows differ as MNLI's do."""

from dataclasses import replace
from statistics import median

import pytest
import torch
from conftest import ROOT

import data
from scripts import bench
from support import examples, files, packing

ROWS = 16


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return data.load_tokenizer(tiny)


@pytest.fixture(scope="module")
def pairs():
    return examples.load_examples(str(ROOT / "tiny" / "data"), "train")


@pytest.fixture(scope="module")
def rows(pairs, tokenizer):
    """Few drawn rows, for training and for evaluation."""
    encoded = [data.encode(row, tokenizer) for row in bench.draw_rows(pairs, tokenizer, ROWS, 0)]
    drawn = bench.draw_rows(pairs, tokenizer, 8, 0, of_a_premise=2)
    evaluation = [data.encode(row, tokenizer) for row in drawn]
    return bench.Rows(encoded, evaluation, [[2, 3], [6, 7], [0, 1], [4, 5]])


@pytest.fixture(scope="module")
def job(tiny, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    bench.write_random_adapter(str(tiny), folder / "adapter")
    files.write_json(folder / "rows.json", vars(rows))
    return bench.Job(
        model=str(tiny),
        tokenizer=str(tiny),
        rows=str(folder / "rows.json"),
        adapter=str(folder / "adapter"),
        dtype="fp32",
        device="cpu",
        new_tokens=4,
        keep=True,
    )


def results(contender) -> bench.Results:
    loss, gradients = contender.step(ROWS, update=False)
    answers = contender.write(contender.job.new_tokens)
    return bench.Results(loss, gradients, answers, contender.score())


@pytest.fixture(scope="module")
def both(job, rows):
    """What ours and the reference compute from the same rows."""
    mine = results(bench.build(job, rows))
    theirs = results(bench.build(replace(job, arm="reference"), rows))
    return mine, theirs


# -----------------------------------------------------------------------------
# The gate


def test_ours_and_the_reference_agree(both):
    mine, theirs = both
    assert bench.check_fp32(mine, theirs) == []
    assert bench.check_bf16(theirs, theirs, exact=theirs) == []
    (problem,) = bench.check_bf16(mine, theirs, exact=theirs)
    assert problem.startswith("bf16, gradient:"), "ours may not be much further than the reference"


@pytest.mark.parametrize("what", ["loss", "gradient", "answer", "score"])
def test_there_are_no_figures_when_results_differ(both, job, tmp_path, monkeypatch, what):
    mine, theirs = both
    if what == "loss":
        wrong = replace(mine, loss=mine.loss * 1.0001)
    elif what == "gradient":
        gradients = {name: gradient * 1.001 for name, gradient in mine.gradients.items()}
        wrong = replace(mine, gradients=gradients)
    else:
        predictions = list(getattr(mine, what))
        predictions[0] += 1
        wrong = replace(mine, **{what: predictions})

    def results_of(job, folder):
        return wrong if job.arm == "ours" else theirs

    monkeypatch.setattr(bench, "results_of", results_of)
    with pytest.raises(ValueError, match=f"no figures, .* do not agree: fp32, {what}: off by"):
        bench.compare(job, tmp_path)


def test_a_result_that_is_no_number_is_a_difference(both):
    mine, theirs = both
    (problem,) = bench.check_fp32(replace(mine, loss=float("nan")), theirs)
    assert problem.startswith("fp32, loss: off by nan")


def test_micro_batches_give_the_gradients_of_the_whole_step(both, job, rows):
    """So the reference runs a step of 128 rows on a GPU. Sums in another order differ by 1e-6."""
    _, whole = both
    contender = bench.build(replace(job, arm="reference"), rows)
    contender.rows_at_once = 5
    loss, gradients = contender.step(ROWS, update=False)
    apart = bench.distances(replace(whole, loss=loss, gradients=gradients), whole)
    assert apart["loss"] < 1e-6
    assert apart["gradient"] < 1e-5


# -----------------------------------------------------------------------------
# Rows and processes


def test_the_drawn_rows_have_mnlis_spread_of_lengths(pairs, tokenizer):
    """MNLI's own tokens after the shared prefix: median 46, 95 % up to 81, the longest 236 or more.

    The bounds hold for every seed: of 1,000 rows the longest varies most.
    """
    drawn = bench.draw_rows(pairs, tokenizer, 1000, seed=1)
    prefix, _, _ = data.fixed_ids(tokenizer)
    lengths = sorted(len(data.encode(row, tokenizer)[0]) - len(prefix) for row in drawn)
    assert 43 <= median(lengths) <= 50
    assert 75 <= lengths[950] <= 92
    assert 110 <= lengths[-1] <= 240

    # What that means for a batch of 16 that is padded to its longest row. Of MNLI it is 1.8.
    shuffled = torch.tensor(lengths)[torch.randperm(1000, generator=torch.manual_seed(0))]
    batches = shuffled[:992].view(-1, 16)
    padded = batches.amax(dim=1).sum() * 16 / batches.sum()
    assert 1.6 < padded < 2.0


def test_the_drawn_rows_of_validation_share_no_more_than_mnlis(tokenizer, tmp_path):
    """In batches of 64 in the order of eval.py, MNLI's distinct tokens are 0.57 of all."""
    bench.write_dataset(tmp_path / "data", tokenizer)
    pairs = examples.load_examples(str(tmp_path / "data"), "validation")
    prefix, _, _ = data.fixed_ids(tokenizer)
    prompts = [data.encode(pair, tokenizer)[0] for pair in pairs]
    order = [number for group in data.by_premise(pairs, prompts) for number in group]
    distinct = 0
    for numbers in bench.batches(order, 64):
        own_ids, _ = packing.fold([prompts[number][len(prefix) :] for number in numbers])
        distinct += len(own_ids)
    lengths = sorted(len(prompt) - len(prefix) for prompt in prompts)
    assert 0.57 < distinct / sum(lengths) < 0.66
    assert 43 <= median(lengths) <= 50
    assert lengths[950] <= 92


def test_a_drawn_row_keeps_the_label_of_its_last_pair(pairs, tokenizer):
    labels = {(row["premise"], row["hypothesis"]): row["label"] for row in pairs}
    longer = 0
    for row in bench.draw_rows(pairs, tokenizer, 100, seed=2):
        own = [
            premise
            for premise, hypothesis in labels
            if hypothesis == row["hypothesis"] and row["premise"].endswith(premise)
        ]
        assert row["label"] in {labels[premise, row["hypothesis"]] for premise in own}
        longer += row["premise"] not in own
    assert longer > 80


def test_the_same_seed_draws_the_same_rows(pairs, tokenizer):
    first = bench.draw_rows(pairs, tokenizer, 20, seed=3)
    assert bench.draw_rows(pairs, tokenizer, 20, seed=3) == first
    assert bench.draw_rows(pairs, tokenizer, 20, seed=4) != first


def test_a_contender_is_a_process_that_answers_task_after_task(job, both, tmp_path):
    mine, _ = both
    with bench.Process(job) as process:
        answer = process.ask(save=str(tmp_path / "gradients.safetensors"))
        assert answer["loss"] == pytest.approx(mine.loss, rel=1e-6)
        assert (answer["answer"], answer["score"]) == (mine.answer, mine.score)
        for task in ("train16", "answer", "score", "load"):
            assert process.ask(task=task)["seconds"] > 0
    assert process.process.returncode == 0


def test_a_contender_that_fails_is_an_error(job, capfd):
    with pytest.raises(ValueError, match="a contender ended with status 1"):
        bench.Process(replace(job, rows="nowhere"))
    assert "nowhere" in capfd.readouterr().err
