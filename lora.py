"""LoRA in one file: low-rank adapters beside the linear layers of a frozen model.

This is the first of six files; read them in the order lora, quant, phi2, data, eval,
train. Together they implement QLoRA: LoRA beside weights that are stored in 4 bits. Its
core is four lines:

    model = phi2.build(name)                  # on the meta device: shapes without memory
    quant.quantize_linears(model)             # linear layers become empty 4-bit layers
    phi2.load_weights(model, name, device)    # weights are quantised as they are loaded
    lora.inject(model, config)                # W x becomes W x + (alpha / rank) B A x

The LoRA paper is arXiv:2106.09685. Full fine-tuning with Adam stores three extra numbers
for each entry of a weight W (out, in): its gradient and two moments. LoRA freezes W and
learns a low-rank update B A beside it. Its hypothesis, supported by the paper's results,
is that the weight change needed to adapt a trained model to a new task has a low rank.

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

Because B starts at zero, training starts exactly from the base model. In phi-2 at rank
8, on the query and value projections (q_proj and v_proj) of each transformer block, A
and B hold 32 blocks * 2 layers * 8 * (2560 + 2560) = 2.6 million numbers, beside 2.8
billion frozen ones.

In formulas x is a column vector. In the code it is the last dimension: W x is x @ W.T.

The wrapped layer may be a linear layer of any model, including a quantised one. Saved
adapters use the file names and tensor names of PEFT, Hugging Face's adapter library, so
PEFT can load them. Left out: DoRA (which also learns the norm of each row of W), rsLoRA
(which scales by alpha / sqrt(rank)), trained biases, and adapters on embeddings or on
the output head.

    config = lora.LoRAConfig(rank=8, targets=("q_proj", "v_proj"))
    lora.inject(model, config)
    optimizer = torch.optim.AdamW(lora.lora_parameters(model).values(), lr=2e-4)
    model.train()  # dropout is on
    ...
    lora.save_adapter(model, config, "adapter", "microsoft/phi-2")  # for PEFT too
    lora.load_adapter(another_model, "adapter")
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


class LoRALinear(nn.Module):
    """Computes base_layer(x) + scale B A dropout(x) for x (..., in), scale = alpha / rank.

    base_layer(x) is W x plus a bias if the layer has one; `inject` freezes both. For a
    token with input x and output gradient g (both columns), without dropout, the
    backward pass computes:

        gradient of B    g (scale A x)^T       (out, rank)
        gradient of A    scale (B^T g) x^T     (rank, in)
        gradient of x    W^T g + scale A^T B^T g

    autograd does this, and sums the first two over all tokens. Because B starts at zero, the
    gradient of A is zero in the first step; if A were zero as well, neither would ever change.

    A and B are stored and trained in fp32 even over a 16-bit or 4-bit base, as in PEFT:
    a bf16 number has 8 significant bits, so small updates would be rounded away. For the
    product they are cast to the dtype of x, as PEFT does under autocast. (Over an fp64
    base they are in fp64.)
    """

    def __init__(self, base_layer: nn.Module, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base_layer = base_layer
        self.rank = rank
        self.scale = alpha / rank
        self.lora_dropout = nn.Dropout(dropout)
        # Created on the CPU in fp32, wherever the base is, so a seed gives the same
        # A everywhere.
        self.lora_A = nn.Linear(
            base_layer.in_features, rank, bias=False, device="cpu", dtype=torch.float32
        )
        self.lora_B = nn.Linear(
            rank, base_layer.out_features, bias=False, device="cpu", dtype=torch.float32
        )
        # With a = sqrt(5), A is uniform within +- 1 / sqrt(in). (The paper draws from a
        # normal distribution.) The two nn.Linear have drawn an A and a B before, which
        # are replaced here. PEFT does the same, so a seed gives PEFT's A (which PEFT
        # rounds to 16 bits over a 16-bit base).
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

        weight = base_layer.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.lora_A.to(weight.device, dtype)
        self.lora_B.to(weight.device, dtype)
        self.train(base_layer.training)  # in a model in eval mode, dropout must stay off

    def forward(self, x: Tensor) -> Tensor:
        a = self.lora_A.weight.to(x.dtype)
        b = self.lora_B.weight.to(x.dtype)
        # Two thin products, with only `rank` numbers per token between them, where
        # scaling is cheapest. B A itself is never formed: it would be as large as W.
        down = self.lora_dropout(x) @ a.T  # (..., rank)
        return self.base_layer(x) + (self.scale * down) @ b.T

    @property
    def weight(self) -> Tensor:
        """W + scale B A, (out, in), rounded once to the dtype of W.

        `merge` uses it. Like `bias`, it also serves models that read a layer's weight instead
        of calling the layer, as torch's nn.TransformerEncoderLayer does in eval mode.
        """
        base = self.base_layer.weight
        if not is_plain(self.base_layer):  # packed indices, as in quant.NF4Linear
            base = self.base_layer.dequantize()
        return (base + self.delta_weight()).to(base.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def delta_weight(self) -> Tensor:
        """Returns what the adapter adds to W: scale B A, (out, in), in the dtype of A and B."""
        return self.scale * self.lora_B.weight @ self.lora_A.weight


# -----------------------------------------------------------------------------
# Adding adapters to a model


@dataclass(frozen=True)
class LoRAConfig:
    """The four hyperparameters of LoRA.

    rank: the width of the bottleneck, and so the highest possible rank of B A. The
        number of parameters is proportional to it. Section 7.2 of the paper finds that
        1 to 8 is enough on q and v, for its models and tasks.
    alpha: B A is multiplied by alpha / rank (section 4.1). The division is meant to keep
        one learning rate usable at every rank, because B A sums `rank` terms. So the
        default is 16 at every rank. experiments/README.md compares it with 2 * rank.
    dropout: the probability with which each element of the adapter's input is set to
        zero in training. The input of W is not dropped.
    targets: the linear layers that get an adapter. Either a tuple of names, such as
        ("q_proj", "v_proj"); or the string "all-linear", all but the output head; or any
        other string, a regular expression for a whole path, such as ".*mlp.fc[12]". The
        paper adapts q and v (section 7.1); QLoRA (arXiv:2305.14314, section 4) finds that
        adapting all linear layers matters more than the rank.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] | str = ("q_proj", "v_proj")

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:  # isinstance would accept True
            raise ValueError(f"rank must be a whole number of at least 1, not {self.rank!r}")
        if type(self.alpha) not in (int, float) or not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be a number above 0, not {self.alpha!r}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout must be a number of at least 0 and below 1, not {self.dropout!r}"
            )
        if not self.targets or not all(isinstance(name, str) for name in self.targets):
            raise ValueError(f"targets must be names, not {self.targets!r}")


