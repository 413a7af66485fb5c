"""Exercise 3: merge. 15 minutes.

An adapter adds two thin products to each layer, which cost time whenever the model is used. This
cost can be avoided: after training the sum can be computed once (arXiv:2106.09685, section 4.1,
"No Additional Inference Latency"):

    W  <-  W + scale B A

Then the LoRALinear is replaced by its base layer. The model again has the layers, the names and
the speed that it had before LoRA. PEFT calls this merge_and_unload.

A and B are in fp32. If W is in bf16, with 8 significant bits, the sum must be rounded: once, at
the end. (NF4, with 16 levels, would round away most of a small update, so one dequantises W
before merging.)

What you should see: the distance between the outputs of the merged and of the adapted model.

    >>> import torch
    >>> import copy
    >>> from exercises.solutions.e2_inject import inject
    >>> def merged_distance(dtype):
    ...     _ = torch.manual_seed(0)
    ...     model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)).to(dtype)
    ...     _ = inject(model, ("0", "1"), rank=8, alpha=16)
    ...     for layer in model:
    ...         _ = nn.init.normal_(layer.lora_B.weight, std=0.01)
    ...     x = torch.randn(64, 512)
    ...     before = copy.deepcopy(model).float()(x)
    ...     merge(model)
    ...     return ((model.float()(x) - before).norm() / before.norm()).item()
    >>> merged_distance(torch.float32) < 1e-5
    True
    >>> f"{merged_distance(torch.bfloat16):.4f}"
    '0.0024'
"""

from torch import nn

from exercises.solutions.e1_lora_linear import LoRALinear  # noqa: F401


def merge(model: nn.Module) -> None:
    """Adds scale B A to the base weight of each LoRALinear, and unwraps the layer, in place.

    The weights keep their dtype and stay frozen.
    """
    raise NotImplementedError("exercise 3: merge")
