"""Exercise 8, compared with PEFT's use_dora."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exercises.judge import check, check_close, distance, draw, peft_model


def pair(answer) -> tuple[nn.Module, nn.Module]:
    """Returns the layer and PEFT's layer, with the same random A and B, and the same magnitude."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 24))  # square: norms of columns have the same shape
    theirs = peft_model(base, r=4, lora_alpha=12, target_modules=["0"], use_dora=True)
    layer = answer.DoRALinear(base[0], rank=4, alpha=12)
    draw(nn.Sequential(layer), theirs)
    return layer, theirs.base_model.model[0]


def gradients(layer: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    return torch.autograd.grad(layer(x).square().sum(), list(tensors.values()))


def tensors_of(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {
        "A": layer.lora_A.weight,
        "B": layer.lora_B.weight,
        "the magnitude": layer.magnitude,
        "x": x,
    }


def test_the_start_is_the_base(answer):
    torch.manual_seed(0)
    base = nn.Linear(24, 24)
    layer = answer.DoRALinear(base, rank=4, alpha=12)
    weight = base.weight.detach()
    columns = weight.norm(dim=0)
    check(
        isinstance(getattr(layer, "magnitude", None), nn.Parameter),
        "The layer has no nn.Parameter `magnitude`: m of the formula, one number for each output.",
    )
    cures = {
        "It has the norms of W's columns, one for each input. There should be one for each output: "
        "the norm of a row of W, which is (out, in) here.": columns,
        "It is 1: m starts as the norms of W, so that m / norm is 1 at the start.": torch.ones(24),
        "It is the norm of all of W.": weight.norm().expand(24),
    }
    check_close(layer.magnitude, weight.norm(dim=1), "the magnitude at the start", cures)
    x = torch.randn(2, 3, 24)
    check_close(layer(x), base(x), "the output at the start, where B = 0")
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    expected = {"lora_A.weight", "lora_B.weight", "magnitude"}
    check(trained == expected, f"Trained parameters: {sorted(trained)}, not {sorted(expected)}.")


@torch.no_grad()
def test_the_output_is_pefts(answer):
    layer, theirs = pair(answer)
    layer.magnitude.uniform_(0.5, 2)
    theirs.lora_magnitude_vector["default"].weight.copy_(layer.magnitude)
    x = torch.randn(2, 3, 24)
    base = layer.base_layer
    bias = base.bias
    adapted = base.weight + 3 * layer.lora_B.weight @ layer.lora_A.weight
    m = layer.magnitude
    y = F.linear(x, adapted)
    cures = {
        "It is LoRA's: neither m nor the norm is in it.": y + bias,
        "m / norm multiplies the bias too, which is no part of W.": (
            m / adapted.norm(dim=1) * (y + bias)
        ),
        "The norm is that of W. The formula divides by the norm of W + s B A.": (
            m / base.weight.norm(dim=1) * y + bias
        ),
        "The norm is that of columns. Each row of W + s B A, for one output, has its own.": (
            F.linear(x, m[:, None] * adapted / adapted.norm(dim=0)) + bias
        ),
        "m / norm multiplies s B A x alone. It multiplies W x too.": (
            base(x) + m / adapted.norm(dim=1) * (y - F.linear(x, base.weight))
        ),
        "The scale is missing in W + s B A.": m_over_norm(layer, x, 1.0),
    }
    check_close(layer(x), theirs(x), "the output", cures)


def m_over_norm(layer: nn.Module, x: Tensor, scale: float) -> Tensor:
    """Returns what DoRA's layer computes, with another scale."""
    weight = layer.base_layer.weight + scale * layer.lora_B.weight @ layer.lora_A.weight
    return layer.magnitude / weight.norm(dim=1) * F.linear(x, weight) + layer.base_layer.bias


def test_gradients_are_pefts(answer):
    layer, theirs = pair(answer)
    x = torch.randn(2, 3, 24, requires_grad=True)
    tensors = tensors_of(layer, x)
    found = gradients(layer, tensors, x)
    their_tensors = {
        "A": theirs.lora_A["default"].weight,
        "B": theirs.lora_B["default"].weight,
        "the magnitude": theirs.lora_magnitude_vector["default"].weight,
        "x": x,
    }
    expected = gradients(theirs, their_tensors, x)
    # What the whole formula gives, in which the norm has a gradient too.
    whole = torch.autograd.grad(m_over_norm(layer, x, 3.0).square().sum(), list(tensors.values()))
    for name, gradient, wanted, through_norm in zip(tensors, found, expected, whole):
        cures = {}
        if distance(through_norm, wanted) > 1e-3:
            cures = {
                "It is the gradient of the whole formula. Section 4.3 treats the norm as a "
                "constant: detach it.": through_norm
            }
        check_close(gradient, wanted, f"the gradient of {name}", cures)
