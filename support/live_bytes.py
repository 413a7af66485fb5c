"""The bytes of the tensors that are alive, counted as an allocator on a GPU gives them out."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROUNDING = 512  # bytes: PyTorch's allocator on a GPU gives out multiples of it


class LiveBytes:
    """Is told of the storage of each new tensor, and sees for itself when it is freed.

    now: bytes that are alive; most: the largest that `now` has been. The storages in `known`
    are not counted.
    """

    def __init__(self, known: list[torch.UntypedStorage] = ()):
        self.alive = {storage._cdata for storage in known}
        self.now = 0
        self.most = 0

    def add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive:  # that of a view, or of a tensor that was changed in place
            return
        size = -(-storage.nbytes() // ROUNDING) * ROUNDING
        self.alive.add(key)
        weakref.finalize(storage, self.free, key, size)
        self.now += size
        self.most = max(self.most, self.now)

    def free(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size
