"""Many rows in one forward pass: without padding, behind a prefix, with a cache for generation.

phi2.py's model runs on flat tokens. It asks one object, the layout, where they stand and
what each of them sees. phi2.MaskedRows says it by one mask. This file has two more: PackedRows,
which does the same without the empty part of the mask, and NewTokens for the next token of each
row.

    layout = PackedRows([5, 3], prefix_length=51)      # ids: the prefix, then row after row
    logits = model(ids, layout, last=1)                # (2, vocabulary)

Tests hold them equal to MaskedRows. In the comments N is the number of tokens in a forward
pass, B that of rows, and H that of heads, of D dimensions each.
"""

import copy
import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as recompute  # activation checkpointing

ROWS_AT_ONCE = 8  # in attention on a CPU


def fold(rows: list[list[int]]) -> tuple[list[int], list[int]]:
    """Returns the distinct tokens of rows that may begin alike, and which of them each row has.

    Two tokens are one when their rows are the same up to and including them. They need to go
    through a model once, because a token sees only what is before it. The rows x y and x z
    have the ids x y z. The second list says which of them stand in the rows, row after row:
    0 1 0 2.
    """
    index_of = {}  # (index of the token before, id) -> index, in the order of the indices
    token_of = []
    for row in rows:
        before = None
        for token in row:
            before = index_of.setdefault((before, token), len(index_of))
            token_of.append(before)
    return [token for _, token in index_of], token_of


# -----------------------------------------------------------------------------
# Whole rows


