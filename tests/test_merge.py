"""A merged model is the base with its adapter, for transformers too, and says what it cost."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, distance, in_process, ours, read_json, reference, script
from hub import serving
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import lora
import phi2
import train
from scripts import merge
from support import examples, files


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real run over NF4, in fp32."""
    out = tmp_path_factory.mktemp("run") / "run"
    command = ["train.py", "--model", ROOT / "tiny/model", "--dataset", ROOT / "tiny/data"]
    command += ["--steps", 20, "--batch-size", 8, "--learning-rate", 1e-2, "--dtype", "fp32"]
    command += ["--eval-limit", 1, "--max-new-tokens", 1, "--out", out]
    command += ["--keep-dequantized"]  # the same bits in less time
    done = script(*command)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def prompts(tiny):
    tokenizer = data.load_tokenizer(tiny)
    rows = examples.load_examples(str(ROOT / "tiny" / "data"), "validation_matched", 8)
    return [torch.tensor(data.encode(row, tokenizer)[0]) for row in rows]


def adapted(tiny, run):
    """The model that the run has trained."""
    model = ours(tiny, torch.float32, "nf4")
    lora.load_adapter(model, run)
    return model.eval()


# -----------------------------------------------------------------------------
# The merged model


def test_an_adapter_that_does_not_say_nf4_is_merged_into_16_bits(run, tiny, tmp_path):
    """As PEFT's merge_and_unload; an adapter file of ours says it without its args.json too."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ours_alone = tmp_path / "ours"
    ours_alone.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / name, ours_alone)
    pefts = shutil.copytree(ours_alone, tmp_path / "pefts")
    tensors = load_file(pefts / "adapter_model.safetensors")
    save_file(tensors, pefts / "adapter_model.safetensors", {"format": "pt"})

    for adapter, is_nf4 in ((run, True), (ours_alone, True), (pefts, False)):
        out = tmp_path / f"merged {adapter.name}"
        command = ("-m", "scripts.merge", "--adapter", adapter, "--dtype", "fp32", "--out", out)
        done = script(*command)
        assert done.returncode == 0, done.stderr
        assert ("dequantised from NF4" in done.stdout) == is_nf4
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, pefts).merge_and_unload().state_dict()
    merged = load_file(tmp_path / "merged pefts" / "model.safetensors")
    assert merged.keys() == expected.keys()
    for key, tensor in merged.items():
        # Of a layer with an adapter the sum is made in another order.
        assert torch.allclose(tensor, expected[key], rtol=0, atol=1e-6), key


@pytest.mark.parametrize("shard_size", ["5GB", "2MB"])
@torch.no_grad()
def test_transformers_loads_a_merged_model_and_gives_the_logits_of_base_and_adapter(
    run, tiny, tmp_path, prompts, shard_size
):
    """In fp32 within 1e-5, as two orders of summation differ; one file, or shards and an index."""
    model = adapted(tiny, run)
    expected = [model(prompt) for prompt in prompts]
    merge.merge(model, torch.float32)
    (tmp_path / "merged").mkdir()
    merge.write_model(model, tiny, tmp_path / "merged", {}, shard_size)

    index = tmp_path / "merged" / "model.safetensors.index.json"
    assert index.is_file() == (shard_size == "2MB")
    theirs = reference(tmp_path / "merged", torch.float32)
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert shapes == {key: value.shape for key, value in phi2.build(tiny).state_dict().items()}
    mine = ours(tmp_path / "merged", torch.float32)
    for prompt, logits in zip(prompts, expected):
        assert distance(theirs(prompt[None]).logits[0], logits) < 1e-5
        assert distance(mine(prompt), logits) < 1e-5
    base = ours(tiny, torch.float32, "nf4")
    assert distance(base(prompts[0]), expected[0]) > 0.02, "without the adapter it is another model"


@pytest.mark.parametrize(
    "dtype, requantize, double_quant",
    [
        (torch.bfloat16, False, False),
        (torch.float32, True, False),
        (torch.float32, True, True),
    ],
    ids=["bf16", "nf4", "nf4-double"],
)
@torch.no_grad()
def test_the_cost_of_merging_is_what_the_weights_say(run, tiny, dtype, requantize, double_quant):
    """Once more in fp64, from PEFT's adapter and from the base that bitsandbytes quantises."""
    import bitsandbytes.functional as bnb
    from peft import PeftModel

    costs = merge.merge(adapted(tiny, run), dtype, requantize, double_quant)

    theirs = PeftModel.from_pretrained(reference(tiny, torch.float32, "nf4"), run)
    layers = {
        path.removeprefix("base_model.model."): module
        for path, module in theirs.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }
    assert costs.keys() == layers.keys() and len(costs) == 12
    for path, layer in layers.items():
        four_bit = layer.base_layer.weight
        weight = bnb.dequantize_4bit(four_bit.data, four_bit.quant_state)
        scale = 16 / 8  # alpha / rank
        update = scale * layer.lora_B.default.weight @ layer.lora_A.default.weight
        merged = (weight + update).to(dtype)
        if requantize:
            indices, state = bnb.quantize_4bit(
                merged, blocksize=64, quant_type="nf4", compress_statistics=double_quant
            )
            merged = bnb.dequantize_4bit(indices, state)
        change = merged.double() - weight.double() - update.double()
        expected = (change.norm() / update.double().norm()).item()
        assert costs[path] == pytest.approx(expected, rel=1e-3)
    if requantize:
        assert max(costs.values()) > 0.05, "4 bits erase much"
    else:
        assert 1e-4 < max(costs.values()) < 0.02, "16 bits erase little"


