"""phi-2 in one file: the model, what makes it fast, and loading.

Third in the reading order. The module names are those of transformers' `PhiForCausalLM`
(models/phi/modeling_phi.py), so `state_dict()` is the checkpoint on the Hub, key for key.
phi-1 and phi-1.5 differ only in config.json. Left out: long-context rotary scaling,
grouped-query attention (no phi has it), and the checkpoint layouts of 2023.

A transformer treats each token by itself; only attention lets tokens look at one another.
So the model runs on flat tokens, (N, C), and everything about rows is in one object,
`PackedRows`, which knows where each token stands and which tokens it sees. The first half
of this file can be read without it: think of one row, for which `packed.attend` is
softmax(q k^T / sqrt(D)) v under a causal mask, and `packed.select_asking(x)` is x.

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

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint as recompute  # activation checkpointing
from tqdm import tqdm

HAS_TRITON = find_spec("triton") is not None


@dataclass
class Phi2Config:
    """The fields of config.json that matter, under Hugging Face's names, with phi-2's values.

    What a config.json leaves out is not taken from here: ABSENT has transformers' values,
    and the sizes have to be there.
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

    def rotary_dim(self) -> int:
        """Returns how many dimensions of a head carry the position. They turn in pairs.

        Raises ValueError where the width cannot be cut into heads, and for an odd number.
        """
        head_dim, rest = divmod(self.hidden_size, self.num_attention_heads)
        if rest:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        rotary_dim = int(head_dim * self.partial_rotary_factor)
        if rotary_dim % 2:
            raise ValueError(
                f"{rotary_dim} of a head's {head_dim} dimensions cannot be rotated; "
                "it must be an even number of them"
            )
        return rotary_dim


def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns `function`, whose element-wise steps become one kernel where it runs on a GPU.

    Each step alone would read and write all of its tensors. torch.compile writes the kernel
    at the first call, which takes seconds; the number of tokens may change later. It needs
    Triton, which torch brings with it for CUDA on Linux, and a C compiler.
    """

    @functools.cache
    def compiled() -> Callable[..., Tensor]:
        # Where it fails, for want of a compiler or on an old GPU, it warns, and the function
        # runs as it is written. (The setting holds for the whole process.)
        torch._dynamo.config.suppress_errors = True
        # Each step rounds as it does alone: in bf16 the sum of three tensors is rounded twice.
        options = {"emulate_precision_casts": True}
        return torch.compile(function, dynamic=True, options=options)

    @functools.wraps(function)
    def run(*tensors: Tensor) -> Tensor:
        if tensors[0].is_cuda and HAS_TRITON:
            return compiled()(*tensors)
        return function(*tensors)

    return run


# -----------------------------------------------------------------------------
# The model. N tokens of C = hidden_size numbers each, in H heads of D = C / H dimensions


def rotary_tables(
    config: Phi2Config, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns cos and sin (N, 1, R / 2) of RoPE (arXiv:2104.09864) for tokens at `positions` (N,).

    R is the number of rotated dimensions of a head. The angles are computed in fp32.
    """
    rotary_dim = config.rotary_dim()
    # The first pair of dimensions turns by one radian a token, the last by 1 / rope_theta
    # or so.
    exponents = torch.arange(0, rotary_dim, 2, device=positions.device).float() / rotary_dim
    angles = positions[:, None, None].float() * config.rope_theta**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of dimensions (i, i + R / 2) of x (N, H, D) by its token's angle.

    The dimensions after the first R pass through.
    """
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


rotate_forward = fused(rotate)


@fused
def rotate_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate(grad, cos, -sin)


class Rotate(torch.autograd.Function):
    """Computes rotate(x, cos, sin). Backward turns the gradient back, by the same angles.

    Through a linear map gradients go back by its transpose. That of a rotation is the
    rotation by the negative angle, and it does not depend on x. So x is not stored.
    """

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate_forward(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate_back(grad, cos, sin), None, None


class Attention(nn.Module):
    """Causal self-attention with biases everywhere and rotary positions on a part of each head."""

    def __init__(self, config: Phi2Config, layer: int):
        super().__init__()
        size = config.hidden_size
        self.layer = layer  # its number, under which PackedRows keeps keys and values
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.dense = nn.Linear(size, size)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # (N, C) -> (N, H, D)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, packed: "PackedRows") -> Tensor:
        # Every token gives a key and a value. Only those whose output is wanted have a
        # query: all of them, but in the last block.
        q = self.split_heads(self.q_proj(packed.select_asking(h)))
        k = self.split_heads(self.k_proj(h))
        v = self.split_heads(self.v_proj(h))

        # q and k are each turned by their position, so their product depends on the distance
        # alone.
        q = Rotate.apply(q, packed.select_asking(cos), packed.select_asking(sin))
        k = Rotate.apply(k, cos, sin)

        # The one place where tokens see one another.
        attended = packed.attend(self.layer, q, k, v)
        return self.dense(attended.flatten(1))  # (N, H, D) -> (N, C)


class MLP(nn.Module):
    """Two linear layers with GELU (the tanh form) between them."""

    def __init__(self, config: Phi2Config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


@fused
def add(attended: Tensor, transformed: Tensor, x: Tensor) -> Tensor:
    # In bf16 the last bit depends on the order of this sum. It is transformers'.
    return attended + transformed + x


class Block(nn.Module):
    """phi's parallel block, x + attention(h) + mlp(h): both branches read the same LayerNorm."""

    def __init__(self, config: Phi2Config, layer: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, packed: "PackedRows") -> Tensor:
        h = self.input_layernorm(x)
        attended = self.resid_dropout(self.self_attn(h, cos, sin, packed))
        x = packed.select_asking(x)
        h = packed.select_asking(h)
        return add(attended, self.resid_dropout(self.mlp(h)), x)


