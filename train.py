"""LoRA fine-tuning on MNLI, from top to bottom. Last in the reading order.

    python train.py --rank 8                    # phi-2 with a GPU, else the small model in tiny/
    python train.py --rank 16 --targets all-linear --steps 2000 --out out/wide
    python train.py --model ~/phi-2 --dataset ~/mnli --limit 2000 --eval-limit 500
    python train.py --resume out/wide                             # after Ctrl-C or a crash
    torchrun --nproc-per-node 8 train.py --rank 8                 # eight GPUs, 16 rows on each
    python eval.py --adapter out/wide

A run writes into --out: the adapter in PEFT's format with a model card, args.json,
metrics.jsonl, predictions, results.json, report.html, trainer.safetensors to resume from,
and with --keep-best the adapter of the best evaluation, in best/. torchrun starts several
processes (support/processes.py), one for each GPU. Each has the whole model, and in every
step its own rows; their gradients are added up. Only the first one writes.

`training_step` is one optimiser step, and `run` is the whole training. The functions
that `run` calls come after it: the inputs and the state of a run, the base and the
adapters, the rows and the numbers of each step, and evaluation. The flags and their
defaults are in support/flags.py. The default recipe is: 40,000 steps of 16 rows in each
process; AdamW with a learning rate that rises to 2e-4 over 3 % of the steps and falls
towards 0 along a cosine; weight decay 0.01; gradients clipped to norm 1; rank 8 and alpha
16 on q and v; dropout 0.05 (beside phi-2's own); the loss on the answer only.
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
    """Takes one optimiser step with `batches`, this process's share of the step's rows.

    Gradients are accumulated over the batches: up to --accumulate batches (1 by default) of
    up to --batch-size rows (16).

    Returns this process's part of the loss, and the norm of the gradient before
    clipping. Both are scalars on the model's device, and a GPU may still be computing
    them. `num_predicted` is the number of ids that the step predicts, over all
    processes. The loss of each batch is divided by it, so that the sum is the mean over
    all these ids, however the rows are divided into batches. (The mean of the batches'
    means would give the ids in a small batch more weight.)

    In fp16 `scaler` keeps small gradients from becoming 0, and skips a step whose
    gradients overflow (support/loss_scale.py). With another dtype it only calls
    optimizer.step().
    """
    parameters = optimizer.param_groups[0]["params"]  # A and B of the adapters; W is frozen
    loss = torch.zeros((), device=model.lm_head.weight.device)
    for batch in batches:
        part = batch_loss(model, batch) / num_predicted
        scaler.scale(part).backward()  # adds to the gradients of the previous batches
        loss += part.detach()
    # Summed over all processes; one without a batch adds zeros. The sum is the gradient
    # of the mean loss, because of the division by num_predicted. All processes then
    # take the same step, so their A and B stay equal.
    processes.add_gradients(parameters)
    scaler.unscale_(optimizer)  # after the sum, so that all processes see the same overflow
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return loss, grad_norm


def batch_loss(model: phi2.Phi2, batch: data.Batch) -> Tensor:
    """Returns the cross-entropy of a batch, summed over the ids that it predicts.

    The prefix that all rows share goes through the model once (support/packing.py). Its
    gradient is the sum over the rows, and its dropout is drawn once for all of them. The
    output head runs only on the tokens that predict an id.
    """
    device = model.lm_head.weight.device
    # phi2.MaskedRows(batch.lengths, batch.prefix_length, device) gives the same
    # loss, more slowly. If whole transformer blocks are recomputed, that includes
    # their attention.
    recomputes = model.model.recomputes_attention and not model.model.recomputes_blocks
    layout = packing.PackedRows(
        batch.lengths, batch.prefix_length, device, recomputes=recomputes
    )
    ids = batch.ids.to(device, non_blocking=True)  # without waiting for a busy GPU
    next_ids = batch.next_ids.to(device, non_blocking=True)
    logits = model(ids, layout, batch.last)
    # The softmax is in fp32: 8 significant bits (bf16) are too few to add 51,200
    # exponentials.
    return F.cross_entropy(logits.float(), next_ids, reduction="sum")


def schedule(step: int, steps: int, warmup: int | None) -> float:
    """Returns the factor on --learning-rate at `step`, counted from 0.

    The factor rises linearly to 1 over `warmup` steps (None: 3 % of all steps), then falls
    towards 0 along half a cosine. It does not start at 0, which would waste the first step.
    """
    if warmup is None:
        warmup = round(0.03 * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


# -----------------------------------------------------------------------------
# A whole run


def main() -> None:
    args = cli.train_arguments()
    device = processes.start(args.device)
    folder = args.out or Path("out") / cli.new_name(args)  # with --resume, args.out is the run
    check = None if args.resume else cli.check_out
    # No other run may write there until this one ends.
    with claims.claimed(folder, check, is_new=args.out is None) as folder:
        args.out = folder  # with a number appended if the name was taken
        run(args, device)


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Runs a training from its inputs to its results, in the folder `args.out`."""
    # ---- Inputs: the tokenizer, the rows, and the save that a resume starts from -------------
    inputs = read_inputs(args)
    state = new_state(args, inputs)
    # `saved` is None for a new run. For a resumed run take_up also copies the saved
    # progress and baseline into `state`.
    saved = resume.take_up(args.resume, state)
    steps = state.steps
    progress = state.progress
    if args.keep_best:
        best.read(args.out)  # raises now if best/ is damaged, not after hours
    log = RunLog(args, state, device)  # prints, and writes metrics.jsonl

    # ---- The base, in 4 bits by default: build, quantize_linears, load_weights ---------------
    model = load_base(args, inputs, device)
    log.say(
        f"{args.model} ({args.quant}, {args.dtype}, {device}) on {args.dataset}: "
        f"{len(inputs.train):,} rows, {steps:,} steps of {state.rows_per_step}, "
        f"into {args.out}"
    )
    # The accuracy of the base alone. A resumed run has already measured it.
    if saved is None:
        log.open()
        state.baseline, predictions = evaluate(args, model, inputs, log, "baseline")
        log.write_predictions("baseline", predictions)
    log.say_baseline()

    # ---- The adapters, the only part that is trained: inject ---------------------------------
    adapter, optimizer = add_adapters(args, model, inputs.lora_config, log)
    scaler = loss_scale.new_scaler(args.dtype, device)
    if saved is None:
        # From here on the run can be resumed, whatever stops it.
        save(args, model, inputs, optimizer, scaler, log)
    else:
        saved.restore(adapter, optimizer, scaler, processes.NUMBER, device)
        log.open()  # not earlier: only now is it certain that the run can be resumed
        log.say(saved.state.describe_resumption(steps))

    # ---- Training ----------------------------------------------------------------------------
    model.train()
    feed = Feed(args, inputs, state, scaler, device)
    stop = StopRequest()
    log.start_clock()
    bar = log.bar(range(progress.step, steps), total=steps)
    for step in bar:
        # Evaluate the adapter so far, if that is due. This comes at the start of an
        # iteration, after the save, so that a run killed during an evaluation repeats
        # it when it resumes.
        if is_evaluated(step, steps, args) and log.lacks_evaluation(step):
            log.stop_clock()
            results, _ = evaluate(args, model, inputs, log, f"step {step:6,}")
            log.say(f"step {step:6,}  {metrics.accuracies(results)}")
            log.start_clock()

        # Loss, gradients and AdamW. A GPU may still be computing when this returns.
        rate = args.learning_rate * schedule(step, steps, args.warmup_steps)
        optimizer.param_groups[0]["lr"] = rate
        batches = feed.current.batches
        with full_memory.explained(full_memory.about_a_step, args, model):
            loss, grad_norm = training_step(
                model, optimizer, scaler, batches, feed.num_predicted, args.max_grad_norm
            )
        # Meanwhile the next rows are prepared. Then the numbers of this step are read,
        # and added to the sums for the next line of the log. From here on progress.step
        # is step + 1.
        feed.prepare_next()
        numbers = feed.finish_step(step, loss, grad_norm, stop)
        progress.add(numbers)

        # Report, save and stop, each if it is due.
        is_last = progress.step == steps
        if log.is_due(progress.step) or is_last:
            log.write_training(progress, rate, numbers.grad_norm)
        # Also save before an evaluation, which takes long: no step is lost if
        # it is killed.
        evaluates_next = is_evaluated(progress.step, steps, args)
        is_due = progress.step % args.save_every == 0 or evaluates_next
        if is_due or is_last or numbers.stops:
            save(args, model, inputs, optimizer, scaler, log)
        if numbers.stops:
            bar.close()
            log.say_stopped()
            return
    # From here on Ctrl-C ends the run at once, and prints how to resume it. If Ctrl-C
    # was pressed after the last step, release raises KeyboardInterrupt.
    with log.resumable():
        stop.release()

    # ---- Results: everything trained is saved, so no error from here on can lose it -----------
    finetuned, predictions = evaluate(args, model, inputs, log, "finetuned")
    rows = examples.count_rows(
        args.dataset, {"train": inputs.train} | inputs.validation, inputs.reading
    )
    rows["train"]["cut"] = progress.cut
    if processes.IS_FIRST:
        results = {
            "protocol": inputs.settings.record(),
            "rows": rows,
            "baseline": state.baseline,
            "finetuned": finetuned,
            "training_memory_gib": log.peak_memory,
        }
        if args.keep_best:
            results["best"] = best.read(args.out)
        with log.resumable():
            is_complete = log.finish(results, predictions, data.PROMPT)
        if not is_complete:  # a picture, an upload or the like has failed, which was printed
            sys.exit(1)


