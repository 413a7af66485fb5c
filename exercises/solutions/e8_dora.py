"""Exercise 8: the norm of each row of W is learned apart from its direction."""

import torch.nn.functional as F
from torch import Tensor, nn

from exercises.solutions.e1_lora_linear import LoRALinear


class DoRALinear(LoRALinear):
    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float):
        super().__init__(base_layer, rank, alpha)
        self.magnitude = nn.Parameter(base_layer.weight.norm(dim=1))  # (out,)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base_layer.weight + self.scale * self.lora_B.weight @ self.lora_A.weight
        norm = weight.norm(dim=1).detach()  # a constant in the backward pass, section 4.3
        return F.linear(x, (self.magnitude / norm)[:, None] * weight, self.base_layer.bias)
