"""What the questions share: a trial, the stored results, and a search for the learning rate.

A question is a file beside this one. It lists its arms, such as one for each rank, and
report.py makes its table and picture:

    python -m experiments.rank              # runs what is missing; after Ctrl-C run it again
    python -m experiments.rank --stored     # table, conclusion and picture of what is stored

An arm is a `Trial` whose learning rate is a first guess. A comparison at a single rate says
more about the rate than about the arms, so each arm gets its own. `sweep` tries half and
twice the guess with seed 0, and continues until the best rate, by nll, has a worse one on
each side. It then repeats the best rate with the other seeds. The rate is chosen on the same
rows that the table shows, in all arms alike.

`run` runs a trial: it loads the base of tiny/, trains adapters or all weights, and measures
the accuracy. Its loop calls the functions of train.py. Each result is appended to
results/trials.jsonl as soon as it is known, and serves any question that asks for the same
settings. Another kind of processor rounds differently, which changes accuracies about as
much as another seed does.
"""

import argparse
import copy
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

import data
import eval as evaluation
import lora
import phi2
import train
from scripts import merge
from support import cli, examples, files, loss_scale

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tiny" / "model"
DATASET = ROOT / "tiny" / "data"
RESULTS = ROOT / "experiments" / "results"

SEEDS = (0, 1, 2)
START = 1e-3  # the learning rate at which the search for an adapter begins
LEAST_RATE = START / 64  # the bounds of every search
MOST_RATE = START * 64
CURVE = 10  # parts of a training; the result has the mean loss of each


# -----------------------------------------------------------------------------
# A trial


@dataclass(frozen=True)
class Trial:
    """The settings of one training on tiny/. Its result depends on nothing else."""

    arm: str = "lora"  # or "full": all weights are trained, and there is no adapter
    rank: int = 8
    alpha: float = 16.0
    targets: str = "all-linear"  # or names, separated by spaces
    dropout: float = 0.0
    quant: str = "none"  # or "nf4"
    dtype: str = "fp32"  # or "bf16"
    keep: bool = False  # whether to keep NF4's values beside its indices
    loss: str = "answer"  # or "full"
    learning_rate: float = START
    batch_size: int = 16
    steps: int = 200
    train_rows: int = 4000  # how many, from the first on
    eval_rows: int = 600  # how many of each validation split, from the first on
    merges: bool = False  # whether the merged models are evaluated too
    seed: int = 0  # of A, of dropout, and of the order of rows


