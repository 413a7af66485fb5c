"""Exercise 6, compared with autograd over the dequantised weight."""

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor

from exercises.judge import check, check_close


class Weight:
    """Stands for a quantised weight: makes W (out, in) at each call, and remembers each W."""

    def __init__(self, out_features: int, in_features: int):
        torch.manual_seed(0)
        self.values = torch.randn(out_features, in_features)
        self.made = []

    def dequantize(self) -> Tensor:
        weight = self.values.clone()
        self.made.append(weakref.ref(weight))
        return weight

    def is_alive(self) -> bool:
        return any(reference() is not None for reference in self.made)


def test_the_output_is_a_linear_layers(answer):
    weight = Weight(40, 24)
    bias = torch.randn(40)
    x = torch.randn(2, 3, 24)
    for b in (bias, None):
        expected = F.linear(x, weight.values, b)
        cures = {"The bias is missing.": F.linear(x, weight.values)}
        found = answer.FrozenLinear.apply(x, weight.dequantize, b)
        check_close(found, expected, "x W^T + b" if b is not None else "x W^T", cures)


def test_the_gradient_of_x_is_autograds(answer):
    weight = Weight(24, 24)  # square: here g W^T has the right shape too
    x = torch.randn(2, 3, 24, requires_grad=True)
    g = torch.randn(2, 3, 24)
    (expected,) = torch.autograd.grad(F.linear(x, weight.values), x, g)
    y = answer.FrozenLinear.apply(x, weight.dequantize, None)
    check(y.requires_grad, "The output has no gradient: apply FrozenLinear, do not call forward.")
    (found,) = torch.autograd.grad(y, x, g)
    cures = {
        "It is g W^T, which has the right shape only because W is square: y = x W^T, so that the "
        "gradient of x is g W.": g @ weight.values.T,
        "It is g: W is missing.": g,
    }
    check_close(found, expected, "the gradient of x", cures)


def test_no_weight_is_kept_between_the_passes(answer):
    weight = Weight(64, 48)
    x = torch.randn(5, 48, requires_grad=True)
    stored = []

    def pack(tensor: Tensor) -> Tensor:
        stored.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = answer.FrozenLinear.apply(x, weight.dequantize, None)
    check(
        len(weight.made) == 1,
        f"The forward pass called dequantize {len(weight.made)} times, and should call it once.",
    )
    check(
        (64, 48) not in stored and (48, 64) not in stored,
        "W was kept by ctx.save_for_backward. Each layer of the model would keep its whole W for "
        "the backward pass, which is the memory that 4 bits should save. Keep `dequantize`.",
    )
    check(
        not weight.is_alive(),
        "W is alive after the forward pass: ctx holds it. Keep `dequantize` in ctx, and call it "
        "again in backward.",
    )
    y.sum().backward()
    check(
        len(weight.made) == 2,
        f"The backward pass called dequantize {len(weight.made) - 1} times, not once.",
    )
    check(not weight.is_alive(), "W is alive after the backward pass: something holds it.")
    check(
        not stored,
        f"Tensors of shapes {stored} were kept for the backward pass. x is needed for the "
        "gradient of W alone, and W has none.",
    )
