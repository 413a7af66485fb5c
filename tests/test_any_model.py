"""lora.py by itself, on models that are no phi: beside the formula, and beside PEFT."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from collections import OrderedDict

import pytest
import torch
from conftest import ROOT, distance, load_adapter, read_json
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.profiler import profile

import lora
import quant
from support import fingerprint

CONFIG = lora.LoRAConfig(rank=3, alpha=5, dropout=0.0, targets=("linear1", "linear2"))

# Two orders of summation in fp32, through two layers. Measured: 3e-7 and below.
TOLERANCE = 2e-6


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers=2)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    first = nn.Linear(16, 32)
    second = nn.Linear(32, 4)
    return nn.Sequential(OrderedDict(linear1=first, gelu=nn.GELU(), linear2=second))


def adapted(model: nn.Module, config: lora.LoRAConfig = CONFIG) -> nn.Module:
    """Returns the model with an adapter whose A and B are random."""
    lora.inject(model, config)
    draw([*lora.lora_parameters(model).values()])
    return model


@torch.no_grad()
def draw(parameters: list[Tensor]) -> None:
    torch.manual_seed(1)
    for parameter in parameters:
        parameter.normal_(std=0.3)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def every_layer_is_called():
    """Also in eval mode, where torch's transformer reads weights, and PEFT's adapters are lost."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


# -----------------------------------------------------------------------------
# The layer


@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (2, 3, 5), (0,)], ids=str)
def test_the_layer_is_the_formula_for_inputs_of_any_leading_shape(shape):
    layer = nn.Linear(8, 6)
    wrapped = lora.LoRALinear(layer, rank=3, alpha=5, dropout=0.0)
    draw([wrapped.lora_A.weight, wrapped.lora_B.weight])
    x = inputs(*shape, 8)
    y = wrapped(x)
    assert y.shape == (*shape, 6)

    # Vector by vector, in fp64.
    w = layer.weight.double()
    a = wrapped.lora_A.weight.double()
    b = wrapped.lora_B.weight.double()
    for vector, output in zip(x.reshape(-1, 8).double(), y.reshape(-1, 6)):
        expected = w @ vector + layer.bias.double() + 5 / 3 * (b @ (a @ vector))
        assert torch.allclose(output.double(), expected, atol=1e-6)