def inject(
    model: nn.Module, config: LoRAConfig, every_target_must_match: bool = True
) -> list[str]:
    """Freezes `model` and wraps the linear layers that config.targets names, in place.

    Call it after the weights are loaded, because a wrapped layer has another path. Returns
    the paths of the wrapped layers. Raises ValueError if the model already has adapters,
    and as `match_targets`.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model already has adapters: merge them first, or rebuild it")
    paths = match_targets(model, config.targets, every_target_must_match)
    # Freeze everything first. Only the adapters, which are added after this, are trained.
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

    The rules are PEFT's. A name in a tuple matches paths that equal it or end in a dot
    and the name. A string is a regular expression that must match a whole path. Raises
    ValueError if it is not a valid one, or if a target matches no layer. (With
    every_target_must_match=False, as in PEFT, only if none of them does.)
    """
    linears = linear_paths(model)
    if isinstance(targets, str):
        matched = {targets: match_text(linears, targets)}
    else:
        matched = {name: match_name(linears, name) for name in targets}
    chosen = set().union(*matched.values())
    missing = [target for target, paths in matched.items() if not paths]
    if not chosen or (missing and every_target_must_match):
        how = "has a whole path that " if isinstance(targets, str) else ""
        names = sorted({path.rpartition(".")[2] for path in linears})
        raise ValueError(
            f"no linear layer that takes an adapter {how}matches {missing}; there are "
            f"{', '.join(names) or 'none'}; 'all-linear' means them all"
        )
    # In module order, as in PEFT. Adapters are initialised one after another, so the
    # order decides which random numbers each of them gets from a seed.
    return [path for path in linears if path in chosen]


def match_name(paths: list[str], name: str) -> list[str]:
    # The dot before both keeps "proj" from matching q_proj.
    return [path for path in paths if f".{path}".endswith(f".{name}")]


def match_text(paths: list[str], text: str) -> list[str]:
    if text.lower() == "all-linear":
        return paths
    try:
        return [path for path in paths if re.fullmatch(text, path)]
    except (re.error, OverflowError, RecursionError) as error:  # for example a{99999999999}
        raise ValueError(f"target {text!r} is not a regular expression: {error}") from None


