"""phi2.py beside transformers: keys, logits of its sizes, loading, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import distance, logits, ours, random_ids, read_json, reference
from safetensors.torch import load_file, save_file

import phi2

# Two orders of summation in fp32, through six layers. Measured: 2e-6 and below.
TOLERANCE = 1e-5


# -----------------------------------------------------------------------------
# The model is transformers'


@pytest.mark.parametrize("name", ["tiny", "wide"])
def test_keys_and_shapes_are_those_of_transformers(name, request):
    from transformers import AutoConfig, PhiForCausalLM

    directory = request.getfixturevalue(name)
    with torch.device("meta"):
        theirs = PhiForCausalLM(AutoConfig.from_pretrained(directory)).state_dict()
    mine = phi2.build(directory).state_dict()
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert tensor.shape == theirs[key].shape, key


def test_phi_2_has_453_tensors_and_2_779_683_840_parameters():
    with torch.device("meta"):
        tensors = phi2.Phi2(phi2.Phi2Config()).state_dict()
    assert len(tensors) == 453
    assert sum(tensor.numel() for tensor in tensors.values()) == 2_779_683_840


@torch.no_grad()
def test_phi_1_differs_by_its_config_alone(tmp_path):
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        partial_rotary_factor=0.5,
        rope_theta=500.0,
        layer_norm_eps=1e-3,
    )
    theirs = PhiForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    mine = ours(tmp_path, torch.float32)
    ids = random_ids(mine)
    assert distance(logits(mine, ids), theirs(ids).logits) < TOLERANCE


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_residual_dropout_is_what_config_says_and_off_in_eval_mode(tiny, p):
    config = phi2.read_config(tiny)
    config.resid_pdrop = p
    torch.manual_seed(0)
    model = phi2.Phi2(config)
    ids = random_ids(model)
    model.train()
    assert torch.equal(logits(model, ids), logits(model, ids)) == (p == 0)
    model.eval()
    assert torch.equal(logits(model, ids), logits(model, ids))


@pytest.mark.skipif(not shutil.which("g++"), reason="on a CPU torch.compile needs g++")
def test_what_a_gpu_runs_as_one_kernel_is_what_is_written_here():
    """They compile as a whole, once for all numbers of tokens, and have the same bits."""
    torch.manual_seed(0)
    options = {"emulate_precision_casts": True}
    choices = {"dynamic": True, "fullgraph": True, "options": options}
    rotate_back = torch.compile(phi2.rotate_back.__wrapped__, **choices)
    add = torch.compile(phi2.add.__wrapped__, **choices)

    def check(tokens: int) -> None:
        x = torch.randn(tokens, 4, 10).bfloat16()
        cos, sin = torch.randn(2, tokens, 1, 3).bfloat16()
        assert torch.equal(rotate_back(x, cos, sin), phi2.rotate_back(x, cos, sin))
        branches = torch.randn(3, tokens, 16).bfloat16()
        assert torch.equal(add(*branches), phi2.add(*branches))

    check(7)
    with torch.compiler.set_stance("fail_on_recompile"):
        check(12)


# -----------------------------------------------------------------------------
# Loading, and broken model directories: one line that names the thing


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
        ("hidden_size", "192", "hidden_size = '192' is no whole number"),
        ("resid_pdrop", 1, "resid_pdrop = 1 is no number from 0 to"),
        ("rope_theta", 0, "rope_theta"),  # every logit would be NaN
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
        phi2.Phi2(phi2.Phi2Config(**sizes))(ids)


def test_a_model_that_cannot_be_rotated_is_refused_before_its_weights_are_loaded(copy):
    config = read_json(copy / "config.json") | {"partial_rotary_factor": 0.35}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="11 of a head's 32 dimensions cannot be rotated"):
        phi2.build(copy)


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
def test_a_layout_of_2023_is_refused_by_name(copy, key):
    tensors = load_file(copy / "model.safetensors")
    tensors[key] = torch.ones(2)
    save_file(tensors, copy / "model.safetensors")
    fails(copy, "is of a layout of 2023; download today's from the Hub")
