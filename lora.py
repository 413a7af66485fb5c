"""LoRA in one file: low-rank adapters on the linear layers of a frozen model, and PEFT's files.

First in the reading order. The paper is arXiv:2106.09685.

Full fine-tuning of a weight W (out, in) needs a gradient as large as W, and optimiser state
twice as large. LoRA freezes W and learns a correction of low rank beside it:

                         W x  +  (alpha / rank) B A x

                                  (+)
                                ^     ^
                                |     |  * alpha / rank
                 +--------------+     +-----+
        frozen   |      W       |     |  B  |  (out, rank), starts at zero    trained
                 |  (out, in)   |     +-----+
                 |              |        ^
                 |              |     +-----+
                 |              |     |  A  |  (rank, in), starts random      trained
                 +--------------+     +-----+
                          ^              ^
                          +------ x -----+

B = 0 makes the first step start from the base model exactly. For phi-2 at rank 8 on q_proj
and v_proj, 2.6 million of 2.8 billion parameters are trained.

The layer that is wrapped may be any linear layer of any model, a quantised one too: QLoRA
is this file over quant.py. Modules and tensors carry PEFT's names, so the adapter file is a
part of `state_dict()`, with a prefix before each name. Left out: DoRA, rsLoRA, trained biases,
adapters on embeddings or on the head. A file that uses them is refused.

    config = lora.LoRAConfig(rank=8, targets=("q_proj", "v_proj"))
    lora.inject(model, config)  # W x becomes W x + (alpha / rank) B A x
    optimizer = torch.optim.AdamW(lora.lora_parameters(model).values(), lr=2e-4)
    ...  # train
    lora.save_adapter(model, config, "adapter", "microsoft/phi-2")  # for PEFT too
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

PREFIX = "base_model.model."  # PEFT puts this before each module's path in its files


@dataclass(frozen=True)
class LoRAConfig:
    """The four choices of LoRA.

    rank: the width of the bottleneck, and the rank of the learned correction. The paper's
        section 7.2 finds that 1 to 8 is enough on q and v; parameters grow in proportion
        to it.
    alpha: the correction is multiplied by alpha / rank (section 4.1). Divided by rank, so
        that the learning rate may stay when the rank changes. Doubling alpha doubles the
        correction.
    dropout: the share of the adapter's inputs that is set to zero in training. The base
        always sees all of its input.
    targets: which linear layers get an adapter: a tuple of names, or the word "all-linear"
        (all that take one: not the head, lm_head), or any other text as a regular
        expression for a whole path. The paper adapts q and v (section 7.1); QLoRA
        (arXiv:2305.14314, section 4) finds that to adapt all layers matters more than rank.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] | str = ("q_proj", "v_proj")

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, not {self.rank!r}")
        for name in ("alpha", "dropout"):
            value = getattr(self, name)
            if type(value) not in (int, float):  # a bool is an int to isinstance
                raise ValueError(f"{name} must be a number, not {value!r}")
        if not 0 < self.alpha < 1e38:  # B A is multiplied by it in fp32
            raise ValueError(f"alpha must be above 0 and below 1e38, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        names = (self.targets,) if isinstance(self.targets, str) else self.targets
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"targets must be names, not {self.targets!r}")
        if not isinstance(self.targets, str) and "all-linear" in names:
            raise ValueError("all-linear is no name among others: it stands alone, as a text")

    def to_peft(self, base_model: str, task_type: str | None = "CAUSAL_LM") -> dict:
        """Returns the content of adapter_config.json.

        Only keys that PEFT has had from its beginning, because an old version refuses keys
        that it does not know. Raises ValueError for a task type that is not implemented here.
        """
        if task_type not in TASK_TYPES:
            raise ValueError(f"task_type must be one of {TASK_TYPES}, not {task_type!r}")
        targets = self.targets if isinstance(self.targets, str) else sorted(self.targets)
        return {
            "base_model_name_or_path": base_model,
            "peft_type": "LORA",
            "task_type": task_type,
            # Without these PEFT would take defaults of its own.
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": targets,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
        }

    @classmethod
    def from_peft(cls, raw: dict) -> "LoRAConfig":
        """Reads the content of adapter_config.json.

        Raises ValueError for any option that changes what the adapter computes and is not
        implemented here.
        """
        check_options(raw)
        # PEFT keeps the names as a set, so their order in the file has no meaning.
        targets = raw["target_modules"]
        if isinstance(targets, list) and all(isinstance(target, str) for target in targets):
            targets = tuple(sorted(targets))
        elif not isinstance(targets, str):
            raise ValueError(
                f"target_modules = {targets!r} is neither a list of names nor a regular expression"
            )
        return cls(raw["r"], raw["lora_alpha"], raw.get("lora_dropout", 0.0), targets)


