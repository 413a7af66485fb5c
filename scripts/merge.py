"""Merges an adapter into its base: writes a model without adapters, and measures the rounding.

    python -m scripts.merge --adapter out/demo --out out/merged
    python eval.py --quant none --model out/merged --dataset tiny/data

An adapter that was trained over NF4 is merged into the values that the indices stand for, not into
the 16-bit weights from which they were made. It was trained with the former, and the two differ by
more than the adapter changes. Any other adapter is merged into the weights as they are.

The sum W + B A is then rounded to the type that stores it. What this loses of the adapter is
measured for each layer, from the weights alone: the norm of what rounding changes, divided by the
norm of B A. The script prints it, and stores it in merge.json beside the merged model. Rounding to
NF4 again would lose most of a small update: experiments/merging.py measures that.
"""

import argparse
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
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
    files,
    fingerprint,
    flags,
    peft_files,
    processes,
)

# Copied from the base if they exist: its tokenizer, and the settings for generation.
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip


# -----------------------------------------------------------------------------
# Merging


@torch.no_grad()
def merge(
    model: phi2.Phi2, dtype: torch.dtype, requantize: bool = False
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
            merged = requantized(merged)
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


def requantized(weight: Tensor) -> Tensor:
    """Returns a weight (out, in) rounded to NF4: quantised, and dequantised again."""
    out_features, in_features = weight.shape
    layer = quant.NF4Linear(in_features, out_features, bias=False)
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
    flags.add_model(parser)
    flags.add_computation(parser)
    # An adapter that does not say that it was trained over NF4 belongs to the 16-bit weights.
    parser.set_defaults(quant="none")
    add = parser.add_argument
    # fmt: off
    add("--adapter", type=flags.name, required=True,
        help="a run of train.py, or any PEFT LoRA adapter: a directory or a Hub id")
    add("--out", type=flags.path, required=True, help="a new directory for the merged model")
    add("--into", choices=list(evaluation.DTYPES),
        help="type to which the merged weights are rounded (default: --dtype)")
    add("--force", action="store_true",
        help="also merge an adapter of another prompt, tokenizer, base or quantisation")
    # fmt: on
    return cli.complete(parser, parser.typed())


def check_folder(out: Path) -> None:
    """Raises ValueError unless --out, once claimed, is empty."""
    if any(path.name != claims.LOCK for path in out.iterdir()):
        raise ValueError(f"{out} exists already: choose another --out, or remove it")


def main() -> None:
    args = parse_arguments()
    device = processes.start(args.device)
    # No other process writes there until this one ends.
    with claims.claimed(args.out, check_folder):
        merge_run(args, device)


def merge_run(args: argparse.Namespace, device: torch.device) -> None:
    """Merges the adapter that the arguments name, and prints what the rounding loses."""
    patterns = (*checkpoints.MODEL, *COPIED)
    directory = checkpoints.find(args.model, phi2.read_config, patterns, args.model_revision)
    tokenizer = data.load_tokenizer(directory, phi2.read_config(directory).vocab_size)
    model = evaluation.load_model(directory, args.quant, args.dtype, device, args.double_quant)
    if not args.force:
        here = evaluation.fingerprint_of(args, directory, tokenizer)
        fingerprint.check(args.adapter, here)
    config = peft_files.read_config(args.adapter, lora.LoRAConfig)
    lora.load_adapter(model, args.adapter, config)

    stored_as = args.into or args.dtype
    weights = "dequantised from NF4" if args.quant == "nf4" else "as it is"
    print(f"W + B A, with W {weights}, stored in {stored_as}")
    layers = merge(model, evaluation.DTYPES[stored_as])
    mean = sum(layers.values()) / len(layers)
    worst = max(layers.values())
    cost = {"into": stored_as, "mean": mean, "worst": worst, "layers": layers}
    write_model(model, directory, args.out, cost)

    print("what rounding changes, as a share of B A, by norm")
    for path, share in (layers | {"mean": mean, "worst": worst}).items():
        print(f"  {path.removeprefix('model.'):40} {share:9.4%}")
    command = commands.command("eval.py", "--quant", "none", "--model", args.out)
    print(f"the merged model is in {args.out}; try: {command}")


if __name__ == "__main__":
    cli.run(main)
