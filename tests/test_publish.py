"""What leaves a run for others: a merged model that transformers loads, a card that the Hub reads, an upload that comes back."""
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, distance, in_process, ours, read_json, reference, script
from hub import TOKEN, serving
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import data
import eval as evaluation
import lora
import merge
import phi2
import publish


def environment(address: str, home, token: str | None = TOKEN) -> dict[str, str]:
    found = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return found | ({"HF_TOKEN": token} if token else {})


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def run(tmp_path_factory, uploads):
    """A real run over NF4, in fp32, of a model and a dataset given by paths from the root; it uploads itself at its end."""
    out = tmp_path_factory.mktemp("run") / "run"
    with serving({}, uploads) as (address, _):
        done = script("train.py", "--model", ROOT / "tiny/model", "--dataset", ROOT / "tiny/data", "--steps", 40, "--batch-size", 32, "--learning-rate", 3e-3, "--dtype", "fp32",
                      "--eval-limit", 20, "--max-new-tokens", 2, "--out", out, "--push", "me/trained", env=environment(address, tmp_path_factory.mktemp("home")))
    assert done.returncode == 0 and "uploaded to http://127.0.0.1" in done.stdout, done.stderr
    return out


@pytest.fixture(scope="module")
def prompts(tiny):
    tokenizer = data.load_tokenizer(tiny)
    return [data.encode(example, tokenizer)[0] for example in data.load_examples("tiny/data", "validation_matched", 8)]


def adapted(tiny, run, quantization="nf4"):
    model = ours(tiny, torch.float32, quantization)
    lora.load_adapter(model, run)
    return model.eval()


# ---- Merging

@pytest.mark.parametrize("shard", ["5GB", "2MB"])
@torch.no_grad()
def test_transformers_loads_a_merged_model_and_gives_the_logits_of_base_and_adapter(run, tiny, tmp_path, prompts, shard):
    """In fp32 within 1e-5, as two orders of summation differ; one file, and shards with an index."""
    model = adapted(tiny, run)
    expected = [model(torch.tensor([prompt])) for prompt in prompts]
    merge.merge(model, prompts, torch.float32)
    merge.write_model(model, tiny, tmp_path / "merged", {}, shard)
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file() == (shard == "2MB")
    theirs = reference(tmp_path / "merged", torch.float32)
    assert {key: value.shape for key, value in theirs.state_dict().items()} == {key: value.shape for key, value in phi2.build(str(tiny)).state_dict().items()}
    again = ours(tmp_path / "merged", torch.float32)
    for prompt, logits in zip(prompts, expected):
        assert distance(theirs(torch.tensor([prompt])).logits, logits) < 1e-5 and distance(again(torch.tensor([prompt])), logits) < 1e-5
    base = ours(tiny, torch.float32, "nf4")
    assert distance(base(torch.tensor([prompts[0]])), expected[0]) > 0.02, "the adapter must matter, or this test says nothing"


@pytest.mark.parametrize("dtype, requantize, double", [(torch.bfloat16, False, False), (torch.float32, True, False), (torch.float32, True, True)], ids=["bf16", "nf4", "nf4-double"])
@torch.no_grad()
def test_the_cost_of_merging_is_what_the_weights_say(run, tiny, prompts, dtype, requantize, double):
    """Each figure once more in fp64, from the adapter's file, transformers' quantised base, and the inputs of PEFT's layers in it."""
    import bitsandbytes.functional as bnb
    from peft import PeftModel
    theirs = PeftModel.from_pretrained(reference(tiny, torch.float32, "nf4"), run)
    layers = {path.removeprefix("base_model.model."): module for path, module in theirs.named_modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")}
    inputs = {path: [] for path in layers}
    for path, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, path=path: inputs[path].append(args[0].flatten(0, -2)))
    for prompt in prompts:
        theirs(torch.tensor([prompt]))
    found = merge.merge(adapted(tiny, run), prompts, dtype, requantize, double)
    assert found.keys() == layers.keys()
    for path, layer in layers.items():
        x, weight = torch.cat(inputs[path]).double(), bnb.dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state)
        delta = 2 * layer.lora_B.default.weight @ layer.lora_A.default.weight  # alpha 16, rank 8
        merged = (weight + delta).to(dtype)
        if requantize:
            merged = bnb.dequantize_4bit(*bnb.quantize_4bit(merged, blocksize=64, quant_type="nf4", compress_statistics=double))
        error, output = x @ (merged.double() - weight.double() - delta.double()).T, x @ (weight + delta).double().T + layer.base_layer.bias.double()
        assert found[path]["output"] == pytest.approx((error.norm() / output.norm()).item(), rel=1e-3)
        assert found[path]["update"] == pytest.approx((error.norm() / (x @ delta.double().T).norm()).item(), rel=1e-3)
    worst = max(error["update"] for error in found.values())
    assert worst > 0.05 if requantize else 1e-4 < worst < 0.02, "rounding to 8 bits of mantissa costs little, to 4 bits much"


