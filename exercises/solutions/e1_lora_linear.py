"""Exercise 1: W x + (alpha / rank) B A x."""

import math

import torch
from torch import Tensor, nn


class LoRALinear(nn.Module):
    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.scale = alpha / rank
        # Trained in fp32, whatever the base is in: bf16 would round small steps away.
        options = {"bias": False, "device": base_layer.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(base_layer.in_features, rank, **options)
        self.lora_B = nn.Linear(rank, base_layer.out_features, **options)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # +- 1 / sqrt(in)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.scale * self.lora_B(self.lora_A(x))
