"""Many rows in one forward pass: without padding, behind a prefix, with a cache for generation.

phi2.py's model runs on flat tokens. It asks one object, the layout, where they stand and
what each of them sees. phi2.OneRow is the layout of a row by itself. This file has two more:
PackedRows for many rows at once, and NewTokens for the next token of each of them.

    layout = PackedRows([5, 3], prefix_length=51)      # ids: the prefix, then row after row
    logits = model(ids, layout, last=1)                # (2, vocabulary)

A test holds them equal to OneRow, row by row. In the comments N is the number of tokens in a
forward pass, B that of rows, and H that of heads, of D dimensions each.
"""

import copy
import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
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


@dataclass
class Cells:
    """Rows side by side in grids, (rows, width) each, as attention takes them.

    tokens: for each cell, grid after grid, which of the N tokens stands in it.
    places: (N,) the cell that is each token's own. Others are copies of it.
    shapes: (rows, width) of each grid.
    starts: how many tokens of the prefix stand first in each row of each grid.
    is_shared: whether rows share tokens, so that places leaves out cells of theirs.
    """

    tokens: Tensor
    places: Tensor
    shapes: list[tuple[int, int]]
    starts: list[int]
    is_shared: bool

    def put(self, x: Tensor) -> list[Tensor]:
        """Returns the grids (rows, width, H, D) that hold x (N, H, D)."""
        # (Of tokens that rows share the gradients are added up by index_select.)
        cells = x.index_select(0, self.tokens) if self.is_shared else Put.apply(x, self)
        return self.split(cells)

    def split(self, cells: Tensor) -> list[Tensor]:
        """Returns each grid's part of (all cells, H, D)."""
        parts = cells.split([rows * width for rows, width in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes)]

    def take(self, grids: list[Tensor]) -> Tensor:
        """Returns what stands in the tokens' own cells of the grids, (N, H, D)."""
        cells = [grid.flatten(0, 1) for grid in grids]
        return join(cells).index_select(0, self.places)


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
        for grid, start in zip(ctx.cells.split(grad), ctx.cells.starts):
            if start:
                total[:start] += grid[:, :start].sum(dim=0)
        return total, None


