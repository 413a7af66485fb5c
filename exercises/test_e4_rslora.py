"""Exercise 4: does PEFT, from the saved file, compute what was trained?"""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from exercises.judge import check, check_close, draw, peft_model, peft_tensors, small_model
from exercises.solutions.e2_inject import inject

TARGETS = ("q_proj", "mlp.fc")


def config_of(answer, use_rslora: bool):
    return answer.LoRAConfig(rank=4, alpha=12, targets=TARGETS, use_rslora=use_rslora)


def adapted(scale: float) -> tuple[nn.Module, nn.Module]:
    """Returns a model without adapters, and the same with random adapters of this scale."""
    base = small_model()
    model = copy.deepcopy(base)
    paths = inject(model, TARGETS, rank=4, alpha=12)
    draw(model, peft_model(base, r=4, target_modules=list(TARGETS)))
    for path in paths:
        model.get_submodule(path).scale = scale
    return base, model


def save(model: nn.Module, raw: dict, directory: Path) -> None:
    """Writes an adapter's two files."""
    tensors = {
        f"base_model.model.{name}": parameter.detach()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(raw))


def test_the_scale(answer):
    for use_rslora, expected in ((False, 3.0), (True, 6.0)):
        found = config_of(answer, use_rslora).scale()
        cures = {
            3.0: "\nThat is alpha / rank, for use_rslora=False.",
            6.0: "\nThat is alpha / sqrt(rank), for use_rslora=True.",
            12**0.5 / 2: "\nOnly the rank goes under the root.",
            12**0.5 / 4: "\nThe rank goes under the root, alpha does not.",
        }
        check(
            found == expected,
            f"With rank 4, alpha 12 and use_rslora={use_rslora} the scale is {found}, "
            f"and should be {expected}.{cures.get(found, '')}",
        )


def test_what_peft_loads_is_what_was_trained(answer, tmp_path):
    from peft import PeftModel

    for use_rslora in (True, False):
        config = config_of(answer, use_rslora)
        base, model = adapted(config.scale())
        save(model, answer.to_peft(config), tmp_path)
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        x = torch.randn(5, 24)
        _, with_other_scale = adapted(9 - config.scale())  # 3 for 6, and 6 for 3
        cure = (
            "PEFT has loaded your file without an error, and computes with alpha / rank = 3; the "
            "adapter was trained with alpha / sqrt(rank) = 6.\nIts tensors are right. The scale "
            "is not among them: whoever loads the file computes it from adapter_config.json, and "
            "there to_peft wrote\n    "
            f"{json.dumps(answer.to_peft(config))}\nPEFT has a key for this: see the fields of "
            "peft.LoraConfig."
        )
        if not use_rslora:
            cure = "PEFT computes with alpha / sqrt(rank), for an adapter with use_rslora=False."
        name = f"what PEFT computes from the file of an adapter with use_rslora={use_rslora}"
        check_close(theirs(x), model(x), name, {cure: with_other_scale(x)})


def test_what_peft_saves_is_read_with_its_scale(answer, tmp_path):
    for use_rslora in (True, False):
        theirs = peft_model(
            small_model(), r=4, lora_alpha=12, target_modules=["q_proj"], use_rslora=use_rslora
        )
        check(bool(peft_tensors(theirs)), "PEFT has added no adapter.")
        theirs.save_pretrained(tmp_path)
        raw = json.loads((tmp_path / "adapter_config.json").read_text())
        config = answer.from_peft(raw)
        check(
            config.use_rslora == use_rslora,
            f"PEFT has saved an adapter with use_rslora={use_rslora}. from_peft read its file as "
            f"one with use_rslora={config.use_rslora}: another model, without an error. The "
            "file has a key that from_peft does not read.",
        )
    del raw["use_rslora"]
    try:
        config = answer.from_peft(raw)
    except KeyError:
        check(
            False,
            "from_peft refuses a file without the key use_rslora, as PEFT before 0.8 wrote them. "
            "Such files are plain LoRA.",
        )
    check(not config.use_rslora, "A file without the key use_rslora is plain LoRA.")