class PhiModel(nn.Module):
    """Everything but the head; `model.` in the checkpoint's keys."""

    def __init__(self, config: Phi2Config):
        super().__init__()
        self.config = config
        # What is not stored in the forward pass, but computed again in the backward pass:
        # "none", "attention" or (whole) "blocks".
        self.checkpointing = "none"
        # Hugging Face's names from here on: they are the keys of the checkpoint.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor, packed: "PackedRows", last: int | None = None) -> Tensor:
        """Returns the hidden states (N, C) of ids (N,).

        With `last` only those of the last tokens of each row, `last` for each:
        (B * last, C).
        """
        # No position is added to x. Attention turns q and k instead.
        x = self.embed_tokens(ids)
        cos, sin = rotary_tables(self.config, packed.positions, x.dtype)
        packed.recomputes = self.checkpointing == "attention" and torch.is_grad_enabled()
        for block in self.layers:
            # In the last block only some tokens are wanted. The others give keys and values.
            if last is not None and block is self.layers[-1]:
                packed = packed.only_last(last)
            if self.checkpointing == "blocks" and torch.is_grad_enabled():
                x = recompute(block, x, cos, sin, packed, use_reentrant=False)
            else:
                x = block(x, cos, sin, packed)
        return self.final_layernorm(x)


class Phi2(nn.Module):
    """phi-2 with its head."""

    def __init__(self, config: Phi2Config):
        super().__init__()
        self.config = config
        self.uses_graphs = True  # whether a Decoder may record its steps on a GPU
        self.model = PhiModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(
        self, ids: Tensor, packed: "PackedRows | None" = None, last: int | None = None
    ) -> Tensor:
        """Returns the logits of the next token, (N, vocabulary), for each of ids (N,).

        Without `packed` the ids are one row. With `last` only the last tokens of each row
        have logits, `last` for each: (B * last, vocabulary).
        """
        if packed is None:
            packed = PackedRows([len(ids)], device=ids.device)
        return self.lm_head(self.model(ids, packed, last))


# -----------------------------------------------------------------------------
# What makes it fast: rows without padding, a shared prefix, a cache for generation
#
# A call is one forward pass. It has N tokens: P of a prefix, and those of B rows. The rows
# have M tokens together: N is P + M, or less where rows share tokens (Tree). A generation has
# a first call, of whole prompts, and then a call for each new token of the rows.


ROWS_AT_ONCE = 8  # in attention on a CPU


