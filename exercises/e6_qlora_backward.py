"""Exercise 6: QLoRA's backward pass. 25 minutes.

A weight in 4 bits is dequantised for each product (arXiv:2305.14314, section 3, equation 5)
and then dropped. For y = x W^T + b, with tokens as rows and g the gradient of y:

    x's gradient   g W          needed, to reach the adapters of earlier layers
    W's gradient   g^T x        not needed: W is frozen

g W needs W again. F.linear(x, dequantize()) gives the right gradient, but to compute it autograd
keeps W until the backward pass, in each layer of the model. Then all weights are in memory in 16
bits at once, and the 4 bits save nothing. So write a torch.autograd.Function that keeps
`dequantize` instead of W, and calls it a second time. The price is the time of that call, in
each layer and step.

`backward` returns one gradient for each input of `forward`, and None for an input without one.
https://docs.pytorch.org/docs/stable/notes/extending.html shows the form.

What you should see: the bytes that one layer keeps for the backward pass.

    >>> weight = torch.randn(1024, 1024)
    >>> x = torch.randn(8, 1024, requires_grad=True)
    >>> def kept(function):
    ...     stored = []
    ...     def pack(tensor):
    ...         stored.append(tensor.nbytes)
    ...         return tensor
    ...     with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
    ...         _ = function()
    ...     return sum(stored)
    >>> kept(lambda: torch.nn.functional.linear(x, weight.clone()))
    4194304
    >>> kept(lambda: FrozenLinear.apply(x, weight.clone, None))
    0
"""

from collections.abc import Callable

import torch
from torch import Tensor


class FrozenLinear(torch.autograd.Function):
    """FrozenLinear.apply(x, dequantize, bias) is x W^T + bias, for x (..., in).

    dequantize: a function that returns W (out, in), computed again at each call.
    bias: (out,), frozen, or None.
    """

    @staticmethod
    def forward(ctx, x: Tensor, dequantize: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        raise NotImplementedError("exercise 6: FrozenLinear.forward")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("exercise 6: FrozenLinear.backward")
