"""Real MultiNLI with phi-2's real tokenizer, from ../shared. Visibly skipped where that folder is not."""
import pytest
import torch
from conftest import SHARED, read_json, script

import data

MNLI, TOKENIZER = SHARED / "mnli", SHARED / "phi-2-tokenizer"
pytestmark = pytest.mark.skipif(not MNLI.is_dir() or not TOKENIZER.is_dir(), reason="../shared/mnli and ../shared/phi-2-tokenizer are not there")


@pytest.fixture(scope="module")
def tokenizer():
    return data.load_tokenizer(TOKENIZER)


def test_shared_the_ids_that_this_project_relies_on(tokenizer):
    assert tokenizer.get_vocab_size() == 50_295
    assert data.fixed_ids(tokenizer)[1] == [657, 352, 362] and tokenizer.token_to_id(data.EOS) == 50_256
    assert tokenizer.encode("### Label: 0").ids == [21017, 36052, 25, 657]


@pytest.mark.parametrize("split, rows", [("validation_matched", 9_815), ("train", 37_854)])
def test_shared_prefix_and_rest_are_the_ids_of_the_whole_prompt_on_every_row(tokenizer, split, rows):
    examples = data.load_examples(str(MNLI), split)
    prefix, lengths = tokenizer.encode(data.PREFIX).ids, []
    assert len(examples) == rows
    for batch in examples.iter(1000):
        batch = [dict(zip(batch, values)) for values in zip(*batch.values())]
        whole = tokenizer.encode_batch([data.PROMPT.format(**example) for example in batch])
        for example, encoding in zip(batch, whole):
            prompt, answer = data.encode(example, tokenizer)
            assert prompt == encoding.ids and prompt[:len(prefix)] == prefix and len(answer) == 2
            lengths.append(len(prompt) + 1)
    if split == "validation_matched":  # the notebook project's count of prompt and label
        lengths = torch.tensor(lengths, dtype=torch.float64)
        assert [int(lengths.quantile(q)) for q in (0, 0.5, 0.95, 0.99, 1)] == [68, 97, 133, 156, 288]


def test_shared_real_mnli_trains_with_the_embedded_model(tmp_path):
    done = script("train.py", "--model", "tiny/model", "--dataset", MNLI, "--steps", 50, "--limit", 2000, "--batch-size", 4, "--eval-limit", 16, "--max-new-tokens", 8, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "2,000 rows, 50 steps of 4" in done.stdout
    results = read_json(tmp_path / "run" / "results.json")
    assert results["finetuned"]["validation_matched"]["n"] == 16
