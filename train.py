"""LoRA fine-tuning on MNLI, from top to bottom. Last in the reading order.

    python train.py --rank 8                    # phi-2 with a GPU, else the small model in tiny/
    python train.py --rank 16 --targets all-linear --steps 2000 --out out/wide
    python train.py --model ~/phi-2 --dataset ~/mnli --limit 2000 --eval-limit 500
    python train.py --resume out/wide                             # after Ctrl-C or a crash
    torchrun --nproc-per-node 8 train.py --rank 8                 # eight GPUs, 16 rows on each
    python eval.py --adapter out/wide

It leaves in --out: the adapter in PEFT's format with its model card, args.json,
metrics.jsonl, predictions, results.json, report.html, trainer.safetensors to resume from,
and with --keep-best the adapter of the best evaluation, in best/. Of several processes
(support/processes.py) each takes its part of every step, and the first alone writes.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves it out

from support import cli

if __name__ == "__main__":
    cli.answer_help(cli.train_parser)  # before torch is imported, which takes seconds

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

import data
import eval as evaluation
import lora
import phi2
from support import (
    best,
    checkpoints,
    claims,
    commands,
    examples,
    files,
    fingerprint,
    metrics,
    packing,
    processes,
    resume,
)
from support.runlog import RunLog
from support.stopping import StopRequest

LOG_EVERY = 50  # steps between lines
NO_STEP = ([], [], 0)  # what follows the last step: no rows


def learning_rate(step: int, steps: int, warmup: int | None) -> float:
    """Returns the factor on the learning rate at a step, counted from 0.

    It rises in a line up to 1 over `warmup` steps (None: 3 % of all), then falls to 0 along
    half a cosine. The first step is not at 0, which would waste it.
    """
    if warmup is None:
        warmup = round(0.03 * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def set_residual_dropout(model: phi2.Phi2, share: float) -> None:
    """Sets the dropout on what each of the base's blocks adds to the residual stream."""
    for block in model.model.layers:
        block.resid_dropout.p = share


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def count_steps(args: argparse.Namespace, rows: int, rows_per_step: int) -> int:
    """Returns how many optimiser steps --steps or --epochs ask for."""
    if args.epochs is None:
        return args.steps
    steps_per_epoch = math.ceil(rows / rows_per_step)  # the last step of an epoch may be smaller
    return math.ceil(args.epochs * steps_per_epoch)


def batch_loss(model: phi2.Phi2, batch: data.Batch) -> Tensor:
    """Returns the cross-entropy of a batch, summed over its targets.

    The prefix that all rows share goes through the model once (support/packing.py). The head
    runs on the tokens that have a target, and on no other.
    """
    device = model.lm_head.weight.device
    recomputes = model.model.checkpointing == "attention"
    layout = packing.PackedRows(
        batch.lengths, batch.prefix_length, device, recomputes=recomputes
    )
    ids = batch.ids.to(device, non_blocking=True)  # without waiting for what a GPU still does
    targets = batch.targets.to(device, non_blocking=True)
    logits = model(ids, layout, batch.last)
    # The softmax is in fp32: a sum of 51,200 exponentials needs more than the 8 bits of bf16.
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def count_targets(encoded: list[tuple[list[int], list[int]]], loss: str) -> int:
    """Returns how many ids of these (prompt ids, answer ids) are predicted."""
    answers = sum(len(answer) for _, answer in encoded)
    if loss == "answer":
        return answers
    return answers + sum(len(prompt) - 1 for prompt, _ in encoded)


def shared_prefix_length(tokenizer: Tokenizer, args: argparse.Namespace) -> int:
    """Returns how many ids the rows of a batch share. The full loss has targets among them."""
    if args.loss == "full" or not args.share_prefix:
        return 0
    prefix_ids, _, _ = data.fixed_ids(tokenizer)
    return len(prefix_ids)


def collated(
    encoded: list, prefix_length: int, args: argparse.Namespace
) -> Iterator[data.Batch]:
    """Yields batches of `batch_size` encoded rows."""
    for start in range(0, len(encoded), args.batch_size):
        rows = encoded[start : start + args.batch_size]
        yield data.collate(rows, prefix_length, args.loss)