class PackedRows:
    """The layout of a prefix that all rows share (it may be empty), and of the rows behind it.

    Who sees whom is as in phi2.MaskedRows, whose picture shows it. The prefix's keys and values
    are what each row would have computed for itself, and the gradients that reach them are the
    sum over the rows: without dropout the result is that of whole prompts. (With dropout all
    rows share what is drawn on the prefix.)

    In evaluation rows share more, because several hypotheses belong to one premise: then
    `token_of` is what `fold` returns, and a token that rows share is there once.

    Only for attention, the smallest part of the work, are the rows put side by side again,
    in grids (rows, width). The prefix is a grid by itself, the first. On a GPU all rows are
    the other one. On a CPU a grid has a few rows; where they come sorted by length, as in
    training and evaluation, little is padded.

    Attributes:
        rows: which of the N tokens each row has behind the prefix.
        positions: (N,) each token's place in its own text.
        queries, keys: which token stands where in the grids. In those of the keys the
            prefix stands before each row.
        masks: of each grid, as `attention` takes it.
        recomputes: whether the backward pass computes attention again. Then q, k and v are
            stored, and no grid is.
        new_tokens: the layout with which a generation goes on, if there is room for any.
    """

    def __init__(
        self,
        lengths: list[int],
        prefix_length: int = 0,
        device: str | torch.device = "cpu",
        token_of: list[int] | None = None,
        room: int = 0,
        recomputes: bool = False,
    ):
        """`lengths` are those of the rows; a generation may add `room` tokens to each."""
        # Indices are made on the CPU and then moved. To make them on a GPU is to wait for it.
        device = torch.device(device)
        prefix = torch.arange(prefix_length)
        own = prefix_length + torch.tensor(token_of or range(sum(lengths)))
        self.rows = own.split(lengths)
        ends = prefix_length + torch.tensor(lengths)
        positions = torch.arange(int(own.max()) + 1)
        positions[own] = torch.cat([torch.arange(prefix_length, end) for end in ends.tolist()])
        self.positions = positions.to(device, non_blocking=True)
        self.recomputes = recomputes
        self.new_tokens = NewTokens(ends - 1, room, device) if room else None

        queries = [prefix[None]] if prefix_length else []
        keys = list(queries)
        at_once = ROWS_AT_ONCE if device.type == "cpu" else len(lengths)
        for first in range(0, len(lengths), at_once):
            # Behind a short row stands token 0. Nobody looks there.
            grid = pad_sequence(self.rows[first : first + at_once], batch_first=True)
            queries.append(grid)
            keys.append(torch.cat((prefix.expand(len(grid), -1), grid), dim=1))
        is_shared = len(positions) < prefix_length + len(own)
        self.queries = Cells(queries, 0, is_shared, device)
        self.keys = Cells(keys, prefix_length, is_shared, device)
        self.masks = []
        for (_, width), (_, seen) in zip(self.queries.shapes, self.keys.shapes):
            in_grid = torch.arange(seen - width, seen, device=device)[None]
            self.masks.append(None if device.type == "cuda" else causal_mask(in_grid, seen))

    def only_last(self, count: int) -> "PackedRows":
        shortest = min(map(len, self.rows))
        if shortest < count:
            raise ValueError(f"a row of {shortest} tokens has no last {count}")
        device = self.positions.device
        last = torch.stack([row[-count:] for row in self.rows])  # (B, count)
        shapes = self.keys.behind_prefix(self.keys.shapes)
        narrowed = copy.copy(self)
        narrowed.queries = LastTokens(last.to(device, non_blocking=True), shapes)
        positions = narrowed.queries.put(narrowed.select_queries(self.positions))
        narrowed.masks = [causal_mask(own, seen) for own, (_, seen) in zip(positions, shapes)]
        return narrowed

    def select_queries(self, x: Tensor) -> Tensor:
        """Returns those lines of x (N, ...) whose tokens have a query."""
        return self.queries.select(x)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns softmax(q k^T / sqrt(D)) v over the tokens that each query sees.

        k and v are (N, H, D); q and the result have a line for each token with a query.
        """
        if self.recomputes and torch.is_grad_enabled():
            # Attention has no dropout, so there is no random state to restore.
            options = {"use_reentrant": False, "preserve_rng_state": False}
            return recompute(self.attend_in_grids, layer, q, k, v, **options)
        return self.attend_in_grids(layer, q, k, v)

    def attend_in_grids(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries = self.queries.put(q)
        keys = self.keys.put(k)
        values = self.keys.put(v)
        if self.new_tokens is not None:
            self.new_tokens.keep((layer, "k"), self.keys.behind_prefix(keys))
            self.new_tokens.keep((layer, "v"), self.keys.behind_prefix(values))
        if len(queries) < len(keys):  # the prefix has none
            keys = self.keys.behind_prefix(keys)
            values = self.keys.behind_prefix(values)
        outputs = [attention(*grid) for grid in zip(queries, keys, values, self.masks)]
        return self.queries.take(outputs)


class Cells:
    """The cells of grids, one grid after another, and which of the N tokens stands in each.

    Attributes:
        tokens: (cells,) the token in each cell.
        places: (N,) each token's own cell, the first that it stands in. Others are copies.
        shapes: (rows, width) of each grid.
        prefix_length: how many tokens of the prefix stand first in each row, but for the
            first grid, which is the prefix itself.
        is_shared: whether rows share tokens behind the prefix.
    """

    def __init__(
        self, grids: list[Tensor], prefix_length: int, is_shared: bool, device: torch.device
    ):
        tokens = torch.cat([grid.flatten() for grid in grids])
        places = torch.empty(int(tokens.max()) + 1, dtype=torch.long)
        cells = torch.arange(len(tokens))
        places.scatter_reduce_(0, tokens, cells, "amin", include_self=False)
        self.tokens = tokens.to(device, non_blocking=True)
        self.places = places.to(device, non_blocking=True)
        self.shapes = [tuple(grid.shape) for grid in grids]
        self.prefix_length = prefix_length
        self.is_shared = is_shared

    def select(self, x: Tensor) -> Tensor:
        return x  # every token has a query

    def put(self, x: Tensor) -> list[Tensor]:
        """Returns the grids (rows, width, H, D) that hold x (N, H, D)."""
        # (Of tokens that rows share the gradients are added up by index_select.)
        cells = x.index_select(0, self.tokens) if self.is_shared else Put.apply(x, self)
        return self.split(cells)

    def split(self, cells: Tensor) -> list[Tensor]:
        """Returns each grid's part of (all cells, H, D)."""
        parts = cells.split([rows * width for rows, width in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes)]

    def behind_prefix(self, grids: list) -> list:
        """Returns the grids of rows, without that of the prefix."""
        return grids[1:] if self.prefix_length else grids

    def take(self, grids: list[Tensor]) -> Tensor:
        """Returns what stands in the tokens' own cells of the grids, (N, H, D)."""
        return join([grid.flatten(0, 1) for grid in grids]).index_select(0, self.places)


