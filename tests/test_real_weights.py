"""phi-1, phi-1.5 and phi-2 themselves, for whoever has their weights.

    PHI2=~/phi-2 .venv/bin/python -m pytest tests/test_real_weights.py
    PHI1=~/phi-1 PHI1_5=~/phi-1_5 .venv/bin/python -m pytest -k real_weights

A variable names the directory of a model. Without any, the same checks run on random models. phi-2
needs 12 GB of memory: it is loaded in fp32, ours and transformers' one after the other.
"""

import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT, distance, ours, reference
from torch import Tensor

import data
import eval as evaluation
import quant
from support.examples import load_examples

# "This is an example statement and this is a test", in phi-2's tokenizer.
IDS = [1212, 318, 281, 1672, 2643, 290, 428, 318, 257, 1332]

# Logits of the first 30 words after each of the first two ids, by transformers in fp32. From its
# tests/models/phi/test_modeling_phi.py (Apache 2.0, the HuggingFace team).
# fmt: off
PUBLISHED = {
    "PHI1": [
        [2.2671, 6.7684, -2.0107, -1.2440, -1.5335, -2.3828, 6.9186, 6.4245, 3.1548, 0.9998,
         0.0760, 4.4653, 4.9857, 4.2956, 1.2308, -1.4178, 0.1361, 0.5191, -0.5699, -2.2201,
         -3.0750, -3.9600, -4.5936, -3.7394, -2.7777, 6.1874, -0.4148, -1.5684, -0.5967, 0.2395],
        [1.7004, 4.0383, 0.0546, 0.4530, -0.3619, -0.9021, 1.8355, 1.3587, 1.2406, 2.5775,
         -0.8834, 5.1910, 4.2565, 4.1406, 3.0752, -0.9099, 1.1595, 0.0264, 0.3243, -1.1803,
         -1.3945, -2.1406, -3.9939, -1.4438, -2.9546, 3.9204, 1.0851, -1.0598, -1.7819, -0.4827],
    ],
    "PHI1_5": [
        [12.2922, 13.3507, 8.6963, 9.1355, 9.3502, 9.2667, 14.2027, 13.1363, 13.5446, 11.1337,
         9.9279, 16.7195, 13.0768, 14.9141, 11.9965, 8.0233, 10.3129, 10.6118, 10.0204, 9.3827,
         8.8344, 8.2806, 8.0153, 8.0540, 7.0964, 16.5743, 11.1256, 9.6987, 11.4770, 10.5440],
        [12.3323, 14.6050, 8.9986, 8.1580, 9.5654, 6.6728, 12.5966, 12.6662, 12.2784, 11.7522,
         8.2039, 16.3102, 11.2203, 13.6088, 12.0125, 9.1021, 9.8216, 10.0987, 9.0926, 8.4260,
         8.8009, 7.6547, 6.8075, 7.7881, 7.4501, 15.7451, 10.5053, 8.3129, 10.0027, 9.2612],
    ],
    "PHI2": [
        [6.4830, 6.1644, 3.4055, 2.2848, 5.4654, 2.8360, 5.5975, 5.5391, 7.3101, 4.2498,
         2.5913, 10.3885, 6.4359, 8.7982, 5.6534, 0.5150, 2.7498, 3.1930, 2.4334, 1.7781,
         1.5613, 1.3067, 0.8291, 0.5633, 0.6522, 9.8191, 5.5771, 2.7987, 4.2845, 3.7030],
        [6.0642, 7.8242, 3.4634, 1.9259, 4.3169, 2.0913, 6.0446, 3.6804, 6.6736, 4.0727,
         2.1791, 11.4139, 5.6795, 7.5652, 6.2039, 2.7174, 4.3266, 3.6930, 2.8058, 2.6721,
         2.3047, 2.0848, 2.0972, 2.0441, 1.3160, 9.2085, 4.5557, 3.0296, 2.6045, 2.4059],
    ],
}
# fmt: on


def directory_of(variable: str) -> Path:
    """Returns the directory that an environment variable names; without it the test is skipped."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no directory with the weights")
    return Path(os.environ[variable]).expanduser()


@torch.no_grad()
def check_published(directory: Path, ids: list[int], published: Tensor) -> None:
    """Four decimals are published, so each is off by up to 5e-5.

    Another order of sums in fp32 is of the same size, and another model is off by 0.1 and more.
    """
    found = ours(directory, torch.float32)(torch.tensor(ids))
    torch.testing.assert_close(found[:2, :30], published, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("variable", PUBLISHED)
def test_real_weights_have_the_published_logits(variable):
    check_published(directory_of(variable), IDS, torch.tensor(PUBLISHED[variable]))


@torch.no_grad()
def test_the_check_of_published_logits_passes_for_the_right_model_alone(tiny):
    """Here they are those of transformers for the embedded model, with four decimals."""
    ids = [number % 1024 for number in IDS]
    logits = reference(tiny, torch.float32)(torch.tensor([ids])).logits[0, :2, :30]
    published = logits.mul(1e4).round().div(1e4)
    check_published(tiny, ids, published)
    with pytest.raises(AssertionError, match="not close"):
        check_published(tiny, ids, published.flip(0))


@torch.no_grad()
def check_beside_transformers(directory: Path, quantization: str) -> None:
    """Compares the logits of real prompts, the tokens that are written, and NF4's codes.

    The two models are not in memory together. In fp32 they are within 1e-6 of each other for two
    layers (tests/test_reference.py); phi-2 has 32, through which the difference grows.
    """
    tokenizer = data.load_tokenizer(directory)
    prefix, _, _ = data.fixed_ids(tokenizer)
    pairs = load_examples(str(ROOT / "tiny" / "data"), "validation_matched", 4)
    prompts = [data.encode(pair, tokenizer)[0] for pair in pairs]

    mine = ours(directory, torch.float32, quantization)
    logits = [mine(torch.tensor(prompt)) for prompt in prompts]
    known = mine.config.vocab_size  # ids that no text has may be chosen too, as transformers does
    written, _ = evaluation.generate(mine, prompts, prefix, 12, known, lambda ids: False)
    first = mine.model.layers[0].mlp.fc1
    codes = first.weight.clone() if isinstance(first, quant.NF4Linear) else None
    del mine, first

    theirs = reference(directory, torch.float32, quantization)
    theirs.generation_config.eos_token_id = None
    for prompt, found, ids in zip(prompts, logits, written):
        row = torch.tensor([prompt])
        assert distance(found, theirs(row).logits[0]) < 1e-4
        options = {"attention_mask": torch.ones_like(row), "do_sample": False, "pad_token_id": 0}
        expected = theirs.generate(input_ids=row, max_new_tokens=12, **options)
        assert ids == expected[0, len(prompt) :].tolist()
    if codes is not None:
        assert torch.equal(codes, theirs.model.layers[0].mlp.fc1.weight.data)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_real_weights_of_phi_2_give_what_transformers_gives(quantization):
    check_beside_transformers(directory_of("PHI2"), quantization)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_check_beside_transformers_passes_for_the_embedded_model(tiny, quantization):
    check_beside_transformers(tiny, quantization)
