"""Finds or downloads a base model, and checks it before its weights are loaded.

phi2.py raises errors for models that it cannot run or read. This file raises those that should
come before gigabytes are downloaded.
"""

from collections.abc import Callable
from pathlib import Path

from support import files, hub

DESCRIPTION = ("config.json", "tokenizer.json")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
MODEL = DESCRIPTION + WEIGHTS


def find(
    name: str,
    read_config: Callable[[Path], object],
    patterns: tuple[str, ...] = MODEL,
    revision: str | None = None,
) -> Path:
    """Returns the directory of a model: `name` itself, or the download from the Hub.

    `read_config` is phi2.read_config, which support cannot import; `patterns` selects the files
    to download. Raises ValueError if there is no such model, or if its config.json does not
    describe a supported phi model.
    """
    # Only this file at first, because the model may be of a kind that is not supported.
    directory = hub.find("model", name, ("config.json",), revision)
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is not a model directory: it has no config.json")
    check_quantization(path)
    read_config(directory)
    return hub.find("model", name, patterns, revision)


def hub_commit(name: str, directory: Path) -> str | None:
    """Returns the commit of a model that was downloaded, or None if `name` is a directory here."""
    return None if Path(name).is_dir() else directory.name  # in the Hub's cache, the commit


def check_quantization(path: Path) -> None:
    """Raises ValueError if the model's weights are quantised, but not in bitsandbytes' NF4."""
    raw = files.read_json(path)
    quantization = raw.get("quantization_config") or raw.get("quantization")
    known = quantization if isinstance(quantization, dict) else {}
    is_nf4 = known.get("load_in_4bit") and known.get("bnb_4bit_quant_type") == "nf4"
    if quantization and not is_nf4:
        raise ValueError(
            f"{path}: weights quantised as {str(quantization)[:300]} are not supported, only "
            "bitsandbytes' NF4; use the model that they were made from"
        )
