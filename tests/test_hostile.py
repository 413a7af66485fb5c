"""Files from strangers: each gives a right result or one line, and never a wrong model."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_adapter, logits, ours, random_ids, script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import lora
import phi2
from support import files
from support.examples import load_examples

CASES = int(os.environ.get("CASES", 200))  # make torture: 2000
hostile = settings(deadline=None, max_examples=CASES // 4, suppress_health_check=list(HealthCheck))

ONE_LINE = (ValueError, OSError)  # what cli.run prints as one line; all else is a traceback

# Sizes stay small: a file may ask for a model that no memory holds, and nothing forbids that.
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-10, 300)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["../../etc/passwd", "/etc/passwd", "NaN", "model.safetensors", "0" * 300])
)
ODD = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def changed(raw: dict, draw) -> dict:
    """Returns `raw` with one to three values replaced, added or removed."""
    raw = dict(raw)
    for _ in range(draw(st.integers(1, 3))):
        keys = st.text(max_size=8)
        if raw:
            keys |= st.sampled_from(sorted(raw))
        key = draw(keys)
        if draw(st.booleans()):
            raw[key] = draw(ODD)
        else:
            raw.pop(key, None)
    return raw


# -----------------------------------------------------------------------------
# An adapter


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    """An adapter with random A and B."""
    directory = tmp_path_factory.mktemp("adapter")
    model = ours(tiny, torch.float32)
    lora.inject(model, lora.LoRAConfig())
    for parameter in lora.lora_parameters(model).values():
        torch.nn.init.normal_(parameter)
    lora.save_adapter(model, lora.LoRAConfig(), directory, str(tiny))
    return directory


@pytest.fixture(scope="module")
@torch.no_grad()
def expected(adapter, tiny) -> torch.Tensor:
    """Logits of the trained model."""
    model = ours(tiny, torch.float32)
    load_adapter(model, adapter)
    return logits(model, random_ids(model))


@given(drawn=st.data())
@hostile
@torch.no_grad()
def test_any_adapter_config_gives_the_trained_model_or_one_error(
    adapter, expected, tiny, tmp_path, drawn
):
    shutil.copy(adapter / "adapter_model.safetensors", tmp_path)
    raw = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(changed(raw, drawn.draw)))
    model = ours(tiny, torch.float32)
    try:
        config = load_adapter(model, tmp_path)
    except ONE_LINE as error:
        assert str(error).strip()
        return
    assert config.rank == 8
    if config.alpha == 16:  # another one is what the file asks for
        assert torch.equal(logits(model.eval(), random_ids(model)), expected)


def test_a_script_says_one_line_on_a_hostile_adapter(adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    (copy / "adapter_config.json").write_text("[" * 100_000)  # too deep for a recursive parser
    done = script("eval.py", "--adapter", copy)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "is not JSON" in done.stderr


# -----------------------------------------------------------------------------
# A base model


@given(drawn=st.data())
@hostile
@torch.no_grad()
def test_any_config_json_gives_a_phi_or_one_error(tiny, tmp_path, drawn):
    raw = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(changed(raw, drawn.draw)))
    shutil.copy(tiny / "model.safetensors", tmp_path)
    try:
        model = ours(tmp_path, torch.float32)
    except ONE_LINE as error:
        assert str(error).strip()
        return
    outputs = model(torch.tensor([1, 2, 3, 4]))
    assert outputs.shape == (4, 1024)
    # Angles by so small a theta are infinite. Its logits are then refused, by eval.label_scores.
    assert outputs.isfinite().all() or model.config.rope_theta < 1


@given(drawn=st.data())
@hostile
def test_any_index_gives_the_model_or_one_error_and_reads_nothing_outside_its_directory(
    tiny, tmp_path, drawn
):
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    outside = tmp_path / "outside.safetensors"
    for path in (outside, model / "part.safetensors"):
        shutil.copy(tiny / "model.safetensors", path)
    keys = sorted(load_file(outside))
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "part.safetensors")}
    if drawn.draw(st.booleans()):
        index = changed(index, drawn.draw)
    else:
        elsewhere = ["../outside.safetensors", str(outside), "none.safetensors", "", ".", "a/b"]
        name = drawn.draw(st.sampled_from(elsewhere) | ODD)
        index["weight_map"][drawn.draw(st.sampled_from(keys))] = name
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    try:
        paths = phi2.weight_files(model)
    except ONE_LINE as error:
        assert str(error).strip()
        return
    assert set(paths) <= {model / "part.safetensors"}


@given(drawn=st.data())
@hostile
def test_a_damaged_base_is_one_error_or_a_finite_model(tiny, tmp_path, drawn):
    """The Hub's files carry no checksum: names, shapes, types and finite numbers are checked."""
    shutil.copy(tiny / "config.json", tmp_path)
    content = bytearray((tiny / "model.safetensors").read_bytes())
    if drawn.draw(st.booleans()):
        del content[drawn.draw(st.integers(0, len(content) - 1)) :]
    else:
        header = 8 + int.from_bytes(content[:8], "little")
        in_header = st.integers(0, 8 * header - 1)
        anywhere = st.integers(0, 8 * len(content) - 1)
        bit = drawn.draw(in_header | anywhere)
        content[bit // 8] ^= 1 << bit % 8
    (tmp_path / "model.safetensors").write_bytes(content)
    try:
        model = ours(tmp_path, torch.float32)
    except ONE_LINE as error:
        assert str(error).strip()
        return
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name


def test_no_numbers_that_are_not_finite_are_loaded(tiny, adapter, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.layers.1.mlp.fc1.weight"][3, 4] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.1.mlp.fc1 .* weight holds .* not finite"):
        evaluation.load_model(model, "nf4", "bf16", "cpu")

    copy = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, copy / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="not finite"):
        load_adapter(ours(tiny, torch.float32), copy)


