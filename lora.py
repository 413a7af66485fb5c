"""LoRA in one file: low-rank adapters beside the linear layers of a frozen model.

The first of six files, to be read in the order lora, quant, phi2, data, eval, train. The
six together are QLoRA, of which four lines are the heart:

    model = phi2.build(name)                  # shapes without numbers
    quant.quantize_linears(model)             # each nn.Linear becomes an empty 4-bit layer
    phi2.load_weights(model, name, device)    # weights arrive, and are quantised
    lora.inject(model, config)                # W x becomes W x + (alpha / rank) B A x

LoRA's paper is arXiv:2106.09685. Full fine-tuning with Adam stores three more numbers
for each number of a weight W (out, in): its gradient and two moments. LoRA freezes W
and learns a correction B A of low rank beside it. Its hypothesis, which its results
support: what a new task changes in a trained model has a low rank.

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

B = 0 makes the first step start from the base model exactly. In phi-2 at rank 8, on the
query and value projections of each block (q_proj and v_proj), A and B are 32 blocks * 2
layers * 8 * (2560 + 2560) = 2.6 million numbers beside 2.8 billion frozen ones.

In formulas x is a column. In the code tokens are rows, so W x is x @ W.T.

The layer that is wrapped may be a linear layer of any model, a quantised one too. What
is saved has the names that it has in PEFT, Hugging Face's library of adapters, which
loads it. Left out: DoRA (which also learns the norm of each of W's rows), rsLoRA (alpha
/ sqrt(rank)), trained biases, adapters on embeddings or on the head.

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

    The base layer is W x and its bias, which `inject` freezes. Backward, for one token's input x,
    the gradient g of its output (both as columns), and without dropout:

        B's gradient  g (scale A x)^T       (out, rank)
        A's           scale (B^T g) x^T     (rank, in)
        x's           W^T g + scale A^T B^T g

    autograd computes them, and sums the first two over the tokens. As B starts at zero,
    A's gradient is zero in the first step; if A were zero too, neither would ever move.

    A and B are stored and trained in fp32 even over a base in 16 or 4 bits, as in PEFT:
    a bf16 number has 8 significant bits, so small steps would be rounded away. For the
    product a copy is cast to the dtype of x, as PEFT does under autocast. (Over a base in
    fp64 they are in fp64.)
    """

    def __init__(self, base_layer: nn.Module, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base_layer = base_layer
        self.rank = rank
        self.scale = alpha / rank
        self.lora_dropout = nn.Dropout(dropout)
        # Made on the CPU in fp32, wherever the base is: one seed gives one A everywhere.
        self.lora_A = nn.Linear(
            base_layer.in_features, rank, bias=False, device="cpu", dtype=torch.float32
        )
        self.lora_B = nn.Linear(
            rank, base_layer.out_features, bias=False, device="cpu", dtype=torch.float32
        )
        # nn.Linear has drawn A already. PEFT too draws it twice, so a seed gives A as in PEFT:
        # uniform within +- 1 / sqrt(in), where the paper's is normal.
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
        # Two thin products, through `rank` numbers a token; there are fewest numbers to scale
        # between the two. B A itself is never formed: it would be as large as W.
        down = self.lora_dropout(x) @ a.T  # (..., rank)
        return self.base_layer(x) + (self.scale * down) @ b.T

    @property
    def weight(self) -> Tensor:
        """W + scale B A, (out, in), rounded once to the dtype of W.

        For merging. And, like `bias`, for models that read a layer's weight instead of
        calling the layer, as torch's own nn.TransformerEncoderLayer does in eval mode.
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
# Putting adapters into a model


@dataclass(frozen=True)
class LoRAConfig:
    """The four choices of LoRA.

    rank: the width of the bottleneck, and the rank of the learned correction. The
        number of parameters grows in proportion to it. The paper's section 7.2 finds
        that 1 to 8 is enough on q and v, for its models and tasks.
    alpha: the correction is multiplied by alpha / rank (section 4.1). The division is
        meant to spare a new learning rate for each rank, since B A of a higher rank sums
        more terms. It also means that a higher rank alone has a smaller factor. To change
        the rank and not the factor, set alpha in proportion, such as 2 * rank.
    dropout: the probability with which each of the adapter's inputs is set to zero in
        training. W's own input is whole.
    targets: which linear layers get an adapter. A tuple of names, ("q_proj", "v_proj");
        or the text "all-linear": all but the head, lm_head; or any other text as a
        regular expression for a whole path, ".*mlp.fc[12]". The paper adapts q and v
        (section 7.1); QLoRA (arXiv:2305.14314, section 4) finds that to adapt all layers
        matters more than rank.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] | str = ("q_proj", "v_proj")

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:  # isinstance would take True for an int
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

    To be called after the weights are loaded. Returns the paths of the wrapped layers.
    Raises ValueError when a target matches no layer, and when the model has adapters
    already. With every_target_must_match=False one match among all targets is enough,
    as in PEFT; load_adapter uses it.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has adapters already: merge them first, or build it anew")
    paths = match_targets(model, config.targets, every_target_must_match)
    # Everything is frozen first. The adapters that follow are new: they alone train.
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

    The rules are PEFT's: a name matches the end of a path at a dot, a text must match a
    whole path as a regular expression. Raises ValueError when a target matches no layer
    (with every_target_must_match=False, when none does).
    """
    linears = linear_paths(model)
    if isinstance(targets, str):
        matched = {targets: match_text(linears, targets)}
    else:
        matched = {name: match_name(linears, name) for name in targets}
    chosen = set().union(*matched.values())
    missing = [target for target, paths in matched.items() if not paths]
    if not chosen or (missing and every_target_must_match):
        raise ValueError(describe_missing(missing, isinstance(targets, str), linears))
    # In module order, as in PEFT: the adapters are drawn one after another, so that the
    # same seed gives the same.
    return [path for path in linears if path in chosen]


def describe_missing(targets: list[str], is_pattern: bool, linears: list[str]) -> str:
    how = "as a whole path " if is_pattern else ""
    names = sorted({path.rpartition(".")[2] for path in linears})
    text = f"no linear layer that takes an adapter {how}matches {targets}"
    return f"{text}; there are {', '.join(names) or 'none'}, and the text 'all-linear'"


def match_name(paths: list[str], name: str) -> list[str]:
    # With a dot before both, "proj" does not match q_proj.
    return [path for path in paths if f".{path}".endswith(f".{name}")]


def match_text(paths: list[str], text: str) -> list[str]:
    if text.lower() == "all-linear":
        return paths
    try:
        return [path for path in paths if re.fullmatch(text, path)]
    except (re.error, OverflowError, RecursionError) as error:  # such as for a{99999999999}
        raise ValueError(f"target {text!r} is not a regular expression: {error}") from None


def linear_paths(model: nn.Module) -> list[str]:
    """Returns the paths of the layers that take an adapter.

    They are those with in_features, out_features and a weight, which quantised ones have too.
    """
    head = None
    if hasattr(model, "get_output_embeddings"):  # a model of transformers
        head = model.get_output_embeddings()
    paths = []
    for path, module in model.named_modules():
        has_sizes = hasattr(module, "in_features") and hasattr(module, "out_features")
        # A block of layers may have such sizes too, but has no weight.
        is_linear = has_sizes and isinstance(getattr(module, "weight", None), Tensor)
        # Left out, because PEFT would save the head's whole weight beside its adapter.
        is_head = module is head or path.rpartition(".")[2] == "lm_head"
        # nn.MultiheadAttention's out_proj has this class. It is never called: its
        # weight is read. There an adapter of PEFT does nothing.
        is_called = not isinstance(module, NonDynamicallyQuantizableLinear)
        if path and is_linear and is_called and not is_head:  # "" is the model itself
            paths.append(path)
    return paths


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns A and B of every adapter, by the parameter's name: all that is trained.

    `...q_proj.lora_A.weight` is (rank, in), `...q_proj.lora_B.weight` is (out, rank).
    """
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


