"""Run by torchrun in test_processes.py: the gradients of steps as train.py makes them.

And what steps in fp16 leave, of which one overflows in a single process.

    torchrun --nproc-per-node 2 tests/process_gradients.py FILE

The first process saves them in FILE.
"""

import math
import sys
from argparse import Namespace
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import lora  # noqa: E402
import train  # noqa: E402
from support import loss_scale, processes  # noqa: E402
from support.examples import load_examples  # noqa: E402

MODEL = ROOT / "tiny" / "model"
DATASET = str(ROOT / "tiny" / "data")


def main() -> None:
    device = processes.start("cpu")
    tokenizer = data.load_tokenizer(MODEL)
    model = evaluation.load_model(MODEL, "nf4", "fp32", device)
    torch.manual_seed(0)
    lora.inject(model, lora.LoRAConfig(dropout=0.0))
    parameters = lora.lora_parameters(model)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.0)  # the same parameters in each step
    for parameter in parameters.values():  # B too, or A would have no gradient
        torch.nn.init.normal_(parameter, std=0.1)

    scaler = loss_scale.new_scaler("fp32", device)
    gradients = {}
    for loss in ("answer", "full"):
        for rows in (7, 1):  # of one row the second process gets none
            batches = batches_of(rows, loss, tokenizer)
            (targets,) = processes.total(device, train.count_predicted(batches))

            def keep(*_, title=f"{loss} loss, {rows} rows"):
                for name, parameter in parameters.items():
                    gradients[f"{title}, {name}"] = parameter.grad

            hook = optimizer.register_step_pre_hook(keep)  # before they are set to zero
            train.training_step(model, optimizer, scaler, batches, targets, math.inf)
            hook.remove()
    decided = decisions_in_fp16(model, parameters, tokenizer, device)
    if processes.IS_FIRST:
        save_file(gradients | decided, sys.argv[1])
    processes.stop()


def batches_of(rows: int, loss: str, tokenizer) -> list[data.Batch]:
    """Returns this process's share of a step of so many rows."""
    step = next(data.rows_of_steps(load_examples(DATASET, "train", rows), rows, seed=0))
    mine = step[processes.NUMBER :: processes.COUNT]
    encoded = [data.encode(example, tokenizer) for example in mine]
    return train.collated(encoded, tokenizer, Namespace(loss=loss, share_prefix=True, batch_size=2))


def decisions_in_fp16(model, parameters: dict, tokenizer, device: torch.device) -> dict:
    """Returns what each process has after a step that is taken, and one that overflows in one.

    Of the first one's row the second process gets none. Rows of the results are processes.
    """
    optimizer = torch.optim.AdamW(parameters.values(), fused=True)
    scaler = loss_scale.new_scaler("fp16", device)  # which does not ask what the model is in
    decided = {}
    for title, rows in (("taken", 1), ("skipped", 4)):
        batches = batches_of(rows, "answer", tokenizer)
        if title == "skipped" and processes.NUMBER == processes.COUNT - 1:
            next(iter(parameters.values())).register_hook(lambda gradient: gradient * math.inf)
        _, norm = train.training_step(model, optimizer, scaler, batches, 2 * rows, 1.0)
        adapter = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
        values = {"norm": norm, "scale": torch.tensor(scaler.get_scale()), "adapter": adapter}
        for name, value in values.items():
            decided[f"{title} {name}"] = torch.stack(processes.gather(value))
    return decided


if __name__ == "__main__":
    main()
