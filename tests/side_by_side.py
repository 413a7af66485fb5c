"""Prints the logits of this project and of transformers + PEFT + bitsandbytes beside each other, for one prompt.

    python tests/side_by_side.py
"""
import torch
from conftest import ROOT, distance, pair

import data

mine, theirs = pair(ROOT / "tiny" / "model", torch.float32, "nf4")
tokenizer = data.load_tokenizer(ROOT / "tiny" / "model")
example = data.load_examples(str(ROOT / "tiny" / "data"), "validation_matched", 1)[0]
ids = torch.tensor([data.encode(example, tokenizer)[0]])
with torch.no_grad():
    ours, reference = mine(ids)[0, -1], theirs(ids).logits[0, -1]
print(f"{'next token':12} {'ours':>12} {'transformers + PEFT':>22}")
for token in reference.topk(5).indices.tolist():
    print(f"{tokenizer.decode([token])!r:12} {ours[token].item():12.6f} {reference[token].item():22.6f}")
print(f"all {len(ours)}: relative distance {distance(ours, reference):.1e}")