def test_the_gradients_are_those_of_the_formula():
    """By finite differences, in fp64, and W has none."""
    wrapped = lora.LoRALinear(nn.Linear(4, 5).double(), rank=2, alpha=3, dropout=0.0)
    wrapped.base_layer.requires_grad_(False)
    a = wrapped.lora_A.weight
    b = wrapped.lora_B.weight
    draw([a, b])

    def run(x, a, b):
        values = {"lora_A.weight": a, "lora_B.weight": b}
        return torch.func.functional_call(wrapped, values, x)

    x = inputs(2, 3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(run, (x, a, b))


@pytest.mark.parametrize("base", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_and_b_have_pefts_dtype_and_first_values(base):
    from peft import LoraConfig, get_peft_model

    mine = mlp().to(base)
    theirs = mlp().to(base)
    torch.manual_seed(7)
    lora.inject(mine, CONFIG)
    torch.manual_seed(7)
    options = LoraConfig(r=3, lora_alpha=5, target_modules=["linear1", "linear2"])
    expected = peft_tensors(get_peft_model(theirs, options))
    for name, parameter in lora.lora_parameters(mine).items():
        assert parameter.dtype == expected[name].dtype, name
        # PEFT rounds what it has drawn to the dtype of the base.
        assert torch.equal(parameter.to(base), expected[name].to(base)), name


# -----------------------------------------------------------------------------
# Beside PEFT


def peft_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix(lora.PEFT_PREFIX).replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def save_with_peft(model: nn.Module, directory, targets) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    draw([*peft_tensors(theirs).values()])
    theirs.save_pretrained(directory)
    return theirs


@pytest.mark.parametrize("build", [encoder, mlp])
@pytest.mark.parametrize("targets", [("linear1", "linear2"), "all-linear"], ids=str)
@pytest.mark.usefixtures("every_layer_is_called")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # see out_proj below
def test_an_adapter_that_was_trained_on_any_model_gives_its_outputs_in_peft(
    tmp_path, build, targets
):
    from peft import PeftModel

    config = lora.LoRAConfig(rank=3, alpha=5, dropout=0.0, targets=targets)
    mine = build()
    x = inputs(3, 5, 16)
    base = mine.eval()(x)
    lora.inject(mine, config)
    mine.train()
    optimizer = torch.optim.AdamW(lora.lora_parameters(mine).values(), lr=0.1)
    for _ in range(3):
        mine(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    lora.save_adapter(mine, config, tmp_path, "a/base", task_type=None)

    theirs = PeftModel.from_pretrained(build(), tmp_path)
    with torch.no_grad():
        expected = theirs.eval()(x)
        assert distance(base, expected) > 0.01
        assert distance(mine.eval()(x), expected) < TOLERANCE
        assert distance(mine.train()(x), expected) < TOLERANCE


@pytest.mark.parametrize("build", [encoder, mlp])
@pytest.mark.usefixtures("every_layer_is_called")
@torch.no_grad()
def test_an_adapter_of_peft_on_any_model_loads_here(tmp_path, build):
    theirs = save_with_peft(build(), tmp_path, ["linear1", "linear2"])
    mine = build()
    load_adapter(mine, tmp_path)
    x = inputs(3, 5, 16)
    assert distance(mine(x), build()(x)) > 0.01
    assert distance(mine(x), theirs(x)) < TOLERANCE
    assert distance(mine.eval()(x), theirs.eval()(x)) < TOLERANCE
    lora.merge(mine)
    assert distance(mine(x), theirs(x)) < TOLERANCE


@torch.no_grad()
def test_over_fp64_an_adapter_is_as_exact_as_in_peft(tmp_path):
    theirs = save_with_peft(mlp().double(), tmp_path, ["linear1", "linear2"])
    mine = mlp().double()
    load_adapter(mine, tmp_path)
    x = inputs(4, 16).double()
    assert distance(mine(x), theirs(x)) < 1e-15
    lora.merge(mine)
    assert distance(mine(x), theirs.merge_and_unload()(x)) < 1e-15


@torch.no_grad()
def test_bitsandbytes_own_layer_takes_an_adapter_as_in_peft(tmp_path):
    import bitsandbytes

    def build() -> nn.Module:
        model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32))
        torch.manual_seed(3)
        weight = {"0.weight": torch.randn(64, 64), "0.bias": torch.randn(64)}
        model.load_state_dict(weight)
        return model.to("cpu")  # quantises

    theirs = save_with_peft(build(), tmp_path, ["0"])
    mine = build()
    load_adapter(mine, tmp_path)
    x = inputs(2, 3, 64)
    assert distance(mine(x), theirs(x)) < TOLERANCE
    with pytest.raises(ValueError, match="0: cannot merge into Linear4bit"):
        lora.merge(mine)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM", "FEATURE_EXTRACTION"])
def test_the_task_type_is_the_callers(tmp_path, task_type):
    lora.save_adapter(adapted(mlp()), CONFIG, tmp_path, "a/base", task_type=task_type)
    assert read_json(tmp_path / "adapter_config.json")["task_type"] == task_type
    assert load_adapter(mlp(), tmp_path).rank == 3


def test_a_model_without_an_adapter_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="the model has no adapters to save"):
        lora.save_adapter(mlp(), CONFIG, tmp_path / "new", "a/base")


# -----------------------------------------------------------------------------
# torch's own transformer, which reads the weights of its layers in eval mode


@pytest.mark.parametrize("is_padded", [False, True])
@torch.no_grad()
def test_an_adapter_acts_where_torch_reads_weights_instead_of_calling_layers(is_padded):
    model = encoder()
    x = inputs(3, 5, 16)
    padding = None
    if is_padded:
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    base = model(x, src_key_padding_mask=padding)
    adapted(model)
    model.train()  # without dropout: each layer is called
    expected = model(x, src_key_padding_mask=padding)
    model.eval()
    with profile() as events:
        actual = model(x, src_key_padding_mask=padding)
    operators = {event.key for event in events.key_averages()}
    assert "aten::_transformer_encoder_layer_fwd" in operators
    if is_padded:
        tokens = ~padding
        base = base[tokens]
        expected = expected[tokens]
        actual = actual[tokens]
    assert distance(base, expected) > 0.01
    assert distance(actual, expected) < TOLERANCE


@torch.no_grad()
def test_an_adapter_over_nf4_acts_there_too():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 2, dim_feedforward=64, dropout=0.0, batch_first=True)
    quant.quantize_linears(layer)
    adapted(layer)
    x = inputs(2, 3, 64)
    expected = layer.train()(x)
    assert distance(layer.eval()(x), expected) < TOLERANCE


