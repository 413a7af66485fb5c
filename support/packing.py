"""Many rows in one forward pass: without padding, with a shared prefix, and a cache to generate.

The model in phi2.py runs on a flat sequence of tokens. A layout holds their positions and defines
what each of them sees. phi2.MaskedRows does this with one mask. This file has two more layouts:
PackedRows computes the same without the empty part of the mask, and NewTokens is for the next
token of each row in generation.

    layout = PackedRows([5, 3], prefix_length=51)      # ids: the prefix, then row after row
    logits = model(ids, layout, last=1)                # (2, vocabulary)

Tests check that both give the results of MaskedRows. In the comments N is the number of tokens in
a forward pass, B the number of rows, and H the number of attention heads, with D dimensions each.
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

ROWS_AT_ONCE = 8  # rows per grid in attention on a CPU


def fold(rows: list[list[int]]) -> tuple[list[int], list[int]]:
    """Returns the ids of rows with their common beginnings merged, and each row's indices.

    Tokens of two rows are merged if the rows are equal up to and including them. They need to go
    through the model only once, because a token sees only what is before it. For the rows x y
    and x z the ids are x y z. The second list says which of these the rows consist of, row
    after row: 0 1 0 2.
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
    """The layout of a prefix that all rows share (it may be empty), and of the rows after it.

    Tokens see each other as in the picture of phi2.MaskedRows. The prefix's keys and values are
    those that each row would have computed for itself, and their gradients are summed over the
    rows. So without dropout the result is the same as with whole prompts. (With dropout, the
    dropout on the prefix is drawn once for all rows.)

    In evaluation rows share more, because several hypotheses belong to one premise. Then
    `token_of` comes from `fold`, and a token that rows share is among the N tokens only once.

    Only for attention, the smallest part of the work, are rows placed side by side, in padded
    grids (rows, width). The first grid is the prefix alone. On a GPU one more grid holds all
    rows. On a CPU each grid holds a few rows; in training and evaluation the rows are sorted by
    length, so there is little padding.

    Attributes:
        rows: for each row, which of the N tokens it has after the prefix.
        positions: (N,) each token's position in its own text.
        queries, keys: which token is in which cell of the grids. In the grids of keys the
            prefix precedes each row.
        masks: the mask of each grid, as `attention` takes it.
        recomputes: whether the backward pass recomputes attention. Then q, k and v are stored,
            but no grids.
        new_tokens: the layout with which generation continues, if there is room for tokens.
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
        """`lengths` are the rows' lengths; generation may add up to `room` tokens to each row."""
        # Indices are computed on the CPU and then moved. Computing them on a GPU would wait for it.
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
            # The padding after a short row is token 0. No other token sees it.
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
            raise ValueError(f"a row has {shortest} tokens, fewer than the last {count}")
        device = self.positions.device
        last = torch.stack([row[-count:] for row in self.rows])  # (B, count)
        shapes = self.keys.behind_prefix(self.keys.shapes)
        narrowed = copy.copy(self)
        narrowed.queries = LastTokens(last.to(device, non_blocking=True), shapes)
        positions = narrowed.queries.put(narrowed.select_queries(self.positions))
        narrowed.masks = [causal_mask(own, seen) for own, (_, seen) in zip(positions, shapes)]
        return narrowed

    def select_queries(self, x: Tensor) -> Tensor:
        """Returns the part (queries, ...) of x (N, ...) whose tokens have a query."""
        return self.queries.select(x)

    def attend(self, block_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns softmax(q k^T / sqrt(D)) v over the tokens that each query sees.

        k and v are (N, H, D); q and the result are (queries, H, D).
        """
        if self.recomputes and torch.is_grad_enabled():
            # Attention has no dropout, so there is no random state to restore.
            options = {"use_reentrant": False, "preserve_rng_state": False}
            return recompute(self.attend_in_grids, block_index, q, k, v, **options)
        return self.attend_in_grids(block_index, q, k, v)

    def attend_in_grids(self, block_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries = self.queries.put(q)
        keys = self.keys.put(k)
        values = self.keys.put(v)
        if self.new_tokens is not None:
            self.new_tokens.keep((block_index, "k"), self.keys.behind_prefix(keys))
            self.new_tokens.keep((block_index, "v"), self.keys.behind_prefix(values))
        if len(queries) < len(keys):  # the prefix has no queries
            keys = self.keys.behind_prefix(keys)
            values = self.keys.behind_prefix(values)
        outputs = [attention(*grid) for grid in zip(queries, keys, values, self.masks)]
        return self.queries.take(outputs)


class Cells:
    """The cells of all grids, one grid after another, and which of the N tokens is in each cell.

    Attributes:
        tokens: (cells,) the token in each cell.
        places: (N,) each token's own cell, the first one that contains it; others are copies.
        shapes: (rows, width) of each grid.
        prefix_length: how many prefix tokens precede each row. (The first grid is then the
            prefix itself.)
        is_shared: whether rows share tokens after the prefix.
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
        # If rows share tokens, the backward pass of index_select adds up their gradients.
        cells = x.index_select(0, self.tokens) if self.is_shared else Put.apply(x, self)
        return self.split(cells)

    def split(self, cells: Tensor) -> list[Tensor]:
        """Returns each grid's part of (all cells, H, D)."""
        parts = cells.split([rows * width for rows, width in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes)]

    def behind_prefix(self, grids: list) -> list:
        """Returns the grids of rows, without the grid of the prefix."""
        return grids[1:] if self.prefix_length else grids

    def take(self, grids: list[Tensor]) -> Tensor:
        """Returns the contents of the tokens' own cells in the grids, (N, H, D)."""
        return join([grid.flatten(0, 1) for grid in grids]).index_select(0, self.places)


class Put(torch.autograd.Function):
    """Puts x (N, H, D) into cells, as x.index_select(0, cells.tokens) does.

    The backward pass of index_select would add up the gradients of all cells of a token one by
    one: zeros from the padding, and for the prefix one gradient per row, rounding each time.
    This one takes each token's gradient from its own cell, and sums the prefix's in one step.
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
    """Replaces the queries' `Cells` if only the last tokens of each row have a query.

    Every row has the same number of these tokens, so the grids have no padding, and a tensor
    over the queries is already in row order.
    """

    def __init__(self, tokens: Tensor, shapes: list[tuple[int, int]]):
        """`tokens` (B, count) are these tokens, `shapes` the shapes of the rows' grids."""
        self.tokens = tokens
        self.rows_of_grids = [rows for rows, _ in shapes]

    def select(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.tokens.flatten())

    def put(self, x: Tensor) -> list[Tensor]:
        return x.unflatten(0, self.tokens.shape).split(self.rows_of_grids)

    def take(self, grids: list[Tensor]) -> Tensor:
        return join(grids).flatten(0, 1)


def join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)  # cat would copy a single tensor


