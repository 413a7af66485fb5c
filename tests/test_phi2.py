"""phi2.py beside transformers: keys, logits, generation, loading; and the errors of a broken model directory."""
import json
import shutil

import pytest
import torch
from conftest import distance, ours, random_ids, read_json, reference
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import phi2


def generate(*arguments, **more) -> list[list[int]]:
    return evaluation.generate(*arguments, **more)[0]


@pytest.mark.parametrize("name", ["tiny", "wide"])
def test_keys_and_shapes_are_those_of_transformers(name, request):
    from transformers import AutoConfig, PhiForCausalLM
    directory = request.getfixturevalue(name)
    with torch.device("meta"):
        theirs = PhiForCausalLM(AutoConfig.from_pretrained(directory)).state_dict()
    assert {key: value.shape for key, value in phi2.build(directory).state_dict().items()} == {key: value.shape for key, value in theirs.items()}


def test_phi_2_has_453_tensors_and_2_779_683_840_parameters():
    with torch.device("meta"):
        tensors = phi2.Phi2(phi2.Phi2Config()).state_dict()
    assert len(tensors) == 453
    assert sum(tensor.numel() for tensor in tensors.values()) == 2_779_683_840


@torch.no_grad()
def test_phi_1_differs_by_its_config_alone(tmp_path):
    from transformers import PhiConfig, PhiForCausalLM
    torch.manual_seed(0)
    theirs = PhiForCausalLM(PhiConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
                                      partial_rotary_factor=0.5, rope_theta=500.0, layer_norm_eps=1e-3)).eval()
    theirs.save_pretrained(tmp_path)
    mine = ours(tmp_path, torch.float32)
    ids = random_ids(mine)
    assert distance(mine(ids), theirs(ids).logits) < 1e-5


@torch.no_grad()
def test_greedy_completions_of_200_prompts_are_those_of_transformers(tiny):
    mine, theirs = ours(tiny, torch.float32), reference(tiny, torch.float32).eval()
    tokenizer_size, eos, new = 1000, 0, 16
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, tokenizer_size, (int(n),), generator=generator).tolist() for n in torch.randint(2, 50, (100,), generator=generator)]
    tokenizer = data.load_tokenizer(tiny)
    prompts += [data.encode(example, tokenizer)[0] for example in data.load_examples(str(tiny.parent / "data"), "validation_matched", 100)]
    found = generate(mine, prompts, new, eos, tokenizer_size)
    width = max(map(len, prompts))
    ids, mask = torch.zeros(2, 200, width, dtype=torch.long)
    for row, prompt in enumerate(prompts):  # padded on the left, as transformers wants it
        ids[row, width - len(prompt):], mask[row, width - len(prompt):] = torch.tensor(prompt), 1
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=eos, pad_token_id=eos,
                               suppress_tokens=list(range(tokenizer_size, 1024)))[:, width:].tolist()
    assert found == [row[:row.index(eos)] if eos in row else row for row in expected]
    assert len({tuple(row) for row in found}) > 20, "the completions must differ, or this test says little"


def test_a_completion_does_not_depend_on_the_batch_or_on_how_the_prompt_is_split(tiny):
    mine = ours(tiny, torch.float32)
    generator = torch.Generator().manual_seed(1)
    prefix = [5, 6, 7, 8, 9]
    prompts = [torch.randint(1, 1000, (n,), generator=generator).tolist() for n in (3, 17, 9, 30, 1, 4)]
    whole = [generate(mine, [prefix + prompt], 8, 0, 1000)[0] for prompt in prompts]
    assert generate(mine, [prefix + prompt for prompt in prompts], 8, 0, 1000) == whole
    assert generate(mine, prompts, 8, 0, 1000, mine.prefill(prefix)) == whole


def test_guesses_at_the_first_token_change_no_completion(tiny):
    """Right and wrong guesses, rows that end in the first pass, after it, and at the last token; with a prefix and without."""
    mine = ours(tiny, torch.float32)
    prompts = [torch.randint(1, 1000, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 17, 9, 30, 1, 4, 22, 5)]
    never, prefix = 1023, [5, 6, 7]
    plain = generate(mine, prompts, 6, never, 1000)
    firsts = [row[0] for row in plain]
    assert len(set(firsts)) > 2
    for guesses in (firsts[:1], [999, firsts[1], firsts[2]], sorted(set(firsts)), [998, 999]):
        for eos in (never, firsts[0], plain[0][1]):
            ended = [row[:row.index(eos)] if eos in row else row for row in plain]
            assert generate(mine, prompts, 6, eos, 1000, guesses=guesses) == ended
        assert generate(mine, prompts, 1, never, 1000, guesses=guesses) == [row[:1] for row in plain]
    whole = generate(mine, [prefix + prompt for prompt in prompts], 6, never, 1000)
    assert generate(mine, prompts, 6, never, 1000, mine.prefill(prefix), guesses=[row[0] for row in whole[:3]]) == whole


@torch.no_grad()
def test_ids_beyond_the_tokenizer_are_never_written(tiny):
    mine = ours(tiny, torch.float32)
    mine.lm_head.bias[1000:] = 1e4  # the head's untrained rows would win every time
    assert mine(torch.tensor([[1, 2, 3]])).argmax() >= 1000
    assert max(generate(mine, [[1, 2, 3]], 8, 0, 1000)[0]) < 1000