def test_the_weight_of_a_layer_is_what_merging_gives():
    model = adapted(mlp())
    weights = [model.linear1.weight.detach(), model.linear2.weight.detach()]
    assert model.linear1.bias is model.linear1.base_layer.bias
    lora.merge(model)
    assert torch.equal(model.linear1.weight, weights[0])
    assert torch.equal(model.linear2.weight, weights[1])


@pytest.mark.parametrize(
    "targets", [("linear1", "out_proj"), ("self_attn.out_proj",), r".*\.out_proj"], ids=str
)
def test_an_adapter_that_peft_would_never_run_is_refused(targets):
    """nn.MultiheadAttention reads out_proj.weight. PEFT's outputs there are the base's."""
    model = encoder()
    message = r"no linear layer that takes an adapter .*matches .*out_proj'\]; there are linear1"
    with pytest.raises(ValueError, match=message):
        lora.inject(model, lora.LoRAConfig(targets=targets))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_all_linear_is_every_layer_that_takes_an_adapter():
    paths = [f"layers.{number}.{name}" for number in (0, 1) for name in ("linear1", "linear2")]
    assert lora.inject(encoder(), lora.LoRAConfig(targets="all-linear")) == paths


@pytest.mark.parametrize("targets", [("all-linear",), ["q_proj", "all-linear"]], ids=str)
def test_all_linear_is_no_name_among_others(targets):
    with pytest.raises(ValueError, match=r"matches \[.*'all-linear'\]"):
        lora.inject(mlp(), lora.LoRAConfig(targets=targets))


def test_a_file_of_peft_with_an_adapter_that_never_ran_is_refused(tmp_path):
    save_with_peft(encoder(), tmp_path, "all-linear")
    with pytest.raises(ValueError, match="unknown tensors: 4, such as .*self_attn.out_proj"):
        load_adapter(encoder(), tmp_path)


# -----------------------------------------------------------------------------
# What takes an adapter


def without_linear_layers() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(16, 16), nn.Bilinear(16, 16, 16), nn.LayerNorm(16), nn.Conv1d(4, 4, 1)
    )


class Block(nn.Module):
    """Two layers that say their sizes together, as many a model's own blocks do."""

    def __init__(self):
        super().__init__()
        self.in_features = 16
        self.out_features = 4
        self.layers = mlp()


def test_a_block_with_sizes_of_its_own_is_no_layer():
    paths = ["block.layers.linear1", "block.layers.linear2"]
    model = nn.ModuleDict({"block": Block()})
    assert lora.inject(model, lora.LoRAConfig(targets="all-linear")) == paths
    with pytest.raises(ValueError, match=r"matches \['block'\]; there are linear1, linear2"):
        lora.match_targets(nn.ModuleDict({"block": Block()}), ("block",))


@pytest.mark.parametrize("targets", ["all-linear", ("0",), ".*"], ids=str)
@pytest.mark.parametrize("build", [without_linear_layers, lambda: nn.Linear(16, 16)])
def test_a_model_without_a_linear_layer_is_refused_and_stays_as_it_is(build, targets):
    model = build()
    with pytest.raises(ValueError, match="no linear layer that takes .*; there are none"):
        lora.inject(model, lora.LoRAConfig(targets=targets))
    assert all(parameter.requires_grad for parameter in model.parameters())


# -----------------------------------------------------------------------------
# Modes


def is_deterministic(model: nn.Module) -> bool:
    x = inputs(64, 16)
    with torch.no_grad():
        return torch.equal(model(x), model(x))


@pytest.mark.parametrize("way", ["inject", "load_adapter"])
@pytest.mark.parametrize("is_training", [False, True], ids=["eval", "train"])
def test_an_adapter_drops_inputs_in_train_mode_alone(tmp_path, way, is_training):
    config = lora.LoRAConfig(dropout=0.5, targets=("linear1",))
    model = mlp().train(is_training)
    if way == "inject":
        adapted(model, config)
    else:
        lora.save_adapter(adapted(mlp(), config), config, tmp_path, "a/base")
        load_adapter(model, tmp_path)
    assert all(module.training == is_training for module in model.modules())
    assert is_deterministic(model) != is_training
    model.train()
    assert not is_deterministic(model)
    model.eval()
    assert is_deterministic(model)


