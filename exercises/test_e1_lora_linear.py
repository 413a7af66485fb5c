"""Exercise 1, compared with PEFT's layer."""

import torch
from torch import nn

from exercises.judge import check, check_close, draw, peft_model

SHAPES = {
    "base_layer.weight": (40, 24),
    "base_layer.bias": (40,),
    "lora_A.weight": (4, 24),
    "lora_B.weight": (40, 4),
}


def layer_of(answer) -> nn.Module:
    torch.manual_seed(0)
    layer = answer.LoRALinear(nn.Linear(24, 40), rank=4, alpha=12)  # a scale of 3
    state = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    check(
        state == SHAPES,
        f"The layer holds {state}\nand should hold {SHAPES}.\n"
        "A and B are nn.Linear(..., bias=False), so that their names are PEFT's; "
        "nn.Linear(a, b) holds a weight (b, a).",
    )
    return layer


def test_a_and_b_have_their_shapes_and_names(answer):
    layer_of(answer)


def test_a_is_random_and_b_is_zero(answer):
    layer = layer_of(answer)
    check(
        not layer.lora_B.weight.any(),
        "B is not zero at the start: training would not start from the base model.",
    )
    check(
        bool(layer.lora_A.weight.any()),
        "A is zero at the start, as B is. B's gradient is g (scale A x)^T and A's is "
        "scale (B^T g) x^T: both are zero, and stay zero.",
    )


def test_only_a_and_b_are_trained(answer):
    trained = {name for name, p in layer_of(answer).named_parameters() if p.requires_grad}
    check(
        trained == {"lora_A.weight", "lora_B.weight"},
        f"The trained parameters are {sorted(trained)}, and should be A and B alone: "
        "base_layer.requires_grad_(False) freezes a layer.",
    )


def test_outputs_and_gradients_are_pefts(answer):
    mine = nn.Sequential(layer_of(answer))
    layer = mine[0]
    base = nn.Sequential(nn.Linear(24, 40))
    base.load_state_dict({f"0.{key}": t for key, t in layer.base_layer.state_dict().items()})
    theirs = peft_model(base, r=4, lora_alpha=12, target_modules=["0"])
    draw(mine, theirs)

    # Two rows of three tokens: x may have any number of dimensions before the last.
    x = torch.randn(2, 3, 24, requires_grad=True)
    y = theirs(x)
    wx = base(x)
    bax = (y - wx) / 3
    found = layer(x)
    cures = {
        "It is W x alone: B A x is missing.": wx,
        "It is s B A x alone: base_layer(x) is missing.": 3 * bax,
        "It is W x + B A x: the scale alpha / rank is missing.": wx + bax,
        "It is W x + alpha B A x: alpha must be divided by rank.": wx + 12 * bax,
        "It is W x + B A x / 3: the scale is alpha / rank, not rank / alpha.": wx + bax / 3,
        "The scale multiplies W x too, and should multiply B A x alone.": 3 * (wx + bax),
    }
    check_close(found, y, "the output", cures)

    weights = {"A": layer.lora_A.weight, "B": layer.lora_B.weight, "x": x}
    torch.autograd.backward(y.square().sum())
    adapter = theirs.base_model.model[0]
    expected = {
        "A": adapter.lora_A["default"].weight.grad,
        "B": adapter.lora_B["default"].weight.grad,
        "x": x.grad.clone(),
    }
    x.grad = None
    found.square().sum().backward()
    for name, weight in weights.items():
        gradient = weight.grad
        check(
            gradient is not None,
            f"{name} has no gradient: something between it and the output was detached, "
            "by .data, .detach() or torch.no_grad().",
        )
        check_close(gradient, expected[name], f"the gradient of {name}")