def test_merge_writes_a_checkpoint_that_answers_as_the_run_and_says_what_it_cost(run, tmp_path, capsys):
    (tmp_path / "merged").mkdir()  # an empty folder is as good as none
    in_process(publish, "merge", "--adapter", run, "--out", tmp_path / "merged", "--dataset", "tiny/data", "--limit", 20)
    printed = capsys.readouterr().out
    files = {path.name: path.stat().st_mode for path in (tmp_path / "merged").iterdir()}
    assert files.keys() == {"config.json", "tokenizer.json", "model.safetensors", "merge.json"} and len(set(files.values())) == 1, "whoever may read one may read all"
    cost = read_json(tmp_path / "merged" / "merge.json")
    assert len(cost["layers"]) == 12 and (cost["into"], cost["prompts"]) == ("fp32", 32) and cost["worst"]["output"] < 1e-5
    for key in ("output", "update"):
        layers = [error[key] for error in cost["layers"].values()]
        assert cost["worst"][key] == max(layers) and cost["mean"][key] == pytest.approx(sum(layers) / 12)
    for found in cost["accuracy"].values():
        assert found["n"] == 20 and found["adapter"] == found["merged"] and f"{found['merged']:.4f} merged" in printed
    assert all(f"  {path.removeprefix('model.')}" in printed for path in [*cost["layers"], "mean", "worst"])
    assert "as the NF4 codes say, kept in float32" in printed and all(len(line) <= 79 for line in printed.splitlines()[:-1])
    in_process(evaluation, "--model", tmp_path / "merged", "--dataset", "tiny/data", "--quant", "none", "--dtype", "fp32", "--limit", 20, "--out", tmp_path / "eval")
    again = read_json(tmp_path / "eval" / "results.json")["baseline"]
    assert {split: result["accuracy"] for split, result in again.items()} == {split: found["merged"] for split, found in cost["accuracy"].items()}


def test_any_peft_adapter_of_a_base_on_the_hub_is_merged_with_all_that_belongs_to_its_tokenizer(run, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # and no args.json
        shutil.copy(run / name, tmp_path / "adapter")
    with serving({"models/me/base": tmp_path / "base"}) as (address, requests):
        done = script("lora.py", "merge", "--adapter", tmp_path / "adapter", "--model", "me/base", "--dtype", "fp32", "--out", tmp_path / "merged", env=environment(address, tmp_path / "home"))
    assert done.returncode == 0 and not any("datasets/" in request for request in requests), done.stderr
    names = {"tokenizer.json", "tokenizer_config.json"}
    assert all((tmp_path / "merged" / name).read_bytes() == (tmp_path / "base" / name).read_bytes() for name in names)
    cost = read_json(tmp_path / "merged" / "merge.json")
    assert (cost["dataset"], cost["prompts"], cost["accuracy"]) == ("data", 32, {})


def test_merging_into_nf4_is_refused_with_the_reason_unless_asked_for(run, tmp_path, capsys):
    command = ("merge", "--adapter", run, "--out", tmp_path / "merged", "--into", "nf4")
    with pytest.raises(SystemExit, match="erases most of a small update"):
        in_process(publish, *command)
    assert not (tmp_path / "merged").exists()
    in_process(publish, *command, "--requantize")
    assert "what requantising has erased" in capsys.readouterr().out and read_json(tmp_path / "merged" / "merge.json")["requantized"]
    with pytest.raises(SystemExit, match="is there already"):
        in_process(publish, *command, "--requantize")


def test_a_merge_that_ends_early_leaves_nothing(run, tiny, tmp_path, monkeypatch):
    """The disk is full when the last file is written."""
    def full(path, value):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        merge.write_model(ours(tiny, torch.float32), tiny, tmp_path / "merged", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments, message", [([], "say merge or push"), (["merge"], "merge needs --adapter"), (["merge", "--adapter", "x", "--out", "y"], "there is no such folder"), (["merge", "--adapter", "x"], "merge needs --out"),
                                                (["push", "--adapter", "x"], "push needs --repo"), (["push", "--adapter", "x", "--repo", "me"], "is no repository on the Hub"), (["merge", "--adapter", "x", "--out", "y", "--requantize"], "goes with --into nf4"),
                                                (["merge", "--adapter", "tiny", "--out", "y"], "is not an adapter")])
