"""Run by torchrun in test_ranks.py: the gradients of one step as train.py makes them, saved by the first rank.

    torchrun --nproc-per-node 2 tests/rank_gradients.py FILE
"""
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation
import lora
import ranks
import train

device, found = ranks.start("cpu"), {}
model, tokenizer = evaluation.load_model(Path("tiny/model"), "nf4", torch.float32, device).eval(), data.load_tokenizer("tiny/model")
torch.manual_seed(0)
lora.inject(model, lora.LoRAConfig(dropout=0.0))
parameters = lora.lora_parameters(model)
for parameter in parameters.values():  # B too
    torch.nn.init.normal_(parameter, std=0.1)
for loss in ("answer", "full"):
    for count in (7, 1):  # of one row, the second rank has none
        examples = next(data.batches(data.load_examples("tiny/data", "train", count), count, seed=0))
        encoded = [data.encode(example, tokenizer) for example in examples[ranks.RANK::ranks.WORLD]]
        targets, = ranks.total(device, sum(len(answer) + (len(prompt) - 1) * (loss == "full") for prompt, answer in encoded))
        if encoded:
            (train.batch_loss(model, encoded, len(data.fixed_ids(tokenizer)[0]), loss)[0] / targets).backward()
        ranks.add_gradients(parameters.values())
        for name, parameter in parameters.items():
            found[f"{loss} {count} {name}"], parameter.grad = parameter.grad, None
if ranks.FIRST:
    save_file(found, sys.argv[1])
ranks.stop()