def accumulate_gradients(
    model: phi2.Phi2, encoded: list, targets: float, prefix_length: int, args: argparse.Namespace
) -> tuple[Tensor, int]:
    """Runs this process's rows of a step forward and backward, `batch_size` of them at a time.

    Returns this process's part of the loss, and how many ids the model has read. `targets` is
    the number of targets of the step, on all processes. Loss and gradients of all processes are
    then added up. Each is divided by `targets` already, so the sum is the mean over all
    targets, however the rows fall into batches. (A mean of the batches' means would give a
    target in a short batch more weight.) A process may have no row in the last step of an
    epoch; its part is 0.
    """
    device = model.lm_head.weight.device
    loss = torch.zeros((), device=device)  # it stays on the device: reading it would wait for it
    tokens = 0
    for batch in collated(encoded, prefix_length, args):
        batch_part = batch_loss(model, batch) / targets
        batch_part.backward()
        loss += batch_part.detach()
        tokens += len(batch.ids)
    return loss, tokens


def encoded_steps(
    train_rows, tokenizer: Tokenizer, rows_per_step: int, first: int, args: argparse.Namespace
) -> Iterator[tuple[list, list, int]]:
    """Yields for each step, from number `first`: its rows; this process's part of them as
    (prompt ids, answer ids); how many of these --max-length has cut.

    The order of rows is a function of seed and step: a resumed run sees the rows it would have.
    """
    for rows in data.batches(train_rows, rows_per_step, args.seed, first):
        # Each process takes every COUNT-th row of the step.
        mine = rows[processes.NUMBER :: processes.COUNT]
        encoded = [data.encode(row, tokenizer, args.max_length) for row in mine]
        yield rows, encoded, data.count_cut(mine, encoded, tokenizer, args.max_length)


# -----------------------------------------------------------------------------
# Evaluation on the way


def is_evaluated(step: int, steps: int, args: argparse.Namespace) -> bool:
    """Returns whether --eval-every asks for an evaluation after a step.

    Before the first step and after the last one there is one in any case.
    """
    return bool(args.eval_every) and 0 < step < steps and step % args.eval_every == 0


def evaluate(
    model: phi2.Phi2, tokenizer: Tokenizer, splits: dict, args: argparse.Namespace, stage: str
) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """Returns the statistics and the predictions of all validation splits, by their names."""
    protocol = protocol_of(args)
    results = {}
    predictions = {}
    for split, pairs in splits.items():
        title = f"{stage}, {split}"
        results[split], predictions[split] = evaluation.evaluate(
            model, tokenizer, pairs, protocol, title
        )
        results[split]["loss"] = validation_loss(model, tokenizer, pairs, args)
    return results, predictions


def protocol_of(args: argparse.Namespace) -> evaluation.Protocol:
    # Its batch size is not that of training: without a backward pass a row needs little memory.
    return evaluation.Protocol(max_new_tokens=args.max_new_tokens, max_length=args.max_length)


@torch.no_grad()
def validation_loss(
    model: phi2.Phi2, tokenizer: Tokenizer, pairs, args: argparse.Namespace
) -> float:
    """Returns the mean loss over all targets of a split: the same function as in training."""
    was_training = model.training
    model.eval()
    prefix_length = shared_prefix_length(tokenizer, args)
    encoded = data.encode_batch(pairs, tokenizer, args.max_length)
    # Sorted by length, so that attention pads least.
    encoded.sort(key=lambda pair: len(pair[0]))
    mine = encoded[processes.NUMBER :: processes.COUNT]
    device = model.lm_head.weight.device
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for batch in collated(mine, prefix_length, args):
        loss += batch_loss(model, batch)
    model.train(was_training)
    (total,) = processes.total(device, loss)
    return total / count_targets(encoded, args.loss)


# -----------------------------------------------------------------------------
# The script


