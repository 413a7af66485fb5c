"""quant.py beside bitsandbytes as transformers uses it, and beside the definition of NF4."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, distance, logits, ours, random_ids, reference
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import eval as evaluation
import lora
import phi2
import quant
from support import checkpoints

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


@DOUBLE
@DTYPES
def test_a_checkpoint_that_is_in_nf4_already_is_taken_bit_for_bit(
    tiny, tmp_path, dtype, double_quant
):
    """As transformers and bitsandbytes upload it: the codes of the file, no second rounding."""
    theirs = reference(tiny, dtype, "nf4", double_quant)
    theirs.save_pretrained(tmp_path, max_shard_size="1MB")  # a weight's parts in several files
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    mine = ours(tmp_path, dtype, "nf4")
    saved = tensors_of(tmp_path)
    layers = nf4_layers(mine)
    assert len(layers) == 6 * mine.config.num_hidden_layers
    for path, layer in layers.items():
        expected = theirs.get_submodule(path).weight
        assert torch.equal(layer.weight, saved[f"{path}.weight"])
        absmax = saved[f"{path}.weight.absmax"]
        if double_quant:  # ours is in fp32 then
            state = expected.quant_state
            absmax = functional().dequantize_blockwise(absmax, state.state2) + state.offset
        assert torch.equal(layer.absmax, absmax)
        values = functional().dequantize_4bit(expected.data, expected.quant_state)
        assert layer.dequantize().dtype == dtype
        assert torch.equal(layer.dequantize(), values)
    ids = random_ids(mine)
    with torch.no_grad():
        # In 16 bits sums are rounded, in another order: as in test_reference.py.
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        assert distance(logits(mine, ids), theirs(ids).logits) < bound


def nf4_layers(model: nn.Module) -> dict[str, quant.NF4Linear]:
    return {
        path: layer for path, layer in model.named_modules() if isinstance(layer, quant.NF4Linear)
    }


def functional():
    import bitsandbytes.functional

    return bitsandbytes.functional


def tensors_of(directory) -> dict[str, Tensor]:
    tensors = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


@pytest.mark.parametrize(
    "kept, storage",
    [
        (["lm_head", "model.layers.1.mlp", "v_proj"], {}),
        (["lm_head", "_proj"], {}),  # transformers matches the ends of names
        (["model.layers.0"], {}),  # and then it quantises the head too
        (["lm_head"], {"bnb_4bit_quant_storage": torch.bfloat16}),
    ],
)
def test_layers_that_an_nf4_checkpoint_holds_in_16_bits_stay_so(tiny, tmp_path, kept, storage):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=kept, **storage
    )
    options = {"dtype": torch.float32, "quantization_config": config}
    theirs = AutoModelForCausalLM.from_pretrained(tiny, **options).train()
    theirs.save_pretrained(tmp_path)
    mine = evaluation.load_model(tmp_path, "nf4", "fp32", "cpu")
    for path, layer in theirs.named_modules():
        if isinstance(layer, nn.Linear):
            is_nf4 = type(layer).__name__ == "Linear4bit"
            assert isinstance(mine.get_submodule(path), quant.NF4Linear) == is_nf4, path
    ids = random_ids(mine)
    with torch.no_grad():
        assert distance(logits(mine, ids), theirs(ids).logits) < 1e-5


def test_an_nf4_checkpoint_needs_nf4_layers_and_its_own_blocks(tiny, tmp_path):
    reference(tiny, torch.float32, "nf4").save_pretrained(tmp_path)
    for flags in (("none", False), ("nf4", True)):
        with pytest.raises(ValueError, match="it is in NF4: --quant nf4 without --double-quant"):
            ours(tmp_path, torch.float32, *flags)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    key = "model.layers.0.self_attn.q_proj.weight." + "quant_state.bitsandbytes__nf4"
    record = json.loads(bytes(tensors[key].tolist())) | {"blocksize": 128}
    tensors[key] = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="its NF4 has blocks of 128 weights, not of 64"):
        evaluation.load_model(tmp_path, "nf4", "fp32", "cpu")


def lose(tensors, key):
    del tensors[key]


def not_a_number(tensors, key):
    tensors[key][0] = float("nan")


def halve(tensors, key):
    tensors[key] = tensors[key][: len(tensors[key]) // 2].clone()


def no_object(tensors, key):
    tensors[key] = torch.tensor(list(b"[]"), dtype=torch.uint8)


@pytest.mark.parametrize(
    "part, change",
    [
        ("absmax", lose),
        ("absmax", halve),
        ("absmax", not_a_number),
        ("nested_absmax", lose),
        ("nested_absmax", halve),
        ("nested_quant_map", halve),
        ("quant_state.bitsandbytes__nf4", no_object),
        ("quant_state.bitsandbytes__nf4", halve),
    ],
)
def test_a_damaged_nf4_checkpoint_is_one_line_with_the_layer(tiny, tmp_path, part, change):
    nested = part.startswith("nested")
    reference(tiny, torch.float32, "nf4", double_quant=nested).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    change(tensors, f"model.layers.0.mlp.fc1.weight.{part}")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.0.mlp.fc1") as raised:
        evaluation.load_model(tmp_path, "nf4", "fp32", "cpu")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "bnb_4bit_quant_type": "fp4"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        "nf4",
    ],
    ids=["gptq", "awq", "8 bits", "fp4", "no object"],
)
def test_other_quantisations_are_refused_from_config_json(tiny, tmp_path, quantization):
    config = json.loads((tiny / "config.json").read_text())
    config["quantization_config"] = quantization
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json: weights quantised as .* only bitsandbytes"):
        checkpoints.find(str(tmp_path), phi2.read_config, checkpoints.DESCRIPTION)


def test_a_quantisation_of_mlx_is_refused_from_config_json(tiny, tmp_path):
    config = json.loads((tiny / "config.json").read_text())
    config["quantization"] = {"group_size": 64, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json: weights quantised as .'group_size': 64"):
        checkpoints.find(str(tmp_path), phi2.read_config, checkpoints.DESCRIPTION)


def test_a_model_that_was_dequantised_is_quantised_whatever_its_config_says(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    stale = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": stale}))
    model = evaluation.load_model(tmp_path / "model", "nf4", "fp32", "cpu")
    assert nf4_layers(model).keys() == nf4_layers(ours(tiny, torch.float32, "nf4")).keys()


def test_the_levels_are_bitsandbytes_table():
    from bitsandbytes.functional import get_4bit_type

    assert torch.equal(quant.LEVELS, get_4bit_type("nf4", device="cpu"))


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


# -----------------------------------------------------------------------------
# Loading

MEASURE = """
import sys
from pathlib import Path

import bitsandbytes
import safetensors.torch

import eval as evaluation


def resident(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024


before = resident("VmRSS")
model = evaluation.load_model(Path(sys.argv[1]), "nf4", "bf16", "cpu")
peak = resident("VmHWM")
print(peak - before, sum(tensor.nbytes for tensor in model.state_dict().values()))
"""


def test_loading_needs_little_memory_above_the_finished_model(wide):
    """How far the resident size of a process rises, beside the size of the model's tensors."""
    # Without a fixed threshold glibc keeps freed blocks of up to 32 MiB, as it happens: up to
    # 180 MiB more. What is measured here is what loading needs.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(wide)],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, model = (int(number) for number in done.stdout.split())
    checkpoint = sum(path.stat().st_size for path in wide.glob("*.safetensors"))
    # One tensor at a time is there in fp16, in bf16 and in 4 bits. The largest is an eighth of all.
    assert model < peak < model + checkpoint / 2