def causal_mask(positions: Tensor, keys: int) -> Tensor:
    """Returns the mask (rows or 1, 1, T, keys) for queries at `positions` (rows or 1, T).

    It is 0 where a query sees a key, and -inf where the key comes later.
    """
    is_later = torch.arange(keys, device=positions.device) > positions[:, None, :, None]
    return torch.zeros_like(is_later, dtype=torch.float32).masked_fill(is_later, -math.inf)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Returns softmax(q k^T / sqrt(D) + mask) v, (rows, T, H, D).

    q is (rows, T, H, D), k and v are (rows, keys, H, D). On a GPU the mask may be None, which
    means that the T queries of each row are at its last T keys. The GPU's kernels support this
    form without a mask in memory.
    """
    q = q.transpose(1, 2)  # (rows, H, T, D)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    # On a CPU torch's fused kernel is faster than two products and a softmax for fp32 in the
    # forward pass, but slower for bf16 and in the backward pass.
    is_fast_on_cpu = q.dtype is torch.float32 and not torch.is_grad_enabled()
    if q.device.type != "cpu" or is_fast_on_cpu:
        if mask is None:
            mask = causal_lower_right(q.shape[2], k.shape[2])
        elif q.device.type != "cpu":
            mask = mask.to(q.dtype)  # as a GPU's kernels require
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    # Everything is in fp32, as inside the kernel.
    attention_scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(2, 3)
    weights = attention_scores.add_(mask).softmax(dim=-1)
    return (weights @ v.float()).to(v.dtype).transpose(1, 2)


# -----------------------------------------------------------------------------
# Generation


class NewTokens:
    """The layout of one new token per row, which sees the tokens before it in its row.

    The keys and values of these are cached as (B, H, width, D), by (block_index, "k") and
    (block_index, "v"). The keys of a head are contiguous in memory, because one query reads
    them all.

    Attributes:
        positions: (B,) each new token's position in its own text.
        room: how many tokens a row may get.
        width: the length of the longest row, with its prefix and `room`, rounded up.
        kept: the cached keys and values of all layers.
        places: the indices of the new tokens' keys and values in each cache, if flattened.
        mask: which of the keys each new token sees.
    """

    def __init__(self, positions: Tensor, room: int, device: torch.device):
        """`positions` are those of the rows' last tokens so far; call `advance` next."""
        self.positions = positions.to(device, non_blocking=True)
        self.room = room
        # Rounded up to a multiple of 16. Otherwise a GPU's kernel would copy the mask to such a
        # width in each layer.
        self.width = math.ceil((int(positions.max()) + 1 + room) / 16) * 16
        self.kept = {}
        self.places = None
        self.mask = None

    def keep(self, name: tuple[int, str], grids: list[Tensor]) -> None:
        """Caches the keys, or the values, of whole rows, from grids (rows, width, H, D)."""
        rows = [len(grid) for grid in grids]
        _, _, heads, head_dim = grids[0].shape
        kept = grids[0].new_empty(sum(rows), heads, self.width, head_dim)
        for part, grid in zip(kept.split(rows), grids):
            width = grid.shape[1]
            part[:, :, :width] = grid.transpose(1, 2)
            part[:, :, width:] = 0  # no query sees this, but weight 0 times it must be 0, not NaN
        self.kept[name] = kept

    def select_rows(self, rows: Tensor) -> None:
        """Keeps only the rows at these indices."""
        self.positions = self.positions[rows]
        # One by one, because the old and new caches of all layers may not fit together.
        for name, kept in self.kept.items():
            self.kept[name] = kept.index_select(0, rows)

    def advance(self) -> None:
        """Moves on to the next token of each row.

        A CUDA graph can replay this: nothing is computed on the CPU, and the positions are a
        tensor that changes in place, so each replay finds them one further.
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

    def attend(self, block_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns what PackedRows.attend returns; q, k, v and the result are (B, H, D)."""
        keys = self.kept[block_index, "k"]
        values = self.kept[block_index, "v"]
        keys.flatten(0, 2).index_copy_(0, self.places, k.flatten(0, 1))
        values.flatten(0, 2).index_copy_(0, self.places, v.flatten(0, 1))
        keys = keys.transpose(1, 2)  # (B, width, H, D)
        values = values.transpose(1, 2)
        return attention(q[:, None], keys, values, self.mask)[:, 0]


