"""Merges an adapter into its base: writes a model without adapters, and measures the rounding.

    python -m scripts.merge --adapter out/demo --out out/merged --dataset tiny/data
    python eval.py --quant none --model out/merged --dataset tiny/data

An adapter that was trained over NF4 is merged into the values that the indices stand for, not into
the 16-bit weights from which they were made. It was trained with the former, and the two differ by
more than the adapter changes. Any other adapter is merged into the weights as they are.

The sum W + B A is then rounded to the type that stores it. This loses little of an adapter in 16
bits, and most of it in NF4. The loss is measured for each layer, from the weights alone: the norm
of what rounding changes, divided by the norm of B A. With --dataset the script also measures the
accuracy before and after. It prints both, and stores them in merge.json beside the merged model.
"""

import argparse
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python scripts/merge.py`

import data
import eval as evaluation
import lora
import phi2
import quant
from support import (
    checkpoints,
    claims,
    cli,
    commands,
    examples,
    files,
    fingerprint,
    flags,
    origin,
    peft_files,
    processes,
)

# Copied from the base if they exist: its tokenizer, and the settings for generation.
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip
ERASED = (
    "merging into NF4 rounds W + B A to the 16 levels of each block again, which erases most of a "
    "small update: merge into bf16, or add --requantize to do it anyway and see how much is lost"
)


# -----------------------------------------------------------------------------
# Merging


@torch.no_grad()
def merge(
    model: phi2.Phi2, dtype: torch.dtype, requantize: bool = False, double_quant: bool = False
) -> dict[str, float]:
    """Merges all adapters of a model, in place. All weights then have the type `dtype`.

    Returns for each layer what rounding W + B A changes, as a share of B A. With `requantize` the
    merged weights are also rounded to NF4. Only one layer at a time is held in fp32. Raises
    ValueError if a weight is not finite in `dtype`; the model is then unusable.
    """
    layers = {
        path: layer for path, layer in model.named_modules() if isinstance(layer, lora.LoRALinear)
    }
    costs = {}
    for path, layer in layers.items():
        # In fp32, so that W + B A is rounded once, at the end.
        quant.dequantize_linears(layer, torch.float32)
        layer.float()
        merged = layer.weight.to(dtype)  # W + B A
        if requantize:
            merged = requantized(merged, double_quant)
        costs[path] = rounding_cost(layer, merged)

        linear = layer.base_layer.to(dtype)
        linear.weight.copy_(merged)
        model.set_submodule(path, linear)
    quant.dequantize_linears(model, dtype)  # the layers without an adapter
    model.to(dtype)

    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"cannot merge: {name} is not finite in {dtype}")
    return costs


def rounding_cost(layer: lora.LoRALinear, merged: Tensor) -> float:
    """Returns the norm of what rounding changed in W + B A, divided by the norm of B A."""
    update = layer.delta_weight()
    change = merged.float() - layer.base_layer.weight - update
    # An adapter whose B is zero has nothing to lose.
    if not update.any():
        return 0.0
    # In fp64, because a norm sums squares, which may overflow in fp32.
    return (change.double().norm() / update.double().norm()).item()


def requantized(weight: Tensor, double_quant: bool) -> Tensor:
    """Returns a weight (out, in) rounded to NF4: quantised, and dequantised again."""
    out_features, in_features = weight.shape
    layer = quant.NF4Linear(in_features, out_features, bias=False, double_quant=double_quant)
    layer.load_state_dict({"weight": weight}, strict=False, assign=True)
    return layer.to(weight.device).dequantize()


def write_model(
    model: phi2.Phi2, base: Path, out: Path, cost: dict, shard_size: str = "5GB"
) -> None:
    """Writes the model in phi-2's format, which transformers loads, and `cost` as merge.json.

    In the end the directory `out` holds either all of the files or none.
    """
    from huggingface_hub import save_torch_state_dict

    with files.replacing_files(out) as folder:
        save_torch_state_dict(model.state_dict(), folder, max_shard_size=shard_size)
        for name in COPIED:
            if (base / name).is_file():
                shutil.copy(base / name, folder)
        files.write_json(folder / "config.json", merged_config(model, base))
        files.write_json(folder / "merge.json", cost)


def merged_config(model: phi2.Phi2, base: Path) -> dict:
    """Returns the base's config.json, changed to describe the merged model."""
    config = files.read_json(base / "config.json")
    # The newer and the older name of the dtype, and how the base was quantised.
    for key in ("dtype", "torch_dtype", "quantization_config"):
        config.pop(key, None)
    config |= asdict(model.config)
    config["architectures"] = ["PhiForCausalLM"]
    config["torch_dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    return config


# -----------------------------------------------------------------------------
# The script


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser("merges an adapter into its base, and shows how much the rounding loses")
    flags.add_model_arguments(parser)
    # An adapter that does not say that it was trained over NF4 belongs to the 16-bit weights.
    parser.set_defaults(quant="none")
    add = parser.add_argument
    # fmt: off
    add("--adapter", type=flags.name, required=True,
        help="a run of train.py, or any PEFT LoRA adapter: a directory or a Hub id")
    add("--out", type=flags.path, required=True, help="a new directory for the merged model")
    add("--into", choices=["bf16", "fp16", "fp32", "nf4"],
        help="type to which the merged weights are rounded "
             "(default: the run's --dtype; nf4: its 16 levels per block, stored in --dtype)")
    add("--requantize", action="store_true",
        help="with --into nf4: round to NF4 again, and show how much that erases")
    add("--limit", type=flags.count,
        help="with --dataset: how many rows of each validation split to evaluate (default: all)")
    add("--force", action="store_true",
        help="also merge an adapter of another prompt, tokenizer, base or quantisation")
    # fmt: on
    typed = parser.typed()
    check_flags(parser, typed)
    return cli.complete(parser, typed)


def check_flags(parser: cli.Parser, typed: dict) -> None:
    """Rejects flags that do not go together."""
    requantize = "requantize" in typed
    into_nf4 = typed.get("into") == "nf4"
    if requantize and not into_nf4:
        parser.error("--requantize goes with --into nf4")
    if into_nf4 and not requantize:
        raise ValueError(ERASED)
    for name in ("limit", "columns", "labels", "validation"):
        if name in typed and "dataset" not in typed:
            parser.error(f"--{name} is for the accuracy on a --dataset")


def check_folder(out: Path) -> None:
    """Raises ValueError unless --out, once claimed, is empty."""
    if any(path.name != claims.LOCK for path in out.iterdir()):
        raise ValueError(f"{out} exists already: choose another --out, or remove it")


def evaluate(
    model: phi2.Phi2,
    tokenizer: Tokenizer,
    splits: dict,
    settings: evaluation.Settings,
    stage: str,
) -> dict[str, dict]:
    """Returns the statistics of each split."""
    return {
        split: evaluation.evaluate(model, tokenizer, rows, settings, f"{stage}, {split}")[0]
        for split, rows in splits.items()
    }


def main() -> None:
    args = parse_arguments()
    device = processes.start(args.device)
    # No other process writes there until this one ends.
    with claims.claimed(args.out, check_folder):
        merge_run(args, device)


def merge_run(args: argparse.Namespace, device: torch.device) -> None:
    """Merges the adapter that the arguments name, and measures what the rounding loses."""
    patterns = (*checkpoints.MODEL, *COPIED)
    directory = checkpoints.find(args.model, phi2.read_config, patterns, args.model_revision)
    tokenizer = data.load_tokenizer(directory, phi2.read_config(directory).vocab_size)
    data.check_max_length(tokenizer, args.max_length)
    splits = {}
    reading = args.origin.reading(args.dataset_revision)
    # A run names a dataset too, but evaluation takes minutes, so only a typed --dataset counts.
    if args.is_dataset_typed:
        reading = origin.reading_of(args)
        for split in examples.validation_splits(args.dataset, reading):
            splits[split] = examples.load_examples(args.dataset, split, args.limit, reading)

    model = evaluation.load_model(directory, args.quant, args.dtype, device, args.double_quant)
    if not args.force:
        here = evaluation.fingerprint_of(args, directory, tokenizer)
        fingerprint.check(args.adapter, here)
    config = peft_files.read_config(args.adapter, lora.LoRAConfig)
    lora.load_adapter(model, args.adapter, config)
    # Weights that were rounded to NF4 are stored as plain numbers too, in the run's --dtype.
    stored_as = args.dtype if args.into in (None, "nf4") else args.into
    weights = "dequantised from NF4" if args.quant == "nf4" else "as it is"
    print(f"W + B A, with W {weights}, stored in {stored_as}")

    settings = evaluation.Settings(max_length=args.max_length)
    before = evaluate(model, tokenizer, splits, settings, "adapter")
    layers = merge(model, evaluation.DTYPES[stored_as], args.requantize, args.double_quant)
    after = evaluate(model, tokenizer, splits, settings, "merged")
    cost = {
        "into": args.into or args.dtype,
        "requantized": args.requantize,
        "mean": sum(layers.values()) / len(layers),
        "worst": max(layers.values()),
        "layers": layers,
        "accuracy": {
            split: {
                "adapter": before[split]["accuracy"],
                "merged": after[split]["accuracy"],
                "n": len(rows),
                "cut": after[split]["cut"],  # to --max-length
            }
            for split, rows in splits.items()
        },
    }
    write_model(model, directory, args.out, cost)
    print_cost(cost)
    words = ["--quant", "none", "--model", args.out, "--dataset", args.dataset, *reading.flags()]
    print(f"the merged model is in {args.out}; try: {commands.command('eval.py', *words)}")


def print_cost(cost: dict) -> None:
    """Prints the content of merge.json."""
    print("what rounding changes, as a share of B A, by norm")
    shares = cost["layers"] | {"mean": cost["mean"], "worst": cost["worst"]}
    for path, share in shares.items():
        print(f"  {path.removeprefix('model.'):40} {share:9.4%}")
    if cost["requantized"]:
        print("requantising has erased this share of the adapter")
    for split, accuracy in cost["accuracy"].items():
        print(
            f"  {split:22} {accuracy['adapter']:.4f} with the adapter, "
            f"{accuracy['merged']:.4f} merged, {accuracy['n']:,} rows, {accuracy['cut']:,} cut"
        )


if __name__ == "__main__":
    cli.run(main)
