"""lora.py beside PEFT: the same start, the same outputs, gradients and steps, the same files; and what it refuses."""
import json

import pytest
import torch
from conftest import distance, ours, pair, peft_model, peft_tensors, random_ids, read_json, reference
from safetensors.torch import load_file, save_file

import checkpoint
import data
import lora
import quant
import train


def answer_loss(logits, ids):
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")])
def test_initialisation_is_bit_equal_to_pefts_from_the_same_seed(tiny, targets):
    mine, theirs = ours(tiny, torch.float32), reference(tiny, torch.float32)
    torch.manual_seed(7)
    lora.inject(mine, lora.LoRAConfig(targets=targets))
    torch.manual_seed(7)
    expected = peft_tensors(peft_model(theirs, targets, dropout=0.05))
    found = lora.lora_parameters(mine)
    assert found.keys() == expected.keys() and len(found) == 2 * 6 * len(targets)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert {parameter.dtype for parameter in found.values()} == {torch.float32}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("loss", ["answer", "full"])
def test_the_shared_prefix_gives_the_gradients_of_whole_prompts(tiny, loss, checkpointing):
    mine, _ = pair(tiny, torch.float32, "nf4")
    mine.train().model.checkpointing = checkpointing
    tokenizer = data.load_tokenizer(tiny)
    encoded = [data.encode(example, tokenizer) for example in data.load_examples("tiny/data", "train", 8)]
    assert len({len(prompt) for prompt, _ in encoded}) > 4, "a ragged batch"
    prefix, gradients, losses = data.fixed_ids(tokenizer)[0], [], []
    for skip in (0, len(prefix)):
        total, _ = train.batch_loss(mine, encoded, skip, loss)
        gradients.append(torch.autograd.grad(total, list(lora.lora_parameters(mine).values())))
        losses.append(total.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for found, expected in zip(*reversed(gradients)):
        assert expected.norm() > 0 and distance(found, expected) < 1e-5


def test_checkpointing_recomputes_the_same_gradients_and_keeps_less(tiny):
    mine, _ = pair(tiny, torch.float32, "nf4")
    ids, gradients, kept = random_ids(mine), [], []
    for mine.model.checkpointing in (False, True):
        size = 0

        def pack(tensor):
            nonlocal size
            size += tensor.nbytes
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = answer_loss(mine(ids), ids)
        kept.append(size)
        gradients.append(torch.autograd.grad(loss, list(lora.lora_parameters(mine).values())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and kept[1] < 0.4 * kept[0]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_adapter_saved_here_loads_in_peft(tiny, tmp_path, quantization):
    from peft import PeftModel
    mine, _ = pair(tiny, torch.float32, quantization)
    lora.save_adapter(mine, lora.LoRAConfig(dropout=0.0), tmp_path, "microsoft/phi-2")
    theirs = PeftModel.from_pretrained(reference(tiny, torch.float32, quantization), tmp_path).train()
    ids = random_ids(mine)
    with torch.no_grad():
        assert distance(mine(ids), theirs(ids).logits) < 1e-5


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", r".*\.(q_proj|fc1)"], ids=["list", "all-linear", "regex"])
def test_an_adapter_of_peft_loads_here(tiny, tmp_path, targets):
    from peft import LoraConfig, get_peft_model
    theirs = get_peft_model(reference(tiny, torch.float32), LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in peft_tensors(theirs).values():
            parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    mine = ours(tiny, torch.float32)
    config = lora.load_adapter(mine, tmp_path)
    assert (config.rank, config.alpha) == (4, 12)
    ids = random_ids(mine)
    with torch.no_grad():
        assert distance(mine.eval()(ids), theirs(ids).logits) < 1e-5


def test_the_files_hold_the_adapter_alone_under_pefts_keys(tiny, tmp_path):
    mine, theirs = pair(tiny)
    lora.save_adapter(mine, lora.LoRAConfig(), tmp_path / "a", "microsoft/phi-2")
    theirs.save_pretrained(tmp_path / "b")
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    config, theirs = (read_json(tmp_path / name / "adapter_config.json") for name in "ab")
    ignored = {"base_model_name_or_path", "lora_dropout"}
    assert {key: config[key] for key in config.keys() - ignored} == {
        key: sorted(theirs[key]) if key == "target_modules" else theirs[key] for key in config.keys() - ignored}
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_merged_weights_give_the_adapters_outputs(tiny):
    mine, theirs = pair(tiny)
    ids = random_ids(mine)
    with torch.no_grad():
        expected = mine(ids)
        lora.merge(mine)
        assert not lora.lora_parameters(mine)
        assert distance(mine(ids), expected) < 1e-5
        assert distance(mine(ids), theirs.merge_and_unload()(ids).logits) < 1e-5


def test_merging_into_four_bits_is_refused_and_dequantising_first_works(tiny):
    mine, _ = pair(tiny, torch.float32, "nf4")
    ids = random_ids(mine)
    with torch.no_grad():
        expected = mine(ids)
        with pytest.raises(ValueError, match="dequantize_linears"):
            lora.merge(mine)
        quant.dequantize_linears(mine, torch.float32)
        lora.merge(mine)
        assert distance(mine(ids), expected) < 1e-5


def test_dropout_falls_on_the_adapters_input_alone(tiny):
    mine = ours(tiny, torch.float32)
    ids = random_ids(mine)
    with torch.no_grad():
        base = mine(ids)
        lora.inject(mine, lora.LoRAConfig(dropout=0.5))
        mine.train()
        assert torch.equal(mine(ids), base), "with B = 0 dropout changes nothing"
        for parameter in lora.lora_parameters(mine).values():
            parameter.normal_(std=0.1)
        assert not torch.equal(mine(ids), mine(ids))
        assert torch.equal(mine.eval()(ids), mine(ids))


def test_an_adapter_put_on_a_model_in_eval_mode_drops_nothing(tiny, saved):
    mine = ours(tiny, torch.float32).eval()
    assert lora.load_adapter(mine, saved).dropout == 0.05
    ids = random_ids(mine)
    with torch.no_grad():
        assert torch.equal(mine(ids), mine(ids)) and torch.equal(mine(ids), mine.eval()(ids))


# ---- What would leave a user with another model than the trained one is an error that names it

@pytest.fixture
def saved(tiny, tmp_path):
    mine, _ = pair(tiny)
    lora.save_adapter(mine, lora.LoRAConfig(), tmp_path, "microsoft/phi-2")
    return tmp_path


def change_tensors(path, change):
    tensors = load_file(path / "adapter_model.safetensors")
    save_file(change(tensors), path / "adapter_model.safetensors")


@pytest.mark.parametrize("change, message", [
    (lambda t: {key.replace("base_model.model.", ""): value for key, value in t.items()}, "lacks 24 tensors"),
    (lambda t: dict(list(t.items())[1:]), "lacks 1 tensors, among them base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
    (lambda t: t | {"base_model.model.lm_head.weight": torch.ones(2)}, "unknown 1 tensors, among them base_model.model.lm_head.weight"),
    (lambda t: {key: value[:4] if "lora_A" in key else value for key, value in t.items()}, r"has shape \(4, 192\), adapter_config.json says rank 8"),
    (lambda t: {key: value * ("lora_A" in key) for key, value in t.items()}, "every B is zero"),
], ids=["other prefix", "missing", "unknown", "shape", "B zero"])
def test_adapters_that_would_silently_do_nothing_are_errors(tiny, saved, change, message):
    change_tensors(saved, change)
    with pytest.raises(ValueError, match=message):
        lora.load_adapter(ours(tiny, torch.float32), saved)


@pytest.mark.parametrize("key, value", [("use_dora", True), ("use_rslora", True), ("modules_to_save", ["lm_head"]), ("bias", "all"), ("rank_pattern", {"q_proj": 4}),
                                        ("layers_to_transform", [0]), ("init_lora_weights", "pissa"), ("a_key_of_the_future", 3), ("peft_type", "IA3")])
def test_active_options_that_are_not_implemented_are_refused_by_name(tiny, saved, key, value):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(read_json(path) | {key: value}))
    with pytest.raises(ValueError, match=key):
        lora.load_adapter(ours(tiny, torch.float32), saved)


def test_inactive_options_of_other_versions_are_accepted(tiny, saved):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(read_json(path) | {"lora_bias": False, "a_key_of_the_future": None, "layer_replication": None, "runtime_config": {}}))
    lora.load_adapter(ours(tiny, torch.float32), saved)


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules"])
def test_a_config_that_leaves_out_what_peft_would_guess_is_refused(tiny, saved, key):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({k: v for k, v in read_json(path).items() if k != key}))
    with pytest.raises(ValueError, match=f"lacks {key}"):
        lora.load_adapter(ours(tiny, torch.float32), saved)


def test_a_target_that_matches_nothing_lists_the_names_and_the_nearest(tiny):
    with pytest.raises(ValueError, match="'query_proj' matches no linear layer; there are dense, fc1, fc2, k_proj, lm_head, q_proj, v_proj; nearest: q_proj"):
        lora.inject(ours(tiny, torch.float32), lora.LoRAConfig(targets=("v_proj", "query_proj")))
    with pytest.raises(ValueError, match="matches no linear layer"):  # PEFT's endswith, not a substring
        lora.inject(ours(tiny, torch.float32), lora.LoRAConfig(targets=("proj",)))


@pytest.mark.parametrize("options, message", [({"rank": 0}, "rank"), ({"dropout": 1.0}, "dropout"), ({"alpha": 0}, "alpha")])
def test_impossible_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lora.LoRAConfig(**options)


def test_adapters_are_not_injected_twice(tiny):
    mine, _ = pair(tiny)
    with pytest.raises(ValueError, match="already"):
        lora.inject(mine, lora.LoRAConfig())


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with checkpoint.replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
