"""Exercise 3, compared with PEFT's merge_and_unload."""

import torch
from torch import nn

from exercises.judge import check, check_close, draw, peft_model, small_model
from exercises.solutions.e2_inject import inject

TARGETS = ("q_proj", "mlp.fc")


def adapted(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """Returns a model with random adapters, and PEFT's model with the same."""
    model = small_model(dtype)
    theirs = peft_model(model, r=4, lora_alpha=12, target_modules=list(TARGETS))
    inject(model, TARGETS, rank=4, alpha=12)
    draw(model, theirs)
    return model, theirs


def test_the_model_has_the_layers_that_it_had_before(answer):
    model, _ = adapted()
    answer.merge(model)
    found = list(model.state_dict())
    left = [name for name in found if name not in small_model().state_dict()]
    check(
        not left,
        f"The merged model still holds {', '.join(left[:3])}, ... Its adapters would be added "
        "twice: put each base layer back in place of its LoRALinear.",
    )
    check(found == list(small_model().state_dict()), f"The merged model holds only {found}.")


def test_weights_are_pefts(answer):
    model, theirs = adapted()
    layers = {path: model.get_submodule(path) for path in ("blocks.0.q_proj", "blocks.1.mlp.fc")}
    base = {path: layer.base_layer.weight.clone() for path, layer in layers.items()}
    answer.merge(model)
    theirs = theirs.merge_and_unload().state_dict()
    for path, layer in layers.items():
        a = layer.lora_A.weight.detach()
        b = layer.lora_B.weight.detach()
        cures = {
            "It is still W: nothing was added in place.": base[path],
            "It is W + B A: the scale is missing.": base[path] + b @ a,
            "It is W - s B A.": base[path] - 3 * b @ a,
        }
        if base[path].shape[0] == base[path].shape[1]:
            # Only for a square layer is this no error.
            transposed = base[path] + 3 * (b @ a).T
            cures["It is W + s (B A)^T: W is (out, in), as B A is."] = transposed
        weight = model.get_submodule(path).weight
        check_close(weight, theirs[f"{path}.weight"], f"the weight of {path}", cures)
        check(
            weight.is_leaf and not weight.requires_grad,
            f"The weight of {path} has a gradient history, which keeps what W + s B A was "
            "computed from. Merge under torch.no_grad().",
        )


def test_a_sum_in_sixteen_bits_is_rounded_once(answer):
    model, _ = adapted(torch.bfloat16)
    layer = model.get_submodule("blocks.0.q_proj")
    weight = layer.base_layer.weight.clone()
    delta = (layer.scale * layer.lora_B.weight @ layer.lora_A.weight).detach()
    answer.merge(model)
    found = model.get_submodule("blocks.0.q_proj").weight
    check(found.dtype == torch.bfloat16, f"A weight in bf16 became one in {found.dtype}.")
    expected = (weight.float() + delta).bfloat16()
    # The products of one test in fp32 may be summed in another order than the other's: a few
    # sums then round the other way.
    differ = (found != expected).float().mean().item()
    check(
        differ < 0.02,
        f"{100 * differ:.0f} % of the merged weights in bf16 are not the rounded sum. A and B are "
        "in fp32: add s B A in fp32, and round the sum. Rounded before and after, it loses twice.",
    )
