"""Exercise 5: NF4, bit for bit."""

import torch
from torch import Tensor

from exercises.e5_normal_float import BLOCK, LEVELS


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    blocks = weight.float().reshape(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    nonzero = absmax.masked_fill(absmax == 0, 1)  # 0 / 0 would be NaN
    scaled = blocks / nonzero[:, None]
    # The nearest level is found by the 15 borders half way between the levels.
    borders = (LEVELS[1:] + LEVELS[:-1]) / 2
    indices = torch.bucketize(scaled, borders).to(torch.uint8)
    first, second = indices.reshape(-1, 2).T
    return (first << 4 | second)[:, None], absmax


def dequantize(packed: Tensor, absmax: Tensor, shape: torch.Size) -> Tensor:
    pairs = packed.flatten()
    indices = torch.stack((pairs >> 4, pairs & 15), dim=1)
    values = LEVELS[indices.long()].reshape(-1, BLOCK) * absmax[:, None]
    return values.reshape(shape)