def main() -> None:
    args = cli.train_arguments()
    device = processes.start(args.device)
    folder = args.out or Path("out") / cli.new_name(args)
    check = None if args.resume else cli.check_out
    # No other process writes there until this one ends.
    with claims.claimed(folder, check, is_new=args.out is None) as args.out:
        run(args, device)


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Trains, from the data to the results, in the folder `args.out`."""
    adapter_config = lora.LoRAConfig(args.rank, args.alpha, args.dropout, args.targets)

    # ---- Data -------------------------------------------------------------------------------
    directory = checkpoints.find(args.model, phi2.read_config, revision=args.model_revision)
    args.model_revision = checkpoints.hub_commit(args.model, directory)
    base_config = phi2.read_config(directory)
    lora.match_targets(phi2.build(directory), adapter_config.targets)  # a wrong one ends here
    tokenizer = data.load_tokenizer(directory, base_config.vocab_size)
    data.check_max_length(tokenizer, args.max_length)
    reading = examples.Reading.of(args)
    train_rows = examples.load_examples(args.dataset, "train", args.limit, reading)
    validation = {
        split: examples.load_examples(args.dataset, split, args.eval_limit, reading)
        for split in examples.validation_splits(args.dataset, reading)
    }
    args.dataset_revision = examples.hub_commit(args.dataset, args.dataset_revision)
    digests = {
        split: examples.digest_split(args.dataset, split, reading)
        for split in ("train", *validation)
    }
    rows_per_step = args.batch_size * args.accumulate * processes.COUNT
    steps = count_steps(args, len(train_rows), rows_per_step)
    if (args.warmup_steps or 0) > steps:
        raise ValueError(f"--warmup-steps {args.warmup_steps}: the run has only {steps:,} steps")
    prefix_length = shared_prefix_length(tokenizer, args)
    if args.residual_dropout is None:
        args.residual_dropout = base_config.resid_pdrop

    # ---- A resume is checked first: one that is refused changes nothing ---------------------
    made_for = evaluation.fingerprint_of(args, directory, tokenizer)
    state = resume.State(
        arguments=cli.as_json(args) | {"digests": digests},
        steps=steps,
        train_rows=len(train_rows),
        rows_per_step=rows_per_step,
        rows_digest=fingerprint.digest_rows(train_rows),
        validation_digest=fingerprint.digest_rows(*validation.values()),
        fingerprint=made_for,
    )
    saved = resume.load_if_begun(args.resume)
    if saved:
        saved.state.check(args.resume, state)
        state.progress = saved.state.progress
        state.baseline = saved.state.baseline
    progress = state.progress
    if args.keep_best:
        best.read(args.out)  # a damaged one ends here
    log = RunLog(args, state, device)

    # ---- The frozen base: phi-2 in 4 bits ---------------------------------------------------
    model = evaluation.load_model(
        directory, args.quant, args.dtype, device, args.double_quant, args.keep_dequantized
    )
    if args.checkpointing:
        model.model.checkpointing = "blocks"
    model.uses_graphs = args.graphs
    set_residual_dropout(model, args.residual_dropout)
    log.say(
        f"{args.model} ({args.quant}, {args.dtype}, {device}) on {args.dataset}: "
        f"{len(train_rows):,} rows, {steps:,} steps of {rows_per_step}, into {args.out}"
    )
    # What the base can do alone. A resumed run has measured it already.
    if not saved:
        log.open()
        with log.resumable():
            state.baseline, predictions = evaluate(
                model, tokenizer, validation, args, "baseline"
            )
        log.write_predictions("baseline", predictions)
        log.write_evaluation(0, state.baseline)
    for split, result in state.baseline.items():
        if result["cut"]:
            number = f"{result['cut']:,}"
            log.say(f"{number} prompts of {split} are cut to --max-length {args.max_length}")
    log.say(f"baseline: {metrics.accuracies(state.baseline)}")

    # ---- The adapters: all that is trained --------------------------------------------------
    torch.manual_seed(args.seed)  # A is drawn first, as in PEFT
    adapted = lora.inject(model, adapter_config)
    # All processes have drawn the same A. From here on each draws a dropout of its own.
    if not processes.IS_FIRST:
        torch.manual_seed(args.seed + processes.NUMBER)
    adapter = lora.lora_parameters(model)
    parameters = list(adapter.values())
    trained = sum(parameter.numel() for parameter in parameters)
    log.say(f"{len(adapted)} layers adapted, {trained:,} parameters to train")
    # Two fp32 moments for each trained number: 21 MB for phi-2 at rank 8.
    optimizer = torch.optim.AdamW(
        parameters, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
    )

    def save() -> None:
        random = processes.gather(resume.random_state(device))
        if processes.IS_FIRST:
            log.forget_results()
            # All files of a save are written first, and then put in their places.
            with files.replacing_files(args.out) as folder:
                lora.save_adapter(model, adapter_config, folder, args.model)
                fingerprint.stamp(folder, made_for)
                resume.write(folder / resume.NAME, adapter, optimizer, random, state)

    def keep_best(results: dict[str, dict]) -> None:
        if not (processes.IS_FIRST and args.keep_best):
            return
        figures = best.figures(progress.step, results)
        if best.is_better(figures, best.read(args.out)):
            with best.replacing(args.out) as folder:
                lora.save_adapter(model, adapter_config, folder, args.model)
                fingerprint.stamp(folder, made_for | best.metadata(figures))

    def evaluate_on_the_way() -> None:
        title = f"step {progress.step:6,}"
        # Its predictions are not kept: of many evaluations nobody reads them.
        results, _ = evaluate(model, tokenizer, validation, args, title)
        keep_best(results)
        log.write_evaluation(progress.step, results)
        log.say(f"{title}  {metrics.accuracies(results)}")
        log.start_clock()

    if saved:
        saved.restore(adapter, optimizer, processes.NUMBER, device)
        log.open()  # only now is it certain that the run can be resumed
        log.say(saved.state.describe_resumption(steps))
    else:
        save()  # step 0, so that whatever stops the run, it can be resumed

    # ---- Training ---------------------------------------------------------------------------
    model.train()
    first = progress.step
    all_steps = encoded_steps(train_rows, tokenizer, rows_per_step, first, args)
    left = itertools.islice(all_steps, steps - first)
    following = next(left, NO_STEP)
    _, encoded, _ = following
    (targets,) = processes.total(device, count_targets(encoded, args.loss))
    # The run was killed between a save and the evaluation of its step.
    if any(processes.gather(is_evaluated(first, steps, args) and log.lacks_evaluation(first))):
        evaluate_on_the_way()
    stop = StopRequest()
    log.start_clock()
    bar = log.bar(range(first, steps), total=steps)
    for step in bar:
        # Forward and backward on each process's rows, then one sum over all processes.
        rows, encoded, cut = following
        loss, tokens = accumulate_gradients(model, encoded, targets, prefix_length, args)
        processes.add_gradients(parameters)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)

        # A GPU still works on all this. Meanwhile the rows of the next step are encoded. Then
        # the sums over all processes are read, which is the step's one wait for the GPU: of this
        # step's numbers, and of the targets of the next one.
        following = next(left, NO_STEP)
        _, next_encoded, _ = following
        share = grad_norm / processes.COUNT  # each process has the norm of the whole sum
        loss, grad_norm, tokens, cut, stops, targets = processes.total(
            device, loss, share, tokens, cut, bool(stop), count_targets(next_encoded, args.loss)
        )
        if not math.isfinite(grad_norm):  # such a step would spoil every weight of the adapter
            numbers = sorted(row["row"] for row in rows)
            raise ValueError(
                f"step {step + 1}: the loss is {loss:.4g}, the norm of its gradient "
                f"{grad_norm:.4g}, with the rows {numbers} of train; "
                f"{args.out} keeps the last save"
            )

        # One step of AdamW on the adapters.
        rate = args.learning_rate * learning_rate(step, steps, args.warmup_steps)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # Report, save, evaluate, stop, where it is time for it.
        progress.add(loss, len(rows), int(tokens), int(cut))
        is_last = progress.step == steps
        if progress.step % LOG_EVERY == 0 or is_last:
            log.write_training(progress, rate, grad_norm)
        evaluates = is_evaluated(progress.step, steps, args)
        # Before an evaluation too: it takes long, and a kill in it is to lose no step.
        if progress.step % args.save_every == 0 or is_last or stops or evaluates:
            save()
        if evaluates:
            evaluate_on_the_way()
        if stops:
            bar.close()
            log.say(
                f"stopped and saved after step {progress.step:,} of {steps:,}; "
                f"to resume: {commands.resume(args.out)}"
            )
            return
    with log.resumable():
        stop.release()

    # ---- Results. All is saved: nothing that happens from here on can lose it -----------------
    if progress.cut:
        log.say(
            f"{progress.cut:,} prompts were cut to --max-length {args.max_length}, "
            "at the end of their premise, and of their hypothesis where that was not enough"
        )
    with log.resumable():
        finetuned, predictions = evaluate(model, tokenizer, validation, args, "finetuned")
        keep_best(finetuned)
    log.write_evaluation(steps, finetuned)
    rows = examples.count_rows(args.dataset, {"train": train_rows} | validation, reading)
    rows["train"]["cut"] = progress.cut
    if processes.IS_FIRST:
        results = {
            "protocol": protocol_of(args).record(),
            "rows": rows,
            "baseline": state.baseline,
            "finetuned": finetuned,
            "training_memory_gib": log.peak_memory,
        }
        if args.keep_best:
            results["best"] = best.read(args.out)
        with log.resumable():
            done = log.finish(results, predictions, data.PROMPT)
        if not done:
            sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
    processes.stop()
