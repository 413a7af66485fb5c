"""Checks this project on your machine, and measures its speed and memory there.

    python -m scripts.selftest                           # a table, and out/selftest.json
    python -m scripts.selftest --model ~/phi-2           # on a GPU, with the real weights
    python -m scripts.selftest --row out/selftest.json   # its lines of docs/benchmarks.md

It downloads nothing. It runs STAGES in fp32, then in the fastest dtype of the device. On a GPU it
compares tiny/ and two layers of phi-2's widths with transformers + PEFT, if these are installed,
and times a phi-2 whose random weights are made in the GPU's memory. Elsewhere it compares and times
tiny/.

If a stage fails, the table gets a line that says so, and the next stage follows. Exit status 1
means that something differs or has failed. docs/benchmarks.md describes the JSON file. Results from
hardware that is missing there are welcome.
"""

import argparse
import copy
import gc
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
from support import cli, files, flags, machine, packing, processes

TIMES = 3  # runs, of which a time is the median, after a warm-up run

# Relative to the norm of the result in fp64. A number has 24, 8 or 11 significant bits, and from q,
# k and v to a gradient there are about five roundings in a row.
ATTENTION_BOUNDS = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2.5e-3}

# The columns of the table in docs/benchmarks.md, between the machine and the checks.
TRAINING = "training step, 16 rows, ms"
SCORING = "scoring, 64 rows, ms"
WRITING = "32 new tokens for 16 rows, ms"
PEAK = "peak memory in training, GiB"
PLANNED = "the same as scripts.plan counts it, GiB"
MEASURED = (TRAINING, SCORING, WRITING, PEAK, PLANNED)


@dataclass
class Line:
    """A line of the table. A line without a bound is not a check."""

    what: str
    dtype: str
    figure: float | None = None
    bound: float | None = None
    status: str = "ok"  # or "differs", "skipped: why", "failed: why"
    trace: str | None = None  # the traceback of a failure


def checked(what: str, dtype: str, figure: float, bound: float) -> Line:
    # Written so that NaN counts as different.
    return Line(what, dtype, figure, bound, "ok" if figure <= bound else "differs")


@dataclass
class Setting:
    """What every stage gets."""

    device: torch.device
    folder: Path  # where files may be written
    compared: dict[str, Path]  # directories of the models to compare with transformers, by name
    timed: Path  # directory of the model that is timed
    kind: type[contenders.Ours]  # the class that loads it
    tokenizer: Path
    rows: dict[str, list]  # as scripts/contenders.py expects them
    prefix_length: int  # how many ids all prompts share

    def job(self, model: Path, quantization: str, dtype: str) -> contenders.Job:
        """Returns the job of a contender. It keeps NF4's values where train.py does."""
        adapter = self.folder / f"adapter-{model.name}"
        if not adapter.exists():
            bench.write_random_adapter(str(model), adapter)
        return contenders.Job(
            contender="",
            model=str(model),
            tokenizer=str(self.tokenizer),
            rows="",
            adapter=str(adapter),
            quant=quantization,
            dtype=dtype,
            device=str(self.device),
            keep=None,
        )

    def timed_contender(self, dtype: str) -> contenders.Ours:
        return self.kind(self.job(self.timed, "nf4", dtype), self.rows)


class RandomPhi2(contenders.Ours):
    """Ours with random weights, made on the device. The model's directory holds a config.json."""

    def load_base(self) -> phi2.Phi2:
        device = self.job.device
        plain = phi2.build(self.job.model)
        model = copy.deepcopy(plain)
        quant.quantize_linears(model)
        for path, layer in plain.named_modules():
            tensors = {}
            for name, empty in layer.named_parameters(recurse=False):
                tensors[name] = torch.randn_like(empty, device=device, dtype=self.dtype) * 0.02
            if isinstance(layer, torch.nn.LayerNorm):
                tensors["weight"] += 1
            if tensors:
                model.get_submodule(path).load_state_dict(tensors, assign=True)
        keep = machine.free_memory(device) >= 4 * quant.dequantized_size(model)
        evaluation.choose_what_is_stored(model, keep, device)
        return model


