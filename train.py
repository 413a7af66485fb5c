"""LoRA fine-tuning on MNLI, from top to bottom. Last in the reading order.

    python train.py --rank 8                                                       # phi-2 on MNLI with a GPU, else tiny/
    python train.py --rank 8 --model microsoft/phi-2 --dataset nyu-mll/glue        # the same, said in full
    python train.py --rank 16 --targets q_proj k_proj v_proj dense --steps 2000 --out out/wide
    python train.py --model ~/phi-2 --dataset ~/mnli --limit 2000 --eval-limit 500 # a first look, from directories
    python eval.py --adapter out/wide

Leaves in --out: the adapter in PEFT's format, args.json, metrics.jsonl, predictions and results.json. Left out so far:
resuming, several devices.
"""
import argparse
import json
import math
import platform
import signal
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import eval as evaluation
import lora
import phi2

LOG_EVERY = 50  # steps between lines


def parse_arguments() -> argparse.Namespace:
    parser = data.Parser("LoRA over a frozen phi-2 in NF4, on MNLI",
                         epilog="@FILE reads flags from a file, one to a line: python train.py @tiny/args")
    evaluation.add_model_arguments(parser)
    group = parser.add_argument_group("adapter")
    group.add_argument("--rank", type=int, default=8, help="default: 8")
    group.add_argument("--alpha", type=float, default=16, help="the update is scaled by alpha / rank (default: 16)")
    group.add_argument("--dropout", type=float, default=0.05, help="on the adapter's input (default: 0.05)")
    group.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"],
                       help='linear layers to adapt, or "all-linear" (default: q_proj v_proj)')
    group = parser.add_argument_group("training")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimiser steps (default: 40000)")
    length.add_argument("--epochs", type=float, help="passes over the training rows, instead of --steps")
    group.add_argument("--batch-size", type=int, default=16, help="examples in memory at once (default: 16)")
    group.add_argument("--accumulate", type=int, default=1, help="batches to a step (default: 1)")
    group.add_argument("--learning-rate", type=float, default=2e-4, help="default: 2e-4")
    group.add_argument("--weight-decay", type=float, default=0.01, help="default: 0.01")
    group.add_argument("--warmup-steps", type=int, help="linear warm-up, then cosine to 0 (default: 3%% of the steps)")
    group.add_argument("--max-grad-norm", type=float, default=1.0, help="gradients are clipped to this norm (default: 1)")
    group.add_argument("--residual-dropout", type=float, help="on the base's branches (default: that of config.json, 0.1 for phi-2)")
    group.add_argument("--loss", choices=["answer", "full"], default="answer",
                       help="on the answer's tokens, or on all as the notebooks did (default: answer)")
    group.add_argument("--share-prefix", action=argparse.BooleanOptionalAction, default=True,
                       help="run what all prompts begin with once a batch, not once a row; dropout is then drawn once for it too")
    group.add_argument("--checkpointing", action="store_true", help="recompute each block in the backward pass: slower, less memory")
    group.add_argument("--limit", type=int, help="first training rows only")
    group.add_argument("--seed", type=int, default=0, help="of the adapter's A, the dropout and the order of rows (default: 0)")
    group = parser.add_argument_group("evaluation and output")
    group.add_argument("--eval-limit", type=int, help="first rows of each validation split only, in every evaluation")
    group.add_argument("--eval-every", type=int, help="evaluate after each so many steps too")
    group.add_argument("--max-new-tokens", type=int, default=32, help="written to each prompt in evaluation (default: 32)")
    group.add_argument("--out", type=Path, help="default: out/ and a name made of model, dataset, rank and time")
    group.add_argument("--wandb", action="store_true", help="log to Weights & Biases; into a local folder when not logged in")
    args = data.parse_arguments(parser)
    for name in ("steps", "epochs", "batch_size", "accumulate", "learning_rate", "limit", "eval_limit", "eval_every", "max_length",
                 "max_grad_norm", "max_new_tokens"):
        if (value := getattr(args, name)) is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if args.out is None:
        names = (Path(args.model).name, Path(args.dataset).name, f"r{args.rank}", time.strftime("%Y%m%d-%H%M%S"))
        args.out = Path("out") / "-".join(names)
    return args


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """The factor on the learning rate at a step, counted from 0: a line up to 1, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def batch_loss(model, encoded, skip: int, loss: str) -> tuple[torch.Tensor, int]:
    """The summed cross-entropy of a batch's targets, and how many ids the model read for it.

    The first `skip` ids of all prompts are the same: they go through the model once, as a cache with gradients.
    """
    device, cache = model.lm_head.weight.device, None
    ids, at, targets = (part.to(device) for part in data.collate(encoded, skip, loss))
    if skip:
        prefix = torch.tensor(encoded[0][0][:skip], device=device)
        hidden, cache = model.model(prefix[None], columns=None if loss == "full" else prefix[None, :0])
    logits = model(ids, cache, at).flatten(0, 1) if loss == "answer" else model.lm_head(model.model(ids, cache)[0][at])
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    if skip and loss == "full":  # the prefix predicts itself, once for each row, and then each row's first id
        logits = model.lm_head(hidden[0]).float()
        first = torch.tensor([prompt[skip] for prompt, _ in encoded], device=device)
        total = total + len(encoded) * F.cross_entropy(logits[:-1], prefix[1:], reduction="sum")
        total = total + F.cross_entropy(logits[-1:].expand(len(encoded), -1), first, reduction="sum")
    return total, ids.numel() + skip


def start_wandb(args, record: dict):
    """A W&B run that never asks for a key: without one it is kept offline, in a folder beside the other output."""
    import os

    import wandb
    try:
        offline = "WANDB_MODE" not in os.environ and not wandb.login(prompt=False)
    except wandb.Error as error:
        print(f"W&B: {str(error).splitlines()[0]}")
        offline = True
    if offline:
        print(f"W&B: not logged in, so this run is kept offline in {args.out}/wandb; send it later with `wandb sync`")
    return wandb.init(project="flora", name=args.out.name, dir=args.out, config=record, mode="offline" if offline else None)


def main() -> None:
    args = parse_arguments()
    config = lora.LoRAConfig(args.rank, args.alpha, args.dropout, "all-linear" if args.targets == ["all-linear"] else tuple(args.targets))
    device, dtype = torch.device(args.device), evaluation.DTYPES[args.dtype]
    if (args.out / "args.json").exists():
        raise ValueError(f"{args.out} holds a run already: choose another --out, or remove it")

    # ---- Data and tokens
    directory = phi2.locate(args.model)
    tokenizer = data.load_tokenizer(directory)
    train = data.load_examples(args.dataset, "train", args.limit)
    splits = {split: data.load_examples(args.dataset, split, args.eval_limit) for split in data.validation_splits(args.dataset)}
    size = args.batch_size * args.accumulate
    steps = math.ceil(args.epochs * math.ceil(len(train) / size)) if args.epochs else args.steps or 40_000
    warmup = round(0.03 * steps) if args.warmup_steps is None else args.warmup_steps
    skip = len(data.fixed_ids(tokenizer)[0]) if args.share_prefix else 0

    # ---- Model: frozen base, then what the base can do alone, then adapters
    model = evaluation.load_model(directory, args.quant, dtype, device, args.double_quant, args.keep_dequantized)
    model.model.checkpointing = args.checkpointing
    lora.match_targets(model, config.targets)  # a wrong name should not wait for the baseline
    if args.residual_dropout is None:
        args.residual_dropout = model.config.resid_pdrop
    for block in model.model.layers:
        block.resid_dropout.p = args.residual_dropout
    print(f"{args.model} ({args.quant}, {args.dtype}, {device}) on {args.dataset}: {len(train):,} rows, {steps:,} steps of {size}, "
          f"into {args.out}")

    def evaluate(stage: str) -> dict[str, dict]:
        found = {}
        for split, examples in splits.items():
            found[split], predictions = evaluation.evaluate(model, tokenizer, examples, max_new_tokens=args.max_new_tokens,
                                                            max_length=args.max_length, desc=f"{stage}, {split}")
            if stage == "finetuned":
                evaluation.write_predictions(predictions, args.out / f"predictions_{split}.jsonl")
        return found

    args.out.mkdir(parents=True, exist_ok=True)
    record = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()} | environment(device)
    with lora.replacing(args.out / "args.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
    metrics = open(args.out / "metrics.jsonl", "w", buffering=1)
    wandb_run = start_wandb(args, record) if args.wandb else None

    def log(step: int, **values) -> None:
        metrics.write(json.dumps({"step": step, **values}) + "\n")
        if wandb_run:
            wandb_run.log(values, step=step)

    results = {"baseline": evaluate("baseline")}
    log(0, **{f"{split}_accuracy": result["accuracy"] for split, result in results["baseline"].items()})
    print("baseline: " + ", ".join(f"{split} {result['accuracy']:.4f}" for split, result in results["baseline"].items()))

    torch.manual_seed(args.seed)  # A's draws come first, as in PEFT
    adapted = lora.inject(model, config)
    parameters = list(lora.lora_parameters(model).values())
    print(f"{len(adapted)} layers adapted, {sum(p.numel() for p in parameters):,} parameters to train")

    # ---- Training
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps, warmup))
    stream = data.batches(train, size, args.seed)
    model.train()
    logged, total, seen, rows, shortened, clock = 0, 0.0, 0, 0, 0, time.perf_counter()
    stopping = []  # Ctrl-C ends the step and saves; a second one ends the process

    def stop(*_):
        stopping.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGINT, stop)
    bar = tqdm(range(1, steps + 1), desc="training", unit="step", disable=None)
    for step in bar:
        encoded = [data.encode(example, tokenizer, args.max_length) for example in next(stream)]
        # The mean over all targets of the step, however they fall into batches
        targets = sum(len(answer) + (len(prompt) - 1) * (args.loss == "full") for prompt, answer in encoded)
        step_loss = 0.0
        for start in range(0, len(encoded), args.batch_size):
            loss, tokens = batch_loss(model, encoded[start:start + args.batch_size], skip, args.loss)
            (loss / targets).backward()
            step_loss, seen = step_loss + loss.detach() / targets, seen + tokens
        rows += len(encoded)
        shortened += sum(len(prompt) + len(answer) == args.max_length for prompt, answer in encoded)
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()

        total += step_loss
        if step % LOG_EVERY == 0 or step == steps:
            mean, seconds = float(total) / (step - logged), time.perf_counter() - clock
            if not math.isfinite(mean):
                raise ValueError(f"the loss is not finite between steps {logged + 1} and {step}: lower --learning-rate, now {rate:.1e}")
            peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
            log(step, loss=mean, learning_rate=rate, grad_norm=float(norm), examples_per_second=rows / seconds,
                tokens_per_second=seen / seconds, peak_memory_gib=peak)
            bar.write(f"step {step:6,}  loss {mean:.4f}  lr {rate:.2e}  grad {float(norm):.3f}  {rows / seconds:.0f} examples/s")
            logged, total, seen, rows, clock = step, 0.0, 0, 0, time.perf_counter()
        if stopping:
            break
        if args.eval_every and step % args.eval_every == 0 and step < steps:
            log(step, **{f"{split}_accuracy": result["accuracy"] for split, result in evaluate(f"step {step}").items()})
            clock = time.perf_counter()

    # ---- The adapter first: nothing that happens in the evaluation can lose it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    lora.save_adapter(model, config, args.out, args.model)
    if stopping:
        bar.close()
        raise ValueError(f"interrupted after step {step:,} of {steps:,}; the adapter so far is saved: python eval.py --adapter {args.out}")
    if shortened:
        print(f"{shortened:,} prompts were cut to --max-length {args.max_length}, at the end of their premise")
    results["finetuned"] = evaluate("finetuned")
    log(steps, **{f"{split}_accuracy": result["accuracy"] for split, result in results["finetuned"].items()})
    with lora.replacing(args.out / "results.json") as temporary:
        temporary.write_text(json.dumps({"protocol": evaluation.protocol("generate", args.max_new_tokens)} | results, indent=2) + "\n")
    if wandb_run:
        wandb_run.finish()
    print(evaluation.table(results))
    print(f"adapter and results.json in {args.out}; try: python eval.py --adapter {args.out} --premise ... --hypothesis ...")


def environment(device: torch.device) -> dict:
    """What a result depends on besides its arguments: versions, commit, device."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    packages = ("torch", "bitsandbytes", "safetensors", "tokenizers", "datasets")
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"versions": versions, "commit": git.stdout.strip() or None, "device_name": name}


if __name__ == "__main__":
    data.run(main)
