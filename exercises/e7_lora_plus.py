"""Exercise 7: LoRA+. 15 minutes.

A step of Adam moves each number by about the learning rate, however large its gradient is. A row
of A has as many numbers as the model is wide, but a row of B has only `rank`. So at a common rate
a step of A changes B A x more than a step of B does, and the more so the wider the model. LoRA+
(arXiv:2402.12354, sections 3 and 4; the experiments are in section 5) shows that in a wide model
no common rate lets both learn well, and uses two:

    A's learning rate   lr
    B's learning rate   lr * ratio        such as ratio = 16

The layer does not change. Instead of parameters, torch's optimizers also take groups of
parameters: dicts with "params" and the settings of the group, such as "lr".

What you should see: how far the numbers of A and B move on average in each step. In the first
step B moves by 16e-3. A does not move, because its gradient is zero while B is (exercise 1).

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
    """Returns the groups of a model's trained parameters, for one of torch's optimizers.

    The names of A's weights contain ".lora_A.", those of B's ".lora_B.". All others are frozen.
    """
    raise NotImplementedError("exercise 7: loraplus_groups")
