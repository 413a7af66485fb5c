"""Compares speed and memory with transformers + PEFT + bitsandbytes, and litgpt if installed.

    python -m scripts.bench                                # tiny/ on a CPU, phi-2 on a GPU
    python -m scripts.bench --random-phi-2                 # full size, no download
    python -m scripts.bench --random-phi-2 1 --rows 32     # one layer: small machines
    python -m scripts.bench --against ../before            # with another checkout of this project

All contenders (scripts/contenders.py) get the same files, the same adapter, the same rows and the
same loss. Each runs in its own process, and they take turns: A B C A B C. The others are used well.
They run rows of similar length in micro-batches; several sizes and kinds of attention are tried
first, and the fastest is used. Their output head runs only on the positions of the answers. They
generate as many new tokens for each row as ours does.

First the results are compared: in fp32 without quantisation, then with the settings that are timed.
If they differ, no figure is printed. Figures are medians over the rounds, and a ratio is the median
of the rounds' ratios.

Speed depends on how much the rows of a batch differ in length. They are drawn from tiny/data with
the lengths of MNLI (tiny/mnli_lengths.py).
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, closing
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
from scripts.contenders import TASKS
from support import checkpoints, cli, files, flags, machine
from tiny import mnli_lengths

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny" / "model"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PEAK = "peak memory in training above imports, MiB"


# -----------------------------------------------------------------------------
# Processes


@dataclass(frozen=True)
class Contender:
    name: str  # a key of contenders.CONTENDERS
    folder: Path = ROOT  # of the six files


def all_contenders(against: Path | None) -> list[Contender]:
    """Returns ours and those to compare it with. The second one's results are the reference."""
    if against:
        return [Contender("ours"), Contender("before", against)]
    names = ["ours", "reference"]
    if find_spec("litgpt"):
        names.append("litgpt")
    return [Contender(name) for name in names]


