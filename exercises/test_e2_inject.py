"""Exercise 2, compared with PEFT on a small model."""

import torch
from torch import nn

from exercises.judge import check, check_close, draw, peft_model, small_model

TARGETS = ("proj", "mlp.fc")
PATHS = ["blocks.0.proj", "blocks.0.mlp.fc", "blocks.1.proj", "blocks.1.mlp.fc"]


def test_a_name_matches_the_end_of_a_path_at_a_dot(answer):
    paths = answer.inject(small_model(), TARGETS, rank=4, alpha=12)
    cure = ""
    if "blocks.0.q_proj" in (paths or []):
        cure = "\n'proj' must not match q_proj: a match starts at a dot."
    elif "blocks.0.mlp.fc" not in (paths or []):
        cure = "\nA target may hold more than one name: 'mlp.fc' is the fc in each mlp."
    check(
        paths == PATHS,
        f"inject(model, {TARGETS}) returned {paths}\nand should return {PATHS}.{cure}",
    )


def test_only_the_adapters_are_trained(answer):
    model = small_model()
    answer.inject(model, TARGETS, rank=4, alpha=12)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    check(
        bool(trained),
        "Nothing is trained: freeze the model before the adapters are put in, not after.",
    )
    expected = {f"{path}.lora_{letter}.weight" for path in PATHS for letter in "AB"}
    left = sorted(trained - expected)
    check(not left, f"Trained besides the adapters: {', '.join(left)}. Freeze all of it.")
    missing = sorted(expected - trained)
    check(
        not missing,
        f"Not trained: {', '.join(missing)}. A parameter's name begins with its layer's path: "
        "put LoRALinear in place of the layer, at the same path.",
    )


def test_outputs_are_pefts(answer):
    model = small_model()
    theirs = peft_model(model, r=4, lora_alpha=12, target_modules=list(TARGETS))
    x = torch.randn(5, 24)
    base = model(x)
    answer.inject(model, TARGETS, rank=4, alpha=12)
    check_close(model(x), base, "the output at the start, where B = 0")
    draw(model, theirs)
    cure = "It is the base model's: the new layers are not part of the model, and are not called."
    check_close(model(x), theirs(x), "the output with random A and B", {cure: base})


def test_a_target_that_matches_no_layer_is_an_error(answer):
    model = small_model()
    try:
        answer.inject(model, ("query",), rank=4, alpha=12)
    except ValueError:
        pass
    else:
        check(
            False,
            "inject(model, ('query',)) matched no layer and said nothing: "
            "training would continue without an adapter. Raise ValueError.",
        )
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    check(not frozen, "inject(model, ('query',)) raised, but froze the model before it did.")


def test_layers_that_are_not_linear_are_left_alone(answer):
    model = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24))
    paths = answer.inject(model, ("0", "1"), rank=4, alpha=12)
    check(paths == ["1"], f"Of a LayerNorm 0 and a Linear 1 it wrapped {paths}, not ['1'].")
