"""This project beside transformers + PEFT + bitsandbytes, number by number.

Logits, adapters, gradients, 4-bit indices and steps of AdamW: on the embedded model and on a
random one of phi-2's widths, with and without NF4, in fp32, bf16 and fp16.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from conftest import distance, logits, pair, peft_tensors, random_ids
from torch import Tensor, nn

import lora
import phi2
import quant
from support import machine, packing

# Distances are relative to the norm of the reference.
# fp32: two orders of summation. bf16: a number has 8 bits, and ours and theirs are rounded at
# other places, in each layer again. fp16: three bits more, an eighth of bf16's distance.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}
# A gradient goes through all layers twice, and its terms cancel: ten and five times as much.
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.0125}

LENGTH = 12  # tokens of each row

CASES = [
    *(("tiny", quantization, dtype) for quantization in ("none", "nf4") for dtype in TOLERANCE),
    # These widths once where the bound is narrowest, and once as a run computes: the other two
    # pairs say the same, in 15 s. Few CPUs have instructions for fp16, which would take minutes.
    ("wide", "none", torch.float32),
    ("wide", "nf4", torch.bfloat16),
]


@dataclass
class Both:
    """Our model and theirs, from the same files and with the same random adapters."""

    name: str
    quantization: str
    dtype: torch.dtype
    mine: phi2.Phi2
    theirs: nn.Module
    ids: Tensor  # (3, LENGTH)


def name_of(case) -> str:
    name, quantization, dtype = case
    return f"{name}-{quantization}-{str(dtype).removeprefix('torch.')}"


@pytest.fixture(scope="module", params=CASES, ids=name_of)
def both(request) -> Both:
    name, quantization, dtype = request.param
    mine, theirs = pair(request.getfixturevalue(name), dtype, quantization)
    ids = random_ids(mine, rows=3, length=LENGTH)
    return Both(name, quantization, dtype, mine, theirs, ids)


def next_token_loss(outputs: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(outputs[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


@contextmanager
def zero_b(model: phi2.Phi2) -> Iterator[None]:
    """Makes every B zero meanwhile, so that the adapters add exact zeros."""
    parameters = lora.lora_parameters(model)
    trained = {name: parameter.clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        if ".lora_B." in name:
            parameter.zero_()
    yield
    for name, parameter in parameters.items():
        parameter.copy_(trained[name])


@torch.no_grad()
def test_logits_equal_those_of_transformers(both):
    with zero_b(both.mine):
        found = logits(both.mine, both.ids)
    with both.theirs.disable_adapter():
        expected = both.theirs(both.ids).logits
    assert distance(found, expected) < TOLERANCE[both.dtype]


@torch.no_grad()
def test_logits_with_random_adapters_equal_pefts(both):
    expected = both.theirs(both.ids).logits
    with zero_b(both.mine):
        without = logits(both.mine, both.ids)
    assert distance(without, expected) > 2e-2, "the adapters must matter, or this says nothing"
    assert distance(logits(both.mine, both.ids), expected) < TOLERANCE[both.dtype]

    # Only the last two tokens of each row, as in training: there the head runs on no other.
    rows = packing.PackedRows([LENGTH] * 3)
    last = both.mine(both.ids.flatten(), rows, last=2)
    assert distance(last, expected[:, -2:].flatten(0, 1)) < TOLERANCE[both.dtype]


def test_indices_and_absmax_are_bit_equal_to_those_transformers_loads(both):
    layers = {
        path: module
        for path, module in both.mine.named_modules()
        if isinstance(module, quant.NF4Linear)
    }
    expected_layers = 6 * both.mine.config.num_hidden_layers if both.quantization == "nf4" else 0
    assert len(layers) == expected_layers
    for path, layer in layers.items():
        expected = both.theirs.get_submodule(lora.PEFT_PREFIX + path).weight
        assert torch.equal(layer.weight, expected.data)
        assert torch.equal(layer.absmax, expected.quant_state.absmax)


def test_gradients_of_the_adapters_equal_pefts(both):
    is_slow = both.name == "wide" and both.dtype == torch.bfloat16
    if is_slow and machine.fast_dtype("cpu") == "fp32":
        pytest.skip("ten minutes on a CPU without instructions for bf16")
    next_token_loss(logits(both.mine, both.ids), both.ids).backward()
    next_token_loss(both.theirs(both.ids).logits, both.ids).backward()
    expected = peft_tensors(both.theirs)
    for name, parameter in lora.lora_parameters(both.mine).items():
        assert parameter.grad.norm() > 0
        difference = distance(parameter.grad, expected[name].grad)
        assert difference < GRADIENT_TOLERANCE[both.dtype], name
    for name, parameter in both.mine.named_parameters():
        if "lora_" not in name:
            assert parameter.grad is None, name


# On the embedded model and in fp32 alone: the wide one takes minutes, and its gradients are
# compared above. With NF4, which is LoRA on the dequantised weights, as test_quant.py says.
IN_FP32 = [("tiny", "nf4", torch.float32)]


@pytest.mark.parametrize("both", IN_FP32, indirect=True, ids=name_of)
def test_fifty_steps_of_adamw_end_where_pefts_end(both):
    parameters = lora.lora_parameters(both.mine)
    expected = peft_tensors(both.theirs)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    ours = torch.optim.AdamW(parameters.values(), lr=2e-4, weight_decay=0.01)
    theirs = torch.optim.AdamW(expected.values(), lr=2e-4, weight_decay=0.01)
    ours.zero_grad()  # the models may have gradients from the test before
    theirs.zero_grad()
    for step in range(50):
        ids = random_ids(both.mine, rows=2, length=12, seed=step)
        next_token_loss(logits(both.mine, ids), ids).backward()
        next_token_loss(both.theirs(ids).logits, ids).backward()
        ours.step()
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
    for name, parameter in parameters.items():
        assert distance(start[name], parameter) > 1e-3, "it must have moved"
        # AdamW divides by the size of the gradient: where that is small, rounding is enlarged.
        assert distance(parameter, expected[name]) < 1e-4, name