# -----------------------------------------------------------------------------
# Stages


def check_nf4(setting: Setting, dtype: str) -> Iterator[Line]:
    """Compares bitsandbytes' kernels with plain torch, bit for bit."""
    weight = torch.randn(2560, 2560).to(setting.device, evaluation.DTYPES[dtype])
    weight[0, : quant.BLOCK] = 0
    form = (weight.shape, weight.dtype)
    indices, absmax = quant.quantize_by_kernel(weight)
    values = quant.kernels().dequantize_4bit(indices, absmax, quant.BLOCK, "nf4", *form)
    plain_indices, plain_absmax = quant.quantize(weight)
    plain_values = quant.dequantize(indices, absmax, *form)
    # On a GPU the kernel multiplies by 1 / absmax, where plain torch divides. A weight half way
    # between two levels may get the other level.
    bound = 0 if setting.device.type == "cpu" else 1e-5
    share = (indices != plain_indices).float().mean().item()
    yield checked("NF4, share of indices off plain torch", dtype, share, bound)
    share = (absmax != plain_absmax).float().mean().item()
    yield checked("NF4, share of absmax off plain torch", dtype, share, 0)
    share = (values != plain_values).float().mean().item()
    yield checked("NF4, share of values off plain torch", dtype, share, 0)


def check_attention(setting: Setting, dtype: str) -> Iterator[Line]:
    """Compares packed rows, and torch's attention with a mask, with fp64, forward and backward."""
    prefix = setting.prefix_length
    lengths = [len(prompt) - prefix for prompt, _ in setting.rows["training"][:16]]
    heads = 4 if setting.device.type == "cpu" else 32
    # q, k, v, and a gradient of the output
    tensors = torch.randn(4, prefix + sum(lengths), heads, 80).to(evaluation.DTYPES[dtype])
    layouts = {
        "packed rows": packing.PackedRows(lengths, prefix, setting.device),
        "with a mask": phi2.MaskedRows(lengths, prefix, setting.device),
    }
    apart = {name: [] for name in layouts}
    for last in (None, 2):  # queries of each row: in the last transformer block there are two
        # On the CPU, because not every device has fp64.
        exact = attend(phi2.MaskedRows(lengths, prefix), last, *tensors.double())
        for name, layout in layouts.items():
            found = attend(layout, last, *tensors.to(setting.device))
            for a, b in zip(found, exact):
                apart[name].append(((a.cpu().double() - b).norm() / b.norm()).item())
    for name, errors in apart.items():
        yield checked(f"attention, {name}, off fp64", dtype, max(errors), ATTENTION_BOUNDS[dtype])


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


def check_beside_transformers(setting: Setting, dtype: str) -> Iterator[Line]:
    """Compares the loss, the gradients of the adapters, the scores, and 32 new tokens."""
    missing = [name for name in ("transformers", "peft", "accelerate") if not find_spec(name)]
    if missing:
        status = f"skipped: pip install {' '.join(missing)}"
        yield Line("beside transformers + PEFT", dtype, status=status)
        return
    for name, model in setting.compared.items():
        if not model.exists():
            bench.write_random_phi_2(model, layers=2)
        for quantization in ("none", "nf4"):
            apart, bounds = distances(setting, model, quantization, dtype)
            for what, bound in bounds.items():
                title = f"{name}, {quantization}, {what} off transformers"
                yield checked(title, dtype, apart[what], bound)


def distances(setting: Setting, model: Path, quantization: str, dtype: str) -> tuple[dict, dict]:
    """Returns how much ours differs from the reference in fp32, and how much it may differ."""
    rows = {name: part[:16] for name, part in setting.rows.items()}

    def results_of(kind: type[contenders.Contender], dtype: str) -> dict:
        contender = kind(setting.job(model, quantization, dtype), rows)
        results = contenders.save_results(contender, str(setting.folder / "gradients.safetensors"))
        results["gradients"] = {
            name: gradient.cpu() for name, gradient in contender.gradients().items()
        }
        del contender
        free_memory(setting.device)
        return results

    exact = results_of(contenders.Reference, "fp32")
    apart = bench.distances(results_of(contenders.Ours, dtype), exact)
    if dtype == "fp32":
        # One row may have other tokens, where two were almost equally likely.
        return apart, bench.BOUNDS | {"written": 1 / len(exact["written"])}
    # Twice as much as the reference differs in this dtype, as in scripts/bench.py.
    theirs = bench.distances(results_of(contenders.Reference, dtype), exact)
    return apart, {what: 2 * theirs[what] for what in ("gradient", "scores")}


