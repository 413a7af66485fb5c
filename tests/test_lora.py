"""lora.py beside PEFT: the same start, the same outputs, the same files; and what it refuses."""

import json
import shutil

import pytest
import torch
from conftest import (
    distance,
    load_adapter,
    logits,
    ours,
    pair,
    peft_model,
    peft_tensors,
    random_ids,
    read_json,
    reference,
)
from safetensors.torch import load_file, save_file

import lora
import quant
from support import fingerprint

EVERY_LAYER = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
PHI_2 = "microsoft/phi-2"

# Two orders of summation in fp32, through six layers. Measured: 1e-6 and below.
TOLERANCE = 1e-5


# -----------------------------------------------------------------------------
# The adapters


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), EVERY_LAYER], ids=["q and v", "all"])
def test_initialisation_is_bit_equal_to_pefts_from_the_same_seed(tiny, targets):
    mine = ours(tiny, torch.float32)
    theirs = reference(tiny, torch.float32)
    torch.manual_seed(7)
    lora.inject(mine, lora.LoRAConfig(targets=targets))
    torch.manual_seed(7)
    expected = peft_tensors(peft_model(theirs, targets, dropout=0.05))

    parameters = lora.lora_parameters(mine)
    assert parameters.keys() == expected.keys()
    assert len(parameters) == 2 * 6 * len(targets)
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expected[name]), name


def test_dropout_falls_on_the_adapters_input_alone(tiny):
    mine = ours(tiny, torch.float32)
    ids = random_ids(mine)
    with torch.no_grad():
        base = logits(mine, ids)
        lora.inject(mine, lora.LoRAConfig(dropout=0.5))
        mine.train()
        assert torch.equal(logits(mine, ids), base), "with B = 0 dropout changes nothing"
        for parameter in lora.lora_parameters(mine).values():
            parameter.normal_(std=0.1)
        assert not torch.equal(logits(mine, ids), logits(mine, ids))
        mine.eval()
        assert torch.equal(logits(mine, ids), logits(mine, ids))


def test_an_adapter_put_on_a_model_in_eval_mode_drops_nothing(tiny, saved):
    mine = ours(tiny, torch.float32).eval()
    assert load_adapter(mine, saved).dropout == 0.05
    ids = random_ids(mine)
    with torch.no_grad():
        first = logits(mine, ids)
        assert torch.equal(logits(mine, ids), first)
        assert torch.equal(logits(mine.eval(), ids), first)


def test_adapters_are_not_injected_twice(tiny):
    mine = ours(tiny, torch.float32)
    lora.inject(mine, lora.LoRAConfig())
    with pytest.raises(ValueError, match="already"):
        lora.inject(mine, lora.LoRAConfig())


# -----------------------------------------------------------------------------
# Merging


def test_merged_weights_give_the_adapters_outputs(tiny):
    mine, theirs = pair(tiny)
    ids = random_ids(mine)
    with torch.no_grad():
        expected = logits(mine, ids)
        lora.merge(mine)
        assert not lora.lora_parameters(mine)
        assert distance(logits(mine, ids), expected) < TOLERANCE
        assert distance(logits(mine, ids), theirs.merge_and_unload()(ids).logits) < TOLERANCE


def test_merging_into_four_bits_is_refused_and_dequantising_first_works(tiny):
    mine, _ = pair(tiny, torch.float32, "nf4")
    ids = random_ids(mine)
    with torch.no_grad():
        expected = logits(mine, ids)
        with pytest.raises(ValueError, match="cannot merge into NF4Linear; dequantise the layers"):
            lora.merge(mine)
        assert torch.equal(logits(mine, ids), expected), "a refusal changes nothing"
        quant.dequantize_linears(mine, torch.float32)
        lora.merge(mine)
        assert distance(logits(mine, ids), expected) < TOLERANCE


