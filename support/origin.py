"""What a run's names mean from here: its model, its dataset, and how its rows are read.

A run's files hold paths as they were typed in the folder where it was started. Here other models
and rows may have the same names, and the run may have moved. Where several folders could be
meant, digests decide: that of the base's weights, and those of the rows of each split.
"""

import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from support import examples, fingerprint, hub, processes, records
from support.commands import quoted
from support.examples import Reading

# How the rows of one dataset are read. What they are called, those of another may mean.
SETTINGS = ("columns", "labels", "validation")


class Origin(NamedTuple):
    """Where a run comes from."""

    run: Path
    started_in: Path | None  # PEFT does not say it
    digests: dict[str, str]  # of the rows of each split; none from PEFT and older versions
    settings: dict  # those of SETTINGS that were typed for the training
    words: list[str]  # what its rows call the labels 0, 1 and 2

    def reading(self, revision: str | None) -> Reading:
        """Returns how the run has read its rows."""
        return Reading.of(Namespace(**self.settings, dataset_revision=revision))


def origin(run: Path, arguments: dict, saved: dict) -> Origin:
    """Returns where a run comes from. `saved` are those of its arguments that are checked."""
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


def places(name: str, run: Path, started_in: Path | None = None) -> list[str]:
    """Returns the paths from here of the directories that a run's name may mean, likeliest first.

    A run's files hold paths as they were typed, in the folder where it was started. It may
    have moved since, with the folders around it or without.
    """
    above = run.resolve().parents
    found = {}
    for folder in (*above, Path()) if started_in is None else (started_in, *above, Path()):
        path = str(folder / name)
        # Unlike Path.is_dir this answers for any text, one too long for a path too.
        if os.path.isdir(path):
            is_here = os.path.isdir(name) and os.path.samefile(name, path)
            found.setdefault(os.path.realpath(path), name if is_here else path)
    return list(found.values())


def locate(saved: dict, source: Origin, typed: dict) -> dict:
    """Returns a run's arguments with the paths of its model and its dataset from here.

    A name with a revision is one on the Hub, whatever folder has the same name. Where another
    model or dataset is typed, the run's revision is not that one's.
    """
    found = dict(saved)
    for name, is_right in (("model", has_its_weights), ("dataset", has_its_rows)):
        value = saved.get(name)
        revision = f"{name}_revision"
        if name in typed:
            found[revision] = None
        elif value and not (saved.get(revision) and hub.is_repository(value)):
            folders = places(value, source.run, source.started_in)
            if len(folders) > 1:
                folders = [folder for folder in folders if is_right(source, folder)] or folders
            if folders:
                found[name] = folders[0]
                found[revision] = None
    return found


def has_its_weights(source: Origin, directory: str) -> bool:
    """Returns whether a directory holds the base that a run's adapter was trained over."""
    recorded = fingerprint.recorded(source.run).get("base_weights")
    if recorded is None:
        return (Path(directory) / "config.json").is_file()
    # (With files of an earlier save beside them they are not recognised.)
    paths = sorted(Path(directory).glob("*.safetensors"))
    try:
        return fingerprint.digest_weights(paths) == recorded
    except (OSError, SafetensorError):  # no model
        return False


# -----------------------------------------------------------------------------
# Its rows


def has_its_rows(
    source: Origin, dataset: str, revision: str | None = None, splits: list[str] | None = None
) -> bool:
    """Returns whether the splits that are evaluated hold the rows of the run.

    Of splits that the run has not read, such as test, nothing is known: then the others tell.
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
    """Returns how the rows of an evaluation are read: as typed, else as those of the run were.

    Other rows are not read like the run's. Then it prints what of the run is not used.
    """
    typed = Reading.of(args)
    source = args.origin
    if source is None:
        return typed
    examples.find_splits(args.dataset, typed.revision)  # one that is not there is another matter
    untyped = {
        name: value for name, value in source.settings.items() if getattr(args, name) is None
    }
    splits = getattr(args, "split", None)
    # A run of an older version has no digests: its name of a dataset has to do.
    is_its = not source.digests and not args.is_dataset_typed
    if is_its or has_its_rows(source, args.dataset, typed.revision, splits):
        return Reading.of(Namespace(**(vars(args) | untyped)))
    if processes.IS_FIRST and (untyped or not args.is_dataset_typed):
        flags = quoted(*Reading.of(Namespace(**untyped)).flags())
        consequence = f", so what it was read with is not used: {flags}" if flags else ""
        print(
            f"{args.dataset} does not hold the rows that {source.run} was trained with"
            f"{consequence}",
            file=sys.stderr,
        )
    return typed
