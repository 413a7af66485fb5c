"""The save that a run resumes from: trainer.safetensors, and nothing else.

It contains these tensors, where n is the index of a parameter in lora_parameters:

    adapter.NAME                        the parameter called NAME
    optimizer.n.step                    () fp32: how often AdamW has updated parameter n
    optimizer.n.exp_avg, .exp_avg_sq    its two moments, shaped like the parameter
    random                              (processes, bytes) uint8: each process's random generators

Everything else is JSON in the metadata (`State`); pickle could run code. The order of the
rows need not be saved, because it is a function of seed and step.

torch takes seconds to import, so only the functions that use it import it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from support import files

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NAME = "trainer.safetensors"


# -----------------------------------------------------------------------------
# What is not a tensor


@dataclass
class Progress:
    """How far a run is, and its sums since the last line of metrics.jsonl.

    Rows, tokens and losses are those of all processes together.
    """

    step: int = 0  # optimiser steps taken
    cut: int = 0  # prompts cut to --max-length so far
    logged: int = 0  # the step of the last line
    # Saved too, so that the first line after a resume covers as many steps as any other line.
    loss: float = 0.0  # sum of the steps' losses since then, each a mean over its predicted ids
    rows: int = 0  # rows since then
    tokens: int = 0  # ids that the model has read since then
    skipped: int = 0  # steps since then that were skipped: their gradient overflowed in fp16

    def add(self, numbers) -> None:
        """Counts one more step, with its train.Numbers."""
        self.step += 1
        self.loss += numbers.loss
        self.rows += numbers.rows
        self.tokens += numbers.tokens
        self.cut += numbers.cut
        self.skipped += numbers.is_skipped

    def start_line(self) -> None:
        """Resets the sums for the next line."""
        self.logged = self.step
        self.loss = 0.0
        self.rows = 0
        self.tokens = 0
        self.skipped = 0


@dataclass
class State:
    """Everything that is saved besides tensors."""

    arguments: dict  # of train.py, as in args.json
    steps: int  # how many steps the run should take
    train_rows: int  # after --limit
    rows_per_step: int  # batch size * accumulate * processes
    rows_digest: str  # digest of the training rows
    validation_digest: str  # digest of the validation rows, on which the base was measured
    fingerprint: dict  # what the adapter is trained over: support/fingerprint.py
    baseline: dict = field(default_factory=dict)  # statistics of the base, by split
    progress: Progress = field(default_factory=Progress)
    scaler: dict = field(default_factory=dict)  # the state of the loss scaler in fp16, else {}

    def identity(self) -> dict:
        """Returns what must be equal for a resume, by the names that an error uses."""
        return {
            "number of training rows": self.train_rows,
            "number of rows in a step of all processes": self.rows_per_step,
            "set of training rows": self.rows_digest,
            "set of validation rows": self.validation_digest,
            **self.fingerprint,
        }

    def check(self, run: Path, now: State) -> None:
        """Raises ValueError if the state `now` belongs to a different run."""
        saved = self.identity()
        for name, here in now.identity().items():
            if saved.get(name) != here:
                raise ValueError(
                    f"{run} was trained with another {name.replace('_', ' ')} "
                    f"({saved.get(name)}, here {here}): that would be another run"
                )
        # The schedule of the learning rate ends at the last step.
        if self.progress.step > now.steps:
            raise ValueError(
                f"{run} has taken {self.progress.step:,} steps already, more than {now.steps:,}"
            )

    def describe_resumption(self, steps: int) -> str:
        """Returns what a run prints when it resumes from this state towards `steps` steps."""
        text = f"resuming after step {self.progress.step:,} of {steps:,}"
        if self.progress.step == steps:
            text += ": only the evaluation is left to do"
        if self.steps != steps:
            text += (
                f"; {steps:,} steps instead of {self.steps:,}: "
                "from here on the learning rate follows the new schedule"
            )
        return text


# -----------------------------------------------------------------------------
# The file


@dataclass
class Saved:
    """The content of trainer.safetensors."""

    state: State
    tensors: dict[str, Tensor]  # on the CPU, by the names at the top of this file
    path: Path  # for errors

    def restore(
        self, adapter: dict[str, Tensor], optimizer, scaler, process: int, device: torch.device
    ) -> None:
        """Restores adapter, optimiser, scaler and the random generators of this process.

        Raises ValueError if the saved values do not fit them.
        """
        import torch

        # Check all shapes first, because copy_ would repeat a smaller tensor.
        self.check_shapes(adapter, process)

        # Copied in place, because the layers and the optimiser refer to these tensors.
        with torch.no_grad():
            for name, tensor in adapter.items():
                tensor.copy_(self.tensors[f"adapter.{name}"])

        # AdamW numbers the parameters in order and has three entries for each.
        entries = {}
        for name, tensor in self.tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                entries.setdefault(int(number), {})[key] = tensor
        # The parameter groups hold this run's flags, such as the weight decay, and are kept.
        # load_state_dict moves the entries to the device of their parameters.
        optimizer.load_state_dict(optimizer.state_dict() | {"state": entries})

        try:
            scaler.load_state_dict(self.state.scaler)  # does nothing except in fp16
            # Last, because nothing here may draw random numbers after this.
            set_random_state(self.tensors["random"][process], device)
        except (RuntimeError, LookupError, TypeError) as error:
            raise ValueError(f"{self.path} does not fit this run ({error!r})") from None

    def check_shapes(self, adapter: dict[str, Tensor], process: int) -> None:
        """Raises ValueError unless the tensors fit this adapter and this process."""
        expected = {f"adapter.{name}": tensor.shape for name, tensor in adapter.items()}
        # Before the first step the optimiser has no entries.
        if any(name.startswith("optimizer.") for name in self.tensors):
            for number, tensor in enumerate(adapter.values()):
                expected[f"optimizer.{number}.step"] = ()
                expected[f"optimizer.{number}.exp_avg"] = tensor.shape
                expected[f"optimizer.{number}.exp_avg_sq"] = tensor.shape
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        # The second size depends on the device and on torch. set_random_state checks it.
        random = shapes.pop("random", ())  # (processes, bytes)
        if shapes != expected or len(random) != 2 or random[0] <= process:
            raise ValueError(f"{self.path} does not hold the tensors of this adapter")


def write(
    path: Path, adapter: dict[str, Tensor], optimizer, random: list[Tensor], state: State
) -> None:
    """Writes trainer.safetensors. `random` holds each process's random_state, in order."""
    import torch
    from safetensors.torch import save_file

    tensors = {f"adapter.{name}": tensor.detach() for name, tensor in adapter.items()}
    tensors["random"] = torch.stack(random)
    for number, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            tensors[f"optimizer.{number}.{key}"] = value
    # safetensors rejects tensors that are not contiguous.
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    # Metadata can only hold strings. One entry, because safetensors writes several in no fixed
    # order, and the same run should give the same bytes.
    save_file(tensors, path, {"state": json.dumps(asdict(state))})


