"""Adapters on the Hugging Face Hub: finds and downloads one, and uploads a run.

Uploaded are the adapter, its card and its results: no row of the data, no path of this
machine and nothing that only --resume needs.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from support import card, commands, files
from support.pictures import PICTURES

CONFIG = "adapter_config.json"
# What makes a directory a run that can be used by others.
NEEDED = ("adapter_model.safetensors", "adapter_config.json", "args.json")
# What holds no path and no row of the data, and is copied as it is, where it is there.
COPIED = ("adapter_model.safetensors", "results.json", "metrics.jsonl", *PICTURES)
# All that may be uploaded; the first three are written anew.
UPLOADED = ("README.md", "adapter_config.json", "args.json", *COPIED)


def repository(name: str) -> str:
    """Returns a repository's name, for argparse. Raises ArgumentTypeError for any other."""
    if not card.is_repository(name):
        raise argparse.ArgumentTypeError(
            f"{name!r} is no repository on the Hub: "
            "owner/name, of letters, digits, - _ and ."
        )
    return name


def refuse_revision(kind: str, name: str, revision: str | None) -> None:
    """Raises ValueError where a revision is typed for a model or a dataset that is a directory."""
    if revision:
        raise ValueError(f"--{kind}-revision is for a {kind} on the Hub, and {name} is a folder")


def find_adapter(name: str) -> Path:
    """Returns the folder of an adapter.

    It is `name` itself, the one folder below it that holds an adapter (such as a
    checkpoint), or the download of a repository on the Hub. Raises ValueError when there is
    none, or more than one.
    """
    directory = Path(name)
    if directory.is_file():
        raise ValueError(f"{name} is a file: pass the folder that it is in")
    if not directory.is_dir():
        if not card.is_repository(name):
            raise ValueError(f"{name} is not an adapter: there is no such folder")
        directory = download_adapter(name)
    if (directory / CONFIG).is_file():
        return directory
    below = [path.parent for depth in ("*", "*/*") for path in directory.glob(f"{depth}/{CONFIG}")]
    # Of a run and its best/ it is the run.
    below = [path for path in below if path.parent not in below]
    if len(below) == 1:
        return below[0]
    if below:
        names = ", ".join(sorted(str(path) for path in below))
        raise ValueError(f"{name} holds several adapters, pass one of them: {names}")
    raise ValueError(f"{name} is not an adapter: it has no {CONFIG}")


def errors() -> tuple[type[Exception], ...]:
    """Returns what the Hub's libraries raise where they fail for a reason outside.

    Most errors are OSErrors, a full disk too, or ValueErrors. A lost connection, and a proxy
    that refuses, are httpx2's. An ImportError is a SOCKS proxy without httpx2's package for it.
    """
    import httpx2

    return (OSError, ValueError, ImportError, httpx2.HTTPError)


def download_adapter(repo: str) -> Path:
    """Returns the local folder of an adapter's repository. What is there is not loaded again."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=["*.json", "*.safetensors"]))
    except errors() as error:
        raise ValueError(
            f"{repo} is not an adapter: there is no such folder, "
            f"and the Hub gives none ({type(error).__name__})"
        ) from None


def push(directory: Path, repo: str, prompt: str, private: bool = False) -> str:
    """Uploads a run into a repository and returns its address.

    A repository that does not exist is created. Raises ValueError when the directory holds
    no run, when the Hub refuses or cannot be reached, and with `private` for a public one.
    """
    from huggingface_hub import HfApi

    directory = Path(directory)
    for name in NEEDED:
        if not (directory / name).is_file():
            raise ValueError(f"{directory} is not a run of train.py: it has no {name}")

    # The upload is of a folder with what others may see, so no other file can slip in.
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        stage(directory, repo, prompt, Path(folder))
        try:
            # None is the owner's default, which may be private; False would be public.
            api.create_repo(repo, private=private or None, exist_ok=True)
            # One that is there already stays public where it is.
            is_public = private and not api.model_info(repo).private
            if not is_public:
                api.upload_folder(
                    repo_id=repo, folder_path=folder, commit_message="A FLoRA adapter"
                )
        except errors() as error:  # a refusal is an OSError, a bad card a ValueError
            raise ValueError(failure(error, directory, repo, private)) from None
    if is_public:
        raise ValueError(f"{repo} is there already, and is public: nothing was uploaded")
    return f"{api.endpoint}/{repo}"


def stage(directory: Path, repo: str, prompt: str, folder: Path) -> None:
    """Fills an empty folder with what is uploaded of a run."""
    for name in COPIED:
        if (directory / name).is_file():
            shutil.copy(directory / name, folder)
    # These two hold paths of this machine, which their public versions leave out.
    files.write_json(folder / "args.json", card.public_args(directory))
    files.write_json(folder / "adapter_config.json", card.public_config(directory))

    # The run's card does not know the repository, so a new one is written with its name.
    readme = directory / "README.md"
    written = card.card(directory, prompt)
    if readme.is_file() and readme.read_text(encoding="utf-8") != written:
        shutil.copy(readme, folder)  # somebody has edited it, so it is uploaded as it is
    else:
        text = card.card(directory, prompt, repo)
        (folder / "README.md").write_text(text, encoding="utf-8")


def failure(error: Exception, directory: Path, repo: str, private: bool) -> str:
    """Returns one line on a failed upload, with its cure."""
    # The Hub's errors have several lines, the first of which says what happened.
    lines = str(error).splitlines() or [""]
    line = f"cannot upload to {repo} ({type(error).__name__}: {lines[0][:120]}); "
    # Without a connection there is no response, and a new token would not help.
    response = getattr(error, "response", None)
    if response is not None and response.status_code in (401, 403):
        return line + (
            "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
        )
    words = ["--adapter", directory, "--repo", repo]
    if private:
        words.append("--private")  # or the next try would publish it
    command = commands.command("scripts.push", *words)
    return line + f"{directory} is unchanged, try again with: {command}"
