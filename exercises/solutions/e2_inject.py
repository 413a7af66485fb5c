"""Exercise 2: adapters beside the layers of a model that the targets name."""

from torch import nn

from exercises.solutions.e1_lora_linear import LoRALinear


def inject(model: nn.Module, targets: tuple[str, ...], rank: int, alpha: float) -> list[str]:
    # With a dot before both, "proj" does not match q_proj.
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(f".{path}".endswith(f".{target}") for target in targets)
    ]
    if not paths:
        raise ValueError(f"no linear layer matches {targets}")
    model.requires_grad_(False)  # first: what is put in afterwards trains
    for path in paths:
        model.set_submodule(path, LoRALinear(model.get_submodule(path), rank, alpha))
    return paths
