"""Counts the memory that a run of train.py needs with any flags, before it loads a weight.

    python -m scripts.plan --model microsoft/phi-2 --dataset nyu-mll/glue --batch-size 64
    python -m scripts.plan --gpu 8 --checkpointing                  # for a card of 8 GB, anywhere

The script runs one step, forward and backward, on the longest rows of the data, and one batch of
the evaluation on the longest prompts. The tensors have shapes but no content. The bytes of each
tensor are counted until it is freed, whichever operation makes it. So the peak is what an allocator
has to provide. Not counted are memory outside the allocator (a CUDA context, the libraries), what
the allocator loses between tensors, and scratch memory within a kernel.

Attention differs by device. For --device cpu the step runs on fake CPU tensors, through the code
for CPUs. For other devices it runs on the meta device, and one of the fused kernels replaces
scaled_dot_product_attention, because the meta device would count the unfused form. The machine need
not have the device.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import nlargest
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
from support import checkpoints, cli, examples, flags, full_memory, packing
from support.live_bytes import LiveBytes

CANDIDATES = 1000  # rows with the most characters; those with the most tokens are among them
# Not all memory of a card is for tensors: CUDA's context, a desktop and what the allocator loses
# between tensors take some. On a T4 of 16 GB, CUDA gets 14.6 GiB.
FOR_TENSORS = 0.9


class Count(TorchDispatchMode):
    """Counts the bytes of the tensors that are made on one kind of device while the mode is on.

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


def fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    """Replaces F.scaled_dot_product_attention by the kernel that takes a mask on a GPU.

    Other kernels store as much: the output, and one number for each query and head.
    """
    mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    output, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)
    return output


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def longest_rows(
    rows, tokenizer: Tokenizer, count: int, max_length: int | None
) -> list[tuple[list[int], list[int]]]:
    """Returns the `count` encoded rows with the most tokens: no batch of an epoch holds more."""
    texts = zip(rows["premise"][:], rows["hypothesis"][:])
    characters = [len(premise) + len(hypothesis) for premise, hypothesis in texts]
    candidates = nlargest(CANDIDATES + count, range(len(rows)), characters.__getitem__)
    encoded = [data.encode(rows[number], tokenizer, max_length) for number in candidates]
    return nlargest(count, encoded, lambda row: len(row[0]))


# -----------------------------------------------------------------------------
# The step


def build_base(directory: Path, args: argparse.Namespace) -> phi2.Phi2:
    """Returns the frozen model of train.py without content: fake tensors for a CPU, else meta."""
    model = phi2.build(directory)
    if args.quant == "nf4":
        quant.quantize_linears(model, double_quant=args.double_quant)
    dtype = evaluation.DTYPES[args.dtype]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, quant.NF4Linear):
            module.dtype = dtype
    if args.device == "cpu":  # meta tensors become fake CPU tensors
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
    keep = args.keep_dequantized
    if keep is None:
        keep = args.quant == "none"  # which leaves nothing to keep
    evaluation.choose_what_is_stored(model, keep, args.device)
    model.model.recomputes_blocks = args.checkpointing
    if args.residual_dropout is not None:
        for block in model.model.layers:
            block.resid_dropout.p = args.residual_dropout
    return model


