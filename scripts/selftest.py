"""Checks this project on your machine, and measures its speed and memory there.

    python -m scripts.selftest                           # a table, and out/selftest.json
    python -m scripts.selftest --model ~/phi-2           # on a GPU, with the real weights

It downloads nothing. It runs STAGES in fp32, then in the fastest dtype of the device. On a GPU it
compares tiny/ and two layers of phi-2's widths with transformers + PEFT, if these are installed,
and times a phi-2 whose random weights are made in the GPU's memory. Elsewhere it compares and times
tiny/.

If a stage fails, a line says so after the traceback, and the next stage follows. Exit status 1
means that something differs or has failed. docs/benchmarks.md has a table of machines. The file
from hardware that is missing there is welcome.
"""

import argparse
import gc
import itertools
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python scripts/selftest.py`

import data
import eval as evaluation
import phi2
import quant
from scripts import bench, contenders, plan
from support import cli, files, flags, full_memory, machine, packing, processes

TIMES = 3  # runs, of which a time is the median, after a warm-up run

# Relative to the norm of the result in fp64. A number has 24, 8 or 11 significant bits, and from q,
# k and v to a gradient there are about five roundings in a row.
ATTENTION_BOUNDS = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2.5e-3}


@dataclass
class Line:
    """A line of the table. A line without a bound is not a check."""

    what: str
    figure: float | None = None
    bound: float | None = None
    status: str = "ok"  # or "differs", "skipped: why", "failed: why"


def checked(what: str, figure: float, bound: float) -> Line:
    # Written so that NaN counts as different.
    return Line(what, figure, bound, "ok" if figure <= bound else "differs")


@dataclass
class Setting:
    """What every stage gets."""

    device: torch.device
    folder: Path  # where files may be written
    tokenizer: Path
    compared: dict[str, Path]  # directories of the models to compare with transformers, by name
    timed: Path  # directory of the model that is timed
    kind: type[contenders.Ours]  # the class that loads it
    rows: dict[str, list]  # as scripts/contenders.py expects them
    prefix_length: int  # how many ids all prompts share
    dtype: str = "fp32"

    def job(self, model: Path, quantization: str, dtype: str) -> contenders.Job:
        """Returns the job of a contender. It keeps NF4's values where train.py does."""
        adapter = self.folder / f"adapter-{model.name}"
        if not adapter.exists():
            bench.write_random_adapter(str(model), adapter)
        return contenders.Job(
            model=str(model),
            tokenizer=str(self.tokenizer),
            adapter=str(adapter),
            quant=quantization,
            dtype=dtype,
            device=str(self.device),
            keep=None,
        )

    def timed_contender(self) -> contenders.Ours:
        return self.kind(self.job(self.timed, "nf4", self.dtype), self.rows)


class RandomPhi2(contenders.Ours):
    """Ours with random weights, made on the device. The model's directory holds a config.json."""

    def load_base(self) -> phi2.Phi2:
        device = self.job.device
        model = phi2.build(self.job.model)
        quant.quantize_linears(model)
        for path, layer in phi2.build(self.job.model).named_modules():
            tensors = {
                name: torch.randn_like(empty, device=device, dtype=self.dtype) * 0.02
                for name, empty in layer.named_parameters(recurse=False)
            }
            if isinstance(layer, torch.nn.LayerNorm):
                tensors["weight"] += 1
            model.get_submodule(path).load_state_dict(tensors, strict=False, assign=True)
        keep = evaluation.has_room_to_keep(model, machine.free_memory(device))
        evaluation.choose_what_is_stored(model, keep, device)
        return model


# -----------------------------------------------------------------------------
# Stages


def check_nf4(setting: Setting) -> Iterator[Line]:
    """Compares bitsandbytes' kernels with plain torch, bit for bit."""
    weight = torch.randn(2560, 2560).to(setting.device, evaluation.DTYPES[setting.dtype])
    weight[0, : quant.BLOCK] = 0
    form = (weight.shape, weight.dtype)
    indices, absmax = quant.quantize_by_kernel(weight)
    values = quant.kernels().dequantize_4bit(indices, absmax, quant.BLOCK, "nf4", *form)
    plain_indices, plain_absmax = quant.quantize(weight)
    plain_values = quant.dequantize(indices, absmax, *form)

    def share(found: Tensor, expected: Tensor) -> float:
        return (found != expected).float().mean().item()

    # On a GPU the kernel multiplies by 1 / absmax, where plain torch divides. A weight half way
    # between two levels may get the other level.
    bound = 0 if setting.device.type == "cpu" else 1e-5
    yield checked("NF4, share of indices off plain torch", share(indices, plain_indices), bound)
    yield checked("NF4, share of absmax off plain torch", share(absmax, plain_absmax), 0)
    yield checked("NF4, share of values off plain torch", share(values, plain_values), 0)


def check_attention(setting: Setting) -> Iterator[Line]:
    """Compares the attention of packed rows with the mask in fp64, forward and backward."""
    prefix = setting.prefix_length
    lengths = [len(prompt) - prefix for prompt, _ in setting.rows["training"][:16]]
    heads = 4 if setting.device.type == "cpu" else 32
    # q, k, v, and a gradient of the output
    dtype = evaluation.DTYPES[setting.dtype]
    tensors = torch.randn(4, prefix + sum(lengths), heads, 80).to(dtype)
    errors = []
    for last in (None, 2):  # queries of each row: in the last transformer block there are two
        layout = packing.PackedRows(lengths, prefix, setting.device)
        found = attend(layout, last, *tensors.to(setting.device))
        # On the CPU, because not every device has fp64.
        exact = attend(phi2.MaskedRows(lengths, prefix), last, *tensors.double())
        for a, b in zip(found, exact):
            errors.append(((a.cpu().double() - b).norm() / b.norm()).item())
    yield checked("attention off fp64", max(errors), ATTENTION_BOUNDS[setting.dtype])


def attend(
    layout: phi2.Layout, last: int | None, q: Tensor, k: Tensor, v: Tensor, grad: Tensor
) -> list[Tensor]:
    """Returns the output of attention, and the gradients of q, k and v."""
    if last:
        layout = layout.only_last(last)
    inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    output = layout.attend(0, layout.select_queries(inputs[0]), *inputs[1:])
    gradients = torch.autograd.grad(output, inputs, layout.select_queries(grad))
    return [output.detach(), *gradients]


def check_beside_transformers(setting: Setting) -> Iterator[Line]:
    """Compares the loss, the gradients of the adapters, the scores, and 32 new tokens."""
    missing = [name for name in ("transformers", "peft", "accelerate") if not find_spec(name)]
    if missing:
        status = f"skipped: pip install {' '.join(missing)}"
        yield Line("beside transformers + PEFT", status=status)
        return
    for name, quantization in itertools.product(setting.compared, ("none", "nf4")):
        model = setting.compared[name]
        if not model.exists():
            bench.write_random_phi_2(model, layers=2)
        apart, bounds = distances(setting, model, quantization)
        for what, bound in bounds.items():
            yield checked(f"{name}, {quantization}, {what} off transformers", apart[what], bound)


def distances(setting: Setting, model: Path, quantization: str) -> tuple[dict, dict]:
    """Returns how much ours differs from the reference in fp32, and how much it may differ."""
    rows = {name: part[:16] for name, part in setting.rows.items()}

    def results_of(kind: type[contenders.Contender], dtype: str) -> dict:
        results = contenders.results(kind(setting.job(model, quantization, dtype), rows))
        free_memory(setting.device)
        return results

    exact = results_of(contenders.Reference, "fp32")
    apart = bench.distances(results_of(contenders.Ours, setting.dtype), exact)
    if setting.dtype == "fp32":
        # One row may have other tokens, where two were almost equally likely.
        return apart, bench.BOUNDS | {"written": 1 / len(exact["written"])}
    # Twice as much as the reference differs in this dtype, as in scripts/bench.py.
    theirs = bench.distances(results_of(contenders.Reference, setting.dtype), exact)
    return apart, {what: 2 * theirs[what] for what in ("gradient", "scores")}


def check_graphs(setting: Setting) -> Iterator[Line]:
    """Compares the tokens that are generated with CUDA graphs with those without."""
    if setting.device.type != "cuda":
        yield Line("CUDA graphs", status="skipped: only CUDA has graphs")
        return
    contender = setting.timed_contender()
    prompts = contender.prompts[:16]
    recorded = contender.write(prompts, 32)
    # If a step cannot be recorded, generation continues without graphs and sets this to False.
    failed = float(not contender.model.uses_graphs)
    yield checked("CUDA graphs that could not be recorded", failed, 0)
    contender.model.uses_graphs = False
    others = [a != b for a, b in zip(recorded, contender.write(prompts, 32))]
    yield checked("CUDA graphs, share of rows with other tokens", sum(others) / len(others), 0)


def measure(setting: Setting) -> Iterator[Line]:
    """Measures times, and the peak of memory, which scripts.plan counts too."""
    contender = setting.timed_contender()
    prompts = contender.prompts[:64]

    def milliseconds(work: Callable[[], object]) -> float:
        times = []
        for _ in range(1 + TIMES):
            begin = time.perf_counter()
            work()
            if setting.device.type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - begin)
        return 1000 * median(times[1:])

    machine.peak_memory(setting.device, reset=True)
    yield Line("training step, 16 rows, ms", milliseconds(lambda: contender.train(16, 1)))
    peak = machine.peak_memory(setting.device)
    yield Line("scoring, 64 rows, ms", milliseconds(lambda: contender.score(prompts)))
    written = milliseconds(lambda: contender.write(prompts[:16], 32))
    yield Line("32 new tokens for 16 rows, ms", written)

    planned = planned_memory(setting, contender) / 2**30
    if setting.device.type == "cuda":  # elsewhere a process keeps the memory of earlier stages
        # cuBLAS takes up to 64 MiB of work space besides the tensors that are counted.
        yield checked("peak memory in training, GiB", peak / 2**30, 1.1 * planned + 1 / 16)
    yield Line("the same as scripts.plan counts it, GiB", planned)


def planned_memory(setting: Setting, contender: contenders.Ours) -> int:
    """Returns how many bytes scripts.plan counts for the step that was timed."""
    command = f"--quant nf4 --dtype {setting.dtype} --device {setting.device.type}"
    command += " --dropout 0 --residual-dropout 0"
    is_kept = full_memory.kept_values(contender.model)
    command += " --keep-dequantized" if is_kept else " --no-keep-dequantized"
    places = ["--model", str(setting.timed), "--dataset", str(bench.ROOT / "tiny" / "data")]
    args = cli.train_arguments([*command.split(), *places])
    rows = setting.rows["training"][:16]
    return plan.Plan(setting.timed, args).step(rows, setting.prefix_length)["sum"]


STAGES = {
    "NF4": check_nf4,
    "attention": check_attention,
    "beside transformers + PEFT": check_beside_transformers,
    "CUDA graphs": check_graphs,
    "times and memory": measure,
}


def attempt(stage: str, setting: Setting) -> Iterator[Line]:
    """Yields the lines of a stage. If it fails, the last line says so."""
    torch.manual_seed(0)
    try:
        yield from STAGES[stage](setting)
    except Exception as error:  # any error: people run this once, and send what it found
        traceback.print_exc(file=sys.stdout)
        yield Line(stage, status=f"failed: {cli.one_line(error).removeprefix('error: ')}")
    free_memory(setting.device)


def free_memory(device: torch.device) -> None:
    gc.collect()  # a model is part of a reference cycle
    if device.type == "cuda":
        torch.cuda.empty_cache()


# -----------------------------------------------------------------------------
# The script


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser("checks this project on your machine, and measures its speed and memory")
    add = parser.add_argument
    # fmt: off (a flag is one filled paragraph)
    add("--device", type=flags.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=list(evaluation.DTYPES), nargs="+",
        help="one after another (default: fp32, then the fastest one of the device)")
    add("--model", type=flags.path,
        help="directory of a phi to compare and to time (default: tiny/model)")
    add("--random-phi-2", type=flags.count, metavar="LAYERS",
        help="time a phi-2 with random weights (default: 32 on a GPU without --model)")
    add("--rows", type=flags.count, default=64, help="for training and for evaluation")
    add("--out", type=flags.path, default=Path("out") / "selftest.json",
        help="JSON file with all that is printed")
    # fmt: on
    args = parser.parse_args()
    if args.dtype is None:
        args.dtype = list(dict.fromkeys(["fp32", machine.fast_dtype(args.device)]))
    if args.random_phi_2 is None and args.model is None and args.device.startswith("cuda"):
        args.random_phi_2 = 32
    return args


def prepare(args: argparse.Namespace, device: torch.device, folder: Path) -> Setting:
    """Returns the setting. Of the models in it, only tiny/ or --model exists so far."""
    model = (args.model or bench.TINY).resolve()
    tokenizer = data.load_tokenizer(model)
    prefix, _, _ = data.fixed_ids(tokenizer)
    setting = Setting(
        device=device,
        folder=folder,
        tokenizer=model,
        compared={model.name if args.model else "tiny": model},
        timed=model,
        kind=contenders.Ours,
        rows=bench.encode_rows(tokenizer, args.rows),
        prefix_length=len(prefix),
    )
    if args.random_phi_2:
        print(f"timed: phi-2 with random weights, {args.random_phi_2} layers")
        setting.compared["phi-2's widths"] = folder / "two-layers"
        setting.timed = folder / "random-phi-2"
        setting.kind = RandomPhi2
        config = phi2.Phi2Config(num_hidden_layers=args.random_phi_2, resid_pdrop=0.0)
        setting.timed.mkdir()
        files.write_json(setting.timed / "config.json", {"model_type": "phi"} | asdict(config))
    return setting


def describe(device: torch.device) -> dict:
    """Returns what the figures depend on."""
    described = machine.environment(device)
    described["system"] = platform.platform()
    described["threads"] = torch.get_num_threads()
    if device.type == "cuda":  # compute capability, memory and more
        described["cuda"] = str(torch.cuda.get_device_properties(device))
    return described


def as_text(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def main() -> None:
    args = parse_arguments()
    device = processes.own_device(args.device)
    results = {"machine": describe(device), "random_phi_2": args.random_phi_2, "lines": []}
    for name, value in results["machine"].items():
        print(f"{name}: {value}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # Windows does not remove a file that is still mapped.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        setting = prepare(args, device, Path(name))
        print(f"\n{'':50} {'':5} {'figure':>9} {'bound':>9}")
        for dtype, stage in itertools.product(args.dtype, STAGES):
            setting.dtype = dtype
            for line in attempt(stage, setting):
                figures = f"{as_text(line.figure):>9} {as_text(line.bound):>9}"
                print(f"{line.what:50} {dtype:5} {figures}  {line.status}", flush=True)
                results["lines"].append({"dtype": dtype} | asdict(line))
                files.write_json(args.out, results)  # after each line, in case the next one hangs
    print(f"\neverything is in {args.out}")
    if any(line["status"].startswith(("differs", "failed")) for line in results["lines"]):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
