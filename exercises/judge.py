"""What the exercises' tests share: checks with a message, a small model, and PEFT's adapters."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn


def check(is_right: bool, message: str) -> None:
    """Unless `is_right`, fails with the message alone, without the test's code."""
    if not is_right:
        pytest.fail(message, pytrace=False)


def check_close(
    found: Tensor,
    expected: Tensor,
    name: str,
    cures: dict[str, Tensor] | None = None,
    tolerance: float = 1e-5,
) -> None:
    """Fails unless `found` equals `expected` within `tolerance`, relative to the latter's norm.

    name: what the tensor is, for the message.
    cures: the tensor that a typical mistake gives, by the sentence that leads to its cure. If
        that tensor was found, the message has the sentence.
    tolerance: two orders of summation in fp32 differ by about 1e-7 of the norm in each layer.
    """
    check(isinstance(found, Tensor), f"Wrong: {name} is {found!r}, and should be a tensor.")
    check(
        found.shape == expected.shape,
        f"Wrong: {name}.\nThe shape is {tuple(found.shape)}, and should be "
        f"{tuple(expected.shape)}.",
    )
    if distance(found, expected) <= tolerance:
        return
    lines = [f"Wrong: {name}."]
    for cure, wrong in (cures or {}).items():
        if wrong.shape == found.shape and distance(found, wrong) <= tolerance:
            lines.append(cure)
    lines.append(worst(found, expected))
    pytest.fail("\n".join(lines), pytrace=False)


def distance(a: Tensor, b: Tensor) -> float:
    """Returns the norm of the difference relative to that of b, or infinity if a holds NaN."""
    gap = (a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)
    return gap.nan_to_num(torch.inf).item()


def worst(found: Tensor, expected: Tensor) -> str:
    """Returns a sentence on the element that differs most."""
    if found.isnan().any():
        return f"It holds NaN, in {found.isnan().sum()} of {found.numel()} places: look for 0 / 0."
    place = (found - expected).abs().argmax()
    index = [int(i) for i in torch.unravel_index(place, found.shape)]
    here = found.flatten()[place].item()
    there = expected.flatten()[place].item()
    gap = f"It differs by {distance(found, expected):.2g} of its norm."
    where = f"At {index} it" if index else "It"
    return f"{gap} {where} is {here:.5g}, and should be {there:.5g}."


# -----------------------------------------------------------------------------
# A small model, and PEFT's adapters on it


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns two blocks of layers with typical names, and an output head: (..., 24) -> (..., 10).

    The layers q_proj and proj are square, so that a transposed product has the right shape.
    """
    torch.manual_seed(0)

    def block() -> nn.Module:
        mlp = OrderedDict(fc=nn.Linear(24, 40), gelu=nn.GELU(), out=nn.Linear(40, 24))
        return nn.Sequential(
            OrderedDict(
                norm=nn.LayerNorm(24),
                q_proj=nn.Linear(24, 24),
                proj=nn.Linear(24, 24),
                mlp=nn.Sequential(mlp),
            )
        )

    blocks = nn.Sequential(block(), block())
    return nn.Sequential(OrderedDict(blocks=blocks, head=nn.Linear(24, 10))).to(dtype)


def peft_model(model: nn.Module, **options) -> nn.Module:
    """Returns PEFT's adapters around a copy of `model`, for LoraConfig(**options)."""
    from peft import LoraConfig, get_peft_model  # takes seconds, so only where it is needed

    return get_peft_model(copy.deepcopy(model), LoraConfig(lora_dropout=0.0, **options))


def peft_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trained tensors of PEFT's model, by the names that they have without PEFT."""
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


@torch.no_grad()
def draw(mine: nn.Module, theirs: nn.Module) -> None:
    """Puts the same random numbers into the adapters of both models, also into B."""
    tensors = peft_tensors(theirs)
    for name, parameter in mine.named_parameters():
        if "lora_" in name:
            check(
                name in tensors,
                f"The model has a parameter {name}, but PEFT's are {', '.join(tensors)}.",
            )
            parameter.normal_(std=0.3)
            tensors[name].copy_(parameter)
