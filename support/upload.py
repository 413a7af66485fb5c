"""Uploads a run to the Hugging Face Hub: the adapter, its card and its results.

It uploads no rows of the data, no paths of this machine, and nothing that only --resume needs.
"""

import shutil
import tempfile
from pathlib import Path

from support import card, commands, files

# The files that a run must have to be useful to others.
NEEDED = ("adapter_model.safetensors", "adapter_config.json", "args.json")
# Files without paths and rows of the data. Those that exist are copied as they are.
COPIED = ("adapter_model.safetensors", "results.json", "metrics.jsonl", "loss.png")


def push(directory: Path, repo: str, prompt: str, private: bool = False) -> str:
    """Uploads a run to a repository and returns the repository's address.

    Creates the repository if it does not exist. Raises ValueError if the directory holds no
    run, if the Hub refuses or cannot be reached, or if `private` is set and it is public.
    """
    from huggingface_hub import HfApi

    directory = Path(directory)
    for name in NEEDED:
        if not (directory / name).is_file():
            raise ValueError(f"{directory} is not a run of train.py: it has no {name}")

    # A temporary folder with only what others may see is uploaded, so no other file can slip in.
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        stage(directory, repo, prompt, Path(folder))
        try:
            # None means the owner's default, which may be private; False would mean public.
            api.create_repo(repo, private=private or None, exist_ok=True)
            # A public repository that already exists stays public.
            is_public = private and not api.model_info(repo).private
            if not is_public:
                api.upload_folder(
                    repo_id=repo, folder_path=folder, commit_message="A FLoRA adapter"
                )
        except Exception as error:  # any error of the Hub's libraries, as in support/hub.py
            raise ValueError(failure(error, directory, repo, private)) from None
    if is_public:
        raise ValueError(f"{repo} already exists and is public: nothing was uploaded")
    return f"{api.endpoint}/{repo}"


def stage(directory: Path, repo: str, prompt: str, folder: Path) -> None:
    """Fills an empty folder with the files of a run to upload."""
    for name in COPIED:
        if (directory / name).is_file():
            shutil.copy(directory / name, folder)
    # These two contain paths of this machine, which their public versions leave out.
    files.write_json(folder / "args.json", card.public_args(directory))
    files.write_json(folder / "adapter_config.json", card.public_config(directory))

    # Somebody may have edited the card, and best/ and runs that were stopped have none.
    readme = directory / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
    else:
        text = card.card(directory, prompt)
    text = text.replace(card.FOLDER, repo)
    (folder / "README.md").write_text(text, encoding="utf-8")


def failure(error: Exception, directory: Path, repo: str, private: bool) -> str:
    """Returns a one-line message about a failed upload, with the cure."""
    # The Hub's errors have several lines; the first one says what happened.
    first = str(error).partition("\n")[0][:120]
    words = ["--adapter", directory, "--repo", repo]
    if private:
        words.append("--private")  # otherwise the next attempt would publish it
    return (
        f"cannot upload to {repo} ({type(error).__name__}: {first}); {directory} is unchanged. "
        "Log in with `hf auth login`, if that is missing, and run: "
        f"{commands.command('scripts/push.py', *words)}"
    )
