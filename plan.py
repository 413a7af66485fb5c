"""How much memory a training step takes, counted before a weight is loaded: `python train.py --plan`, with the flags of the run.

Read it after train.py. The model is built on PyTorch's meta device, where tensors have shapes and no content, and one step runs
there on the longest rows of the data: forward, backward, as in training. Whatever operation makes a tensor, its bytes are
counted until it is freed, so the peak is what an allocator must hold. Left out: what lies outside the allocator (a CUDA
context, the libraries), what it loses between tensors, the scratch memory of matrix products.
"""
import re
import weakref
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import lora
import phi2
import quant

CANDIDATES = 200  # rows with the most characters, among which the one with the most tokens is sought


class Count(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on, but not of views of those `known`: `now` alive, `most` at any time."""

    def __init__(self, known=()):
        super().__init__()
        self.now, self.most, self.alive = 0, 0, {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta and (key := tensor.untyped_storage()._cdata) not in self.alive:
                size = -(-tensor.untyped_storage().nbytes() // 512) * 512  # as PyTorch's allocator on a GPU rounds
                self.alive.add(key)
                weakref.finalize(tensor.untyped_storage(), self.free, key, size)
                self.now += size
                self.most = max(self.most, self.now)
        return result

    def free(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def fused_attention(q: Tensor, segments: list, mask: Tensor) -> Tensor:
    """What phi2.attend does on a GPU, by the name of the kernel that PyTorch takes there for a mask."""
    k, v = (torch.cat([part.expand(len(q), -1, -1, -1) for part in parts], dim=2) for parts in zip(*segments))
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask.to(q.dtype).expand(*q.shape[:3], -1), True)[0]


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def longest_rows(examples, tokenizer, count: int, max_length: int | None) -> list[tuple[list[int], list[int]]]:
    """`count` times the row with the most tokens: a batch is padded to its longest."""
    characters = [len(premise) + len(hypothesis) for premise, hypothesis in zip(examples["premise"], examples["hypothesis"])]
    order = sorted(range(len(characters)), key=characters.__getitem__)[-CANDIDATES:]
    encoded = [data.encode(examples[row], tokenizer, max_length) for row in order]
    return [max(encoded, key=lambda row: len(row[0]))] * min(count, len(examples))


def memory(directory: Path, args, config: lora.LoRAConfig, dtype: torch.dtype, encoded, skip: int, batch_loss) -> dict[str, int]:
    """Bytes by name, for one batch of `encoded` rows; "sum" is the peak within a step. `args` and `batch_loss` are train.py's."""
    with torch.device("meta"):
        model = phi2.Phi2(phi2.read_config(directory))
    if args.quant == "nf4":
        quant.quantize_linears(model, double_quant=args.double_quant)
    for block in model.model.layers:
        block.resid_dropout.p = model.config.resid_pdrop if args.residual_dropout is None else args.residual_dropout
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, quant.NF4Linear):
            module.dtype = dtype
            if args.keep_dequantized:
                module.kept = module.dequantize()
    base = [*model.parameters(), *model.buffers()]
    kept = [module.kept for module in model.modules() if getattr(module, "kept", None) is not None]
    found = {"base weights": size(base), "base weights, dequantised": size(kept)}
    lora.inject(model, config)
    model.model.checkpointing = args.checkpointing
    adapter = list(lora.lora_parameters(model).values())
    found |= {"adapter": size(adapter), "its optimiser": 2 * size(adapter)}
    if args.accumulate > 1:
        found["its gradient, of earlier batches"] = size(adapter)
        for parameter in adapter:
            parameter.grad = torch.zeros_like(parameter)
    attend, count = phi2.attend, Count(base + kept + adapter)
    try:
        if args.device.startswith("cuda"):
            phi2.attend = fused_attention
        with count:
            loss, _ = batch_loss(model.train(), encoded, skip, args.loss)
            forward = count.now
            loss.backward()
    finally:
        phi2.attend = attend
    targets = sum(len(answer) + (len(prompt) - 1) * (args.loss == "full") for prompt, answer in encoded)
    found["logits"] = 4 * targets * model.config.vocab_size
    found["activations"] = forward - found["logits"]
    found["passing, at the peak"] = count.most - forward
    return found | {"sum": sum(found.values())}


def table(found: dict[str, int], args, encoded) -> str:
    lines = [f"{args.model}, {args.quant}, {args.dtype}, on {args.device}: a batch of {len(encoded)} rows of {len(encoded[0][0])} tokens"]
    return "\n".join(lines + [f"{name:32} {count / 2**20:10,.1f} MiB" for name, count in found.items() if count])


def peak(device: torch.device, anew: bool = False) -> int | None:
    """The most bytes so far, or from now on `anew`: allocated on a GPU, resident on a CPU; None where the system does not say."""
    if device.type == "cuda":
        if anew:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
