"""The benchmark prints no figure unless the contenders agree, and its rows differ as MNLI's do."""

import copy
import re
from dataclasses import replace
from statistics import median

import pytest
import torch
from conftest import ROOT, read_json
from forks import python_command

import data
from scripts import bench, contenders
from support import examples, files, packing
from tiny import mnli_lengths

ROWS = 16


@pytest.fixture(scope="module", autouse=True)
def contenders_are_forks(tmp_path_factory):
    """Otherwise each imports torch for seconds."""
    with (
        python_command(tmp_path_factory.mktemp("command")) as command,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("sys.executable", str(command))
        yield


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return data.load_tokenizer(tiny)


@pytest.fixture(scope="module")
def pairs():
    return examples.load_examples(str(ROOT / "tiny" / "data"), "train")


@pytest.fixture(scope="module")
def job(tiny, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    bench.write_random_adapter(str(tiny), folder / "adapter")
    files.write_json(folder / "rows.json", bench.encode_rows(tokenizer, ROWS))
    return contenders.Job(
        model=str(tiny),
        tokenizer=str(tiny),
        rows=str(folder / "rows.json"),
        adapter=str(folder / "adapter"),
        quant="none",
        dtype="fp32",
        device="cpu",
    )


@pytest.fixture(scope="module")
def both(job, tmp_path_factory):
    """What ours and the reference compute from the same rows, each in a process of its own."""
    folder = tmp_path_factory.mktemp("results")
    names = (bench.Contender("ours"), bench.Contender("reference"))
    return [bench.results_of(name, vars(job), folder) for name in names]


@pytest.fixture(scope="module")
def reference(job):
    return contenders.Reference(job, read_json(job.rows))


# -----------------------------------------------------------------------------
# The gate


def test_a_checkout_that_is_not_there_shows_before_anything_is_written(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr("sys.argv", ["bench", "--against", str(tmp_path)])
    with pytest.raises(SystemExit):
        bench.parse_arguments()
    assert f"--against {tmp_path} is not a checkout of this project" in capsys.readouterr().err


def test_ours_and_the_reference_agree(both):
    """Forced to 32 ids a row, whatever ends a text; the gradients are of micro-batches of 16."""
    mine, theirs = both
    apart = bench.distances(mine, theirs)
    assert bench.beyond("fp32", apart, bench.BOUNDS) == []
    assert apart.keys() == bench.BOUNDS.keys()
    assert {len(ids) for ids in mine["written"]} == {32}


@pytest.mark.parametrize("what", ["loss", "gradient", "scores", "written"])
def test_there_are_no_figures_when_results_differ(both, tmp_path, monkeypatch, what):
    mine, theirs = both
    wrong = copy.deepcopy(mine)
    if what == "loss":
        wrong["loss"] *= 1.0001
    elif what == "gradient":
        wrong["gradients"] = {name: 1.001 * part for name, part in mine["gradients"].items()}
    elif what == "scores":
        wrong["scores"][0][0] += 0.001
    else:
        wrong["written"][0][31] += 1

    def results_of(contender, job, folder):
        return wrong if contender.name == "ours" else theirs

    monkeypatch.setattr(bench, "results_of", results_of)
    names = bench.all_contenders(None)
    expected = rf"no figures, .* do not agree: ours from reference, .*, {what}: off by"
    with pytest.raises(ValueError, match=expected):
        bench.compare(names, {"quant": "none", "dtype": "fp32"}, tmp_path)


def test_in_bf16_ours_may_not_be_much_further_from_fp32_than_the_reference(
    both, tmp_path, monkeypatch
):
    """Here "bf16" is fp32 with 1 % of noise for ours, and with 0.4 % for the reference."""
    _, theirs = both

    def results_of(contender, job, folder):
        results = copy.deepcopy(theirs)
        if job["dtype"] == "bf16":
            noise = 0.01 if contender.name == "ours" else 0.004
            for part in results["gradients"].values():
                part *= 1 + noise
        return results

    monkeypatch.setattr(bench, "results_of", results_of)
    names = bench.all_contenders(None)[:2]
    with pytest.raises(ValueError, match="ours in bf16 from fp32, gradient: off by 1.0e-02"):
        bench.compare(names, {"quant": "none", "dtype": "bf16"}, tmp_path)


def test_a_result_that_is_no_number_is_a_difference(both):
    mine, theirs = both
    apart = bench.distances(mine | {"loss": float("nan")}, theirs)
    (problem,) = bench.beyond("fp32", apart, bench.BOUNDS)
    assert problem == "fp32, loss: off by nan"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_references_way_does_not_change_what_it_computes(both, reference, attention):
    """Sums in another order differ by 1e-6."""
    _, expected = both
    reference.use(rows_at_once=5, attention=attention)
    reference.optimizer.zero_grad()
    loss = reference.backward(reference.rows["training"]).item()
    written = reference.write(reference.prompts, 32)
    scores = reference.score(reference.prompts)
    found = {"loss": loss, "written": written, "scores": scores}
    apart = bench.distances(found | {"gradients": reference.gradients()}, expected)
    assert bench.beyond(attention, apart, bench.BOUNDS) == []


def test_the_references_loss_is_that_of_transformers(reference):
    """It runs the head on the answers' positions alone, without a mask: the loss is the same."""
    rows = reference.rows["training"]
    sequences = [prompt + answer for prompt, answer in rows]
    labels = [[-100] * len(prompt) + answer for prompt, answer in rows]
    mask = contenders.pad([[1] * len(sequence) for sequence in sequences], 0)
    ids = contenders.pad(sequences, reference.eos)
    loss = reference.model(ids, attention_mask=mask, labels=contenders.pad(labels, -100)).loss
    assert reference.loss(rows).item() == pytest.approx(loss.item(), rel=1e-6)


# -----------------------------------------------------------------------------
# Rows


def test_the_drawn_rows_have_mnlis_spread_of_lengths(pairs, tokenizer):
    """MNLI's own tokens after the shared prefix: median 46, 95 % up to 81, the longest 236 or more.

    The bounds hold for every seed: of 1,000 rows the longest varies most.
    """
    drawn = mnli_lengths.draw_rows(pairs, tokenizer, 1000, seed=1)
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


def test_the_drawn_rows_of_validation_share_no_more_than_mnlis(tokenizer):
    """In batches of 64 in the order of eval.py, MNLI's distinct tokens are 0.57 of all."""
    rows = bench.encode_rows(tokenizer, 1000)["evaluation"]
    prefix, _, _ = data.fixed_ids(tokenizer)
    own = [prompt[len(prefix) :] for prompt, _ in rows]
    distinct = 0
    for batch in contenders.batches(own, 64):
        own_ids, _ = packing.fold(batch)
        distinct += len(own_ids)
    lengths = sorted(map(len, own))
    assert 0.57 < distinct / sum(lengths) < 0.66
    assert 43 <= median(lengths) <= 50
    assert lengths[950] <= 92


def test_a_drawn_row_keeps_the_label_of_its_last_pair(pairs, tokenizer):
    labels = {(row["premise"], row["hypothesis"]): row["label"] for row in pairs}
    longer = 0
    for row in mnli_lengths.draw_rows(pairs, tokenizer, 100, seed=2):
        own = [
            premise
            for premise, hypothesis in labels
            if hypothesis == row["hypothesis"] and row["premise"].endswith(premise)
        ]
        assert row["label"] in {labels[premise, row["hypothesis"]] for premise in own}
        longer += row["premise"] not in own
    assert longer > 80


def test_the_same_seed_draws_the_same_rows(pairs, tokenizer):
    first = mnli_lengths.draw_rows(pairs, tokenizer, 20, seed=3)
    assert mnli_lengths.draw_rows(pairs, tokenizer, 20, seed=3) == first
    assert mnli_lengths.draw_rows(pairs, tokenizer, 20, seed=4) != first


# -----------------------------------------------------------------------------
# The script


def test_a_contender_that_fails_is_an_error(job, capfd):
    with pytest.raises(ValueError, match="ours ended with status 1"):
        bench.Process(bench.Contender("ours"), vars(replace(job, rows="nowhere")))
    assert "nowhere" in capfd.readouterr().err


def test_another_checkout_is_measured_by_turns_with_this_one(job, tmp_path, capsys):
    """It is a copy of the six and of support/."""
    checkout = tmp_path / "before"
    checkout.mkdir()
    for name in ("lora", "quant", "phi2", "data", "eval", "train"):
        (checkout / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
    with (checkout / "train.py").open("a") as file:  # tells that it was taken
        file.write("\nPath(__file__).with_name('taken').touch()\n")
    (checkout / "support").symlink_to(ROOT / "support")
    names = bench.all_contenders(checkout)
    assert [contender.name for contender in names] == ["ours", "before"]
    figures = bench.measure(names, vars(job), ["train16"], rounds=1)
    assert (checkout / "taken").is_file()
    one_each = {"ours": 1, "before": 1}
    for title in ("training, 16 rows a step", bench.PEAK):
        assert {name: len(rounds) for name, rounds in figures[title].items()} == one_each
    bench.show(figures, names)
    printed = capsys.readouterr().out
    for title in figures:
        assert re.search(rf"{title} +[\d.]+ +[\d.]+ +[\d.]+x", printed)
