"""phi-2 in one file: the model, and how its weights are loaded.

Third in the reading order. The module names are those of transformers' `PhiForCausalLM`
(models/phi/modeling_phi.py), so `state_dict()` has exactly the keys of the checkpoint,
the weight files on the Hub. phi-1 and phi-1.5 work too: only config.json differs. Left
out: long-context rotary scaling, grouped-query attention (none of these models has it),
and checkpoints from 2023, whose keys have other names.

A transformer processes each token independently; only in attention do tokens see each
other. So the model runs on a flat sequence of N tokens, with C = hidden_size numbers
each. One object, a `Layout`, holds the positions of the tokens and defines what each
token sees. `MaskedRows` is a simple layout, with which the whole model can be run and
trained. Training and evaluation use the layouts of support/packing.py, which give the same
results faster, and store keys and values for generation.

    model = phi2.build("microsoft/phi-2")               # or a directory; empty, on the meta device
    phi2.load_weights(model, "microsoft/phi-2", "cuda", torch.bfloat16)
    logits = model.eval()(torch.tensor(ids, device="cuda"))         # one row: (N, vocabulary)
"""

import copy
import json
import math
from collections.abc import Set
from dataclasses import dataclass, fields
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
    """The fields of config.json that matter here, under Hugging Face's names.

    The defaults are phi-2's, for Phi2Config() in tests and exercises. They do not fill
    gaps in a config.json: ABSENT has transformers' defaults for that.
    """

    vocab_size: int = 51200
    hidden_size: int = 2560
    intermediate_size: int = 10240
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    partial_rotary_factor: float = 0.4  # 32 of each head's 80 dimensions carry the position
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-5
    resid_pdrop: float = 0.1  # dropout after attention and MLP, in train mode

    def __post_init__(self):
        check_sizes(self)

    def rotary_dim(self) -> int:
        """Returns how many dimensions of each head carry the position."""
        return int(self.hidden_size // self.num_attention_heads * self.partial_rotary_factor)


# -----------------------------------------------------------------------------
# The model: N tokens, from B rows, and H attention heads of D = C / H dimensions


def rotary_tables(
    config: Phi2Config, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns cos and sin (N, 1, R / 2) of RoPE (arXiv:2104.09864) for tokens at `positions` (N,).

    R is the number of rotated dimensions in each head. The angles are computed in fp32.
    """
    rotary_dim = config.rotary_dim()
    # The first pair of dimensions rotates by one radian per position, the last of
    # phi-2's 16 pairs by 10000^(-30/32), which is 1/5623.
    exponents = torch.arange(0, rotary_dim, 2, device=positions.device).float() / rotary_dim
    angles = positions[:, None, None].float() * config.rope_theta**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair of dimensions (i, i + R / 2) of x (N, H, D) by its angle for the token.

    The dimensions after the first R are unchanged. On a GPU eval.py has this compiled.
    """
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


class Layout(Protocol):
    """The positions of N tokens, and what each of them sees.

    A row is one tokenised text; if rows share a prefix, a row is what follows it. (In
    support/packing.py rows may share further tokens after the prefix.)

    Every token has a key and a value, which other tokens can see. To save work, the last
    transformer block computes outputs only for the tokens whose logits are wanted: only
    these have a query there. In the other blocks every token has one.
    """

    positions: Tensor  # (N,) the position of each token in its text, counting the prefix

    def only_last(self, count: int) -> "Layout":
        """Returns a layout of the same rows; only the last `count` tokens of each have a query.

        Every row must have that many tokens. A token that rows share has a query for each of
        them. Keys and values that the new layout stores are those of this one too.
        """

    def select_queries(self, x: Tensor) -> Tensor:
        """Returns the entries (queries, ...) of x (N, ...), one for each query."""

    def attend(self, block_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns attention, softmax(q k^T / sqrt(D)) v over the keys that each query sees.

        q and the result are (queries, H, D), k and v are (N, H, D). A layout
        for generation stores keys and values under the index of the transformer block.
        """


class MaskedRows:
    """The layout of rows that follow one another, after an optional prefix that they share.

    This is the mask for a prefix of two tokens, a row of two and a row of one. An x
    means that the token on the left sees the token at the top:

               P0 P1 a0 a1 b0
        P0      x                        a token sees the prefix and its own row, up to and
        P1      x  x                     including itself; positions in each row continue
        a0      x  x  x                  from the end of the prefix
        a1      x  x  x  x
        b0      x  x        x

    So the prefix, the instruction that all prompts begin with, goes through the model
    once. With many rows most of the mask is empty. PackedRows in support/packing.py gives
    the same result up to rounding: within attention, and only there, it places the rows side
    by side, padded to one length, each behind the keys and values of the prefix.
    """

    def __init__(
        self, lengths: list[int], prefix_length: int = 0, device: str | torch.device = "cpu"
    ):
        """`lengths` are the numbers of tokens in each row, at least one, without the prefix."""
        row_of = [torch.full((prefix_length,), -1)]  # each token's row; -1 in the prefix
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

    def attend(self, block_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.transpose(0, 1)[None]  # (1, H, queries, D), as torch expects
        k = k.transpose(0, 1)[None]
        v = v.transpose(0, 1)[None]
        mask = self.select_queries(self.mask)  # (queries, N), True where a key is seen
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


class Attention(nn.Module):
    """Causal self-attention: all projections have a bias, and RoPE rotates part of each head."""

    def __init__(self, config: Phi2Config, block_index: int):
        super().__init__()
        size = config.hidden_size
        self.block_index = block_index
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.dense = nn.Linear(size, size)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # (N, C) -> (N, H, D)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        q = self.split_heads(self.q_proj(layout.select_queries(h)))
        k = self.split_heads(self.k_proj(h))
        v = self.split_heads(self.v_proj(h))

        # q and k are rotated according to their positions. Their dot product then
        # depends on the positions only through their distance.
        q = rotate(q, layout.select_queries(cos), layout.select_queries(sin))
        k = rotate(k, cos, sin)

        # The only place where tokens see each other.
        attended = layout.attend(self.block_index, q, k, v)
        return self.dense(attended.flatten(1))  # (queries, H, D) -> (queries, C)


class MLP(nn.Module):
    """Two linear layers with a GELU (tanh approximation) between them."""

    def __init__(self, config: Phi2Config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def add_branches(attended: Tensor, transformed: Tensor, x: Tensor) -> Tensor:
    """Returns what a transformer block adds up. On a GPU eval.py has this compiled, as `rotate`."""
    # In bf16 the order of the sum affects the last bit; this is transformers' order.
    return attended + transformed + x


class Block(nn.Module):
    """phi's parallel transformer block: x + attention(h) + mlp(h), with h = LayerNorm(x)."""

    def __init__(self, config: Phi2Config, block_index: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config, block_index)
        self.mlp = MLP(config)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        h = self.input_layernorm(x)
        attended = self.resid_dropout(self.self_attn(h, cos, sin, layout))
        x = layout.select_queries(x)
        h = layout.select_queries(h)
        return add_branches(attended, self.resid_dropout(self.mlp(h)), x)


class PhiModel(nn.Module):
    """Everything but the output head; `model.` in the checkpoint's keys."""

    def __init__(self, config: Phi2Config):
        super().__init__()
        self.config = config
        # What the backward pass recomputes, with the same dropout, so that the forward
        # pass need not store it: whole transformer blocks (done here), or only
        # Layout.attend (done by the layout of train.batch_loss).
        self.recomputes_blocks = False
        self.recomputes_attention = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, index) for index in range(config.num_hidden_layers)
        )
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor, layout: Layout, last: int | None = None) -> Tensor:
        """Returns the hidden states (N, C) of ids (N,).

        With `last`, returns only those of the last `last` tokens of each row:
        (B * last, C).
        """
        # No position embedding is added to x: attention rotates q and k instead.
        x = self.embed_tokens(ids)
        cos, sin = rotary_tables(self.config, layout.positions, x.dtype)
        for block in self.layers:
            if last is not None and block is self.layers[-1]:
                layout = layout.only_last(last)
            if self.recomputes_blocks and torch.is_grad_enabled():
                # use_reentrant=True would lose gradients: the first x is from a
                # frozen embedding.
                x = recompute(block, x, cos, sin, layout, use_reentrant=False)
            else:
                x = block(x, cos, sin, layout)
        return self.final_layernorm(x)


