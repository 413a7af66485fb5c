"""A base model that others have made: found or downloaded, and judged before it is loaded.

phi2.py says what it cannot compute. What is wrong with the files of a model is said here.
"""

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from support import card, files, hub

DESCRIPTION = ("config.json", "tokenizer.json")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
MODEL = DESCRIPTION + WEIGHTS

# Numbers of config.json that need not be whole, and from what to what they can be.
BOUNDS = {
    "partial_rotary_factor": (0, 1),
    "rope_theta": (1, 1e30),
    "layer_norm_eps": (0, 1e30),
    "resid_pdrop": (0, 0.999),
}


def find(
    name: str,
    read_config: Callable[[Path], object],
    patterns: tuple[str, ...] = MODEL,
    revision: str | None = None,
) -> Path:
    """Returns the directory of a model: `name` itself, or its download from the Hub.

    `read_config` is phi2's, which support cannot import; `patterns` are the files that are
    wanted. Raises ValueError when there is no such model, and for one that cannot be loaded.
    """
    directory = Path(name)
    if directory.is_file():
        raise ValueError(f"{name} is a file: pass the folder that it is in")
    is_here = directory.is_dir()
    if is_here:
        hub.refuse_revision("model", name, revision)
    else:
        # First this file alone: gigabytes may be of a kind that is not read.
        directory = download(name, ("config.json",), revision)
    check_config(directory, read_config)
    if not is_here:
        directory = download(name, patterns, revision)
    if patterns != DESCRIPTION:
        check_weights(directory)
    return directory


def hub_commit(name: str, directory: Path) -> str | None:
    """Returns the commit of a model that was downloaded into `directory`, None of one here."""
    return None if Path(name).is_dir() else directory.name  # the Hub's cache calls it so


def download(name: str, patterns: tuple[str, ...], revision: str | None = None) -> Path:
    """Returns the local folder of a model on the Hub. What is there is not downloaded again."""
    if not card.is_repository(name):
        raise ValueError(
            f"no model directory {name!r}, and it is not a Hub id (owner/name): "
            "say with --model where it is"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except RepositoryNotFoundError:
        raise ValueError(
            f"no model {name!r}: neither a directory nor a public repository on the Hub"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"the model {name!r} has no revision {revision!r} on the Hub") from None
    except hub.errors() as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"cannot download {name!r} from the Hub, and it is no directory here ({reason}); "
            "without a network, pass a directory instead: --model tiny/model, or one that "
            "holds config.json, tokenizer.json, *.safetensors"
        ) from None


# -----------------------------------------------------------------------------
# config.json


def check_config(directory: Path, read_config: Callable[[Path], object]) -> None:
    """Raises ValueError for a config.json with which no phi can be made."""
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is not a model directory: it has no config.json")
    raw = files.read_json(path)
    check_quantization(raw.get("quantization_config") or raw.get("quantization"), path)
    config = read_config(directory)
    for name, value in vars(config).items():
        kinds = (int, float) if name in BOUNDS else (int,)
        least, most = BOUNDS.get(name, (1, 2**31))
        if type(value) not in kinds or not least <= value <= most:
            kind = "number" if name in BOUNDS else "whole number"
            raise ValueError(f"{path}: {name} = {value!r} is no {kind} from {least} to {most}")
    check_heads(config, path)


def check_quantization(quantization: object, path: Path) -> None:
    """Raises ValueError where the checkpoint is quantised, but not in bitsandbytes' NF4."""
    known = quantization if isinstance(quantization, dict) else {}
    is_nf4 = known.get("load_in_4bit") and known.get("bnb_4bit_quant_type") == "nf4"
    if quantization and not is_nf4:
        raise ValueError(
            f"{path}: weights quantised as {str(quantization)[:300]} are not supported, only "
            "bitsandbytes' NF4; take the model that they were made from"
        )


def check_heads(config: object, path: Path) -> None:
    """Raises ValueError where phi2 cannot cut the width into heads, or cannot rotate a head."""
    try:
        config.rotary_dim()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# -----------------------------------------------------------------------------
# Weights


def check_weights(directory: Path) -> None:
    """Raises ValueError where files of weights are missing, damaged, or of an older layout."""
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="numpy") as file:
                keys = file.keys()
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged or cut short ({error}): download it again, "
                "in a git clone with `git lfs pull`"
            ) from None
        for key in keys:
            if ".query_key_value." in key or ".Wqkv." in key:
                raise ValueError(
                    f"{path}: {key} is of a layout of 2023; download today's from the Hub"
                )


def weight_files(directory: Path) -> list[Path]:
    """Returns the files that phi2.weight_files returns, once it is sure that they are there."""
    single = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(
            f"{directory} holds no {single.name} and no {index.name}; other formats are not "
            "read: transformers' save_pretrained writes safetensors"
        )
    weight_map = files.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index}: {name!r} in its weight_map is no plain file name")
        if not (directory / name).is_file():
            raise ValueError(f"{index} lists {name}, which is not there: download it again")
    return [directory / name for name in sorted(set(weight_map.values()))]