def check_graphs(setting: Setting, dtype: str) -> Iterator[Line]:
    """Compares the tokens that are generated with CUDA graphs with those without."""
    if setting.device.type != "cuda":
        yield Line("CUDA graphs", dtype, status="skipped: only CUDA has graphs")
        return
    contender = setting.timed_contender(dtype)
    prompts = contender.prompts[:16]
    recorded = contender.write(prompts, 32)
    # If a step cannot be recorded, generation continues without graphs and sets this to False.
    failed = float(not contender.model.uses_graphs)
    yield checked("CUDA graphs that could not be recorded", dtype, failed, 0)
    contender.model.uses_graphs = False
    others = [a != b for a, b in zip(recorded, contender.write(prompts, 32))]
    share = sum(others) / len(others)
    yield checked("CUDA graphs, share of rows with other tokens", dtype, share, 0)


def measure(setting: Setting, dtype: str) -> Iterator[Line]:
    """Measures times, and the peak of memory, which scripts.plan counts too."""
    contender = setting.timed_contender(dtype)
    prompts = contender.prompts[:64]
    machine.peak_memory(setting.device, reset=True)
    yield Line(TRAINING, dtype, milliseconds(setting, lambda: contender.train(16, 1)))
    peak = machine.peak_memory(setting.device)
    yield Line(SCORING, dtype, milliseconds(setting, lambda: contender.score(prompts)))
    yield Line(WRITING, dtype, milliseconds(setting, lambda: contender.write(prompts[:16], 32)))

    planned = planned_memory(setting, contender) / 2**30
    if setting.device.type == "cuda":
        # cuBLAS takes up to 64 MiB of work space besides the tensors that are counted.
        yield checked(PEAK, dtype, peak / 2**30, 1.1 * planned + 1 / 16)
    else:  # elsewhere a process keeps the memory that earlier stages have freed
        yield Line(PEAK, dtype, status="skipped: only a GPU's allocator reports it")
    yield Line(PLANNED, dtype, planned)


def milliseconds(setting: Setting, work: Callable[[], object]) -> float:
    times = []
    for _ in range(1 + TIMES):
        begin = time.perf_counter()
        work()
        if setting.device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - begin)
    return 1000 * median(times[1:])


def planned_memory(setting: Setting, contender: contenders.Ours) -> int:
    """Returns how many bytes scripts.plan counts for the step that was timed."""
    is_kept = any(getattr(module, "kept", None) is not None for module in contender.model.modules())
    command = f"--quant nf4 --dtype {contender.job.dtype} --device {setting.device.type}"
    command += " --dropout 0 --residual-dropout 0 --dataset tiny/data"
    command += " --keep-dequantized" if is_kept else " --no-keep-dequantized"
    args = cli.train_arguments([*command.split(), "--model", str(setting.timed)])
    rows = setting.rows["training"][:16]
    return plan.memory(setting.timed, args, rows, setting.prefix_length)["sum"]


STAGES = {
    "NF4": check_nf4,
    "attention": check_attention,
    "beside transformers + PEFT": check_beside_transformers,
    "CUDA graphs": check_graphs,
    "times and memory": measure,
}


def attempt(stage: str, setting: Setting, dtype: str) -> list[Line]:
    """Returns the lines of a stage. If it fails, the last line says so."""
    torch.manual_seed(0)
    lines = []
    try:
        for line in STAGES[stage](setting, dtype):
            lines.append(line)
    except Exception as error:  # any error: people run this once, and send what it found
        status = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        lines.append(Line(stage, dtype, status=status, trace=traceback.format_exc()))
    free_memory(setting.device)
    return lines