class Decoder:
    """Runs the model on one new token per row at a time, after whole rows have been run.

    On a GPU such a step is hundreds of kernels, each of which runs for less time than Python
    takes to launch it. So when the same rows take a second step, it is recorded as a CUDA graph,
    and from then on the GPU replays it with a single launch. A replay does the same work in
    the same memory: it reads ids, weights, cache and positions, writes to the cache, advances
    the positions, and leaves the logits. The first step cannot be recorded, because kernels are
    loaded at their first use, which is not allowed while recording.

    Attributes:
        records: whether steps are recorded.
        steps_left: the number of further steps that there is room for.
        layout: the layout of the new tokens.
        ids: (B,) the new tokens.
        logits: (B, vocabulary) for what follows them; None before the first step of these rows.
        graph: the recorded step, once there is one.
    """

    def __init__(self, model: nn.Module, rows: PackedRows):
        """`rows` must have room, and must have been run through the model without gradients."""
        self.model = model
        self.layout = rows.new_tokens
        self.steps_left = self.layout.room
        self.records = model.uses_graphs and rows.positions.is_cuda
        self.ids = torch.zeros_like(self.layout.positions)
        self.logits = None
        self.graph = None

    def keep(self, rows: list[int]) -> None:
        """Keeps only the rows at these indices. Their next step counts as a first step."""
        self.graph = None  # before anything else, to free its memory
        self.logits = None
        self.layout.select_rows(torch.tensor(rows).to(self.ids.device, non_blocking=True))
        self.ids = torch.zeros_like(self.layout.positions)

    def drop(self, is_finished: list[bool]) -> list[int]:
        """Drops finished rows, if that pays. Returns the indices of the rows that stay.

        A recorded step must be recorded again for fewer rows, which waits for the GPU and
        releases its free memory. So where steps are recorded, finished rows stay until seven of
        eight rows are finished: for 64 rows at most three steps are recorded, with 64, 8 and 1.
        Meanwhile the last token of a finished row is run again, and its output is ignored.
        """
        rows = range(len(is_finished))
        finished = sum(is_finished)
        unfinished = len(rows) - finished
        if finished == 0 or (self.records and finished < 7 * unfinished):
            return list(rows)
        kept = [row for row in rows if not is_finished[row]]
        self.keep(kept)
        return kept

    def run(self, ids: list[int]) -> Tensor:
        """Returns the logits (B, vocabulary) after one new token in each row.

        They are valid until the next step, which may overwrite them.
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
        """Records a step without running it. If this fails, steps are never recorded again."""
        stream = torch.cuda.current_stream()
        try:
            graph = torch.cuda.CUDAGraph()
            # Kernels launched here are recorded, not run. Other threads may use the GPU meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self.step()
        except RuntimeError as error:
            # After a failed recording, torch leaves its stream as the current one.
            torch.cuda.set_stream(stream)
            if isinstance(error, torch.OutOfMemoryError):
                raise  # with fewer rows a recording may fit
            warnings.warn(f"no CUDA graph, so generation is slower: {error}", stacklevel=2)
            self.records = False
            self.model.uses_graphs = False
        else:
            self.graph = graph

    def step(self) -> Tensor:
        self.layout.advance()
        return self.model(self.ids, self.layout)