class Phi2(nn.Module):
    """phi-2 with its output head."""

    def __init__(self, config: Phi2Config):
        super().__init__()
        self.config = config
        # Read by support/packing.py: whether generation on a GPU may use CUDA graphs.
        self.uses_graphs = True
        self.model = PhiModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(
        self, ids: Tensor, layout: Layout | None = None, last: int | None = None
    ) -> Tensor:
        """Returns the logits (N, vocabulary) of the token that follows each of ids (N,).

        Without a layout, the ids are one row. With `last`, returns logits only for the
        last `last` tokens of each row: (B * last, vocabulary).
        """
        if layout is None:
            layout = MaskedRows([len(ids)], device=ids.device)
        return self.lm_head(self.model(ids, layout, last))


@torch.no_grad()
def generate(model: Phi2, ids: list[int], count: int) -> list[int]:
    """Returns `count` ids that continue `ids`, always the likeliest next: greedy generation.

    Call model.eval() first, which turns dropout off. This is the simple way: each step runs
    the whole row again, and the end of text does not end it. eval.generate stores keys and
    values instead (support/packing.py).
    """
    device = model.lm_head.weight.device
    row = list(ids)
    for _ in range(count):
        logits = model(torch.tensor(row, device=device), last=1)
        row.append(int(logits.argmax()))
    return row[len(ids) :]


