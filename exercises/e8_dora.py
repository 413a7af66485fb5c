"""Exercise 8: DoRA. 40 minutes.

DoRA (arXiv:2402.09353, section 4.1, equation 5) writes a weight as a length times a direction,
separately for each output. It learns both: the length m directly, the direction with LoRA. With
W' = W + scale B A:

    y  =  m / norm(W') * (W' x)  +  bias         m (out,),  norm(W') (out,): of each row of W'

m starts as norm(W), so that the layer starts as W. The paper speaks of columns. The authors'
code and PEFT use the rows of PyTorch's W (out, in), so that each output has its own length.

norm(W') depends on A and B, and so would have a gradient. Section 4.3 treats it as a constant in
the backward pass, which saves memory and changes the result little. PEFT does the same, and your
gradients must equal PEFT's.

LoRALinear comes from the solution of exercise 1; DoRALinear has its attributes and one more. You
need not save memory here: you may compute W' in full in each pass.

What you should see:

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> base = nn.Linear(512, 512)
    >>> x = torch.randn(4, 512)
    >>> layer = DoRALinear(base, rank=8, alpha=16)
    >>> sum(p.numel() for p in layer.parameters() if p.requires_grad)    # LoRA has 8192
    8704
    >>> torch.allclose(layer(x), base(x), atol=1e-6)
    True
    >>> _ = nn.init.eye_(layer.lora_A.weight)
    >>> _ = torch.manual_seed(1)
    >>> _ = nn.init.normal_(layer.lora_B.weight, std=0.1)
    >>> merged = (layer(torch.eye(512)) - base.bias).T    # the weight that the layer stands for
    >>> torch.allclose(merged.norm(dim=1), layer.magnitude)    # A and B do not change lengths
    True
    >>> cosine = torch.cosine_similarity(merged, base.weight).mean()    # they turn rows
    >>> f"{cosine:.2f}"
    '0.73'
"""

from torch import Tensor, nn

from exercises.solutions.e1_lora_linear import LoRALinear


class DoRALinear(LoRALinear):
    """Computes m / norm(W') * (W' x) + bias for x (..., in), where W' = W + scale B A.

    Attributes: `base_layer`, `scale`, `lora_A` and `lora_B` from LoRALinear; and `magnitude`,
    which is m (out,), an nn.Parameter.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float):
        super().__init__(base_layer, rank, alpha)
        raise NotImplementedError("exercise 8: DoRALinear.__init__")

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("exercise 8: DoRALinear.forward")
