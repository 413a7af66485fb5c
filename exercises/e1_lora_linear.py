"""Exercise 1: LoRALinear. 20 minutes.

Full fine-tuning changes a weight W by a matrix dW of the same size. LoRA
(arXiv:2106.09685, section 4.1, equation 3) freezes W and learns dW as a product of two
thin matrices:

    y  =  W x + bias  +  (alpha / rank) B A x          A (rank, in),  B (out, rank)

Only A and B are trained: rank * (in + out) numbers instead of in * out. B starts at zero, so
training starts exactly from the base model. A starts random. If both were zero, both gradients
would stay zero. With only B zero, only the gradient of A is zero, and only in the first step:

    B's gradient  g (scale A x)^T        A's gradient  scale (B^T g) x^T

Here x and g, the gradient of y, are columns, for one token. In PyTorch tokens are rows: A x is
x @ A.T, which is what nn.Linear computes.

You may choose how to initialise A: the paper uses a normal distribution, microsoft/LoRA and
PEFT use nn.init.kaiming_uniform_(weight, a=math.sqrt(5)). Leave dropout out.

What you should see (python -m doctest -f exercises/e1_lora_linear.py prints nothing if you do):

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> base = nn.Linear(512, 512)
    >>> x = torch.randn(4, 512)
    >>> layer = LoRALinear(base, rank=8, alpha=16)
    >>> sum(p.numel() for p in layer.parameters())
    270848
    >>> sum(p.numel() for p in layer.parameters() if p.requires_grad)    # 3 % of them
    8192
    >>> torch.equal(layer(x), base(x))    # because B = 0
    True
    >>> _ = nn.init.eye_(layer.lora_A.weight)    # A x is the first 8 numbers of x
    >>> layer(x).sum().backward()
    >>> [round(w.grad.norm().item(), 1) for w in (layer.lora_A.weight, layer.lora_B.weight)]
    [0.0, 214.7]
"""

from torch import Tensor, nn


class LoRALinear(nn.Module):
    """Computes base_layer(x) + scale B A x for x (..., in), scale = alpha / rank.

    Attributes: `base_layer`, which is frozen; `scale`; and two nn.Linear without bias, with the
    names of PEFT: `lora_A`, whose weight is A (rank, in), and `lora_B`, whose weight is B
    (out, rank).
    """

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float):
        super().__init__()
        raise NotImplementedError("exercise 1: LoRALinear.__init__")

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("exercise 1: LoRALinear.forward")
