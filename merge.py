"""Merging: a checkpoint without adapters, and what it cost to make it.

Read it after lora.py and eval.py. W + B A is rounded to the type it is kept in, and what that changes is measured here, on real
prompts. An adapter that was trained over NF4 is merged into the values that the codes stand for, not into the 16-bit weights they
were made from: it has learnt beside the former, and the latter differ by more than the adapter does.

    python lora.py merge --adapter out/demo --out out/merged --dataset tiny/data
"""
import os
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import data
import eval as evaluation
import lora
import phi2
import quant
import ranks

PROMPTS, BATCH = 32, 8  # on which the error is measured, and how many at once
BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
          "generation_config.json")  # copied from the base where they are
ERASED = ("merging into NF4 rounds W + B A to the 16 levels of its block again, which erases most of a small update: "
          "merge into bf16, or add --requantize to do it all the same and to see how much is lost")


def requantized(weight: Tensor, double_quant: bool = False) -> Tensor:
    """The values that NF4 codes made of a weight (out, in) stand for."""
    layer = quant.NF4Linear(weight.shape[1], weight.shape[0], bias=False, double_quant=double_quant)
    layer.load_state_dict({"weight": weight}, strict=False, assign=True)
    return layer.to(weight.device).dequantize()


@torch.no_grad()
def merge(model: phi2.Phi2, prompts: list[list[int]], dtype: torch.dtype, requantize: bool = False,
          double_quant: bool = False) -> dict[str, dict[str, float]]:
    """Merges the adapters of a model in place, into `dtype`; {layer: {"output", "update"}}, what that costs each on `prompts`.

    The cost is the norm of x (W' - W - scale B A)^T over all inputs x that the layer has in the model as it was trained, computed in
    fp32: relative to that of its output, and to that of the adapter's own part in it. With `requantize` W' is rounded to NF4.
    A layer's weights are made when they are needed and not kept: this needs the merged model and little more.
    """
    device, sums = model.lm_head.weight.device, {}

    def weights(layer) -> tuple[Tensor, Tensor, Tensor]:
        """W and scale B A in fp32, and W' in `dtype`."""
        base = layer.base_layer.dequantize() if isinstance(layer.base_layer, quant.NF4Linear) else layer.base_layer.weight
        update = layer.scale * layer.lora_B.weight @ layer.lora_A.weight
        merged = (base.float() + update).to(dtype)
        return base.float(), update, requantized(merged, double_quant) if requantize else merged

    def measure(layer, inputs, output, path):
        (x, output), (base, update, merged) = (part.flatten(0, -2)[seen].float() for part in (*inputs, output)), weights(layer)
        for i, part in enumerate((x @ (merged.float() - base - update).T, output, x @ update.T)):
            sums[path][i] += part.square().sum(dtype=torch.float64).cpu()

    def merged_layer(layer):
        weight = weights(layer)[2]
        quant.dequantize_linears(layer, dtype)
        layer.base_layer.weight.data = weight
        return layer.base_layer
    hooks = []
    for path, layer in model.named_modules():
        if isinstance(layer, lora.LoRALinear):
            sums[path] = torch.zeros(3, dtype=torch.float64)
            hooks.append(layer.register_forward_hook(partial(measure, path=path)))
    for start in tqdm(range(0, len(prompts), BATCH), desc="error by layer", leave=False, delay=2, disable=None):
        rows = [torch.tensor(prompt, device=device) for prompt in prompts[start:start + BATCH]]
        lengths = torch.tensor([len(row) for row in rows], device=device)
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        seen = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).flatten()  # not the padding
        model(ids)
    for hook in hooks:
        hook.remove()
    quant.replace(model, lora.LoRALinear, merged_layer)
    quant.dequantize_linears(model, dtype)
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
        for path in temporary.iterdir():  # the library gives them to their owner alone
            path.chmod(temporary.stat().st_mode & 0o666)
        for name in BESIDE:
            if (base / name).is_file():
                shutil.copy(base / name, temporary)
        for name, content in (files | {"config.json": config}).items():
            checkpoint.write_json(temporary / name, content)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def run(args) -> None:
    if args.into == "nf4" and not args.requantize:
        raise ValueError(ERASED)
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise ValueError(f"{args.out} is there already: choose another --out, or remove it")
    directory = checkpoint.locate(args.model, [*checkpoint.FILES, *BESIDE])
    tokenizer = data.load_tokenizer(directory)
    dtype = evaluation.DTYPES[args.dtype if args.into in (None, "nf4") else args.into]
    names = data.validation_splits(args.dataset)
    splits = {split: data.load_examples(args.dataset, split, args.limit) for split in names if args.measure}
    prompts = [data.encode(example, tokenizer, args.max_length)[0] for example in data.load_examples(args.dataset, names[0], PROMPTS)]
    model = evaluation.load_model(directory, args.quant, evaluation.DTYPES[args.dtype], ranks.start(args.device), args.double_quant).eval()
    lora.load_adapter(model, args.adapter, None if args.force else checkpoint.fingerprint(model, tokenizer, data.PROMPT, args))

    def accuracies(stage: str) -> dict[str, float]:
        return {split: evaluation.evaluate(model, tokenizer, examples, max_length=args.max_length, desc=f"{stage}, {split}")[0]["accuracy"]
                for split, examples in splits.items()}
    kept = f"{str(dtype).removeprefix('torch.')}" + ", rounded to NF4 again" * args.requantize
    print(f"W + B A, with W {'as the NF4 codes say' if args.quant == 'nf4' else 'as it is'}, kept in {kept}")
    before = accuracies("adapter")
    errors = merge(model, prompts, dtype, args.requantize, args.double_quant)
    after = accuracies("merged")
    cost = {"into": args.into or args.dtype, "requantized": args.requantize, "dataset": Path(args.dataset).name, "prompts": len(prompts),
            "mean": {key: sum(error[key] for error in errors.values()) / len(errors) for key in ("output", "update")},
            "worst": {key: max(error[key] for error in errors.values()) for key in ("output", "update")}, "layers": errors,
            "accuracy": {split: {"adapter": before[split], "merged": after[split], "n": len(splits[split])} for split in before}}
    write_model(model, directory, args.out, {"merge.json": cost})
    print(f"{f'what that changes, on {len(prompts)} prompts':42} {'of output':>9} {'of update':>9}")
    for name, error in [*errors.items(), ("mean", cost["mean"]), ("worst", cost["worst"])]:
        print(f"  {name.removeprefix('model.'):40} {error['output']:9.4%} {error['update']:9.4%}")
    for split, found in cost["accuracy"].items():
        print(f"  {split:22} {found['adapter']:.4f} with the adapter, {found['merged']:.4f} merged, {found['n']:,} rows")
    if args.requantize:
        print("what has changed of the adapter's part is what requantising has erased of it")
    print(f"the merged model is in {args.out}; try: python eval.py --quant none --model {args.out} --dataset {args.dataset}")
