"""Files that come from strangers: each ends in a correct result or in one clear line, never in a traceback or a wrong model."""
import json
import os
import shutil
import sys

import pytest
import torch
from conftest import ROOT, ours, random_ids, script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import checkpoint
import data
import data as data_module  # where hypothesis has another `data`
import eval as evaluation
import lora
import phi2
import train

CASES = int(os.environ.get("CASES", 200))  # make torture: 2000
hostile = settings(deadline=None, max_examples=CASES // 4, suppress_health_check=list(HealthCheck))
ODD = st.recursive(st.none() | st.booleans() | st.integers(-2 ** 70, 2 ** 70) | st.floats() | st.text(max_size=20)
                   | st.sampled_from([-1, 0, 1, 10 ** 9, "../../etc/passwd", "/etc/passwd", "(a+)+$", "NaN", "model.safetensors", "0" * 5000]),
                   lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny):
    model, config, path = ours(tiny, torch.float32), lora.LoRAConfig(), tmp_path_factory.mktemp("adapter")
    lora.inject(model, config)
    for parameter in lora.lora_parameters(model).values():
        torch.nn.init.normal_(parameter)
    lora.save_adapter(model, config, path, str(tiny))
    ids = random_ids(model)
    return path, ids, model(ids).detach()


def changed(raw: dict, draw) -> dict:
    """raw with one to three values replaced, added or removed."""
    raw = dict(raw)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(raw)) | st.text(max_size=8)) if raw else draw(st.text(max_size=8))
        if draw(st.booleans()):
            raw[key] = draw(ODD)
        else:
            raw.pop(key, None)
    return raw


@given(st.data())
@hostile
def test_any_adapter_config_gives_the_trained_model_or_one_error(adapter, tiny, tmp_path_factory, data):
    path, ids, expected = adapter
    raw = json.loads((path / "adapter_config.json").read_text())
    copy = tmp_path_factory.mktemp("copy")
    shutil.copy(path / "adapter_model.safetensors", copy)
    other = changed(raw, data.draw)
    (copy / "adapter_config.json").write_text(json.dumps(other))
    model = ours(tiny, torch.float32)
    try:
        config = lora.load_adapter(model, copy)
    except ValueError as error:
        assert str(error).strip()
        return
    scale = config.alpha / config.rank
    assert config.rank == 8 and (scale != 2 or torch.equal(model.eval()(ids), expected))


@given(st.data())
@hostile
def test_any_config_json_gives_a_phi_or_one_error(tiny, tmp_path_factory, data):
    copy = tmp_path_factory.mktemp("copy")
    (copy / "config.json").write_text(json.dumps(changed(json.loads((tiny / "config.json").read_text()), data.draw)))
    shutil.copy(tiny / "model.safetensors", copy)
    try:
        model = phi2.load_weights(phi2.build(str(copy)), str(copy), "cpu", torch.float32)
    except ValueError as error:
        assert str(error).strip()
        return
    logits = model(random_ids(model, length=4))
    assert logits.isfinite().all() and logits.shape[-1] == 1024


@given(st.data())
@hostile
def test_any_index_gives_the_model_or_one_error_and_reads_nothing_outside_its_directory(tiny, tmp_path_factory, data):
    copy = tmp_path_factory.mktemp("copy")
    outside = copy.parent / "outside.safetensors"
    shutil.copy(tiny / "model.safetensors", outside)
    shutil.copy(tiny / "config.json", copy)
    shutil.copy(tiny / "model.safetensors", copy / "part.safetensors")
    index = {"metadata": {}, "weight_map": {key: "part.safetensors" for key in load_file(tiny / "model.safetensors")}}
    if data.draw(st.booleans()):
        index = changed(index, data.draw)
    else:
        name = data.draw(st.sampled_from(["../outside.safetensors", str(outside), "none.safetensors", "", ".", "a/b"]) | ODD)
        index["weight_map"][data.draw(st.sampled_from(sorted(index["weight_map"])))] = name
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    try:
        files = checkpoint.checkpoint_files(copy)
    except ValueError as error:
        assert str(error).strip()
        return
    assert files == [copy / "part.safetensors"]


