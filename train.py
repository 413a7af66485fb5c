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

`training_step` is what one step does, and `run` the whole story. What `run` calls
follows it: the rows and the state of a run, the base and the adapters, the steps' rows
and numbers, and evaluation. The flags and their defaults are in support/flags.py. The
recipe that they make: 40,000 steps of 16 rows, AdamW with a rate of 2e-4 that rises over
3 % of the steps and falls to 0 as a cosine, weight decay 0.01, gradients clipped to norm
1, rank 8 and alpha 16 on q and v, dropout 0.05, the loss on the answer alone.
"""

import argparse
import itertools
import math
import sys
from dataclasses import dataclass
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
    examples,
    files,
    fingerprint,
    full_memory,
    loss_scale,
    metrics,
    packing,
    processes,
    resume,
)
from support.runlog import RunLog
from support.stopping import StopRequest

# -----------------------------------------------------------------------------
# One step


def training_step(
    model: phi2.Phi2,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: list[data.Batch],
    num_predicted: float,
    max_grad_norm: float,
) -> tuple[Tensor, Tensor]:
    """Takes one step of the optimiser, with the batches that this process has of it.

    Gradients are accumulated over the batches: --accumulate of them, of --batch-size rows.

    Returns this process's part of the loss, and the norm of the gradient before it is
    clipped: scalars on the model's device, where a GPU may still be computing them.
    `num_predicted` is how many ids the step predicts, on all processes. The loss of
    each batch is divided by it, so the sum is the mean over all of them, however rows
    fall into batches. (A mean of the batches' means would give an id in a short batch
    more weight.)

    In fp16 `scaler` keeps small gradients from becoming 0, and leaves out a step whose
    gradients overflow (support/loss_scale.py). Otherwise it does nothing.
    """
    parameters = optimizer.param_groups[0]["params"]  # A and B of the adapters; W is frozen
    loss = torch.zeros((), device=model.lm_head.weight.device)
    for batch in batches:
        part = batch_loss(model, batch) / num_predicted
        scaler.scale(part).backward()  # adds to the gradients of the batches before
        loss += part.detach()
    # Summed over all processes; one without a batch adds zeros. The sum is the gradient of
    # the mean: see num_predicted.
    processes.add_gradients(parameters)
    scaler.unscale_(optimizer)  # after the sum: if it overflows, all processes see it
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return loss, grad_norm


def batch_loss(model: phi2.Phi2, batch: data.Batch) -> Tensor:
    """Returns the cross-entropy of a batch, summed over the ids that it predicts.

    The prefix that all rows share goes through the model once (support/packing.py), and
    gets the gradients of all of them; its dropout is drawn once for all. The head runs
    on the tokens that predict something, and on no other.
    """
    device = model.lm_head.weight.device
    # phi2.MaskedRows(batch.lengths, batch.prefix_length) gives the same loss, more slowly.
    # Where a whole block is computed again, its attention is too.
    recomputes = model.model.recomputes_attention and not model.model.recomputes_blocks
    layout = packing.PackedRows(
        batch.lengths, batch.prefix_length, device, recomputes=recomputes
    )
    ids = batch.ids.to(device, non_blocking=True)  # without waiting for what a GPU still does
    next_ids = batch.next_ids.to(device, non_blocking=True)
    logits = model(ids, layout, batch.last)
    # The softmax is in fp32: bf16's 8 bits are too few for a sum of 51,200 exponentials.
    return F.cross_entropy(logits.float(), next_ids, reduction="sum")


def schedule(step: int, steps: int, warmup: int | None) -> float:
    """Returns the factor on --learning-rate at a step, counted from 0.

    It rises in a line up to 1 over `warmup` steps (None: 3 % of all), then falls
    towards 0 along half a cosine. The first step is not at 0, which would waste it.
    """
    if warmup is None:
        warmup = round(0.03 * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


# -----------------------------------------------------------------------------
# The story


def main() -> None:
    args = cli.train_arguments()
    device = processes.start(args.device)
    folder = args.out or Path("out") / cli.new_name(args)
    check = None if args.resume else cli.check_out
    # No other process writes there until this one ends.
    with claims.claimed(folder, check, is_new=args.out is None) as folder:
        args.out = folder  # a name that was taken has got a number
        run(args, device)


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Trains, from the rows to the results, in the folder `args.out`."""
    # ---- What is read: the tokenizer, the rows, and what a resume starts from ----------------
    inputs = read_inputs(args)
    state = new_state(args, inputs)
    # `saved` is None for a new run. For one that was begun take_up also copies its progress and
    # its baseline into `state`.
    saved = resume.take_up(args.resume, state)
    steps = state.steps
    progress = state.progress
    if args.keep_best:
        best.read(args.out)  # raises where best/ is damaged, and not after hours
    log = RunLog(args, state, device)  # prints, and writes metrics.jsonl

    # ---- The base, in 4 bits by default: build, quantize_linears, load_weights ---------
    model = load_base(args, inputs, device)
    log.say(
        f"{args.model} ({args.quant}, {args.dtype}, {device}) on {args.dataset}: "
        f"{len(inputs.train):,} rows, {steps:,} steps of {state.rows_per_step}, "
        f"into {args.out}"
    )
    # What the base can do alone. A resumed run has measured it already.
    if saved is None:
        log.open()
        state.baseline, predictions = evaluate(args, model, inputs, log, "baseline")
        log.write_predictions("baseline", predictions)
    log.say_baseline()

    # ---- The adapters, all that is trained: inject -------------------------------------------
    adapter, optimizer = add_adapters(args, model, inputs.lora_config, log)
    scaler = loss_scale.new_scaler(args.dtype, device)
    if saved is None:
        # Whatever stops the run, it can be resumed.
        save(args, model, inputs, optimizer, scaler, log)
    else:
        saved.restore(adapter, optimizer, scaler, processes.NUMBER, device)
        log.open()  # only now is it certain that the run can be resumed
        log.say(saved.state.describe_resumption(steps))

    # ---- Training ----------------------------------------------------------------------------
    model.train()
    feed = Feed(args, inputs, state, scaler, device)
    stop = StopRequest()
    log.start_clock()
    bar = log.bar(range(progress.step, steps), total=steps)
    for step in bar:
        # Evaluate what the steps so far have taught, where it is time for it. Here, after the
        # save, and not at the end of a turn: a run that was killed in an evaluation repeats it.
        if is_evaluated(step, steps, args) and log.lacks_evaluation(step):
            log.stop_clock()
            results, _ = evaluate(args, model, inputs, log, f"step {step:6,}")
            log.say(f"step {step:6,}  {metrics.accuracies(results)}")
            log.start_clock()

        # Loss, gradients and AdamW. A GPU may still compute when this returns.
        rate = args.learning_rate * schedule(step, steps, args.warmup_steps)
        optimizer.param_groups[0]["lr"] = rate
        batches = feed.current.batches
        with full_memory.explained(full_memory.about_a_step, args, model):
            loss, grad_norm = training_step(
                model, optimizer, scaler, batches, feed.num_predicted, args.max_grad_norm
            )
        # Meanwhile the next rows are prepared. Then the numbers of this step are read:
        # its loss, which `progress` sums, its gradient's norm, and whether Ctrl-C was
        # pressed. From here on progress.step is step + 1.
        feed.prepare_next()
        grad_norm, stops = feed.finish_step(loss, grad_norm, stop)

        # Report, save, stop, where it is time for it.
        is_last = progress.step == steps
        if log.is_due(progress.step) or is_last:
            log.write_training(progress, rate, grad_norm)
        # Saved before an evaluation too: it takes long, and a kill in it loses no step.
        evaluates_next = is_evaluated(progress.step, steps, args)
        if progress.step % args.save_every == 0 or is_last or stops or evaluates_next:
            save(args, model, inputs, optimizer, scaler, log)
        if stops:
            bar.close()
            log.say_stopped()
            return
    # From here on Ctrl-C ends the run at once, and a line says how to resume it. One that has come
    # since the last step is raised by release.
    with log.resumable():
        stop.release()

    # ---- Results. All is saved: nothing that happens from here on can lose it -----------------
    finetuned, predictions = evaluate(args, model, inputs, log, "finetuned")
    rows = examples.count_rows(
        args.dataset, {"train": inputs.train} | inputs.validation, inputs.reading
    )
    rows["train"]["cut"] = progress.cut
    if processes.IS_FIRST:
        results = {
            "protocol": inputs.protocol.record(),
            "rows": rows,
            "baseline": state.baseline,
            "finetuned": finetuned,
            "training_memory_gib": log.peak_memory,
        }
        if args.keep_best:
            results["best"] = best.read(args.out)
        with log.resumable():
            is_complete = log.finish(results, predictions, data.PROMPT)
        if not is_complete:  # a picture or an upload has failed, which is printed
            sys.exit(1)


