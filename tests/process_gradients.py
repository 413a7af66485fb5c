"""Run by torchrun in test_processes.py: the gradients of steps as train.py makes them.

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
from support import processes  # noqa: E402
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

    gradients = {}
    for loss in ("answer", "full"):
        for rows in (7, 1):  # of one row the second process gets none
            step = next(data.rows_of_steps(load_examples(DATASET, "train", rows), rows, seed=0))
            mine = step[processes.NUMBER :: processes.COUNT]
            encoded = [data.encode(example, tokenizer) for example in mine]
            args = Namespace(loss=loss, share_prefix=True, batch_size=2)
            batches = train.collated(encoded, tokenizer, args)
            (targets,) = processes.total(device, train.count_predicted(batches))

            def keep(*_, title=f"{loss} loss, {rows} rows"):
                for name, parameter in parameters.items():
                    gradients[f"{title}, {name}"] = parameter.grad

            hook = optimizer.register_step_pre_hook(keep)  # before they are set to zero
            train.training_step(model, optimizer, batches, targets, max_grad_norm=math.inf)
            hook.remove()
    if processes.IS_FIRST:
        save_file(gradients, sys.argv[1])
    processes.stop()


if __name__ == "__main__":
    main()
