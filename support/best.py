"""RUN/best/: the adapter of the best evaluation, which --keep-best saves.

The figures of that evaluation, such as step and accuracy, are in the metadata of the adapter's
file. So a kill cannot separate them, and a resumed run knows the best adapter so far.
"""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support import files

FOLDER = "best"  # in the folder of the run
KEY = "evaluation"  # in the metadata


def figures(step: int, results: dict[str, dict]) -> dict:
    """Returns the figures of an evaluation that are saved, from {split: its statistics}.

    They are the step, accuracy and loss as means over the splits, and both for each split.
    """
    keys = ("accuracy", "loss")
    splits = {split: {key: result[key] for key in keys} for split, result in results.items()}
    means = {key: sum(part[key] for part in splits.values()) / len(splits) for key in keys}
    return {"step": step, "splits": splits, **means}


def is_better(new: dict, old: dict | None) -> bool:
    """Returns whether the new evaluation has a higher accuracy, or the same and a lower loss."""
    if old is None:
        return True
    # Means that should be equal may differ in their last bit.
    if math.isclose(new["accuracy"], old["accuracy"], rel_tol=1e-9):
        return new["loss"] < old["loss"]
    return new["accuracy"] > old["accuracy"]


def metadata(evaluation: dict) -> dict[str, str]:
    """Returns the figures as metadata of a safetensors file, which can only hold strings."""
    return {KEY: json.dumps(evaluation)}


def read(run: Path) -> dict | None:
    """Returns the figures of the best adapter of a run, or None if it has none.

    Raises ValueError if its file is damaged.
    """
    path = run / FOLDER / "adapter_model.safetensors"
    if not path.is_file():
        return None
    with files.open_tensors(path) as file:
        stored = (file.metadata() or {}).get(KEY, "")
    return files.parse_line(stored, f"{path}: its {KEY}")


@contextmanager
def replacing(run: Path) -> Iterator[Path]:
    """Yields a folder for the files of the adapter. On success they replace those in RUN/best/.

    args.json is copied too, so that eval.py knows the settings of the run.
    """
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    files.remove_unfinished(folder)  # from a process that was killed while writing
    with files.replacing_files(folder) as temporary:
        yield temporary
        shutil.copy(run / "args.json", temporary)
