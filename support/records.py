"""Reads the folder of a run, unfinished or finished, for its page and to compare several runs."""

import sys
from dataclasses import dataclass
from pathlib import Path

from support import files, metrics
from support.labels import LABELS
from support.letters import printable


@dataclass
class Record:
    """The files of a run."""

    folder: Path
    args: dict  # args.json
    results: dict  # results.json; an unfinished run only has the base's statistics
    entries: list[dict]  # the lines of metrics.jsonl

    @property
    def is_finished(self) -> bool:
        return bool(self.results.get("finetuned"))

    @property
    def step(self) -> int:
        """Returns the last step with a line in metrics.jsonl, or 0."""
        return self.entries[-1]["step"] if self.entries else 0

    @property
    def steps(self) -> int:
        """Returns how many steps the run should take."""
        return self.args["total_steps"]

    @property
    def seconds(self) -> float:
        """Returns how long training took in seconds, without evaluations."""
        return sum(entry["seconds"] for entry in self.entries if "loss" in entry)

    @property
    def memory(self) -> float | None:
        """Returns the peak of memory in training, in GiB, or None if it is not known."""
        peaks = [entry.get("peak_memory_gib") for entry in self.entries]
        return max((peak for peak in peaks if peak is not None), default=None)

    @property
    def trained(self) -> int | None:
        """Returns the number of parameters in all adapters, or None if there is no adapter file."""
        path = self.folder / "adapter_model.safetensors"
        if not path.is_file():
            return None
        with files.open_tensors(path) as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]
        return sum(rows * columns for rows, columns in shapes)


def words_of(arguments: dict) -> list[str]:
    """Returns the words for 0, 1 and 2 in args.json, or else the usual ones."""
    return list(arguments.get("label_words") or LABELS)


def read_entries(path: Path) -> list[dict]:
    """Returns the lines of a metrics.jsonl. Prints how many cannot be read.

    A kill or a full disk may have cut a line short. Raises OSError if the file does not exist.
    """
    entries = []
    damaged = 0
    # Bytes: a text would also be split at U+2028.
    for line in path.read_bytes().splitlines():
        try:
            entries.append(files.parse_line(line, "it"))
        except ValueError:
            damaged += 1
    if damaged:
        print(printable(f"{path} is read without {damaged} damaged lines"), file=sys.stderr)
    return entries


def read(folder: Path) -> Record:
    """Returns the run in a folder. Raises ValueError if there is none, or if it is damaged."""
    if not (folder / "args.json").is_file():
        raise ValueError(f"{folder} is not a run of train.py: it has no args.json")
    args = files.read_json(folder / "args.json")
    entries = read_entries(folder / "metrics.jsonl")
    if (folder / "results.json").is_file():
        return Record(folder, args, files.read_json(folder / "results.json"), entries)
    baseline = {
        path.stem.removeprefix("baseline_"): metrics.statistics(metrics.read_predictions(path))
        for path in sorted(folder.glob("baseline_*.jsonl"))
    }
    return Record(folder, args, {"baseline": baseline}, entries)