class Put(torch.autograd.Function):
    """Puts x (N, H, D) into cells, as x.index_select(0, cells.tokens) does.

    Its backward pass would add up what comes from each cell of a token: zeros from behind
    short rows, and a gradient of the prefix from each row, rounded each time. This one takes
    each token's gradient from its own cell, and adds up the prefix's in one sum.
    """

    @staticmethod
    def forward(ctx, x: Tensor, cells: Cells) -> Tensor:
        ctx.cells = cells
        return x.index_select(0, cells.tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.index_select(0, ctx.cells.places)
        length = ctx.cells.prefix_length
        if length:
            for grid in ctx.cells.behind_prefix(ctx.cells.split(grad)):
                total[:length] += grid[:, :length].sum(dim=0)
        return total, None


class LastTokens:
    """Stands for the queries' `Cells` where each row's last tokens alone have a query.

    It is the same number of tokens in each row, so the grids have no padding, and whatever
    has a line for each query has them row by row already.
    """

    def __init__(self, tokens: Tensor, shapes: list[tuple[int, int]]):
        """`tokens` (B, count) are these tokens, `shapes` those of the rows' grids."""
        self.tokens = tokens
        self.rows_of_grids = [rows for rows, _ in shapes]

    def select(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.tokens.flatten())

    def put(self, x: Tensor) -> list[Tensor]:
        return x.unflatten(0, self.tokens.shape).split(self.rows_of_grids)

    def take(self, grids: list[Tensor]) -> Tensor:
        return join(grids).flatten(0, 1)


def join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)  # it would copy a single one