def test_a_mistake_is_one_line(arguments, message):
    done = script("lora.py", *arguments)
    assert done.returncode in (1, 2) and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


# ---- The card

def metadata_of(text: str):
    from huggingface_hub import ModelCard
    return ModelCard(text).data


def test_the_card_is_one_the_hub_reads(run):
    from huggingface_hub import ModelCard
    found, results = ModelCard.load(run / "README.md").data, read_json(run / "results.json")
    assert (found.library_name, found.metrics, found.base_model, found.datasets) == ("peft", ["accuracy"], None, None)  # directories are no names on the Hub
    assert {(result.dataset_split, result.metric_type, result.metric_value) for result in found.eval_results} == {
        (split, "accuracy", result["accuracy"]) for split, result in results["finetuned"].items()}


def altered(run, copy, model, dataset):
    """A copy of the run that says it was of another model and dataset."""
    shutil.copytree(run, copy)
    checkpoint.write_json(copy / "args.json", read_json(run / "args.json") | {"model": model, "dataset": dataset})
    checkpoint.write_json(copy / "adapter_config.json", read_json(run / "adapter_config.json") | {"base_model_name_or_path": model})
    return copy


def test_a_base_and_a_dataset_of_the_hub_are_named(run, tmp_path):
    found = metadata_of(publish.card(altered(run, tmp_path / "run", "microsoft/phi-2", "nyu-mll/glue")))
    assert (found.base_model, found.datasets) == ("microsoft/phi-2", ["nyu-mll/glue"]) and {result.dataset_config for result in found.eval_results} == {"mnli"}


@pytest.mark.parametrize("path", ["/home/SECRET/x", "~SECRET/x", "~/SECRET/x", "../SECRET/x", "./../../SECRET/x", "SECRET/a/x", "file:///home/SECRET/x", "C:\\Users\\SECRET\\x", "C:/SECRET/x",
                                  "\\\\SECRET\\share\\x", "/home/SECRET/x/", "/home/SECRET/"])
def test_no_part_of_a_path_but_the_last_is_in_what_is_uploaded(run, tmp_path, path):
    copy = altered(run, tmp_path / "run", path, path)
    (tmp_path / "staged").mkdir()
    publish.stage(copy, "me/adapter", tmp_path / "staged")
    last = path.rstrip("/").split("/")[-1].split("\\")[-1]
    assert read_json(tmp_path / "staged" / "adapter_config.json")["base_model_name_or_path"] == last and metadata_of(publish.card(copy)).base_model is None
    for file in (tmp_path / "staged").iterdir():
        assert b"SECRET" not in file.read_bytes() or last == "SECRET"


def test_a_path_that_looks_like_a_name_on_the_hub_is_known_by_what_lies_above_the_run(run, tmp_path, monkeypatch):
    (tmp_path / "my" / "pairs").mkdir(parents=True)
    copy = altered(run, tmp_path / "out" / "run", "my/pairs", "my/pairs")
    monkeypatch.chdir("/")
    found = metadata_of(publish.card(copy))
    assert (found.base_model, found.datasets) == (None, None) and "my/pairs" not in publish.card(copy)


@given(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=40))
@settings(deadline=None, max_examples=60)
def test_no_name_breaks_the_card(run, tmp_path_factory, model, dataset):
    found = metadata_of(publish.card(altered(run, tmp_path_factory.mktemp("copy") / "run", model, dataset)))
    assert found.library_name == "peft" and len(found.eval_results) == 2


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["accuracy", "n", "unparsed", "ci95", "finetuned", "baseline", "validation_matched"]), inner, max_size=4), max_leaves=8)


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_any_files_of_a_run_give_a_card_or_one_line(run, tmp_path_factory, draw):
    """A key of one of the three files is missing, or holds something else."""
    copy = tmp_path_factory.mktemp("copy") / "run"
    copy.mkdir()
    files = {name: read_json(run / name) for name in ("args.json", "adapter_config.json", "results.json")}
    name = draw.draw(st.sampled_from(sorted(files)))
    key = draw.draw(st.sampled_from(sorted(files[name])))
    if draw.draw(st.booleans()):
        del files[name][key]
    else:
        files[name][key] = draw.draw(VALUES)
    for name, content in files.items():
        checkpoint.write_json(copy / name, content)
    try:
        assert metadata_of(publish.card(copy)).library_name == "peft"
    except ValueError as error:
        assert str(copy) in str(error) and "\n" not in str(error)


