"""phi-2 in one file: the model, and loading.

Third in the reading order. The module names are those of transformers' `PhiForCausalLM`
(models/phi/modeling_phi.py), so `state_dict()` is the checkpoint on the Hub, key for key.
phi-1 and phi-1.5 differ only in config.json. Left out: long-context rotary scaling,
grouped-query attention (no phi has it), and checkpoints of 2023, whose keys have other names.

A transformer treats each token by itself; only attention lets tokens look at one
another. So the model runs on flat tokens: N of them, of C = hidden_size numbers each.
Where they stand and what each of them sees is asked of one object, a `Layout`. `MaskedRows`
is one, plain and complete. Training and evaluation use those of support/packing.py, which
give the same and are fast.

    model = phi2.build("microsoft/phi-2")               # or a directory; empty, on the meta device
    phi2.load_weights(model, "microsoft/phi-2", "cuda", torch.bfloat16)
    logits = model.eval()(torch.tensor(ids, device="cuda"))         # one row: (N, vocabulary)
"""

import copy
import functools
import json
import math
import warnings
from collections.abc import Callable, Set
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute  # activation checkpointing
from tqdm import tqdm


@dataclass
class Phi2Config:
    """The fields of config.json that matter, under Hugging Face's names.

    The defaults are phi-2's, for Phi2Config() in tests and exercises. What a config.json
    leaves out is not taken from here: ABSENT has transformers' values.
    """

    vocab_size: int = 51200
    hidden_size: int = 2560
    intermediate_size: int = 10240
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    partial_rotary_factor: float = 0.4  # 32 of each head's 80 dimensions carry the position
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-5
    resid_pdrop: float = 0.1  # dropout on both branches of a block, in train mode

    def __post_init__(self):
        """Raises ValueError for sizes that are no numbers, or do not fit together."""
        for field in fields(self):
            value = getattr(self, field.name)
            kinds = (int,) if field.type is int else (int, float)
            least = 1 if field.type is int else 0
            if type(value) not in kinds or not least <= value < math.inf:
                raise ValueError(f"{field.name} cannot be {value!r}")
        head_dim, rest = divmod(self.hidden_size, self.num_attention_heads)
        if rest:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        rotary_dim = self.rotary_dim()
        if rotary_dim % 2 or rotary_dim > head_dim:  # they turn in pairs
            raise ValueError(
                f"{rotary_dim} of a head's {head_dim} dimensions cannot be rotated; "
                "it must be an even number of them"
            )

    def rotary_dim(self) -> int:
        """Returns how many dimensions of each head carry the position."""
        return int(self.hidden_size // self.num_attention_heads * self.partial_rotary_factor)


# -----------------------------------------------------------------------------
# The model: N tokens, of one row or of B rows, in H heads of D = C / H dimensions


def rotary_tables(
    config: Phi2Config, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns cos and sin (N, 1, R / 2) of RoPE (arXiv:2104.09864) for tokens at `positions` (N,).

    R is the number of rotated dimensions of a head. The angles are computed in fp32.
    """
    rotary_dim = config.rotary_dim()
    # The first pair of dimensions turns by one radian a token, the last of phi-2's 16
    # pairs by 10000^(-30/32), which is 1/5623.
    exponents = torch.arange(0, rotary_dim, 2, device=positions.device).float() / rotary_dim
    angles = positions[:, None, None].float() * config.rope_theta**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of dimensions (i, i + R / 2) of x (N, H, D) by its token's angle.

    The dimensions after the first R pass through. On a GPU this is compiled: see `fused`.
    """
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


class Layout(Protocol):
    """Where N tokens stand, and what each of them sees.

    A row is one tokenised text, without the prefix where rows share one. Every token gives
    a key and a value, for others to see. It has a query only where its own output is wanted:
    in the last block these are the tokens whose logits are wanted, in all others it is
    every token.
    """

    positions: Tensor  # (N,) the place of each token in its text, prefix included

    def only_last(self, count: int) -> "Layout":
        """Returns the same rows, where only the last `count` tokens of each have a query."""

    def select_queries(self, x: Tensor) -> Tensor:
        """Returns x (N, ...) of the tokens that have a query, (queries, ...)."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns attention, softmax(q k^T / sqrt(D)) v over the keys that each query sees.

        q and the result are (queries, H, D), k and v are (N, H, D). `layer` is the number of
        the block: a layout that keeps keys and values, for generation, keeps them under it.
        """


class MaskedRows:
    """The layout of rows, one behind another, after a prefix that they share or none.

    Here is the mask for a prefix of two tokens and rows of two
    and of one, with an x where a token, on the left, sees another:

               P0 P1 a0 a1 b0
        P0      x                        a token sees the prefix and its own row, up to and
        P1      x  x                     including itself; the positions of a row start after
        a0      x  x  x                  the prefix
        a1      x  x  x  x
        b0      x  x        x

    So the prefix, the instruction that all prompts begin with, runs through the model once.
    Most of the mask is empty where rows are many: support/packing.py's PackedRows computes the
    same without the empty part.
    """

    def __init__(
        self, lengths: list[int], prefix_length: int = 0, device: str | torch.device = "cpu"
    ):
        """`lengths` are the numbers of tokens of the rows, without the prefix."""
        row_of = [torch.full((prefix_length,), -1)]  # for each token its row; -1 in the prefix
        positions = [torch.arange(prefix_length)]
        for row, length in enumerate(lengths):
            row_of.append(torch.full((length,), row))
            positions.append(prefix_length + torch.arange(length))
        row_of = torch.cat(row_of)
        positions = torch.cat(positions)

        is_visible = (row_of == row_of[:, None]) | (row_of == -1)  # (N that see, N seen)
        is_not_later = positions <= positions[:, None]
        self.mask = (is_visible & is_not_later).to(device)
        self.positions = positions.to(device)
        self.ends = prefix_length + torch.tensor(lengths, device=device).cumsum(0)  # of the rows
        self.queries = slice(None)  # which tokens have a query

    def only_last(self, count: int) -> "MaskedRows":
        narrowed = copy.copy(self)
        back = torch.arange(-count, 0, device=self.ends.device)
        narrowed.queries = (self.ends[:, None] + back).flatten()
        return narrowed

    def select_queries(self, x: Tensor) -> Tensor:
        return x[self.queries]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.transpose(0, 1)[None]  # (1, H, queries, D), as torch has it
        k = k.transpose(0, 1)[None]
        v = v.transpose(0, 1)[None]
        mask = self.select_queries(self.mask)  # (queries, N), True where a key is seen
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


class Attention(nn.Module):
    """Causal self-attention with biases everywhere and rotary positions on a part of each head."""

    def __init__(self, config: Phi2Config, layer: int):
        super().__init__()
        size = config.hidden_size
        self.layer = layer  # the block's number
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.dense = nn.Linear(size, size)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # (N, C) -> (N, H, D)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        # Only tokens whose output is wanted have a query: all of them, except in the
        # last block.
        q = self.split_heads(self.q_proj(layout.select_queries(h)))
        k = self.split_heads(self.k_proj(h))
        v = self.split_heads(self.v_proj(h))

        # q and k are each turned by their position: their product depends on it only
        # through the distance of the two.
        q = rotate(q, layout.select_queries(cos), layout.select_queries(sin))
        k = rotate(k, cos, sin)

        # The one place where tokens see one another.
        attended = layout.attend(self.layer, q, k, v)
        return self.dense(attended.flatten(1))  # (queries, H, D) -> (queries, C)


class MLP(nn.Module):
    """Two linear layers with GELU (the tanh form) between them."""

    def __init__(self, config: Phi2Config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def add_branches(attended: Tensor, transformed: Tensor, x: Tensor) -> Tensor:
    # In bf16 the last bit depends on the order, which is that of transformers. On a GPU this is
    # compiled: see `fused`.
    return attended + transformed + x


class Block(nn.Module):
    """phi's parallel block, x + attention(h) + mlp(h): both branches read the same LayerNorm."""

    def __init__(self, config: Phi2Config, layer: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        h = self.input_layernorm(x)
        attended = self.resid_dropout(self.self_attn(h, cos, sin, layout))
        x = layout.select_queries(x)
        h = layout.select_queries(h)
        return add_branches(attended, self.resid_dropout(self.mlp(h)), x)


class PhiModel(nn.Module):
    """Everything but the head; `model.` in the checkpoint's keys."""

    def __init__(self, config: Phi2Config):
        super().__init__()
        self.config = config
        # What the backward pass computes again, rather than read what the forward pass has
        # stored: whole blocks (here), or their attention (in the layout of train.batch_loss).
        self.recomputes_blocks = False
        self.recomputes_attention = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor, layout: Layout, last: int | None = None) -> Tensor:
        """Returns the hidden states (N, C) of ids (N,).

        With `last` only those of the last tokens of each row, `last` for each:
        (B * last, C).
        """
        # No position is added to x. Attention turns q and k instead.
        x = self.embed_tokens(ids)
        cos, sin = rotary_tables(self.config, layout.positions, x.dtype)
        for block in self.layers:
            # Of the last block's outputs only some are wanted.
            if last is not None and block is self.layers[-1]:
                layout = layout.only_last(last)
            if self.recomputes_blocks and torch.is_grad_enabled():
                # True would give no gradients: the first x, of a frozen embedding, has none.
                x = recompute(block, x, cos, sin, layout, use_reentrant=False)
            else:
                x = block(x, cos, sin, layout)
        return self.final_layernorm(x)


class Phi2(nn.Module):
    """phi-2 with its head."""

    def __init__(self, config: Phi2Config):
        super().__init__()
        self.config = config
        # Whether generation on a GPU may use CUDA graphs: for support/packing.py's Decoder.
        self.uses_graphs = True
        self.model = PhiModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(
        self, ids: Tensor, layout: Layout | None = None, last: int | None = None
    ) -> Tensor:
        """Returns the logits of the next token, (N, vocabulary), for each of ids (N,).

        Without a layout the ids are one row. With `last` only the last tokens of each row
        have logits, `last` for each: (B * last, vocabulary).
        """
        if layout is None:
            layout = MaskedRows([len(ids)], device=ids.device)
        return self.lm_head(self.model(ids, layout, last))


@torch.no_grad()
def generate(model: Phi2, ids: list[int], count: int) -> list[int]:
    """Returns the `count` ids that follow ids, each the likeliest: greedy generation.

    The plain way, in which each step runs the whole row again. eval.generate gives the same
    for many rows, and keeps keys and values instead (support/packing.py).
    """
    device = model.lm_head.weight.device
    row = list(ids)
    for _ in range(count):
        logits = model(torch.tensor(row, device=device), last=1)
        row.append(int(logits.argmax()))
    return row[len(ids) :]


# -----------------------------------------------------------------------------
# On a GPU: one kernel for the rotation, and one for the sum of the branches

CAN_COMPILE = find_spec("triton") is not None  # until it has failed once


def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns `function`, whose element-wise steps become one kernel where it runs on a GPU.

    Each step alone would read and write all of its tensors. torch.compile writes the
    kernel, and that of the backward pass, at the first call, which takes seconds; the
    number of tokens may change later. It needs Triton, which torch brings with it for
    CUDA on Linux, a C compiler and Python.h; without these a line says so, and all runs
    as it is written.
    """

    @functools.cache
    def compiled() -> Callable[..., Tensor]:
        # Each step rounds as it does alone: in bf16 a sum of three is rounded twice.
        options = {"emulate_precision_casts": True}
        return torch.compile(function, dynamic=True, options=options)

    @functools.wraps(function)
    def run(*tensors: Tensor) -> Tensor:
        global CAN_COMPILE
        if tensors[0].is_cuda and CAN_COMPILE:
            try:
                return compiled()(*tensors)
            except torch._dynamo.exc.TorchDynamoException as error:
                CAN_COMPILE = False  # from now on all of them run as they are written
                reason = str(error).partition("\n")[0]
                warnings.warn(
                    "slower without torch.compile, which needs a C compiler and Python.h: "
                    + reason,
                    stacklevel=2,
                )
        return function(*tensors)

    return run


rotate = fused(rotate)
add_branches = fused(add_branches)


# -----------------------------------------------------------------------------
# Loading: a model directory, or a model on the Hub

FILES = ["config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json"]

# Options of config.json that change the result and are not implemented, with the one
# value that is accepted, beside null.
FIXED = {
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "hidden_act": "gelu_new",
    "qk_layernorm": False,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
# What transformers' PhiConfig takes where config.json is silent.
ABSENT = {
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "layer_norm_eps": 1e-5,
    "resid_pdrop": 0.0,
}


def build(name: str | Path) -> Phi2:
    """Returns the model of a directory or a Hub id without its weights, on the meta device."""
    config = read_config(locate(name))
    with torch.device("meta"):
        return Phi2(config)


def load_weights(
    model: Phi2,
    name: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> Phi2:
    """Streams a checkpoint into `model`, layer by layer, as `dtype` on `device`.

    The tensors of a layer go to its own `load_state_dict`, where a quantised layer
    quantises its weight, or takes over what is in NF4 already. At the peak the memory
    holds the model and one layer's tensors, as they are stored and as `dtype`. Raises
    ValueError for missing, unknown, misshapen or damaged tensors; the model is then
    unusable.
    """
    directory = locate(name)
    file_of = find_tensors(directory)
    with torch.device("meta"):  # a plain model: this one may hold NF4's buffers
        expected = Phi2(model.config).state_dict().keys()
    check_keys(directory, file_of.keys(), expected)
    paths = dict.fromkeys(key.rpartition(".")[0] for key in expected)
    for path in tqdm(paths, "loading", unit="layer", leave=False, delay=2, disable=None):
        layer = model.get_submodule(path)
        try:
            tensors = read_layer(file_of, path, device, dtype)
            if "weight.absmax" in tensors and type(layer) is nn.Linear:
                raise ValueError("it is in NF4, which --quant nf4 reads")
            layer.load_state_dict(tensors, assign=True)
        # RuntimeErrors too, of a GPU, and not the checkpoint's fault.
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        # Such as a shape that is not config.json's, or damaged bytes.
        except (LookupError, TypeError, RuntimeError, ValueError, SafetensorError) as error:
            if "allocate" in str(error):  # a CPU's memory is full, which is a RuntimeError too
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"{directory}: {path} cannot be loaded: {reason}") from None
    return model


def check_keys(directory: Path, found: Set[str], expected: Set[str]) -> None:
    """Raises ValueError where a tensor is missing, or has no place in the model."""
    missing = expected - found
    if missing:
        text = f"{directory} lacks {len(missing)} of {len(expected)} tensors, among them "
        text += min(missing)
        if found - expected:  # there are others in their place
            text += "; files of 2023 have other names: download today's from the Hub"
        raise ValueError(text)
    for key in found:
        # A weight in NF4 has more tensors beside it, such as q_proj.weight.absmax. Some
        # uploads store the rotary tables, which are computed here.
        path, separator, _ = key.partition(".weight.")
        is_of_nf4 = separator and f"{path}.weight" in expected
        if key not in expected and not is_of_nf4 and not key.endswith("inv_freq"):
            raise ValueError(f"{directory}: its config.json leaves no place for {key}")


def read_layer(
    file_of: dict[str, Path], path: str, device: str | torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Returns the tensors of a layer as `dtype`, by their names in it: weight and bias.

    A weight that the checkpoint holds in NF4 has more of them: weight.absmax and others.
    They and it are returned as they are stored, which is as quant.NF4Linear takes them.
    """
    tensors = {}
    for key, file in file_of.items():
        if key.startswith(f"{path}."):
            tensors[key.removeprefix(f"{path}.")] = read(file, key).to(device)
    is_nf4 = "weight.absmax" in tensors
    for name, tensor in tensors.items():
        if is_nf4 and name.startswith("weight"):
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name} holds {tensor.dtype}, not floating-point numbers")
        tensors[name] = tensor.to(dtype)  # only now, so that a GPU converts
        if not is_finite(tensors[name]):
            raise ValueError(f"{name} holds numbers that are not finite in {dtype}")
    return tensors


def is_finite(tensor: Tensor) -> bool:
    # Where a number is NaN, both are; where one is infinite, one of them is. Unlike
    # tensor.isfinite() this makes no tensor of the same size.
    low, high = tensor.aminmax()
    return bool(low.isfinite() & high.isfinite())


def find_tensors(directory: Path) -> dict[str, Path]:
    """Returns the file of each tensor of a checkpoint, by its key."""
    file_of = {}
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            file_of |= dict.fromkeys(file.keys(), path)
    return file_of


def read(path: Path, key: str) -> Tensor:
    # Opened for each tensor, so that what was read leaves the memory.
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(key)


def not_quantized(directory: Path) -> tuple[str, ...]:
    """Returns the paths of what is not to be quantised: the head.

    Of a checkpoint that is in NF4 already it is whatever has a weight of another form
    there.
    """
    keys = find_tensors(directory)
    # Asked of the tensors: a dequantised model's config.json may still say that it is
    # in NF4.
    if not any(key.endswith(".weight.absmax") for key in keys):
        return ("lm_head",)
    weights = [key for key in keys if key.endswith(".weight") and f"{key}.absmax" not in keys]
    return tuple(key.removesuffix(".weight") for key in weights)


def weight_files(directory: Path) -> list[Path]:
    """Returns the safetensors files of a model directory.

    As in transformers, model.safetensors comes before an index, which may be that of an
    earlier save. Raises ValueError where a file is damaged, or not there.
    """
    single = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    names = [single.name]
    if not single.is_file():
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
            names = sorted({str(name) for name in weight_map.values()})
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError(
                f"{directory} holds no {single.name} and no {index.name} with a weight_map; "
                "other formats are not read: transformers' save_pretrained writes these"
            ) from None
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise ValueError(f"{index} lists {name}, which is not there: download it again")
        try:
            with safe_open(directory / name, framework="pt"):
                pass  # the header has been read, which says how long the file must be
        except SafetensorError as error:
            raise ValueError(
                f"{directory / name} is damaged or cut short ({error}): download it again, "
                "in a git clone with `git lfs pull`"
            ) from None
    return [directory / name for name in names]


def locate(name: str | Path) -> Path:
    """Returns the directory of a model: `name` itself, or its download from the Hub."""
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(str(name), allow_patterns=FILES))


def read_config(directory: Path) -> Phi2Config:
    """Reads config.json of a model directory.

    Raises ValueError for an architecture that is not a phi, and for an option that is not
    implemented.
    """
    path = directory / "config.json"
    raw = json.loads(path.read_bytes())
    if raw.get("model_type") != "phi":
        raise ValueError(
            f"{path}: model_type {raw.get('model_type')!r} is not supported, only 'phi' "
            "(phi-1, phi-1.5, phi-2, as the Hub has them since 2024)"
        )
    raw = with_rotary_values(raw, path)
    check_options(raw, path)
    values = ABSENT | {key: value for key, value in raw.items() if value is not None}
    names = [field.name for field in fields(Phi2Config)]
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    try:
        return Phi2Config(**{name: values[name] for name in names})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def with_rotary_values(raw: dict, path: Path) -> dict:
    """Returns config.json with what rope_parameters holds where older versions have it."""
    for key in ("rope_scaling", "rope_parameters"):  # the second in transformers 5
        values = raw.get(key)
        if isinstance(values, dict):
            kind = values.get("rope_type", values.get("type", "default"))
            if kind != "default":
                raise ValueError(f"{path}: {key} of type {kind!r} is not supported")
            raw = raw | {key: None} | values
    return raw


def check_options(raw: dict, path: Path) -> None:
    """Raises ValueError for an option that is not implemented."""
    # Grouped-query attention has fewer heads for keys and values than for queries.
    accepted = FIXED | {"num_key_value_heads": raw.get("num_attention_heads")}
    for key, value in accepted.items():
        if raw.get(key, value) not in (value, None):
            raise ValueError(f"{path}: {key} = {raw[key]!r} is not supported, only {value!r}")