def test_biases_are_frozen_and_stay_as_they_are():
    model = adapted(mlp())
    biases = [model.linear1.bias.clone(), model.linear2.bias.clone()]
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == lora.lora_parameters(model).keys()
    lora.merge(model)
    assert torch.equal(model.linear1.bias, biases[0])
    assert torch.equal(model.linear2.bias, biases[1])


# -----------------------------------------------------------------------------
# Merging


@torch.no_grad()
def test_a_model_in_train_mode_is_merged_without_dropout():
    config = lora.LoRAConfig(rank=3, alpha=5, dropout=0.5, targets=("linear1", "linear2"))
    model = adapted(mlp().train(), config)
    x = inputs(4, 16)
    expected = model.eval()(x)
    model.train()
    lora.merge(model)
    assert model.linear1.training
    assert distance(model(x), expected) < TOLERANCE


def test_a_merge_into_fp64_does_not_round_to_fp32():
    model = adapted(mlp().double())
    layer = model.linear1
    expected = layer.base_layer.weight + 5 / 3 * layer.lora_B.weight @ layer.lora_A.weight
    assert not torch.equal(expected, expected.float().double())
    lora.merge(model)
    assert torch.allclose(model.linear1.weight, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "base, size",
    [
        (torch.float32, 1e20),
        (torch.bfloat16, 1e20),
        (torch.float16, 200.0),  # 5 * 200 * 200 is beyond 65,504
        (torch.float32, float("nan")),
    ],
    ids=str,
)
def test_a_sum_that_is_not_finite_is_refused_before_any_layer_is_changed(base, size):
    model = adapted(mlp().to(base))
    for matrix in (model.linear2.lora_A, model.linear2.lora_B):
        nn.init.constant_(matrix.weight, size)
    before = copy.deepcopy(model.state_dict())
    message = f"linear2: cannot merge, W \\+ scale B A is not finite in {base}"
    with pytest.raises(ValueError, match=message):
        lora.merge(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) or tensor.isnan().any(), name


