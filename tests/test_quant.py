"""quant.py beside bitsandbytes as transformers uses it, and beside the definition of NF4."""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, distance, ours, random_ids, reference

import lora
import quant


@pytest.mark.parametrize("double_quant", [False, True], ids=["nf4", "double"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_what_is_stored_is_what_transformers_stores_from_each_dtype(tiny, dtype, double_quant):
    mine, theirs = ours(tiny, dtype, "nf4", double_quant), reference(tiny, dtype, "nf4", double_quant)
    layers = [path for path, module in mine.named_modules() if isinstance(module, quant.NF4Linear)]
    assert len(layers) == 6 * mine.config.num_hidden_layers
    for path in layers:
        found, expected = mine.get_submodule(path), theirs.get_submodule(path).weight
        assert torch.equal(found.weight, expected.data)
        assert torch.equal(found.absmax, expected.quant_state.absmax)
        if double_quant:
            assert found.absmax.dtype == torch.uint8
            assert torch.equal(found.nested_absmax, expected.quant_state.state2.absmax)
            assert torch.equal(found.offset, expected.quant_state.offset)
    assert type(mine.lm_head) is torch.nn.Linear


def test_nf4_is_the_nearest_of_16_levels_times_the_blocks_largest_magnitude():
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 96)
    layer = quant_layer(linear)
    blocks = linear.weight.detach().view(-1, 64)
    absmax = blocks.abs().amax(dim=1)
    index = (blocks / absmax[:, None]).unsqueeze(-1).sub(layer.code).abs().argmin(dim=-1)
    assert torch.equal(layer.absmax, absmax)
    assert torch.equal(layer.weight.flatten(), (index[:, 0::2] * 16 + index[:, 1::2]).flatten().to(torch.uint8)), "the first of two in the high half"
    assert torch.equal(layer.dequantize(), (layer.code[index] * absmax[:, None]).view(96, 128))


def quant_layer(linear: torch.nn.Linear, **options) -> quant.NF4Linear:
    model = torch.nn.Sequential(linear)
    quant.quantize_linears(model, **options)
    return model[0]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_are_those_of_a_linear_layer_with_the_dequantised_weight(dtype, double_quant):
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 96, dtype=dtype)
    layer = quant_layer(linear, double_quant=double_quant)
    x = torch.randn(3, 5, 128, dtype=dtype)
    results = []
    for forward in (layer, lambda x: torch.nn.functional.linear(x, layer.dequantize(), linear.bias)):
        given = x.clone().requires_grad_()
        y = forward(given)
        y.square().sum().backward()
        results.append((y, given.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert 0.05 < distance(layer.dequantize(), linear.weight) < 0.12, "4 bits cost about 9% of a Gaussian weight's norm"


def test_kept_dequantised_weights_change_no_bit(tiny):
    model, ids, results = ours(tiny, torch.bfloat16, "nf4"), None, []
    ids = random_ids(model)
    lora.inject(model, lora.LoRAConfig(dropout=0.0))
    for keep in (False, True):
        if keep:
            quant.keep_dequantized(model)
        logits = model(ids)
        results.append((logits, *torch.autograd.grad(logits.float().square().mean(), [p for n, p in lora.lora_parameters(model).items() if "lora_B" in n])))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert "kept" not in " ".join(model.state_dict())


def test_the_backward_pass_keeps_the_packed_weight_alone():
    layer = quant_layer(torch.nn.Linear(256, 256))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(2, 256, requires_grad=True))
    assert kept == []


def test_qlora_is_lora_on_the_dequantised_weights(tiny):
    four_bit, dequantised = ours(tiny, torch.float32, "nf4"), ours(tiny, torch.float32, "nf4")
    assert len(quant.dequantize_linears(dequantised, torch.float32)) == 36
    ids = random_ids(four_bit)
    gradients = []
    for model in (four_bit, dequantised):
        torch.manual_seed(0)
        lora.inject(model, lora.LoRAConfig(dropout=0.0))
        for parameter in lora.lora_parameters(model).values():
            torch.nn.init.normal_(parameter, std=0.1)
        model(ids).square().mean().backward()
        gradients.append([parameter.grad for parameter in lora.lora_parameters(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_state_dict_restores_the_layer_and_quantising_again_changes_nothing(double_quant):
    torch.manual_seed(0)
    layer = quant_layer(torch.nn.Linear(192, 128), double_quant=double_quant)
    weight = layer.dequantize()
    again = quant_layer(torch.nn.Linear(192, 128), double_quant=double_quant)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.dequantize(), weight)
    if not double_quant:  # under double quantisation absmax itself is rounded, and moves
        assert torch.equal(quant_layer(linear_of(weight)).weight, layer.weight)


def linear_of(weight: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data = weight
    return linear


def test_loading_needs_little_memory_above_the_finished_model(wide):
    """In a process of its own: how far its resident size rose, and the size of the model's tensors."""
    done = subprocess.run([sys.executable, "-c", f"""
import torch
import bitsandbytes, safetensors.torch
import eval as evaluation
def resident(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
before = resident("VmRSS")
model = evaluation.load_model({str(wide)!r}, "nf4", torch.bfloat16, "cpu")
print(resident("VmHWM") - before, sum(t.nbytes for t in model.state_dict().values()))
"""], capture_output=True, text=True, cwd=ROOT)
    peak, model = map(int, done.stdout.split())
    assert model < peak < model + 2 * (51200 * 2560 * 2), "the largest tensor twice: as it is read, and as it is kept"


@pytest.mark.parametrize("double_quant, bits", [(False, 4.5), (True, 4.127)])
def test_bits_per_weight(double_quant, bits):
    layer = quant_layer(torch.nn.Linear(2560, 2560), double_quant=double_quant)
    size = sum(buffer.nbytes for name, buffer in layer.state_dict().items() if name != "bias")
    assert abs(8 * size / 2560 ** 2 - bits) < 1e-3


def test_a_weight_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"shape \(3, 4\), not \(64, 64\)"):
        quant.NF4Linear(64, 64).load_state_dict({"weight": torch.ones(3, 4), "bias": torch.ones(64)})