class Layout:
    """Says which token stands where in a grid, (rows, P + row_width, H, D).

    It holds indices alone; `put`, `take` and `fill` move the numbers. In each line of the
    grid the first P cells are the prefix's, and the next ones a row's. Behind a short row
    its last token is repeated: nobody looks there.

    Attributes:
        token_of: (M,) for each token of each row, row after row, its index among the tokens
            that `put` is given. On the CPU.
        sources: (rows * (P + row_width),) the same for each cell.
        cells: (M,) the cell of each token of each row, of none of the prefix.
        prefix_length: P.
        shape: (rows, P + row_width).
        span: a slice of the tokens, where the cells are just that: no prefix, no padding,
            nothing twice. The grid is then a view of them, and the indices stay on the CPU.
            Else None.
        is_tree: whether rows share tokens, so that their gradients have to be added up.
    """

    def __init__(
        self,
        token_of: Tensor,
        lengths: list[int],
        row_width: int,
        device: torch.device,
        prefix_length: int = 0,
        is_tree: bool = False,
    ):
        # All on the CPU: for nonzero() on a GPU it would have to wait.
        columns = torch.arange(row_width)
        row_lengths = torch.tensor(lengths)[:, None]
        starts = row_lengths.cumsum(0) - row_lengths
        own = token_of[starts + torch.minimum(columns, row_lengths - 1)]  # (rows, row_width)
        prefix = torch.arange(prefix_length).expand(len(lengths), -1)
        sources = torch.cat((prefix, own), dim=1)
        is_filled = F.pad(columns < row_lengths, (prefix_length, 0))

        self.token_of = token_of
        self.prefix_length = prefix_length
        self.is_tree = is_tree
        self.shape = sources.shape
        self.sources = sources.flatten()
        self.cells = is_filled.flatten().nonzero()[:, 0]
        self.span = None
        # (With a prefix, Put.backward writes into what `take` returns: it must be no view.)
        if not prefix_length and (self.sources.diff() == 1).all():
            self.span = slice(int(token_of[0]), int(token_of[-1]) + 1)
        else:
            self.sources = self.sources.to(device, non_blocking=True)
            self.cells = self.cells.to(device, non_blocking=True)

    def put(self, x: Tensor) -> Tensor:
        """Returns the grid that holds the tokens x (N, H, D)."""
        tokens = x[self.span] if self.span else x.index_select(0, self.sources)
        return tokens.unflatten(0, self.shape)

    def take(self, grid: Tensor) -> Tensor:
        """Returns what stands in the rows' `cells` of a grid, (M, H, D)."""
        flat = grid.flatten(0, 1)
        return flat if self.span else flat.index_select(0, self.cells)

    def fill(self, x: Tensor) -> Tensor:
        """Returns a grid that holds x (M, H, D) in the rows' `cells`, and zeros elsewhere."""
        if self.span:
            return x.unflatten(0, self.shape)
        grid = x.new_zeros(*self.shape, *x.shape[1:])
        grid.flatten(0, 1).index_copy_(0, self.cells, x)
        return grid


def join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)  # it would copy a single one


