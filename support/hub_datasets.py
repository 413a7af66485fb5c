"""Datasets on the Hub: which of a repository's files hold which split, and what labels mean.

A repository's card, README.md, may say both, and `datasets` can read it. The rows themselves
are read like those of any folder (dataset_files.py), because the readers of `datasets` guess
types and quotes, and lose rows of GLUE's own tsv files.
"""

import functools
import tempfile
from pathlib import Path
from typing import NamedTuple

from support import hub
from support.dataset_files import (
    PART,
    READERS,
    check_parts,
    find_files,
    split_name,
    stem_and_suffix,
    with_train,
)
from support.labels import CARDS

# The configuration to use in a repository with several. Its folder has the same name, and nothing
# else is downloaded. (So `datasets` cannot read the card, which lists all of them.)
CONFIGURATIONS = {"nyu-mll/glue": "mnli"}


@functools.cache
def download(dataset: str, revision: str | None) -> Path:
    """Returns the local copy of a repository. Files in the cache are not downloaded again."""
    patterns = [f"*{suffix}{packed}" for suffix in READERS for packed in ("", ".gz")]
    if dataset in CONFIGURATIONS:
        patterns = [f"{CONFIGURATIONS[dataset]}/*"]
    folder = hub.download("dataset", dataset, (*patterns, *CARDS), revision)
    rows = [path for path in folder.rglob("*") if stem_and_suffix(path)[1] in READERS]
    if all(path.name in CARDS for path in rows):
        raise ValueError(
            f"the dataset {dataset!r} holds no files of rows on the Hub ({', '.join(READERS)}); "
            "try the Hub's own: --dataset-revision refs/convert/parquet"
        )
    return folder


class Card(NamedTuple):
    """What the card of a dataset says."""

    splits: dict[str, list[Path]]  # the files of each split; empty if the card lists none
    names: dict[str, tuple[str, ...]]  # by column, the names of its numbers 0, 1 and so on


@functools.cache
def read_card(dataset: str, revision: str | None) -> Card:
    """Returns what a dataset's card says. Raises ValueError if the card is ambiguous or damaged."""
    if dataset in CONFIGURATIONS:
        return Card({}, {})
    import datasets
    from huggingface_hub import metadata_load

    folder = download(dataset, revision)
    path, infos = (folder / name for name in CARDS)
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are reported below
    try:
        metadata = (metadata_load(path) if path.is_file() else None) or {}
        if not metadata.keys() & {"configs", "dataset_info"} and not infos.is_file():
            return Card({}, {})
        # It locks a folder in its cache, and the user's cache may be read-only.
        with tempfile.TemporaryDirectory() as cache:
            builder = datasets.load_dataset_builder(str(folder), cache_dir=cache)
    # For example invalid YAML, a card with several configurations, a repository without rows.
    except Exception as error:  # noqa: BLE001 (the library raises whatever its parsers raise)
        reason = " ".join(str(error).split("Example of usage")[0].split())
        raise ValueError(
            f"the card of {dataset!r} does not say which of its files to read ({reason[:200]}); "
            f"pass the folder that you mean, {folder} or one below it"
        ) from None
    splits = {}
    if "configs" in metadata:
        files = builder.config.data_files
        splits = {str(name): [Path(path) for path in paths] for name, paths in files.items()}
    names = {
        column: tuple(map(str, feature.names))
        for column, feature in (builder.info.features or {}).items()
        if isinstance(feature, datasets.ClassLabel)
    }
    return Card(splits, names)


def find_splits(dataset: str, revision: str | None) -> dict[str, list[Path]]:
    """Returns the files of each split in a repository, as its card says or by the files' names."""
    listed = read_card(dataset, revision).splits
    if not listed:
        return find_files(download(dataset, revision) / CONFIGURATIONS.get(dataset, ""))
    called = {}
    for name, paths in listed.items():
        refuse_missing_parts(name, paths)
        called[split_name(name) or name] = paths  # dev becomes validation
    if len(called) < len(listed):  # snli_dev and mnli_dev would both become validation
        called = listed
    return with_train(called)


def refuse_missing_parts(split: str, paths: list[Path]) -> None:
    """Raises ValueError if one of train-00000-of-00002 and train-00001-of-00002 is missing.

    Without a network, the cache may contain only what another program needed of a dataset.
    """
    wholes = {}  # a card may put several tables into a split, each in parts
    for path in paths:
        if "-of-" in path.name:
            stem, suffix = stem_and_suffix(path)
            wholes.setdefault((path.parent, PART.sub("", stem), suffix), []).append(path)
    for parts in wholes.values():
        check_parts(split, parts)