class Shared(nn.Module):
    """Runs one layer twice, under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.second.weight = self.first.weight


@torch.no_grad()
def test_a_layer_with_two_names_is_adapted_under_the_first_as_in_peft(tmp_path):
    torch.manual_seed(0)
    model = Shared()
    theirs = save_with_peft(copy.deepcopy(model), tmp_path, ["first", "second"])
    load_adapter(model, tmp_path)
    x = inputs(4, 16)
    assert distance(model(x), theirs(x)) < TOLERANCE


@pytest.mark.parametrize("build, targets", [(Shared, ("first",)), (Tied, ("first", "second"))])
def test_a_weight_that_another_layer_has_too_is_not_merged(build, targets):
    model = adapted(build(), lora.LoRAConfig(targets=targets))
    with pytest.raises(ValueError, match="first: cannot merge, second.*weight is the same weight"):
        lora.merge(model)


@pytest.mark.parametrize(
    "compute",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "prune"],
)
@torch.no_grad()
def test_a_weight_that_is_computed_is_adapted_and_not_merged(compute):
    """What is added to it would be gone with the next forward pass."""
    model = mlp().eval()
    compute(model.linear1)
    x = inputs(4, 16)
    before = model.linear1(x)
    adapted(model)
    layer = model.linear1
    update = 5 / 3 * layer.lora_B.weight @ layer.lora_A.weight
    assert distance(layer(x), before + x @ update.T) < TOLERANCE
    with pytest.raises(ValueError, match="linear1: cannot merge into .*remove weight_norm"):
        lora.merge(model)


@torch.no_grad()
def test_a_block_with_two_names_is_merged():
    block = mlp()
    model = nn.ModuleDict({"one": block, "two": block})
    adapted(model)
    x = inputs(4, 16)
    expected = model["two"](x)
    lora.merge(model)
    assert distance(model["two"](x), expected) < TOLERANCE


# -----------------------------------------------------------------------------
# Files


@pytest.mark.parametrize(
    "change, message",
    [
        ({"alpha": 16}, "linear1 has rank 3 and alpha 5, not rank 3 and alpha 16"),
        ({"rank": 6, "alpha": 10}, "linear1 has rank 3 and alpha 5, not rank 6 and alpha 10"),
    ],
    ids=["alpha", "rank"],
)
def test_an_adapter_is_not_saved_with_another_rank_or_alpha(tmp_path, change, message):
    """PEFT would scale B A by that alpha, in silence."""
    other = dataclasses.replace(CONFIG, **change)
    with pytest.raises(ValueError, match=message):
        lora.save_adapter(adapted(mlp()), other, tmp_path / "new", "a/base")
    assert not (tmp_path / "new").exists()


SAVE = """
import sys
from pathlib import Path
import torch
import lora
from support import fingerprint

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
config = lora.LoRAConfig(rank=2, targets=("1", "0"))
lora.inject(model, config)
lora.save_adapter(model, config, sys.argv[1], "a/base")
record = {letter: "\\u00e9 \\n \\x7f" + letter for letter in "qwertzuiop"}
fingerprint.stamp(Path(sys.argv[1]), record)
"""


def test_the_same_adapter_gives_the_same_bytes_in_every_process(tmp_path):
    processes = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", SAVE, str(tmp_path / seed)]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    for process in processes:
        assert process.wait(timeout=120) == 0
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_a_stamped_file_holds_what_was_written_and_the_adapter(tmp_path):
    record = {"b": 'é "quoted" \\ \n \x7f \x01 😀', "a": "", "format_": "x", "": "empty"}
    model = adapted(mlp())
    lora.save_adapter(model, CONFIG, tmp_path, "a/base")
    for part in ({"b": "replaced"}, record):
        fingerprint.stamp(tmp_path, part)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == record | {"format": "pt"}
        for name, parameter in lora.lora_parameters(model).items():
            assert torch.equal(file.get_tensor(lora.PEFT_PREFIX + name), parameter)


def test_alone_lora_reads_the_files_it_has_written(tmp_path):
    model = adapted(mlp())
    lora.save_adapter(model, CONFIG, tmp_path, "a/base", task_type=None)
    restored = mlp()
    assert lora.load_adapter(restored, tmp_path) == CONFIG
    assert torch.equal(restored(inputs(4, 16)), model(inputs(4, 16)))


@pytest.mark.parametrize("key, value", [("use_dora", True), ("lora_dropout", None), ("r", 2.0)])
def test_alone_lora_refuses_what_it_would_not_have_written(tmp_path, key, value):
    lora.save_adapter(adapted(mlp()), CONFIG, tmp_path, "a/base")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(read_json(path) | {key: value}))
    message = {"use_dora": "use_dora", "lora_dropout": "dropout", "r": "rank"}[key]
    with pytest.raises(ValueError, match=message):
        lora.load_adapter(mlp(), tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_that_was_loaded_is_not_mapped(tmp_path):
    """On Windows nobody could write it anew."""

    def is_mapped() -> bool:
        with open("/proc/self/maps") as maps:
            return str(tmp_path) in maps.read()

    lora.save_adapter(adapted(mlp()), CONFIG, tmp_path, "a/base")
    model = mlp()
    lora.load_adapter(model, tmp_path)
    assert not is_mapped()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert is_mapped(), f"{len(tensors)} tensors that were read keep it mapped"


def test_the_example_of_the_docstring_runs(tmp_path, monkeypatch):
    start = lora.__doc__.index("    config = ")
    example = textwrap.dedent(lora.__doc__[start:])
    monkeypatch.chdir(tmp_path)
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 8)})
    another = copy.deepcopy(model)
    names = {"lora": lora, "torch": torch, "model": model, "another_model": another}
    # As after a training: a B that is zero is not loaded.
    example = example.replace("...\n", "draw([*lora.lora_parameters(model).values()])\n")
    exec(example, names | {"draw": draw})
    x = inputs(8)
    assert not torch.equal(model["q_proj"](x), model["q_proj"].base_layer(x))
    assert torch.equal(another.eval()["q_proj"](x), model.eval()["q_proj"](x))


def test_all_linear_leaves_out_the_head_whatever_it_is_called_as_in_peft(tmp_path):
    """In BERT it is cls.predictions.decoder. PEFT would ignore an adapter on it."""
    from peft import PeftModel
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 64}
    config = BertConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return BertForMaskedLM(config).eval()

    config_here = lora.LoRAConfig(rank=3, alpha=5, dropout=0.0, targets="all-linear")
    mine = adapted(build(), config_here)
    lora.save_adapter(mine, config_here, tmp_path, "a/base", task_type=None)
    theirs = PeftModel.from_pretrained(build(), tmp_path)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert distance(build()(ids).logits, expected) > 0.01
        assert distance(mine(ids).logits, expected) < TOLERANCE
