"""What leaves a run for others: a merged checkpoint, a model card, an upload to the Hub.

Read it after lora.py and eval.py. Merging costs something, and what it costs is measured where it is done: W + B A is rounded to
the type it is kept in. An adapter that was trained over NF4 is merged into the values that the codes stand for, not into the
16-bit weights they were made from: it has learnt beside the former, and the latter differ by more than the adapter does.

    python lora.py merge --adapter out/demo --out out/merged --dataset tiny/data
    python lora.py push --adapter out/demo --repo me/phi-2-mnli
"""
import itertools
import json
import os
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import data
import eval as evaluation
import lora
import phi2
import quant
import report

PROMPTS = 32  # on which the error of a merge is measured
BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
          "generation_config.json")  # copied from the base where they are
UPLOADED = ["README.md", "adapter_config.json", "adapter_model.safetensors", "results.json", "metrics.jsonl", *report.PICTURES]
ERASED = ("merging into NF4 rounds W + B A to the 16 levels of its block again, which erases most of a small update: "
          "merge into bf16, or add --requantize to do it all the same and to see how much is lost")


# ---------------------------------------------------------------------------------------------------------
# Merging

def requantized(weight: Tensor) -> Tensor:
    """The values that NF4 codes made of a weight (out, in) stand for."""
    layer = quant.NF4Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.load_state_dict({"weight": weight}, strict=False, assign=True)
    return layer.to(weight.device).dequantize()


@torch.no_grad()
def merge(model: phi2.Phi2, prompts: list[list[int]], dtype: torch.dtype, requantize: bool = False) -> dict[str, dict[str, float]]:
    """Merges the adapters of a model in place, into `dtype`; {layer: {"output", "update"}}, what that costs each on `prompts`.

    The cost is the norm of x (W' - W - scale B A)^T over all inputs x that the layer has in the model as it was trained, computed in
    fp32: relative to that of its output, and to that of the adapter's own part in it. With `requantize` W' is rounded to NF4.
    """
    merged, sums, hooks = {}, {}, []

    def measure(layer, inputs, _, path, base, update):
        x = inputs[0].float()
        parts = (x @ (merged[path].float() - base - update).T, x @ (base + update).T + layer.base_layer.bias.float(), x @ update.T)
        sums[path] += torch.stack([part.double().square().sum().cpu() for part in parts])
    for path, layer in [(path, module) for path, module in model.named_modules() if isinstance(module, lora.LoRALinear)]:
        base = layer.base_layer.dequantize() if isinstance(layer.base_layer, quant.NF4Linear) else layer.base_layer.weight
        base, update = base.float(), layer.scale * layer.lora_B.weight @ layer.lora_A.weight
        merged[path], sums[path] = (base + update).to(dtype), torch.zeros(3, dtype=torch.float64)
        if requantize:
            merged[path] = requantized(merged[path])
        hooks.append(layer.register_forward_hook(partial(measure, path=path, base=base, update=update)))
    for prompt in prompts:
        model(torch.tensor([prompt], device=model.lm_head.weight.device))
    for hook in hooks:
        hook.remove()
    quant.dequantize_linears(model, dtype)
    for path, weight in merged.items():
        model.get_submodule(path).base_layer.weight.data = weight
    quant.replace(model, lora.LoRALinear, lambda layer: layer.base_layer)
    model.to(dtype)
    return {path: {"output": float((error / output).sqrt()), "update": float((error / update).sqrt())}
            for path, (error, output, update) in sums.items()}