def linear_paths(model: nn.Module) -> list[str]:
    """Returns the paths of the layers that can take an adapter.

    These are the layers with in_features, out_features and a weight, quantised or not, but
    for the output head.
    """
    head = None
    if hasattr(model, "get_output_embeddings"):  # a transformers model
        head = model.get_output_embeddings()
    paths = []
    for path, module in model.named_modules():
        has_sizes = hasattr(module, "in_features") and hasattr(module, "out_features")
        # A container of layers may have these sizes too, but it has no weight.
        is_linear = has_sizes and isinstance(getattr(module, "weight", None), Tensor)
        # The output head is left out: PEFT would save its whole weight beside
        # the adapter.
        is_head = module is head or path.rpartition(".")[2] == "lm_head"
        # The out_proj of nn.MultiheadAttention is not called, so PEFT's adapter
        # has no effect.
        is_called = not isinstance(module, NonDynamicallyQuantizableLinear)
        if path and is_linear and is_called and not is_head:  # "" is the model itself
            paths.append(path)
    return paths


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns A and B of every adapter, by parameter name. Nothing else is trained.

    `...q_proj.lora_A.weight` is (rank, in), `...q_proj.lora_B.weight` is (out, rank).
    """
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


# -----------------------------------------------------------------------------
# Merging adapters into the base


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Adds each adapter to its base weight, W + scale B A, in place, and unwraps the layers.

    W stays frozen. Raises ValueError, before any layer is changed, if the merged model
    would differ from the adapted one by more than rounding to the dtype of W. This
    happens over a quantised base, where rounding to 4 bits again erases most of a small
    update; if a sum is not finite; and if W is recomputed in each forward pass or shared
    by two layers.
    """
    adapted = {
        path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)
    }
    # Check all layers first, so that an error leaves the model as it was.
    for path, layer in adapted.items():
        check_merge(model, path, layer)
    for path, layer in adapted.items():
        layer.base_layer.weight.copy_(layer.weight)
        model.set_submodule(path, layer.base_layer)


def check_merge(model: nn.Module, path: str, layer: LoRALinear) -> None:
    """Raises ValueError if the model would compute something else once this layer is merged."""
    base = layer.base_layer
    # weight_norm and prune recompute W in each forward pass. The state_dict has
    # other tensors.
    if not is_plain(base) or "weight" not in base.state_dict():
        raise ValueError(
            f"{path}: cannot merge into {type(base).__name__}, which does not store W itself: "
            "dequantise the layer, or remove weight_norm or prune from it, first"
        )
    if not layer.weight.isfinite().all():
        raise ValueError(
            f"{path}: cannot merge, W + scale B A is not finite in {base.weight.dtype}"
        )
    # Another layer that shares this W would change too. (If the model holds a module
    # under two names, its layers have two names each; that is still one layer.)
    for name, weight in model.named_parameters(remove_duplicate=False):
        owner = name.removesuffix(".base_layer.weight")
        is_this = owner != name and model.get_submodule(owner) is layer
        if weight is base.weight and not is_this:
            raise ValueError(f"{path}: cannot merge, {name} is the same weight")


def is_plain(layer: nn.Module) -> bool:
    """Returns whether the weight of a linear layer is W itself rather than packed indices."""
    weight = layer.weight
    shape = (layer.out_features, layer.in_features)
    return weight.is_floating_point() and weight.shape == shape


# -----------------------------------------------------------------------------
# Files: adapter_config.json and adapter_model.safetensors, as PEFT writes and loads them

# PEFT puts this before each parameter name. phi-2's own names begin with "model." too:
# base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
PEFT_PREFIX = "base_model.model."