# -----------------------------------------------------------------------------
# Taking them out again


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Adds each adapter to its base weight, W + scale B A, in place, and unwraps the layers.

    W stays frozen. Raises ValueError, before any layer is changed, where the result
    would be another model than the adapted one by more than a rounding to the dtype of
    W: over a quantised base, where rounding to 4 bits again erases most of a small
    update; where a sum is not finite; and where W is computed anew in each pass, or
    shared by two layers.
    """
    adapted = {
        path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)
    }
    # All are checked first: a refusal leaves the model as it was.
    for path, layer in adapted.items():
        check_merge(model, path, layer)
    for path, layer in adapted.items():
        layer.base_layer.weight.copy_(layer.weight)
        model.set_submodule(path, layer.base_layer)


def check_merge(model: nn.Module, path: str, layer: LoRALinear) -> None:
    """Raises ValueError where merging this layer would give another model."""
    base = layer.base_layer
    if not is_plain(base):
        kind = type(base).__name__
        raise ValueError(f"{path}: cannot merge into {kind}; dequantise the layers first")
    # weight_norm and prune compute W in each forward pass, over what was written there.
    if "weight" not in base.state_dict():
        raise ValueError(
            f"{path}: cannot merge, W is computed from other tensors, as by weight_norm or "
            "prune; remove that first"
        )
    if not layer.weight.isfinite().all():
        raise ValueError(
            f"{path}: cannot merge, W + scale B A is not finite in {base.weight.dtype}"
        )
    # Another layer with this W would change too. (A block that the model holds under two
    # names gives this layer two names: that is no other.)
    for name, weight in model.named_parameters(remove_duplicate=False):
        owner = name.removesuffix(".base_layer.weight")
        is_this = owner != name and model.get_submodule(owner) is layer
        if weight is base.weight and not is_this:
            raise ValueError(f"{path}: cannot merge, {name} is the same weight")


def is_plain(layer: nn.Module) -> bool:
    """Returns whether the weight of a linear layer is W itself, and not packed indices."""
    weight = layer.weight
    shape = (layer.out_features, layer.in_features)
    return weight.is_floating_point() and weight.shape == shape


# -----------------------------------------------------------------------------
# Files: adapter_config.json and adapter_model.safetensors, as PEFT writes and loads them

# PEFT puts this before each parameter's name:
# base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
PREFIX = "base_model.model."


def peft_config(config: LoRAConfig, base_model: str, task_type: str | None) -> dict:
    """Returns the content of adapter_config.json.

    It has only keys that PEFT has had from its beginning, because an old version refuses
    keys that it does not know.
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
        # No bias is trained, W is not stored transposed, and PEFT is to freeze A and B.
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

    `task_type` says which of its classes PEFT wraps the base in; with None it takes any
    nn.Module. Other weights that you train, such as a new head, are not in these files.
    Raises ValueError for adapters that are not finite, or have another rank or alpha.
    `config.targets` and dropout are written as they are.
    """
    scale = config.alpha / config.rank
    # PEFT multiplies by what the file says: another alpha there would be another adapter.
    for path, layer in model.named_modules():
        if isinstance(layer, LoRALinear) and (layer.rank, layer.scale) != (config.rank, scale):
            raise ValueError(
                f"{path} has rank {layer.rank} and alpha {layer.scale * layer.rank:g}, "
                f"not rank {config.rank} and alpha {config.alpha:g}"
            )
    tensors = {
        PREFIX + name: parameter.detach().cpu().contiguous()
        for name, parameter in lora_parameters(model).items()
    }
    if not tensors:
        raise ValueError("the model has no adapters to save")
    # Checked before a good file is replaced.
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
    """Wraps `model` as the adapter in `directory` asks for, and loads its tensors.

    Without `config` it is read from adapter_config.json, which `save_adapter` must have
    written. (eval.py passes one: support/peft_files.py reads other programs' files.)

    Raises ValueError unless the tensors fit exactly, are finite, and some B is not zero;
    with any of that PEFT may continue with a model that is not the trained one. After an
    error the model must not be used: it may be wrapped already. Tensors are converted to
    the dtype of A and B. The mode stays, train or eval.
    """
    if config is None:
        config = read_config(directory)
    file = Path(directory) / "adapter_model.safetensors"
    tensors = load_file(file)
    # As in PEFT, a target may match nothing. check_tensors is stricter: every tensor must fit.
    inject(model, config, every_target_must_match=False)
    parameters = {PREFIX + name: value for name, value in lora_parameters(model).items()}
    check_tensors(tensors, parameters, file)
    with torch.no_grad():
        for key, parameter in parameters.items():
            # Copied, so that the file itself is no longer in use and can be written anew.
            parameter.copy_(tensors[key])
    return config


def read_config(directory: Path) -> LoRAConfig:
    """Reads an adapter_config.json that `save_adapter` has written.

    PEFT has many more options. Raises ValueError for a file that has any of them.
    """
    path = Path(directory) / "adapter_config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    targets = raw.get("target_modules", ())
    if isinstance(targets, list):
        targets = tuple(targets)
    # What is missing is None, which LoRAConfig refuses.
    config = LoRAConfig(raw.get("r"), raw.get("lora_alpha"), raw.get("lora_dropout"), targets)
    # The rest has to be what would be written for this config.
    expected = peft_config(config, raw.get("base_model_name_or_path"), raw.get("task_type"))
    for key in sorted(raw.keys() | expected.keys()):
        if raw.get(key) != expected.get(key):
            raise ValueError(
                f"{path}: {key} = {raw.get(key)!r}, where save_adapter writes "
                f"{expected.get(key)!r}; support/peft_files.py reads files of other programs"
            )
    return config


def check_tensors(
    tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter], file: Path
) -> None:
    # PEFT loads with strict=False: a wrong prefix leaves every B at zero, in silence.
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