def write_model(model: phi2.Phi2, base: Path, out: Path, files: dict[str, dict], shard: str = "5GB") -> None:
    """A checkpoint in phi-2's layout that transformers loads: complete at `out`, or not there. `files`: more JSON to write."""
    from huggingface_hub import save_torch_state_dict
    raw, dtype = checkpoint.read_json(base / "config.json"), str(model.lm_head.weight.dtype).removeprefix("torch.")
    raw = {key: value for key, value in raw.items() if key not in ("dtype", "torch_dtype")} if raw["model_type"] == "phi" else {}
    config = raw | asdict(model.config) | {"architectures": ["PhiForCausalLM"], "model_type": "phi", "torch_dtype": dtype}
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        save_torch_state_dict(model.state_dict(), temporary, max_shard_size=shard)
        for name in BESIDE:
            if (base / name).is_file():
                shutil.copy(base / name, temporary)
        for name, content in (files | {"config.json": config}).items():
            checkpoint.write_json(temporary / name, content)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def run_merge(args) -> None:
    if args.into == "nf4" and not args.requantize:
        raise ValueError(ERASED)
    if args.out.exists():
        raise ValueError(f"{args.out} is there already: choose another --out, or remove it")
    directory = checkpoint.locate(args.model)
    tokenizer = data.load_tokenizer(directory)
    dtype = evaluation.DTYPES[args.dtype if args.into in (None, "nf4") else args.into]
    model = evaluation.load_model(directory, args.quant, evaluation.DTYPES[args.dtype], args.device, args.double_quant).eval()
    lora.load_adapter(model, args.adapter, None if args.force else checkpoint.fingerprint(model, tokenizer, data.PROMPT, args))
    splits = {split: data.load_examples(args.dataset, split, args.limit) for split in data.validation_splits(args.dataset)}
    prompts = [data.encode(example, tokenizer, args.max_length)[0] for example in itertools.islice(next(iter(splits.values())), PROMPTS)]

    def accuracies(stage: str) -> dict[str, float]:
        return {split: evaluation.evaluate(model, tokenizer, examples, max_length=args.max_length, desc=f"{stage}, {split}")[0]["accuracy"]
                for split, examples in splits.items()} if args.measure else {}
    before, errors, after = accuracies("adapter"), merge(model, prompts, dtype, args.requantize), accuracies("merged")
    cost = {"into": args.into or args.dtype, "requantized": args.requantize, "prompts": len(prompts), "layers": errors,
            "accuracy": {split: {"adapter": before[split], "merged": after[split], "n": len(splits[split])} for split in before}}
    write_model(model, directory, args.out, {"merge.json": cost})
    print(f"{len(errors)} layers merged. The change of a layer's output, on {len(prompts)} prompts, mean and worst:")
    for key, name in (("output", "of the output"), ("update", "of the adapter's part in it")):
        worst = max(errors, key=lambda path: errors[path][key])
        mean = sum(error[key] for error in errors.values()) / len(errors)
        print(f"  {name:27} {mean:8.4%} {errors[worst][key]:8.4%}  {worst.removeprefix('model.')}")
    for split, found in cost["accuracy"].items():
        print(f"  {split:22} {found['adapter']:.4f} with the adapter, {found['merged']:.4f} merged, {found['n']:,} rows")
    if args.requantize:
        print("What of the adapter's part has changed is what requantising has erased of it.")
    print(f"the merged model is in {args.out}")


# ---------------------------------------------------------------------------------------------------------
# The model card and the Hub

CARD = """# {title}

A LoRA adapter (rank {rank}, alpha {alpha}, on {targets}) for {base}, trained on {dataset} to answer whether a premise entails a
hypothesis (0), says nothing of it (1), or contradicts it (2). The base was frozen, {quantization}.

## Use

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {base_literal}
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.{dtype}), {repo_literal})
prompt = {prompt}.format(premise="Anna bought a rose.", hypothesis="Anna bought a flower.")
ids = tokenizer(prompt, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=2)[0, ids["input_ids"].shape[1]:]))
```

The prompt ends right after `### Label:`, without a space; the answer is ` 0`, ` 1` or ` 2` and then the end of text.

## Results

{results}

Greedy generation, the first number read; completions without a number count as wrong. The interval is Wilson's.

## Training

{training}
"""


def hub_id(name) -> str | None:
    """`name` if it can be a repository on the Hub, and is no directory here."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id
    try:
        validate_repo_id(name)
    except (HFValidationError, TypeError):
        return None
    return name if name.count("/") == 1 and not Path(name).exists() else None


def plain(value) -> str:
    """A user's text within Markdown: one line, without what would be markup. Of a path from the root or the home, the last part alone."""
    text = Path(str(value)).name if str(value).startswith(("/", "~", "..")) else str(value)
    return "".join(character if character.isalnum() or character in " ._-/+" else "?" for character in text)


