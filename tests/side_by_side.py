"""Prints the logits of this project and of the reference libraries beside each other.

    python tests/side_by_side.py

For one prompt of tiny/data, on the embedded model in NF4 with the same random adapter. The
reference is transformers + PEFT + bitsandbytes.
"""

import torch
from conftest import ROOT, distance, pair

import data
from support.examples import load_examples

directory = ROOT / "tiny" / "model"
mine, theirs = pair(directory, torch.float32, "nf4")
tokenizer = data.load_tokenizer(directory)
example = load_examples(str(ROOT / "tiny" / "data"), "validation_matched", 1)[0]
prompt, _ = data.encode(example, tokenizer)
ids = torch.tensor(prompt)

with torch.no_grad():
    ours = mine(ids)[-1]
    reference = theirs(ids[None]).logits[0, -1]

print(f"{'next token':12} {'ours':>12} {'transformers + PEFT':>22}")
for token in reference.topk(5).indices.tolist():
    text = repr(tokenizer.decode([token]))
    print(f"{text:12} {ours[token].item():12.6f} {reference[token].item():22.6f}")
print(f"all {len(ours)}: relative distance {distance(ours, reference):.1e}")