# -----------------------------------------------------------------------------
# PEFT's files


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_adapter_saved_here_loads_in_peft(tiny, tmp_path, quantization):
    from peft import PeftModel

    mine, _ = pair(tiny, torch.float32, quantization)
    lora.save_adapter(mine, lora.LoRAConfig(dropout=0.0), tmp_path, PHI_2)
    base = reference(tiny, torch.float32, quantization)
    theirs = PeftModel.from_pretrained(base, tmp_path).train()
    ids = random_ids(mine)
    with torch.no_grad():
        assert distance(logits(mine, ids), theirs(ids).logits) < TOLERANCE


def save_with_peft(tiny, directory, **options):
    """Returns transformers' model in PEFT's adapters, A and B random, and saves them."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **options)
    theirs = get_peft_model(reference(tiny, torch.float32), config)
    with torch.no_grad():
        for parameter in peft_tensors(theirs).values():
            parameter.normal_(std=0.1)
    theirs.save_pretrained(directory)
    return theirs


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "v_proj"], "all-linear", r".*\.(q_proj|fc1)"],
    ids=["list", "all-linear", "regex"],
)
def test_an_adapter_of_peft_loads_here(tiny, tmp_path, targets):
    theirs = save_with_peft(tiny, tmp_path, target_modules=targets)
    mine = ours(tiny, torch.float32)
    loaded = load_adapter(mine, tmp_path)
    assert loaded.rank == 4
    assert loaded.alpha == 12
    ids = random_ids(mine)
    with torch.no_grad():
        assert distance(logits(mine, ids), theirs(ids).logits) < TOLERANCE


UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|dense|fc1|fc2).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
    r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:q_proj|k_proj|v_proj|dense|fc1|fc2)))"
)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj", "Wqkv", "o_proj"]},  # names of other models
        {"target_modules": ["query_key_value", "dense", "dense_h_to_4h"]},
        {"target_modules": ["self_attn.q_proj", "layers.1.self_attn.v_proj"]},
        {"target_modules": UNSLOTH},
        {"target_modules": "ALL-LINEAR"},
        {"target_modules": ["q_proj"], "fan_in_fan_out": True},
        {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 8}},
        {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}},  # the rank of all
        {"target_modules": ["q_proj"], "init_lora_weights": None},
        {"target_modules": ["q_proj"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    ],
    ids=lambda options: str(options)[:60],
)
@pytest.mark.filterwarnings("ignore")  # PEFT says that it ignores fan_in_fan_out
def test_what_has_no_effect_in_peft_has_none_here(tiny, tmp_path, options):
    theirs = save_with_peft(tiny, tmp_path, **options)
    write_config(tmp_path, read_config(tmp_path) | options)  # as it was typed

    mine = ours(tiny, torch.float32)
    load_adapter(mine, tmp_path)
    ids = random_ids(mine)
    with torch.no_grad():
        assert distance(logits(mine, ids), theirs(ids).logits) < TOLERANCE


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank_pattern": {"v_proj": 2}}, "layers with different ranks are not supported"),
        ({"target_modules": ["q_proj", "lm_head"]}, "unknown .*lm_head"),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, "exclude_modules = .*not supported"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_has_an_effect_there_and_none_here_is_refused(tiny, tmp_path, options, message):
    save_with_peft(tiny, tmp_path, **{"target_modules": ["q_proj", "v_proj"]} | options)
    with pytest.raises(ValueError, match=message):
        load_adapter(ours(tiny, torch.float32), tmp_path)


def test_targets_of_which_none_is_in_the_model_are_refused(tiny, saved):
    write_config(saved, read_config(saved) | {"target_modules": ["Wqkv", "out_proj"]})
    with pytest.raises(ValueError, match="no linear layer .* matches \\['Wqkv', 'out_proj'\\]"):
        load_adapter(ours(tiny, torch.float32), saved)
    # One is enough to go on, but then a tensor has no place.
    write_config(saved, read_config(saved) | {"target_modules": ["q_proj", "Wqkv"]})
    with pytest.raises(ValueError, match="unknown tensors: 12, such as .*v_proj"):
        load_adapter(ours(tiny, torch.float32), saved)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_numbers_of_any_dtype_become_fp32(tiny, saved, dtype):
    file = saved / "adapter_model.safetensors"
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    mine = ours(tiny, torch.float32)
    load_adapter(mine, saved)
    for name, parameter in lora.lora_parameters(mine).items():
        assert torch.equal(parameter, tensors[lora.PREFIX + name].float())


def test_numbers_beyond_fp32_are_refused(tiny, saved):
    file = saved / "adapter_model.safetensors"
    tensors = {key: tensor.double() * 1e300 for key, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="holds numbers that are not finite"):
        load_adapter(ours(tiny, torch.float32), saved)


def test_an_adapter_that_is_not_finite_is_not_saved_over_a_good_one(tiny, saved):
    mine = ours(tiny, torch.float32)
    config = load_adapter(mine, saved)
    before = (saved / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        next(iter(lora.lora_parameters(mine).values()))[0, 0] = float("nan")
    with pytest.raises(ValueError, match="lora_A.* not finite, and is not saved"):
        lora.save_adapter(mine, config, saved, PHI_2)
    assert (saved / "adapter_model.safetensors").read_bytes() == before


def test_the_config_has_only_keys_that_peft_has_had_from_its_beginning(tiny, saved):
    """PEFT 0.6 to 0.8 refuse use_rslora and use_dora: these are the fields of 0.5's LoraConfig."""
    fields = {
        *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type"),
        *("inference_mode", "r", "target_modules", "lora_alpha", "lora_dropout"),
        *("fan_in_fan_out", "bias", "modules_to_save", "init_lora_weights"),
        *("layers_to_transform", "layers_pattern"),
    }
    assert read_config(saved).keys() <= fields


