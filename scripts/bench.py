"""Compares speed and memory with transformers + PEFT + bitsandbytes, and litgpt if installed.

    python -m scripts.bench                                # tiny/ on a CPU, phi-2 on a GPU
    python -m scripts.bench --random-phi-2 --json bench.json         # full size, no download
    python -m scripts.bench --random-phi-2 1 --rows 32 --rounds 1    # one layer: small machines
    python -m scripts.bench --against ../before            # with another checkout of this project

All contenders (scripts/contenders.py) get the same files, the same adapter, the same rows and the
same loss. Each runs in its own process, and they take turns: A B C A B C. The others are used well.
They run rows of similar length in micro-batches; several sizes and kinds of attention are tried
first, and the fastest is used. Their output head runs only on the positions of the answers. They
generate as many new tokens for each row as ours does.

First the results are compared: in fp32 without quantisation, then with the settings that are timed.
If they differ, no figure is printed. Figures are medians over the rounds, and a ratio is the median
of the rounds' ratios.

Speed depends on how much the rows of a batch differ in length. Without --dataset the rows are drawn
from tiny/data with the lengths of MNLI (tiny/mnli_lengths.py). With it they are the first rows of
the dataset, unchanged.

Results from other people's machines come from scripts/selftest.py, in the form that
docs/benchmarks.md describes ("By machine").
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python scripts/bench.py`

import data
import eval as evaluation
import lora
import phi2
from support import checkpoints, cli, examples, files, flags, machine, processes
from tiny import mnli_lengths

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny" / "model"


@dataclass(frozen=True)
class Line:
    """A line of the table: a task of scripts/contenders.py."""

    title: str
    task: str
    has_adapter: bool = True


LINES = (
    Line("training, 16 rows a step", "train16"),
    Line("training, 128 rows a step", "train128"),
    Line("scoring, fine-tuned", "score"),
    Line("scoring, the base", "score", has_adapter=False),
    Line("generation of 2 tokens, fine-tuned", "write2"),
    Line("generation of 32 tokens, the base", "write32", has_adapter=False),
    Line("loading and quantising, loads a second", "load"),
)


# -----------------------------------------------------------------------------
# Processes


@dataclass(frozen=True)
class Contender:
    name: str
    kind: str  # as scripts/contenders.py calls it
    folder: Path = ROOT  # of the six files


def contenders(against: Path | None) -> list[Contender]:
    """Returns ours and those to compare it with. The second one's results are the reference."""
    ours = Contender("ours", "ours")
    if against:
        return [ours, Contender("before", "ours", against)]
    peers = [Contender("reference", "reference")]
    if find_spec("litgpt"):
        peers.append(Contender("litgpt", "litgpt"))
    return [ours, *peers]


