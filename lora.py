"""LoRA in one file: low-rank adapters (arXiv:2106.09685) on the linear layers of a frozen model, and PEFT's files.

First in the reading order. Training all of W (out, in) costs its size three times over in gradients and optimiser
state. LoRA freezes W and learns a correction of low rank beside it:

    W x  ->  W x + (alpha / rank) B A x            A (rank, in) random, B (out, rank) zero

B = 0 makes the first step start from the base model exactly. `base_layer` may be any linear layer, a quantised one
too: QLoRA is this file over quant.py. Modules and tensors carry PEFT's names, so the adapter file is a part of
`state_dict()`. Left out: DoRA, rsLoRA, trained biases, adapters on embeddings; a file that uses them is refused.

    lora.inject(model, lora.LoRAConfig(rank=8))         # then train lora.lora_parameters(model)
"""
import difflib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint

PREFIX = "base_model.model."  # what PEFT puts before a module's path in its files


@dataclass(frozen=True)
class LoRAConfig:
    """What adapter_config.json says. `targets`: names of linear layers, "all-linear", or a regular expression."""
    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] | str = ("q_proj", "v_proj")

    def __post_init__(self):
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, not {self.rank}")
        if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in (self.alpha, self.dropout)):
            raise ValueError(f"alpha and dropout must be numbers, not {self.alpha!r} and {self.dropout!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be above 0, not {self.alpha}: at 0 the adapter has no effect")
        if not isinstance(self.targets, str) and not all(isinstance(target, str) for target in self.targets):
            raise ValueError(f"targets must be names, not {self.targets!r}")

    def to_peft(self, base_model: str) -> dict:
        """The content of adapter_config.json: few keys, since older versions of PEFT refuse those they do not know."""
        targets = self.targets if isinstance(self.targets, str) else sorted(self.targets)
        return {"base_model_name_or_path": base_model, "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": self.rank,
                "lora_alpha": self.alpha, "lora_dropout": self.dropout, "target_modules": targets, "bias": "none",
                "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "use_rslora": False,
                "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}}

    @classmethod
    def from_peft(cls, raw: dict) -> "LoRAConfig":
        """Raises ValueError for whatever would make another model of it than the one that was trained."""
        if raw.get("peft_type") != "LORA":
            raise ValueError(f"peft_type {raw.get('peft_type')!r} is not supported, only 'LORA'")
        needed = {"r": "rank", "lora_alpha": "alpha", "target_modules": "targets"}
        if absent := [key for key in needed if raw.get(key) is None]:
            raise ValueError(f"it lacks {', '.join(absent)}")
        if raw.get("init_lora_weights", True) not in (True, False, "gaussian"):  # the others change the base's weights
            raise ValueError(f"init_lora_weights {raw['init_lora_weights']!r} is not supported")
        for key, value in raw.items():
            if key not in HARMLESS and key not in needed and value not in (None, False, "none") and value != {} and value != []:
                raise ValueError(f"{key} = {value!r} is not supported")
        targets = raw["target_modules"]
        if not isinstance(targets, (str, list)) or not all(isinstance(target, str) for target in targets):
            raise ValueError(f"target_modules = {targets!r} is neither a list of names nor a regular expression")
        targets = targets if isinstance(targets, str) else tuple(sorted(targets))
        return cls(raw["r"], raw["lora_alpha"], raw.get("lora_dropout", 0.0), targets)


# Keys of adapter_config.json that change nothing in what the adapter computes.
HARMLESS = {"peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode",
            "lora_dropout", "init_lora_weights", "megatron_core", "qalora_group_size", "loftq_config", "corda_config", "eva_config"}


class LoRALinear(nn.Module):
    """base_layer(x) + (alpha / rank) B A dropout(x). A and B are fp32 whatever the base is, as PEFT keeps them."""

    def __init__(self, base_layer: nn.Module, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base_layer, self.scale = base_layer, alpha / rank
        # These three draws from the random generator, in this order and on the CPU, are PEFT's.
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False, device="cpu", dtype=torch.float32)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False, device="cpu", dtype=torch.float32)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.lora_dropout = nn.Dropout(dropout)
        for part in (self.lora_A, self.lora_B):
            part.to(base_layer.weight.device)
        self.train(base_layer.training)  # an adapter put on a model in eval mode must not drop anything

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        update = self.lora_B(self.lora_A(self.lora_dropout(x.float())) * self.scale)
        return result + update.to(result.dtype)