def run(trial: Trial) -> dict:
    """Trains, and returns the result as a dict that JSON can hold.

    trained: the number of trained parameters.
    weights: the bytes of all parameters and buffers, frozen and trained.
    losses: the mean loss of each tenth of the training, per predicted id.
    accuracy, nll: from the probabilities of the three answers (eval.py's mode "score"), the
        mean over the two validation splits; nll is -log of the right answer's probability,
        ln 3 when guessing.
    matched, mismatched: the two accuracies.
    diverged: instead of these four, where a gradient or a logit is not finite.
    merged: with `merges`, what `measure_merged` returns.

    Raises ValueError for a full arm over a base in 16 or 4 bits: a step of the size of a
    learning rate is lost in 16 bits, and NF4's indices have no gradient.
    """
    if trial.arm == "full" and (trial.quant, trial.dtype) != ("none", "fp32"):
        raise ValueError("the full arm trains W itself, which has to be in fp32")
    torch.manual_seed(trial.seed)
    model = evaluation.load_model(MODEL, trial.quant, trial.dtype, "cpu", keep=trial.keep)
    trained = add_arm(model, trial)
    result = {
        "trained": sum(parameter.numel() for parameter in trained),
        "weights": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
    }
    losses = fit(model, trained, trial)
    if not math.isfinite(losses[-1]):
        return result | {"diverged": f"at step {len(losses)}"}
    size = -(-len(losses) // CURVE)
    parts = [losses[start : start + size] for start in range(0, len(losses), size)]
    result["losses"] = [round(statistics.mean(part), 4) for part in parts]
    try:
        result |= measure(model, trial.eval_rows)
    except ValueError as error:  # the logits are not finite
        return result | {"diverged": str(error)}
    if trial.merges:
        result["merged"] = measure_merged(model, trial.eval_rows)
    return result


def fit(model: phi2.Phi2, trained: list[torch.nn.Parameter], trial: Trial) -> list[float]:
    """Trains. Returns the loss of each step. It is NaN for a step whose gradient is not finite."""
    args = arguments(trial)
    rows, encoded = training_rows(trial.train_rows)
    optimizer = torch.optim.AdamW(
        trained, lr=trial.learning_rate, weight_decay=args.weight_decay, fused=True
    )
    scaler = loss_scale.new_scaler(trial.dtype, torch.device("cpu"))
    losses = []
    model.train()
    steps = data.rows_of_steps(rows, trial.batch_size, trial.seed)
    for step, chosen in zip(range(trial.steps), steps):
        factor = train.schedule(step, trial.steps, args.warmup_steps)
        optimizer.param_groups[0]["lr"] = trial.learning_rate * factor
        batches = train.collated([encoded[row["row"]] for row in chosen], tokenizer(), args)
        count = train.count_predicted(batches)
        loss, norm = train.training_step(
            model, optimizer, scaler, batches, count, args.max_grad_norm
        )
        losses.append(loss.item())
        if not math.isfinite(norm):  # then the step has spoiled every weight, whatever the loss
            losses[-1] = math.nan
            break
    return losses


def add_arm(model: phi2.Phi2, trial: Trial) -> list[torch.nn.Parameter]:
    """Prepares the model for an arm. Returns what is trained: A and B of new adapters, or all."""
    if trial.arm == "full":
        return list(model.requires_grad_(True).parameters())
    targets = tuple(trial.targets.split())
    if targets == ("all-linear",):
        targets = "all-linear"
    lora.inject(model, lora.LoRAConfig(trial.rank, trial.alpha, trial.dropout, targets))
    return list(lora.lora_parameters(model).values())


def arguments(trial: Trial) -> argparse.Namespace:
    """Returns train.py's arguments, with its defaults for what a trial does not set."""
    words = [f"--batch-size={trial.batch_size}", f"--loss={trial.loss}"]
    return cli.train_parser().parse_args(words)


@functools.cache
def tokenizer() -> Tokenizer:
    return data.load_tokenizer(MODEL)


@functools.cache
def training_rows(count: int) -> tuple[examples.Rows, list]:
    """Returns the first `count` rows, and (prompt ids, answer ids) of each."""
    rows = load_rows("train", count)
    return rows, data.encode_batch(rows, tokenizer())


@functools.cache
def load_rows(split: str, count: int) -> examples.Rows:
    with redirect_stderr(io.StringIO()):  # without the line on how many rows it takes
        return examples.load_examples(str(DATASET), split, count)


def measure(model: phi2.Phi2, count: int) -> dict:
    """Returns accuracy and nll on the first `count` rows of the two validation splits."""
    settings = evaluation.Settings(mode="score")
    found = {}
    for split in ("matched", "mismatched"):
        pairs = load_rows(f"validation_{split}", count)
        found[split], _ = evaluation.evaluate(model, tokenizer(), pairs, settings)
    return {
        "accuracy": round(statistics.mean(part["accuracy"] for part in found.values()), 4),
        "nll": round(statistics.mean(part["nll"] for part in found.values()), 4),
        "matched": round(found["matched"]["accuracy"], 4),
        "mismatched": round(found["mismatched"]["accuracy"], 4),
    }


def measure_merged(model: phi2.Phi2, count: int) -> dict:
    """Returns what `measure` returns for the model merged into bf16 and into NF4, by "bf16", "nf4".

    `lost` is what rounding changes, as a share of B A: the mean over the layers.
    """
    merged = {}
    for name, requantize in (("bf16", False), ("nf4", True)):
        other = copy.deepcopy(model)
        costs = merge.merge(other, torch.bfloat16, requantize)
        lost = round(statistics.mean(costs.values()), 4)
        merged[name] = measure(other.eval(), count) | {"lost": lost}
    return merged


# -----------------------------------------------------------------------------
# Trials that are stored


def inputs_digest() -> str:
    """Returns a digest of what results depend on besides settings: base, tokenizer and rows."""
    digest = hashlib.sha256()
    for path in sorted([*MODEL.glob("*.*"), *DATASET.glob("*.*")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Store:
    """The results of trials, in a file of JSON lines."""

    def __init__(self, path: Path | None = None):
        self.path = path = path or RESULTS / "trials.jsonl"
        self.inputs = inputs_digest()
        self.results: dict[Trial, dict] = {}
        for line in files.read_lines(path) if path.is_file() else []:
            if line["inputs"] == self.inputs:  # otherwise tiny/ has changed since
                self.results[Trial(**line["trial"])] = line["result"]

    def add(self, trial: Trial, result: dict) -> None:
        line = {"trial": asdict(trial), "result": result, "inputs": self.inputs}
        # In one write, so that two questions that run at once do not mix their lines.
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.results[trial] = result


def run_missing(trials: Iterable[Trial], store: Store, workers: int, bar: tqdm) -> None:
    """Runs the trials that the store lacks, and adds each result to it."""
    missing = [trial for trial in dict.fromkeys(trials) if trial not in store.results]
    if workers == 1:
        torch.set_num_threads(1)
        for trial in missing:
            store.add(trial, run(trial))
            bar.update()
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=start_worker) as pool:
        pending = {pool.submit(run, trial): trial for trial in missing}
        try:
            for future in as_completed(pending):
                store.add(pending[future], future.result())
                bar.update()
        except BrokenProcessPool:
            raise ValueError(
                "a worker was killed, perhaps because memory ran out: the same command resumes, "
                "and --workers 1 needs less memory"
            ) from None
        except BaseException:  # also Ctrl-C: trials that run are lost, and no other starts
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def start_worker() -> None:
    """Prepares a worker: one thread, no progress bars, and only its parent handles Ctrl-C."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr = open(os.devnull, "w")
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Ends this process when its parent ends, even if the parent is killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


# -----------------------------------------------------------------------------
# The best learning rate of each arm


def sweep(arms: dict[str, Trial], store: Store, workers: int) -> None:
    """Runs what is missing: the search for the best rate of each arm, then the other seeds."""
    expected = len(arms) * (len(SEEDS) + 3)  # a guess, to estimate the remaining time
    with tqdm(total=expected, unit="trial", smoothing=0.1, disable=None) as bar:
        bar.update(sum(len(stored(arm, store)) for arm in arms.values()))
        while wanted := [trial for arm in arms.values() for trial in climb(arm, store)]:
            run_missing(wanted, store, workers, bar)
        run_missing(
            [trial for arm in arms.values() for trial in repeats(arm, store)], store, workers, bar
        )


def stored(arm: Trial, store: Store) -> dict[Trial, dict]:
    """Returns the results of an arm: of trials with its settings, at any rate and seed."""
    return {
        trial: result
        for trial, result in store.results.items()
        if replace(trial, learning_rate=arm.learning_rate, seed=arm.seed) == arm
    }


def climb(arm: Trial, store: Store) -> list[Trial]:
    """Returns the trials to run next in the search for the best rate; none once it is found."""
    guess = arm.learning_rate
    first = [replace(arm, learning_rate=rate) for rate in (guess / 2, guess, guess * 2)]
    missing = [trial for trial in first if trial not in store.results]
    if missing:
        return missing
    rates, best = seed_0(arm, store)
    # A neighbour is missing only if the best rate is the lowest or the highest tried so far.
    neighbours = [rate for rate in (best / 2, best * 2) if rate not in rates]
    return [
        replace(arm, learning_rate=rate)
        for rate in neighbours
        if LEAST_RATE <= rate <= MOST_RATE
    ]


def seed_0(arm: Trial, store: Store) -> tuple[list[float], float]:
    """Returns the rates that were tried with the first seed, and the best of them by nll."""
    nll = {
        trial.learning_rate: nll_of(result)
        for trial, result in stored(arm, store).items()
        if trial.seed == SEEDS[0]
    }
    rates = sorted(nll)
    return rates, min(rates, key=nll.get)  # the lowest rate if all have diverged


def nll_of(result: dict) -> float:
    return result.get("nll", math.inf)


def repeats(arm: Trial, store: Store) -> list[Trial]:
    """Returns the trials of an arm at its best rate, one for each seed."""
    _, best = seed_0(arm, store)
    return [replace(arm, learning_rate=best, seed=seed) for seed in SEEDS]


def is_swept(arm: Trial, store: Store) -> bool:
    """Returns whether the sweep of an arm is complete."""
    if climb(arm, store):
        return False
    return all(trial in store.results for trial in repeats(arm, store))
