"""Exercise 7, compared with PEFT's create_loraplus_optimizer."""

import torch

from exercises.judge import check, check_close, draw, peft_model, peft_tensors, small_model
from exercises.solutions.e2_inject import inject

TARGETS = ("q_proj", "mlp.fc")
LR = 1e-3
RATIO = 16


def adapted():
    """Returns a model with adapters, PEFT's model with the same, and its optimizer for LoRA+."""
    from peft.optimizers import create_loraplus_optimizer

    model = small_model()
    theirs = peft_model(model, r=4, lora_alpha=12, target_modules=list(TARGETS))
    inject(model, TARGETS, rank=4, alpha=12)
    draw(model, theirs)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO
    )
    return model, theirs, optimizer


def rates(groups: list[dict]) -> dict[int, float]:
    """Returns the learning rate of each parameter, by its id."""
    return {id(parameter): group["lr"] for group in groups for parameter in group["params"]}


def test_each_parameter_has_pefts_learning_rate(answer):
    model, theirs, optimizer = adapted()
    groups = answer.loraplus_groups(model, LR, RATIO)
    check(
        isinstance(groups, list) and all({"params", "lr"} <= set(group) for group in groups),
        "loraplus_groups should return a list of dicts, each with 'params' and 'lr', as torch's "
        "optimizers take them in place of parameters.",
    )
    found = rates(groups)
    expected = rates(optimizer.param_groups)
    tensors = peft_tensors(theirs)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            check(
                id(parameter) not in found,
                f"{name} is frozen, and should be in no group: AdamW would keep moments for it.",
            )
            continue
        check(id(parameter) in found, f"{name} is in no group, and would never be trained.")
        rate = found[id(parameter)]
        wanted = expected[id(tensors[name])]
        cure = ""
        if rate * wanted == LR * LR * RATIO:
            cure = "\nThe rates of A and B are exchanged: B is the one that learns faster."
        elif rate == LR / RATIO:
            cure = "\nlr is A's rate; B's is lr * ratio."
        check(
            rate == wanted,
            f"{name} has the learning rate {rate:g}, and PEFT gives it {wanted:g}.{cure}",
        )
    count = sum(len(list(group["params"])) for group in groups)
    check(count == len(found), "A parameter is in two groups.")


def test_three_steps_end_where_pefts_end(answer):
    model, theirs, optimizer = adapted()
    mine = torch.optim.AdamW(answer.loraplus_groups(model, LR, RATIO), weight_decay=0.0)
    x = torch.randn(8, 24)
    for _ in range(3):
        for network, stepper in ((model, mine), (theirs, optimizer)):
            network(x).square().mean().backward()
            stepper.step()
            stepper.zero_grad()
    tensors = peft_tensors(theirs)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            check_close(parameter, tensors[name], f"{name} after three steps of AdamW")
