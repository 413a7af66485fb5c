"""Exercise 7: B learns faster than A."""

from torch import nn


def loraplus_groups(model: nn.Module, lr: float, ratio: float) -> list[dict]:
    of_a = []
    of_b = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = of_b if ".lora_B." in name else of_a
            group.append(parameter)
    return [{"params": of_a, "lr": lr}, {"params": of_b, "lr": lr * ratio}]
