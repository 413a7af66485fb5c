"""What a run reports: on the console, in metrics.jsonl, and to Weights & Biases.

A line of metrics.jsonl is a JSON object with "step". A line of training also has loss,
learning_rate, grad_norm, seconds, examples_per_second, tokens_per_second and peak_memory_gib, in
fp16 skipped_steps too; a line of an evaluation has SPLIT_accuracy and SPLIT_loss for each split.
What a line of training says is of the steps since the one before.
"""

import argparse
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from support import (
    best,
    card,
    commands,
    files,
    machine,
    metrics,
    page,
    pictures,
    processes,
    records,
    upload,
)
from support.extras import Extras
from support.resume import Progress, State
from support.stopping import discard_closed_outputs

# How many steps a line is of, by the last step of which that holds
LOG_EVERY = {10: 1, 100: 10, math.inf: 50}
# Of the time of a run, what its page may take while it grows. Each time it takes 0.3 seconds of a
# CPU, and 0.8 with the 19,647 validation rows of MNLI.
PAGE_SHARE = 0.01
PAGE_AFTER = 10  # seconds: a run that ends before has its page at its end alone


class RunLog:
    """The log of a run in its folder. Of several processes the first alone writes.

    A resumed run keeps the lines of metrics.jsonl up to the step that it resumes from.
    """

    def __init__(self, args: argparse.Namespace, state: State, device: torch.device):
        self.args = args
        self.state = state
        self.device = device
        self.folder = Path(args.out)
        self.peak_memory = None  # of training above that of the empty process, in GiB
        self.memory_before = machine.peak_memory(device, reset=True)  # bytes
        self.started = time.perf_counter()  # of this process, not of a run that it resumes
        self.clock = self.started  # when training began, or began again after an evaluation
        self.seconds = 0.0  # of training since the last line, before the clock was stopped
        self.untimed = 0  # rows since the last line that an earlier process has taken
        self.page_due = self.started + PAGE_AFTER
        self.file = None  # metrics.jsonl
        self.evaluated = set()  # the steps whose evaluation was in it when it was opened
        self.wandb_run = None  # with --wandb
        self.extras = Extras()

    def open(self) -> None:
        """Writes args.json, and opens metrics.jsonl. Until then nothing in the folder changes."""
        if not processes.IS_FIRST:
            return
        record = self.state.arguments | machine.environment(self.device)
        record["total_steps"] = self.state.steps
        record["command"] = start_command(self.folder, bool(self.args.resume))
        if processes.TORCHRUN:
            record["torchrun"] = processes.TORCHRUN
        if self.args.wandb:
            record["wandb_run"] = wandb_identity(self.folder, bool(self.args.resume))
        files.write_json(self.folder / "args.json", record)
        self.untimed = self.state.progress.rows

        # A new run has no baseline yet, and keeps no line of what was there before it.
        path = self.folder / "metrics.jsonl"
        lines = []
        if self.state.baseline:
            lines = lines_up_to(path, self.state.progress.step, self.state.steps)
        self.evaluated = {line["step"] for line in lines if is_evaluation(line)}
        files.write_lines(path, lines)
        # Line by line, so that a kill loses none and `tail -f` shows each at once.
        self.file = open(path, "a", buffering=1, encoding="utf-8")
        if self.args.wandb:
            with self.extras.attempt("W&B"):
                self.wandb_run = start_wandb(self.folder, record)

    def lacks_evaluation(self, step: int) -> bool:
        """Returns whether metrics.jsonl had no evaluation of this step when it was opened.

        Of several processes all must ask: the first knows, and tells the others.
        """
        return processes.gather(step not in self.evaluated)[0]

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """Lets a Ctrl-C in here say how the run goes on."""
        try:
            yield
        except KeyboardInterrupt:
            if (self.folder / "report.html").is_file():
                self.write_stopped_page()
            command = commands.resume(self.folder)
            raise KeyboardInterrupt(f"interrupted; to resume: {command}") from None

    def say_stopped(self) -> None:
        """Prints, and writes into report.html, after which step the run stops."""
        self.say(
            f"stopped and saved after step {self.state.progress.step:,} of {self.state.steps:,}; "
            f"to resume: {commands.resume(self.folder)}"
        )
        self.write_stopped_page()

    def forget_results(self) -> None:
        """Removes what a finished run says of its adapter, which the next save replaces."""
        if not (self.folder / "results.json").is_file():
            return
        predictions = [f"predictions_{split}.jsonl" for split in self.state.baseline]
        pages = (*pictures.PICTURES, "report.html", "README.md")
        pages += ("confusion.png",)  # an older version has drawn it
        for name in (*predictions, *pages, "results.json"):
            (self.folder / name).unlink(missing_ok=True)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if not processes.IS_FIRST:
            return
        try:
            tqdm.write(text)  # print would write into the bar
        except OSError:  # nobody can read it any more, and the run is worth more
            discard_closed_outputs()

    def say_baseline(self) -> None:
        """Prints what the base can do alone, and whether it has read less than there was."""
        for split, statistics in self.state.baseline.items():
            if statistics["cut"]:
                self.say(
                    f"{statistics['cut']:,} prompts of {split} are cut to --max-length "
                    f"{self.args.max_length}"
                )
        self.say(f"baseline: {metrics.accuracies(self.state.baseline)}")

    def bar(self, steps: range, total: int) -> tqdm:
        """Returns a progress bar over the steps that are left of `total`."""
        # To tqdm None means: no bar where the output is not a terminal.
        disable = None if processes.IS_FIRST else True
        return tqdm(
            steps, "training", total, initial=steps.start, unit="step", disable=disable
        )

    def stop_clock(self) -> None:
        """Counts the time until now as training's. What follows is an evaluation."""
        self.seconds += time.perf_counter() - self.clock

    def start_clock(self) -> None:
        """Starts to measure speed and memory again, after an evaluation."""
        self.update_page()
        self.clock = time.perf_counter()
        machine.peak_memory(self.device, reset=True)

    def is_due(self, step: int) -> bool:
        """Returns whether a step ends a line: first each, as the loss falls fast, then fewer."""
        every = self.args.log_every
        if every is None:
            every = next(every for until, every in LOG_EVERY.items() if step <= until)
        return step % every == 0

    def write(self, step: int, **values) -> None:
        """Adds a line to metrics.jsonl."""
        if self.file:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.is_sent:
            with self.extras.attempt("W&B"):
                self.wandb_run.log(values, step=step)

    @property
    def is_sent(self) -> bool:
        """Returns whether there is a W&B run, and nothing has gone wrong with it yet."""
        return self.wandb_run is not None and "W&B" not in self.extras.failed

    def write_training(self, progress: Progress, rate: float, grad_norm: float) -> None:
        """Reports the steps since the last report, and starts the sums of the next one."""
        self.stop_clock()
        # How long the rows before a resume took is not saved, or two equal runs would save other
        # bytes: as long as those after it.
        seconds = self.seconds * progress.rows / (progress.rows - self.untimed)
        # A mean over steps: the loss of one says more about its rows than about the model.
        loss = progress.loss / (progress.step - progress.logged)
        rows_per_second = progress.rows / seconds
        # Above the empty process: the interpreter and torch take memory for any model.
        if self.memory_before is not None:
            peak = (machine.peak_memory(self.device) - self.memory_before) / 2**30
            self.peak_memory = max(peak, self.peak_memory or 0)
        values = {
            "loss": loss,
            "learning_rate": rate,
            # JSON has no number for that of a step which was skipped.
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "seconds": seconds,
            "examples_per_second": rows_per_second,
            "tokens_per_second": progress.tokens / seconds,
            "peak_memory_gib": self.peak_memory,
        }
        text = (
            f"step {progress.step:6,}  loss {loss:.4f}  lr {rate:.2e}  "
            f"grad {grad_norm:.3f}  {rows_per_second:.0f} examples/s"
        )
        if self.args.dtype == "fp16":
            values["skipped_steps"] = progress.skipped
        if progress.skipped:
            text += f"  ({progress.skipped} skipped: a gradient overflowed in fp16)"
        self.write(progress.step, **values)
        self.say(text)
        progress.start_line()
        self.seconds = 0.0
        self.untimed = 0
        self.update_page()
        self.clock = time.perf_counter()

    def write_evaluation(self, step: int, results: dict[str, dict]) -> None:
        """Adds a line with accuracy and loss of each split."""
        values = {
            f"{split}_{key}": statistics[key]
            for split, statistics in results.items()
            for key in ("accuracy", "loss")
        }
        self.write(step, **values)

    def update_page(self) -> None:
        """Writes report.html as far as the run has come, in at most PAGE_SHARE of its time."""
        if self.file is None or time.perf_counter() < self.page_due:
            return
        started = time.perf_counter()
        before = machine.peak_memory(self.device, reset=True)
        self.write_page()
        # What matplotlib keeps in memory is no part of training.
        if before is not None:
            self.memory_before += machine.peak_memory(self.device, reset=True) - before
        ended = time.perf_counter()
        self.page_due = ended + (ended - started) / PAGE_SHARE

    def write_page(self, stopped: tuple[int, str] | None = None) -> None:
        """Draws the pictures, and writes report.html with those that are there."""
        with self.extras.attempt("the pictures"):
            page.draw_pictures(self.folder)
        with self.extras.attempt("report.html"):
            page.write(self.folder, stopped, is_under_way=not stopped)

    def write_stopped_page(self) -> None:
        """Writes the page once more, as one that a browser does not read again and again."""
        if self.file is not None:
            self.write_page((self.state.progress.step, commands.resume(self.folder)))

    def write_predictions(self, stage: str, predictions: dict[str, list[dict]]) -> None:
        """Writes STAGE_SPLIT.jsonl for each split."""
        if not processes.IS_FIRST:
            return
        for split, rows in predictions.items():
            files.write_lines(self.folder / f"{stage}_{split}.jsonl", rows)

    def finish(self, results: dict, predictions: dict[str, list[dict]], prompt: str) -> bool:
        """Writes results.json and prints the table. Then follows what a run can do without.

        That is the predictions, the pictures, the page, the model card, and what --wandb and
        --push ask for. Returns whether all of it was done.
        """
        if self.state.progress.cut:
            self.say(
                f"{self.state.progress.cut:,} prompts were cut to --max-length "
                f"{self.args.max_length}, at the end of their premise, and of their hypothesis "
                "where that was not enough"
            )
        try:
            files.write_json(self.folder / "results.json", results)
        finally:
            self.say(metrics.table(results))
        self.file.close()
        attempt = self.extras.attempt
        with attempt("the predictions"):
            self.write_predictions("predictions", predictions)
        self.write_page()
        with attempt("README.md"):
            card.write_card(self.folder, prompt)
        if self.is_sent:
            with attempt("W&B"):
                self.wandb_run.finish()
        if self.args.push:
            with attempt("--push"):
                self.say(f"uploaded to {upload.push(self.folder, self.args.push, prompt)}")
        self.say_what_is_left(results)
        return not self.extras.failed

    def say_what_is_left(self, results: dict) -> None:
        """Prints where the files of the run are, what has failed, and how to use the adapter."""
        if "best" in results:
            kept = results["best"]
            self.say(
                f"the best adapter, of step {kept['step']:,} (accuracy {kept['accuracy']:.4f}, "
                f"loss {kept['loss']:.4f}), is in {self.folder / best.FOLDER}"
            )
        failed = self.extras.failed
        named = "adapter, results.json and report.html"
        if "report.html" in failed:
            named = "adapter and results.json"
        duration = timedelta(seconds=round(time.perf_counter() - self.started))
        self.say(f"{named} are in {self.folder} ({duration})")
        if "the predictions" in failed:
            self.say(f"all of them once more: {commands.resume(self.folder)}")
        elif "the pictures" in failed or "report.html" in failed:
            again = commands.command("scripts.report", self.folder)
            self.say(f"pictures and report.html once more: {again}")
        pair = ("--premise", "...", "--hypothesis", "...")
        self.say(f"try: {commands.command('eval.py', '--adapter', self.folder, *pair)}")