def causal_mask(positions: Tensor, keys: int) -> Tensor:
    """Returns the mask (rows or 1, 1, T, keys) of queries at positions (rows or 1, T).

    It is 0 where a query sees a key, and -inf where the key is later.
    """
    is_later = torch.arange(keys, device=positions.device) > positions[:, None, :, None]
    return torch.zeros_like(is_later, dtype=torch.float32).masked_fill(is_later, -math.inf)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Returns softmax(q k^T / sqrt(D) + mask) v, (rows, T, H, D).

    q is (rows, T, H, D), k and v are (rows, keys, H, D). On a GPU the mask may be None: then
    each row's T queries are the last of its keys. Its kernels know that form, and need no
    mask in memory.
    """
    q = q.transpose(1, 2)  # (rows, H, T, D)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    # On a CPU torch's fused kernel is faster than two products and a softmax in fp32 forward,
    # but slower in bf16 and backward.
    is_fast_on_cpu = q.dtype is torch.float32 and not torch.is_grad_enabled()
    if q.device.type != "cpu" or is_fast_on_cpu:
        if mask is None:
            mask = causal_lower_right(q.shape[2], k.shape[2])
        elif q.device.type != "cpu":
            mask = mask.to(q.dtype)  # a GPU's kernels want it so
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    # All is in fp32, as within the kernel.
    attention_scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(2, 3)
    weights = attention_scores.add_(mask).softmax(dim=-1)
    return (weights @ v.float()).to(v.dtype).transpose(1, 2)


# -----------------------------------------------------------------------------
# Generation


class NewTokens:
    """The layout of one new token of each row, which sees the tokens before it in its row.

    Their keys and values are kept: (B, H, width, D), by (layer, "k") or (layer, "v"). In
    memory each head's keys stand together, because one query at a time reads them.

    Attributes:
        positions: (B,) each token's place in its own text.
        room: how many tokens a row may get.
        width: of the longest row, with its prefix and this room.
        kept: keys and values of all layers.
        places: where the new ones go in each of `kept`, as it lies in memory.
        mask: which of the keys each token sees.
    """

    def __init__(self, positions: Tensor, room: int, device: torch.device):
        """`positions` are those of the rows' last tokens so far; `advance` comes next."""
        self.positions = positions.to(device, non_blocking=True)
        self.room = room
        # Up to a multiple of 16. Otherwise a GPU's kernel copies the mask into such a one, in
        # each layer.
        self.width = math.ceil((int(positions.max()) + 1 + room) / 16) * 16
        self.kept = {}
        self.places = None
        self.mask = None

    def keep(self, name: tuple[int, str], grids: list[Tensor]) -> None:
        """Keeps the keys, or the values, of whole rows in grids (rows, width, H, D)."""
        rows = [len(grid) for grid in grids]
        _, _, heads, head_dim = grids[0].shape
        kept = grids[0].new_empty(sum(rows), heads, self.width, head_dim)
        for part, grid in zip(kept.split(rows), grids):
            width = grid.shape[1]
            part[:, :, :width] = grid.transpose(1, 2)
            part[:, :, width:] = 0  # no query sees it, but 0 times what stands there must be 0
        self.kept[name] = kept

    def select_rows(self, rows: Tensor) -> None:
        """Goes on with the rows at these indices alone."""
        self.positions = self.positions[rows]
        # One by one: the old and the new of all layers may not fit.
        for name, kept in self.kept.items():
            self.kept[name] = kept.index_select(0, rows)

    def advance(self) -> None:
        """Goes on to the next token of each row.

        A CUDA graph can repeat it, because nothing is computed on the CPU, and because what
        counts is one tensor that changes in place: a repetition finds it one further.
        """
        self.positions += 1
        kept = self.kept[0, "k"]
        rows, heads, width, _ = kept.shape
        starts = torch.arange(0, rows * heads * width, width, device=kept.device)
        self.places = (starts.view(rows, heads) + self.positions[:, None]).flatten()
        self.mask = causal_mask(self.positions[:, None], width)
        if kept.is_cuda:
            self.mask = self.mask.to(kept.dtype)  # once for all layers

    def only_last(self, _count: int) -> "NewTokens":
        return self

    def select_queries(self, x: Tensor) -> Tensor:
        return x

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns what PackedRows.attend does; q, k, v and the result are (B, H, D)."""
        keys = self.kept[layer, "k"]
        values = self.kept[layer, "v"]
        keys.flatten(0, 2).index_copy_(0, self.places, k.flatten(0, 1))
        values.flatten(0, 2).index_copy_(0, self.places, v.flatten(0, 1))
        keys = keys.transpose(1, 2)  # (B, width, H, D)
        values = values.transpose(1, 2)
        return attention(q[:, None], keys, values, self.mask)[:, 0]


class Decoder:
    """Runs the model on one new token of each row at a time, behind whole rows.

    On a GPU such a step is hundreds of kernels, each shorter than Python takes to launch
    it. So when the same rows take a second step, it is recorded as a CUDA graph, and from
    then on the GPU repeats it at one launch. A repetition does the same with the same
    memory: it reads the ids, the weights, the cache and the positions, writes into the
    cache, moves the positions on, and leaves the logits. The first step cannot be recorded,
    because kernels are loaded at their first use, which a recording forbids.

    Attributes:
        records: whether steps are recorded.
        steps_left: for how many steps there is room.
        layout: where the new tokens stand.
        ids: (B,) the new tokens.
        logits: (B, vocabulary) what follows them; None before the first step of these rows.
        graph: the recorded step, once there is one.
    """

    def __init__(self, model: nn.Module, rows: PackedRows):
        """`rows` have room, and have been in the model's forward pass, without gradients."""
        self.model = model
        self.layout = rows.new_tokens
        self.steps_left = self.layout.room
        self.records = model.uses_graphs and rows.positions.is_cuda
        self.ids = torch.zeros_like(self.layout.positions)
        self.logits = None
        self.graph = None

    def keep(self, rows: list[int]) -> None:
        """Keeps the rows at these indices alone. Their next step is the first of these rows."""
        self.graph = None  # before all else, so that its memory is free
        self.logits = None
        self.layout.select_rows(torch.tensor(rows).to(self.ids.device, non_blocking=True))
        self.ids = torch.zeros_like(self.layout.positions)

    def run(self, ids: list[int]) -> Tensor:
        """Returns the logits (B, vocabulary) after a new token of each row.

        They are good until the next step, which may write over them.
        """
        if not self.steps_left:
            raise ValueError(f"there is no room for more than {self.layout.room} new tokens")
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
        stream = torch.cuda.current_stream()
        try:
            graph = torch.cuda.CUDAGraph()
            # In here kernels are recorded, and none runs. Other threads may go on meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self.step()
        except RuntimeError as error:
            # torch leaves the stream of a recording that has failed as the current one.
            torch.cuda.set_stream(stream)
            if isinstance(error, torch.OutOfMemoryError):
                raise  # fewer rows may fit, and be recorded
            warnings.warn(f"no CUDA graph, so generation is slower: {error}", stacklevel=2)
            self.records = False
            self.model.uses_graphs = False
        else:
            self.graph = graph

    def step(self) -> Tensor:
        self.layout.advance()
        return self.model(self.ids, self.layout)
