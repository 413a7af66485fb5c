"""Loading: config.json, shards, damaged files, weights in NF4; one line names what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import distance, logits, ours, random_ids, read_json, reference, script
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import eval as evaluation
import phi2
import quant
from support import checkpoints

# Two orders of summation in fp32, through six layers. Measured: 2e-6 and below.
TOLERANCE = 1e-5

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
DOUBLE = pytest.mark.parametrize("double_quant", [False, True], ids=["nf4", "double"])


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture
def sharded(tiny, tmp_path) -> Path:
    theirs = reference(tiny, torch.bfloat16)
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="2MB")
    return tmp_path / "sharded"


def fails(directory, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        ours(directory, torch.float32)
    assert "\n" not in str(raised.value)


@torch.no_grad()
def test_shards_load_as_one_file_does(tiny, sharded):
    assert len(list(sharded.glob("*.safetensors"))) > 2
    mine = ours(sharded, torch.float32)
    expected = ours(tiny, torch.float32)
    ids = random_ids(mine)
    assert torch.equal(logits(mine, ids), logits(expected, ids))


def test_stored_rotary_tables_are_skipped(tiny, copy):
    """Some uploads have them. They are computed here, so those in a file would change nothing."""
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, copy / "model.safetensors")
    ours(copy, torch.float32)


def test_no_such_model():
    fails("no/such/model", "no model directory 'no/such/model', and it is not a Hub id")
    fails("./nothing", "no model directory './nothing'")


def test_a_file_is_no_model(copy):
    fails(copy / "model.safetensors", "is a file: pass the folder that it is in")


def test_a_directory_without_a_model(tmp_path):
    fails(tmp_path, "is not a model directory: it has no config.json")


def test_a_directory_without_weights(copy):
    (copy / "model.safetensors").unlink()
    fails(copy, "holds no model.safetensors and no model.safetensors.index.json")


def test_a_shard_that_is_listed_but_not_there(sharded):
    next(sharded.glob("model-00002-of-*")).unlink()
    fails(sharded, "lists model-00002-of-.*, which is not there")


def test_a_shard_missing_from_the_index(sharded):
    path = sharded / "model.safetensors.index.json"
    index = read_json(path)
    index["weight_map"] = {
        key: name for key, name in index["weight_map"].items() if not name.startswith("model-00002")
    }
    path.write_text(json.dumps(index))
    fails(sharded, r"lacks \d+ of 89 tensors, among them model\.")


@pytest.mark.parametrize("kept", [0.5, 0.0001])
def test_a_truncated_file(copy, kept):
    path = copy / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    fails(copy, "model.safetensors is damaged or cut short")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("model_type", "llama", "model_type 'llama' is not supported"),
        ("hidden_act", "silu", "hidden_act = 'silu' is not supported"),
        ("qk_layernorm", True, "qk_layernorm"),
        ("num_key_value_heads", 2, "num_key_value_heads"),
        ("num_attention_heads", 7, "not a multiple"),
        ("partial_rotary_factor", 0.35, "11 of a head's 32 dimensions cannot be rotated"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling of type 'linear' is"),
        ("rope_parameters", {"rope_type": "yarn"}, "rope_parameters of type 'yarn' is"),
        ("partial_rotary_factor", 2.0, "64 of a head's 32 dimensions cannot be rotated"),
        ("hidden_size", "192", "config.json: hidden_size cannot be '192'"),
        ("hidden_size", 192.0, "hidden_size cannot be 192.0"),
        ("num_attention_heads", -6, "num_attention_heads cannot be -6"),
        ("num_hidden_layers", True, "num_hidden_layers cannot be True"),
        ("rope_theta", float("nan"), "rope_theta cannot be nan"),
        ("intermediate_size", 512, "fc1 cannot be loaded: .*512"),
        ("num_hidden_layers", 7, "lacks 14 of 103 tensors"),
        ("num_hidden_layers", 5, "config.json leaves no place for model.layers.5"),
    ],
)
def test_a_config_that_does_not_fit(copy, key, value, message):
    config = read_json(copy / "config.json") | {key: value}
    (copy / "config.json").write_text(json.dumps(config))
    fails(copy, message)


@pytest.mark.parametrize("factor, rotated", [(0.0, 0), (0.03, 0), (0.0625, 2), (1.0, 32)])
def test_any_even_number_of_dimensions_is_rotated_as_in_transformers(copy, factor, rotated):
    config = read_json(copy / "config.json") | {"partial_rotary_factor": factor}
    (copy / "config.json").write_text(json.dumps(config))
    assert phi2.read_config(copy).rotary_dim() == rotated
    mine = ours(copy, torch.float32)
    ids = random_ids(mine)
    with torch.no_grad():
        expected = reference(copy, torch.float32)(ids).logits
        assert distance(logits(mine, ids), expected) < TOLERANCE


@pytest.mark.parametrize(
    "factor, rotated, dimensions", [(0.5, 7, 15), (1.0, 15, 15), (0.35, 5, 16)]
)
def test_an_odd_number_of_dimensions_is_refused_by_phi2_itself(factor, rotated, dimensions):
    """transformers makes such a model, but it cannot be run."""
    from transformers import PhiConfig, PhiForCausalLM

    sizes = {
        "vocab_size": 50,
        "hidden_size": 4 * dimensions,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "partial_rotary_factor": factor,
    }
    ids = torch.tensor([1, 2, 3])
    with pytest.raises(RuntimeError, match="must match the size"):
        PhiForCausalLM(PhiConfig(**sizes))(ids[None])
    message = f"{rotated} of a head's {dimensions} dimensions cannot be rotated"
    with pytest.raises(ValueError, match=message):
        phi2.Phi2Config(**sizes)


def test_a_config_without_a_size_is_refused(copy):
    config = read_json(copy / "config.json")
    del config["hidden_size"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json lacks hidden_size"):
        phi2.build(copy)


def test_rotary_positions_that_are_said_to_be_the_default_ones_load(tiny, copy):
    config = read_json(copy / "config.json") | {"rope_scaling": {"rope_type": "default"}}
    (copy / "config.json").write_text(json.dumps(config))
    assert phi2.read_config(copy) == phi2.read_config(tiny)


def test_rope_parameters_do_not_undo_rope_scaling(copy):
    both = {"rope_scaling": {"rope_type": "linear"}, "rope_parameters": {"rope_type": "default"}}
    (copy / "config.json").write_text(json.dumps(read_json(copy / "config.json") | both))
    fails(copy, "rope_scaling of type 'linear' is not supported")


def test_a_config_that_is_not_json(copy):
    (copy / "config.json").write_text("{")
    fails(copy, "config.json is not JSON")


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.self_attn.query_key_value.weight",  # transformers 4.36
        "transformer.h.0.mixer.Wqkv.weight",  # phi-2 as it was first uploaded
    ],
)
def test_a_layout_of_2023_is_refused_with_its_cure(copy, key):
    tensors = load_file(copy / "model.safetensors")
    tensors[key] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(tensors, copy / "model.safetensors")
    fails(copy, "files from 2023 have other names: download the current ones from the Hub")


# -----------------------------------------------------------------------------
# Weights that are in NF4 already, as transformers and bitsandbytes upload them


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
    with pytest.raises(ValueError, match="it is stored in NF4: use --quant nf4"):
        ours(tmp_path, torch.float32, "none")
    with pytest.raises(ValueError, match="in NF4 already: load it without double quantisation"):
        ours(tmp_path, torch.float32, "nf4", double_quant=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    key = "model.layers.0.self_attn.q_proj.weight." + "quant_state.bitsandbytes__nf4"
    record = json.loads(bytes(tensors[key].tolist())) | {"blocksize": 128}
    tensors[key] = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="its NF4 has blocks of 128 values, not of 64"):
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
    "key, quantization",
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ("quantization_config", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
        ("quantization_config", "nf4"),
        ("quantization", {"group_size": 64, "bits": 4}),
    ],
    ids=["gptq", "8 bits", "fp4", "no object", "mlx"],
)
def test_other_quantisations_are_refused_from_config_json(tiny, tmp_path, key, quantization):
    config = json.loads((tiny / "config.json").read_text()) | {key: quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json: weights quantised as .* only bitsandbytes"):
        checkpoints.find(str(tmp_path), phi2.read_config, checkpoints.DESCRIPTION)


def test_a_model_that_was_dequantised_is_quantised_whatever_its_config_says(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    stale = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": stale}))
    model = evaluation.load_model(tmp_path / "model", "nf4", "fp32", "cpu")
    assert nf4_layers(model).keys() == nf4_layers(ours(tiny, torch.float32, "nf4")).keys()


# -----------------------------------------------------------------------------
# Memory

# Without a fixed threshold glibc keeps freed blocks of up to 32 MiB, as it happens: up to 180 MiB
# more. What is measured here is what loading needs.
MEASURE = """
import ctypes
import os
import sys
from pathlib import Path

M_MMAP_THRESHOLD = -3  # of malloc.h
ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
sys.path.insert(0, os.getcwd())

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


def test_loading_needs_little_memory_above_the_finished_model(tiny, tmp_path):
    """How far the resident size of a process rises, beside the size of the model's tensors."""
    sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 8}
    config = read_json(tiny / "config.json") | sizes | {"num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {
        name: torch.full(tensor.shape, 0.5, dtype=torch.float16)
        for name, tensor in phi2.build(tmp_path).state_dict().items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "measure.py").write_text(MEASURE)
    done = script(tmp_path / "measure.py", tmp_path)
    assert done.returncode == 0, done.stderr
    peak, model = (int(number) for number in done.stdout.split())
    checkpoint = (tmp_path / "model.safetensors").stat().st_size
    # One tensor at a time is there in fp16, in bf16 and in 4 bits. The largest is a twelfth of all.
    assert model < peak < model + checkpoint / 2
