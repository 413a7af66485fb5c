"""Uploads a run to the Hugging Face Hub: the adapter, its card and its results.

No row of the data, no path of this machine and nothing that only --resume needs is sent.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from support import card, files
from support.pictures import PICTURES

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


def push(directory: Path, repo: str, prompt: str, private: bool = False) -> str:
    """Uploads a run into a repository and returns its address.

    A repository that does not exist is created. Raises ValueError when the directory holds
    no run, and when the Hub refuses or cannot be reached.
    """
    import httpx2
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
            api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message="A FLoRA adapter"
            )
        # A refusal of the Hub is an OSError, a lost connection httpx2's, a bad card a
        # ValueError.
        except (httpx2.HTTPError, OSError, ValueError) as error:
            raise ValueError(failure(error, directory, repo)) from None
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


def failure(error: Exception, directory: Path, repo: str) -> str:
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
    command = f"python -m scripts.push --adapter {directory} --repo {repo}"
    return line + f"{directory} is unchanged, try again with: {command}"