# -----------------------------------------------------------------------------
# The inputs and the state of a run


@dataclass
class Inputs:
    """What the arguments of a run refer to, read and checked."""

    directory: Path  # of the base model
    num_parameters: int  # of the base
    tokenizer: Tokenizer
    lora_config: lora.LoRAConfig
    reading: examples.Reading  # how the dataset's files are read
    train: examples.Rows  # premise, hypothesis and label
    validation: dict[str, examples.Rows]  # the same columns, by split
    settings: evaluation.Settings  # how predictions for the validation rows are made


def read_inputs(args: argparse.Namespace) -> Inputs:
    """Returns what the arguments refer to, read from disk or from the Hub.

    Fills in arguments that were left open: the commits on the Hub, the base's own dropout,
    and one --dtype for all processes.
    Raises ValueError if things do not fit together, before the weights are loaded.
    """
    # The default depends on the GPU, and GPUs may differ. More GPUs can compute in
    # the later ones.
    args.dtype = max(processes.gather(args.dtype), key=["bf16", "fp16", "fp32"].index)
    directory = checkpoints.find(args.model, phi2.read_config, revision=args.model_revision)
    args.model_revision = checkpoints.hub_commit(args.model, directory)
    base_config = phi2.read_config(directory)
    if args.residual_dropout is None:
        args.residual_dropout = base_config.resid_pdrop
    config = lora.LoRAConfig(args.rank, args.alpha, args.dropout, args.targets)
    base = phi2.build(directory)  # without weights: only names and shapes
    lora.match_targets(base, config.targets)  # raises if a target matches no layer
    tokenizer = data.load_tokenizer(directory, base_config.vocab_size)
    data.check_max_length(tokenizer, args.max_length)

    reading = examples.Reading.of(args)
    train_rows = examples.load_examples(args.dataset, "train", args.limit, reading)
    validation = {
        split: examples.load_examples(args.dataset, split, args.eval_limit, reading)
        for split in examples.validation_splits(args.dataset, reading)
    }
    args.dataset_revision = examples.hub_commit(args.dataset, args.dataset_revision)

    # Evaluation has its own batch size, because without a backward pass more rows fit.
    settings = evaluation.Settings(
        max_new_tokens=args.max_new_tokens, max_length=args.max_length
    )
    num_parameters = sum(parameter.numel() for parameter in base.parameters())
    return Inputs(
        directory, num_parameters, tokenizer, config, reading, train_rows, validation, settings
    )