# -----------------------------------------------------------------------------
# What a run reads


@dataclass
class Inputs:
    """What the arguments of a run name, read and checked."""

    directory: Path  # of the base model
    num_parameters: int  # of the base
    tokenizer: Tokenizer
    lora_config: lora.LoRAConfig
    reading: examples.Reading  # how the dataset's files are read
    train: examples.Rows  # premise, hypothesis and label
    validation: dict[str, examples.Rows]  # the same by split
    protocol: evaluation.Protocol  # how answers to the validation rows are obtained


def read_inputs(args: argparse.Namespace) -> Inputs:
    """Returns what the arguments name, read from disk or from the Hub.

    What they leave open is filled in: the commits on the Hub, and the base's own dropout.
    Raises ValueError for what does not fit together, before the model is loaded.
    """
    loss_scale.check_same(args.dtype)
    directory = checkpoints.find(args.model, phi2.read_config, revision=args.model_revision)
    args.model_revision = checkpoints.hub_commit(args.model, directory)
    base_config = phi2.read_config(directory)
    if args.residual_dropout is None:
        args.residual_dropout = base_config.resid_pdrop
    config = lora.LoRAConfig(args.rank, args.alpha, args.dropout, args.targets)
    base = phi2.build(directory)  # without its weights: names and shapes
    lora.match_targets(base, config.targets)  # raises for a wrong target
    tokenizer = data.load_tokenizer(directory, base_config.vocab_size)
    data.check_max_length(tokenizer, args.max_length)

    reading = examples.Reading.of(args)
    train_rows = examples.load_examples(args.dataset, "train", args.limit, reading)
    validation = {
        split: examples.load_examples(args.dataset, split, args.eval_limit, reading)
        for split in examples.validation_splits(args.dataset, reading)
    }
    args.dataset_revision = examples.hub_commit(args.dataset, args.dataset_revision)

    # Its batch size is not training's: without a backward pass many rows fit.
    protocol = evaluation.Protocol(
        max_new_tokens=args.max_new_tokens, max_length=args.max_length
    )
    num_parameters = sum(parameter.numel() for parameter in base.parameters())
    return Inputs(
        directory, num_parameters, tokenizer, config, reading, train_rows, validation, protocol
    )


