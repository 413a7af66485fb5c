"""Reads the folder of a run, unfinished or finished, for its page and to compare several runs."""

import functools
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from support import files, metrics
from support.labels import LABELS


@dataclass
class Record:
    """The files of a run.

    results: from results.json. An unfinished run only has the base's statistics.
    entries: the lines of metrics.jsonl.
    damage: a message on the lines of metrics.jsonl that cannot be read, or None.
    """

    folder: Path
    args: dict
    results: dict
    entries: list[dict]
    damage: str | None = None

    @property
    def is_finished(self) -> bool:
        return bool(self.results.get("finetuned"))

    @property
    def step(self) -> int:
        """Returns the last step with a line in metrics.jsonl, or 0."""
        return self.entries[-1]["step"] if self.entries else 0

    @property
    def steps(self) -> int | None:
        """Returns how many steps the run should take, or None if an older version wrote it."""
        return self.args.get("total_steps") or self.args.get("steps")

    @property
    def seconds(self) -> float | None:
        """Returns how long training took in seconds, without evaluations.

        Returns None if an older version has written any of the lines.
        """
        spans = [entry.get("seconds") for entry in self.entries if "loss" in entry]
        return sum(spans) if spans and None not in spans else None

    @property
    def memory(self) -> float | None:
        """Returns the peak of memory in training, in GiB, or None if it is not known."""
        peaks = [entry.get("peak_memory_gib") for entry in self.entries]
        return max((peak for peak in peaks if peak is not None), default=None)

    @functools.cached_property
    def trained(self) -> int | None:
        """Returns the number of parameters in all adapters, or None if there is no adapter file."""
        path = self.folder / "adapter_model.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                shapes = [file.get_slice(name).get_shape() for name in file.keys()]
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short ({error})") from None
        return sum(rows * columns for rows, columns in shapes)

    @property
    def words(self) -> list[str]:
        """Returns the words for the labels 0, 1 and 2 in the rows of the run."""
        return words_of(self.args)


def words_of(arguments: dict) -> list[str]:
    """Returns the words for 0, 1 and 2 in args.json, or else the usual ones."""
    words = arguments.get("label_words")
    if not isinstance(words, list) or len(words) != len(LABELS):
        return list(LABELS)
    return list(map(str, words))


def check_entry(entry: dict) -> None:
    """Raises ValueError for a line of metrics.jsonl that train.py cannot have written.

    In the lines that train.py writes, all values are numbers, or null.
    """
    if not isinstance(entry.get("step"), int):
        raise ValueError("it has no step")
    for name, value in entry.items():
        if not isinstance(value, int | float | None):
            raise ValueError(f"its {name} is not a number")


def read_entries(path: Path) -> tuple[list[dict], str | None]:
    """Returns the entries of a metrics.jsonl, and a message on the lines that cannot be read.

    A kill or a full disk may have cut a line short. The message is None if all can be read. Raises
    OSError if the file does not exist.
    """
    entries = []
    errors = []
    # Bytes: a text would also be split at U+2028.
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = files.parse_line(line, "it")
            check_entry(entry)
            entries.append(entry)
        except ValueError as error:
            errors.append(f"line {number}: {error}")
    if not errors:
        return entries, None
    others = f", and {len(errors) - 1} more" if len(errors) > 1 else ""
    return entries, f"{path} is read without {errors[0]}{others}"


def read(folder: Path) -> Record:
    """Returns the run in a folder. Raises ValueError if there is none, or if it is damaged."""
    folder = Path(folder)
    if not (folder / "args.json").is_file():
        raise ValueError(f"{folder} is not a run of train.py: it has no args.json")
    args = files.read_json(folder / "args.json")
    entries, damage = read_entries(folder / "metrics.jsonl")
    if (folder / "results.json").is_file():
        return Record(folder, args, files.read_json(folder / "results.json"), entries, damage)
    baseline = {
        path.stem.removeprefix("baseline_"): metrics.statistics(metrics.read_predictions(path))
        for path in sorted(folder.glob("baseline_*.jsonl"))
    }
    return Record(folder, args, {"baseline": baseline}, entries, damage)
