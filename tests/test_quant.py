"""quant.py beside bitsandbytes as transformers uses it, and beside the definition of NF4."""

import pytest
import torch
from conftest import distance, logits, ours, random_ids, reference
from torch import Tensor, nn

import lora
import quant

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
DOUBLE = pytest.mark.parametrize("double_quant", [False, True], ids=["nf4", "double"])


def quantized(linear: nn.Linear, double_quant: bool = False) -> quant.NF4Linear:
    model = nn.Sequential(linear)
    quant.quantize_linears(model, double_quant=double_quant)
    return model[0]


def linear_of(weight: Tensor) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, dtype=weight.dtype)
    linear.weight.data = weight
    return linear


# -----------------------------------------------------------------------------
# What is stored


@DOUBLE
@DTYPES
def test_what_is_stored_is_what_transformers_stores_from_each_dtype(tiny, dtype, double_quant):
    mine = ours(tiny, dtype, "nf4", double_quant)
    theirs = reference(tiny, dtype, "nf4", double_quant)
    paths = [path for path, module in mine.named_modules() if isinstance(module, quant.NF4Linear)]
    assert len(paths) == 6 * mine.config.num_hidden_layers
    for path in paths:
        layer = mine.get_submodule(path)
        expected = theirs.get_submodule(path).weight
        assert torch.equal(layer.weight, expected.data)
        assert torch.equal(layer.absmax, expected.quant_state.absmax)
        if double_quant:
            assert layer.absmax.dtype == torch.uint8
            assert torch.equal(layer.nested_absmax, expected.quant_state.state2.absmax)
            assert torch.equal(layer.offset, expected.quant_state.offset)
    assert type(mine.lm_head) is nn.Linear


def test_the_levels_are_bitsandbytes_table():
    from bitsandbytes.functional import get_4bit_type

    assert torch.equal(quant.LEVELS, get_4bit_type("nf4", device="cpu"))


def test_the_levels_are_quantiles_of_the_normal_distribution():
    """The formula of the comment above LEVELS, evaluated by scipy."""
    from scipy.stats import norm

    last = 1 - (1 / 30 + 1 / 32) / 2
    above = [norm.ppf(0.5 + i / 8 * (last - 0.5)) for i in range(1, 9)]
    below = [-norm.ppf(0.5 + i / 7 * (last - 0.5)) for i in range(7, 0, -1)]
    levels = torch.tensor([*below, 0, *above]) / norm.ppf(last)
    # The table was made from `last` with seven digits, which moves levels by up to 2e-7.
    assert torch.allclose(quant.LEVELS, levels.float(), rtol=0, atol=3e-7)


def test_nf4_is_the_nearest_of_16_levels_times_the_blocks_largest_magnitude():
    torch.manual_seed(0)
    linear = nn.Linear(128, 96)
    layer = quantized(linear)
    blocks = linear.weight.detach().view(-1, 64)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    differences = (blocks / absmax)[..., None] - quant.LEVELS
    indices = differences.abs().argmin(dim=-1)
    assert torch.equal(layer.absmax, absmax[:, 0])
    first = indices[:, 0::2]
    second = indices[:, 1::2]
    packed = (16 * first + second).flatten().to(torch.uint8)  # the first in the high half
    assert torch.equal(layer.weight.flatten(), packed)
    assert torch.equal(layer.dequantize(), (quant.LEVELS[indices] * absmax).view(96, 128))


@DTYPES
def test_nf4_in_plain_torch_is_bit_equal_to_the_kernels(dtype):
    """quantize and dequantize beside the layer's buffers and weight, on what may be difficult."""
    torch.manual_seed(0)
    weight = torch.randn(96, 128)
    weight[5] = 0  # two blocks of zeros, which have no largest magnitude to divide by
    weight[6] *= 1e-4
    # Values at and next to the borders between two levels, in blocks whose largest magnitude is 1.
    borders = (quant.LEVELS[1:] + quant.LEVELS[:-1]) / 2
    below = borders.nextafter(torch.tensor(-2.0))
    above = borders.nextafter(torch.tensor(2.0))
    row = torch.cat((torch.ones(1), borders, below, above, quant.LEVELS, torch.zeros(2)))
    weight[7] = torch.cat((row, -row))
    weight = weight.to(dtype)

    layer = quantized(linear_of(weight))
    packed, absmax = quant.quantize(weight)
    assert packed.dtype == torch.uint8
    assert absmax.dtype == torch.float32
    assert torch.equal(packed, layer.weight)
    assert torch.equal(absmax, layer.absmax)
    restored = quant.dequantize(packed, absmax, weight.shape, dtype)
    assert restored.dtype == dtype
    assert torch.equal(restored, layer.dequantize())
    assert not restored[5].any()