# What PEFT wraps a model for. None is for any nn.Module, the others are for transformers' models.
# A classifier (SEQ_CLS, TOKEN_CLS) has another head, which its file would have to hold.
TASK_TYPES = (None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "QUESTION_ANS", "FEATURE_EXTRACTION")
REQUIRED = ("r", "lora_alpha", "target_modules")  # keys that adapter_config.json must have
# Keys that change nothing in what a trained adapter computes.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_type",
    "peft_version", "revision", "task_type", "ensure_weight_tying",
    "fan_in_fan_out",  # about layers that hold W transposed; PEFT ignores it on nn.Linear
    "rank_pattern",  # where it changes a rank, a tensor has another shape: check_ranks refuses it
    "corda_config", "eva_config", "loftq_config", "lora_ga_config",  # how A and B began
}
MERGE = "merge the adapter with PEFT (merge_and_unload), and use the merged model"  # a cure
# How A and B can begin while the base stays as it is. Other ways change its weights too.
INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
# What PEFT takes for a key that is not there (0.21), where that is not off.
PEFT_DEFAULTS = {
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "runtime_config": {"ephemeral_gpu_offload": False},
}


def check_options(raw: dict) -> None:
    """Raises ValueError for an option of adapter_config.json that is not implemented here."""
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"peft_type {raw.get('peft_type')!r} is not supported, only 'LORA'")
    if raw.get("task_type") in ("SEQ_CLS", "TOKEN_CLS"):
        raise ValueError(f"task_type {raw['task_type']!r} is not supported: it has another head")
    for key in REQUIRED:
        if raw.get(key) is None:
            raise ValueError(f"it lacks {key}")
    initialisation = raw.get("init_lora_weights", True)
    if initialisation not in INITIALISATIONS:
        raise ValueError(f"init_lora_weights {initialisation!r} is not supported; {MERGE}")
    # PEFT has more options than this file knows. One that is at its default, or off, changes
    # nothing.
    for key in raw.keys() - HARMLESS - {*REQUIRED, "init_lora_weights"}:
        value = raw[key]
        is_off = value in (None, False, "none", {}, [])  # or 0, which equals False
        if not is_off and value != PEFT_DEFAULTS.get(key):
            raise ValueError(
                f"{key} = {value!r} is not supported; {MERGE}"
            )