class Process:
    """A contender in its own process. `job` has the fields of scripts/contenders.py's Job.

    Within its `with` statement, `ways` holds its ways to do each task, and `imported` the memory of
    the process with its libraries alone.
    """

    def __init__(self, contender: Contender, job: dict):
        self.name = contender.name
        typed = json.dumps(job | {"contender": contender.kind})
        # -P: otherwise the files of scripts/ would come before all libraries on the path.
        command = [sys.executable, "-P", ROOT / "scripts" / "contenders.py", typed]
        path = [str(contender.folder), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise ValueError(f"{self.name} ended with status {status}; its error is printed above")
        return json.loads(line)

    def ask(self, **request) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.read()

    def __enter__(self) -> "Process":
        start = self.read()
        self.imported = start["imported"]
        self.ways = start["ways"]
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()


# -----------------------------------------------------------------------------
# The gate: no figure without agreement


# In fp32 results differ only by rounding. Of 64 rows with 32 new ids one may differ, where two ids
# are almost equally likely.
BOUNDS = {"loss": 1e-5, "gradient": 1e-4, "scores": 1e-5, "written": 0.02}


def results_of(contender: Contender, job: dict, folder: Path) -> dict:
    """Returns loss, gradients, scores and new ids. litgpt has no scores."""
    path = folder / f"{contender.name}.safetensors"
    with Process(contender, job) as process:
        results = process.ask(save=str(path))
    return results | {"gradients": load_file(path)}


def distances(mine: dict, theirs: dict) -> dict[str, float]:
    """Returns how much two results differ.

    For the loss and the gradients it is the relative error, for scores the mean difference, for
    generated ids the share of rows in which an id differs.
    """
    names = sorted(theirs["gradients"])
    my_gradient = torch.cat([mine["gradients"][name].flatten().float() for name in names])
    their_gradient = torch.cat([theirs["gradients"][name].flatten().float() for name in names])
    others = [a != b for a, b in zip(mine["written"], theirs["written"], strict=True)]
    apart = {
        "loss": abs(mine["loss"] / theirs["loss"] - 1),
        "gradient": ((my_gradient - their_gradient).norm() / their_gradient.norm()).item(),
        "written": sum(others) / len(others),
    }
    if mine["scores"]:
        difference = torch.tensor(mine["scores"]) - torch.tensor(theirs["scores"])
        apart["scores"] = difference.abs().mean().item()
    return apart


def beyond(title: str, apart: dict[str, float], bounds: dict[str, float]) -> list[str]:
    """Prints distances. Returns a line for each that is above its bound, or is NaN."""
    words = ", ".join(f"{name} {distance:.1e}" for name, distance in apart.items())
    print(f"{title}: {words}", flush=True)
    return [
        f"{title}, {name}: off by {apart[name]:.1e}"
        for name, bound in bounds.items()
        if name in apart and not apart[name] <= bound  # so that NaN fails
    ]


def compare(names: list[Contender], job: dict, folder: Path) -> None:
    """Raises ValueError unless all contenders compute the same."""
    ours, other, *rest = names
    problems = []
    for quant in dict.fromkeys(("none", job["quant"])):
        exact_job = job | {"quant": quant, "dtype": "fp32"}
        exact = results_of(other, exact_job, folder)
        for contender in [ours, *rest] if quant == "none" else [ours]:  # litgpt has no NF4 here
            apart = distances(results_of(contender, exact_job, folder), exact)
            title = f"{contender.name} from {other.name}, fp32, quantisation {quant}"
            problems += beyond(title, apart, BOUNDS)
    if job["dtype"] != "fp32":
        # bf16 has 8 significant bits and fp16 has 11, and each contender rounds at other places.
        # Ours may be twice as far from fp32 as the other is, because either distance varies by
        # that much with the adapter.
        mine = distances(results_of(ours, job, folder), exact)
        theirs = distances(results_of(other, job, folder), exact)
        beyond(f"{other.name} in {job['dtype']} from fp32", theirs, {})
        bounds = {name: 2 * theirs[name] for name in ("gradient", "scores")}
        problems += beyond(f"ours in {job['dtype']} from fp32", mine, bounds)
    if problems:
        raise ValueError("no figures, the contenders do not agree: " + "; ".join(problems))


# -----------------------------------------------------------------------------
# The measurement


def measure(names: list[Contender], job: dict, lines: list[Line], rounds: int) -> dict:
    """Returns rows per second, {line: {contender: [one per round]}}, ways and peak memory."""
    begin = time.perf_counter()
    rates = {line.title: {} for line in lines}
    ways = {line.title: {} for line in lines}
    turns = []
    with ExitStack() as stack:
        processes = {
            (contender, adapter): Process(contender, job | {"adapter": adapter})
            for contender in names
            for adapter in {job["adapter"] if line.has_adapter else None for line in lines}
        }
        for process in processes.values():
            stack.enter_context(process)
        for line, contender in itertools.product(lines, names):
            process = processes[contender, job["adapter"] if line.has_adapter else None]
            if process.ways[line.task]:
                way = fastest_way(process, line)
                ways[line.title][contender.name] = way
                rates[line.title][contender.name] = []
                turns.append((line, process, way))
        for number in range(rounds + 1):  # the first round warms up
            for line, process, way in turns:
                rate = process.ask(task=line.task, way=way)["rate"]
                if number:
                    rates[line.title][process.name].append(rate)
            minutes = (time.perf_counter() - begin) / 60
            print(f"{job['dtype']}: round {number} of {rounds}, {minutes:.1f} minutes", flush=True)
    peaks = {}
    for contender in names:
        way = ways["training, 16 rows a step"][contender.name]
        with Process(contender, job | {"keep": False}) as process:
            process.ask(task="train16", way=way)
            peak = process.ask(task="train16", way=way)["peak"]
            peaks[contender.name] = (peak - process.imported) / 2**20
    return {"rates": rates, "ways": ways, "training_peak_mib": peaks}


def fastest_way(process: Process, line: Line) -> dict:
    """Returns and prints the fastest of a contender's ways to do a task."""
    ways = process.ways[line.task]
    if len(ways) == 1:
        return ways[0]
    process.ask(task=line.task, way=ways[0])  # warms up
    rates = [process.ask(task=line.task, way=way)["rate"] for way in ways]
    way = ways[rates.index(max(rates))]
    words = ", ".join(f"{name} {value}" for name, value in way.items())
    print(f"{process.name}, {line.title}: {words} (of {len(ways)} ways)", flush=True)
    return way


def show(results: dict) -> None:
    """Prints rows per second, and how many times as fast ours is as each of the others."""
    peaks = results["training_peak_mib"]
    peers = list(peaks)[1:]
    heading = "".join(f"{name:>11} {'ratio':>6}" for name in peers)
    print(f"\n{'rows a second':46} {'ours':>9} {heading}")
    for title, rates in results["rates"].items():
        cells = ""
        for name in peers:
            if name not in rates:
                cells += f"{'-':>11} {'-':>6}"
                continue
            ratio = median(mine / theirs for mine, theirs in zip(rates["ours"], rates[name]))
            cells += f"{median(rates[name]):11.2f} {ratio:5.2f}x"
        print(f"{title:46} {median(rates['ours']):9.2f} {cells}")
    cells = "".join(f"{peaks[name]:11.2f} {peaks['ours'] / peaks[name]:5.2f}x" for name in peers)
    title = "peak memory in training above imports, MiB"
    print(f"{title:46} {peaks['ours']:9.2f} {cells}")


# -----------------------------------------------------------------------------
# Files for all contenders


def encode_rows(dataset: str | None, tokenizer: Tokenizer, count: int) -> dict[str, list]:
    """Returns encoded rows for training, and for evaluation in the order of eval.py.

    With a dataset these are the first `count` rows of train, and `count` rows of the first premises
    of validation: in a split the rows of one premise may be in different places.
    """
    if dataset is None:
        training = mnli_lengths.training_rows(tokenizer, count)
        pairs = mnli_lengths.validation_rows(tokenizer, count)
    else:
        split, *_ = examples.validation_splits(dataset)
        training = examples.load_examples(dataset, "train", count)
        by_premise = {}
        for pair in examples.load_examples(dataset, split):
            by_premise.setdefault(pair["premise"], []).append(pair)
        pairs = [*itertools.chain.from_iterable(by_premise.values())][:count]
    encoded = [data.encode(pair, tokenizer) for pair in pairs]
    columns = {"premise": [pair["premise"] for pair in pairs]}
    groups = data.by_premise(columns, [prompt for prompt, _ in encoded])
    return {
        "training": [data.encode(pair, tokenizer) for pair in training],
        "evaluation": [encoded[number] for group in groups for number in group],
    }


def write_random_phi_2(directory: Path, layers: int) -> None:
    """Writes a model of phi-2's widths with transformers' random initial weights, in fp16."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    config = PhiConfig(**asdict(phi2.Phi2Config(num_hidden_layers=layers, resid_pdrop=0.0)))
    # On the CPU even if there is a GPU: this process keeps running, and would hold GPU memory.
    PhiForCausalLM(config).half().save_pretrained(directory, max_shard_size="1GB")


def write_random_adapter(model: str, directory: Path) -> None:
    """Writes a random adapter of rank 8 on q and v: its values do not affect the speed."""
    torch.manual_seed(0)
    config = lora.LoRAConfig(dropout=0.0)
    skeleton = phi2.build(model)
    lora.inject(skeleton, config)
    for module in skeleton.modules():
        if isinstance(module, lora.LoRALinear):
            for matrix in (module.lora_A, module.lora_B):
                matrix.weight = torch.nn.Parameter(torch.randn(matrix.weight.shape) * 0.02)
    lora.save_adapter(skeleton, config, directory, model)


def prepare(args: argparse.Namespace, folder: Path) -> dict:
    """Writes the rows, the adapter, and the model if it is random. Returns the job."""
    model = folder / "model"
    if not args.random_phi_2:
        model = checkpoints.find(args.model, phi2.read_config).resolve()
    tokenizer_folder = args.tokenizer or (TINY if args.random_phi_2 else model)
    # The rows come first: they show a mistake in a flag, and writing a model takes minutes.
    rows = encode_rows(args.dataset, data.load_tokenizer(tokenizer_folder), args.rows)
    files.write_json(folder / "rows.json", rows)
    if args.random_phi_2:
        print(f"writing a random phi-2 of {args.random_phi_2} layers", flush=True)
        args.model = str(model)
        write_random_phi_2(model, args.random_phi_2)
    write_random_adapter(str(model), folder / "adapter")
    return {
        "model": str(model),
        "tokenizer": str(tokenizer_folder.resolve()),
        "rows": str(folder / "rows.json"),
        "adapter": str(folder / "adapter"),
        "quant": args.quant,
        "device": args.device,
    }


# -----------------------------------------------------------------------------
# The script


def parse_arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = cli.Parser("compares speed and memory with the reference, once the results agree")
    add = parser.add_argument
    # fmt: off (a flag is one filled paragraph)
    add("--model", type=flags.name, default="microsoft/phi-2" if on_gpu else str(TINY),
        help="Hub id or directory (default: microsoft/phi-2, no GPU: tiny/model)")
    add("--random-phi-2", type=flags.count, nargs="?", const=32, metavar="LAYERS",
        help="use random weights of phi-2's size (default: 32 layers)")
    add("--tokenizer", type=flags.path,
        help="directory with a tokenizer.json, for --random-phi-2 (default: tiny/model)")
    add("--dataset", type=flags.name,
        help="Hub id or directory (default: rows of MNLI's lengths, from tiny/data)")
    add("--rows", type=flags.count, default=256,
        help="for training and for evaluation; below 128 no steps of 128 rows are timed")
    add("--rounds", type=flags.count, default=5)
    add("--dtype", choices=list(evaluation.DTYPES), nargs="+",
        help="one after another (default: the one that the device computes fast; on a CPU "
             "also fp32)")
    add("--quant", choices=["nf4", "none"], default="nf4" if on_gpu else "none",
        help="of what is timed (default: nf4; on a CPU none, because litgpt has no NF4 there)")
    add("--device", type=flags.device, default="cuda" if on_gpu else "cpu")
    add("--against", type=flags.path, metavar="CHECKOUT",
        help="compare only with another checkout of this project")
    add("--json", type=flags.path, help="write all figures to this file")
    # fmt: on
    args = parser.parse_args()
    processes.own_device(args.device)  # raises ValueError for one that cannot be used
    if args.against and not (args.against / "lora.py").is_file():
        parser.error(f"--against {args.against} is not a checkout of this project")
    if args.dtype is None:
        args.dtype = default_dtypes(args.device)
    return args


def default_dtypes(device: str) -> list[str]:
    """Returns the dtype that a device computes fast; for a CPU fp32 first."""
    fast = machine.fast_dtype(device)
    if device == "cpu":
        return list(dict.fromkeys(["fp32", fast]))
    return [fast]


def main() -> None:
    args = parse_arguments()
    names = contenders(args.against)
    lines = [line for line in LINES if line.task != "train128" or args.rows >= 128]
    device = machine.device_name(torch.device(args.device))
    results = {"device": device, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = prepare(args, folder)
        for dtype in args.dtype:
            dtype_job = job | {"dtype": dtype}
            compare(names, dtype_job, folder)
            results[dtype] = measure(names, dtype_job, lines, args.rounds)
            show(results[dtype])
            if args.json:
                files.write_json(args.json, results)


if __name__ == "__main__":
    cli.run(main)