def free_memory(device: torch.device) -> None:
    gc.collect()  # a model is part of a reference cycle
    if device.type == "cuda":
        torch.cuda.empty_cache()


# -----------------------------------------------------------------------------
# Output


def print_table(lines: list[Line]) -> None:
    print(f"\n{'':50} {'':5} {'figure':>9} {'bound':>9}")
    for line in lines:
        figures = f"{as_text(line.figure):>9} {as_text(line.bound):>9}"
        print(f"{line.what:50} {line.dtype:5} {figures}  {line.status}")


def as_text(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def table_rows(results: dict) -> list[str]:
    """Returns rows for the table by machine in docs/benchmarks.md, one for each dtype."""
    known = results["machine"]
    version = f"torch {known['versions']['torch']}, {(known['commit'] or 'no commit')[:7]}"
    rows = []
    for dtype in dict.fromkeys(line["dtype"] for line in results["lines"]):
        lines = [line for line in results["lines"] if line["dtype"] == dtype]
        figure_of = {line["what"]: as_text(line["figure"]) for line in lines}
        states = [line["status"].partition(":")[0] for line in lines]
        checks = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        figures = [figure_of.get(what, "") for what in MEASURED]
        cells = [known["device_name"], results["model"], dtype, *figures, checks, version]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


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
    add("--name", type=flags.word, help="name of the machine (default: what torch calls it)")
    add("--out", type=flags.path, default=Path("out") / "selftest.json",
        help="file for all figures")
    add("--row", type=flags.path, metavar="JSON",
        help="only print the rows of such a file for docs/benchmarks.md")
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
        compared={model.name if args.model else "tiny": model},
        timed=model,
        kind=contenders.Ours,
        tokenizer=model,
        rows=bench.encode_rows(None, tokenizer, args.rows),
        prefix_length=len(prefix),
    )
    if args.random_phi_2:
        setting.compared["phi-2's widths"] = folder / "two-layers"
        setting.timed = folder / "random-phi-2"
        setting.kind = RandomPhi2
        config = phi2.Phi2Config(num_hidden_layers=args.random_phi_2, resid_pdrop=0.0)
        setting.timed.mkdir()
        files.write_json(setting.timed / "config.json", {"model_type": "phi"} | asdict(config))
    return setting


def describe(args: argparse.Namespace, device: torch.device) -> dict:
    """Returns what the JSON file says about the machine."""
    known = machine.environment(device)
    known |= {"system": platform.platform(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        known["cuda"] = torch.version.cuda
        known["capability"] = torch.cuda.get_device_capability(device)
        known["memory_gib"] = torch.cuda.get_device_properties(device).total_memory / 2**30
    if args.name:
        known["device_name"] = args.name
    return known


def main() -> None:
    args = parse_arguments()
    if args.row:
        try:
            print("\n".join(table_rows(files.read_json(args.row))))
        except (LookupError, TypeError, AttributeError):
            raise ValueError(f"{args.row} was not written by scripts.selftest") from None
        return
    begin = time.perf_counter()
    device = processes.own_device(args.device)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    # Windows does not remove a file that is still mapped.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        setting = prepare(args, device, Path(name))
        results = {"machine": describe(args, device), "model": next(iter(setting.compared))}
        if args.random_phi_2:
            results["model"] = f"phi-2, {args.random_phi_2} layers"
        for dtype in args.dtype:
            for stage in STAGES:
                print(f"{time.perf_counter() - begin:6.1f} s  {dtype}, {stage}", flush=True)
                lines += attempt(stage, setting, dtype)
                # After each stage, because the next one may crash the process.
                seconds = time.perf_counter() - begin
                results |= {"lines": list(map(asdict, lines)), "seconds": seconds}
                files.write_json(args.out, results)
    print_table(lines)
    print(f"\n{results['machine']['device_name']}: everything is in {args.out}")
    if any(line.status.startswith(("differs", "failed")) for line in lines):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
