"""Counts the memory of one training step before a weight is loaded, for the flags of train.py.

    python -m scripts.plan --model microsoft/phi-2 --dataset nyu-mll/glue --batch-size 64

One step, forward and backward, runs on the longest rows of the data with tensors that have shapes
and no content. Whatever operation makes a tensor, its bytes are counted until it is freed. So the
peak is what an allocator has to give out. Not counted are memory outside of the allocator (a CUDA
context, the libraries), what the allocator loses between tensors, and scratch memory within a
kernel.

Attention differs by device. For --device cpu the step runs on fake CPU tensors, through the code
that a CPU takes. For other devices it runs on the meta device, and scaled_dot_product_attention is
replaced by one of its fused kernels, since the meta device would count the unfused form. The device
need not be there.
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python scripts/plan.py`

import data
import eval as evaluation
import lora
import phi2
import quant
import train
from support import checkpoints, cli, examples
from support.live_bytes import LiveBytes

CANDIDATES = 1000  # rows with the most characters; those with the most tokens are among them


class Count(TorchDispatchMode):
    """Counts the bytes of the tensors that are made on one kind of device while it is on.

    Views of tensors in `known` are not counted.
    """

    def __init__(self, device_type: str, known: list[Tensor]):
        super().__init__()
        self.device_type = device_type
        self.bytes = LiveBytes([tensor.untyped_storage() for tensor in known])

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device_type:
                self.bytes.add(tensor.untyped_storage())
        return result


def fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask=None, is_causal=False) -> Tensor:
    """Stands for F.scaled_dot_product_attention: the kernel that takes a mask on a GPU.

    Other kernels store as much: the output, and a number for each query and head.
    """
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    output, *_ = kernel(q, k, v, attn_mask, True, is_causal=is_causal)
    return output


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def longest_rows(
    rows, tokenizer: Tokenizer, count: int, max_length: int | None
) -> list[tuple[list[int], list[int]]]:
    """Returns the `count` encoded rows with the most tokens: no batch of an epoch holds more."""
    characters = [
        len(premise) + len(hypothesis)
        for premise, hypothesis in zip(rows["premise"][:], rows["hypothesis"][:])
    ]
    by_characters = sorted(range(len(characters)), key=characters.__getitem__)
    candidates = by_characters[-(CANDIDATES + count) :]
    encoded = [data.encode(rows[number], tokenizer, max_length) for number in candidates]
    encoded.sort(key=lambda row: len(row[0]), reverse=True)
    return encoded[:count]


# -----------------------------------------------------------------------------
# The step


def build_base(directory: Path, args: argparse.Namespace) -> phi2.Phi2:
    """Returns train.py's frozen model without content: fake for a CPU, else on meta."""
    with torch.device("meta"):
        model = phi2.Phi2(phi2.read_config(directory))
    if args.quant == "nf4":
        quant.quantize_linears(model, double_quant=args.double_quant)
    dtype = evaluation.DTYPES[args.dtype]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, quant.NF4Linear):
            module.dtype = dtype
    if args.device == "cpu":  # meta tensors become fake ones of a CPU
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
    keep = args.keep_dequantized
    if keep is None:
        keep = args.quant == "none"  # which leaves nothing to keep
    evaluation.choose_what_is_stored(model, keep, args.device)
    if args.checkpointing:
        model.model.checkpointing = "blocks"
    if args.residual_dropout is not None:
        train.set_residual_dropout(model, args.residual_dropout)
    return model


def memory(
    directory: Path, args: argparse.Namespace, encoded: list, prefix: int
) -> dict[str, int]:
    """Returns bytes by name for a step on encoded rows that share `prefix` ids.

    "sum" is the peak within the step.
    """
    model = build_base(directory, args)
    base = list(model.parameters())
    kept = []
    for name, buffer in model.named_buffers():
        (kept if name.endswith(".kept") else base).append(buffer)
    lora.inject(model, lora.LoRAConfig(args.rank, args.alpha, args.dropout, args.targets))
    adapter = list(lora.lora_parameters(model).values())
    bytes_of = {
        "base weights": size(base),
        "base weights, dequantised": size(kept),
        "adapter": size(adapter),
        "its optimiser": 2 * size(adapter),  # AdamW's two averages
    }
    if args.accumulate > 1:
        bytes_of["its gradient, of earlier batches"] = size(adapter)
        for parameter in adapter:
            parameter.grad = torch.zeros_like(parameter)

    device_type = base[0].device.type
    attention = nullcontext()
    if device_type != "cpu":
        # Not by a mode of torch: it would be off in what the backward pass computes again.
        attention = patch.object(F, "scaled_dot_product_attention", fused_attention)
    with Count(device_type, base + kept + adapter) as count, attention:
        batch = data.collate(encoded, prefix, args.loss)
        loss = train.batch_loss(model.train(), batch)
        after_forward = count.bytes.now
        loss.backward()
    # The loss is computed in fp32.
    logits = 4 * len(batch.next_ids) * model.config.vocab_size
    bytes_of["logits"] = logits
    bytes_of["activations"] = after_forward - logits
    bytes_of["passing, at the peak"] = count.bytes.most - after_forward
    return bytes_of | {"sum": sum(bytes_of.values())}


def main() -> None:
    parser = cli.train_parser("the memory of a training step with these flags of train.py")
    args = cli.train_arguments(parser=parser)
    # Without the weights.
    directory = checkpoints.find(
        args.model, phi2.read_config, checkpoints.DESCRIPTION, args.model_revision
    )
    tokenizer = data.load_tokenizer(directory, phi2.read_config(directory).vocab_size)
    data.check_max_length(tokenizer, args.max_length)
    reading = examples.Reading.of(args)
    rows = examples.load_examples(args.dataset, "train", args.limit, reading)
    encoded = longest_rows(rows, tokenizer, args.batch_size, args.max_length)
    prefix = train.shared_prefix_length(tokenizer, args)
    bytes_of = memory(directory, args, encoded, prefix)

    tokens = sum(len(prompt) + len(answer) for prompt, answer in encoded)
    print(
        f"{args.model}, {args.quant}, {args.dtype}, on {args.device}: "
        f"a batch of the {len(encoded)} longest rows, {tokens:,} tokens"
    )
    for name, count in bytes_of.items():
        if count:
            print_line(name, count)
    # On a GPU with much room train.py keeps NF4's values, unless it is told not to.
    if args.quant == "nf4" and args.device != "cpu" and args.keep_dequantized is None:
        args.keep_dequantized = True
        print_line("sum, NF4's values kept", memory(directory, args, encoded, prefix)["sum"])


def print_line(name: str, count: int) -> None:
    print(f"{name:32} {count / 2**20:10,.1f} MiB")


if __name__ == "__main__":
    cli.run(main)