def test_a_merge_rounds_once(tiny, run):
    """W + B A in fp32, then bf16. Rounding W to bf16 before gives other weights."""
    model = adapted(tiny, run)
    layer = model.model.layers[0].self_attn.q_proj
    weight = layer.base_layer.dequantize()
    update = layer.scale * layer.lora_B.weight @ layer.lora_A.weight
    merge.merge(model, torch.bfloat16)
    merged = model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(merged, (weight + update).bfloat16())
    assert not torch.equal(merged, (weight.bfloat16() + update).bfloat16())


@pytest.mark.parametrize("requantize", [False, True], ids=["fp32", "nf4"])
@pytest.mark.parametrize("size", [1e25, float("nan")], ids=["B A beyond fp32", "NaN"])
def test_a_layer_that_would_not_be_finite_is_named(tiny, run, size, requantize):
    model = adapted(tiny, run)
    layer = model.model.layers[3].self_attn.v_proj
    for matrix in (layer.lora_A, layer.lora_B):
        torch.nn.init.constant_(matrix.weight, size)
    with pytest.raises(ValueError, match=r"model.layers.3.self_attn.v_proj.* is not finite in"):
        merge.merge(model, torch.float32, requantize, double_quant=requantize)


def test_a_sum_that_is_finite_in_fp32_alone_is_named(tiny, run):
    """B A is 65,536 everywhere; fp16 ends at 65,504."""
    model = adapted(tiny, run)
    layer = model.model.layers[0].self_attn.q_proj
    torch.nn.init.constant_(layer.lora_A.weight, 64.0)
    torch.nn.init.constant_(layer.lora_B.weight, 64.0)  # 2 * 8 * 64 * 64 = 65,536
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.* finite in torch.float16"):
        merge.merge(model, torch.float16)


def test_the_cost_of_a_large_adapter_is_a_number(tiny, run):
    """The squares of numbers of 1e22 are beyond fp32, where a norm would be infinite."""
    model = adapted(tiny, run)
    layer = model.model.layers[0].self_attn.q_proj
    torch.nn.init.constant_(layer.lora_A.weight, 1e11)
    torch.nn.init.constant_(layer.lora_B.weight, 1e11)
    update = 2 * 8 * torch.tensor(1e11).double() ** 2
    rounded = update.bfloat16().double()
    costs = merge.merge(model, torch.bfloat16)
    expected = abs((rounded - update) / update).item()
    assert costs["model.layers.0.self_attn.q_proj"] == pytest.approx(expected, rel=1e-3)