def load(run: Path) -> Saved:
    """Returns what a run has saved. Raises ValueError if it is damaged."""
    path = run / NAME
    with files.open_tensors(path, "pt") as file:
        # Cloned, because a tensor from the file keeps the file mapped into memory as long as
        # it is used, here until the end, and Windows cannot replace a mapped file.
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
        metadata = file.metadata() or {}
    raw = files.parse_line(metadata.get("state", ""), f"{path}: its state")
    # If another version has added or dropped fields, the dataclass raises TypeError.
    try:
        state = State(**(raw | {"progress": Progress(**raw["progress"])}))
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: its state was not written by this version of train.py ({error})"
        ) from None
    return Saved(state, tensors, path)


def take_up(run: Path | None, state: State) -> Saved | None:
    """Returns what a run has saved, and copies its progress and baseline into `state`.

    Returns None without a run, or before its first save. Raises ValueError if `state` belongs
    to a different run.
    """
    if run is None or not (run / NAME).is_file():
        return None
    saved = load(run)
    saved.state.check(run, state)
    state.progress = saved.state.progress
    state.baseline = saved.state.baseline
    return saved


def saved_arguments(run: Path) -> dict:
    """Returns the arguments of a run. Raises ValueError if the folder holds no run to resume."""
    if (run / NAME).is_file():
        return load(run).state.arguments
    if (run / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"{run} holds a finished adapter and no {NAME}: there is nothing to resume from, "
            "and starting again would overwrite the adapter"
        )
    if (run / "args.json").is_file():  # it was stopped before its first save
        return files.read_json(run / "args.json")
    raise ValueError(f"{run} holds no run to resume: no {NAME} and no args.json")


# -----------------------------------------------------------------------------
# Random generators


def random_state(device: torch.device) -> Tensor:
    """Returns the states of the CPU's generator and, for a GPU, of that GPU's: (bytes,) uint8.

    Dropout uses the generator of its device. The order of rows uses neither.
    """
    import torch

    state = torch.get_rng_state()
    if device.type != "cuda":
        return state
    return torch.cat((state, torch.cuda.get_rng_state(device)))


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Sets the generators to a `random_state`. On a CPU, the part of a GPU is ignored."""
    import torch

    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].clone())
    # A run that began on a CPU has no state for a GPU, whose generator is then left as it is.
    if len(state) > size and device.type == "cuda":
        torch.cuda.set_rng_state(state[size:].clone(), device)