@given(st.binary(max_size=60) | ODD.map(lambda value: json.dumps(value).encode()) | st.just(b"[" * 100_000))
@hostile
def test_bytes_that_are_no_json_object_are_one_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("json") / "config.json"
    path.write_bytes(content)
    try:
        assert isinstance(checkpoint.read_json(path), dict)
    except ValueError as error:
        assert str(path) in str(error)


@given(st.data())
@hostile
def test_a_damaged_base_is_one_error_or_a_finite_model(tiny, tmp_path_factory, data):
    """The Hub's files carry no checksum: what is promised is names, shapes, types and finite numbers."""
    copy = tmp_path_factory.mktemp("copy")
    shutil.copy(tiny / "config.json", copy)
    content = bytearray((tiny / "model.safetensors").read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)):]
    else:
        header = 8 + int.from_bytes(content[:8], "little")
        place = data.draw(st.integers(0, 8 * header - 1) | st.integers(0, 8 * len(content) - 1))
        content[place // 8] ^= 1 << place % 8
    (copy / "model.safetensors").write_bytes(content)
    model = phi2.build(str(copy))
    try:
        phi2.load_weights(model, str(copy), "cpu", torch.float32)
    except ValueError as error:
        assert str(error).strip()
        return
    assert all(parameter.isfinite().all() for parameter in model.parameters())


TEXT = st.text(max_size=30) | st.sampled_from(["", " ", "\x00", "\u202e", "e\u0301", "\U0001f600" * 5, "word " * 3000, "<|endoftext|>", "### Label: 0", "{premise}"])


@given(rows=st.lists(st.fixed_dictionaries({}, optional={"premise": TEXT | st.none(), "hypothesis": TEXT | st.none(), "label": st.sampled_from(
    [0, 1, 2, -1, 3, None, "entailment", "no"])}), min_size=1, max_size=4))
@hostile
def test_any_rows_are_encoded_within_the_length_or_one_error(tiny, tmp_path_factory, rows):
    directory = tmp_path_factory.mktemp("data")
    for split in ("train", "validation"):
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = data.load_tokenizer(tiny)
    try:
        examples = data.load_examples(str(directory), "train")
        encoded = [data.encode(example, tokenizer, 512) for example in examples]
    except ValueError as error:
        assert str(error).strip()
        return
    answers = data.fixed_ids(tokenizer)
    for example, (prompt, answer) in zip(examples, encoded):
        assert len(prompt) + len(answer) <= 512 and answer == [answers[1][example["label"]], answers[2]]
        assert None not in (example["premise"], example["hypothesis"])


def test_no_numbers_that_are_not_finite_are_loaded(tiny, adapter, tmp_path):
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.layers.1.mlp.fc1.weight"][3, 4] = float("nan")
    shutil.copytree(tiny, tmp_path / "model")
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.1.mlp.fc1.weight .* not finite"):
        evaluation.load_model(tmp_path / "model", "nf4", torch.bfloat16, "cpu")
    shutil.copytree(adapter[0], tmp_path / "adapter")
    tensors = load_file(adapter[0] / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="not finite"):
        lora.load_adapter(ours(tiny, torch.float32), tmp_path / "adapter")


def test_no_file_of_the_project_unpickles_or_runs_code_of_a_repository():
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        assert not any(word in text for word in ("import pickle", "torch.load(", "trust_remote_code=True", "all_gather_object", " eval(", " exec(")), path


def test_a_script_says_one_line_on_a_hostile_adapter(adapter, tmp_path):
    shutil.copytree(adapter[0], tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("[" * 100_000)
    done = script("eval.py", "--adapter", tmp_path / "adapter")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "is not JSON" in done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real run of two steps, with what --resume needs."""
    out = tmp_path_factory.mktemp("run") / "run"
    done = script("train.py", "--model", "tiny/model", "--dataset", "tiny/data", "--steps", 2, "--batch-size", 2, "--eval-limit", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@given(st.data())
@hostile
def test_any_state_of_a_run_is_its_own_or_one_error(run, tmp_path_factory, data):
    """trainer.safetensors of a stranger, whose checksum fits: other arguments, another state, other tensors."""
    copy = tmp_path_factory.mktemp("copy")
    tensors, state = checkpoint.load(run)
    kind = data.draw(st.sampled_from(["arguments", "state", "loop", "baseline", "tensors"]))
    if kind == "arguments":
        state["arguments"] = changed(state["arguments"], data.draw)
    elif kind == "loop":
        state["loop"] = data.draw(st.lists(st.integers(-3, 5) | ODD, min_size=5, max_size=7))
    elif kind == "baseline":
        state["baseline"]["validation_matched"] = data.draw(st.just(changed(state["baseline"]["validation_matched"], data.draw)) | ODD)
    elif kind == "state":
        state = changed(state, data.draw)
    else:
        name = data.draw(st.sampled_from(sorted(tensors)))
        other = data.draw(st.sampled_from([None, torch.zeros(3), torch.zeros(2, 2), tensors["random"], tensors["random"][0], tensors["random"] * 0 + 255]))
        tensors = {key: other.clone() if key == name else tensor for key, tensor in tensors.items() if key != name or other is not None}
    checkpoint.write_tensors(copy / checkpoint.NAME, tensors, {"state": json.dumps(state)})
    argv, sys.argv = sys.argv, ["train.py", "--resume", str(copy)]
    try:
        args = train.parse_arguments()
        tensors, state = checkpoint.load(copy)
        model = ours(ROOT / "tiny" / "model", torch.float32)
        lora.inject(model, lora.LoRAConfig(args.rank, args.alpha, args.dropout, tuple(args.targets)))
        adapter = lora.lora_parameters(model)
        checkpoint.restore(tensors, adapter, torch.optim.AdamW(adapter.values()), 0)
    except ValueError as error:
        assert str(error).strip()
    except SystemExit as error:
        assert error.code == 2
    else:
        step, logged, *_ = state["loop"]
        assert 0 <= logged <= step and isinstance(args.learning_rate, float) and args.loss in ("answer", "full")
    finally:
        sys.argv = argv


@given(st.data())
@hostile
def test_any_args_json_beside_an_adapter_is_its_arguments_or_one_error(adapter, tmp_path_factory, data):
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(adapter[0], copy, dirs_exist_ok=True)
    names = {"dataset": "tiny/data", "quant": "nf4", "double_quant": False, "keep_dequantized": False, "dtype": "bf16", "max_length": 512}
    (copy / "args.json").write_text(json.dumps(changed(names, data.draw)))
    parser = data_module.Parser("test")
    evaluation.add_model_arguments(parser)
    try:
        checkpoint.set_defaults(parser, checkpoint.trained_with(copy), copy)
        args = data_module.parse_arguments(parser, [])
    except ValueError as error:
        assert str(error).strip()
    except SystemExit as error:
        assert error.code == 2
    else:
        assert args.quant in ("nf4", "none") and args.dtype in evaluation.DTYPES and isinstance(args.max_length, int) and isinstance(args.dataset, str)


def test_no_token_is_in_any_file_that_a_run_writes(tmp_path):
    """Of W&B and of the Hub, in the environment and in the home that their libraries read; W&B's own files are searched too."""
    tokens = {"WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567", "HF_TOKEN": "hf_" + "MarkerOfTheHub" * 2, "HUGGING_FACE_HUB_TOKEN": "hf_" + "AnotherMarker" * 2}
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text("hf_" + "MarkerInTheHome" * 2)
    done = script("train.py", "--model", "tiny/model", "--dataset", "tiny/data", "--steps", 2, "--batch-size", 2, "--eval-limit", 2, "--wandb",
                  "--out", tmp_path / "run", env=tokens | {"WANDB_MODE": "offline", "HF_HOME": str(tmp_path / "home")})
    assert done.returncode == 0, done.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 8 and any("wandb" in path.parts for path in files)
    for path in files:
        content = path.read_bytes()
        assert not any(token.encode() in content for token in (*tokens.values(), "MarkerInTheHome")), path
    assert not any(token in done.stdout + done.stderr for token in tokens.values())