class PackedRows:
    """The layout of a prefix that all rows share (it may be empty), and of the rows behind it.

    Prefix and rows stand one behind another, without padding. With a prefix of two tokens
    and rows of two and one:

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

    In evaluation rows share more, because several hypotheses belong to one premise: then
    `token_of` is what `fold` returns, and a token that rows share is there once.

    Only for attention, the smallest part of the work, are the rows put side by side again,
    in grids. The prefix is a grid by itself. On a GPU all rows are the other one. On a CPU
    a grid has a few rows; where they come sorted by length, as in training and evaluation,
    little is padded.

    Attributes:
        lengths: how many tokens each row has behind the prefix.
        prefix_length: how many the prefix has.
        token_of: for each token of each row, row after row, which of the N it is.
        positions: (N,) each token's place in its own text.
        asking: which of the N tokens have a query; None where all have one.
        queries, keys: the grids' cells. The keys of each row have the prefix's before them.
        masks: of each grid, as `attention` takes it.
        cache: for generation, where keys and values are kept; else None.
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
        """
        `room` is how many tokens a generation may add to each row. With `recomputes` the
        backward pass computes attention again: then q, k and v are stored, and no grid is.
        """
        device = torch.device(device)
        self.lengths = lengths
        self.prefix_length = prefix_length
        self.token_of = prefix_length + torch.tensor(token_of or range(sum(lengths)))
        self.asking = None
        self.recomputes = recomputes
        self.cache = Cache(prefix_length + max(lengths), room) if room else None

        # The lengths of the rows in each grid, and where these rows begin.
        at_once = ROWS_AT_ONCE if device.type == "cpu" else len(lengths)
        groups = [lengths[first : first + at_once] for first in range(0, len(lengths), at_once)]
        starts = [prefix_length] * len(groups)
        if prefix_length:
            groups.insert(0, [prefix_length])
            starts.insert(0, 0)

        def mask_of(positions: Tensor, keys: int) -> Tensor | None:
            return None if device.type == "cuda" else causal_mask(positions.to(device), keys)

        # All indices are made on the CPU: for nonzero() a GPU would have to wait.
        prefix = torch.arange(prefix_length)
        tokens = torch.cat((prefix, self.token_of))  # of the prefix, and of row after row
        queries = []
        keys = []
        is_query = []
        is_key = []
        positions = []
        self.masks = []
        first = 0
        for group, start in zip(groups, starts):
            few = torch.tensor(group)[:, None]
            columns = torch.arange(max(group))
            is_own = columns < few  # (rows, width)
            # Behind a short row its last token is repeated. Nobody looks there.
            own = tokens[first + few.cumsum(0) - few + columns.minimum(few - 1)]
            queries.append(own)
            keys.append(torch.cat((prefix[:start].expand(len(few), -1), own), dim=1))
            is_query.append(is_own)
            is_key.append(F.pad(is_own, (start, 0)))
            positions.append((start + columns).expand_as(own)[is_own])
            self.masks.append(mask_of(start + columns[None], start + len(columns)))
            first += sum(group)

        # Of a token that several rows share the first cell is its own.
        is_new = tokens.cummax(0).values.diff(prepend=torch.tensor([-1])) > 0

        def make_cells(grids: list[Tensor], are_own: list[Tensor], starts: list[int]) -> Cells:
            places = flatten(are_own).nonzero()[is_new, 0]
            shapes = [tuple(grid.shape) for grid in grids]
            return Cells(
                tokens=flatten(grids).to(device, non_blocking=True),
                places=places.to(device, non_blocking=True),
                shapes=shapes,
                starts=starts,
                is_shared=not is_new.all(),
            )

        self.queries = make_cells(queries, is_query, [0] * len(starts))
        self.keys = make_cells(keys, is_key, starts)
        self.positions = torch.cat(positions)[is_new].to(device, non_blocking=True)

    def only_last(self, count: int) -> "PackedRows":
        """Returns the same rows, of which only the last `count` tokens each have a query."""
        if min(self.lengths) < count:
            raise ValueError(f"a row of {min(self.lengths)} tokens has no last {count}")
        device = self.positions.device
        lengths = torch.tensor(self.lengths)[:, None]
        last = torch.arange(-count, 0)
        asking = self.token_of[lengths.cumsum(0) + last].flatten()
        positions = self.prefix_length + lengths + last  # (B, count)
        narrowed = copy.copy(self)
        narrowed.asking = asking.to(device, non_blocking=True)
        shapes = self.keys.shapes[-len(self.row_counts()) :]
        narrowed.masks = [
            causal_mask(own.to(device, non_blocking=True), width)
            for own, (_, width) in zip(positions.split(self.row_counts()), shapes)
        ]
        return narrowed

    def row_counts(self) -> list[int]:
        """Returns how many rows each grid has, but for that of the prefix."""
        counts = [rows for rows, _ in self.keys.shapes]
        return counts[1:] if self.prefix_length else counts

    def select_queries(self, x: Tensor) -> Tensor:
        """Returns x (N, ...) of the tokens that have a query."""
        return x if self.asking is None else x.index_select(0, self.asking)

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
        keys = self.keys.put(k)
        values = self.keys.put(v)
        counts = self.row_counts()
        if self.cache is not None:
            self.cache.put((layer, "k"), keys[-len(counts) :])
            self.cache.put((layer, "v"), values[-len(counts) :])
        if self.asking is None:
            queries = self.queries.put(q)
        else:  # the same number of each row, and none of the prefix
            queries = q.unflatten(0, (sum(counts), -1)).split(counts)
            keys = keys[-len(counts) :]
            values = values[-len(counts) :]
        outputs = [attention(*grid) for grid in zip(queries, keys, values, self.masks)]
        if self.asking is None:
            return self.queries.take(outputs)
        return join(outputs).flatten(0, 1)


def flatten(grids: list[Tensor]) -> Tensor:
    return torch.cat([grid.flatten() for grid in grids])


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


class Cache:
    """The keys and values of all layers: (B, H, width, D), by (layer, "k") or (layer, "v").

    In memory each head's keys stand together, because one query at a time reads them.
    """

    def __init__(self, longest: int, room: int):
        """There is room for the longest row, with its prefix, and so many tokens behind it."""
        self.room = room
        # Up to a multiple of 16. Otherwise a GPU's kernel copies the mask into such a one, in
        # each layer.
        self.width = math.ceil((longest + room) / 16) * 16
        self.kept = {}

    def put(self, name: tuple[int, str], grids: list[Tensor]) -> None:
        """Keeps the keys, or the values, of rows in grids (rows, width, H, D)."""
        rows = [len(grid) for grid in grids]
        _, _, heads, head_dim = grids[0].shape
        kept = grids[0].new_empty(sum(rows), heads, self.width, head_dim)
        for part, grid in zip(kept.split(rows), grids):
            width = grid.shape[1]
            part[:, :, :width] = grid.transpose(1, 2)
            part[:, :, width:] = 0  # no query sees it, but 0 times what stands there must be 0
        self.kept[name] = kept

    def add(self, name: tuple[int, str], x: Tensor, places: Tensor) -> Tensor:
        """Writes x (B, H, D), of a new token of each row.

        Returns all that is kept, (B, width, H, D). `places` (B * H,) are the new ones' places
        in the cache as it lies in memory, (B * H * width, D).
        """
        kept = self.kept[name]
        kept.flatten(0, 2).index_copy_(0, places, x.flatten(0, 1))
        return kept.transpose(1, 2)

    def select(self, rows: Tensor) -> None:
        """Keeps the rows at these indices alone."""
        # One by one: the old and the new of all layers may not fit.
        for name, kept in self.kept.items():
            self.kept[name] = kept.index_select(0, rows)


class NewTokens:
    """The layout of one new token of each row, which sees what the cache holds of its row.

    Attributes:
        positions: (B,) each token's place in its own text.
        cache: the keys and values of the tokens before it.
        places: where the new ones go in the cache.
        mask: which of the cache's keys each token sees.
    """

    def __init__(self, positions: Tensor, cache: Cache):
        """`positions` are those of the rows' last tokens so far; `advance` comes next."""
        self.positions = positions
        self.cache = cache
        self.places = None
        self.mask = None

    def advance(self) -> None:
        """Goes on to the next token of each row.

        A CUDA graph can repeat it, because nothing is computed on the CPU, and because what
        counts is one tensor that changes in place: a repetition finds it one further.
        """
        self.positions += 1
        kept = self.cache.kept[0, "k"]
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
        keys = self.cache.add((layer, "k"), k, self.places)
        values = self.cache.add((layer, "v"), v, self.places)
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
        self.steps_left = rows.cache.room
        device = rows.positions.device
        self.records = model.uses_graphs and device.type == "cuda"
        last = torch.tensor(rows.lengths) + (rows.prefix_length - 1)
        self.layout = NewTokens(last.to(device, non_blocking=True), rows.cache)
        self.start(len(last))

    def start(self, rows: int) -> None:
        """Prepares for the first step of so many rows."""
        self.graph = None
        self.logits = None
        self.ids = self.layout.positions.new_zeros(rows)

    def keep(self, rows: list[int]) -> None:
        """Keeps the rows at these indices alone."""
        self.graph = None  # first, so that its memory is free
        indices = torch.tensor(rows).to(self.ids.device, non_blocking=True)
        self.layout.cache.select(indices)
        self.layout = NewTokens(self.layout.positions[indices], self.layout.cache)
        self.start(len(rows))

    def run(self, ids: list[int]) -> Tensor:
        """Returns the logits (B, vocabulary) after a new token of each row.

        They are good until the next step, which may write over them.
        """
        if not self.steps_left:
            room = self.layout.cache.room
            raise ValueError(f"there is no room for more than {room} new tokens")
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
        self.layout.advance()
        return self.model(self.ids, self.layout)