def test_the_files_hold_the_adapter_alone_under_pefts_keys(tiny, tmp_path):
    mine, theirs = pair(tiny)
    our_files = tmp_path / "ours"
    their_files = tmp_path / "theirs"
    lora.save_adapter(mine, lora.LoRAConfig(), our_files, PHI_2)
    theirs.save_pretrained(their_files)
    names = sorted(path.name for path in our_files.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]

    tensors = load_file(our_files / "adapter_model.safetensors")
    expected = load_file(their_files / "adapter_model.safetensors")
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, expected[key]), key

    config = read_config(our_files)
    expected = read_config(their_files)
    expected["target_modules"].sort()  # PEFT writes a set, in any order
    for key in config.keys() - {"base_model_name_or_path", "lora_dropout"}:
        assert config[key] == expected[key], key


def test_a_fingerprint_is_compared_where_adapter_and_user_have_one(tiny, saved):
    fingerprint.check(saved, {"prompt": "abc"})  # `saved` has none, as PEFT's files
    trained_with = {"prompt": "abc", "base_weights": "012"}
    fingerprint.stamp(saved, trained_with)

    load_adapter(ours(tiny, torch.float32), saved)
    fingerprint.check(saved, trained_with)
    fingerprint.check(saved, trained_with | {"of_a_later_version": "7"})
    another = trained_with | {"base_weights": "345"}
    with pytest.raises(ValueError, match=r"another base weights \(012, here 345\); --force"):
        fingerprint.check(saved, another)


