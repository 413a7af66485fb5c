"""A base model that others have made: found or downloaded, and judged before it is loaded.

phi2.py reads a checkpoint that is as it should be. What is wrong with any other one is said
here, in one line.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from support import files

DESCRIPTION = ("config.json", "tokenizer.json")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
MODEL = DESCRIPTION + WEIGHTS

# The whole numbers that config.json has to say.
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
# What it may say, with the least and the most that it can be.
NUMBERS = {
    "partial_rotary_factor": (0, 1),
    "rope_theta": (1, 1e30),
    "layer_norm_eps": (0, 1e30),
    "resid_pdrop": (0, 0.999),
}


def find(name: str, patterns: tuple[str, ...] = MODEL) -> Path:
    """Returns the directory of a model: `name` itself, or its download from the Hub.

    `patterns` are the files that are wanted. Raises ValueError when there is no such model,
    and for one that cannot be loaded.
    """
    directory = Path(name)
    is_here = directory.is_dir()
    if not is_here:
        # First this file alone: gigabytes may be of a kind that is not read.
        directory = download(name, DESCRIPTION[:1])
    check_config(directory / "config.json")
    if not is_here:
        directory = download(name, patterns)
    if WEIGHTS[0] in patterns:
        check_weights(directory)
    return directory


def download(name: str, patterns: tuple[str, ...]) -> Path:
    """Returns the local folder of a model on the Hub. What is in its cache is not loaded again."""
    # Not asked of the Hub: a path that does not exist is no model's name.
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            f"no model directory {name!r}, and it is not a Hub id (owner/name): "
            "--model says where it is"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    cure = (
        "without a network, pass a directory instead: --model tiny/model, or one that holds "
        "config.json, tokenizer.json, *.safetensors"
    )
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (RepositoryNotFoundError, HFValidationError):
        raise ValueError(
            f"no model {name!r}: neither a directory nor a public repository on the Hub; {cure}"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"cannot reach the Hub for {name!r}, which is no directory here "
            f"({type(error).__name__}); {cure}"
        ) from None


# -----------------------------------------------------------------------------
# config.json


def check_config(path: Path) -> None:
    """Raises ValueError for a config.json with which no phi can be made."""
    if not path.is_file():
        raise ValueError(f"{path.parent} is not a model directory: it has no config.json")
    config = files.read_json(path)
    if config.get("model_type") != "phi":
        return  # phi2.read_config says so; another model has other fields
    check_quantization(config.get("quantization_config"), path)
    for key in ("rope_scaling", "rope_parameters"):  # which may hold some of the numbers
        if isinstance(config.get(key), dict):
            config |= config[key]
    for name, (least, most) in (NUMBERS | dict.fromkeys(SIZES, (1, 2**31))).items():
        value = config.get(name)
        if value is None and name not in SIZES:
            continue
        is_number = type(value) is int or (type(value) is float and name not in SIZES)
        if not is_number or not least <= value <= most:
            raise ValueError(f"{path}: {name} = {value!r} is no number from {least} to {most}")
    check_heads(config, path)


def check_quantization(quantization: object, path: Path) -> None:
    """Raises ValueError where the checkpoint is quantised, but not in bitsandbytes' NF4."""
    known = quantization if isinstance(quantization, dict) else {}
    is_nf4 = known.get("load_in_4bit") and known.get("bnb_4bit_quant_type") == "nf4"
    if quantization is not None and not is_nf4:
        raise ValueError(
            f"{path}: weights quantised as {quantization} are not supported, only "
            "bitsandbytes' NF4; take the model that they were made from"
        )


def check_heads(config: dict, path: Path) -> None:
    """Raises ValueError where the width cannot be cut into heads, or a head not rotated."""
    width = config["hidden_size"]
    heads = config["num_attention_heads"]
    if width % heads:
        raise ValueError(
            f"{path}: hidden_size {width} is not a multiple of num_attention_heads {heads}"
        )
    share = config.get("partial_rotary_factor")
    rotary_dim = int(width // heads * (0.5 if share is None else share))
    if rotary_dim % 2:
        raise ValueError(
            f"{path}: {rotary_dim} of a head's {width // heads} dimensions cannot be rotated; "
            "it must be an even number of them"
        )


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
