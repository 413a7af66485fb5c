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
# Downloads of a model, a dataset or an adapter. `kind` is one of these words, for errors. The
# flag has the same name


def refuse_revision(kind: str, name: str, revision: str | None) -> None:
    """Raises ValueError if a revision is given for a local directory."""
    if revision:
        raise ValueError(f"--{kind}-revision is for a {kind} on the Hub, and {name} is a folder")


def require_repository(kind: str, name: str) -> None:
    """Raises ValueError if `name`, which is not a folder, cannot be a repository either."""
    if not is_repository(name):
        raise ValueError(
            f"no {kind} directory {name!r}, and it is not a Hub id (owner/name): "
            f"say with --{kind} where it is"
        )


def download(
    kind: str, name: str, patterns: tuple[str, ...], revision: str | None = None
) -> Path:
    """Returns the local folder of a repository, with the files that match `patterns`.

    Files in the cache are not downloaded again. Raises ValueError if a download fails.
    """
    require_repository(kind, name)
    from huggingface_hub import snapshot_download

    repo_type = "dataset" if kind == "dataset" else "model"  # for the Hub an adapter is a model
    try:
        folder = snapshot_download(
            name, repo_type=repo_type, revision=revision, allow_patterns=list(patterns)
        )
        return Path(folder)
    except errors() as error:
        raise failure(kind, name, revision, error) from None


def errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions that the Hub's libraries raise for external failures.

    Most errors are OSErrors (a full disk too) or ValueErrors. A lost connection or a refusing
    proxy raises an error of the HTTP library, which is requests, httpx or httpx2, depending on
    the version of huggingface_hub. HfHubHTTPError is derived from that library's base error. An
    ImportError means a SOCKS proxy without the package that it needs.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, ImportError, *HfHubHTTPError.__bases__)


def failure(kind: str, name: str, revision: str | None, error: Exception) -> ValueError:
    """Returns a one-line error for a failed download."""
    at_revision = f" at revision {revision!r}" if revision else ""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return ValueError(
        f"cannot load the {kind} {name!r}{at_revision} from the Hub, and it is not a directory "
        f"here ({reason}); without a network, pass a directory: --{kind} path/to/it"
    )


def find_adapter(name: str) -> Path:
    """Returns the folder of an adapter.

    This is `name` itself, the only folder below it that holds an adapter (such as a save
    of another trainer, checkpoint-500), or the download of a repository on the Hub. Raises
    ValueError if there is no adapter, or more than one.
    """
    directory = Path(name)
    if directory.is_file():
        raise ValueError(f"{name} is a file: pass the folder that it is in")
    if not directory.is_dir():
        directory = download("adapter", name, ("*.json", "*.safetensors"))
    if (directory / ADAPTER).is_file():
        return directory
    found = sorted([*directory.glob(f"*/{ADAPTER}"), *directory.glob(f"*/*/{ADAPTER}")])
    below = [path.parent for path in found]
    # If a run also has a best/, the run itself is taken.
    below = [path for path in below if path.parent not in below]
    if len(below) == 1:
        return below[0]
    if below:
        names = ", ".join(str(path) for path in below)
        raise ValueError(f"{name} holds several adapters, pass one of them: {names}")
    raise ValueError(f"{name} is not an adapter: it has no {ADAPTER}")
