"""What leaves a run for others: a model card, and an upload to the Hub. Nothing in it tells of the machine it was made on.

    python lora.py push --adapter out/demo --repo me/phi-2-mnli
"""
import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path

import checkpoint
import data
import eval as evaluation
import merge
import report

UPLOADED = ["README.md", "adapter_config.json", "adapter_model.safetensors", "args.json", "results.json", "metrics.jsonl", *report.PICTURES]
TOLD = ("rank", "alpha", "dropout", "quant", "double_quant", "dtype", "steps", "epochs", "batch_size", "accumulate", "learning_rate",
        "weight_decay", "warmup_steps", "max_length", "loss", "limit", "seed", "ranks")  # of args.json, to others

CARD = """# {title}

A LoRA adapter (rank {rank}, alpha {alpha}, on {targets}) for {base}, trained on {dataset} to answer whether a premise entails a
hypothesis (0), says nothing of it (1), or contradicts it (2). The base was frozen, {quantization}; the results are over such a base.

## Use

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer{bits}

name = {base_literal}
tokenizer = AutoTokenizer.from_pretrained(name)
base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.{dtype}{options})
model = PeftModel.from_pretrained(base, {repo_literal})
prompt = {prompt}.format(premise="Anna bought a rose.", hypothesis="Anna bought a flower.")
ids = tokenizer(prompt, return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=2)[0, ids["input_ids"].shape[1]:]))
```

The prompt ends right after `### Label:`, without a space; the answer is ` 0`, ` 1` or ` 2` and then the end of text.

## Results

{results}

Greedy generation, the first number read; completions without a number count as wrong. The interval is Wilson's.

## Training

{training}
"""
OPTIONS = """, quantization_config=BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant={double}, bnb_4bit_compute_dtype=torch.{dtype})"""


def is_name(name) -> bool:
    """Whether `name` has the form of a repository on the Hub, owner/name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id
    try:
        validate_repo_id(name)
    except (HFValidationError, TypeError):
        return False
    return name.count("/") == 1


def repository(name: str) -> str:
    """What --repo and --push take. Raises ArgumentTypeError for what can't be a repository."""
    if not is_name(name):
        raise argparse.ArgumentTypeError(f"{name!r} is no repository on the Hub: owner/name, of letters, digits, - _ and .")
    return name


def on_hub(name, directory: Path) -> bool:
    """Whether a model or a dataset of the run in `directory` is one of the Hub, and no path."""
    return is_name(name) and not Path(checkpoint.above(name, directory)).is_dir()


def public(name, directory: Path) -> str:
    """Its name for others: owner/name as on the Hub, but of a path, on whatever system, the last part alone."""
    return name if on_hub(name, directory) else re.split(r"[\\/]", str(name).rstrip("\\/"))[-1] or "unnamed"


def plain(value) -> str:
    """A text within Markdown: one line, without what would be markup."""
    return "".join(character if character.isalnum() or character in " ._-/+" else "?" for character in str(value))


def published(directory: Path) -> tuple[dict, dict, dict]:
    """args.json, adapter_config.json and results.json of a run as others may see them: no path of this machine."""
    args, config, results = (checkpoint.read_json(directory / name) if (directory / name).is_file() else {}
                             for name in ("args.json", "adapter_config.json", "results.json"))
    config["base_model_name_or_path"] = public(config["base_model_name_or_path"], directory)
    args = {key: args[key] for key in (*TOLD, "versions", "dataset") if key in args}
    if "dataset" in args:
        args["dataset"] = public(args["dataset"], directory)
    return args, config, results


def card(directory: Path, repo: str | None = None) -> str:
    """The README.md of a run, with metadata as the Hub reads it. A base or a dataset that is a directory is named without its path.

    Raises ValueError, in one line, when the run's files are not what train.py writes.
    """
    try:
        return compose(Path(directory), *published(Path(directory)), repo)
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError, ValueError) as error:
        raise ValueError(f"{directory}: args.json, adapter_config.json or results.json is not as train.py writes it "
                         f"({type(error).__name__}: {' '.join(str(error).split())})") from None


