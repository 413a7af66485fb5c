"""What a run resumes from: trainer.safetensors, and nothing else.

Its tensors, for adapter parameters numbered n in the order of lora_parameters:

    adapter.NAME                        the parameter called NAME
    optimizer.n.step                    () fp32: how often AdamW has updated parameter n
    optimizer.n.exp_avg, .exp_avg_sq    its two moments, shaped like the parameter
    random                              (processes, bytes) uint8: each process's random generators

Everything else is JSON in the metadata (`State`): no pickle, which could run code. The
order of the rows needs nothing, because it is a function of seed and step.

torch takes seconds to import, so the functions that use it import it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from support import files

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NAME = "trainer.safetensors"


# -----------------------------------------------------------------------------
# What is not a tensor


@dataclass
class Progress:
    """How far a run has come, and its sums since the last line of metrics.jsonl.

    Rows, tokens and losses are of all processes together.
    """

    step: int = 0  # optimiser steps taken
    cut: int = 0  # prompts that --max-length has cut so far
    logged: int = 0  # the step of the last line
    # Saved too, so that the first line after a resume is over as many steps as any other.
    loss: float = 0.0  # sum of the steps' losses since then, each a mean over its targets
    rows: int = 0  # rows since then
    tokens: int = 0  # ids that the model has read since then

    def add(self, loss: float, rows: int, tokens: int, cut: int) -> None:
        """Counts one more step."""
        self.step += 1
        self.loss += loss
        self.rows += rows
        self.tokens += tokens
        self.cut += cut

    def start_line(self) -> None:
        """Starts the sums of the next line."""
        self.logged = self.step
        self.loss = 0.0
        self.rows = 0
        self.tokens = 0


@dataclass
class State:
    """All that is saved beside tensors."""

    arguments: dict  # of train.py, as args.json holds them
    steps: int  # that the run is to take
    train_rows: int  # after --limit
    rows_per_step: int  # batch size * accumulate * processes
    rows_digest: str  # of the rows' content
    validation_digest: str  # the same of what the base was measured on
    fingerprint: dict  # what the adapter is trained over: support/fingerprint.py
    baseline: dict = field(default_factory=dict)  # statistics of the base, by split
    progress: Progress = field(default_factory=Progress)

    def check(self, run: Path, now: State) -> None:
        """Raises ValueError when the state `now` belongs to another run than this one."""
        # The order of rows depends on these two numbers.
        if self.train_rows != now.train_rows:
            raise ValueError(
                f"{run} was trained on {self.train_rows:,} rows, "
                f"now there are {now.train_rows:,}"
            )
        if self.rows_per_step != now.rows_per_step:
            raise ValueError(
                f"{run} was trained with {self.rows_per_step:,} rows a step, "
                f"with this number of processes there are {now.rows_per_step:,}"
            )
        if self.rows_digest != now.rows_digest:
            raise ValueError(
                f"{run} was trained on other rows ({self.rows_digest}, here {now.rows_digest}): "
                "that would be another run"
            )
        if self.validation_digest != now.validation_digest:
            raise ValueError(
                f"the base of {run} was measured on other validation rows "
                f"({self.validation_digest}, here {now.validation_digest}): "
                "what was trained could not be compared with it"
            )
        # The schedule of the learning rate ends at the last step.
        if self.progress.step > now.steps:
            raise ValueError(
                f"{run} has taken {self.progress.step:,} steps already, "
                f"more than {now.steps:,}"
            )
        # What a fingerprint of an older version lacks cannot be compared.
        for name, here in now.fingerprint.items():
            there = self.fingerprint.get(name, here)
            if there != here:
                raise ValueError(
                    f"{run} was trained with another {name.replace('_', ' ')} "
                    f"({there}, here {here}): that would be another run"
                )

    def describe_resumption(self, steps: int) -> str:
        """Returns what a run prints when it resumes from here to take `steps` in all."""
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
        self, adapter: dict[str, Tensor], optimizer, process: int, device: torch.device
    ) -> None:
        """Puts adapter, optimiser and the random generators of this process back.

        Raises ValueError when the tensors are not those of this adapter.
        """
        import torch

        # All shapes first, so that no copy fails half-way.
        self.check_shapes(adapter, process)

        # Copied in place, because the layers and the optimiser hold these very tensors.
        with torch.no_grad():
            for name, tensor in adapter.items():
                tensor.copy_(self.tensors[f"adapter.{name}"])

        # AdamW numbers the parameters in their order and keeps three entries for each.
        entries = {}
        for name, tensor in self.tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                entries.setdefault(int(number), {})[key] = tensor
        # The groups hold this run's flags, such as the weight decay: they stay.
        # load_state_dict moves the entries to the device of their parameters.
        optimizer.load_state_dict(optimizer.state_dict() | {"state": entries})

        # Last, because nothing here may draw from the generators any more.
        try:
            set_random_state(self.tensors["random"][process], device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"{self.path} holds no state of a random generator: {error}"
            ) from None

    def check_shapes(self, adapter: dict[str, Tensor], process: int) -> None:
        """Raises ValueError unless the tensors fit this adapter and this process."""
        expected = {f"adapter.{name}": tensor.shape for name, tensor in adapter.items()}
        # Before step 1 the optimiser has no entries.
        if any(name.startswith("optimizer.") for name in self.tensors):
            for number, tensor in enumerate(adapter.values()):
                expected[f"optimizer.{number}.step"] = ()
                expected[f"optimizer.{number}.exp_avg"] = tensor.shape
                expected[f"optimizer.{number}.exp_avg_sq"] = tensor.shape
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        # Its second size depends on the device and on torch: the generators check it.
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
    # safetensors refuses views whose values are not one after the other.
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    # The metadata may hold texts only. One entry: safetensors writes several in any order,
    # and the same run is to give the same bytes.
    save_file(tensors, path, {"state": json.dumps(asdict(state))})


def load(run: Path) -> Saved:
    """Returns what a run has saved. Raises ValueError for no file or a damaged one."""
    path = Path(run) / NAME
    if not path.is_file():
        raise ValueError(f"{run} holds no {NAME}: there is nothing to resume from")
    try:
        with safe_open(path, framework="pt") as file:
            # Copies: a tensor of the file's own keeps it mapped into memory as long as it is
            # used, by the optimiser to the end, and Windows replaces no file that is mapped.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error})") from None
    place = f"{path}: its state"
    raw = files.parse_line(metadata.get("state", ""), place)
    # Fields that another version has added or dropped are a TypeError of the dataclass.
    try:
        state = State(**(raw | {"progress": Progress(**raw["progress"])}))
        check_types(state)
        check_types(state.progress)
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{place} was not written by this version of train.py ({error})"
        ) from None
    return Saved(state, tensors, path)


def check_types(record: State | Progress) -> None:
    """Raises TypeError where a field holds a value of another type than it says."""
    for part in fields(record):
        kind = type(getattr(record, part.name)).__name__
        if kind != part.type and (kind, part.type) != ("int", "float"):
            raise TypeError(f"{part.name} is {kind}, not {part.type}")


def load_if_begun(run: Path | None) -> Saved | None:
    """Returns what a run has saved; None without a run, or before its first save."""
    if run is None or not (run / NAME).is_file():
        return None
    return load(run)


def saved_arguments(run: Path) -> dict:
    """Returns the arguments of a run. Raises ValueError when the folder holds no run."""
    if (run / NAME).is_file():
        return load(run).state.arguments
    if (run / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"{run} holds a finished adapter and no {NAME}: "
            "there is nothing to resume from, "
            "and starting again would write over the adapter"
        )
    if (run / "args.json").is_file():  # it was stopped before its first save
        return files.read_json(run / "args.json")
    raise ValueError(f"{run} holds no run to resume: no {NAME} and no args.json")


# -----------------------------------------------------------------------------
# What a resumed run keeps and restores besides


def lines_up_to(path: Path, step: int, steps: int) -> list[str]:
    """Returns the whole lines of a metrics.jsonl up to `step`.

    Later steps are taken again. The final evaluation, at step `steps`, is left out, because
    it will be repeated.
    """
    if not path.is_file():
        return []
    kept = []
    # With their ends: a line without one was cut short by a kill.
    text = path.read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines(keepends=True):
        try:
            entry = json.loads(line)
            is_final_evaluation = is_evaluation(entry) and entry["step"] >= steps
            if line.endswith("\n") and entry["step"] <= step and not is_final_evaluation:
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # cut short, or not a line of ours
            continue
    return kept


def evaluated_steps(lines: list[str]) -> set[int]:
    """Returns the steps that have an evaluation among these lines of a metrics.jsonl."""
    entries = [json.loads(line) for line in lines]
    return {entry["step"] for entry in entries if is_evaluation(entry)}


def is_evaluation(entry: dict) -> bool:
    """Returns whether a line is of an evaluation, which has SPLIT_loss and no "loss"."""
    return "loss" not in entry


def random_state(device: torch.device) -> Tensor:
    """Returns the state of the CPU's generator and, on a GPU, that GPU's: (bytes,) uint8.

    Dropout draws from the generator of its device, the order of rows from neither.
    """
    import torch

    state = torch.get_rng_state()
    if device.type != "cuda":
        return state
    return torch.cat((state, torch.cuda.get_rng_state(device)))


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Sets the generators to a `random_state`. A GPU's part is ignored on a CPU."""
    import torch

    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].clone())
    # A run that was begun on a CPU has no state for a GPU: its generator stays as it is.
    if len(state) > size and device.type == "cuda":
        torch.cuda.set_rng_state(state[size:].clone(), device)