class Plan:
    """The frozen model and its adapter without content, and the memory that a run needs.

    parts: the bytes that are in use all the time, by name.
    """

    def __init__(self, directory: Path, args: argparse.Namespace):
        self.args = args
        self.model = build_base(directory, args)
        base = list(self.model.parameters())
        kept = []
        for name, buffer in self.model.named_buffers():
            (kept if name.endswith(".kept") else base).append(buffer)
        config = lora.LoRAConfig(args.rank, args.alpha, args.dropout, args.targets)
        lora.inject(self.model, config)
        self.adapter = list(lora.lora_parameters(self.model).values())
        self.known = [*base, *kept, *self.adapter]
        self.device = self.adapter[0].device
        self.parts = {
            "base weights": size(base),
            "base weights, dequantised": size(kept),
            "adapter": size(self.adapter),
            "optimiser state": 2 * size(self.adapter),  # AdamW's two moments
        }

    def size(self) -> int:
        """Returns how many bytes are in use all the time."""
        return sum(self.parts.values())

    @contextmanager
    def counted(self) -> Iterator[LiveBytes]:
        """Counts the bytes of tensors that are made within the `with`, without those of `parts`."""
        count = Count(self.device.type, self.known)
        if self.device.type == "cpu":
            with count:
                yield count.bytes
            return
        # Not by a mode of torch, which is off where the backward pass recomputes.
        with patch.object(F, "scaled_dot_product_attention", fused_attention), count:
            yield count.bytes

    def step(self, encoded: list, prefix: int) -> dict[str, int]:
        """Returns bytes by name, for a step on encoded rows that share `prefix` ids.

        "sum" is the peak within the step.
        """
        bytes_of = dict(self.parts)
        if self.args.accumulate > 1:
            bytes_of["gradient of earlier batches"] = size(self.adapter)
            for parameter in self.adapter:
                parameter.grad = torch.zeros_like(parameter)
        with self.counted() as count:
            batch = data.collate(encoded, prefix, self.args.loss)
            loss = train.batch_loss(self.model.train(), batch)
            after_forward = count.now
            loss.backward()
        # The loss is computed in fp32.
        logits = 4 * len(batch.next_ids) * self.model.config.vocab_size
        bytes_of["logits"] = logits
        bytes_of["activations"] = after_forward - logits
        bytes_of["temporary, at the peak"] = count.most - after_forward
        return bytes_of | {"sum": sum(bytes_of.values())}

    @torch.no_grad()
    def evaluation(self, prompts: list[list[int]], prefix: list[int]) -> int:
        """Returns the peak of bytes while the model answers prompts that begin with `prefix`.

        This does what evaluation.generate does up to the second new token. Later tokens need no
        more memory, because the cache has room for all of them from the beginning.
        """
        with self.counted() as count:
            room = self.args.max_new_tokens
            ids, layout = evaluation.pack_prompts(prompts, prefix, self.device, room)
            hidden = self.model.eval().model(ids, layout, last=1)
            decoder = packing.Decoder(self.model, layout)
            logits = self.model.lm_head(hidden)
            if room > 1:
                decoder.run([0] * len(logits))
        return self.size() + count.most


# -----------------------------------------------------------------------------
# The script


def parse_arguments() -> argparse.Namespace:
    """Returns the arguments of train.py, and `gpu`."""
    parser = cli.train_parser("counts the memory that a run of train.py with these flags needs")
    parser.add_argument(
        "--gpu",
        type=flags.number_above_0,
        metavar="GB",
        help="memory of the card; counts what train.py chooses on it, and shows what fits",
    )
    typed = parser.typed()
    device = typed.get("device", "cpu" if "gpu" not in typed else "cuda")
    if "gpu" in typed and not device.startswith("cuda"):
        parser.error(f"--gpu is for a CUDA card, not for --device {device}")
    if "gpu" in typed or device.startswith("cuda") and not torch.cuda.is_available():
        # What train.py chooses on that card, not what it chooses on this machine. (A T4 gets fp16,
        # of the same size.)
        parser.set_defaults(model=cli.MODEL, device=device, dtype="bf16")
    return cli.complete_training(parser, typed)


