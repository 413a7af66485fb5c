"""LoRA fine-tuning on MNLI, from top to bottom. Last in the reading order.

    python train.py --rank 8                                                       # phi-2 on MNLI with a GPU, else tiny/
    python train.py --rank 16 --targets q_proj k_proj v_proj dense --steps 2000 --out out/wide
    python train.py --model ~/phi-2 --dataset ~/mnli --limit 2000 --eval-limit 500 # a first look, from directories
    python train.py --resume out/wide                                              # goes on after Ctrl-C or a crash
    torchrun --nproc-per-node 8 train.py --rank 8                                  # eight GPUs, 16 examples on each
    python eval.py --adapter out/wide

Leaves in --out: the adapter in PEFT's format with its model card, args.json, metrics.jsonl, trainer.safetensors to go on from,
predictions, results.json and report.html. Of several ranks (ranks.py) each takes its part of every step, and the first alone writes.
"""
import argparse
import json
import math
import os
import signal
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import data
import eval as evaluation
import lora
import plan
import publish
import ranks
import report

LOG_EVERY = 50  # steps between lines
# What --resume may be given anew; everything else would make another run of it.
FREE = {"steps", "epochs", "eval_every", "save_every", "keep_dequantized", "checkpointing", "wandb", "push", "plan", "debug", "resume",
        "out"}


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
    group.add_argument("--save-every", type=int, default=500, help="save what --resume needs after each so many steps (default: 500)")
    group.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run, with its arguments; more --steps may be given")
    group.add_argument("--max-new-tokens", type=int, default=32, help="written to each prompt in evaluation (default: 32)")
    group.add_argument("--out", type=Path, help="default: out/ and a name made of model, dataset, rank and time")
    group.add_argument("--push", metavar="OWNER/NAME", type=publish.repository, help="upload adapter, card, results to the Hub at the end")
    group.add_argument("--plan", action="store_true", help="only print the memory that a step takes; loads no weights")
    group.add_argument("--wandb", action="store_true", help="log to Weights & Biases; into a local folder when not logged in")
    saved, given = {}, parser.parse_args()
    if ranks.MAX_RESTARTS and not given.out and not given.resume:
        parser.error("torchrun --max-restarts needs --out, so that what starts anew finds its run")
    if ranks.RESTARTS and not given.resume and (given.out / "args.json").is_file():
        given.resume = given.out
    if given.resume:
        saved = checkpoint.arguments(given.resume, vars(given)) | {"resume": given.resume, "out": given.resume}
        if given.steps or given.epochs:  # one of the two
            saved |= {"steps": None, "epochs": None}
        saved = checkpoint.set_defaults(parser, saved, given.resume)
    args = data.parse_arguments(parser)
    if other := [f"--{name.replace('_', '-')} {getattr(args, name)} (it has {value})" for name, value in saved.items()
                 if name not in FREE and getattr(args, name) != value]:
        raise ValueError(f"{args.resume} cannot go on with {', '.join(other)}: that would be another run")
    for name in ("steps", "epochs", "batch_size", "accumulate", "learning_rate", "limit", "eval_limit", "eval_every", "max_length",
                 "max_grad_norm", "max_new_tokens", "save_every"):
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
    logits = model(ids, cache, at).flatten(0, 1) if loss == "answer" else model.lm_head(model.model(ids, cache)[0].flatten(0, 1)[at])
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    if skip and loss == "full":  # the prefix predicts itself, once for each row, and then each row's first id
        logits = model.lm_head(hidden[0]).float()
        first = torch.tensor([prompt[skip] for prompt, _ in encoded], device=device)
        total = total + len(encoded) * F.cross_entropy(logits[:-1], prefix[1:], reduction="sum")
        total = total + F.cross_entropy(logits[-1:].expand(len(encoded), -1), first, reduction="sum")
    return total, ids.numel() + skip


