"""Uploads a run to the Hugging Face Hub: the adapter, its card and its results.

No row of the data is uploaded, no path of this machine, and nothing that only --resume needs.
"""

import shutil
import tempfile
from pathlib import Path

from support import card, commands, files, hub

# What makes a directory a run that can be used by others.
NEEDED = ("adapter_model.safetensors", "adapter_config.json", "args.json")
# What holds no path and no row of the data, and is copied as it is, where it is there.
COPIED = ("adapter_model.safetensors", "results.json", "metrics.jsonl", "loss.png")
# All that may be uploaded; the first three are written anew.
UPLOADED = ("README.md", "adapter_config.json", "args.json", *COPIED)


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
        except hub.errors() as error:  # a refusal is an OSError, a bad card a ValueError
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