# -----------------------------------------------------------------------------
# What would leave a user with another model than the trained one is an error that names it
# What each version of PEFT has added to adapter_config.json, at its default.
ADDED_BY_PEFT = {
    "0.3": {"bias": "none", "fan_in_fan_out": False, "init_lora_weights": True}
    | {"inference_mode": True, "modules_to_save": None},
    "0.4": {"layers_pattern": None, "layers_to_transform": None, "revision": None},
    "0.5": {"auto_mapping": None},
    "0.6": {"alpha_pattern": {}, "rank_pattern": {}},
    "0.7": {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"},
    "0.8": {"use_rslora": False},
    "0.9": {"use_dora": False},
    "0.10": {"layer_replication": None},
    "0.14": {"eva_config": None, "exclude_modules": None, "lora_bias": False},
    "0.15": {"corda_config": None, "trainable_token_indices": None},
    "0.17": {"qalora_group_size": 16, "target_parameters": None, "use_qalora": False},
    "0.18": {"alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False}
    | {"peft_version": "0.18.0"},
}
# The targets of adapters of phi on the Hub, where many name layers that phi has not.
TARGETS_ON_THE_HUB = [
    ["q_proj", "v_proj"],
    ["q_proj", "k_proj", "v_proj", "o_proj"],
    ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
    ["fc1", "fc2", "Wqkv", "out_proj"],
    ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
]


@pytest.mark.parametrize("version", ADDED_BY_PEFT)
def test_an_adapter_of_every_version_of_peft_loads_here(tiny, tmp_path, version):
    number = list(ADDED_BY_PEFT).index(version)
    targets = TARGETS_ON_THE_HUB[number % len(TARGETS_ON_THE_HUB)]
    theirs = save_with_peft(tiny, tmp_path, target_modules=targets)
    raw = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 12}
    raw |= {"lora_dropout": 0.05, "target_modules": targets, "base_model_name_or_path": PHI_2}
    for added in list(ADDED_BY_PEFT.values())[: number + 1]:
        raw |= added
    write_config(tmp_path, raw)

    mine = ours(tiny, torch.float32)
    load_adapter(mine, tmp_path)
    ids = random_ids(mine)
    theirs.eval()
    with torch.no_grad():
        assert distance(logits(mine, ids), theirs(ids).logits) < TOLERANCE


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """An adapter with random A and B."""
    directory = tmp_path_factory.mktemp("trained")
    mine = ours(tiny, torch.float32)
    lora.inject(mine, lora.LoRAConfig())
    for parameter in lora.lora_parameters(mine).values():
        torch.nn.init.normal_(parameter)
    lora.save_adapter(mine, lora.LoRAConfig(), directory, PHI_2)
    return directory


@pytest.fixture
def saved(trained, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(trained, tmp_path / "adapter")


def read_config(directory) -> dict:
    return read_json(directory / "adapter_config.json")


def write_config(directory, raw: dict) -> None:
    (directory / "adapter_config.json").write_text(json.dumps(raw))


def without_pefts_prefix(tensors):
    return {key.removeprefix(lora.PREFIX): tensor for key, tensor in tensors.items()}


def without_the_first(tensors):
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    return {key: tensor for key, tensor in tensors.items() if key != first}


def with_a_head(tensors):
    return tensors | {"base_model.model.lm_head.weight": torch.ones(2)}


def of_half_the_rank(tensors):
    return {key: tensor[:4] if "lora_A" in key else tensor for key, tensor in tensors.items()}


def with_narrow_b(tensors):
    return {key: tensor[:64] if "lora_B" in key else tensor for key, tensor in tensors.items()}


def with_every_b_zero(tensors):
    return {key: tensor * ("lora_A" in key) for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    "change, message",
    [
        (without_pefts_prefix, "lacks tensors: 24"),
        (without_the_first, r"lacks tensors: 1, among them .*layers.0.self_attn.q_proj.lora_A"),
        (with_a_head, "unknown tensors: 1, such as base_model.model.lm_head.weight"),
        (of_half_the_rank, r"has shape \(4, 192\), adapter_config.json says rank 8"),
        (with_narrow_b, r"lora_B.weight has shape \(64, 8\), this model needs \(192, 8\)"),
        (with_every_b_zero, "every B is zero"),
    ],
)
def test_adapters_that_would_silently_do_nothing_are_errors(tiny, saved, change, message):
    file = saved / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(ValueError, match=message) as raised:
        load_adapter(ours(tiny, torch.float32), saved)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("alpha_pattern", {"q_proj": 4}),
        ("layers_to_transform", [0]),
        ("use_qalora", True),
        ("init_lora_weights", "pissa"),
        ("a_key_of_the_future", 3),
        ("qalora_group_size", 8),
        ("peft_type", "IA3"),
        ("task_type", "SEQ_CLS"),
    ],
)
def test_active_options_that_are_not_implemented_are_refused_by_name(tiny, saved, key, value):
    write_config(saved, read_config(saved) | {key: value})
    with pytest.raises(ValueError, match=key):
        load_adapter(ours(tiny, torch.float32), saved)