class Put(torch.autograd.Function):
    """Puts tokens, x (N, H, D), into a grid for each layout.

    A token may stand in several cells: the prefix stands in every line, and a token of a
    tree in several rows. Backward takes the gradients out of the same cells, and adds up
    those of one token.
    """

    @staticmethod
    def forward(ctx, layouts: list[Layout], x: Tensor) -> tuple[Tensor, ...]:
        ctx.layouts = layouts
        ctx.count = len(x)
        return tuple(layout.put(x) for layout in layouts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[None, Tensor]:
        # Row after row. Where the prefix has a layout of its own, which is the first, its
        # gradients stand before those of the rows.
        total = join([layout.take(grad) for layout, grad in zip(ctx.layouts, grads)])
        if any(layout.is_tree for layout in ctx.layouts):
            token_of = join([layout.token_of for layout in ctx.layouts]).to(total.device)
            zeros = total.new_zeros(ctx.count, *total.shape[1:])
            total = zeros.index_add_(0, token_of, total)
        elif len(total) < ctx.count:  # the prefix has no layout of its own
            total = F.pad(total, (0, 0, 0, 0, ctx.count - len(total), 0))
        for layout, grad in zip(ctx.layouts, grads):
            length = layout.prefix_length
            if length:
                total[:length] += grad[:, :length].sum(dim=0)
        return None, total


class Take(torch.autograd.Function):
    """Takes the tokens y (M, H, D) out of grids, a layout for each.

    Each is in one cell. Backward puts their gradients there, and zeros into all others.
    """

    @staticmethod
    def forward(ctx, layouts: list[Layout], *grids: Tensor) -> Tensor:
        ctx.layouts = layouts
        return join([layout.take(grid) for layout, grid in zip(layouts, grids)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, ...]:
        of_layouts = grad.split([len(layout.cells) for layout in ctx.layouts])
        return None, *[layout.fill(x) for layout, x in zip(ctx.layouts, of_layouts)]


@dataclass
class Part:
    """What attention computes at once: the prefix by itself, or rows that see it.

    On a GPU all rows are one part. On a CPU a part is a few rows, and its grids are as wide
    as its own longest row. Where rows come sorted by length, as in training and evaluation,
    most of the padding is gone.

    Attributes:
        keys: the layout of keys and of values, with the prefix in each line; None in later
            calls of a generation, where the cache has them.
        queries: the layout of the tokens that ask.
        key_width: how many keys a query sees at most.
        mask: (rows or 1, 1, T, key_width) for T queries a row: 0 where one sees a key, and
            -inf where not. None where `attention` knows without it: on a GPU, when all
            tokens of a call's rows ask.
    """

    keys: Layout | None
    queries: Layout
    key_width: int
    mask: Tensor | None


def first_part(
    token_of: Tensor,
    lengths: list[int],
    device: torch.device,
    prefix_length: int = 0,
    is_tree: bool = False,
) -> Part:
    """Returns the part of some rows in a first call, in which all of their tokens ask."""
    longest = max(lengths)
    key_width = prefix_length + longest
    keys = Layout(token_of, lengths, longest, device, prefix_length, is_tree)
    queries = Layout(token_of, lengths, longest, device, is_tree=is_tree)
    mask = None
    if device.type != "cuda":
        # All rows begin behind the prefix, so one mask serves them all.
        positions = torch.arange(prefix_length, key_width, device=device)
        mask = causal_mask(positions[None], key_width)
    return Part(keys, queries, key_width, mask)


def causal_mask(positions: Tensor, key_width: int) -> Tensor:
    """Returns the mask (rows or 1, 1, T, key_width) of queries at positions (rows or 1, T)."""
    keys = torch.arange(key_width, device=positions.device)
    is_later = keys > positions[:, None, :, None]
    return torch.zeros_like(is_later, dtype=torch.float32).masked_fill(is_later, -math.inf)


@dataclass
class Tree:
    """Rows whose common beginnings stand once, in the way of a tree that branches.

    The rows x y and x z have the ids x y z; token_of is 0 1 0 2, and firsts is 0 1 3.

    Attributes:
        ids: the distinct tokens. Two tokens are one when their rows are the same up to and
            including them.
        token_of: for each token of each row, row after row, its index among the ids.
        firsts: for each of the ids, the first place in token_of that has it.
    """

    ids: list[int]
    token_of: list[int]
    firsts: list[int]


def fold(rows: list[list[int]]) -> Tree:
    """Returns the tree of rows of ids.

    Its tokens need to go through a model once, because a token sees only what is before it.
    """
    index_of = {}  # (index of the token before, id) -> index, in the order of the indices
    token_of = []
    firsts = []
    for row in rows:
        before = None
        for token in row:
            index = index_of.setdefault((before, token), len(index_of))
            if index == len(firsts):  # a new one
                firsts.append(len(token_of))
            token_of.append(index)
            before = index
    return Tree([token for _, token in index_of], token_of, firsts)


class PackedRows:
    """Where the tokens of a flat batch stand, and which tokens each of them sees.

    The tokens of a first call are a prefix that all B rows share (it may be empty), then row
    after row, `lengths` tokens each, without padding. A prefix of two tokens and rows of
    two and one:

               P0 P1 a0 a1 b0
        P0      x                        a token sees the prefix and its own row, up to and
        P1      x  x                     including itself; the prefix sees no row, and no row
        a0      x  x  x                  sees another
        a1      x  x  x  x
        b0      x  x        x

    So the prefix runs through the model once for all rows. Its keys and values are what
    each row would have computed for itself, and the gradients that reach them are the sum
    over the rows: without dropout the result is that of whole prompts. (With dropout all
    rows share the mask that is drawn on the prefix.)

    In evaluation rows share more, because several hypotheses belong to one premise. With a
    `tree` the N tokens are the prefix and the tree's. For attention alone, which is the
    smallest part of the work, each row gets all of its own tokens back. So attention
    computes a token that rows share once for each of them, each time with the same result,
    of which the first is kept.

    A token *asks* when its output is wanted: it has a query. All tokens ask, but in the
    last block only those whose logits are wanted; the others give keys and values alone.

    Only for attention are the rows put side by side, in grids (Layout, Part).

    For generation, `room` is the number of tokens that may be added to each row. The keys
    and values of all layers are then kept, and a Decoder goes on token by token. That has
    no gradients.

    Attributes:
        lengths: tokens of each row in this call; the prefix is not counted.
        last_positions: (B,) the position of each row's last token.
        positions: (N,) the position of each token in its own text, for the rotary tables.
        token_of: (M,) for each token of each row, row after row: its index among the N.
        first_copies: of a tree, (N,) which of attention's P + M results are kept, one for
            each token; else None.
        asking_tokens: (A,) indices into the N tokens; None where all ask.
        prefix_parts: the prefix by itself, where its tokens are new and ask; else empty.
        row_parts: the rows, as attention takes them.
        recomputes: whether the backward pass computes attention again. Then q, k and v are
            stored as they are, and no grid is.
        room: how many tokens may be added to each row.
        cache: where there is room, what was kept, (B, H, cache_width, D), by (layer, "k") or
            (layer, "v").
        cache_width: how many tokens of a row it has room for, those of the prefix too.
        cache_layout: where the first call's tokens stand in it.
        head_starts: (B, H) the place of each head's first key in the cache, if it is seen as
            (B * H * cache_width, D).
        newest: (B * H,) the place in it of each head of each row's new token.
    """

    def __init__(
        self,
        lengths: list[int],
        prefix_length: int = 0,
        device: str | torch.device = "cpu",
        room: int = 0,
        tree: Tree | None = None,
    ):
        """The rows of a first call. A `tree` is that of the same rows."""
        device = torch.device(device)
        prefix = torch.arange(prefix_length)
        positions = torch.cat([torch.arange(length) for length in lengths]) + prefix_length
        token_of = torch.arange(prefix_length, prefix_length + len(positions))
        self.first_copies = None
        is_tree = tree is not None and len(tree.ids) < len(tree.token_of)
        if is_tree:
            token_of = prefix_length + torch.tensor(tree.token_of)
            firsts = torch.tensor(tree.firsts)
            positions = positions[firsts]
            first_copies = torch.cat((prefix, prefix_length + firsts))
            self.first_copies = first_copies.to(device, non_blocking=True)

        self.lengths = lengths
        last_positions = torch.tensor(lengths) + (prefix_length - 1)
        self.last_positions = last_positions.to(device, non_blocking=True)
        self.positions = torch.cat((prefix, positions)).to(device, non_blocking=True)
        self.token_of = token_of
        self.asking_tokens = None
        self.prefix_parts = []
        if prefix_length:
            self.prefix_parts = [first_part(prefix, [prefix_length], device)]
        self.row_parts = []
        at_once = ROWS_AT_ONCE if device.type == "cpu" else len(lengths)
        start = 0
        for first in range(0, len(lengths), at_once):
            few = lengths[first : first + at_once]
            end = start + sum(few)
            part = first_part(token_of[start:end], few, device, prefix_length, is_tree)
            self.row_parts.append(part)
            start = end
        self.recomputes = False
        self.room = room
        self.cache = {}
        self.head_starts = None
        self.newest = None
        if room:
            # Up to a multiple of 16. Otherwise a GPU's kernel copies the mask into such a
            # one, in each layer.
            self.cache_width = math.ceil((prefix_length + max(lengths) + room) / 16) * 16
            row_width = self.cache_width - prefix_length
            self.cache_layout = Layout(token_of, lengths, row_width, device, prefix_length)

    def select_asking(self, x: Tensor) -> Tensor:
        """Returns x (N, ...) of the tokens that ask, (A, ...)."""
        if self.asking_tokens is None:
            return x
        return x.index_select(0, self.asking_tokens)

    def only_last(self, count: int) -> "PackedRows":
        """Returns the same rows, of which only the last `count` tokens each ask."""
        if min(self.lengths) < count:
            raise ValueError(f"a row of {min(self.lengths)} tokens has no last {count}")
        device = self.positions.device
        row_stops = torch.tensor(self.lengths).cumsum(0)
        asking = self.token_of[row_stops[:, None] + torch.arange(-count, 0)].flatten()
        steps_back = torch.arange(1 - count, 1, device=device)
        positions = self.last_positions[:, None] + steps_back  # (B, count)

        narrowed = copy.copy(self)
        narrowed.asking_tokens = asking.to(device, non_blocking=True)
        narrowed.first_copies = None  # each row's own tokens ask, even where they are the same
        narrowed.prefix_parts = []
        narrowed.row_parts = []
        first = 0
        for part in self.row_parts:
            end = first + part.queries.shape[0]
            own = torch.arange(first * count, end * count)  # among those that ask
            queries = Layout(own, [count] * (end - first), count, device)
            mask = causal_mask(positions[first:end], part.key_width)
            narrowed.row_parts.append(Part(part.keys, queries, part.key_width, mask))
            first = end
        return narrowed

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns softmax(q k^T / sqrt(D)) v over the tokens that each asking token sees.

        k and v are (N, H, D); q and the result are (A, H, D).
        """
        if self.recomputes:
            # Attention has no dropout, so there is no random state to restore.
            options = {"use_reentrant": False, "preserve_rng_state": False}
            return recompute(self.attend_in_parts, layer, q, k, v, **options)
        return self.attend_in_parts(layer, q, k, v)

    def attend_in_parts(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = self.prefix_parts + self.row_parts
        layouts = [part.queries for part in parts]
        all_q = Put.apply(layouts, q)
        all_k = self.keys_seen((layer, "k"), k)
        all_v = self.keys_seen((layer, "v"), v)
        outputs = []
        for part, part_q, part_k, part_v in zip(parts, all_q, all_k, all_v):
            if part.mask is not None and q.device.type != "cpu":
                # A GPU wants it in this dtype. It is stored, so it is converted once for all
                # layers.
                part.mask = part.mask.to(q.dtype)
            outputs.append(attention(part_q, part_k, part_v, part.mask))
        y = Take.apply(layouts, *outputs)
        return y if self.first_copies is None else y.index_select(0, self.first_copies)

    def keys_seen(self, name: tuple[int, str], x: Tensor) -> tuple[Tensor, ...]:
        """Returns the keys, or the values, that each part sees, (rows, key_width, H, D).

        x (N, H, D) are those of this call.
        """
        if self.room:
            kept = self.remember(name, x)
            # One part sees the cache as it is. Of several, in a CPU's first call, each has a
            # grid of its own width.
            if len(self.row_parts) == 1:
                of_prefix = [part.keys.put(x) for part in self.prefix_parts]
                return (*of_prefix, kept[:, : self.row_parts[0].key_width])
        return Put.apply([part.keys for part in self.prefix_parts + self.row_parts], x)

    def remember(self, name: tuple[int, str], x: Tensor) -> Tensor:
        """Keeps x under its name. Returns all that is kept there, (B, cache_width, H, D).

        Later calls write behind what each row has. In memory each head's keys stand
        together, (B, H, cache_width, D), because one query at a time reads them.
        """
        if name in self.cache:
            flat = self.cache[name].flatten(0, 2)  # a view, (B * H * cache_width, D)
            flat.index_copy_(0, self.newest, x.flatten(0, 1))
        else:
            self.cache[name] = self.cache_layout.put(x).transpose(1, 2).contiguous()
        return self.cache[name].transpose(1, 2)

    def for_decoding(self, rows: list[int]) -> "PackedRows":
        """Returns the rows at these indices for calls that take one new token of each.

        `next_token` has to come before each of those calls. Both objects have one cache,
        which now loses its other rows: this object must not be used again.
        """
        device = self.positions.device
        indices = torch.tensor(rows).to(device, non_blocking=True)
        following = copy.copy(self)
        following.lengths = [1] * len(rows)
        following.last_positions = self.last_positions[indices]
        following.token_of = torch.arange(len(rows))
        following.first_copies = None  # the new tokens are each row's own
        queries = Layout(following.token_of, following.lengths, 1, device)
        following.prefix_parts = []
        following.row_parts = [Part(None, queries, self.cache_width, mask=None)]
        heads = self.cache[0, "k"].shape[1]
        head_starts = torch.arange(len(rows) * heads, device=device) * self.cache_width
        following.head_starts = head_starts.view(-1, heads)
        if rows != list(range(len(self.lengths))):
            # One by one: the old and the new of all layers may not fit.
            for name, kept in self.cache.items():
                self.cache[name] = kept[indices]
        return following

    def next_token(self) -> None:
        """Goes on to the next token of each row.

        A CUDA graph can repeat it, because nothing is computed on the CPU, and because what
        counts is one tensor that changes in place: a repetition finds it one further.
        """
        self.last_positions += 1
        self.positions = self.last_positions
        self.newest = (self.head_starts + self.last_positions[:, None]).flatten()
        self.row_parts[0].mask = causal_mask(self.last_positions[:, None], self.cache_width)


class Decoder:
    """Generation after a first call: runs the model on one new token of each row at a time.

    On a GPU such a step is hundreds of kernels, each shorter than Python takes to launch
    it. So when the same rows take a second step, it is recorded as a CUDA graph, and from
    then on the GPU repeats it at one launch. A repetition does the same with the same
    memory: it reads the ids, the weights, the cache and the rows' last positions, writes
    into the cache, moves those positions on, and leaves the logits. The first step cannot
    be recorded, because kernels are loaded at their first use, which a recording forbids.

    Attributes:
        steps_left: for how many steps there is room.
        records: whether steps are recorded.
        ids: (B,) the new tokens.
        logits: (B, vocabulary) what follows them; None before the first step of these rows.
        graph: the recorded step, once there is one.
    """

    def __init__(self, model: Phi2, packed: PackedRows):
        """`packed` has room, and has been in the model's first call, without gradients."""
        self.model = model
        self.packed = packed
        self.steps_left = packed.room
        self.records = model.uses_graphs and packed.positions.is_cuda
        self.keep(list(range(len(packed.lengths))))

    def keep(self, rows: list[int]) -> None:
        """Keeps the rows at these indices alone."""
        self.graph = None  # first, so that its memory is free
        self.logits = None
        self.packed = self.packed.for_decoding(rows)
        self.ids = torch.zeros_like(self.packed.last_positions)

    def run(self, ids: list[int]) -> Tensor:
        """Returns the logits (B, vocabulary) after a new token of each row.

        They are good until the next step, which may write over them.
        """
        if not self.steps_left:
            raise ValueError(f"there is no room for more than {self.packed.room} new tokens")
        self.steps_left -= 1
        self.ids.copy_(torch.tensor(ids), non_blocking=True)
        if self.records and self.logits is not None and self.graph is None:
            self.record()
        if self.graph is None:
            self.logits = self.step()
        else:
            self.graph.replay()
        return self.logits

    def record(self) -> None:
        """Records a step, without running it. Where that fails, steps are run one by one."""
        try:
            graph = torch.cuda.CUDAGraph()
            # In here kernels are recorded, and none runs. Other threads may go on meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self.step()
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph, so generation is slower: {error}", stacklevel=2)
            self.records = False
            self.model.uses_graphs = False
        else:
            self.graph = graph

    def step(self) -> Tensor:
        self.packed.next_token()
        return self.model(self.ids, self.packed)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Returns softmax(q k^T / sqrt(D) + mask) v, (B, T, H, D).

    q is (B, T, H, D), for T tokens that ask in each row, k and v are (B, S, H, D). mask is
    (B or 1, 1, T, S). On a GPU it may be None: then the last query sees all keys, and each
    query before it one key less. Its kernels know this form, and need no mask in memory.
    """
    q = q.transpose(1, 2)  # (B, H, T, D)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    # On a CPU torch's fused kernel is faster than two products and a softmax in fp32 forward,
    # but slower in bf16 and backward.
    is_fast_on_cpu = q.dtype is torch.float32 and not torch.is_grad_enabled()
    if q.device.type != "cpu" or is_fast_on_cpu:
        if mask is None:
            mask = causal_lower_right(q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    # All is in fp32, as within the kernel.
    attention_scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(2, 3)
    weights = attention_scores.add_(mask).softmax(dim=-1)
    return (weights @ v.float()).to(v.dtype).transpose(1, 2)


# -----------------------------------------------------------------------------
# Loading: a model directory, or a model on the Hub

FILES = ["config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json"]

# Options of config.json that change the result and are not implemented, with the one value
# that is accepted, beside null.
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
    config.rotary_dim()  # an error now, and not after the weights are loaded
    with torch.device("meta"):
        return Phi2(config)


def load_weights(
    model: Phi2,
    name: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> Phi2:
    """Streams a checkpoint into `model`, layer by layer, as `dtype` on `device`.

    The tensors of a layer go to its own `load_state_dict`, where a quantised layer quantises
    its weight: at the peak the memory holds the model and one layer's tensors, as they are
    stored and as `dtype`. A weight that is in NF4 already is not quantised again. Raises
    ValueError for missing, unknown, misshapen or damaged tensors; the model is then unusable.
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
            if "absmax" in tensors:
                is_plain_nf4 = getattr(layer, "double_quant", None) is False
                if not is_plain_nf4:
                    raise ValueError("it is in NF4: --quant nf4 without --double-quant reads it")
                layer.dtype = dtype  # packed indices do not say it
            layer.load_state_dict(tensors, assign=True)
        except torch.OutOfMemoryError:  # a RuntimeError too, and not the checkpoint's fault
            raise
        # Such as a shape that is not config.json's, or damaged bytes.
        except (LookupError, TypeError, RuntimeError, ValueError, SafetensorError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"{directory}: {path} cannot be loaded: {reason}") from None
    return model


def check_keys(directory: Path, found: Set[str], expected: Set[str]) -> None:
    """Raises ValueError where a tensor is missing, or has no place in the model."""
    missing = expected - found
    if missing:
        raise ValueError(
            f"{directory} lacks {len(missing)} of {len(expected)} tensors, "
            f"among them {min(missing)}"
        )
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
    """Returns the tensors of a layer by their names in it: weight and bias.

    Of a layer that the checkpoint holds in NF4 they are weight, absmax and bias.
    """
    parts = {}
    for key, file in file_of.items():
        if key.startswith(f"{path}."):
            parts[key.removeprefix(f"{path}.")] = read(file, key).to(device)
    tensors = {}
    if "weight.absmax" in parts:
        tensors = read_nf4(parts)
        parts = {"bias": parts["bias"]}  # all others belong to the weight
    for name, tensor in parts.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} holds {tensor.dtype}, not floating-point numbers")
        tensors[name] = tensor.to(dtype)  # only now, so that a GPU converts
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ValueError(f"{name} holds numbers that are not finite in {tensor.dtype}")
    return tensors


def read_nf4(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a weight that bitsandbytes has quantised, as the buffers of quant.NF4Linear."""
    state = json.loads(bytes(parts["weight.quant_state.bitsandbytes__nf4"].tolist()))
    if state["blocksize"] != 64:
        raise ValueError(f"its NF4 has blocks of {state['blocksize']} weights, not of 64")
    absmax = parts["weight.absmax"]
    if "nested_offset" in state:  # double quantisation: absmax is in 8 bits
        levels = parts["weight.nested_quant_map"][absmax.long()]
        nested_absmax = parts["weight.nested_absmax"].float()
        scales = nested_absmax.repeat_interleave(state["nested_blocksize"])
        absmax = levels * scales[: len(levels)] + state["nested_offset"]
    # Some uploads store the packed indices under another dtype, with the same bits.
    packed = parts["weight"].view(torch.uint8).reshape(-1, 1)
    return {"weight": packed, "absmax": absmax.float()}


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

    Of a checkpoint that is in NF4 already it is whatever has a weight of another form there.
    """
    keys = find_tensors(directory)
    # Asked of the tensors: a dequantised model's config.json may still say that it is in NF4.
    if not any(key.endswith(".weight.absmax") for key in keys):
        return ("lm_head",)
    weights = [key for key in keys if key.endswith(".weight") and f"{key}.absmax" not in keys]
    return tuple(key.removesuffix(".weight") for key in weights)


def weight_files(directory: Path) -> list[Path]:
    """Returns the safetensors files of a model directory.

    As in transformers, model.safetensors comes before an index, which may be that of an
    earlier save.
    """
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    index = json.loads((directory / "model.safetensors.index.json").read_bytes())
    return [directory / name for name in sorted(set(index["weight_map"].values()))]


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
    # Grouped-query attention has fewer heads for keys and values than for queries.
    accepted = FIXED | {"num_key_value_heads": raw.get("num_attention_heads")}
    for key, value in accepted.items():
        if raw.get(key, value) not in (value, None):
            raise ValueError(f"{path}: {key} = {raw[key]!r} is not supported, only {value!r}")

    values = ABSENT | {key: value for key, value in raw.items() if value is not None}
    names = [field.name for field in fields(Phi2Config)]
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return Phi2Config(**{name: values[name] for name in names})


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