# -----------------------------------------------------------------------------
# The files of a run that is resumed


def start_command(folder: Path, is_resumed: bool) -> str:
    """Returns the command that a run was started with, also where it is resumed."""
    path = folder / "args.json"
    if is_resumed and path.is_file():
        saved = files.read_json(path).get("command")
        if isinstance(saved, str):
            return saved
    script = commands.name_of(Path(sys.argv[0]).absolute())
    return f"{processes.COMMAND} {commands.quoted(*script, *sys.argv[1:])}"


def lines_up_to(path: Path, step: int, steps: int) -> list[dict]:
    """Returns the lines of a metrics.jsonl up to `step`: later steps are taken again.

    The final evaluation, at step `steps`, is left out, because it will be repeated.
    """
    if not path.is_file():
        return []
    lines, _ = records.read_entries(path)
    return [
        line
        for line in lines
        if line["step"] <= step and not (is_evaluation(line) and line["step"] >= steps)
    ]


def is_evaluation(line: dict) -> bool:
    """Returns whether a line is of an evaluation, which has SPLIT_loss and no "loss"."""
    return "loss" not in line


# -----------------------------------------------------------------------------
# Weights & Biases, a library that only --wandb needs and imports

# What a run is called there, and the variables by which a user decides on it
IDENTITY = {
    "id": "WANDB_RUN_ID",
    "name": "WANDB_NAME",
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
}