# -----------------------------------------------------------------------------
# Loading from a model directory or from the Hub

FILES = ["config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json"]

# Options of config.json that change the result but are not implemented. Only this value,
# or null, is accepted.
FIXED = {
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "hidden_act": "gelu_new",
    "qk_layernorm": False,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
# The defaults of transformers' PhiConfig for options that config.json leaves out.
ABSENT = {
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "layer_norm_eps": 1e-5,
    "resid_pdrop": 0.0,
}


def build(name: str | Path) -> Phi2:
    """Returns the model in a directory or of a Hub id, without weights, on the meta device."""
    config = read_config(locate(name))
    with torch.device("meta"):
        return Phi2(config)


def load_weights(
    model: Phi2,
    name: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> Phi2:
    """Loads a checkpoint into `model`, layer by layer, as `dtype` on `device`. Returns `model`.

    A layer here is a linear layer, a LayerNorm or the embedding. Its tensors are passed to
    its own `load_state_dict`. There a quantised layer quantises its weight, or uses it as it
    is if bitsandbytes has saved it in NF4.
    At its peak the memory holds the model and one layer's tensors, both as stored and as
    `dtype`. Raises ValueError for missing, unknown, misshapen or damaged tensors; the
    model is then unusable.
    """
    directory = locate(name)
    file_of = find_tensors(directory)
    with torch.device("meta"):  # a fresh model, because `model` may already have NF4 buffers
        expected = Phi2(model.config).state_dict().keys()
    check_keys(directory, file_of.keys(), expected)
    paths = dict.fromkeys(key.rpartition(".")[0] for key in expected)
    for path in tqdm(paths, "loading", unit="layer", leave=False, delay=2, disable=None):
        layer = model.get_submodule(path)
        try:
            tensors = read_layer(file_of, path, device, dtype)
            if "weight.absmax" in tensors and type(layer) is nn.Linear:
                raise ValueError("it is stored in NF4: use --quant nf4")
            layer.load_state_dict(tensors, assign=True)
        # These are RuntimeErrors too, but not the fault of the checkpoint.
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        # For example a shape that does not match config.json, or damaged bytes.
        except (LookupError, TypeError, RuntimeError, ValueError, SafetensorError) as error:
            if "allocate memory" in str(error):  # on a CPU full memory is a RuntimeError too
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"{directory}: {path} cannot be loaded: {reason}") from None
    return model


def check_keys(directory: Path, found: Set[str], expected: Set[str]) -> None:
    """Raises ValueError if a tensor is missing, or has no place in the model."""
    missing = expected - found
    if missing:
        text = f"{directory} lacks {len(missing)} of {len(expected)} tensors, among them "
        text += min(missing)
        if found - expected:  # others are there instead
            text += "; files from 2023 have other names: download the current ones from the Hub"
        raise ValueError(text)
    for key in found:
        # An NF4 weight comes with more tensors, such as q_proj.weight.absmax. Some
        # uploads also store rotary tables, which this file computes itself.
        path, separator, _ = key.partition(".weight.")
        is_of_nf4 = separator and f"{path}.weight" in expected
        if key not in expected and not is_of_nf4 and not key.endswith("inv_freq"):
            raise ValueError(f"{directory}: its config.json leaves no place for {key}")


def read_layer(
    file_of: dict[str, Path], path: str, device: str | torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Returns the tensors of a layer as `dtype`, by their names in the layer: weight and bias.

    A weight that the checkpoint stores in NF4 comes with more tensors, such as
    weight.absmax. The weight and these tensors are returned as stored, in the form that
    quant.NF4Linear loads.
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
        tensors[name] = tensor.to(dtype)  # after the move, so that a GPU converts
        # NaN if any number is NaN. Unlike isfinite() on all numbers, this
        # allocates no memory.
        low, high = tensors[name].aminmax()
        if not (low.isfinite() & high.isfinite()):
            raise ValueError(f"{name} holds numbers that are not finite in {dtype}")
    return tensors


def find_tensors(directory: Path) -> dict[str, Path]:
    """Returns the file that holds each tensor of a checkpoint, by key."""
    file_of = {}
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            file_of |= dict.fromkeys(file.keys(), path)
    return file_of


def read(path: Path, key: str) -> Tensor:
    # The file is opened again for each tensor, so that memory is freed after each.
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(key)


def not_quantized(directory: Path) -> tuple[str, ...]:
    """Returns the paths of the layers that should not be quantised: the output head.

    If the checkpoint is already in NF4, returns the paths of all modules whose weight is
    not in NF4 there.
    """
    keys = find_tensors(directory)
    # Decided from the tensors, because the config.json of a dequantised model may still
    # say that the model is in NF4.
    if not any(key.endswith(".weight.absmax") for key in keys):
        return ("lm_head",)
    weights = [key for key in keys if key.endswith(".weight") and f"{key}.absmax" not in keys]
    return tuple(key.removesuffix(".weight") for key in weights)


def weight_files(directory: Path) -> list[Path]:
    """Returns the safetensors files of a model directory.

    As in transformers, model.safetensors takes precedence over an index, which may be
    left from an earlier save. Raises ValueError if a file is damaged or missing.
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
                "other formats are not read: save the model with transformers' save_pretrained"
            ) from None
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise ValueError(f"{index} lists {name}, which is not there: download it again")
        try:
            with safe_open(directory / name, framework="pt"):
                pass  # opening it checks the header, which says how long the file must be
        except SafetensorError as error:
            raise ValueError(
                f"{directory / name} is damaged or cut short ({error}): download it again, "
                "or run `git lfs pull` in a git clone"
            ) from None
    return [directory / name for name in names]


def locate(name: str | Path) -> Path:
    """Returns the directory of a model: `name` itself, or the download from the Hub."""
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(str(name), allow_patterns=FILES))


def read_config(directory: Path) -> Phi2Config:
    """Returns the config in config.json of a model directory.

    Raises ValueError if the architecture is not phi, or if an option is not implemented.
    """
    path = directory / "config.json"
    raw = json.loads(path.read_bytes())
    if raw.get("model_type") != "phi":
        raise ValueError(
            f"{path}: model_type {raw.get('model_type')!r} is not supported, only 'phi' "
            "(phi-1, phi-1.5 and phi-2, as the Hub has had them since 2024)"
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
    """Returns config.json with rope_parameters' entries at the top level, as phi-2 has them."""
    for key in ("rope_scaling", "rope_parameters"):  # the second in transformers 5
        values = raw.get(key)
        if isinstance(values, dict):
            kind = values.get("rope_type", values.get("type", "default"))
            if kind != "default":
                raise ValueError(f"{path}: {key} of type {kind!r} is not supported")
            raw = raw | {key: None} | values
    return raw


def check_options(raw: dict, path: Path) -> None:
    """Raises ValueError if an option is set that is not implemented."""
    # Grouped-query attention has fewer key and value heads than query heads.
    accepted = FIXED | {"num_key_value_heads": raw.get("num_attention_heads")}
    for key, value in accepted.items():
        if raw.get(key, value) not in (value, None):
            raise ValueError(f"{path}: {key} = {raw[key]!r} is not supported, only {value!r}")


def check_sizes(config: Phi2Config) -> None:
    """Raises ValueError if a value is not a valid number, or if sizes do not fit together."""
    for field in fields(config):
        value = getattr(config, field.name)
        kinds = (int,) if field.type is int else (int, float)
        least = 1 if field.type is int else 0
        if type(value) not in kinds or not least <= value < math.inf:
            raise ValueError(f"{field.name} cannot be {value!r}")
    head_dim, rest = divmod(config.hidden_size, config.num_attention_heads)
    if rest:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not a multiple of "
            f"num_attention_heads {config.num_attention_heads}"
        )
    rotary_dim = config.rotary_dim()
    if rotary_dim % 2 or rotary_dim > head_dim:  # they are rotated in pairs
        raise ValueError(
            f"{rotary_dim} of a head's {head_dim} dimensions cannot be rotated; "
            f"it must be an even number, at most {head_dim}"
        )
