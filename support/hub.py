"""Names on the Hugging Face Hub, and downloads from it. (Uploads are in support/upload.py.)"""

import argparse
from pathlib import Path

ADAPTER = "adapter_config.json"  # the file that makes a folder an adapter


def is_repository(name: str) -> bool:
    """Returns whether a name has the form of a repository on the Hub: owner/name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    # validate_repo_id also accepts a name without an owner, such as "gpt2".
    return name.count("/") == 1


def repository(name: str) -> str:
    """Returns a repository's name, as a type for argparse. Raises ArgumentTypeError otherwise."""
    if not is_repository(name):
        raise argparse.ArgumentTypeError(
            f"{name!r} is not a repository on the Hub: "
            "owner/name, of letters, digits, - _ and ."
        )
    return name


# -----------------------------------------------------------------------------
# A model, a dataset or an adapter, in a folder or downloaded. `kind` is one of these words, for
# errors. The flag has the same name


def find(
    kind: str, name: str, patterns: tuple[str, ...], revision: str | None = None
) -> Path:
    """Returns the folder `name`, or the download of a repository.

    Raises ValueError if there is neither.
    """
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"{name} is a file: pass the folder that it is in")
    if not folder.is_dir():
        return download(kind, name, patterns, revision)
    refuse_revision(kind, name, revision)
    return folder


def find_adapter(name: str) -> Path:
    """Returns the folder of an adapter.

    This is `name` itself, the only folder below it that holds an adapter (such as a save of
    another trainer, checkpoint-500), or the download of a repository on the Hub. Raises
    ValueError if there is no adapter, or more than one.
    """
    folder = find("adapter", name, ("*.json", "*.safetensors"))
    if (folder / ADAPTER).is_file():
        return folder
    found = sorted([*folder.glob(f"*/{ADAPTER}"), *folder.glob(f"*/*/{ADAPTER}")])
    below = [path.parent for path in found]
    # If a run also has a best/, the run itself is taken.
    below = [path for path in below if path.parent not in below]
    if len(below) == 1:
        return below[0]
    if below:
        names = ", ".join(str(path) for path in below)
        raise ValueError(f"{name} holds several adapters, pass one of them: {names}")
    raise ValueError(f"{name} is not an adapter: it has no {ADAPTER}")


def refuse_revision(kind: str, name: str, revision: str | None) -> None:
    """Raises ValueError if a revision is given for a local directory."""
    if revision:
        raise ValueError(f"--{kind}-revision is for a {kind} on the Hub, and {name} is a folder")


def download(
    kind: str, name: str, patterns: tuple[str, ...], revision: str | None = None
) -> Path:
    """Returns the local folder of a repository, with the files that match `patterns`.

    Files in the cache are not downloaded again. Raises ValueError if a download fails.
    """
    if not is_repository(name):
        raise ValueError(
            f"no {kind} directory {name!r}, and it is not a Hub id (owner/name): "
            f"say with --{kind} where it is"
        )
    from huggingface_hub import snapshot_download

    repo_type = "dataset" if kind == "dataset" else "model"  # for the Hub an adapter is a model
    try:
        folder = snapshot_download(
            name, repo_type=repo_type, revision=revision, allow_patterns=list(patterns)
        )
    # The Hub's errors, those of its HTTP library, a full disk, a proxy that needs a package.
    except Exception as error:
        at_revision = f" at revision {revision!r}" if revision else ""
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        raise ValueError(
            f"cannot load the {kind} {name!r}{at_revision} from the Hub, and it is not a "
            f"directory here ({reason}); without a network, pass a directory: --{kind} path/to/it"
        ) from None
    return Path(folder)
