"""Exercise 7: LoRA+. 15 minutes.

With Adam each number moves by about the learning rate in a step, whatever the size of its
gradient. A row of A has as many numbers as the model is wide, a row of B only `rank`: moved by
the same rate, A changes B A x by more, the wider the model. LoRA+ (arXiv:2402.12354, sections 3
and 4; the experiments are in section 5) shows that no common rate lets both learn as they should
in a wide model, and takes two:

    A's learning rate   lr
    B's learning rate   lr * ratio        such as ratio = 16

The layer stays as it is. An optimizer of torch takes, in the place of parameters, groups of
them: dicts with "params" and with what is special to them, such as "lr".

What you should see: how far the numbers of A and B move in each step, on average. B moves by
16e-3 in the first. A does not: its gradient is zero as long as B is (exercise 1).

    >>> import torch
    >>> from exercises.solutions.e2_inject import inject
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(64, 64))
    >>> x = torch.randn(16, 64)
    >>> _ = inject(model, ("0",), rank=4, alpha=8)
    >>> optimizer = torch.optim.AdamW(loraplus_groups(model, lr=1e-3, ratio=16), weight_decay=0.0)
    >>> adapter = (model[0].lora_A.weight, model[0].lora_B.weight)
    >>> for step in range(3):
    ...     before = [weight.detach().clone() for weight in adapter]
    ...     model(x).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     moved = [(now - then).abs().mean().item() for now, then in zip(adapter, before)]
    ...     print("A {:.4f}  B {:.4f}".format(*moved))
    A 0.0000  B 0.0160
    A 0.0007  B 0.0149
    A 0.0008  B 0.0138
"""

from torch import nn


def loraplus_groups(model: nn.Module, lr: float, ratio: float) -> list[dict]:
    """Returns the groups of a model's trained parameters, for an optimizer of torch.

    The names of A's weights hold ".lora_A.", those of B's ".lora_B.". All else is frozen.
    """
    raise NotImplementedError("exercise 7: loraplus_groups")
