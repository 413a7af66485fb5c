"""Counts what a GPU would do, without one: launches, waits, bytes, FLOPs, memory.

    python -m tools.count train.py --model tiny/model --dataset tiny/data --steps 3
    python -m tools.count                                    # phi-2 at full size, task by task
    python -m tools.count --random-phi-2 4 --json new.json   # with 4 layers, to compare commits

Tensors on the GPU are fake: they have a shape, a dtype and a device, but no content. Every
operation on them is recorded, and every wait for the GPU. A script runs to its end. An operation on
tensors of two devices is an error, as on a GPU. This needs a torch without CUDA, and g++ to compile
fake_gpu.cpp.

The milliseconds are a model, not a measurement. An operation takes the longest of its arithmetic at
three quarters of the peak, its bytes at the bandwidth, and 2 microseconds for each launch. The CPU
takes 4 microseconds to issue a launch. What is read twice counts twice, as if a GPU had no cache.
The model says which of two designs is cheaper, and by about how much.
"""

import argparse
import gc
import math
import runpy
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python tools/count.py`

from tools import fake_gpu  # noqa: F401  (before torch, which then finds a GPU)

# isort: split
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import data
import eval as evaluation
import lora
import phi2
import quant
import train
from support import cli, examples, files, flags, packing
from support.live_bytes import LiveBytes
from tiny import mnli_lengths

ROOT = Path(__file__).resolve().parent.parent

# An H100: FLOP/s of products in bf16, and in fp32 without TF32; bytes per second.
PEAK = 790e12 * 0.75
PEAK_FP32 = 40e12
BANDWIDTH = 3.35e12
LAUNCH = 2e-6  # seconds of the shortest kernel
CPU_LAUNCH = 4e-6  # seconds that the CPU takes to issue a launch

# Operations that launch nothing, and those that launch several kernels.
FREE = set(
    "view _unsafe_view expand t transpose permute unsqueeze squeeze select slice split "
    "split_with_sizes detach alias as_strided unbind narrow chunk _reshape_alias diagonal "
    "empty empty_like empty_strided new_empty new_empty_strided lift_fresh resize_ set_ "
    "device".split()
)
LAUNCHES = {
    "_scaled_dot_product_efficient_attention_backward": 3,
    "_scaled_dot_product_flash_attention_backward": 3,
    "_index_put_impl_": 8,
    "constant_pad_nd": 2,
    "cumsum": 2,
    "embedding_dense_backward": 6,
    "index_put": 8,
    "index_put_": 8,
}
# Operations that read only as much as they write, even from a larger tensor.
GATHERS = ("cat", "embedding", "gather", "index", "index_select")
FILLS = set("arange fill_ full new_zeros ones ones_like zero_ zeros zeros_like".split())
BY_CONTENT = ("nonzero", "masked_select", "unique", "_unique2")  # their shapes depend on content


@dataclass
class Operation:
    launches: int
    moved: int  # bytes read and written
    flops: int
    seconds: float


def operation(launches: int, moved: int, flops: int = 0, peak: float = PEAK) -> Operation:
    seconds = max(flops / peak, moved / BANDWIDTH, LAUNCH * launches)
    return Operation(launches, moved, flops, seconds)


def total(operations: list[Operation]) -> Operation:
    return Operation(*map(sum, zip((0, 0, 0, 0.0), *map(astuple, operations))))


class FakeGraph:
    """Replaces torch.cuda.CUDAGraph: one launch for the CPU, all recorded operations for the GPU.

    As on a GPU, a wait or a copy from the CPU cannot be recorded.
    """

    gpu: "FakeGpu"  # install() sets it

    @contextmanager
    def record(self, **options) -> Iterator[None]:
        """Replaces torch.cuda.graph."""
        before = len(self.gpu.operations)
        self.gpu.is_recording = True
        yield
        self.gpu.is_recording = False
        self.recorded = replace(total(self.gpu.operations[before:]), launches=1)
        del self.gpu.operations[before:]

    def replay(self) -> None:
        self.gpu.operations.append(self.recorded)


class FakeMode(FakeTensorMode):
    avoid_device_init = True  # whatever torch.cuda.is_available returns


class FakeGpu(TorchDispatchMode):
    """While this mode is on, tensors on "cuda" are fake, and operations on them are recorded.

    operations: the operations, in order.
    waits: how often each line of the project waits for the GPU.
    bytes: the bytes in use, their peak, and their limit, at which an operation raises the error
    that it raises on a GPU.

    When the CPU reads from the GPU it gets True, 0, or a probability of 0.5; in fp64, in which
    processes.total adds, it gets 0.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeMode(allow_non_fake_inputs=True)
        self.bytes = LiveBytes(limit=80 * 2**30)
        self.is_recording = False
        self.start()

    def start(self) -> None:
        self.operations = []
        self.waits = Counter()
        self.restart_peak()

    def restart_peak(self) -> None:
        self.bytes.most = self.bytes.now

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        call = Call(function, args, kwargs or {})
        if not call.inputs and call.device != "cuda":
            return function(*args, **call.kwargs)
        is_read = call.is_read_by_the_cpu()
        is_copy = call.is_copy_to_the_gpu()
        if self.is_recording and (is_read or is_copy):
            # (Not a RuntimeError, after which generation would continue without a graph.)
            raise AssertionError(f"{function} cannot be in a CUDA graph: {caller()}")
        if is_read:
            self.wait("a read from the GPU")
            return call.stand_in()
        if is_copy and not call.goes_on():
            self.wait("a copy to the GPU")
        if call.has_shape_by_content():
            self.wait(f"{call.name}, whose shape depends on content")
        with self.fake:
            result = function(*args, **call.kwargs)
        self.note(call, result)
        return result

    def note(self, call: "Call", result: object) -> None:
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, FakeTensor)]
        for tensor in outputs:
            if tensor.device.type == "cpu" and tensor.numel() > 1:
                raise RuntimeError(f"{call.function} has made a tensor on the CPU: {caller()}")
            self.bytes.add(tensor.untyped_storage())
        has_content = any(tensor.numel() for tensor in outputs) or not outputs
        if call.name not in FREE and has_content:
            self.operations.append(call.cost(result, outputs))

    def wait(self, reason: str) -> None:
        self.waits[f"{reason}: {caller()}"] += 1


def caller() -> str:
    """Returns the line of this project that is running."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        is_ours = path.is_relative_to(ROOT) and ".venv" not in path.parts
        if is_ours and path.name != "count.py":
            return f"{path.name}:{frame.lineno}"
    return "elsewhere"


class Call:
    """A call of one of torch's operators.

    inputs: the tensors on the GPU. from_cpu: those on the CPU.
    device: the type of the device that the call asks for, if any.
    """

    def __init__(self, function: torch._ops.OpOverload, args: tuple, kwargs: dict):
        self.function = function
        self.name = function._schema.name.split("::")[-1]
        self.args = args
        self.kwargs = kwargs
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.inputs = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        others = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]
        self.from_cpu = [tensor for tensor in others if tensor.is_cpu]
        device = kwargs.get("device")
        self.device = torch.device(device).type if device is not None else None

    def is_read_by_the_cpu(self) -> bool:
        if self.name == "copy_":
            return not isinstance(self.args[0], FakeTensor)
        to_cpu = self.name == "_to_copy" and self.device == "cpu"
        return self.name == "_local_scalar_dense" or to_cpu

    def is_copy_to_the_gpu(self) -> bool:
        if self.name in ("_to_copy", "copy_"):
            return bool(self.from_cpu)
        is_index = self.name.startswith(("index", "_index"))
        return is_index and any(tensor.dim() for tensor in self.from_cpu)

    def goes_on(self) -> bool:
        """Returns whether the CPU does not wait for this copy."""
        is_asked = self.kwargs.get("non_blocking") or True in self.args[2:]
        return self.name in ("_to_copy", "copy_") and is_asked

    def has_shape_by_content(self) -> bool:
        if self.name == "index":
            indices = [index for index in self.args[1] if index is not None]
            return any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        return self.name in BY_CONTENT

    def stand_in(self) -> Tensor | int | bool:
        """Returns what the CPU gets when it reads a tensor without content."""
        source = self.args[0]
        if self.name == "_local_scalar_dense":
            return True if source.dtype is torch.bool else 0
        if self.name == "copy_":
            return source.zero_()
        probability = 0.5 if source.dtype in (torch.bfloat16, torch.float32) else 0
        dtype = self.kwargs.get("dtype") or source.dtype
        return torch.full(source.shape, probability, dtype=dtype)

    def cost(self, result: object, outputs: list[Tensor]) -> Operation:
        moved = sum(map(size_of, self.inputs + outputs))
        if self.name in GATHERS:
            moved = 2 * size_of(outputs[0])
        elif self.name == "index_copy_":
            moved = 2 * size_of(self.args[3])
        elif self.name in FILLS:
            moved = sum(map(size_of, outputs))

        launches = LAUNCHES.get(self.name, 1)
        if self.name.startswith(("_foreach", "_fused_adam")):
            launches = math.ceil(len(self.args[0]) / 30)  # one launch handles that many tensors
        flops = 0
        packet = self.function._overloadpacket
        if packet in flop_registry:
            flops = flop_registry[packet](*self.args, **self.kwargs, out_val=result)
        is_fp32 = bool(self.inputs) and self.inputs[0].dtype is torch.float32
        return operation(launches, moved, flops, PEAK_FP32 if is_fp32 else PEAK)


def size_of(tensor: Tensor) -> int:
    """Returns the bytes that a kernel reads from a tensor. An expanded dimension counts once."""
    lengths = zip(tensor.shape, tensor.stride())
    return tensor.element_size() * math.prod(length for length, stride in lengths if stride)


# -----------------------------------------------------------------------------
# What torch, support/ and eval.py's fused functions ask a GPU, besides operations

LOWER_RIGHT = "lower right"  # stands for the mask that packing.causal_lower_right makes


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | str) -> Tensor:
    """Replaces F.scaled_dot_product_attention by the kernel that torch takes on a GPU."""
    is_causal = attn_mask is LOWER_RIGHT
    if is_causal and q.dtype is torch.bfloat16:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    if is_causal:
        attn_mask = None
    else:
        width = attn_mask.shape[-1]
        if width % 16:  # the kernel needs rows that begin at multiples of 16
            attn_mask = F.pad(attn_mask, (0, -width % 16))[..., :width]
        attn_mask = attn_mask.expand(*q.shape[:3], width)
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, attn_mask, torch.is_grad_enabled(), 0.0, is_causal)[0]


def as_one_kernel(gpu: FakeGpu, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns `function`, counted as one launch, like the kernel that torch.compile makes of it.

    Its backward pass counts as one launch too, if it computes anything.
    """

    def count_as_one(since: int, moved: int) -> None:
        if len(gpu.operations) > since:
            gpu.operations[since:] = [operation(1, moved)]

    def run(x: Tensor, *others: Tensor) -> Tensor:
        x = x.view_as(x)  # the backward pass of this function computes its gradient
        since = len(gpu.operations)
        result = function(x, *others)
        moved = sum(map(size_of, (x, *others, result)))
        count_as_one(since, moved)
        if result.requires_grad:
            begun = []
            result.register_hook(lambda grad: begun.append(len(gpu.operations)))
            if x.requires_grad:
                x.register_hook(lambda grad: count_as_one(begun.pop(), moved))
        return result

    return run


def install(gpu: FakeGpu) -> None:
    """Replaces the functions with which a script asks about a GPU."""
    quant.kernels()  # imported while torch still finds no GPU
    answers = {
        "is_available": lambda: True,
        "current_stream": lambda device=None: None,
        "_lazy_init": lambda: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "get_device_name": lambda device=None: "no GPU",
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (gpu.bytes.limit - gpu.bytes.now, gpu.bytes.limit),
        "max_memory_allocated": lambda device=None: gpu.bytes.most,
        "reset_peak_memory_stats": lambda device=None: gpu.restart_peak(),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    FakeGraph.gpu = gpu
    torch.cuda.CUDAGraph = FakeGraph
    torch.cuda.graph = FakeGraph.record
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is a copy too
    FakeTensor.tolist = lambda self: self.cpu().tolist()
    # It asks whether the gradients are of the class Tensor itself, not of a subclass.
    torch.nn.utils.clip_grad._has_foreach_support = lambda tensors, device: True
    F.scaled_dot_product_attention = attention
    packing.causal_lower_right = lambda queries, keys: LOWER_RIGHT
    for name in ("rotate", "add_branches"):
        function = getattr(phi2, name)
        setattr(phi2, name, as_one_kernel(gpu, function.__wrapped__))


# -----------------------------------------------------------------------------
# phi-2 at full size, task by task


class Subject:
    """The model with its adapter, and the tasks that are counted.

    keep: whether NF4's values are stored beside the indices.
    """

    def __init__(self, layers: int, tokenizer: Tokenizer, keep: bool, checkpointing: bool = False):
        with torch.device("meta"):
            self.model = phi2.Phi2(phi2.Phi2Config(num_hidden_layers=layers, resid_pdrop=0.0))
        quant.quantize_linears(self.model)
        fill(self.model)
        evaluation.choose_what_is_stored(self.model, keep, "cuda")
        self.model.model.recomputes_blocks = checkpointing
        lora.inject(self.model, lora.LoRAConfig(dropout=0.0))
        self.parameters = lora.lora_parameters(self.model).values()
        self.optimizer = torch.optim.AdamW(self.parameters, fused=True)
        self.tokenizer = tokenizer

    def step(self, rows: list) -> None:
        self.model.train()
        prefix, _, _ = data.fixed_ids(self.tokenizer)
        rows = sorted(rows, key=lambda row: len(row[0]))
        batch = data.collate(rows, len(prefix), "answer")
        loss = train.batch_loss(self.model, batch)
        (loss / len(batch.next_ids)).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def score(self, rows: list) -> None:
        evaluation.score(self.model.eval(), self.tokenizer, longest_first(rows))

    def write(self, rows: list, limit: int) -> None:
        """Generates `limit` tokens for each row, whatever they are."""
        prefix, label_ids, _ = data.fixed_ids(self.tokenizer)
        num_known_ids = data.num_known_ids(self.tokenizer)
        model = self.model.eval()
        _, hidden = evaluation.generate(
            model, longest_first(rows), prefix, limit, num_known_ids, is_finished=lambda ids: False
        )
        evaluation.label_scores(model, hidden, label_ids)


def fill(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Moves a model from the meta device to the fake GPU."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, quant.NF4Linear):
            module.dtype = dtype
    model.requires_grad_(False).to_empty(device="cuda")


def longest_first(rows: list) -> list[list[int]]:
    """Returns the prompts of rows, the longest first."""
    return sorted((prompt for prompt, _ in rows), key=len, reverse=True)


MOST_ROWS = 128  # of a task
TASKS = {
    "train16": lambda subject, rows: subject.step(rows[:16]),
    "train128": lambda subject, rows: subject.step(rows),
    "score": lambda subject, rows: subject.score(rows[:64]),
    "answer": lambda subject, rows: subject.write(rows[:64], 2),
    "ramble": lambda subject, rows: subject.write(rows[:64], 32),
}
# What a model keeps or computes again: memory against time.
WAYS = {
    "ours": {"keep": True},
    "indices alone": {"keep": False},
    "checkpointing": {"keep": False, "checkpointing": True},
}


def count_tasks(
    gpu: FakeGpu, way: dict, layers: int, tokenizer: Tokenizer, rows: list
) -> dict[str, dict]:
    """Returns the costs of each task. With checkpointing only training differs."""
    results = {}
    with gpu:
        subject = Subject(layers, tokenizer, **way)
        subject.step(rows[:16])  # in which the optimiser creates its state
        for name, task in TASKS.items():
            if "checkpointing" in way and not name.startswith("train"):
                continue
            gpu.start()
            task(subject, rows)
            results[name] = summary(gpu)
    return results


def summary(gpu: FakeGpu) -> dict:
    cost = total(gpu.operations)
    return {
        "launches": cost.launches,
        "waits": sum(gpu.waits.values()),
        "tflop": cost.flops / 1e12,
        "gb": cost.moved / 1e9,
        "gpu_ms": 1e3 * cost.seconds,
        "cpu_ms": 1e3 * CPU_LAUNCH * cost.launches,
        "peak_gib": gpu.bytes.most / 2**30,
    }


def show(results: dict[str, dict[str, dict]]) -> None:
    """Prints the costs. CPU and GPU work at the same time, so the longer time counts."""
    print(
        f"{'counted, not measured':24} {'launches':>8} {'waits':>5} {'TFLOP':>7} {'GB':>7} "
        f"{'ms':>7} {'GiB':>6}"
    )
    for task in TASKS:
        for way, costs in results.items():
            if task in costs:
                cost = costs[task]
                milliseconds = max(cost["gpu_ms"], cost["cpu_ms"])
                print(
                    f"{task:9} {way:14} {cost['launches']:8,} {cost['waits']:5} "
                    f"{cost['tflop']:7.2f} {cost['gb']:7.1f} "
                    f"{milliseconds:7.1f} {cost['peak_gib']:6.2f}"
                )


# -----------------------------------------------------------------------------
# The script


def run_script(gpu: FakeGpu, script: str, arguments: list[str]) -> None:
    """Runs a script of this project on the fake GPU. Prints its operations and waits."""
    sys.argv = [script, *arguments]
    try:
        with gpu:
            runpy.run_path(script, run_name="__main__")
    finally:
        print(f"\ncounted: {len(gpu.operations):,} operations on the GPU, and these waits for it:")
        for place, count in gpu.waits.most_common():
            print(f"{count:6,}  {place}")


def read_rows(dataset: str | None, tokenizer: Tokenizer) -> list:
    """Returns encoded rows of the first validation split or, without a dataset, drawn rows."""
    if dataset is None:
        pairs = mnli_lengths.validation_rows(tokenizer, MOST_ROWS)
    else:
        split, *_ = examples.validation_splits(dataset)
        pairs = examples.load_examples(dataset, split, MOST_ROWS)
    return [data.encode(pair, tokenizer) for pair in pairs]


def parse_arguments() -> argparse.Namespace:
    """Returns the arguments of a count, task by task."""
    parser = cli.Parser("counts what a GPU would do, by task; or in a run of SCRIPT.py ARGUMENTS")
    add = parser.add_argument
    add("--random-phi-2", dest="layers", type=flags.count, default=32, metavar="LAYERS",
        help="number of layers of phi-2's size")  # fmt: skip
    add("--dataset", type=flags.name,
        help="Hub id or directory (default: rows of MNLI's lengths, from tiny/data)")  # fmt: skip
    add("--tokenizer", type=flags.path, default=ROOT / "tiny" / "model",
        help="directory with a tokenizer.json (default: tiny/model)")  # fmt: skip
    add("--json", type=flags.path, help="write all figures to this file")
    return parser.parse_args()


def main() -> None:
    gpu = FakeGpu()
    install(gpu)
    if sys.argv[1:2] and sys.argv[1].endswith(".py"):
        return run_script(gpu, sys.argv[1], sys.argv[2:])
    args = parse_arguments()
    tokenizer = data.load_tokenizer(args.tokenizer)
    rows = read_rows(args.dataset, tokenizer)
    results = {}
    for name, way in WAYS.items():
        print(f"counting: {name}", file=sys.stderr, flush=True)
        results[name] = count_tasks(gpu, way, args.layers, tokenizer, rows)
        gc.collect()  # the model is part of a cycle; its bytes would count for the next one
    show(results)
    if args.json:
        files.write_json(args.json, results)


if __name__ == "__main__":
    cli.run(main)