def new_state(args: argparse.Namespace, inputs: Inputs) -> resume.State:
    """Returns what is saved of a run beside its tensors, as it is before the first step."""
    rows_per_step = args.batch_size * args.accumulate * processes.COUNT
    steps = count_steps(args, len(inputs.train), rows_per_step)
    if (args.warmup_steps or 0) > steps:
        raise ValueError(f"--warmup-steps {args.warmup_steps}: the run has only {steps:,} steps")
    digests = {
        split: examples.digest_split(args.dataset, split, inputs.reading)
        for split in ("train", *inputs.validation)
    }
    # What report.html and eval.py show beside the arguments
    shown = {
        "base_parameters": inputs.num_parameters,
        "label_words": examples.label_words(args.dataset, "train", inputs.reading),
    }
    return resume.State(
        arguments=cli.as_json(args) | {"digests": digests} | shown,
        steps=steps,
        train_rows=len(inputs.train),
        rows_per_step=rows_per_step,
        rows_digest=fingerprint.digest_rows(inputs.train),
        validation_digest=fingerprint.digest_rows(*inputs.validation.values()),
        fingerprint=evaluation.fingerprint_of(args, inputs.directory, inputs.tokenizer),
    )


def count_steps(args: argparse.Namespace, rows: int, rows_per_step: int) -> int:
    """Returns how many optimiser steps --steps or --epochs ask for."""
    if args.epochs is None:
        return args.steps
    steps_per_epoch = math.ceil(rows / rows_per_step)  # the last step of an epoch may be smaller
    return math.ceil(args.epochs * steps_per_epoch)


# -----------------------------------------------------------------------------
# The base and the adapters


def load_base(
    args: argparse.Namespace, inputs: Inputs, device: torch.device
) -> phi2.Phi2:
    """Returns the base with its weights, quantised as the flags say. lora.inject freezes it.

    Its own dropout, which phi-2 has after attention and MLP, is on in training.
    """
    model = evaluation.load_model(
        inputs.directory, args.quant, args.dtype, device, args.double_quant, args.keep_dequantized
    )
    model.model.recomputes_blocks = args.checkpointing
    model.uses_graphs = args.graphs
    set_residual_dropout(model, args.residual_dropout)
    return model