def test_an_args_json_without_its_keys_is_one_line(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    checkpoint.write_json(tmp_path / "run" / "args.json", {"rank": 8})
    done = script("lora.py", "push", "--adapter", tmp_path / "run", "--repo", "me/adapter")
    assert done.returncode == 1 and "is not as train.py writes it" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_the_code_on_the_card_runs(run, tiny, tmp_path):
    code = (run / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "path/to/model" in code
    shutil.copytree(tiny, tmp_path / "base")  # a tokenizer_config.json is what transformers needs beside tokenizer.json
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert "load_in_4bit" in code, "the results are over NF4"
    code = code.replace('"path/to/model"', repr(str(tmp_path / "base"))).replace('"path/to/this/folder"', repr(str(run)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model = evaluation.load_model(tiny, "nf4", torch.float32, "cpu").eval()
    lora.load_adapter(model, run)
    tokenizer = data.load_tokenizer(tiny)
    prompt = tokenizer.encode(data.PROMPT.format(premise="Anna bought a rose.", hypothesis="Anna bought a flower.")).ids
    expected, _ = evaluation.generate(model, [prompt], 2, tokenizer.token_to_id(data.EOS), tokenizer.get_vocab_size())
    assert done.stdout.strip().removesuffix(data.EOS) == tokenizer.decode(expected[0]).strip()


# ---- The Hub

def test_what_is_pushed_comes_back_byte_for_byte_and_answers(run, uploads, tmp_path):
    with serving({}, tmp_path / "uploads") as (address, requests):
        done = script("lora.py", "push", "--adapter", run, "--repo", "me/adapter", env=environment(address, tmp_path / "home"))
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith("/me/adapter") and any("/lfs/" in request and request.startswith("PUT") for request in requests)
        fetched = script("-c", f"from huggingface_hub import snapshot_download; print(snapshot_download('me/adapter', local_dir={str(tmp_path / 'back')!r}))",
                         env=environment(address, tmp_path / "home"))
        assert fetched.returncode == 0, fetched.stderr
    names = {path.name for path in (tmp_path / "back").iterdir() if path.is_file()}
    assert names == set(publish.UPLOADED), "nothing of the rows, nothing to resume"
    for name in names:
        content = (tmp_path / "back" / name).read_bytes()
        assert TOKEN.encode() not in content and str(ROOT).encode() not in content and str(run.parent).encode() not in content
        assert name == "README.md" or content == (uploads / "me" / "trained" / name).read_bytes(), "train.py --push uploads the same"
        assert name in ("README.md", "args.json", "adapter_config.json") or content == (run / name).read_bytes()
    assert '"me/adapter"' in (tmp_path / "back" / "README.md").read_text() and '"path/to/this/folder"' in (run / "README.md").read_text()
    assert publish.card(tmp_path / "back") == publish.card(run).replace("# run", "# back").replace("model-index:\n- name: run", "model-index:\n- name: back")
    done = script("eval.py", "--adapter", tmp_path / "back", "--model", "tiny/model", "--dataset", "tiny/data", "--limit", 8)
    assert done.returncode == 0 and "12/12 modules adapted" in done.stdout, done.stderr


def test_a_card_that_somebody_has_written_is_uploaded_as_it_is(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text("# Mine\n")
    (tmp_path / "staged").mkdir()
    publish.stage(tmp_path / "run", "me/adapter", tmp_path / "staged")
    assert (tmp_path / "staged" / "README.md").read_text() == (tmp_path / "run" / "README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_without_the_right_token_it_is_one_line_that_says_what_to_do(run, tmp_path, token):
    with serving({}, tmp_path / "uploads") as (address, _):
        done = script("lora.py", "push", "--adapter", run, "--repo", "me/adapter", env=environment(address, tmp_path / "home", token))
    assert done.returncode == 1 and "cannot upload to me/adapter" in done.stderr and "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr and "hf_wrong" not in done.stderr


@pytest.mark.parametrize("offline", ["0", "1"])
def test_without_a_connection_it_is_one_line_that_does_not_blame_the_token(run, tmp_path, offline):
    with serving({}) as (address, _):
        pass  # the address is now one where nobody listens
    done = script("lora.py", "push", "--adapter", run, "--repo", "me/adapter", env=environment(address, tmp_path / "home") | {"HF_HUB_OFFLINE": offline})
    assert done.returncode == 1 and "cannot upload to me/adapter" in done.stderr and "try again with: python lora.py push" in done.stderr
    assert "Traceback" not in done.stderr and "log in" not in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