def test_a_shared_prefix_gives_the_same_logits_and_gradients(tiny):
    mine = ours(tiny, torch.float32)
    ids = random_ids(mine, rows=4, length=20)
    ids[:, :8] = ids[0, :8]
    weights = [mine.model.layers[0].self_attn.q_proj.weight, mine.model.layers[2].mlp.fc1.weight, mine.model.embed_tokens.weight]
    weights = [weight.requires_grad_() for weight in weights]
    whole = mine(ids)[:, 8:]
    expected = torch.autograd.grad(whole.square().mean(), weights)
    shared = mine(ids[:, 8:], mine.prefill(ids[0, :8].tolist()))
    assert distance(shared, whole) < 1e-5
    for found, gradient in zip(torch.autograd.grad(shared.square().mean(), weights), expected):
        assert gradient.norm() > 0 and distance(found, gradient) < 1e-5


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_residual_dropout_is_what_config_says_and_off_in_eval_mode(tiny, p):
    config = phi2.read_config(tiny)
    config.resid_pdrop = p
    torch.manual_seed(0)
    model = phi2.Phi2(config)
    ids = random_ids(model)
    assert torch.equal(model.train()(ids), model(ids)) == (p == 0)
    assert torch.equal(model.eval()(ids), model(ids))


def msft_layout(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint as phi-2 was first uploaded."""
    old = {}
    for key, tensor in tensors.items():
        if ".k_proj." in key or ".v_proj." in key:
            continue
        if ".q_proj." in key:
            tensor = torch.cat([tensors[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")])
        for ours_, theirs in (("model.embed_tokens.", "transformer.embd.wte."), ("model.final_layernorm.", "lm_head.ln."), ("model.layers.", "transformer.h."),
                              ("input_layernorm.", "ln."), ("self_attn.q_proj.", "mixer.Wqkv."), ("self_attn.dense.", "mixer.out_proj.")):
            key = key.replace(ours_, theirs)
        old[key.replace("lm_head.weight", "lm_head.linear.weight").replace("lm_head.bias", "lm_head.linear.bias")] = tensor
    return old


def test_the_first_layout_of_phi_2_is_converted(tiny, tmp_path):
    old = msft_layout(load_file(tiny / "model.safetensors"))
    assert "transformer.h.5.mixer.Wqkv.bias" in old and "lm_head.ln.weight" in old
    old["transformer.h.0.mixer.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(old, tmp_path / "model.safetensors")
    config = phi2.read_config(tiny)
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "phi-msft", "vocab_size": config.vocab_size, "n_embd": config.hidden_size, "n_layer": config.num_hidden_layers, "n_head": 6,
        "n_inner": None, "n_positions": 512, "rotary_dim": 16, "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.0, "activation_function": "gelu_new"}))
    mine, expected = ours(tmp_path, torch.float32), ours(tiny, torch.float32)
    ids = random_ids(mine)
    assert torch.equal(mine(ids), expected(ids))


# ---- Broken model directories: one line that names the thing

@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture
def sharded(tiny, tmp_path):
    theirs = reference(tiny, torch.bfloat16)
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="2MB")
    return tmp_path / "sharded"


def fails(directory, message):
    with pytest.raises(ValueError, match=message) as raised:
        ours(directory, torch.float32)
    assert "\n" not in str(raised.value)


@torch.no_grad()
def test_shards_load_as_one_file_does(tiny, sharded):
    assert len(list(sharded.glob("*.safetensors"))) > 2
    mine, expected = ours(sharded, torch.float32), ours(tiny, torch.float32)
    ids = random_ids(mine)
    assert torch.equal(mine(ids), expected(ids))


def test_no_such_model():
    fails("no/such/model", "no model directory 'no/such/model', and it is not a Hub id")
    fails("./nothing", "no model directory './nothing'")


def test_a_directory_without_a_model(tmp_path):
    fails(tmp_path, "is not a model directory: it has no config.json")


def test_a_shard_that_is_listed_but_not_there(sharded):
    (sharded / sorted(path.name for path in sharded.glob("*.safetensors"))[1]).unlink()
    fails(sharded, "lists model-00002-of-.*, which is not there")


def test_a_shard_missing_from_the_index(sharded):
    path = sharded / "model.safetensors.index.json"
    index = read_json(path)
    index["weight_map"] = {key: name for key, name in index["weight_map"].items() if not name.startswith("model-00002")}
    path.write_text(json.dumps(index))
    fails(sharded, r"lacks \d+ of 89 tensors, among them model\.")


@pytest.mark.parametrize("keep", [0.5, 0.0001])
def test_a_truncated_file(copy, keep):
    path = copy / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * keep)])
    fails(copy, "model.safetensors is damaged or cut short")


@pytest.mark.parametrize("key, value, message", [
    ("model_type", "llama", "model_type 'llama' is not supported"), ("hidden_act", "silu", "hidden_act = 'silu' is not supported"),
    ("qk_layernorm", True, "qk_layernorm"), ("num_key_value_heads", 2, "num_key_value_heads"), ("num_attention_heads", 7, "not a multiple"),
    ("intermediate_size", 512, r"fc1.bias has shape \(768,\), config.json asks for \(512,\)"), ("num_hidden_layers", 7, "lacks 14 of 103 tensors"),
    ("num_hidden_layers", 5, "unknown tensor model.layers.5")])
def test_a_config_that_does_not_fit(copy, key, value, message):
    (copy / "config.json").write_text(json.dumps(read_json(copy / "config.json") | {key: value}))
    fails(copy, message)


def test_a_config_that_is_not_json(copy):
    (copy / "config.json").write_text("{")
    fails(copy, "config.json is not JSON")


def test_the_interleaved_layout_is_refused_by_name(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.self_attn.query_key_value.weight"] = torch.ones(2)
    save_file(tensors, copy / "model.safetensors")
    fails(copy, "layout of transformers 4.36")