def wandb_identity(folder: Path, is_resumed: bool) -> dict[str, str]:
    """Returns what a run is called: as a variable says, as before its resume, or by default."""
    identity = {"id": uuid.uuid4().hex, "name": folder.resolve().name, "project": "flora"}
    path = folder / "args.json"
    if is_resumed and path.is_file():
        saved = files.read_json(path).get("wandb_run")
        identity |= saved if isinstance(saved, dict) else {}
    for part, variable in IDENTITY.items():
        if os.environ.get(variable):
            identity[part] = os.environ[variable]
    return identity


def start_wandb(folder: Path, record: dict):
    """Returns a W&B run that never asks for a key.

    Without a key it is kept offline, in a folder beside the run's other files. What is no
    option here, such as the tags, W&B takes from its variables.
    """
    import wandb

    options = {
        "config": record,
        "dir": os.environ.get("WANDB_DIR") or folder,
        "resume": os.environ.get("WANDB_RESUME") or "allow",  # if there is one of this id
        **record["wandb_run"],
    }
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":  # a user who has chosen another one has decided
        return wandb.init(**options)
    try:
        # prompt=False: a batch job cannot type a key.
        if wandb.login(prompt=False):
            return wandb.init(**options, mode="online")
        reason = "not logged in"
    except wandb.Error as error:
        reason = " ".join(str(error).split())
    run = wandb.init(**options, mode="offline")
    print(
        f"W&B: {reason}, so this run is kept offline; "
        f"send it later with: wandb sync {commands.quoted(Path(run.dir).parent)}"
    )
    return run