def match_targets(model: nn.Module, targets: tuple[str, ...] | str) -> list[str]:
    """Paths of the linear layers that `targets` names, by PEFT's rules, in module order.

    Raises ValueError when a target matches nothing, with the names there are and the nearest of them.
    """
    linears = [path for path, module in model.named_modules() if hasattr(module, "in_features")]
    names = sorted({path.rpartition(".")[2] for path in linears})
    if targets == "all-linear":
        return [path for path in linears if path.rpartition(".")[2] != "lm_head"]
    if isinstance(targets, str):
        if re.search(r"\)[*+{]", targets) or len(re.findall(r"[*+{]", targets)) > 3:  # such can take for ever to match
            raise ValueError(f"target {targets!r}: a repeated group, or more than three repetitions, are not supported")
        tests = {targets: lambda path: re.fullmatch(targets, path)}
    else:
        tests = {target: lambda path, end=target: path == end or path.endswith("." + end) for target in targets}
    if not tests:
        raise ValueError(f"no target given; linear layers: {', '.join(names)}")
    try:
        for target, test in tests.items():
            if not any(map(test, linears)):
                near = difflib.get_close_matches(target, [*names, "all-linear"], n=1, cutoff=0)
                raise ValueError(f"target {target!r} matches no linear layer; there are {', '.join(names)}; nearest: {near[0]}")
    except re.error as error:
        raise ValueError(f"target {targets!r} is not a regular expression: {error}") from None
    return [path for path in linears if any(test(path) for test in tests.values())]


def inject(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Freezes `model` and wraps the linear layers that config.targets names, in place. Returns their paths."""
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has adapters already: merge them first, or build it anew")
    paths = match_targets(model, config.targets)
    model.requires_grad_(False)
    for path in paths:
        parent, _, name = path.rpartition(".")
        wrapped = LoRALinear(model.get_submodule(path), config.rank, config.alpha, config.dropout)
        setattr(model.get_submodule(parent), name, wrapped)
    return paths


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained tensors by path: `...q_proj.lora_A.weight` (rank, in) and `...lora_B.weight` (out, rank)."""
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Adds each adapter into its base weight, W + scale B A, in place, and takes the wrappers off.

    Raises ValueError over a quantised base: rounding back to 4 bits erases most of a small update.
    """
    wrapped = [(path, module) for path, module in model.named_modules() if isinstance(module, LoRALinear)]
    for path, module in wrapped:
        if not isinstance(module.base_layer, nn.Linear):
            raise ValueError(f"{path}: cannot merge into {type(module.base_layer).__name__}; call quant.dequantize_linears first")
    for path, module in wrapped:
        weight = module.base_layer.weight
        weight.copy_(weight.float() + module.scale * module.lora_B.weight @ module.lora_A.weight)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module.base_layer)


# ---------------------------------------------------------------------------------------------------------
# PEFT's files

def save_adapter(model: nn.Module, config: LoRAConfig, path: Path, base_model: str, fingerprint: dict[str, str] | None = None) -> None:
    """Writes adapter_model.safetensors and adapter_config.json, which PEFT loads, into the directory `path`.

    `fingerprint` says what it was trained over; it stands in the metadata of the tensors, and `load_adapter` compares it.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    checkpoint.write_tensors(path / "adapter_model.safetensors", {PREFIX + name: tensor for name, tensor in lora_parameters(model).items()},
                             fingerprint)
    checkpoint.write_json(path / "adapter_config.json", config.to_peft(base_model))


def load_adapter(model: nn.Module, path: Path, fingerprint: dict[str, str] | None = None) -> LoRAConfig:
    """Wraps `model` as the adapter in the directory `path` asks for, and loads its tensors.

    Raises ValueError where PEFT would go on with a model that is not the trained one: a tensor missing, unknown or of
    another shape, every B zero, an option of adapter_config.json that is not implemented here, another `fingerprint`.
    """
    path = Path(path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (path / name).is_file():
            raise ValueError(f"{path} is not an adapter: it has no {name}")
    try:
        config = LoRAConfig.from_peft(checkpoint.read_json(path / "adapter_config.json"))
    except ValueError as error:
        raise ValueError(f"{path / 'adapter_config.json'}: {error}") from None
    file = path / "adapter_model.safetensors"
    tensors, metadata = checkpoint.read_tensors(file)
    if other := [f"{name.replace('_', ' ')} ({metadata[name]}, here {here})" for name, here in (fingerprint or {}).items()
                 if metadata.get(name, here) != here]:
        raise ValueError(f"{path} was trained with another {' and another '.join(other)}; --force goes on all the same")
    for key, tensor in tensors.items():  # before anything of the size that the configuration says is made
        if ".lora_A." in key and tensor.shape[:1] != (config.rank,):
            raise ValueError(f"{file}: {key} has shape {tuple(tensor.shape)}, adapter_config.json says rank {config.rank}")
    inject(model, config)
    parameters = {PREFIX + name: parameter for name, parameter in lora_parameters(model).items()}
    for problem, keys in (("lacks", parameters.keys() - tensors.keys()), ("holds unknown", tensors.keys() - parameters.keys())):
        if keys:
            raise ValueError(f"{file} {problem} {len(keys)} tensors, among them {min(keys)}")
    for key, parameter in parameters.items():
        if tensors[key].shape != parameter.shape:
            raise ValueError(f"{file}: {key} has shape {tuple(tensors[key].shape)}, this model needs {tuple(parameter.shape)}")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError(f"{file} holds numbers that are not finite")
    if not any(tensor.any() for key, tensor in tensors.items() if ".lora_B." in key):
        raise ValueError(f"{file}: every B is zero, so the adapter changes nothing; it was saved before it was trained")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])
    return config


if __name__ == "__main__":
    import publish
    publish.data.run(publish.main)