def peft_config(config: LoRAConfig, base_model: str, task_type: str | None) -> dict:
    """Returns the content of adapter_config.json.

    It contains only keys that PEFT 0.5 had, because versions 0.6 to 0.8 reject keys that
    they do not know.
    """
    targets = config.targets if isinstance(config.targets, str) else sorted(config.targets)
    return {
        "base_model_name_or_path": base_model,
        "peft_type": "LORA",
        "task_type": task_type,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets,
        # No bias is trained, W is not stored transposed, and PEFT should freeze A and B.
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def save_adapter(
    model: nn.Module,
    config: LoRAConfig,
    directory: Path,
    base_model: str,
    task_type: str | None = "CAUSAL_LM",
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json, which PEFT loads.

    `task_type` selects the class that PEFT wraps the base in; None works with any
    nn.Module. Other weights that you train, such as a new output head, are not saved.
    Raises ValueError if there are no adapters, or if one is not finite, or has another
    rank or alpha than `config`. The targets and the dropout are written without such a check.
    """
    scale = config.alpha / config.rank
    # PEFT computes the scale from the file, so a wrong alpha there would change
    # the adapter.
    for path, layer in model.named_modules():
        if isinstance(layer, LoRALinear) and (layer.rank, layer.scale) != (config.rank, scale):
            raise ValueError(
                f"{path} has rank {layer.rank} and alpha {layer.scale * layer.rank:g}, "
                f"not rank {config.rank} and alpha {config.alpha:g}"
            )
    tensors = {
        PEFT_PREFIX + name: parameter.detach().cpu().contiguous()
        for name, parameter in lora_parameters(model).items()
    }
    if not tensors:
        raise ValueError("the model has no adapters to save")
    # Check before replacing a good file.
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{key} holds numbers that are not finite, and is not saved")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    text = json.dumps(peft_config(config, base_model, task_type), indent=2)
    (directory / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def load_adapter(
    model: nn.Module, directory: Path, config: LoRAConfig | None = None
) -> LoRAConfig:
    """Adds the adapter in `directory` to `model`, with its tensors. Returns its config.

    Without `config`, the function reads adapter_config.json, which `save_adapter` must have
    written. (eval.py passes a config, because support/peft_files.py reads other programs'
    files too.) Tensors are converted to the dtype of A and B. Train or eval mode is kept.

    Raises ValueError unless the tensors match the model exactly, are finite, and at
    least one B is not zero. Where this function raises, PEFT may continue with a model
    that is not the trained one. Do not use the model after an error: its layers may
    already be wrapped.
    """
    if config is None:
        config = read_config(directory)
    file = Path(directory) / "adapter_model.safetensors"
    tensors = load_file(file)
    # As in PEFT, some targets may match nothing. But check_tensors needs every
    # tensor to fit.
    inject(model, config, every_target_must_match=False)
    parameters = {PEFT_PREFIX + name: value for name, value in lora_parameters(model).items()}
    check_tensors(tensors, parameters, file)
    with torch.no_grad():
        for key, parameter in parameters.items():
            # Copied, so that the file is no longer in use and can be overwritten.
            parameter.copy_(tensors[key])
    return config


def read_config(directory: Path) -> LoRAConfig:
    """Returns the config in an adapter_config.json that `save_adapter` has written.

    PEFT has many more options. Raises ValueError if the file has one that save_adapter
    does not write, or another value for one that it does.
    """
    path = Path(directory) / "adapter_config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    targets = raw.get("target_modules", ())
    if isinstance(targets, list):
        targets = tuple(targets)
    # A missing value becomes None, which LoRAConfig rejects.
    config = LoRAConfig(raw.get("r"), raw.get("lora_alpha"), raw.get("lora_dropout"), targets)
    # Everything else must be what save_adapter would write for this config.
    expected = peft_config(config, raw.get("base_model_name_or_path"), raw.get("task_type"))
    for key in sorted(raw.keys() | expected.keys()):
        if raw.get(key) != expected.get(key):
            raise ValueError(
                f"{path}: {key} = {raw.get(key)!r}, where save_adapter writes "
                f"{expected.get(key)!r}; support/peft_files.py reads other programs' files"
            )
    return config


def check_tensors(
    tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter], file: Path
) -> None:
    # PEFT loads with strict=False, so a wrong prefix silently leaves every B at zero.
    missing = sorted(parameters.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - parameters.keys())
    if missing:
        raise ValueError(f"{file} lacks tensors: {len(missing)}, among them {missing[0]}")
    if unknown:
        raise ValueError(f"{file} holds unknown tensors: {len(unknown)}, such as {unknown[0]}")
    for key, parameter in parameters.items():
        tensor = tensors[key]
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{file}: {key} has shape {tuple(tensor.shape)}, "
                f"this model needs {tuple(parameter.shape)}"
            )
        if not tensor.to(parameter.dtype).isfinite().all():  # as it will be loaded
            raise ValueError(f"{file}: {key} holds numbers that are not finite")
    if not any(tensor.float().any() for key, tensor in tensors.items() if ".lora_B." in key):
        raise ValueError(
            f"{file}: every B is zero, so the adapter changes nothing; "
            "it was saved before it was trained"
        )
