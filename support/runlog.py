"""What a run reports: on the console, in metrics.jsonl, and to Weights & Biases.

A line of metrics.jsonl is a JSON object with "step". A line of training also has loss,
learning_rate, grad_norm, examples_per_second, tokens_per_second and peak_memory_gib; a line
of an evaluation has SPLIT_accuracy and SPLIT_loss for each split.
"""

import argparse
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from support import best, card, commands, files, machine, metrics, page, pictures, ranks, upload
from support.extras import Extras
from support.resume import Progress, State, evaluated_steps, lines_up_to
from support.stopping import discard_closed_outputs


class RunLog:
    """The log of a run in its folder. Of several ranks the first alone writes.

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
        self.clock = self.started  # when the steps since the last report began
        self.file = None  # metrics.jsonl
        self.evaluated = set()  # the steps whose evaluation is in it
        self.wandb_run = None  # with --wandb
        self.extras = Extras()

    def open(self) -> None:
        """Writes args.json, and opens metrics.jsonl. Until then nothing in the folder changes."""
        if not ranks.FIRST:
            return
        record = self.state.arguments | machine.environment(self.device)
        path = self.folder / "metrics.jsonl"

        # Lines after the last save are dropped: their steps are taken again. A new run has no
        # baseline yet, and keeps none.
        lines = []
        if self.state.baseline:
            lines = lines_up_to(path, self.state.progress.step, self.state.steps)
        self.evaluated = evaluated_steps(lines)
        if ranks.TORCHRUN:
            record["torchrun"] = ranks.TORCHRUN
        if self.args.wandb:
            record["wandb_run"] = self.wandb_identity()
        files.write_json(self.folder / "args.json", record)
        with files.replacing(path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
        # Line by line, so that a kill loses none and `tail -f` shows each at once.
        self.file = open(path, "a", buffering=1, encoding="utf-8")
        if self.args.wandb:
            with self.extras.attempt("W&B"):
                self.wandb_run = start_wandb(self.folder, record)

    def wandb_identity(self) -> dict[str, str]:
        """Returns what this run is called at W&B. A resumed run is called what it was."""
        saved = None
        path = self.folder / "args.json"
        if self.args.resume and path.is_file():
            saved = files.read_json(path).get("wandb_run")
        return wandb_identity(self.folder.resolve().name, saved)

    def lacks_evaluation(self, step: int) -> bool:
        """Returns whether metrics.jsonl has no evaluation of this step. False in other ranks."""
        return ranks.FIRST and step not in self.evaluated

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """Lets a Ctrl-C in here say how the run goes on."""
        try:
            yield
        except KeyboardInterrupt:
            command = commands.resume(self.folder)
            raise KeyboardInterrupt(f"interrupted; to resume: {command}") from None

    def forget_results(self) -> None:
        """Removes what a finished run says of its adapter, which the next save replaces."""
        if not (self.folder / "results.json").is_file():
            return
        predictions = [f"predictions_{split}.jsonl" for split in self.state.baseline]
        pages = (*pictures.PICTURES, "report.html", "README.md")
        for name in (*predictions, *pages, "results.json"):
            (self.folder / name).unlink(missing_ok=True)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if not ranks.FIRST:
            return
        try:
            tqdm.write(text)  # print would write into the bar
        except OSError:  # nobody can read it any more, and the run is worth more
            discard_closed_outputs()

    def bar(self, steps: range, total: int) -> tqdm:
        """Returns a progress bar over the steps that are left of `total`."""
        # To tqdm None means: no bar where the output is not a terminal.
        disable = None if ranks.FIRST else True
        return tqdm(
            steps, "training", total, initial=steps.start, unit="step", disable=disable
        )

    def start_clock(self) -> None:
        """Starts to measure speed and memory again, after what was not training."""
        self.clock = time.perf_counter()
        machine.peak_memory(self.device, reset=True)

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
        seconds = time.perf_counter() - self.clock
        # A mean over steps: the loss of one says more about its rows than about the model.
        loss = progress.loss / (progress.step - progress.logged)
        rows_per_second = progress.rows / seconds
        # Above the empty process: the interpreter and torch take memory for any model.
        if self.memory_before is not None:
            peak = machine.peak_memory(self.device)
            self.peak_memory = (peak - self.memory_before) / 2**30
        self.write(
            progress.step,
            loss=loss,
            learning_rate=rate,
            grad_norm=grad_norm,
            examples_per_second=rows_per_second,
            tokens_per_second=progress.tokens / seconds,
            peak_memory_gib=self.peak_memory,
        )
        self.say(
            f"step {progress.step:6,}  loss {loss:.4f}  lr {rate:.2e}  "
            f"grad {grad_norm:.3f}  {rows_per_second:.0f} examples/s"
        )
        progress.start_line()
        self.clock = time.perf_counter()

    def write_evaluation(self, step: int, results: dict[str, dict]) -> None:
        """Adds a line with accuracy and loss of each split."""
        values = {
            f"{split}_{key}": statistics[key]
            for split, statistics in results.items()
            for key in ("accuracy", "loss")
        }
        self.write(step, **values)

    def write_predictions(self, stage: str, predictions: dict[str, list[dict]]) -> None:
        """Writes STAGE_SPLIT.jsonl for each split."""
        if not ranks.FIRST:
            return
        for split, rows in predictions.items():
            files.write_lines(self.folder / f"{stage}_{split}.jsonl", rows)

    def finish(self, results: dict, predictions: dict[str, list[dict]], prompt: str) -> bool:
        """Writes results.json and prints the table. Then follows what a run can do without.

        That is the predictions, the pictures, the page, the model card, and what --wandb and
        --push ask for. Returns whether all of it was done.
        """
        try:
            files.write_json(self.folder / "results.json", results)
        finally:
            self.say(metrics.table(results))
        self.file.close()
        attempt = self.extras.attempt
        with attempt("the predictions"):
            self.write_predictions("predictions", predictions)
        with attempt("the pictures"):
            page.draw_pictures(self.folder)
        with attempt("report.html"):
            page.write(self.folder)
        with attempt("README.md"):
            card.write_card(self.folder, prompt)
        if self.is_sent:
            with attempt("W&B"):
                finish_wandb(self.wandb_run, results, self.folder)
        if self.args.push:
            with attempt("--push"):
                self.say(f"uploaded to {upload.push(self.folder, self.args.push, prompt)}")
        self.say_what_is_left(results)
        return not self.extras.failed

    def say_what_is_left(self, results: dict) -> None:
        """Prints where the files of the run are, and how to use them."""
        if "best" in results:
            self.say(best.describe(self.folder, results["best"]))
        named = "adapter and results.json"
        if "report.html" not in self.extras.failed:
            named = "adapter, results.json and report.html"
        duration = timedelta(seconds=round(time.perf_counter() - self.started))
        self.say(f"{named} are in {self.folder} ({duration})")
        if "the predictions" in self.extras.failed:
            self.say(f"all of them once more: {commands.resume(self.folder)}")
        elif {"the pictures", "report.html"} & set(self.extras.failed):
            again = commands.command("scripts.report", self.folder)
            self.say(f"pictures and report.html once more: {again}")
        pair = ("--premise", "...", "--hypothesis", "...")
        self.say(f"try: {commands.command('eval.py', '--adapter', self.folder, *pair)}")


# -----------------------------------------------------------------------------
# Weights & Biases, a library that only --wandb needs and imports

# What a run is called there, and the variables by which a user decides on it
IDENTITY = {
    "id": "WANDB_RUN_ID",
    "name": "WANDB_NAME",
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
}


def wandb_identity(name: str, saved: dict | str | None) -> dict[str, str]:
    """Returns what a run is called: as a variable says, as it was `saved`, or by default."""
    identity = {"id": uuid.uuid4().hex, "name": name, "project": "flora"}
    if isinstance(saved, str):  # an older version has saved the id alone
        identity["id"] = saved
    if isinstance(saved, dict):
        identity |= saved
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

    options = {"config": record, **record["wandb_run"]}
    if not os.environ.get("WANDB_DIR"):
        options["dir"] = folder
    if not os.environ.get("WANDB_RESUME"):
        options["resume"] = "allow"  # if there is one of this id, it goes on
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


def finish_wandb(run, results: dict, folder: Path) -> None:
    """Sends results.json as a table, and the pictures, and ends the run."""
    import wandb

    # The numbers alone: a cell cannot hold a confusion matrix. nll may be missing.
    columns = ["accuracy", "n", "correct", "unparsed", "macro_f1", "nll"]
    rows = [
        [stage, split, *(statistics.get(column) for column in columns)]
        for stage, split, statistics in metrics.stages(results)
    ]
    entries = {"results": wandb.Table(columns=["stage", "split", *columns], data=rows)}
    for name in pictures.PICTURES:
        if (folder / name).is_file():
            entries[name.replace(".png", "_picture")] = wandb.Image(str(folder / name))
    try:
        run.log(entries)
    finally:
        run.finish()