class LoRALinear(nn.Module):
    """Computes base_layer(x) + (alpha / rank) B A dropout(x) for x (..., in): (..., out).

    A and B are fp32 over a base in 16 or 4 bits too, as in PEFT: a bf16 number has 8
    significant bits, so the small steps at the end of a training would be rounded away. They
    are multiplied in the dtype of x, over a base in bf16 as PEFT does under autocast.

    Backward, for u = scale A x of one token, scale = alpha / rank, the gradient g of the
    output, and dropout off: B's gradient is g u^T, A's is scale (B^T g) x^T, both summed over
    the tokens, and that of x is W^T g + scale A^T B^T g. W has none. Stored for it are x (for
    A), u (for B), and A and B in the dtype of x.
    """

    def __init__(self, base_layer: nn.Module, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base_layer = base_layer
        self.rank = rank
        self.scale = alpha / rank
        self.lora_dropout = nn.Dropout(dropout)
        # The order of draws from the CPU's generator is PEFT's: one in each of the
        # constructors, then a second one for A. So one seed gives the same adapter here and there.
        self.lora_A = nn.Linear(
            base_layer.in_features, rank, bias=False, device="cpu", dtype=torch.float32
        )
        self.lora_B = nn.Linear(
            rank, base_layer.out_features, bias=False, device="cpu", dtype=torch.float32
        )
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # +- 1 / sqrt(in)
        nn.init.zeros_(self.lora_B.weight)

        weight = base_layer.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.lora_A.to(weight.device, dtype)
        self.lora_B.to(weight.device, dtype)
        self.train(base_layer.training)  # in a model in eval mode, dropout must stay off

    def forward(self, x: Tensor) -> Tensor:
        a = self.lora_A.weight.to(x.dtype)
        b = self.lora_B.weight.to(x.dtype)
        down = self.lora_dropout(x) @ a.T  # (..., rank)
        return self.base_layer(x) + (self.scale * down) @ b.T

    def delta_weight(self) -> Tensor:
        """Returns what the adapter adds to W: scale B A, (out, in), in the dtype of A and B."""
        return self.scale * self.lora_B.weight @ self.lora_A.weight

    @property
    def weight(self) -> Tensor:
        """W + scale B A, (out, in), rounded once to the dtype of W.

        For code that multiplies by a layer's weight instead of calling the layer, as
        nn.TransformerEncoderLayer does in eval mode. W alone would leave out the adapter.
        """
        layer = self.base_layer
        base = layer.weight if is_plain(layer) else layer.dequantize()  # as quant.NF4Linear has it
        return (base + self.delta_weight()).to(base.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias


def is_plain(layer: nn.Module) -> bool:
    """Returns whether the weight of a linear layer is W itself, and not packed indices."""
    weight = layer.weight
    shape = (layer.out_features, layer.in_features)
    return weight.is_floating_point() and weight.shape == shape


# -----------------------------------------------------------------------------
# Putting adapters into a model


def inject(
    model: nn.Module, config: LoRAConfig, every_target_must_match: bool = True
) -> list[str]:
    """Freezes `model` and wraps the linear layers that config.targets names, in place.

    Returns the paths of the wrapped layers. Raises ValueError when a target matches
    nothing, and when the model has adapters already. PEFT is content with one match among
    all targets: every_target_must_match=False.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has adapters already: merge them first, or build it anew")
    paths = match_targets(model, config.targets, every_target_must_match)
    # Everything is frozen first. The adapters that follow are new, so they alone have gradients.
    model.requires_grad_(False)
    for path in paths:
        layer = model.get_submodule(path)
        adapted = LoRALinear(layer, config.rank, config.alpha, config.dropout)
        model.set_submodule(path, adapted)
    return paths


def match_targets(
    model: nn.Module, targets: tuple[str, ...] | str, every_target_must_match: bool = True
) -> list[str]:
    """Returns the paths of the linear layers that `targets` names, in module order.

    The rules are PEFT's: a name matches the end of a path at a dot, a string must match a
    whole path as a regular expression. Raises ValueError when a target matches no layer
    (with every_target_must_match=False, when none does), and for a layer that can take no
    adapter.
    """
    linears = linear_paths(model)
    if not targets:
        raise ValueError("no target given: name at least one linear layer")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        paths = [path for path in linears if is_called(model, path)]
        matched = {targets: set(paths)}
    elif isinstance(targets, str):
        matched = {targets: matches_pattern(linears, targets)}
    else:
        matched = {name: matches_name(linears, name) for name in targets}

    chosen = set().union(*matched.values())
    for target, paths in matched.items():
        if not paths and (every_target_must_match or not chosen):
            raise ValueError(describe_missing_target(target, linears))
    # In module order, because the adapters are initialised one after another from one generator.
    in_order = [path for path in linears if path in chosen]
    check_layers(model, in_order)
    return in_order


def linear_paths(model: nn.Module) -> list[str]:
    """Returns the paths of all linear layers but the head, known by their sizes and weight.

    An adapter on the head is left out: PEFT saves the head's own weight with it.
    """
    paths = []
    for path, module in model.named_modules():
        has_sizes = hasattr(module, "in_features") and hasattr(module, "out_features")
        has_weight = isinstance(getattr(module, "weight", None), Tensor)
        is_head = path.rpartition(".")[2] == "lm_head"
        if path and has_sizes and has_weight and not is_head:  # "" is the model itself
            paths.append(path)
    return paths


def check_layers(model: nn.Module, paths: list[str]) -> None:
    """Raises ValueError for a layer that can take no adapter."""
    for path in paths:
        if isinstance(model.get_submodule(path).weight, nn.UninitializedParameter):
            raise ValueError(f"{path} has no size yet: run the model once, then add adapters")
        if not is_called(model, path):
            raise ValueError(
                f"{path} takes no adapter: nn.MultiheadAttention multiplies by its weight and "
                "never calls it, so in PEFT an adapter there does nothing"
            )


def is_called(model: nn.Module, path: str) -> bool:
    parent = model.get_submodule(path.rpartition(".")[0])
    return not isinstance(parent, nn.MultiheadAttention)


def matches_name(paths: list[str], name: str) -> set[str]:
    # At a dot, so that "proj" does not match q_proj.
    return {path for path in paths if path == name or path.endswith("." + name)}


def matches_pattern(paths: list[str], pattern: str) -> set[str]:
    try:
        return {path for path in paths if re.fullmatch(pattern, path)}
    except (re.error, OverflowError, RecursionError) as error:  # such as for a{99999999999}
        raise ValueError(f"target {pattern!r} is not a regular expression: {error}") from None


def describe_missing_target(target: str, linears: list[str]) -> str:
    if not linears:
        return "the model has no linear layer that takes an adapter"
    names = sorted({path.rpartition(".")[2] for path in linears})
    text = f"target {target!r} matches no linear layer that takes an adapter"
    if target in names:  # a text alone is a pattern for a whole path
        return f"{text}; for all layers of this name pass a tuple, ({target!r},)"
    return f"{text}; there are {', '.join(names)}, and all-linear"


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns all that is trained, by the parameter's name.

    `...q_proj.lora_A.weight` is (rank, in), `...q_proj.lora_B.weight` is (out, rank).
    """
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Adds each adapter to its base weight, W + scale B A, in place, and unwraps the layers.

    The sum is rounded once, to the dtype of W. Raises ValueError, before any layer is changed,
    over a quantised base, because rounding the sum to 4 bits again erases most of a small
    update; where a sum is not finite in the dtype of W; and where another layer has the same W.
    """
    adapted = {
        path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)
    }
    for path, layer in adapted.items():
        check_merge(model, path, layer)
    for path, layer in adapted.items():
        layer.base_layer.weight.copy_(layer.weight)
        model.set_submodule(path, layer.base_layer)


def check_merge(model: nn.Module, path: str, layer: LoRALinear) -> None:
    """Raises ValueError where merging this layer would change what the model computes."""
    base = layer.base_layer
    if not is_plain(base):
        kind = type(base).__name__
        raise ValueError(f"{path}: cannot merge into {kind}; dequantise the layers first")
    # By weight_norm or prune, for example: what is added to the product is lost with it.
    if "weight" not in base.state_dict():
        raise ValueError(f"{path}: cannot merge, W is computed from other tensors; remove that")
    if not layer.weight.isfinite().all():
        raise ValueError(f"{path}: cannot merge, W + B A is not finite in {base.weight.dtype}")
    for name, weight in model.named_parameters(remove_duplicate=False):
        owner = name.removesuffix(".base_layer.weight")
        is_own = owner != name and model.get_submodule(owner) is layer
        if weight is base.weight and not is_own:
            raise ValueError(f"{path}: cannot merge, {name} is the same weight")


# -----------------------------------------------------------------------------
# PEFT's files


def save_adapter(
    model: nn.Module,
    config: LoRAConfig,
    directory: Path,
    base_model: str,
    fingerprint: dict[str, str] | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json, which PEFT loads.

    `fingerprint` says what the adapter was trained over. It is stored in the metadata of
    the tensors, and `load_adapter` compares it. `task_type` says which of its classes PEFT
    wraps the base in; with None it takes any nn.Module. The same adapter gives the same bytes.
    Other weights that are trained, such as a new head, are not in these files.
    """
    raw = config.to_peft(base_model, task_type)
    check_config(model, config)
    tensors = {
        PREFIX + name: parameter.detach().cpu().contiguous()
        for name, parameter in lora_parameters(model).items()
    }
    if not tensors:
        raise ValueError("the model has no adapters to save")
    # Checked before a good file would be replaced.
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{key} holds numbers that are not finite, and is not saved")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "adapter_model.safetensors"
    metadata = {"format": "pt", **(fingerprint or {})}  # transformers looks for this format
    save_file(tensors, file, metadata)
    sort_header(file)
    text = json.dumps(raw, indent=2)
    (directory / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def check_config(model: nn.Module, config: LoRAConfig) -> None:
    """Raises ValueError where the adapters have another rank or alpha than `config` says."""
    scale = config.alpha / config.rank
    for path, layer in model.named_modules():
        if isinstance(layer, LoRALinear) and (layer.rank, layer.scale) != (config.rank, scale):
            raise ValueError(
                f"{path} has rank {layer.rank} and alpha {layer.scale * layer.rank:g}, "
                f"not rank {config.rank} and alpha {config.alpha:g}"
            )


def sort_header(file: Path) -> None:
    """Sorts the header of a safetensors file, which holds the metadata in any order.

    A file begins with the length of its header, in 8 bytes, and the header as JSON.
    """
    with open(file, "r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        # As compact as it was, so that its length stays.
        text = json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        opened.seek(8)
        opened.write(text.encode().ljust(length))


def load_adapter(
    model: nn.Module, directory: Path, fingerprint: dict[str, str] | None = None
) -> LoRAConfig:
    """Wraps `model` as the adapter in `directory` asks for, and loads its tensors.

    Raises ValueError where PEFT would continue with a model that is not the trained one: a
    tensor is missing, unknown, of another shape or not finite; every B is zero;
    adapter_config.json has an option that is not implemented here; the adapter was saved
    with another `fingerprint`. After an error the model must not be used: it may be wrapped
    already. Numbers of any dtype become that of A and B. The mode stays, train or eval.
    """
    directory = Path(directory)
    config = read_adapter_config(directory)
    file = directory / "adapter_model.safetensors"
    tensors, metadata = read_adapter_tensors(file)
    # A file of PEFT has no fingerprint: then there is nothing to compare.
    for name, here in (fingerprint or {}).items():
        there = metadata.get(name)
        if there is not None and there != here:
            raise ValueError(
                f"{directory} was trained with another {name.replace('_', ' ')} "
                f"({there}, here {here}); --force uses it all the same"
            )
    check_ranks(tensors, config, file)  # before anything of that size is allocated

    # Like PEFT it is content with one target that matches. That each tensor has its place is
    # checked below.
    inject(model, config, every_target_must_match=False)
    parameters = {PREFIX + name: value for name, value in lora_parameters(model).items()}
    check_shapes(tensors, parameters, file)
    with torch.no_grad():
        for key, parameter in parameters.items():
            # A copy, and not the file's own memory: the file can be written anew.
            parameter.copy_(tensors[key])
    check_numbers(parameters, file)
    return config


def read_adapter_config(directory: Path) -> LoRAConfig:
    path = directory / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is not an adapter: it has no {path.name}")
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds no JSON object")
    try:
        return LoRAConfig.from_peft(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_adapter_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the metadata of a safetensors file."""
    if not file.is_file():
        raise ValueError(
            f"{file.parent} has no {file.name}; PEFT writes one with safe_serialization=True"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
            return tensors, opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short ({error})") from None


def check_ranks(tensors: dict[str, Tensor], config: LoRAConfig, file: Path) -> None:
    for key, tensor in tensors.items():
        # [:1], because a damaged file may hold a single number here, which has no shape[0].
        if ".lora_A." in key and tensor.shape[:1] != (config.rank,):
            raise ValueError(
                f"{file}: {key} has shape {tuple(tensor.shape)}, adapter_config.json says "
                f"rank {config.rank}; layers with a rank of their own are not supported; {MERGE}"
            )


def check_shapes(
    tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter], file: Path
) -> None:
    """Raises ValueError unless the file has exactly these names and shapes."""
    # With strict=False, as PEFT loads, a wrong prefix would leave every B at zero, in silence.
    problems = []
    for problem, keys in (
        ("lacks", parameters.keys() - tensors.keys()),
        ("holds unknown", tensors.keys() - parameters.keys()),
    ):
        if keys:
            problems.append(f"{problem} {len(keys)} tensors, among them {min(keys)}")
    if problems:
        raise ValueError(f"{file} {', and '.join(problems)}")
    for key, parameter in parameters.items():
        tensor = tensors[key]
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{file}: {key} has shape {tuple(tensor.shape)}, "
                f"this model needs {tuple(parameter.shape)}"
            )


def check_numbers(parameters: dict[str, nn.Parameter], file: Path) -> None:
    """Raises ValueError unless all numbers are finite, as loaded, and the adapter was trained."""
    for key, parameter in parameters.items():
        if not parameter.isfinite().all():
            raise ValueError(f"{file}: {key} holds numbers that are not finite")
    if not any(parameter.any() for key, parameter in parameters.items() if ".lora_B." in key):
        raise ValueError(
            f"{file}: every B is zero, so the adapter changes nothing; "
            "it was saved before it was trained"
        )


if __name__ == "__main__":
    raise SystemExit("to merge an adapter into its base: python -m scripts.merge --help")