def set_residual_dropout(model: phi2.Phi2, share: float) -> None:
    """Sets the dropout on what each of the base's blocks adds to the residual stream."""
    for block in model.model.layers:
        block.resid_dropout.p = share


def add_adapters(
    args: argparse.Namespace, model: phi2.Phi2, config: lora.LoRAConfig, log: RunLog
) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    """Puts adapters around the layers of --targets. Returns their parameters, and AdamW."""
    torch.manual_seed(args.seed)  # A is the first thing that is drawn after this, as in PEFT
    adapted = lora.inject(model, config)
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
    return adapter, optimizer


def save(
    args: argparse.Namespace,
    model: phi2.Phi2,
    inputs: Inputs,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    log: RunLog,
) -> None:
    """Writes the adapter, and all that a resume needs."""
    random = processes.gather(resume.random_state(log.device))
    if not processes.IS_FIRST:
        return
    log.forget_results()
    log.state.scaler = scaler.state_dict()
    # All files of a save are written first, and then put in their places.
    with files.replacing_files(args.out) as folder:
        lora.save_adapter(model, inputs.lora_config, folder, args.model)
        fingerprint.stamp(folder, log.state.fingerprint)
        adapter = lora.lora_parameters(model)
        resume.write(folder / resume.NAME, adapter, optimizer, random, log.state)


# -----------------------------------------------------------------------------
# The rows of each step, and the numbers that come out of it


@dataclass
class Step:
    """The rows of one optimiser step, and this process's share of them, ready for the model."""

    rows: list[dict]  # of all processes
    batches: list[data.Batch]  # of this process, --batch-size rows in each
    cut: int  # prompts of this process that --max-length has cut