# -----------------------------------------------------------------------------
# The script


def test_an_adapter_beyond_what_is_stored_is_one_line_and_nothing_is_written(run, tmp_path):
    adapter = shutil.copytree(run, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        if "layers.2.self_attn.q_proj" in key:
            tensors[key] = torch.full_like(tensor, 1e30)  # finite, and B A is not
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(tensors, adapter / "adapter_model.safetensors", metadata)
    out = tmp_path / "merged"
    with pytest.raises(SystemExit, match="^error: .*layers.2.self_attn.q_proj.* not finite"):
        in_process(merge, "--adapter", adapter, "--out", out)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def merge_and_measure(run: Path, out: Path) -> dict:
    """Merges a run with its accuracy before and after. Returns the content of merge.json."""
    out.mkdir()  # an empty directory is as good as none
    options = ("--dataset", "tiny/data", "--limit", 20)
    in_process(merge, "--adapter", run, "--out", out, *options)
    return read_json(out / "merge.json")


def test_merge_writes_a_checkpoint_that_answers_as_the_run(run, tmp_path):
    out = tmp_path / "merged"
    cost = merge_and_measure(run, out)
    modes = {path.name: path.stat().st_mode for path in out.iterdir()}
    assert modes.keys() == {"config.json", "tokenizer.json", "model.safetensors", "merge.json"}
    assert len(set(modes.values())) == 1, "whoever may read one of them may read all"
    command = ("--model", out, "--dataset", "tiny/data", "--quant", "none", "--dtype", "fp32")
    in_process(evaluation, *command, "--limit", 20, "--out", tmp_path / "eval")
    again = read_json(tmp_path / "eval" / "results.json")["baseline"]
    for split, accuracy in cost["accuracy"].items():
        assert again[split]["accuracy"] == accuracy["merged"] == accuracy["adapter"]


def test_merge_says_what_it_cost(run, tmp_path, capsys):
    cost = merge_and_measure(run, tmp_path / "merged")
    printed = capsys.readouterr().out
    shares = cost["layers"].values()
    assert (cost["into"], cost["requantized"], len(shares)) == ("fp32", False, 12)
    assert cost["worst"] == max(shares) < 1e-5
    assert cost["mean"] == pytest.approx(sum(shares) / 12)
    for accuracy in cost["accuracy"].values():
        assert accuracy["n"] == 20
        assert f"{accuracy['merged']:.4f} merged" in printed

    for path in [*cost["layers"], "mean", "worst"]:
        assert f"  {path.removeprefix('model.')} " in printed
    assert "W dequantised from NF4, stored in fp32" in printed
    assert all(len(line) <= 79 for line in printed.splitlines()[:-1])


def test_the_rows_of_a_run_are_read_like_the_runs_and_the_printed_command_says_how(
    tmp_path, capsys
):
    rows = shutil.copytree(ROOT / "tiny" / "data", tmp_path / "rows")
    (rows / "validation_mismatched.jsonl").unlink()
    reading = ("--labels", "contradiction", "neutral", "entailment")
    command = ("--model", "tiny/model", "--dataset", rows, *reading, "--limit", 4)
    short = ("--eval-limit", 2, "--steps", 1, "--max-new-tokens", 1)
    in_process(train, *command, *short, "--out", tmp_path / "run")
    measured = ("--dataset", rows.rename(tmp_path / "moved"), "--limit", 4)
    for number, dataset in enumerate([(), measured]):
        out = tmp_path / f"merged {number}"
        capsys.readouterr()
        in_process(merge, "--adapter", tmp_path / "run", *dataset, "--out", out)
        printed = capsys.readouterr()
        assert "not used" not in printed.err
        words = shlex.split(printed.out.splitlines()[-1].split("try: ")[1])
        expected = ["--model", str(out), "--dataset", str(dataset[1] if dataset else rows)]
        assert words == ["python", "eval.py", "--quant", "none", *expected, *reading]
    accuracy = read_json(out / "merge.json")["accuracy"]
    assert accuracy["validation_matched"]["n"] == 4


@pytest.mark.parametrize("flag", [("--limit", 4), ("--validation", 0.5)], ids=str)
def test_flags_on_rows_are_refused_where_no_rows_are_read(run, tmp_path, capsys, flag):
    with pytest.raises(SystemExit):
        in_process(merge, "--adapter", run, "--out", tmp_path / "merged", *flag)
    assert f"error: {flag[0]} is for the accuracy on a --dataset" in capsys.readouterr().err


def test_merge_says_how_many_prompts_are_cut(run, tmp_path, capsys):
    (tmp_path / "rows").mkdir()
    pair = {"premise": "A man sleeps.", "hypothesis": "A man rests.", "label": 0}
    longer = pair | {"premise": "A man sleeps." * 20}
    lines = [json.dumps(row) + "\n" for row in (pair, longer, longer)]
    (tmp_path / "rows" / "validation.jsonl").write_text("".join(lines))
    out = tmp_path / "merged"
    measured = ("--dataset", tmp_path / "rows", "--max-length", 90)
    in_process(merge, "--adapter", run, "--out", out, *measured)
    assert read_json(out / "merge.json")["accuracy"]["validation"]["cut"] == 2
    assert " merged, 3 rows, 2 cut\n" in capsys.readouterr().out


def test_any_peft_adapter_of_a_base_on_the_hub_is_merged_with_all_files_of_its_tokenizer(
    run, tiny, tmp_path
):
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # and no args.json
        shutil.copy(run / name, adapter)
    out = tmp_path / "merged"
    with serving({"models/me/base": base}) as (address, requests):
        hub = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        options = ("--model", "me/base", "--dtype", "fp32", "--out", out)
        done = script("-m", "scripts.merge", "--adapter", adapter, *options, env=hub)
    assert done.returncode == 0, done.stderr
    assert not any("datasets/" in request for request in requests), "no rows are needed"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert read_json(out / "merge.json")["accuracy"] == {}


def test_merging_into_nf4_is_refused_with_the_reason_unless_asked_for(run, tmp_path, capsys):
    out = tmp_path / "merged"
    command = ("--adapter", run, "--out", out, "--into", "nf4")
    with pytest.raises(SystemExit, match="erases most of a small update"):
        in_process(merge, *command)
    assert not out.exists()
    in_process(merge, *command, "--requantize")
    assert "requantising has erased" in capsys.readouterr().out
    assert read_json(out / "merge.json")["requantized"]
    with pytest.raises(SystemExit, match="exists already"):
        in_process(merge, *command, "--requantize")


def test_a_merge_that_ends_early_leaves_nothing(tiny, tmp_path, monkeypatch):
    """The disk is full when the last file is written."""

    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        merge.write_model(ours(tiny, torch.float32), tiny, tmp_path, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        ([], 2, "the following arguments are required: --adapter, --out"),
        (["--adapter", "x"], 2, "the following arguments are required: --out"),
        (["--adapter", "x", "--out", "y"], 1, "no adapter directory 'x'"),
        (["--adapter", "tiny", "--out", "y"], 1, "is not an adapter"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, status, message):
    with pytest.raises(SystemExit) as stopped:
        in_process(merge, *arguments)
    if status == 2:
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
    else:
        (line,) = stopped.value.code.splitlines()
        assert capsys.readouterr().err == ""
    assert line.startswith("error: ") and message in line


def test_requantize_alone_is_a_mistake(run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        in_process(merge, "--adapter", run, "--out", tmp_path / "merged", "--requantize")
    assert "--requantize goes with --into nf4" in capsys.readouterr().err