def card(directory: Path, repo: str | None = None) -> str:
    """The README.md of a run, with metadata as the Hub reads it. A base or a dataset that is a directory is named without its path."""
    from huggingface_hub import EvalResult, ModelCardData
    args, config = (checkpoint.read_json(directory / name) for name in ("args.json", "adapter_config.json"))
    results = checkpoint.read_json(directory / "results.json") if (directory / "results.json").is_file() else {}
    base, dataset = hub_id(args["model"]), hub_id(args["dataset"])
    evaluations = [EvalResult(
        task_type="text-classification", task_name="Natural language inference", dataset_type=dataset or plain(args["dataset"]),
        dataset_name=plain(args["dataset"]), dataset_config="mnli" if dataset == "nyu-mll/glue" else None, dataset_split=plain(split),
        metric_type="accuracy", metric_value=found["accuracy"]) for split, found in results.get("finetuned", {}).items()]
    name = plain(repo or directory.name) or "adapter"
    metadata = ModelCardData(
        language="en", base_model=base, library_name="peft", datasets=[dataset] if dataset else None, metrics=["accuracy"],
        pipeline_tag="text-generation", tags=["lora", "nli"] + ["qlora"] * (args["quant"] == "nf4"), model_name=name,
        eval_results=evaluations or None)
    lines = ["| stage | split | accuracy | 95 % interval | rows | unparsed |", "|---|---|---|---|---|---|"]
    for stage, split, found in report.stages(results):
        interval = "{:.4f} to {:.4f}".format(*found["ci95"]) if "ci95" in found else ""
        lines.append(f"| {stage} | {plain(split)} | {found['accuracy']:.4f} | {interval} | {found['n']:,} | {found['unparsed']:,} |")
    told = ("rank", "alpha", "dropout", "targets", "quant", "double_quant", "dtype", "steps", "epochs", "batch_size", "accumulate",
            "learning_rate", "weight_decay", "warmup_steps", "max_length", "loss", "limit", "seed", "ranks")
    known = {key: args[key] for key in told if args.get(key) not in (None, False)}
    known["targets"] = " ".join(args["targets"])
    training = ", ".join(f"{key.replace('_', ' ')} {plain(value)}" for key, value in known.items())
    versions = ", ".join(f"{plain(key)} {plain(value)}" for key, value in args.get("versions", {}).items())
    text = CARD.format(
        title=name, rank=plain(config["r"]), alpha=plain(config["lora_alpha"]), targets=plain(known["targets"]),
        base=plain(args["model"]), dataset=plain(args["dataset"]),
        quantization="quantised to NF4" if args["quant"] == "nf4" else f"in {plain(args['dtype'])}",
        base_literal=json.dumps(base or f"path/to/{Path(plain(args['model'])).name}"),
        repo_literal=json.dumps(repo or "path/to/this/folder"),
        dtype="bfloat16" if args["dtype"] == "bf16" else "float32", prompt=json.dumps(data.PROMPT), results="\n".join(lines),
        training=f"{training}. Versions: {versions}.")
    return f"---\n{metadata.to_yaml()}\n---\n\n{text}"


def write_card(directory: Path, repo: str | None = None) -> None:
    with checkpoint.replacing(Path(directory) / "README.md") as temporary:
        temporary.write_text(card(Path(directory), repo), encoding="utf-8")


def push(directory: Path, repo: str, private: bool = False) -> str:
    """Uploads adapter, card and results of a run to the Hub, and gives their address; no rows of the data, nothing to resume.

    Raises ValueError, in one line, when it cannot.
    """
    from huggingface_hub import HfApi
    for name in ("adapter_model.safetensors", "args.json"):
        if not (directory / name).is_file():
            raise ValueError(f"{directory} holds no run: it has no {name}")
    write_card(directory, repo)
    try:
        HfApi().create_repo(repo, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=directory, allow_patterns=UPLOADED, commit_message="An adapter of FLoRA")
    except Exception as error:  # huggingface_hub's own errors and those of the HTTP library under it have no class in common
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
        raise ValueError(f"cannot upload to {repo} ({reason}); log in with `hf auth login`, or set HF_TOKEN to a token that may write "
                         "there") from None
    return f"{HfApi().endpoint}/{repo}"


def main() -> None:
    parser = data.Parser("python lora.py merge, or python lora.py push: a run for others", usage="python lora.py {merge,push} ...")
    parser.add_argument("what", nargs="?", choices=["merge", "push"])
    evaluation.add_model_arguments(parser)
    parser.add_argument("--adapter", type=Path, help="the folder of a run, or any PEFT LoRA adapter")
    group = parser.add_argument_group("merge")
    group.add_argument("--out", type=Path, help="a new folder for the merged model")
    group.add_argument("--into", choices=["bf16", "fp32", "nf4"], help="how the merged weights are kept (default: as the run's --dtype)")
    group.add_argument("--requantize", action="store_true", help="with --into nf4: round to NF4 again, and show how much that erases")
    group.add_argument("--limit", type=int, help="first rows of each validation split only")
    group.add_argument("--force", action="store_true", help="take an adapter of another base too")
    group = parser.add_argument_group("push")
    group.add_argument("--repo", help="owner/name on the Hub; it is made if it is not there")
    group.add_argument("--private", action="store_true", help="make it a private one")
    given = parser.parse_args()
    if given.what is None or given.adapter is None:
        parser.error("say merge or push, and --adapter RUN")
    for what, flag in (("merge", "out"), ("push", "repo")):
        if given.what == what and getattr(given, flag) is None:
            parser.error(f"{what} needs --{flag}")
    if given.requantize and given.into != "nf4":
        parser.error("--requantize goes with --into nf4")
    checkpoint.set_defaults(parser, checkpoint.trained_with(given.adapter), given.adapter)
    args = data.parse_arguments(parser)
    args.measure = given.dataset is not None
    if args.what == "merge":
        run_merge(args)
    else:
        print(push(args.adapter, args.repo, args.private))
