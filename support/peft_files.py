"""Reads an adapter_config.json that any program has written, and rejects unsupported options.

PEFT has about forty options, of which lora.py implements four. An option that is off, or at its
default, changes nothing. Any other option is rejected by name, because ignoring it would silently
give a different model from the trained one.
"""

from collections.abc import Callable
from pathlib import Path

from support import files

REQUIRED = {"r", "lora_alpha", "target_modules"}
# Keys that do not change what a trained adapter computes.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout",
    "peft_version", "revision", "ensure_weight_tying",
    "fan_in_fan_out",  # for layers that store W transposed; PEFT ignores it on nn.Linear
    "rank_pattern",  # if it changes a rank, a tensor has another shape, which check_ranks rejects
    "corda_config", "eva_config", "loftq_config", "lora_ga_config",  # initial values of A and B
}
# Values that are not "off" (None, False, 0, "none", empty), but do not change anything either.
ACCEPTED = {
    "peft_type": ("LORA",),
    # A classifier (SEQ_CLS, TOKEN_CLS) has another output head, which would be in the file.
    "task_type": ("CAUSAL_LM", "SEQ_2_SEQ_LM", "QUESTION_ANS", "FEATURE_EXTRACTION"),
    # Initial values of A and B that leave the base unchanged. Other ways change the base too.
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva", "mica"),
    # The defaults of PEFT 0.21.
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
    "runtime_config": ({"ephemeral_gpu_offload": False},),
}
CURE = "merge the adapter with PEFT (merge_and_unload), and use the merged model"


def read_config(directory: Path, make: Callable):
    """Returns make(rank=, alpha=, dropout=, targets=) for the adapter in `directory`.

    `make` is lora.LoRAConfig. Raises ValueError if there is no adapter, if its files are
    damaged, or if an option changes what the adapter computes.
    """
    path = Path(directory) / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is not an adapter: it has no {path.name}")
    raw = files.read_json(path)
    try:
        check_options(raw)
        config = make(
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            dropout=raw.get("lora_dropout", 0.0),
            targets=read_targets(raw["target_modules"]),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    check_ranks(Path(directory) / "adapter_model.safetensors", config.rank)
    return config


def check_options(raw: dict) -> None:
    """Raises ValueError if an option is set that is not implemented."""
    for key in ("peft_type", *REQUIRED):
        if raw.get(key) is None:
            raise ValueError(f"it lacks {key}")
    for key in raw.keys() - HARMLESS - REQUIRED:
        value = raw[key]
        is_off = value in (None, False, "none", {}, [])  # or 0, which equals False
        if not is_off and value not in ACCEPTED.get(key, ()):
            raise ValueError(f"{key} = {value!r} is not supported; {CURE}")


def read_targets(targets) -> tuple[str, ...] | str:
    """Returns target_modules in the form of lora.LoRAConfig."""
    if isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        return tuple(sorted(targets))  # PEFT has a set, so the order in the file means nothing
    if isinstance(targets, str):
        return targets
    raise ValueError(
        f"target_modules = {targets!r} is neither a list of names nor a regular expression"
    )


def check_ranks(path: Path, rank: int) -> None:
    """Raises ValueError unless each A has this rank, before anything is allocated for it."""
    if not path.is_file():
        raise ValueError(
            f"{path.parent} has no {path.name}; PEFT writes one with safe_serialization=True"
        )
    with files.open_tensors(path) as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    for key, shape in shapes.items():
        # [:1], because in a damaged file A may be a single number, which has no first dimension.
        if ".lora_A." in key and shape[:1] != [rank]:
            raise ValueError(
                f"{path}: {key} has shape {tuple(shape)}, adapter_config.json says rank {rank}; "
                f"layers with different ranks are not supported; {CURE}"
            )