class Process:
    """A contender in its own process. `job` has the fields of scripts/contenders.py's Job.

    imported: the memory of the process with its libraries alone. ways: its ways to do each task.
    """

    def __init__(self, contender: Contender, job: dict):
        self.contender = contender
        # -P: otherwise the files of scripts/ would come before all libraries on the path.
        command = [sys.executable, "-P", ROOT / "scripts" / "contenders.py", contender.name]
        self.process = subprocess.Popen(
            [*command, json.dumps(job)],
            env=os.environ | {"PYTHONPATH": str(contender.folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        start = self.read()
        self.imported = start["imported"]
        self.ways = start["ways"]

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            end = f"{self.contender.name} ended with status {self.process.wait()}"
            raise ValueError(f"{end}; its error is printed above")
        return json.loads(line)

    def ask(self, **request) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# -----------------------------------------------------------------------------
# The gate: no figure without agreement


# In fp32 results differ only by rounding. Of 64 rows with 32 new ids one may differ, where two ids
# are almost equally likely.
BOUNDS = {"loss": 1e-5, "gradient": 1e-4, "scores": 1e-5, "written": 0.02}


def results_of(contender: Contender, job: dict, folder: Path) -> dict:
    """Returns what contenders.results does, from another process."""
    path = folder / f"{contender.name}.safetensors"
    with closing(Process(contender, job)) as process:
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


def measure(names: list[Contender], job: dict, tasks: list[str], rounds: int) -> dict:
    """Returns rows per second and the peak of memory, {title: {contender: [one per round]}}.

    `tasks` are keys of contenders.TASKS.
    """
    figures = {TASKS[task].title: {} for task in tasks} | {PEAK: {}}
    turns = []
    with ExitStack() as stack:
        processes = {}
        for contender, has_adapter in itertools.product(names, (True, False)):
            adapter = job["adapter"] if has_adapter else None
            process = Process(contender, job | {"adapter": adapter})
            processes[contender, has_adapter] = stack.enter_context(closing(process))
        for task, contender in itertools.product(tasks, names):
            process = processes[contender, TASKS[task].has_adapter]
            if process.ways[task]:
                figures[TASKS[task].title][contender.name] = []
                turns.append((process, {"task": task, "way": fastest_way(process, task)}))
        for number in range(rounds + 1):  # the first round warms up
            for process, request in turns:
                rate = process.ask(**request)["rate"]
                if number:
                    title = TASKS[request["task"]].title
                    figures[title][process.contender.name].append(rate)
            print(f"{job['dtype']}: round {number} of {rounds}", flush=True)
    for timed, request in turns:
        if request["task"] == "train16":
            with closing(Process(timed.contender, job | {"keep": False})) as process:
                process.ask(**request)
                peak = process.ask(**request)["peak"]
            figures[PEAK][timed.contender.name] = [(peak - process.imported) / 2**20]
    return figures


def fastest_way(process: Process, task: str) -> dict:
    """Returns and prints the fastest of a contender's ways to do a task."""
    ways = process.ways[task]
    if len(ways) == 1:
        return ways[0]
    process.ask(task=task, way=ways[0])  # warms up
    rates = [process.ask(task=task, way=way)["rate"] for way in ways]
    way = ways[rates.index(max(rates))]
    words = ", ".join(f"{name} {value}" for name, value in way.items())
    name = process.contender.name
    print(f"{name}, {TASKS[task].title}: {words} (of {len(ways)} ways)", flush=True)
    return way


def show(figures: dict, names: list[Contender]) -> None:
    """Prints the medians, and the median of ours divided by each of the others, by round."""
    peers = [contender.name for contender in names[1:]]
    heading = "".join(f"{name:>11} {'ratio':>6}" for name in peers)
    print(f"\n{'rows a second':46} {'ours':>9} {heading}")
    for title, figure_of in figures.items():
        cells = ""
        for name in peers:
            if name not in figure_of:
                cells += f"{'-':>11} {'-':>6}"
                continue
            ratio = median(a / b for a, b in zip(figure_of["ours"], figure_of[name]))
            cells += f"{median(figure_of[name]):11.2f} {ratio:5.2f}x"
        print(f"{title:46} {median(figure_of['ours']):9.2f} {cells}")


# -----------------------------------------------------------------------------
# Files for all contenders


def encode_rows(tokenizer: Tokenizer, count: int) -> dict[str, list]:
    """Returns encoded rows for training, and for evaluation in the order of eval.py."""
    pairs = mnli_lengths.validation_rows(tokenizer, count)
    evaluation_rows = [data.encode(pair, tokenizer) for pair in pairs]
    premises = {"premise": [pair["premise"] for pair in pairs]}
    groups = data.by_premise(premises, [prompt for prompt, _ in evaluation_rows])
    training = mnli_lengths.training_rows(tokenizer, count)
    return {
        "training": [data.encode(pair, tokenizer) for pair in training],
        "evaluation": [evaluation_rows[number] for group in groups for number in group],
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
    shapes = {name: matrix.shape for name, matrix in lora.lora_parameters(skeleton).items()}
    tensors = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    skeleton.load_state_dict(tensors, strict=False, assign=True)
    lora.save_adapter(skeleton, config, directory, model)


def prepare(args: argparse.Namespace, folder: Path) -> dict:
    """Writes the rows, the adapter, and the model if it is random. Returns the job."""
    if args.random_phi_2:
        print(f"writing a random phi-2 of {args.random_phi_2} layers", flush=True)
        model = folder / "model"
        tokenizer = TINY
        write_random_phi_2(model, args.random_phi_2)
    else:
        model = tokenizer = checkpoints.find(args.model, phi2.read_config).resolve()
    files.write_json(folder / "rows.json", encode_rows(data.load_tokenizer(tokenizer), args.rows))
    write_random_adapter(str(model), folder / "adapter")
    return {
        "model": str(model),
        "tokenizer": str(tokenizer),
        "rows": str(folder / "rows.json"),
        "adapter": str(folder / "adapter"),
        "quant": args.quant,
        "device": DEVICE,
    }


# -----------------------------------------------------------------------------
# The script


def parse_arguments() -> argparse.Namespace:
    on_gpu = DEVICE == "cuda"
    parser = cli.Parser("compares speed and memory with the reference, once the results agree")
    add = parser.add_argument
    # fmt: off (a flag is one filled paragraph)
    add("--model", type=flags.name, default="microsoft/phi-2" if on_gpu else str(TINY),
        help="Hub id or directory (default: microsoft/phi-2, no GPU: tiny/model)")
    add("--random-phi-2", type=flags.count, nargs="?", const=32, metavar="LAYERS",
        help="use random weights of phi-2's size (default: 32 layers)")
    add("--rows", type=flags.count, default=256,
        help="for training and for evaluation; below 128 no steps of 128 rows are timed")
    add("--rounds", type=flags.count, default=5)
    add("--dtype", choices=list(evaluation.DTYPES), nargs="+",
        help="one after another (default: the fastest one of the device; on a CPU also fp32)")
    add("--quant", choices=["nf4", "none"], default="nf4" if on_gpu else "none",
        help="of what is timed (default: nf4; on a CPU none, because litgpt has no NF4 there)")
    add("--against", type=flags.path, metavar="CHECKOUT",
        help="compare only with another checkout of this project")
    # fmt: on
    args = parser.parse_args()
    if args.against and not (args.against / "lora.py").is_file():
        parser.error(f"--against {args.against} is not a checkout of this project")
    if args.dtype is None:
        fast = machine.fast_dtype(DEVICE)
        args.dtype = [fast] if on_gpu else list(dict.fromkeys(["fp32", fast]))
    return args


def main() -> None:
    args = parse_arguments()
    names = all_contenders(args.against)
    tasks = [task for task in TASKS if task != "train128" or args.rows >= 128]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = prepare(args, folder)
        for dtype in args.dtype:
            dtype_job = job | {"dtype": dtype}
            compare(names, dtype_job, folder)
            show(measure(names, dtype_job, tasks, args.rounds), names)


if __name__ == "__main__":
    cli.run(main)
