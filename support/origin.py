"""Finds a run's model and dataset from the current folder, and how the run's rows are read.

A run's files contain paths as they were typed, in the folder where it was started. By now there
may be other models and datasets under the same names: fingerprint.check finds out for a model,
and digests of each split's rows for a dataset.
"""

import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from support import examples, hub, processes, records
from support.commands import quoted
from support.examples import Reading

# Settings for reading one dataset. Under the same names another dataset may mean something else.
SETTINGS = ("columns", "labels", "validation")


class Origin(NamedTuple):
    """Where a run comes from."""

    run: Path
    started_in: Path | None  # None for an adapter from PEFT
    digests: dict[str, str]  # of each split's rows; empty from PEFT and older versions
    settings: dict  # those of SETTINGS that were given for the training
    words: list[str]  # for the labels 0, 1 and 2: those of --labels, or else the usual ones

    def reading(self, revision: str | None) -> Reading:
        """Returns how the run has read its rows."""
        return Reading.of(Namespace(**self.settings, dataset_revision=revision))


def origin(run: Path, arguments: dict, saved: dict) -> Origin:
    """Returns where a run comes from. `saved` are its arguments that have been checked."""
    folder = arguments.get("started_in")
    digests = arguments.get("digests")
    return Origin(
        run,
        Path(folder) if isinstance(folder, str) else None,
        digests if isinstance(digests, dict) else {},
        {name: saved[name] for name in SETTINGS if saved.get(name) is not None},
        records.words_of(arguments),
    )


# -----------------------------------------------------------------------------
# Its model and its dataset


def find(name: str, run: Path, started_in: Path | None = None) -> str | None:
    """Returns the path of the directory that a name in a run's files means, or None.

    The name is a path as it was typed in the folder where the run was started. The run may
    have moved since, with or without the folders around it.
    """
    above = run.resolve().parents
    for folder in (*above, Path()) if started_in is None else (started_in, *above, Path()):
        path = str(folder / name)
        # Unlike Path.is_dir, this accepts any string, even one too long for a path.
        if os.path.isdir(path):
            is_here = os.path.isdir(name) and os.path.samefile(name, path)
            return name if is_here else path
    return None


def locate(saved: dict, source: Origin, typed: dict) -> dict:
    """Returns a run's arguments, with paths to its model and dataset that are valid from here.

    A name with a revision is on the Hub, even if a folder has the same name. If another model
    or dataset is typed, the run's revision is dropped, because it does not apply to that one.
    """
    located = dict(saved)
    for name in ("model", "dataset"):
        value = saved.get(name)
        revision = f"{name}_revision"
        folder = None
        if value and not (saved.get(revision) and hub.is_repository(value)):
            folder = find(value, source.run, source.started_in)
        if folder:
            located[name] = folder
        if folder or name in typed:
            located[revision] = None
    return located


# -----------------------------------------------------------------------------
# Its rows


def has_its_rows(
    source: Origin, dataset: str, revision: str | None, splits: list[str] | None
) -> bool:
    """Returns whether the splits to evaluate hold the same rows as in the run.

    Nothing is known about splits that the run has not read, such as test; then the other
    splits decide.
    """
    reading = source.reading(revision)
    try:
        there = [name for name in examples.split_names(dataset, reading) if name in source.digests]
        evaluated = splits or examples.validation_splits(dataset, reading)
        compared = [name for name in there if name in evaluated] or there
        return bool(compared) and all(
            examples.digest_split(dataset, name, reading) == source.digests[name]
            for name in compared
        )
    except (ValueError, OSError):  # they cannot be read as the run's were
        return False


def reading_of(args: Namespace) -> Reading:
    """Returns how the rows of an evaluation are read: as typed, or else as in the run.

    The run's settings apply only to the run's own rows. For other rows the function prints
    which settings are not used.
    """
    typed = Reading.of(args)
    source = args.origin
    if source is None:
        return typed
    examples.find_splits(args.dataset, typed.revision)  # raises if there is no such dataset
    untyped = {
        name: value for name, value in source.settings.items() if getattr(args, name) is None
    }
    splits = getattr(args, "split", None)
    # A run of an older version has no digests, so the name of the dataset must do.
    is_its = not source.digests and not args.is_dataset_typed
    if is_its or has_its_rows(source, args.dataset, typed.revision, splits):
        return Reading.of(Namespace(**(vars(args) | untyped)))
    if processes.IS_FIRST and (untyped or not args.is_dataset_typed):
        note = f"{args.dataset} does not hold the rows that {source.run} was trained with"
        if untyped:
            flags = quoted(*Reading.of(Namespace(**untyped)).flags())
            note += f", so these flags of the run are not used: {flags}"
        print(note, file=sys.stderr)
    return typed
