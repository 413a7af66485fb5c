"""Exercise 9: many rows behind one prefix, each as if it were alone with it."""

import torch
from torch import Tensor

from exercises.e9_shared_prefix import Shared


def share(prefix: list[int], rows: list[list[int]]) -> Shared:
    ids = list(prefix)
    row_of = [-1] * len(prefix)  # for each token its row; -1 in the prefix
    positions = list(range(len(prefix)))
    sources = []  # for each token of the rows, the one whose logits predict it
    for number, row in enumerate(rows):
        start = len(ids)
        ids += row
        row_of += [number] * len(row)
        positions += range(len(prefix), len(prefix) + len(row))
        sources += [len(prefix) - 1, *range(start, start + len(row) - 1)]

    row_of = torch.tensor(row_of)
    positions = torch.tensor(positions)
    is_visible = (row_of == -1) | (row_of == row_of[:, None])
    is_not_later = positions <= positions[:, None]
    return Shared(torch.tensor(ids), positions, is_visible & is_not_later, torch.tensor(sources))


def loss(logits: Tensor, prefix: list[int], shared: Shared) -> Tensor:
    targets = shared.ids[len(prefix) :]
    return torch.nn.functional.cross_entropy(logits[shared.sources], targets)
