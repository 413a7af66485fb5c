"""What a run says while it goes on: on the console, in metrics.jsonl, and to Weights & Biases."""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from support import files, machine, metrics, pictures, ranks
from support.resume import Progress, State, lines_up_to


class RunLog:
    """The log of a run in its folder. Of several ranks the first alone writes.

    A resumed run keeps the lines of metrics.jsonl up to the step that it resumes from.
    """

    def __init__(self, args: argparse.Namespace, state: State, device: torch.device):
        self.device = device
        self.folder = Path(args.out)
        self.peak_memory = None  # of training above that of the empty process, in GiB
        self.memory_before = machine.peak_memory(device, reset=True)
        self.clock = time.perf_counter()
        self.file = None
        self.wandb = None
        if not ranks.FIRST:
            return
        record = state.arguments | machine.environment(device)
        path = self.folder / "metrics.jsonl"
        lines = []
        if state.progress.step or state.baseline:
            lines = lines_up_to(path, state.progress.step, state.steps)
        self.folder.mkdir(parents=True, exist_ok=True)
        files.remove_unfinished(self.folder)
        files.write_json(self.folder / "args.json", record)
        with files.replacing(path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
        self.file = open(path, "a", buffering=1, encoding="utf-8")
        if args.wandb:
            self.wandb = start_wandb(self.folder, record)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if ranks.FIRST:
            tqdm.write(text)

    def bar(self, steps: range, total: int) -> tqdm:
        """Returns a progress bar over the steps that are left of `total`."""
        disable = None if ranks.FIRST else True  # None: where the output is no terminal
        return tqdm(
            steps, "training", total, initial=steps.start, unit="step", disable=disable
        )

    def start_clock(self) -> None:
        """Starts to measure speed and memory again: what came before was not training."""
        self.clock = time.perf_counter()
        machine.peak_memory(self.device, reset=True)

    def write(self, step: int, **values) -> None:
        """Adds a line to metrics.jsonl."""
        if self.file:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.wandb:
            self.wandb.log(values, step=step)

    def write_training(self, progress: Progress, rate: float, grad_norm: float) -> None:
        """Reports the steps since the last report, and starts the sums of the next one."""
        seconds = time.perf_counter() - self.clock
        loss = progress.loss / (progress.step - progress.logged)
        rows_per_second = progress.rows / seconds
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
            f"step {progress.step:6,}  loss {loss:.4f}  lr {rate:.2e}  grad {grad_norm:.3f}  "
            f"{rows_per_second:.0f} examples/s"
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

    def finish(self, results: dict) -> None:
        """Sends the final table and the pictures to W&B, where it is on, and ends its run."""
        if self.file:
            self.file.close()
        if self.wandb:
            finish_wandb(self.wandb, results, self.folder)


def start_wandb(folder: Path, record: dict):
    """Returns a W&B run that never asks for a key.

    Without a key it is kept offline, in a folder beside the run's other files.
    """
    import wandb

    try:
        offline = "WANDB_MODE" not in os.environ and not wandb.login(prompt=False)
    except wandb.Error as error:
        print(f"W&B: {str(error).splitlines()[0]}")
        offline = True
    if offline:
        print(
            f"W&B: not logged in, so this run is kept offline in {folder}/wandb; "
            "send it later with `wandb sync`"
        )
    mode = "offline" if offline else None
    return wandb.init(project="flora", name=folder.name, dir=folder, config=record, mode=mode)


def finish_wandb(run, results: dict, folder: Path) -> None:
    import wandb

    columns = ["accuracy", "n", "correct", "unparsed", "macro_f1", "nll"]
    rows = [
        [stage, split, *(statistics.get(column) for column in columns)]
        for stage, split, statistics in metrics.stages(results)
    ]
    entries = {"results": wandb.Table(columns=["stage", "split", *columns], data=rows)}
    for name in pictures.PICTURES:
        if (folder / name).is_file():
            entries[name.replace(".png", "_picture")] = wandb.Image(str(folder / name))
    run.log(entries)
    run.finish()