def main() -> None:
    args = parse_arguments()
    config = lora.LoRAConfig(args.rank, args.alpha, args.dropout, "all-linear" if args.targets == ["all-linear"] else tuple(args.targets))
    device, dtype = ranks.start(args.device, not args.plan), evaluation.DTYPES[args.dtype]
    if ranks.FIRST and (args.out / "args.json").exists() and not args.resume and not args.plan:
        raise ValueError(f"{args.out} holds a run already: --resume {args.out}, or choose another --out, or remove it")
    begun = args.resume and (args.resume / checkpoint.NAME).is_file()  # it is not when the run ended within its baseline
    tensors, state = checkpoint.load(args.resume) if begun else ({}, {})

    # ---- Data and tokens
    directory = checkpoint.locate(args.model, checkpoint.FILES[:2] if args.plan else checkpoint.FILES)
    tokenizer = data.load_tokenizer(directory)
    train = data.load_examples(args.dataset, "train", args.limit)
    splits = {split: data.load_examples(args.dataset, split, args.eval_limit) for split in data.validation_splits(args.dataset)}
    size = args.batch_size * args.accumulate * ranks.WORLD
    steps = math.ceil(args.epochs * math.ceil(len(train) / size)) if args.epochs else args.steps or 40_000
    warmup = round(0.03 * steps) if args.warmup_steps is None else args.warmup_steps
    skip = len(data.fixed_ids(tokenizer)[0]) if args.share_prefix else 0
    longest = plan.longest_rows(train, tokenizer, args.batch_size, args.max_length)
    planned = plan.memory(directory, args, config, dtype, longest, skip, batch_loss)
    if args.plan:
        return print(plan.table(planned, args, longest))

    # ---- Model: frozen base, then what the base can do alone, then adapters
    at_rest = plan.peak(device, anew=True)
    model = evaluation.load_model(directory, args.quant, dtype, device, args.double_quant, args.keep_dequantized)
    model.model.checkpointing = args.checkpointing
    fingerprint = checkpoint.fingerprint(model, tokenizer, data.PROMPT, args)
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
            if name := {"baseline": "baseline", "finetuned": "predictions"}.get(stage) if ranks.FIRST else None:
                checkpoint.write_lines(predictions, args.out / f"{name}_{split}.jsonl")
        return found

    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    record = arguments | ranks.environment(device)
    if ranks.FIRST:
        args.out.mkdir(parents=True, exist_ok=True)
        for unfinished in args.out.glob(".*.*.[0-9]*"):  # what a save that was killed has left
            unfinished.unlink()
        checkpoint.write_json(args.out / "args.json", record)
        known = checkpoint.lines_up_to(args.out / "metrics.jsonl", state["step"], steps) if state else []
        with checkpoint.replacing(args.out / "metrics.jsonl") as temporary:  # without what came after the step it goes on from
            temporary.write_text("".join(known))
    metrics = open(args.out / "metrics.jsonl" if ranks.FIRST else os.devnull, "a", buffering=1)
    wandb_run = report.start_wandb(args, record) if args.wandb and ranks.FIRST else None

    def figures(found: dict[str, dict]) -> dict:
        return {f"{split}_{key}": result[key] for split, result in found.items() for key in ("accuracy", "loss")}

    def log(step: int, **values) -> None:
        metrics.write(json.dumps({"step": step, **values}) + "\n")
        if wandb_run:
            wandb_run.log(values, step=step)

    results = {"baseline": state["baseline"] if state else evaluate("baseline")}
    if not state:
        log(0, **figures(results["baseline"]))
    print("baseline: " + ", ".join(f"{split} {result['accuracy']:.4f}" for split, result in results["baseline"].items()))

    torch.manual_seed(args.seed)  # A's draws come first, as in PEFT
    adapted = lora.inject(model, config)
    if not ranks.FIRST:  # the same adapter, another dropout
        torch.manual_seed(args.seed + ranks.RANK)
    adapter = lora.lora_parameters(model)
    parameters = list(adapter.values())
    print(f"{len(adapted)} layers adapted, {sum(p.numel() for p in parameters):,} parameters to train")

    # ---- Training
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    done, logged, shortened, seen, rows, total, memory = 0, 0, 0, 0, 0, 0.0, None
    if state:
        if state["rows"] != len(train):
            raise ValueError(f"{args.resume} was trained on {state['rows']:,} rows, {args.dataset} has {len(train):,}")
        if state["size"] != size:
            raise ValueError(f"{args.resume} was trained with {state['size']:,} rows a step, on {ranks.WORLD} processes there are {size:,}")
        if state["steps"] != steps:
            print(f"{steps:,} steps instead of {state['steps']:,}: from here on the learning rate follows the new schedule")
        if state["step"] > steps:
            raise ValueError(f"{args.resume} has taken {state['step']:,} steps already, more than {steps:,}")
        done, logged, shortened, seen, rows, total = state["loop"]
        checkpoint.restore(tensors, adapter, optimizer, ranks.RANK)
        print(f"going on after step {done:,} of {steps:,}" + ": only the evaluation is left to do" * (done == steps))
    stream = data.batches(train, size, args.seed, done)

    def save(step: int) -> None:
        random = torch.stack(ranks.gather(checkpoint.random_state(device)))
        if ranks.FIRST:
            lora.save_adapter(model, config, args.out, args.model, fingerprint)
            loop = {"step": step, "loop": (step, logged, shortened, seen, rows, total), "steps": steps, "rows": len(train), "size": size}
            checkpoint.save(args.out, adapter, optimizer, random, loop | {"arguments": arguments, "baseline": results["baseline"]})
    if not state:
        save(0)
    model.train()
    plan.peak(device, anew=True)
    clock, stopping = time.perf_counter(), []  # Ctrl-C and SIGTERM end the step and save; a second one ends the process

    def stop(number, _):
        stopping.append(number)
        signal.signal(number, signal.default_int_handler)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    bar = tqdm(range(done + 1, steps + 1), desc="training", unit="step", initial=done, total=steps, disable=None if ranks.FIRST else True)
    for step in bar:
        examples = next(stream)
        encoded = [data.encode(example, tokenizer, args.max_length) for example in examples[ranks.RANK::ranks.WORLD]]
        rate = args.learning_rate * learning_rate(step - 1, steps, warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # The mean over all targets of the step, however they fall into batches
        targets, = ranks.total(device, sum(len(answer) + (len(prompt) - 1) * (args.loss == "full") for prompt, answer in encoded))
        step_loss, tokens, cut = 0.0, 0, sum(len(prompt) + len(answer) == args.max_length for prompt, answer in encoded)
        for start in range(0, len(encoded), args.batch_size):
            loss, count = batch_loss(model, encoded[start:start + args.batch_size], skip, args.loss)
            (loss / targets).backward()
            step_loss, tokens = step_loss + loss.detach() / targets, tokens + count
        ranks.add_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        step_loss, tokens, cut, stops = ranks.total(device, step_loss, tokens, cut, len(stopping))
        total, seen, rows, shortened = total + step_loss, seen + int(tokens), rows + len(examples), shortened + int(cut)
        if not math.isfinite(norm):
            raise ValueError(f"step {step}: the loss is {step_loss:.4g}, the norm of its gradient {float(norm):.4g}, with the rows "
                             f"{sorted(example['row'] for example in examples)} of train; {args.out} keeps the state after step {done:,}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % LOG_EVERY == 0 or step == steps:
            mean, seconds = total / (step - logged), time.perf_counter() - clock
            memory = None if at_rest is None else (plan.peak(device) - at_rest) / 2**30
            log(step, loss=mean, learning_rate=rate, grad_norm=float(norm), examples_per_second=rows / seconds,
                tokens_per_second=seen / seconds, peak_memory_gib=memory)
            bar.write(f"step {step:6,}  loss {mean:.4f}  lr {rate:.2e}  grad {float(norm):.3f}  {rows / seconds:.0f} examples/s")
            logged, total, seen, rows, clock = step, 0.0, 0, 0, time.perf_counter()
        if stops or step % args.save_every == 0 or step == steps:
            save(step)
            done = step
        if stops:
            bar.close()
            print(f"stopped and saved after step {step:,} of {steps:,}; to go on: {ranks.COMMAND} train.py --resume {args.out}")
            return
        if args.eval_every and step % args.eval_every == 0 and step < steps:
            found = evaluate(f"step {step}")
            log(step, **figures(found))
            bar.write(f"step {step:6,}  " + ", ".join(f"{split} {result['accuracy']:.4f}" for split, result in found.items()))
            clock = time.perf_counter()

    # ---- Everything is saved: nothing that happens in the evaluation can lose it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    if shortened:
        print(f"{shortened:,} prompts were cut to --max-length {args.max_length}, at the end of their premise")
    results["finetuned"] = evaluate("finetuned")
    log(steps, **figures(results["finetuned"]))
    if ranks.FIRST:
        files = {split: [args.out / f"{name}_{split}.jsonl" for name in ("baseline", "predictions")] for split in splits}
        results["mcnemar"] = {split: report.mcnemar(*map(report.read_predictions, pair)) for split, pair in files.items()}
        memory = {"planned": planned["sum"] / 2**30, "measured": memory}
        checkpoint.write_json(args.out / "results.json", {"protocol": report.protocol("generate", args.max_new_tokens)} | results
                              | {"training_memory_gib": memory})
        report.write(args.out)
        publish.write_card(args.out)
        print(report.table(results))
    if wandb_run:
        report.finish_wandb(wandb_run, results, args.out)
    if args.push and ranks.FIRST:
        print(f"uploaded to {publish.push(args.out, args.push)}")
    print(f"adapter, results.json and report.html in {args.out}; try: python eval.py --adapter {args.out} --premise ... --hypothesis ...")


if __name__ == "__main__":
    data.run(main)
    ranks.stop()