@dataclass
class LongestRows:
    """The rows that need the most memory."""

    training: list[tuple[list[int], list[int]]]  # ids of prompt and answer, of one batch
    shared: int  # how many ids at their beginning are the same
    prompts: list[list[int]]  # of one batch of an evaluation
    prefix: list[int]  # with which all of these prompts begin

    @classmethod
    def read(cls, args: argparse.Namespace, tokenizer: Tokenizer) -> "LongestRows":
        """Reads them from --dataset."""
        reading = examples.Reading.of(args)
        rows = examples.load_examples(args.dataset, "train", args.limit, reading)
        splits = [
            examples.load_examples(args.dataset, split, args.eval_limit, reading)
            for split in examples.validation_splits(args.dataset, reading)
        ]
        batches = [first_prompts(split, tokenizer, args.max_length) for split in splits]
        return cls(
            training=longest_rows(rows, tokenizer, args.batch_size, args.max_length),
            shared=train.shared_prefix_length(tokenizer, args),
            prompts=max(batches, key=lambda prompts: sum(map(len, prompts))),
            prefix=data.fixed_ids(tokenizer)[0],
        )


def first_prompts(rows, tokenizer: Tokenizer, max_length: int | None) -> list[list[int]]:
    """Returns the prompts of the first batch of an evaluation, which has the longest rows."""
    prompts = [prompt for prompt, _ in data.encode_batch(rows, tokenizer, max_length)]
    order = itertools.chain.from_iterable(data.by_premise(rows, prompts))
    first = itertools.islice(order, evaluation.Settings.batch_size)
    return [prompts[number] for number in first]


def choose_what_is_kept(directory: Path, args: argparse.Namespace) -> None:
    """Sets --keep-dequantized as train.py sets it on a card of --gpu, if it is not given."""
    if args.quant == "none" or args.device == "cpu" or args.keep_dequantized is not None:
        return
    if args.gpu is None:
        print("with --no-keep-dequantized; --gpu GB counts what train.py chooses on that card")
        return
    plan = Plan(directory, args)
    free = for_tensors(args.gpu) - plan.size()
    args.keep_dequantized = evaluation.has_room_to_keep(plan.model, free)


def for_tensors(gigabytes: float) -> int:
    """Returns how many bytes of a card are available for tensors."""
    return int(FOR_TENSORS * gigabytes * 2**30)


def show(plan: Plan, rows: LongestRows) -> None:
    """Prints the memory of a step and of an evaluation, and with --gpu whether they fit."""
    bytes_of = plan.step(rows.training, rows.shared)
    for name, number in bytes_of.items():
        if number:
            print_line(name, number)
    gpu = plan.args.gpu
    room = for_tensors(gpu) if gpu else math.inf
    count = len(rows.prompts)
    while True:
        evaluated = plan.evaluation(rows.prompts[:count], rows.prefix)
        print_line(f"evaluation, {count} rows at a time", evaluated)
        if evaluated <= room or count == 1:
            break
        count //= 2  # as eval.py does
    if gpu:
        print_line(f"for tensors, of {gpu:g} GB", room)
    if bytes_of["sum"] > room:
        resumed, anew = full_memory.flags_of_a_step(plan.args, plan.model)
        print(f"a step does not fit{full_memory.either([*resumed, *anew])}")
    if evaluated > room:
        print("an evaluation does not fit, not even of one row")


def print_line(name: str, count: int) -> None:
    print(f"{name:32} {count / 2**20:10,.1f} MiB")


def main() -> None:
    args = parse_arguments()
    # Without the weights.
    directory = checkpoints.find(
        args.model, phi2.read_config, checkpoints.DESCRIPTION, args.model_revision
    )
    tokenizer = data.load_tokenizer(directory, phi2.read_config(directory).vocab_size)
    data.check_max_length(tokenizer, args.max_length)
    rows = LongestRows.read(args, tokenizer)

    choose_what_is_kept(directory, args)
    tokens = sum(len(prompt) + len(answer) for prompt, answer in rows.training)
    print(
        f"{args.model}, {args.quant}, {args.dtype}, on {args.device}: "
        f"a batch of the {len(rows.training)} longest rows, {tokens:,} tokens"
    )
    show(Plan(directory, args), rows)


if __name__ == "__main__":
    cli.run(main)