@DTYPES
@pytest.mark.parametrize("shape", [(32, 96), (16, 64), (3, 10)], ids=str)
def test_a_layer_of_any_width_has_the_weights_that_are_stored(shape, dtype):
    """Also where a block of 64 goes on in the next row."""
    # Rows of different sizes: a block that began with each row would have another absmax.
    sizes = 10.0 ** torch.arange(-2, 3).repeat(7)[: shape[0], None]
    layer = quantized(linear_of((torch.randn(shape) * sizes).to(dtype)))
    missing = -layer.weight.numel() * 2 % quant.BLOCK  # what the last block lacks
    packed = nn.functional.pad(layer.weight.flatten(), (0, missing // 2))
    whole = (packed.numel() * 2,)
    expected = quant.dequantize(packed, layer.absmax, whole, dtype)[: layer.in_features * shape[0]]
    assert torch.equal(layer.dequantize(), expected.reshape(shape))


@pytest.mark.parametrize("double_quant, bits", [(False, 4.5), (True, 4.127)])
def test_bits_per_weight(double_quant, bits):
    layer = quantized(nn.Linear(2560, 2560, bias=False), double_quant)
    size = sum(buffer.nbytes for buffer in layer.state_dict().values())
    assert 8 * size / 2560**2 == pytest.approx(bits, abs=1e-3)


@DOUBLE
def test_a_state_dict_restores_the_layer_and_quantising_again_changes_nothing(double_quant):
    torch.manual_seed(0)
    layer = quantized(nn.Linear(192, 128), double_quant)
    weight = layer.dequantize()
    restored = quantized(nn.Linear(192, 128), double_quant)
    restored.load_state_dict(layer.state_dict())
    assert torch.equal(restored.dequantize(), weight)
    assert restored.dtype == torch.float32
    in_bf16 = quantized(nn.Linear(192, 128, dtype=torch.bfloat16), double_quant)
    restored.load_state_dict(in_bf16.state_dict(), assign=True)
    assert restored.dequantize().dtype == torch.bfloat16  # as the bias says, indices do not
    if not double_quant:  # there absmax itself is rounded, and moves
        assert torch.equal(quantized(linear_of(weight)).weight, layer.weight)


def test_a_weight_of_another_shape_is_an_error():
    layer = quant.NF4Linear(64, 64)
    with pytest.raises(ValueError, match=r"shape \(3, 4\), not \(64, 64\)"):
        layer.load_state_dict({"weight": torch.ones(3, 4), "bias": torch.ones(64)})


# -----------------------------------------------------------------------------
# What is computed


@DOUBLE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_output_and_gradient_are_those_of_a_linear_layer_with_the_dequantised_weight(
    dtype, double_quant
):
    torch.manual_seed(0)
    linear = nn.Linear(128, 96, dtype=dtype)
    layer = quantized(linear, double_quant)
    plain = linear_of(layer.dequantize())
    plain.bias = linear.bias
    x = torch.randn(3, 5, 128, dtype=dtype)

    results = []
    for module in (layer, plain):
        inputs = x.clone().requires_grad_()
        outputs = module(inputs)
        outputs.square().sum().backward()
        results.append((outputs, inputs.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    # What 4 bits cost: about 9 % of the weight's norm.
    assert 0.05 < distance(layer.dequantize(), linear.weight) < 0.12


def test_the_backward_pass_keeps_the_packed_weight_alone():
    layer = quantized(nn.Linear(256, 256))
    stored = []

    def pack(tensor: Tensor) -> Tensor:
        stored.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(2, 256, requires_grad=True))
    assert stored == []


def test_kept_dequantised_weights_change_no_bit(tiny):
    model = ours(tiny, torch.bfloat16, "nf4")
    lora.inject(model, lora.LoRAConfig(dropout=0.0))
    parameters = lora.lora_parameters(model)
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter, std=0.1)
    ids = random_ids(model)

    def run() -> list[Tensor]:
        outputs = logits(model, ids)
        loss = outputs.float().square().mean()
        return [outputs, *torch.autograd.grad(loss, list(parameters.values()))]

    before = run()
    names = list(model.state_dict())
    quant.keep_dequantized(model)
    for kept, dequantized in zip(run(), before):
        assert torch.equal(kept, dequantized)
    assert list(model.state_dict()) == names, "what is kept is not saved"


def test_qlora_is_lora_on_the_dequantised_weights(tiny):
    gradients = []
    for is_dequantized in (False, True):
        model = ours(tiny, torch.float32, "nf4")
        if is_dequantized:
            assert len(quant.dequantize_linears(model, torch.float32)) == 36
        torch.manual_seed(0)
        lora.inject(model, lora.LoRAConfig(dropout=0.0))
        for parameter in lora.lora_parameters(model).values():
            torch.nn.init.normal_(parameter, std=0.1)
        ids = random_ids(model)
        logits(model, ids).square().mean().backward()
        gradients.append([parameter.grad for parameter in lora.lora_parameters(model).values()])
    for four_bit, dequantized in zip(*gradients):
        assert four_bit.norm() > 0
        assert torch.equal(four_bit, dequantized)