def new_state(args: argparse.Namespace, inputs: Inputs) -> resume.State:
    """Returns the state that is saved with a run's tensors, as it is before the first step."""
    rows_per_step = args.batch_size * args.accumulate * processes.COUNT
    steps = count_steps(args, len(inputs.train), rows_per_step)
    if (args.warmup_steps or 0) > steps:
        raise ValueError(f"--warmup-steps {args.warmup_steps}: the run has only {steps:,} steps")
    digests = {
        split: examples.digest_split(args.dataset, split, inputs.reading)
        for split in ("train", *inputs.validation)
    }
    # Values that report.html and eval.py show with the arguments
    shown = {
        "base_parameters": inputs.num_parameters,
        "label_words": examples.label_words(inputs.reading),
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
    """Returns the number of optimiser steps that --steps or --epochs asks for."""
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

    The base's own dropout, which phi-2 has after attention and MLP, is active in training.
    """
    model = evaluation.load_model(
        inputs.directory, args.quant, args.dtype, device, args.double_quant, args.keep_dequantized
    )
    model.model.recomputes_blocks = args.checkpointing
    model.uses_graphs = args.graphs
    for block in model.model.layers:
        block.resid_dropout.p = args.residual_dropout
    return model


def add_adapters(
    args: argparse.Namespace, model: phi2.Phi2, config: lora.LoRAConfig, log: RunLog
) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    """Adds adapters to the layers of --targets. Returns their parameters, and AdamW for them."""
    torch.manual_seed(args.seed)  # the first random numbers after this are A's, as in PEFT
    adapted = lora.inject(model, config)
    # All processes have drawn the same A. From here on each process draws its
    # own dropout.
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
    """Writes the adapter, and everything that a resume needs."""
    # Every process must take part in this, but only the first one writes.
    random = processes.gather(resume.random_state(log.device))
    if not processes.IS_FIRST:
        return
    log.forget_results()  # of a finished run that is continued: they are about the last adapter
    log.state.scaler = scaler.state_dict()
    # All files of a save are written first, and only then moved into place.
    with files.replacing_files(args.out) as folder:
        lora.save_adapter(model, inputs.lora_config, folder, args.model)
        # Into the metadata of adapter_model.safetensors, which PEFT ignores.
        fingerprint.stamp(folder, log.state.fingerprint)
        adapter = lora.lora_parameters(model)
        resume.write(folder / resume.NAME, adapter, optimizer, random, log.state)


# -----------------------------------------------------------------------------
# The rows of each step, and the numbers that it returns


@dataclass
class Step:
    """The rows of one optimiser step, and this process's share of them as batches."""

    rows: list[dict]  # of all processes
    batches: list[data.Batch]  # of this process, with up to --batch-size rows each
    cut: int  # how many prompts of this process were cut to --max-length


@dataclass
class Numbers:
    """The numbers of one optimiser step, over all processes."""

    loss: float  # the mean over all ids that the step predicts
    grad_norm: float  # of the whole gradient, before clipping
    rows: int
    tokens: int  # ids that the model has read
    cut: int  # prompts cut to --max-length
    is_skipped: bool  # the gradient overflowed, which only fp16 allows
    stops: bool  # whether any process was asked to stop


class Feed:
    """Prepares the rows of each step, and reads the numbers of the step before.

    A GPU works asynchronously: Python only waits for it when it reads a number.

        Python   training_step(n) | rows of n + 1 | reads the numbers of n | training_step(n + 1)
        GPU              computes step n ...................................| computes n + 1

    So the next rows are tokenised and collated before the numbers are read. All numbers,
    and how many ids the next step predicts, are summed over the processes in one
    message. Receiving it is the only time in a step that Python waits for a GPU.

    current: the step that will be taken next, or was just taken.
    next: the step after it, once it is prepared.
    num_predicted: how many ids `current` predicts, over all processes.
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
        self.scaler = scaler
        self.device = device
        # The order of the rows is a function of seed and step, so a resumed run sees
        # the same rows that it would have seen without a stop.
        first = state.progress.step
        steps = data.rows_of_steps(inputs.train, state.rows_per_step, args.seed, first)
        self.rows_of_steps = itertools.islice(steps, state.steps - first)
        self.current = self.read_step()
        self.next = None
        (self.num_predicted,) = processes.total(device, count_predicted(self.current.batches))

    def prepare_next(self) -> None:
        """Tokenises and collates the rows of the next step."""
        self.next = self.read_step()

    def read_step(self) -> Step:
        """Returns the next step in order. After the last step of the run it has no rows."""
        rows = next(self.rows_of_steps, [])
        # Each process takes every COUNT-th row. In the last step of an epoch it
        # may get none.
        mine = rows[processes.NUMBER :: processes.COUNT]
        encoded = data.encode_batch(mine, self.tokenizer, self.args.max_length)
        cut = data.count_cut(mine, encoded, self.tokenizer, self.args.max_length)
        return Step(rows, collated(encoded, self.tokenizer, self.args), cut)

    def finish_step(
        self, step: int, loss: Tensor, grad_norm: Tensor, stop: StopRequest
    ) -> Numbers:
        """Waits for the step that was taken, and makes the next step the current one.

        Returns the numbers of the step. Raises ValueError if loss or norm is not finite,
        because such a step makes all adapter weights useless. (In fp16 the norm alone may
        overflow; then the step was skipped.)
        """
        taken = self.current
        loss, grad_norm, tokens, cut, stops, predicted_next = processes.total(
            self.device,
            loss,
            grad_norm / processes.COUNT,  # every process already has the norm of the sum
            sum(len(batch.ids) for batch in taken.batches),
            taken.cut,
            bool(stop),
            count_predicted(self.next.batches),
        )
        self.current = self.next
        self.num_predicted = predicted_next
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if not is_finite and not loss_scale.is_overflow(self.scaler, loss):
            indices = sorted(row["row"] for row in taken.rows)
            raise ValueError(
                f"step {step + 1}: the loss is {loss:.4g}, the norm of its "
                f"gradient {grad_norm:.4g}, with the rows {indices} of train; "
                f"{self.args.out} keeps the last save{loss_scale.hint(self.scaler)}"
            )
        return Numbers(
            loss, grad_norm, len(taken.rows), int(tokens), int(cut), not is_finite, bool(stops)
        )


def collated(
    encoded: list, tokenizer: Tokenizer, args: argparse.Namespace
) -> list[data.Batch]:
    """Returns batches of up to --batch-size rows, from rows given as (prompt ids, answer ids)."""
    prefix_length = shared_prefix_length(tokenizer, args)
    return [
        data.collate(encoded[start : start + args.batch_size], prefix_length, args.loss)
        for start in range(0, len(encoded), args.batch_size)
    ]


def shared_prefix_length(tokenizer: Tokenizer, args: argparse.Namespace) -> int:
    """Returns how many prefix ids rows share: 0 with --no-share-prefix or the full loss."""
    if args.loss == "full" or not args.share_prefix:
        return 0
    prefix_ids, _, _ = data.fixed_ids(tokenizer)
    return len(prefix_ids)


def count_predicted(batches: list[data.Batch]) -> int:
    """Returns on how many ids of these batches there is a loss."""
    return sum(len(batch.next_ids) for batch in batches)


# -----------------------------------------------------------------------------
# Evaluation


def is_evaluated(step: int, steps: int, args: argparse.Namespace) -> bool:
    """Returns whether --eval-every asks for an evaluation after `step` of `steps`.

    The evaluations before the first and after the last step take place in any case.
    """
    return bool(args.eval_every) and 0 < step < steps and step % args.eval_every == 0


def evaluate(
    args: argparse.Namespace, model: phi2.Phi2, inputs: Inputs, log: RunLog, title: str
) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """Returns the statistics and the predictions of all validation splits, by split name.

    Also writes accuracies and losses as a line of metrics.jsonl and, with --keep-best,
    saves the adapter if this evaluation is the best so far.
    """
    results = {}
    predictions = {}
    with log.resumable():
        for split, pairs in inputs.validation.items():
            results[split], predictions[split] = evaluation.evaluate(
                model, inputs.tokenizer, pairs, inputs.settings, f"{title}, {split}"
            )
            results[split]["loss"] = validation_loss(model, inputs.tokenizer, pairs, args)
        keep_best(args, model, inputs, log, results)
    log.write_evaluation(log.state.progress.step, results)
    return results, predictions


def keep_best(
    args: argparse.Namespace, model: phi2.Phi2, inputs: Inputs, log: RunLog, results: dict
) -> None:
    """Saves the adapter in best/ with --keep-best, if this evaluation is the best so far."""
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
    """Returns the mean loss over all predicted ids in a split, without dropout."""
    was_training = model.training
    model.eval()
    encoded = data.encode_batch(pairs, tokenizer, args.max_length)
    # By length, because PackedRows pads the rows of a batch within attention.
    encoded.sort(key=lambda ids: len(ids[0]))  # of the prompt
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
