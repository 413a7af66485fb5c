"""Exercise 5: NF4 by hand. 40 minutes.

QLoRA (arXiv:2305.14314, section 3, "4-bit NormalFloat", and appendix E) stores a frozen weight
in 4 bits. The weight is flattened row by row and cut into blocks of 64 consecutive values; a
block may continue from one row into the next. Each block stores its largest magnitude, absmax,
in fp32. Each value is stored as the index of the level that is nearest to value / absmax:

    value  ~  LEVELS[index] * absmax[block]         4 + 32/64 = 4.5 bits a weight

Weights are roughly normal, so the 16 levels are quantiles of the normal distribution, scaled to
[-1, 1]: they are close together where most weights are. Level 7 is exactly 0.

Two indices share a byte, with the first in the high half: indices 1 and 2 become 0x12. A value
half way between two levels gets the lower one.

bitsandbytes does all this in a kernel. Your bits must equal its bits, even if a block is all
zeros. You need torch.bucketize, which finds the place of numbers among sorted borders; and <<
and |, >> and &, which work on tensors of torch.uint8.

What you should see:

    >>> ramp = torch.linspace(-1, 1, 64)    # one block, with absmax 1: its 64 indices in hex
    >>> bytes(quantize(ramp)[0].flatten().tolist()).hex()
    '00000111111112222233344445556667788899aaabbbccccddddeeeeeeefffff'
    >>> _ = torch.manual_seed(0)
    >>> weight = 0.02 * torch.randn(512, 512)
    >>> packed, absmax = quantize(weight)
    >>> 8 * (packed.nbytes + absmax.nbytes) / weight.numel()    # bits a weight
    4.5
    >>> error = dequantize(packed, absmax, weight.shape) - weight
    >>> print(f"{error.norm() / weight.norm():.3f}")    # of the weight's norm
    0.092
"""

import torch
from torch import Tensor

BLOCK = 64
LEVELS = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0]
    + [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises a weight in fp32 or bf16, of any shape whose number of values is a multiple of 64.

    Returns the packed indices (values / 2, 1) in torch.uint8 and absmax (values / 64,) in fp32.
    """
    raise NotImplementedError("exercise 5: quantize")


def dequantize(packed: Tensor, absmax: Tensor, shape: torch.Size) -> Tensor:
    """Returns the weight of this shape, in fp32, that the packed indices stand for."""
    raise NotImplementedError("exercise 5: dequantize")