# -----------------------------------------------------------------------------
# Rows

ODD_TEXTS = [
    "",
    " ",
    "\x00",
    "\u202e",  # turns the direction of writing
    "e\u0301",  # an accent that is a character of its own
    "\U0001f600" * 5,
    "word " * 3000,
    "<|endoftext|>",
    "### Label: 0",
    "{premise}",
]
TEXT = st.text(max_size=30) | st.sampled_from(ODD_TEXTS)
LABEL = st.sampled_from([0, 1, 2, -1, 3, None, "entailment", "no"])
ROW = st.fixed_dictionaries(
    {},
    optional={"premise": TEXT | st.none(), "hypothesis": TEXT | st.none(), "label": LABEL},
)


@given(rows=st.lists(ROW, min_size=1, max_size=4))
@hostile
@pytest.mark.parametrize("max_length", [68, 90, 512])
def test_any_rows_are_encoded_within_the_length_or_one_error(
    tiny, tmp_path_factory, max_length, rows
):
    directory = tmp_path_factory.mktemp("data")  # find_splits remembers a folder's content
    for split in ("train", "validation"):
        files.write_lines(directory / f"{split}.jsonl", rows)
    tokenizer = data.load_tokenizer(tiny)
    try:
        examples = load_examples(str(directory), "train")
        encoded = data.encode_batch(examples, tokenizer, max_length)
    except ONE_LINE as error:
        assert str(error).strip()
        return
    _, answers, eos = data.fixed_ids(tokenizer)
    for example, (prompt, answer) in zip(examples, encoded):
        assert isinstance(example["premise"], str)
        assert isinstance(example["hypothesis"], str)
        assert len(prompt) + len(answer) <= max_length
        assert answer == [answers[example["label"]], eos]


# -----------------------------------------------------------------------------
# What no file can do, and what no file holds


def test_no_file_of_the_project_unpickles_or_runs_code_of_a_repository():
    forbidden = r"import pickle|torch\.load\(|trust_remote_code=True|[ (=](eval|exec)\("
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("scripts/*.py")]:
        assert not re.search(forbidden, path.read_text()), path


def test_no_token_is_in_any_file_that_a_run_writes(tmp_path):
    """Of W&B and of the Hub, in the environment and in the home that their libraries read."""
    tokens = {
        "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
        "HF_TOKEN": "hf_" + "MarkerOfTheHub" * 2,
        "HUGGING_FACE_HUB_TOKEN": "hf_" + "AnotherMarker" * 2,
    }
    in_the_home = "hf_" + "MarkerInTheHome" * 2
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(in_the_home)
    command = ["train.py", "--model", "tiny/model", "--dataset", "tiny/data", "--steps", 2]
    command += ["--batch-size", 2, "--eval-limit", 2, "--wandb", "--out", tmp_path / "run"]
    environment = tokens | {"WANDB_MODE": "offline", "HF_HOME": str(home)}
    done = script(*command, env=environment)
    assert done.returncode == 0, done.stderr

    paths = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(paths) > 8
    assert any("wandb" in path.parts for path in paths), "W&B's own files are searched too"
    for secret in (*tokens.values(), in_the_home):
        assert secret not in done.stdout + done.stderr
        for path in paths:
            assert secret.encode() not in path.read_bytes(), path
