"""What a run reports: on the console, in metrics.jsonl, and to Weights & Biases.

Each line of metrics.jsonl is a JSON object with "step". A line about training also has loss,
learning_rate, grad_norm, seconds, examples_per_second, tokens_per_second and peak_memory_gib, and
in fp16 skipped_steps; it covers the steps since the previous one. A line about an evaluation has
SPLIT_accuracy and SPLIT_loss for each split.
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

# By default a line covers 1 step up to step 10, 10 steps up to step 100, then 50 steps.
LOG_EVERY = {10: 1, 100: 10, math.inf: 50}
# The share of a run's time that updates of its page may take. Each update takes 0.3 seconds of
# CPU time, or 0.8 with the 19,647 validation rows of MNLI.
PAGE_SHARE = 0.01
PAGE_AFTER = 10  # seconds before the first update; a shorter run only has its page at the end


class RunLog:
    """The log of a run in its folder. If there are several processes, only the first one writes.

    A resumed run keeps the lines of metrics.jsonl up to the step that it resumes from.
    """

    def __init__(self, args: argparse.Namespace, state: State, device: torch.device):
        self.args = args
        self.state = state
        self.device = device
        self.folder = Path(args.out)
        self.peak_memory = None  # the peak in training, above the empty process's, in GiB
        self.memory_before = machine.peak_memory(device, reset=True)  # bytes
        self.started = time.perf_counter()  # when this process began, even if it resumes a run
        self.clock = self.started  # when training began, or continued after an evaluation
        self.seconds = 0.0  # of training since the last line, until the clock was stopped
        self.untimed = 0  # rows since the last line that were trained on before the resume
        self.page_due = self.started + PAGE_AFTER
        self.file = None  # metrics.jsonl
        self.evaluated = set()  # the steps with an evaluation in metrics.jsonl when it was opened
        self.wandb_run = None  # with --wandb
        self.extras = Extras()

    def open(self) -> None:
        """Writes args.json, and opens metrics.jsonl. Before this nothing in the folder changes."""
        if not processes.IS_FIRST:
            return
        path = self.folder / "args.json"
        # A resumed run keeps the command that started it, and its names in W&B.
        saved = files.read_json(path) if self.args.resume and path.is_file() else {}
        record = self.state.arguments | machine.environment(self.device)
        record["total_steps"] = self.state.steps
        script = commands.from_here(Path(sys.argv[0]).absolute())
        command = f"{processes.COMMAND} {commands.quoted(script, *sys.argv[1:])}"
        record["command"] = saved.get("command", command)
        if processes.TORCHRUN:
            record["torchrun"] = processes.TORCHRUN
        if self.args.wandb:
            record["wandb_run"] = wandb_identity(self.folder, saved.get("wandb_run", {}))
        files.write_json(path, record)
        self.untimed = self.state.progress.rows

        # A new run has no baseline yet, and keeps none of the lines that were there before.
        path = self.folder / "metrics.jsonl"
        lines = []
        if self.state.baseline:
            lines = lines_up_to(path, self.state.progress.step, self.state.steps)
        self.evaluated = {line["step"] for line in lines if is_evaluation(line)}
        files.write_lines(path, lines)
        # Line buffered, so that a kill loses no line and `tail -f` shows each one at once.
        self.file = open(path, "a", buffering=1, encoding="utf-8")
        if self.args.wandb:
            with self.extras.attempt("W&B"):
                self.wandb_run = start_wandb(self.folder, record)

    def lacks_evaluation(self, step: int) -> bool:
        """Returns whether metrics.jsonl had no evaluation of this step when it was opened.

        All processes must call this: the first one knows, and tells the others.
        """
        return processes.gather(step not in self.evaluated)[0]

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """Adds the command that resumes the run to the message of a Ctrl-C in its body."""
        try:
            yield
        except KeyboardInterrupt:
            command = commands.resume(self.folder)
            raise KeyboardInterrupt(f"interrupted; to resume: {command}") from None

    def say_stopped(self) -> None:
        """Prints after which step the run has stopped, and writes report.html as it is then."""
        self.say(
            f"stopped and saved after step {self.state.progress.step:,} of {self.state.steps:,}; "
            f"to resume: {commands.resume(self.folder)}"
        )
        if self.file:
            self.write_page(is_under_way=False)

    def forget_results(self) -> None:
        """Removes a finished run's files about its adapter, which the next save replaces."""
        if not (self.folder / "results.json").is_file():
            return
        predictions = [f"predictions_{split}.jsonl" for split in self.state.baseline]
        pages = (*pictures.PICTURES, "report.html", "README.md")
        for name in (*predictions, *pages, "results.json"):
            (self.folder / name).unlink(missing_ok=True)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if not processes.IS_FIRST:
            return
        try:
            tqdm.write(text)  # print would break the bar
        except OSError:  # the output is closed, but the run goes on
            discard_closed_outputs()

    def say_baseline(self) -> None:
        """Prints the accuracy of the base alone, and how many of its prompts were cut."""
        for split, statistics in self.state.baseline.items():
            if statistics["cut"]:
                self.say(
                    f"{statistics['cut']:,} prompts of {split} are cut to --max-length "
                    f"{self.args.max_length}"
                )
        self.say(f"baseline: {metrics.accuracies(self.state.baseline)}")

    def bar(self, steps: range, total: int) -> tqdm:
        """Returns a progress bar over the steps that are left of `total`."""
        # For tqdm, None means no bar if the output is not a terminal.
        disable = None if processes.IS_FIRST else True
        return tqdm(
            steps, "training", total, initial=steps.start, unit="step", disable=disable
        )

    def stop_clock(self) -> None:
        """Counts the time until now as training time. Call it before an evaluation."""
        self.seconds += time.perf_counter() - self.clock

    def start_clock(self) -> None:
        """Starts measuring speed and memory, at the beginning and after an evaluation."""
        self.update_page()
        self.clock = time.perf_counter()
        machine.peak_memory(self.device, reset=True)

    def is_due(self, step: int) -> bool:
        """Returns whether a step ends a line. Early steps do so more often by default."""
        every = self.args.log_every
        if every is None:
            every = next(every for until, every in LOG_EVERY.items() if step <= until)
        return step % every == 0

    def write(self, step: int, **values) -> None:
        """Adds a line to metrics.jsonl."""
        if self.file:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.wandb_run:
            with self.extras.attempt("W&B"):
                self.wandb_run.log(values, step=step)

    def write_training(self, progress: Progress, rate: float, grad_norm: float) -> None:
        """Reports the steps since the last report, and starts the sums of the next one."""
        self.stop_clock()
        # The time of rows before a resume is not saved, because then equal runs would save
        # different bytes. They are assumed to be as fast as the rows after the resume.
        seconds = self.seconds * progress.rows / (progress.rows - self.untimed)
        # A mean over steps, because the loss of one step depends too much on its rows.
        loss = progress.loss / (progress.step - progress.logged)
        rows_per_second = progress.rows / seconds
        # Above the empty process, because the interpreter and torch take memory anyway.
        if self.memory_before is not None:
            peak = (machine.peak_memory(self.device) - self.memory_before) / 2**30
            self.peak_memory = max(peak, self.peak_memory or 0)
        values = {
            "loss": loss,
            "learning_rate": rate,
            # JSON has no number for infinity, the norm of a skipped step.
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
        """Adds a line with the accuracy and the loss of each split."""
        values = {
            f"{split}_{key}": statistics[key]
            for split, statistics in results.items()
            for key in ("accuracy", "loss")
        }
        self.write(step, **values)

    def update_page(self) -> None:
        """Updates report.html, unless updates would take more than PAGE_SHARE of the time."""
        if self.file is None or time.perf_counter() < self.page_due:
            return
        started = time.perf_counter()
        before = machine.peak_memory(self.device, reset=True)
        self.write_page()
        # Memory that matplotlib holds does not count as training's.
        if before is not None:
            self.memory_before += machine.peak_memory(self.device, reset=True) - before
        ended = time.perf_counter()
        self.page_due = ended + (ended - started) / PAGE_SHARE

    def write_page(self, is_under_way: bool = True) -> None:
        """Draws the pictures, and writes report.html with those that exist."""
        with self.extras.attempt("report.html"):
            run = records.read(self.folder)
            with self.extras.attempt("the pictures"):
                page.draw_pictures(run)
            page.write(run, is_under_way)

    def write_predictions(self, stage: str, predictions: dict[str, list[dict]]) -> None:
        """Writes STAGE_SPLIT.jsonl for each split."""
        if not processes.IS_FIRST:
            return
        for split, rows in predictions.items():
            files.write_lines(self.folder / f"{stage}_{split}.jsonl", rows)

    def finish(self, results: dict, predictions: dict[str, list[dict]], prompt: str) -> bool:
        """Writes results.json, prints the table, then does the optional parts of a run.

        These are the predictions, pictures, page and model card, and what --wandb and --push
        ask for. Returns whether all of them succeeded.
        """
        if self.state.progress.cut:
            self.say(
                f"{self.state.progress.cut:,} prompts were cut to --max-length "
                f"{self.args.max_length}"
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
        if self.wandb_run:
            with attempt("W&B"):
                self.wandb_run.finish()
        if self.args.push:
            with attempt("--push"):
                self.say(f"uploaded to {upload.push(self.folder, self.args.push, prompt)}")
        self.say_what_is_left(results)
        return not self.extras.failed

    def say_what_is_left(self, results: dict) -> None:
        """Prints where the files are, how to repeat what failed, and how to use the adapter."""
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
            self.say(f"to write all of them again: {commands.resume(self.folder)}")
        elif "the pictures" in failed or "report.html" in failed:
            again = commands.command("scripts/report.py", self.folder)
            self.say(f"to make the pictures and report.html again: {again}")
        pair = ("--premise", "...", "--hypothesis", "...")
        self.say(f"try: {commands.command('eval.py', '--adapter', self.folder, *pair)}")


# -----------------------------------------------------------------------------
# Reading the files of a run that is resumed


def lines_up_to(path: Path, step: int, steps: int) -> list[dict]:
    """Returns the lines of a metrics.jsonl up to `step`. Later steps will be repeated.

    The final evaluation, at step `steps`, is left out, because it will be repeated too.
    """
    if not path.is_file():
        return []
    return [
        line
        for line in records.read_entries(path)
        if line["step"] <= step and not (is_evaluation(line) and line["step"] >= steps)
    ]


def is_evaluation(line: dict) -> bool:
    """Returns whether a line is about an evaluation, with SPLIT_loss instead of "loss"."""
    return "loss" not in line


# -----------------------------------------------------------------------------
# Weights & Biases, a library that only --wandb needs and imports

# The names of a run there, and the environment variables with which a user can set them
IDENTITY = {
    "id": "WANDB_RUN_ID",
    "name": "WANDB_NAME",
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
}


def wandb_identity(folder: Path, saved: dict[str, str]) -> dict[str, str]:
    """Returns a run's names: from variables, or from before a resume, or the defaults."""
    identity = {"id": uuid.uuid4().hex, "name": folder.resolve().name, "project": "flora"} | saved
    for part, variable in IDENTITY.items():
        if os.environ.get(variable):
            identity[part] = os.environ[variable]
    return identity


def start_wandb(folder: Path, record: dict):
    """Returns a W&B run that never asks for a key: without one it is kept offline.

    W&B takes other settings, such as tags, from its own environment variables.
    """
    import wandb

    options = {
        "config": record,
        "dir": os.environ.get("WANDB_DIR", folder),
        "resume": "allow",  # if a run with this id exists
        **record["wandb_run"],
    }
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":  # the user has chosen another mode
        return wandb.init(**options, mode=mode)
    try:
        # prompt=False: a batch job cannot type a key.
        if wandb.login(prompt=False):
            return wandb.init(**options, mode="online")
        reason = "not logged in"
    except wandb.Error as error:  # the key is refused, or there is no network
        reason = " ".join(str(error).split())
    print(f"W&B: {reason}, so this run is kept offline; `wandb sync` sends it later")
    return wandb.init(**options, mode="offline")