class Feed:
    """The rows that go into each step, and the numbers that come out of it.

    A GPU is given work and does it later; only reading a number waits for it:

        Python   training_step(n) | rows of n + 1 | reads the numbers of n | training_step(n + 1)
        GPU              computes step n ...................................| computes n + 1

    So the next rows are tokenised and packed before the numbers are read. All numbers are
    summed over the processes in one message, with how many ids the next step predicts. Its
    arrival is the one wait of a step.

    current: the step that is to be taken, or was just taken.
    next: the one after it, once it is prepared.
    num_predicted: how many ids `current` predicts, on all processes.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        inputs: Inputs,
        state: resume.State,
        scaler: torch.amp.GradScaler,
        device: torch.device,
    ):
        self.args = args
        self.tokenizer = inputs.tokenizer
        self.progress = state.progress
        self.scaler = scaler
        self.device = device
        # The order of rows is a function of seed and step: a resumed run sees those it
        # would have.
        first = state.progress.step
        steps = data.rows_of_steps(inputs.train, state.rows_per_step, args.seed, first)
        self.rows_of_steps = itertools.islice(steps, state.steps - first)
        self.current = self.read_step()
        self.next = None
        (self.num_predicted,) = processes.total(device, count_predicted(self.current.batches))

    def prepare_next(self) -> None:
        """Tokenises and packs the rows of the next step."""
        self.next = self.read_step()

    def read_step(self) -> Step:
        """Returns the step that follows. After the last one it has no rows."""
        rows = next(self.rows_of_steps, [])
        # Each process takes every COUNT-th row. Of the last step of an epoch it may get
        # none.
        mine = rows[processes.NUMBER :: processes.COUNT]
        encoded = [data.encode(row, self.tokenizer, self.args.max_length) for row in mine]
        cut = data.count_cut(mine, encoded, self.tokenizer, self.args.max_length)
        return Step(rows, collated(encoded, self.tokenizer, self.args), cut)

    def finish_step(
        self, loss: Tensor, grad_norm: Tensor, stop: StopRequest
    ) -> tuple[float, bool]:
        """Waits for the step that was taken and counts it. The next one becomes the current.

        Returns its gradient's norm, and whether a process was asked to stop. Raises
        ValueError where loss or norm are not finite: the step has spoiled every weight of
        the adapter. (In fp16 the norm may be: then the step was skipped, and counts.)
        """
        taken = self.current
        loss, grad_norm, tokens, cut, stops, self.num_predicted = processes.total(
            self.device,
            loss,
            grad_norm / processes.COUNT,  # each process has the norm of the whole sum
            sum(len(batch.ids) for batch in taken.batches),
            taken.cut,
            bool(stop),
            count_predicted(self.next.batches),
        )
        self.current = self.next
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if not is_finite and not loss_scale.is_overflow(self.scaler, loss):
            numbers = sorted(row["row"] for row in taken.rows)
            raise ValueError(
                f"step {self.progress.step + 1}: the loss is {loss:.4g}, the norm of its "
                f"gradient {grad_norm:.4g}, with the rows {numbers} of train; "
                f"{self.args.out} keeps the last save{loss_scale.hint(self.scaler)}"
            )
        self.progress.add(loss, len(taken.rows), int(tokens), int(cut), not is_finite)
        return grad_norm, bool(stops)


def collated(
    encoded: list, tokenizer: Tokenizer, args: argparse.Namespace
) -> list[data.Batch]:
    """Returns batches of `batch_size` rows that are (prompt ids, answer ids)."""
    prefix_length = shared_prefix_length(tokenizer, args)
    return [
        data.collate(encoded[start : start + args.batch_size], prefix_length, args.loss)
        for start in range(0, len(encoded), args.batch_size)
    ]


def shared_prefix_length(tokenizer: Tokenizer, args: argparse.Namespace) -> int:
    """Returns how many ids the rows of a batch share. (The full loss is on each row's own.)"""
    if args.loss == "full" or not args.share_prefix:
        return 0
    prefix_ids, _, _ = data.fixed_ids(tokenizer)
    return len(prefix_ids)


def count_predicted(batches: list[data.Batch]) -> int:
    return sum(len(batch.next_ids) for batch in batches)


# -----------------------------------------------------------------------------
# Evaluation


def is_evaluated(step: int, steps: int, args: argparse.Namespace) -> bool:
    """Returns whether --eval-every asks for an evaluation after a step.

    Before the first step and after the last one there is one in any case.
    """
    return bool(args.eval_every) and 0 < step < steps and step % args.eval_every == 0


def evaluate(
    args: argparse.Namespace, model: phi2.Phi2, inputs: Inputs, log: RunLog, title: str
) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """Returns the statistics and the predictions of all validation splits, by their names.

    The accuracies and losses become a line of metrics.jsonl. With --keep-best the
    adapter is kept where no evaluation before was better.
    """
    results = {}
    predictions = {}
    with log.resumable(), full_memory.explained(full_memory.about_the_loss, args, model):
        for split, pairs in inputs.validation.items():
            results[split], predictions[split] = evaluation.evaluate(
                model, inputs.tokenizer, pairs, inputs.protocol, f"{title}, {split}"
            )
            results[split]["loss"] = validation_loss(model, inputs.tokenizer, pairs, args)
        keep_best(args, model, inputs, log, results)
    log.write_evaluation(log.state.progress.step, results)
    return results, predictions


def keep_best(
    args: argparse.Namespace, model: phi2.Phi2, inputs: Inputs, log: RunLog, results: dict
) -> None:
    """Saves the adapter in best/ if it is asked for and this evaluation is the best so far."""
    step = log.state.progress.step
    if not (processes.IS_FIRST and args.keep_best) or step == 0:  # at 0 there is no adapter yet
        return
    figures = best.figures(step, results)
    if best.is_better(figures, best.read(args.out)):
        with best.replacing(args.out) as folder:
            lora.save_adapter(model, inputs.lora_config, folder, args.model)
            fingerprint.stamp(folder, log.state.fingerprint | best.metadata(figures))


@torch.no_grad()
def validation_loss(
    model: phi2.Phi2, tokenizer: Tokenizer, pairs, args: argparse.Namespace
) -> float:
    """Returns the mean loss over all predicted ids of a split, without dropout."""
    was_training = model.training
    model.eval()
    encoded = data.encode_batch(pairs, tokenizer, args.max_length)
    # Sorted by length: tokens are not padded, but within attention rows are, on some
    # devices.
    encoded.sort(key=lambda pair: len(pair[0]))
    batches = collated(encoded[processes.NUMBER :: processes.COUNT], tokenizer, args)
    device = model.lm_head.weight.device
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        loss += batch_loss(model, batch)
    model.train(was_training)
    (total,) = processes.total(device, loss)
    return total / sum(processes.gather(count_predicted(batches)))


if __name__ == "__main__":
    cli.run(main)
    processes.stop()
