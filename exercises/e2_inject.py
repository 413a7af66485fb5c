"""Exercise 2: adapters into a model. 20 minutes.

You can adapt a model without changing its code: replace each chosen linear layer, in place, by
a LoRALinear that wraps it. The paper (arXiv:2106.09685, section 4.2) adapts only projections of
attention, in most experiments those of query and value. It freezes everything else: MLPs,
LayerNorms, biases, embeddings. A frozen number needs no gradient and neither of Adam's two
moments.

`targets` names layers by the ends of their paths. The rule is PEFT's: a name matches the end of
a path, and begins at its start or after a dot. In a model with the layers

    layers.0.self_attn.q_proj    layers.0.self_attn.proj    layers.0.mlp.fc1

"proj" matches only layers.0.self_attn.proj, and "mlp.fc1" matches layers.0.mlp.fc1.

You need model.named_modules(), get_submodule and set_submodule. LoRALinear comes from the
solution of exercise 1; if yours passes its tests, import yours.

What you should see, for phi-2 without its weights (on the meta device):

    >>> import torch
    >>> import phi2
    >>> with torch.device("meta"):
    ...     model = phi2.Phi2(phi2.Phi2Config())
    >>> paths = inject(model, ("q_proj", "v_proj"), rank=8, alpha=16)
    >>> len(paths), paths[0]
    (64, 'model.layers.0.self_attn.q_proj')
    >>> trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    >>> total = sum(p.numel() for p in model.parameters())
    >>> print(f"{trained:,} of {total:,}, {100 * trained / total:.2f} %")
    2,621,440 of 2,782,305,280, 0.09 %
"""

from torch import nn

from exercises.solutions.e1_lora_linear import LoRALinear  # noqa: F401


def inject(model: nn.Module, targets: tuple[str, ...], rank: int, alpha: float) -> list[str]:
    """Freezes `model` and wraps each nn.Linear that `targets` name, in place.

    Returns the paths of the wrapped layers, in the order of named_modules. Raises ValueError
    if no layer matches, before it changes anything.
    """
    raise NotImplementedError("exercise 2: inject")
