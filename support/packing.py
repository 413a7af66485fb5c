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
from dataclasses import dataclass, replace

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
class Grid:
    """Some rows as attention takes them: side by side, (rows, width), short ones padded.

    mask: (1, rows or 1, T, keys) for T queries a row: 0 where one sees a key, -inf where not.
        None on a GPU where each row's T queries are the last of its keys: its kernels know
        that form, and need no mask in memory.
    """

    rows: int
    width: int
    mask: Tensor | None


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
    in grids. On a GPU all rows are one grid. On a CPU a grid has a few rows; where they come
    sorted by length, as in training and evaluation, little is padded.

    Attributes:
        lengths: how many tokens each row has behind the prefix.
        token_of: for each of them, row after row, which of the rows' distinct tokens it is.
        positions: (N,) each token's place in its own text.
        queries: which of the N tokens have a query; None where all have one.
        prefix: the prefix as a grid of one row.
        grids: the rows' grids.
        cells: for each cell of all grids, which of the rows' distinct tokens stands in it.
        places: (N,) where each token's result stands among those of the prefix and the cells.
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
        self.token_of = torch.tensor(token_of or range(sum(lengths)))
        self.queries = None
        self.recomputes = recomputes
        self.cache = Cache(prefix_length + max(lengths), room) if room else None

        def make_grid(rows: int, start: int, width: int) -> Grid:
            """Returns a grid whose rows begin at position `start`."""
            mask = None
            if device.type != "cuda":
                positions = torch.arange(start, start + width, device=device)
                mask = causal_mask(positions[None], start + width)
            return Grid(rows, width, mask)

        # The indices are made on the CPU: for nonzero() a GPU would have to wait.
        self.prefix = make_grid(1, 0, prefix_length)
        self.grids = []
        cells = []
        is_filled = []
        start = 0
        at_once = ROWS_AT_ONCE if device.type == "cpu" else len(lengths)
        for first in range(0, len(lengths), at_once):
            few = torch.tensor(lengths[first : first + at_once])[:, None]
            columns = torch.arange(int(few.max()))
            row_starts = start + few.cumsum(0) - few
            # Behind a short row its last token is repeated. Nobody looks there.
            tokens = self.token_of[row_starts + columns.minimum(few - 1)]  # (rows, width)
            cells.append(tokens.flatten())
            is_filled.append((columns < few).flatten())
            self.grids.append(make_grid(len(few), prefix_length, len(columns)))
            start += int(few.sum())

        # A token that rows share has a cell in each of them. Of the equal results the first is
        # kept.
        is_first = self.token_of.cummax(0).values.diff(prepend=torch.tensor([-1])) > 0
        in_rows = torch.cat([torch.arange(length) for length in lengths])[is_first]
        filled = torch.cat(is_filled).nonzero()[is_first, 0]
        prefix = torch.arange(prefix_length)
        positions = torch.cat((prefix, prefix_length + in_rows))
        places = torch.cat((prefix, prefix_length + filled))
        self.positions = positions.to(device, non_blocking=True)
        self.places = places.to(device, non_blocking=True)
        self.cells = torch.cat(cells).to(device, non_blocking=True)

    def only_last(self, count: int) -> "PackedRows":
        """Returns the same rows, of which only the last `count` tokens each have a query."""
        if min(self.lengths) < count:
            raise ValueError(f"a row of {min(self.lengths)} tokens has no last {count}")
        device = self.positions.device
        lengths = torch.tensor(self.lengths)[:, None]
        last = torch.arange(-count, 0)
        tokens = self.token_of[lengths.cumsum(0) + last].flatten()
        positions = (self.prefix.width + lengths + last).to(device, non_blocking=True)
        grids_positions = positions.split([grid.rows for grid in self.grids])

        narrowed = copy.copy(self)
        narrowed.queries = (self.prefix.width + tokens).to(device, non_blocking=True)
        narrowed.grids = [
            replace(grid, mask=causal_mask(own, self.prefix.width + grid.width))
            for grid, own in zip(self.grids, grids_positions)
        ]
        return narrowed

    def select_queries(self, x: Tensor) -> Tensor:
        """Returns x (N, ...) of the tokens that have a query."""
        return x if self.queries is None else x.index_select(0, self.queries)

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
        # 1. Keys and values of each row, behind those of the prefix.
        prefix_k, keys = self.in_grids(k)
        prefix_v, values = self.in_grids(v)
        seen_keys = self.behind_prefix((layer, "k"), prefix_k, keys)
        seen_values = self.behind_prefix((layer, "v"), prefix_v, values)

        # 2. The queries: of all tokens, those of the prefix too, or of each row's last ones.
        outputs = []
        if self.queries is None:
            prefix_q, queries = self.in_grids(q)
            if self.prefix.width:
                outputs.append(attention(prefix_q, prefix_k, prefix_v, self.prefix.mask))
        else:
            rows = [grid.rows for grid in self.grids]
            queries = q.transpose(0, 1).unflatten(1, (sum(rows), -1)).split(rows, dim=1)

        # 3. Attention, grid by grid. Then the results stand in the order of the tokens again.
        for grid, *inputs in zip(self.grids, queries, seen_keys, seen_values):
            outputs.append(attention(*inputs, grid.mask))
        results = [output.flatten(1, 2) for output in outputs]
        y = results[0] if len(results) == 1 else torch.cat(results, dim=1)  # it would copy one
        y = y.transpose(0, 1)
        return y if self.queries is not None else y.index_select(0, self.places)

    def in_grids(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns x (N, H, D) as the prefix's (H, 1, P, D) and grids (H, rows, width, D)."""
        length = self.prefix.width
        prefix, own = x.transpose(0, 1).split((length, len(x) - length), dim=1)
        sizes = [grid.rows * grid.width for grid in self.grids]
        cells = own.index_select(1, self.cells).split(sizes, dim=1)
        shapes = [(grid.rows, grid.width) for grid in self.grids]
        return prefix[:, None], [part.unflatten(1, shape) for part, shape in zip(cells, shapes)]

    def behind_prefix(
        self, name: tuple[int, str], prefix: Tensor, grids: list[Tensor]
    ) -> list[Tensor]:
        """Returns the keys, or the values, that each grid's queries see, (H, rows, keys, D)."""
        if self.cache is not None:
            return self.cache.put(name, prefix, grids)
        if not self.prefix.width:
            return grids
        # Backward, `expand` adds up what all rows send to the prefix, in one sum.
        return [
            torch.cat((prefix.expand(-1, grid.shape[1], -1, -1), grid), dim=2) for grid in grids
        ]


def causal_mask(positions: Tensor, keys: int) -> Tensor:
    """Returns the mask (1, rows or 1, T, keys) of queries at positions (rows or 1, T)."""
    is_later = torch.arange(keys, device=positions.device) > positions[None, :, :, None]
    return torch.zeros_like(is_later, dtype=torch.float32).masked_fill(is_later, -math.inf)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Returns softmax(q k^T / sqrt(D) + mask) v, (H, rows, T, D), as `Grid` describes it.

    q is (H, rows, T, D), k and v are (H, rows, keys, D).
    """
    # On a CPU torch's fused kernel is faster than two products and a softmax in fp32 forward,
    # but slower in bf16 and backward.
    is_fast_on_cpu = q.dtype is torch.float32 and not torch.is_grad_enabled()
    if q.device.type != "cpu" or is_fast_on_cpu:
        if mask is None:
            mask = causal_lower_right(q.shape[2], k.shape[2])
        elif q.device.type != "cpu":
            mask = mask.to(q.dtype)  # a GPU's kernels want it so
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # All is in fp32, as within the kernel.
    attention_scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(2, 3)
    weights = attention_scores.add_(mask).softmax(dim=-1)
    return (weights @ v.float()).to(v.dtype)


# -----------------------------------------------------------------------------
# Generation


class Cache:
    """The keys and values of all layers: (H, B, width, D), by (layer, "k") or (layer, "v")."""

    def __init__(self, longest: int, room: int):
        """There is room for the longest row, with its prefix, and so many tokens behind it."""
        self.room = room
        # Up to a multiple of 16. Otherwise a GPU's kernel copies the mask into such a one, in
        # each layer.
        self.width = math.ceil((longest + room) / 16) * 16
        self.kept = {}

    def put(self, name: tuple[int, str], prefix: Tensor, grids: list[Tensor]) -> list[Tensor]:
        """Keeps the rows of grids behind their prefix. Returns what each grid's queries see."""
        rows = [grid.shape[1] for grid in grids]
        heads, _, start, head_dim = prefix.shape
        kept = prefix.new_zeros(heads, sum(rows), self.width, head_dim)
        kept[:, :, :start] = prefix
        seen = []
        for part, grid in zip(kept.split(rows, dim=1), grids):
            end = start + grid.shape[2]
            part[:, :, start:end] = grid
            seen.append(part[:, :, :end])
        self.kept[name] = kept
        return seen

    def add(self, name: tuple[int, str], x: Tensor, places: Tensor) -> Tensor:
        """Writes x (B, H, D), of a new token of each row, and returns all that is kept.

        `places` (H * B,) are those in the cache as it lies in memory, (H * B * width, D).
        """
        kept = self.kept[name]
        kept.flatten(0, 2).index_copy_(0, places, x.transpose(0, 1).flatten(0, 1))
        return kept

    def select(self, rows: Tensor) -> None:
        """Keeps the rows at these indices alone."""
        # One by one: the old and the new of all layers may not fit.
        for name, kept in self.kept.items():
            self.kept[name] = kept.index_select(1, rows)


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
        heads, rows, width, _ = kept.shape
        starts = torch.arange(0, heads * rows * width, width, device=kept.device)
        self.places = (starts.view(heads, rows) + self.positions).flatten()
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
        queries = q.transpose(0, 1)[:, :, None]  # (H, B, 1, D)
        return attention(queries, keys, values, self.mask)[:, :, 0].transpose(0, 1)


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
        last = torch.tensor(rows.lengths) + (rows.prefix.width - 1)
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