def compose(directory: Path, args: dict, config: dict, results: dict, repo: str | None) -> str:
    """The card, of what `published` gives."""
    from huggingface_hub import EvalResult, ModelCardData
    base, dataset, nf4 = config["base_model_name_or_path"], args["dataset"], args["quant"] == "nf4"
    base_on_hub, dataset_on_hub = on_hub(base, directory), on_hub(dataset, directory)
    evaluations = [EvalResult(
        task_type="text-classification", task_name="Natural language inference", dataset_type=dataset if dataset_on_hub else plain(dataset),
        dataset_name=plain(dataset), dataset_config="mnli" if dataset == "nyu-mll/glue" else None, dataset_split=plain(split),
        metric_type="accuracy", metric_value=float(found["accuracy"])) for split, found in results.get("finetuned", {}).items()]
    name = plain(repo or directory.resolve().name) or "adapter"
    metadata = ModelCardData(
        language="en", base_model=base if base_on_hub else None, library_name="peft", datasets=[dataset] if dataset_on_hub else None,
        metrics=["accuracy"], pipeline_tag="text-generation", tags=["lora", "nli"] + ["qlora"] * nf4, model_name=name,
        eval_results=evaluations or None)
    lines = ["| stage | split | accuracy | 95 % interval | rows | unparsed |", "|---|---|---|---|---|---|"]
    for stage, split, found in report.stages(results):
        interval = "{:.4f} to {:.4f}".format(*found["ci95"]) if "ci95" in found else ""
        lines.append(f"| {stage} | {plain(split)} | {found['accuracy']:.4f} | {interval} | {found['n']:,} | {found['unparsed']:,} |")
    targets = config["target_modules"] if isinstance(config["target_modules"], str) else " ".join(config["target_modules"])
    known = {key: args[key] for key in TOLD if args.get(key) not in (None, False)} | {"targets": targets}
    training = ", ".join(f"{key.replace('_', ' ')} {plain(value)}" for key, value in known.items())
    versions = ", ".join(f"{plain(key)} {plain(value)}" for key, value in args.get("versions", {}).items())
    dtype = "bfloat16" if args["dtype"] == "bf16" else "float32"
    text = CARD.format(
        title=name, rank=plain(config["r"]), alpha=plain(config["lora_alpha"]), targets=plain(targets), base=plain(base),
        dataset=plain(dataset), quantization="quantised to NF4" if nf4 else f"in {dtype}", bits=", BitsAndBytesConfig" * nf4,
        options=OPTIONS.format(dtype=dtype, double=bool(args.get("double_quant"))) * nf4, dtype=dtype,
        base_literal=json.dumps(base if base_on_hub else f"path/to/{base}"), repo_literal=json.dumps(repo or "path/to/this/folder"),
        prompt=json.dumps(data.PROMPT), results="\n".join(lines), training=f"{training}. Versions: {versions}.")
    return f"---\n{metadata.to_yaml()}\n---\n\n{text}"


def write_card(directory: Path) -> None:
    with checkpoint.replacing(Path(directory) / "README.md") as temporary:
        temporary.write_text(card(directory), encoding="utf-8")


def stage(directory: Path, repo: str, folder: Path) -> None:
    """Puts into `folder` what others get of a run: no rows of the data, nothing to resume, no path of this machine."""
    files = dict(zip(("args.json", "adapter_config.json"), published(directory)))
    text, readme = card(directory, repo), directory / "README.md"
    for name in UPLOADED:
        if name not in files and (directory / name).is_file():
            shutil.copy(directory / name, folder)
    for name, content in files.items():
        checkpoint.write_json(folder / name, content)
    if not readme.is_file() or readme.read_text(encoding="utf-8") == card(directory):  # else somebody has written it
        (folder / "README.md").write_text(text, encoding="utf-8")


def push(directory: Path, repo: str, private: bool = False) -> str:
    """Uploads adapter, card and results of a run to the Hub, and gives their address. Raises ValueError, in one line, when it cannot."""
    import httpx2
    from huggingface_hub import HfApi
    for name in ("adapter_model.safetensors", "adapter_config.json", "args.json"):
        if not (directory / name).is_file():
            raise ValueError(f"{directory} holds no run of train.py: it has no {name}")
    with tempfile.TemporaryDirectory() as folder:
        stage(directory, repo, Path(folder))
        try:
            HfApi().create_repo(repo, private=private, exist_ok=True)
            HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="An adapter of FLoRA")
        except (httpx2.HTTPError, OSError, ValueError) as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
            refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
            cure = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there" if refused else (
                f"{directory} is as it was, try again with: python lora.py push --adapter {directory} --repo {repo}")
            raise ValueError(f"cannot upload to {repo} ({reason}); {cure}") from None
    return f"{HfApi().endpoint}/{repo}"


def main() -> None:
    parser = data.Parser("python lora.py merge, or python lora.py push: a run for others", usage="python lora.py {merge,push} ...")
    parser.add_argument("what", nargs="?", choices=["merge", "push"], metavar="merge or push")
    evaluation.add_model_arguments(parser)
    parser.add_argument("--adapter", type=Path, help="the folder of a run, or any PEFT LoRA adapter")
    group = parser.add_argument_group("merge")
    group.add_argument("--out", type=Path, help="a new folder for the merged model")
    group.add_argument("--into", choices=["bf16", "fp32", "nf4"],
                       help="what the merged weights are rounded to (default: the run's --dtype; nf4: its 16 levels, written as --dtype)")
    group.add_argument("--requantize", action="store_true", help="with --into nf4: round to NF4 again, and show how much that erases")
    group.add_argument("--limit", type=int, help="first rows of each validation split only")
    group.add_argument("--force", action="store_true", help="take an adapter of another base too")
    group = parser.add_argument_group("push")
    group.add_argument("--repo", type=repository, help="owner/name on the Hub; it is made if it is not there")
    group.add_argument("--private", action="store_true", help="make it a private one")
    given = parser.parse_args()
    if given.what is None:
        parser.error("say merge or push")
    for flag in ("adapter", "out" if given.what == "merge" else "repo"):
        if getattr(given, flag) is None:
            parser.error(f"{given.what} needs --{flag}")
    if given.requantize and given.into != "nf4":
        parser.error("--requantize goes with --into nf4")
    saved = checkpoint.trained_with(given.adapter)
    if given.dataset is None and "dataset" not in saved:  # any adapter's error can be measured on these
        saved["dataset"] = str(Path(__file__).resolve().parent / "tiny" / "data")
    checkpoint.set_defaults(parser, saved, given.adapter)
    args = data.parse_arguments(parser)
    args.measure = given.dataset is not None
    if args.what == "merge":
        merge.run(args)
    else:
        print(push(args.adapter, args.repo, args.private))
