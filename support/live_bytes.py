"""Counts the bytes of live tensors as a GPU's allocator would."""

import math
import weakref

import torch

ROUNDING = 512  # bytes: PyTorch's GPU allocator rounds sizes up to multiples of this


class LiveBytes:
    """Counts the storages that `add` is called with, each until it is freed.

    now: the bytes that are alive; most: the largest value of `now` so far. Storages in `known`
    are not counted. limit: how many bytes there are; beyond it, `add` raises the error that a
    GPU's allocator raises.
    """

    def __init__(self, known: list[torch.UntypedStorage] = (), limit: float = math.inf):
        self.alive = {storage._cdata for storage in known}
        self.now = 0
        self.most = 0
        self.limit = limit

    def add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive:  # from a view, or from a tensor that was changed in place
            return
        size = -(-storage.nbytes() // ROUNDING) * ROUNDING
        if self.now + size > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size:,} bytes.")
        self.alive.add(key)
        weakref.finalize(storage, self.free, key, size)
        self.now += size
        self.most = max(self.most, self.now)

    def free(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size
