"""Real MultiNLI with phi-2's real tokenizer, from ../shared. Skipped where that folder is not."""

import itertools

import pytest
import torch
from conftest import SHARED, read_json, script
from tokenizers import Tokenizer

import data
from scripts import describe
from support.examples import Reading, load_examples

MNLI = SHARED / "mnli"
TOKENIZER = SHARED / "phi-2-tokenizer"
pytestmark = pytest.mark.skipif(
    not MNLI.is_dir() or not TOKENIZER.is_dir(),
    reason="../shared/mnli and ../shared/phi-2-tokenizer are not there",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return data.load_tokenizer(TOKENIZER)


def test_shared_the_ids_that_this_project_relies_on(tokenizer):
    _, answers, eos = data.fixed_ids(tokenizer)
    assert tokenizer.get_vocab_size() == 50_295
    assert answers == [657, 352, 362]
    assert eos == tokenizer.token_to_id(data.EOS) == 50_256
    assert tokenizer.encode("### Label: 0").ids == [21017, 36052, 25, 657]


@pytest.mark.parametrize("split, rows", [("validation_matched", 9_815), ("train", 37_854)])
def test_shared_prefix_and_rest_are_the_ids_of_the_whole_prompt_on_every_row(
    tokenizer, split, rows
):
    examples = load_examples(str(MNLI), split)
    assert len(examples) == rows
    prefix, _, _ = data.fixed_ids(tokenizer)
    lengths = []
    remaining = iter(examples)
    while batch := list(itertools.islice(remaining, 1000)):
        whole = tokenizer.encode_batch([data.PROMPT.format(**example) for example in batch])
        for example, encoding in zip(batch, whole):
            prompt, answer = data.encode(example, tokenizer)
            assert prompt == encoding.ids
            assert prompt[: len(prefix)] == prefix
            assert len(answer) == 2
            lengths.append(len(prompt) + 1)
    # scripts.describe tokenises each text once, and adds up.
    described = describe.token_lengths(examples, tokenizer, split)
    assert (described - 1).tolist() == lengths
    if split == "validation_matched":
        # The original project's counts of prompt and label: least, median, 95 %, 99 %, most.
        quantiles = torch.tensor(lengths, dtype=torch.float64).quantile(
            torch.tensor([0, 0.5, 0.95, 0.99, 1], dtype=torch.float64)
        )
        assert [int(length) for length in quantiles] == [68, 97, 133, 156, 288]


def test_shared_no_premise_of_real_mnli_is_in_train_and_in_the_part_for_validation(tmp_path):
    (tmp_path / "train.parquet").symlink_to(MNLI / "train.parquet")
    train, validation = (
        load_examples(str(tmp_path), split, reading=Reading(validation=0.05))
        for split in ("train", "validation")
    )
    assert len(train) + len(validation) == 37_854
    assert len(validation) == pytest.approx(0.05 * 37_854, abs=3)
    assert not set(train["premise"]) & set(validation["premise"])
    assert len(set(train["premise"])) < 0.95 * len(train), "some premises have several rows"


def test_shared_real_mnli_trains_with_the_embedded_model(tmp_path):
    out = tmp_path / "run"
    command = ["train.py", "--model", "tiny/model", "--dataset", MNLI, "--out", out]
    command += ["--steps", 50, "--limit", 2000, "--batch-size", 4]
    command += ["--eval-limit", 16, "--max-new-tokens", 8]
    done = script(*command)
    assert done.returncode == 0, done.stderr
    assert "2,000 rows, 50 steps of 4" in done.stdout
    results = read_json(out / "results.json")
    assert results["finetuned"]["validation_matched"]["n"] == 16
