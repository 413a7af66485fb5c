"""This project beside transformers + PEFT + bitsandbytes: logits, adapters, gradients, 4-bit codes, steps of AdamW.

On the embedded model and on four random layers of phi-2's widths, with and without NF4, in fp32 and bf16.
"""
from types import SimpleNamespace

import pytest
import torch
from conftest import distance, pair, peft_tensors, random_ids

import lora
import quant
import ranks

# Relative to the norm of the logits. fp32: two orders of summation; bf16: 8 bits of mantissa through the layers.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
CASES = [(name, quantization, dtype) for name in ("tiny", "wide") for quantization in ("none", "nf4") for dtype in TOLERANCE]


def name_of(case) -> str:
    return f"{case[0]}-{case[1]}-{str(case[2])[6:]}"


@pytest.fixture(scope="module", params=CASES, ids=name_of)
def both(request):
    """Our model and theirs from the same files with the same random adapters."""
    name, quantization, dtype = request.param
    mine, theirs = pair(request.getfixturevalue(name), dtype, quantization)
    return SimpleNamespace(mine=mine, theirs=theirs, name=name, quantization=quantization, dtype=dtype, ids=random_ids(mine))


def answer_loss(logits, ids):
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def base_logits(both):
    """Ours with every B at zero, which adds exact zeros."""
    trained = {name: parameter.clone() for name, parameter in lora.lora_parameters(both.mine).items()}
    for name, parameter in lora.lora_parameters(both.mine).items():
        parameter.mul_("lora_A" in name)
    logits = both.mine(both.ids)
    for name, parameter in lora.lora_parameters(both.mine).items():
        parameter.copy_(trained[name])
    return logits


@torch.no_grad()
def test_logits_equal_those_of_transformers(both):
    with both.theirs.disable_adapter():
        expected = both.theirs(both.ids).logits
    assert distance(base_logits(both), expected) < TOLERANCE[both.dtype]


@torch.no_grad()
def test_logits_with_random_adapters_equal_pefts(both):
    found, expected = both.mine(both.ids), both.theirs(both.ids).logits
    assert distance(base_logits(both), expected) > 2e-2, "the adapters must matter, or this test says nothing"
    assert distance(found, expected) < TOLERANCE[both.dtype]
    columns = torch.tensor([[5, 6], [0, 1], [22, 23]])  # the answer's places alone
    assert distance(both.mine(both.ids, columns=columns), expected[torch.arange(3)[:, None], columns]) < TOLERANCE[both.dtype]


def test_codes_and_absmax_are_bit_equal_to_those_transformers_loads(both):
    layers = [path for path, module in both.mine.named_modules() if isinstance(module, quant.NF4Linear)]
    assert len(layers) == (6 * both.mine.config.num_hidden_layers if both.quantization == "nf4" else 0)
    for path in layers:
        found, expected = both.mine.get_submodule(path), both.theirs.get_submodule("base_model.model." + path).weight
        assert torch.equal(found.weight, expected.data) and torch.equal(found.absmax, expected.quant_state.absmax)


def test_gradients_of_the_adapters_equal_pefts(both):
    if both.name == "wide" and both.dtype == torch.bfloat16 and ranks.fast_dtype() == "fp32":
        pytest.skip("ten minutes on a CPU without instructions for bf16")
    answer_loss(both.mine(both.ids), both.ids).backward()
    answer_loss(both.theirs(both.ids).logits, both.ids).backward()
    expected = peft_tensors(both.theirs)
    for name, parameter in lora.lora_parameters(both.mine).items():
        assert parameter.grad.norm() > 0
        # bf16 rounds every activation to 8 bits, here and there at different places
        assert distance(parameter.grad, expected[name].grad) < (1e-4 if both.dtype == torch.float32 else 0.1), name
    assert all(parameter.grad is None for name, parameter in both.mine.named_parameters() if "lora_" not in name)


# In fp32, on the embedded model: on the wide one it takes minutes, and the gradients there are held above
@pytest.mark.parametrize("both", [("tiny", "none", torch.float32), ("tiny", "nf4", torch.float32)], indirect=True, ids=name_of)
def test_fifty_steps_of_adamw_end_where_pefts_end(both):
    parameters, expected = lora.lora_parameters(both.mine), peft_tensors(both.theirs)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizers = [torch.optim.AdamW(group.values(), lr=2e-4, weight_decay=0.01) for group in (parameters, expected)]
    for optimizer in optimizers:
        optimizer.zero_grad()
    for step in range(50):
        ids = random_ids(both.mine, rows=2, length=12, seed=step)
        for model, optimizer in zip((both.mine, both.theirs), optimizers):
            logits = model(ids)
            answer_loss(getattr(logits, "logits", logits), ids).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in parameters.items():
        assert distance(start[name], parameter) > 1e-3, "it must have moved"
        assert distance(parameter, expected[name]) < 1e-4, name