def test_options_that_are_off_or_at_pefts_default_are_accepted(tiny, saved):
    """Every key of the installed PEFT at its default, and what other versions have."""
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    lora_keys = read_config(saved)
    inactive = {
        "lora_bias": False,
        "a_key_of_the_future": None,
        "layer_replication": None,
        "runtime_config": {},
        "fan_in_fan_out": True,
        "rank_pattern": {"k_proj": 4},
    }
    defaults["runtime_config"] = {"ephemeral_gpu_offload": False}  # a dataclass until it is saved
    write_config(saved, defaults | lora_keys | inactive)
    load_adapter(ours(tiny, torch.float32), saved)


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules"])
def test_a_config_that_leaves_out_what_peft_would_guess_is_refused(tiny, saved, key):
    raw = read_config(saved)
    del raw[key]
    write_config(saved, raw)
    with pytest.raises(ValueError, match=f"lacks {key}"):
        load_adapter(ours(tiny, torch.float32), saved)


def test_a_folder_without_an_adapter_is_one_line(tiny, saved):
    (saved / "adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged or cut short"):
        load_adapter(ours(tiny, torch.float32), saved)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no adapter_model.safetensors; PEFT writes one"):
        load_adapter(ours(tiny, torch.float32), saved)
    (saved / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="is not an adapter: it has no adapter_config.json"):
        load_adapter(ours(tiny, torch.float32), saved)


def test_a_target_that_matches_nothing_lists_the_names(tiny):
    message = (
        r"no linear layer that takes an adapter matches \['query_proj'\]; "
        "there are dense, fc1, fc2, k_proj, q_proj, v_proj"
    )
    with pytest.raises(ValueError, match=message):
        lora.inject(ours(tiny, torch.float32), lora.LoRAConfig(targets=("v_proj", "query_proj")))
    # A name matches at a dot, as in PEFT, and not as a part of another name.
    with pytest.raises(ValueError, match="no linear layer .* matches"):
        lora.inject(ours(tiny, torch.float32), lora.LoRAConfig(targets=("proj",)))
    # A text alone is an expression for a whole path.
    with pytest.raises(ValueError, match=r"has a whole path that matches \['layers.0'\]"):
        lora.inject(ours(tiny, torch.float32), lora.LoRAConfig(targets="layers.0"))


@pytest.mark.parametrize("pattern", ["(", "*", "q{99999999999}", "(?P<a>q)(?P<a>v)"])
def test_a_broken_regular_expression_is_one_line(tiny, pattern):
    with pytest.raises(ValueError, match="is not a regular expression: ") as raised:
        lora.inject(ours(tiny, torch.float32), lora.LoRAConfig(targets=pattern))
    assert repr(pattern) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, not 0"),
        ({"rank": True}, "rank must be a whole number of at least 1, not True"),
        ({"dropout": 1.0}, "dropout must be a number of at least 0 and below 1, not 1.0"),
        ({"alpha": 0}, "alpha must be a number above 0, not 0"),
        ({"alpha": "16"}, "alpha must be a number above 0, not '16'"),
        ({"targets": (1,)}, "targets must be names"),
    ],
)
def test_impossible_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lora.LoRAConfig(**options)
