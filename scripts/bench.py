"""Speed and memory beside transformers + PEFT + bitsandbytes, and beside the notebooks' way.

    python -m scripts.bench                                # tiny/ on a CPU, phi-2 on a GPU
    python -m scripts.bench --random-phi-2 --json bench.json         # full size, no download
    python -m scripts.bench --random-phi-2 1 --rows 32 --rounds 1    # one layer: small machines

All contenders have the same files, the same adapter, the same rows and the same loss. Each is a
process of its own, and they take turns: A B C A B C. The reference is used well: bf16, SDPA,
batches padded to their longest row, left padding and a stop at the end of text in generation, and
only the last position's logits in scoring. The notebooks' way is one row at a time, with all
logits and the loss on every token.

First the results are compared; where they differ, no figure is printed. Figures are medians over
the rounds, and a ratio is the median of the rounds' ratios.

Speed depends on how much the rows of a batch differ in length. Without --dataset the rows are drawn
from tiny/data: as many of its premises are joined into one as give the lengths of MNLI. With
--dataset they are the first rows as they are.
"""

import argparse
import importlib
import itertools
import json
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python scripts/bench.py`

import data
import eval as evaluation
import lora
import phi2
import quant
import train
from support import checkpoints, cli, examples, files, flags, machine

ROOT = Path(__file__).resolve().parent.parent
ARMS = ("ours", "reference", "notebooks")
STEPS = 4  # training steps of 16 rows in one timing
PROMPTS = 64  # rows in a batch of scoring and generation
ALONE = 4  # rows of a task in the notebooks' way, one at a time
MICRO_BATCH = 32  # rows that the reference holds at once on a GPU: 128 of them need 124 GiB
ADAPTER_STEPS = 150

# The lengths of MNLI's rows: tokens after the shared prefix, which are distributed log-normally.
MEDIAN_TOKENS = 46
SPREAD = 0.36  # the standard deviation of their logarithm: 95 % have up to 83


@dataclass
class Job:
    """What a contender is told. It travels as JSON."""

    model: str
    tokenizer: str
    rows: str  # the file that `write_rows` has written
    adapter: str | None
    dtype: str
    device: str
    new_tokens: int  # in generation with an adapter that ends its answers
    keep: bool  # ours keeps the dequantised weights
    arm: str = "ours"


@dataclass
class Rows:
    """Encoded rows, (prompt ids, answer ids), for training and for evaluation.

    `groups` are the numbers of the evaluation rows as eval.py groups them.
    """

    training: list
    evaluation: list
    groups: list[list[int]]


# -----------------------------------------------------------------------------
# The contenders


class Ours:
    """This project."""

    def __init__(self, job: Job, rows: Rows):
        self.job = job
        self.rows = rows
        self.model = evaluation.load_model(
            Path(job.model), "nf4", job.dtype, job.device, keep=job.keep
        )
        self.tokenizer = data.load_tokenizer(job.tokenizer)
        self.prefix, _, _ = data.fixed_ids(self.tokenizer)
        if job.adapter:
            lora.load_adapter(self.model, Path(job.adapter))
        self.model.eval()  # the reference has no dropout either
        self.parameters = lora.lora_parameters(self.model)
        self.optimizer = make_optimizer(self.parameters)

    def step(self, count: int, update: bool = True):
        # In the order in which data.batches gives the rows of a step: by length.
        rows = sorted(self.rows.training[:count], key=lambda row: len(row[0]))
        batch = data.collate(rows, len(self.prefix), "answer")
        loss = train.batch_loss(self.model, batch) / len(batch.targets)
        loss.backward()
        return finish_step(loss, self.parameters, self.optimizer, update)

    def score(self) -> list[int]:
        return self.predict(lambda prompts: evaluation.score(self.model, self.tokenizer, prompts))

    def write(self, limit: int) -> list[int]:
        return self.predict(
            lambda prompts: evaluation.complete(self.model, self.tokenizer, prompts, limit)
        )

    def predict(self, answer: Callable[[list], list[dict]]) -> list[int]:
        """Returns the predictions for all evaluation rows, in their order."""
        prompts = [prompt for prompt, _ in self.rows.evaluation]
        predictions = {}
        order = list(itertools.chain.from_iterable(self.rows.groups))
        for numbers in batches(order, PROMPTS):
            answers = answer([prompts[number] for number in numbers])
            for number, row in zip(numbers, answers):
                predictions[number] = row["prediction"]
        return [predictions[number] for number in range(len(prompts))]


class Reference:
    """transformers + PEFT + bitsandbytes.

    `alone` is the notebooks' way: one row at a time, all logits, the loss on every token.
    """

    def __init__(self, job: Job, rows: Rows, alone: bool = False):
        self.job = job
        self.rows = rows
        self.alone = alone
        self.model = load_reference(job)
        self.tokenizer = data.load_tokenizer(job.tokenizer)
        _, self.answers, self.eos = data.fixed_ids(self.tokenizer)
        # Ids that the head has and the tokenizer has not: ours never generates them.
        ids = range(self.tokenizer.get_vocab_size(), self.model.config.vocab_size)
        self.beyond = list(ids) or None
        self.parameters = {
            name.removeprefix(lora.PREFIX).replace(".default", ""): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        self.optimizer = make_optimizer(self.parameters)
        self.rows_at_once = None  # in training; None: all rows of a step
        if alone:
            self.rows_at_once = 1
        elif job.device.startswith("cuda"):
            self.rows_at_once = MICRO_BATCH

    def step(self, count: int, update: bool = True):
        rows = self.rows.training[: ALONE if self.alone else count]
        size = self.rows_at_once or len(rows)
        total = torch.zeros((), device=self.job.device)
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            # All rows have two targets, so a mean of the batches' means is the mean over all.
            loss = self.loss(batch) * len(batch) / len(rows)
            loss.backward()
            total += loss.detach()
        return finish_step(total, self.parameters, self.optimizer, update)

    def loss(self, rows: list) -> Tensor:
        sequences = [prompt + answer for prompt, answer in rows]
        inputs = pad(sequences, self.eos, self.job.device, "right")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        if not self.alone:
            for line, (prompt, _) in enumerate(rows):
                labels[line, : len(prompt)] = -100
        return self.model(**inputs, labels=labels, use_cache=False).loss

    def score(self) -> list[int]:
        def answer(inputs: dict) -> list[int]:
            positions = 0 if self.alone else 1  # 0: all
            logits = self.model(**inputs, logits_to_keep=positions, use_cache=False).logits
            return logits[:, -1, self.answers].argmax(dim=-1).tolist()

        return self.predict(answer)

    def write(self, limit: int) -> list[int]:
        def answer(inputs: dict) -> list[int]:
            ids = self.model.generate(
                **inputs,
                max_new_tokens=32 if self.alone else limit,
                do_sample=False,
                eos_token_id=self.eos,
                pad_token_id=self.eos,
                suppress_tokens=self.beyond,
            )
            new = ids[:, inputs["input_ids"].shape[1] :].tolist()
            texts = self.tokenizer.decode_batch(new, skip_special_tokens=True)
            return [data.parse(text) for text in texts]

        return self.predict(answer)

    @torch.inference_mode()
    def predict(self, answer: Callable[[dict], list[int]]) -> list[int]:
        """Returns the predictions for the evaluation rows, in their order."""
        prompts = [prompt for prompt, _ in self.rows.evaluation]
        if self.alone:
            prompts = prompts[:ALONE]
        predictions = {}
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        for numbers in batches(order, 1 if self.alone else PROMPTS):
            batch = [prompts[number] for number in numbers]
            answers = answer(pad(batch, self.eos, self.job.device, "left"))
            predictions |= dict(zip(numbers, answers))
        return [predictions[number] for number in range(len(prompts))]


def load_reference(job: Job):
    """Returns transformers' model in NF4, within PEFT's where the job has an adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = evaluation.DTYPES[job.dtype]
    model = AutoModelForCausalLM.from_pretrained(
        job.model,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        ),
        attn_implementation="sdpa",
        device_map={"": job.device},
    )
    if job.adapter:
        model = PeftModel.from_pretrained(model, job.adapter, is_trainable=True)
    # On some CPUs bitsandbytes repacks its weights in eval mode. Without dropout there is no other
    # difference between the modes.
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def build(job: Job, rows: Rows) -> Ours | Reference:
    if job.arm == "ours":
        return Ours(job, rows)
    return Reference(job, rows, alone=job.arm == "notebooks")


# -----------------------------------------------------------------------------
# What both contenders do alike


def batches(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def pad(sequences: list[list[int]], filler: int, device: str, side: str) -> dict[str, Tensor]:
    """Returns input_ids and attention_mask, (B, longest), padded on "left" or "right"."""
    rows = [torch.tensor(sequence) for sequence in sequences]
    masks = [torch.ones_like(row) for row in rows]
    pad_sequence = torch.nn.utils.rnn.pad_sequence
    ids = pad_sequence(rows, batch_first=True, padding_value=filler, padding_side=side)
    mask = pad_sequence(masks, batch_first=True, padding_value=0, padding_side=side)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def make_optimizer(parameters: dict[str, Tensor]) -> torch.optim.Optimizer | None:
    """Returns AdamW at a learning rate of 0: it costs the same, and the adapter stays as it is."""
    if not parameters:
        return None
    return torch.optim.AdamW(parameters.values(), lr=0.0, fused=True)


def finish_step(
    loss: Tensor, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, update: bool
) -> tuple[float, dict[str, Tensor]] | None:
    """Clips the gradients and takes a step; or, without `update`, returns loss and gradients."""
    if not update:
        gradients = {name: parameter.grad.cpu() for name, parameter in parameters.items()}
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), gradients
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return None


# -----------------------------------------------------------------------------
# The tasks


@dataclass
class Task:
    """A line of the table. `work` does it once, with what `build` has returned."""

    title: str
    work: Callable[[Ours | Reference], object]
    has_adapter: bool = True
    rows: int | None = None  # that it takes; None: all evaluation rows


def train_16(contender: Ours | Reference) -> None:
    for _ in range(1 if is_alone(contender) else STEPS):
        contender.step(16)


def is_alone(contender: Ours | Reference) -> bool:
    return isinstance(contender, Reference) and contender.alone


def load(contender: Ours | Reference) -> None:
    build(replace(contender.job, keep=False), contender.rows)  # the reference keeps nothing either


TASKS = {
    "train16": Task("training, 16 examples a step", train_16, rows=16 * STEPS),
    "train128": Task("training, 128 examples a step", lambda one: one.step(128), rows=128),
    "answer": Task(
        "generation, an adapter that ends its answers", lambda one: one.write(one.job.new_tokens)
    ),
    "score": Task("scoring", lambda one: one.score()),
    "ramble": Task(
        "generation, a base that writes 32 tokens", lambda one: one.write(32), has_adapter=False
    ),
    "load": Task("loading and quantising", load, rows=1),
}


def rows_of(task: str, arm: str, evaluation_rows: int) -> int:
    """Returns how many rows a contender has done when it has done a task once."""
    if task != "load" and arm == "notebooks":
        return ALONE
    return TASKS[task].rows or evaluation_rows


# -----------------------------------------------------------------------------
# Processes


def memory(device: str) -> tuple[int, int]:
    """Returns the peak and the present bytes: allocated on a GPU, resident on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    now = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(peak[1]) * 1024, int(now[1]) * 1024


def worker(job: Job) -> None:
    """Loads a contender, then does the tasks that standard input names, and answers in JSON."""
    rows = Rows(**files.read_json(Path(job.rows)))
    # Libraries that are imported at their first use would count as memory of the training.
    quant.kernels()
    if job.arm != "ours":
        importlib.import_module("peft")
        importlib.import_module("transformers.models.phi.modeling_phi")
    _, imported = memory(job.device)
    contender = build(job, rows)
    print(json.dumps(imported), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "save" in request:
            answer = show_results(contender, request["save"])
        else:
            answer = time_task(contender, TASKS[request["task"]])
        print(json.dumps(answer), flush=True)


def show_results(contender: Ours | Reference, path: str) -> dict:
    """Returns what is compared, and writes the gradients into a file."""
    loss, gradients = contender.step(16, update=False)
    save_file(gradients, path)
    answers = contender.write(contender.job.new_tokens)
    return {"loss": loss, "answer": answers, "score": contender.score()}


def time_task(contender: Ours | Reference, task: Task) -> dict:
    on_gpu = contender.job.device.startswith("cuda")
    if on_gpu:  # the memory was given back, so the first time is spent on asking for it again
        task.work(contender)
        torch.cuda.synchronize()
    begin = time.perf_counter()
    task.work(contender)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    if on_gpu:  # the other contenders need the room
        torch.cuda.empty_cache()
    peak, _ = memory(contender.job.device)
    return {"seconds": seconds, "peak": peak}


class Process:
    """A contender's process; `imported` is its memory with its libraries alone."""

    def __init__(self, job: Job):
        command = [sys.executable, "-m", "scripts.bench", "--worker", json.dumps(asdict(job))]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.imported = self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise ValueError(f"a contender ended with status {status}; its error stands above")
        return json.loads(line)

    def ask(self, **request) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.read()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()


# -----------------------------------------------------------------------------
# The gate: no figure without agreement


@dataclass
class Results:
    """What a contender computes from the rows, as far as it can be compared."""

    loss: float
    gradients: dict[str, Tensor] = field(repr=False)
    answer: list[int]
    score: list[int]


def results_of(job: Job, folder: Path) -> Results:
    path = folder / f"{job.arm}.{job.dtype}.safetensors"
    with Process(job) as process:
        answer = process.ask(save=str(path))
    return Results(gradients=load_file(path), **answer)


def distances(mine: Results, theirs: Results) -> dict[str, float]:
    """Returns how far two results are apart: relative errors, and shares of other predictions."""
    names = sorted(theirs.gradients)
    my_gradient = torch.cat([mine.gradients[name].flatten() for name in names])
    their_gradient = torch.cat([theirs.gradients[name].flatten() for name in names])
    return {
        "loss": abs(mine.loss / theirs.loss - 1),
        "gradient": ((my_gradient - their_gradient).norm() / their_gradient.norm()).item(),
        "answer": share_of_others(mine.answer, theirs.answer),
        "score": share_of_others(mine.score, theirs.score),
    }


def share_of_others(mine: list[int], theirs: list[int]) -> float:
    return sum(a != b for a, b in zip(mine, theirs, strict=True)) / len(theirs)


def check_fp32(mine: Results, theirs: Results) -> list[str]:
    """Returns what differs by more than the rounding of fp32."""
    bounds = {"loss": 1e-5, "gradient": 1e-4, "answer": 0.0, "score": 0.0}
    apart = distances(mine, theirs)
    return [
        f"fp32, {name}: off by {apart[name]:.1e}"
        for name, bound in bounds.items()
        if not apart[name] <= bound  # so that NaN fails
    ]


def check_bf16(mine: Results, theirs: Results, exact: Results) -> list[str]:
    """Returns in what ours is further from `exact`, the reference in fp32, than the reference is.

    bf16 has 8 bits, which are rounded at different places in each. A factor of 2 is allowed,
    because the distance of either varies that much from one adapter to the next.
    """
    my_distance = distances(mine, exact)
    their_distance = distances(theirs, exact)
    # Two answers of a row may be nearly even, so a hundredth of the rows may differ.
    slack = {"gradient": 0.0, "answer": 0.01, "score": 0.01}
    return [
        f"bf16, {name}: {my_distance[name]:.1e} from fp32, "
        f"the reference {their_distance[name]:.1e}"
        for name, more in slack.items()
        if not my_distance[name] <= 2 * their_distance[name] + more
    ]


def compare(job: Job, folder: Path) -> None:
    """Raises ValueError unless ours and the reference compute the same."""
    exact_job = replace(job, dtype="fp32")
    mine = results_of(replace(exact_job, arm="ours"), folder)
    exact = results_of(replace(exact_job, arm="reference"), folder)
    problems = check_fp32(mine, exact)
    apart = f"in fp32 the gradients are {distances(mine, exact)['gradient']:.1e} apart"
    if job.dtype == "bf16":
        mine = results_of(replace(job, arm="ours"), folder)
        theirs = results_of(replace(job, arm="reference"), folder)
        problems += check_bf16(mine, theirs, exact)
        apart += (
            f"; in bf16 ours is {distances(mine, exact)['gradient']:.1%} from the reference "
            f"in fp32, the reference {distances(theirs, exact)['gradient']:.1%}"
        )
    if problems:
        raise ValueError("no figures, the contenders do not agree: " + "; ".join(problems))
    print(f"loss, gradients and answers agree ({apart})", flush=True)


# -----------------------------------------------------------------------------
# The measurement


def measure(job: Job, rows: Rows, rounds: int) -> dict:
    """Returns {task: {arm: [rows a second in each round]}}, and the peaks of memory."""
    tasks = list(TASKS)
    if len(rows.training) < 128:
        tasks.remove("train128")
    turns = [(task, arm) for task in tasks for arm in ARMS]
    rates = {task: {arm: [] for arm in ARMS} for task in tasks}
    with ExitStack() as stack:
        adapted = {}
        base = {}
        for arm in ARMS:
            adapted[arm] = stack.enter_context(Process(replace(job, arm=arm)))
            base[arm] = stack.enter_context(Process(replace(job, arm=arm, adapter=None)))
        for _ in tqdm(range(rounds + 1), desc="rounds", disable=None):
            for task, arm in turns:
                process = adapted[arm] if TASKS[task].has_adapter else base[arm]
                seconds = process.ask(task=task)["seconds"]
                rates[task][arm].append(rows_of(task, arm, len(rows.evaluation)) / seconds)
    without_warm_up = {
        task: {arm: rounds_of[1:] for arm, rounds_of in rates[task].items()} for task in rates
    }
    return {"rates": without_warm_up, "training_peak_mib": measure_memory(job)}


def measure_memory(job: Job) -> dict[str, float]:
    """Returns the peak of training above the libraries, in MiB, of processes that do only that."""
    peaks = {}
    for arm in ("ours", "reference"):
        with Process(replace(job, arm=arm, keep=False)) as process:
            process.ask(task="train16")
            peak = process.ask(task="train16")["peak"]
            peaks[arm] = (peak - process.imported) / 2**20
    return peaks


def show(results: dict) -> None:
    heading = "examples a second (loading: loads a second)"
    print(f"\n{heading:46} {'ours':>9} {'reference':>9} {'ratio':>7} {'notebooks':>9} {'ratio':>7}")
    for task, rates in results["rates"].items():
        ours, reference, notebooks = (median(rates[arm]) for arm in ARMS)
        print(
            f"{TASKS[task].title:46} {ours:9.2f} "
            f"{reference:9.2f} {ratio(rates, 'reference'):6.2f}x "
            f"{notebooks:9.2f} {ratio(rates, 'notebooks'):6.2f}x"
        )
    ours, reference = results["training_peak_mib"].values()
    title = "peak memory in training above imports, MiB"
    print(f"{title:46} {ours:9.2f} {reference:9.2f} {ours / reference:6.2f}x")


def ratio(rates: dict[str, list[float]], arm: str) -> float:
    """Returns the median over the rounds of how much faster ours is."""
    return median(mine / theirs for mine, theirs in zip(rates["ours"], rates[arm]))


# -----------------------------------------------------------------------------
# Files for all contenders


def draw_rows(
    pairs, tokenizer: Tokenizer, count: int, seed: int, of_a_premise: int = 1
) -> list[dict]:
    """Returns `count` rows with the lengths of MNLI's, made of short pairs.

    A row is one of `pairs` and its label. Premises of others are put before its own until it has as
    many tokens as were drawn for it. `of_a_premise` rows behind one another have the same premise,
    which ends with the premises of them all.
    """
    rng = random.Random(seed)
    prefix, _, _ = data.fixed_ids(tokenizer)
    premises = pairs["premise"][:]
    added = median(len(tokenizer.encode(" " + premise).ids) for premise in premises[:100])
    rows = []
    while len(rows) < count:
        group = [dict(pairs[rng.randrange(len(pairs))]) for _ in range(of_a_premise)]
        premise = " ".join(row["premise"] for row in group)
        wanted = rng.lognormvariate(math.log(MEDIAN_TOKENS), SPREAD)

        def length_with(premise: str, row: dict = group[0]) -> int:
            return len(data.encode(row | {"premise": premise}, tokenizer)[0]) - len(prefix)

        # Nearer to what is wanted with one premise more: then it is added.
        while length_with(premise) + added / 2 < wanted:
            premise = f"{rng.choice(premises)} {premise}"
        rows += [row | {"premise": premise} for row in group]
    return rows[:count]


def write_dataset(directory: Path, tokenizer: Tokenizer) -> None:
    """Writes drawn rows as a dataset: train.jsonl and validation.jsonl.

    MNLI has three hypotheses to a premise. Those of tiny/data are shorter, and two to a premise
    share as many tokens. In training the rows are shuffled, and those of a step share none.
    """
    directory.mkdir()
    source = str(ROOT / "tiny" / "data")
    pairs = examples.load_examples(source, "train")
    files.write_lines(directory / "train.jsonl", draw_rows(pairs, tokenizer, 4000, seed=0))
    pairs = examples.load_examples(source, "validation_matched")
    rows = draw_rows(pairs, tokenizer, 1000, seed=1, of_a_premise=2)
    files.write_lines(directory / "validation.jsonl", rows)


def draw_dataset(args: argparse.Namespace, folder: Path, tokenizer: Tokenizer) -> None:
    """Draws the rows where the arguments name no dataset."""
    if args.draws_rows:
        args.dataset = str(folder / "data")
        write_dataset(folder / "data", tokenizer)


def read_rows(dataset: str, tokenizer: Tokenizer, count: int) -> Rows:
    """Returns `count` rows of the training and of the first validation split.

    Of validation those of the first premises. A whole split has the rows of a premise in different
    places, and eval.py brings them together.
    """
    validation, *_ = examples.validation_splits(dataset)
    training = examples.load_examples(dataset, "train", count)
    pairs = examples.load_examples(dataset, validation)
    premises = pairs["premise"][:]
    first_row = {}
    for number, premise in enumerate(premises):
        first_row.setdefault(premise, number)
    numbers = sorted(range(len(premises)), key=lambda number: first_row[premises[number]])
    chosen = pairs.select(numbers[:count])
    encoded = [data.encode(pair, tokenizer) for pair in chosen]
    return Rows(
        [data.encode(row, tokenizer) for row in training],
        encoded,
        data.by_premise(chosen, [prompt for prompt, _ in encoded]),
    )


def write_random_phi_2(directory: Path, layers: int) -> None:
    """Writes a model of phi-2's widths with random fp16 weights, as transformers makes them."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    config = PhiConfig(**asdict(phi2.Phi2Config(num_hidden_layers=layers, resid_pdrop=0.0)))
    # On the CPU even where there is a GPU: this process stays, and would hold its memory.
    PhiForCausalLM(config).half().save_pretrained(directory, max_shard_size="1GB")


def write_random_adapter(model: str, directory: Path) -> None:
    config = lora.LoRAConfig(dropout=0.0)
    skeleton = phi2.build(model)
    lora.inject(skeleton, config)
    for module in skeleton.modules():
        if isinstance(module, lora.LoRALinear):
            for matrix in (module.lora_A, module.lora_B):
                matrix.weight = torch.nn.Parameter(torch.randn(matrix.weight.shape) * 0.02)
    lora.save_adapter(skeleton, config, directory, model)


def train_adapter(args: argparse.Namespace, directory: Path) -> None:
    print(f"training an adapter that ends its answers: {ADAPTER_STEPS} steps", flush=True)
    arguments = {
        "model": args.model,
        "dataset": args.dataset,
        "steps": ADAPTER_STEPS,
        "batch-size": 32,
        "learning-rate": args.learning_rate,
        "eval-limit": 1,
        "device": args.device,
        "out": directory,
    }
    typed = [f"--{name}={value}" for name, value in arguments.items()]
    command = [sys.executable, ROOT / "train.py", *typed]
    run = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if run.returncode:
        raise ValueError("the adapter could not be trained; the error stands above")


def prepare(args: argparse.Namespace, folder: Path) -> tuple[Job, Rows]:
    """Writes what the arguments do not name: model, dataset, adapter. Writes the rows."""
    new_tokens = 32
    if args.random_phi_2:
        print(f"writing a random phi-2 of {args.random_phi_2} layers", flush=True)
        args.model = str(folder / "model")
        write_random_phi_2(folder / "model", args.random_phi_2)
        args.tokenizer = args.tokenizer or ROOT / "tiny" / "model"
        args.adapter = folder / "adapter"
        write_random_adapter(args.model, args.adapter)
        # Random weights never end an answer: two tokens stand for one that does.
        new_tokens = 2
    directory = checkpoints.find(args.model, phi2.read_config, revision=args.model_revision)
    args.model = str(directory.resolve())
    tokenizer_folder = args.tokenizer or Path(args.model)
    tokenizer = data.load_tokenizer(tokenizer_folder)
    draw_dataset(args, folder, tokenizer)
    if args.adapter is None:
        args.adapter = folder / "adapter"
        train_adapter(args, args.adapter)

    rows = read_rows(args.dataset, tokenizer, args.rows)
    files.write_json(folder / "rows.json", asdict(rows))
    job = Job(
        model=args.model,
        tokenizer=str(tokenizer_folder.resolve()),
        rows=str(folder / "rows.json"),
        adapter=str(args.adapter.resolve()),
        dtype=args.dtype,
        device=args.device,
        new_tokens=new_tokens,
        keep=args.keep,
    )
    return job, rows


# -----------------------------------------------------------------------------
# The script


def parse_arguments() -> argparse.Namespace:
    """Returns the arguments. `draws_rows` says that no dataset was named."""
    parser = cli.Parser("speed and memory beside the reference, once the results agree")
    flags.add_model(parser)
    parser.add_argument(
        "--dataset",
        type=flags.name,
        help="Hub id or directory (default: rows of MNLI's lengths, from tiny/data)",
    )
    parser.add_argument(
        "--random-phi-2",
        type=flags.count,
        nargs="?",
        const=32,
        metavar="LAYERS",
        help="random weights of phi-2's size (default: 32 layers)",
    )
    parser.add_argument(
        "--tokenizer",
        type=flags.path,
        help="directory of a tokenizer.json for --random-phi-2 (default: tiny/model)",
    )
    parser.add_argument(
        "--adapter",
        type=flags.name,
        help="a run of train.py (default: one is trained, 150 steps)",
    )
    parser.add_argument(
        "--rows",
        type=flags.count,
        default=256,
        help="of training and of evaluation; with less than 128 no steps of 128 (default: 256)",
    )
    parser.add_argument("--rounds", type=flags.count, default=5, help="default: 5")
    parser.add_argument(
        "--dtype",
        choices=list(evaluation.DTYPES),
        default=machine.fast_dtype(),
        help="default: bf16; on a CPU without instructions for it, fp32",
    )
    parser.add_argument(
        "--device",
        type=flags.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    parser.add_argument(
        "--keep-dequantized",
        dest="keep",  # another name, so that a run's own --keep-dequantized is no default here
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ours keeps NF4's values beside the indices, but for the row on memory (default: on)",
    )
    parser.add_argument(
        "--learning-rate",
        type=flags.number_above_0,
        default=2e-4,
        help="of the adapter that is trained here (default: 2e-4)",
    )
    parser.add_argument("--json", type=flags.path, help="write every figure here")
    args = cli.parse_arguments(parser)
    args.draws_rows = "dataset" not in parser.typed()
    return args


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(Job(**json.loads(sys.argv[2])))
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job, rows = prepare(args, folder)
        compare(job, folder)
        results = measure(job, rows, args.rounds)
    show(results)
    if args.json:
        device = machine.device_name(torch.device(args.device))
        files.write_json(args.json, {"device": device} | results)


if __name__ == "__main__":
    cli.run(main)
