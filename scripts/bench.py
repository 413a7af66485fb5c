"""This project beside transformers + PEFT + bitsandbytes, and beside the notebooks' way of using them, in one run.

    python bench.py                                          # tiny/ on a CPU, phi-2 and MNLI on a GPU
    python bench.py --random-phi-2 --dataset ~/mnli --tokenizer ~/phi-2 --json bench.json    # full size, no download
    python bench.py --random-phi-2 1 --rows 32 --rounds 1   # the same with one layer, for a small machine

Same files, same adapter, same rows, same loss. Each contender is a process of its own, and they take turns: A B C A B C.
The reference is used well: bf16, SDPA, batches padded to their longest row, left padding and a stop at the end of text in
generation, the last position's logits alone in scoring. First the results are compared; when they differ, no number is
printed. Figures are medians over the rounds; the ratio is the median of the rounds' ratios.
"""
import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from statistics import median

import torch

import checkpoint
import data
import eval as evaluation
import lora
import phi2
import ranks
import train

# task: (what the table calls it, whether the adapter is on)
TASKS = {"train16": ("training, 16 examples a step", True), "train128": ("training, 128 examples a step", True),
         "answer": ("generation, an adapter that ends its answers", True), "score": ("scoring", True),
         "ramble": ("generation, a base that writes 32 tokens", False), "load": ("loading and quantising", True)}
ARMS = ("ours", "reference", "notebooks")
PROMPTS, ALONE = 64, 4  # rows in a batch of generation and scoring; rows of a task in the notebooks' way, one at a time
STEPS = 4  # in a row make one timing of 16 examples a step


# ---- Contenders. Each loads its model and returns {task: function that does the work once and returns its result}

def ours(job: dict, rows: list) -> dict:
    model = evaluation.load_model(job["model"], "nf4", evaluation.DTYPES[job["dtype"]], job["device"], keep=job["keep"]).eval()
    tokenizer = data.load_tokenizer(job["tokenizer"])
    prefix = data.fixed_ids(tokenizer)[0]
    if job["adapter"]:
        lora.load_adapter(model, job["adapter"])
    parameters = lora.lora_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.0, fused=True) if parameters else None

    def step(size: int, update: bool = True):
        loss, _ = train.batch_loss(model, rows[:size], len(prefix), "answer")
        (loss / (2 * size)).backward()
        return finish_step(loss / (2 * size), parameters, optimizer, update)

    def prompts(answer, limit: int = 0):
        found = []
        with torch.inference_mode():
            cache, order = model.prefill(prefix), sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
            for start in range(0, len(order), PROMPTS):
                found += answer(model, tokenizer, [rows[i][0][len(prefix):] for i in order[start:start + PROMPTS]], cache, limit)
        return [row["prediction"] for _, row in sorted(zip(order, found), key=lambda pair: pair[0])]
    return tasks(step, *(partial(prompts, *work) for work in (
        (evaluation.score,), (evaluation.complete, job["new_tokens"]), (evaluation.complete, 32))))


def tasks(step, score, answer, ramble, alone: bool = False) -> dict:
    return {"gradients": lambda: step(16, update=False),
            "train16": lambda: [step(ALONE if alone else 16) for _ in range(1 if alone else STEPS)],
            "train128": lambda: step(ALONE if alone else 128), "score": score, "answer": answer, "ramble": ramble}


def pad(sequences: list[list[int]], filler: int, device: str, side: str) -> dict:
    """ids and attention mask (B, longest)."""
    ids, mask = (torch.nn.utils.rnn.pad_sequence([make(row) for row in map(torch.tensor, sequences)], True, filling, side).to(device)
                 for make, filling in ((torch.clone, filler), (torch.ones_like, 0)))
    return {"input_ids": ids, "attention_mask": mask}


def reference(job: dict, rows: list, alone: bool = False) -> dict:
    """transformers + PEFT; `alone` is the notebooks' way: one row at a time, every logit, loss on every token."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging
    logging.disable_progress_bar()
    dtype, device = evaluation.DTYPES[job["dtype"]], job["device"]
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, quantization_config=four_bit, attn_implementation="sdpa",
                                                 device_map={"": device})
    if job["adapter"]:
        model = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
    model.train()  # on some CPUs bitsandbytes repacks its weights in eval mode; without dropout there is no other difference
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokenizer = data.load_tokenizer(job["tokenizer"])
    _, answers, eos = data.fixed_ids(tokenizer)
    beyond = list(range(tokenizer.get_vocab_size(), model.config.vocab_size))
    parameters = {name.removeprefix(lora.PREFIX).replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.0, fused=True) if parameters else None

    def step(size: int, update: bool = True):
        total = 0.0
        for batch in ([row] for row in rows[:size]) if alone else [rows[:size]]:
            inputs = pad([prompt + answer for prompt, answer in batch], eos, device, "right")
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            for i, (prompt, _) in enumerate(batch):
                labels[i, :0 if alone else len(prompt)] = -100
            loss = model(**inputs, labels=labels, use_cache=False).loss * len(batch) / size
            loss.backward()
            total += loss.detach()
        return finish_step(total, parameters, optimizer, update)

    def prompts(answer):
        found, size = [], 1 if alone else PROMPTS
        order = sorted(range(len(rows[:ALONE] if alone else rows)), key=lambda i: -len(rows[i][0]))
        with torch.inference_mode():
            for start in range(0, len(order), size):
                found += answer(pad([rows[i][0] for i in order[start:start + size]], eos, device, "left"))
        return [prediction for _, prediction in sorted(zip(order, found))]

    def write(limit: int):
        def answer(inputs):
            written = model.generate(**inputs, max_new_tokens=limit, do_sample=False, eos_token_id=eos, pad_token_id=eos,
                                     suppress_tokens=beyond or None)[:, inputs["input_ids"].shape[1]:].tolist()
            return [data.parse(tokenizer.decode(ids, skip_special_tokens=True)) for ids in written]
        return answer

    def score(inputs):
        logits = model(**inputs, logits_to_keep=0 if alone else 1, use_cache=False).logits
        return logits[:, -1, answers].argmax(dim=-1).tolist()
    return tasks(step, *(partial(prompts, work) for work in (score, write(32 if alone else job["new_tokens"]), write(32))), alone)


def finish_step(loss, parameters: dict, optimizer, update: bool):
    """Clipping and AdamW at a learning rate of 0, which costs the same; or the loss and gradients, to be compared."""
    if not update:
        gradients = {name: parameter.grad.cpu() for name, parameter in parameters.items()}
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), gradients
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ---- Processes

def memory(job: dict) -> tuple[int, int]:
    """(peak, now) in bytes: allocated on the GPU, or resident on a CPU."""
    if job["device"] == "cuda":
        return torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text()
    return tuple(int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) * 1024 for key in ("VmHWM", "VmRSS"))


def worker(job: dict) -> None:
    """Loads one contender, then does the tasks named on standard input, one answer a line."""
    rows = json.loads(Path(job["rows"]).read_text())
    build = {"ours": ours, "reference": reference, "notebooks": partial(reference, alone=True)}[job["arm"]]
    for library in ["bitsandbytes"] + ["peft", "transformers.models.phi.modeling_phi"] * (job["arm"] != "ours"):
        importlib.import_module(library)
    imported = memory(job)[1]
    known = build(job, rows) | {"load": lambda: build(job | {"keep": False}, rows) and None}  # as the reference does
    print(json.dumps(imported), flush=True)
    for line in sys.stdin:
        name, save = json.loads(line)
        if save:
            from safetensors.torch import save_file
            loss, gradients = known["gradients"]()
            save_file(gradients, save)
            answer = {"loss": loss, "answer": known["answer"](), "score": known["score"]()}
        else:
            begin = time.perf_counter()
            known[name]()
            torch.cuda.synchronize() if job["device"] == "cuda" else None
            answer = {"seconds": time.perf_counter() - begin, "memory": memory(job)}
        print(json.dumps(answer), flush=True)


class Contender(AbstractContextManager):
    """A worker process; `imported` is its memory with its libraries alone."""

    def __init__(self, job: dict):
        command = [sys.executable, __file__, "--worker", json.dumps(job)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.imported = self.read()

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"a contender ended with status {self.process.wait()}; its error stands above")
        return json.loads(line)

    def do(self, name: str, save: str = "") -> dict:
        self.process.stdin.write(json.dumps([name, save]) + "\n")
        self.process.stdin.flush()
        return self.read()

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(job: dict, folder: Path) -> None:
    """Raises ValueError unless ours and the reference do the same: in fp32 to its rounding; in bf16, whose 8 bits of mantissa
    round at different places in each, ours must lie as near to fp32 as the reference, within a factor of 2: the distance of
    either varies that much from one adapter to the next."""
    from safetensors.torch import load_file
    results = {}
    for dtype in dict.fromkeys(("fp32", job["dtype"])):
        for arm in ARMS[:2]:
            file = folder / f"{arm}.{dtype}"
            with Contender(job | {"arm": arm, "dtype": dtype}) as contender:
                results[arm, dtype] = contender.do("check", str(file)) | {"gradients": load_file(file)}

    def errors(a: tuple, b: tuple) -> dict[str, float]:
        a, b = results[a], results[b]
        mine, theirs = (torch.cat([x["gradients"][key].flatten() for key in sorted(b["gradients"])]) for x in (a, b))
        wrong = {name: sum(x != y for x, y in zip(a[name], b[name])) / len(b[name]) for name in ("answer", "score")}
        return {"loss": abs(a["loss"] / b["loss"] - 1), "gradient": ((mine - theirs).norm() / theirs.norm()).item()} | wrong
    bounds = {"loss": 1e-5, "gradient": 1e-4, "answer": 0.0, "score": 0.0}
    found = errors(("ours", "fp32"), ("reference", "fp32"))
    problems = [f"fp32, {name}: off by {found[name]:.1e}" for name in bounds if found[name] > bounds[name]]
    if job["dtype"] == "bf16":
        mine, theirs = (errors((arm, "bf16"), ("reference", "fp32")) for arm in ARMS[:2])
        problems += [f"bf16, {name}: {mine[name]:.1e} from fp32, the reference {theirs[name]:.1e}"
                     for name in ("gradient", "answer", "score") if mine[name] > 2 * theirs[name] + (name != "gradient") * 0.01]
    if problems:
        raise ValueError("no figures, the contenders do not agree: " + "; ".join(problems))
    print(f"loss, gradients and answers agree (in fp32 the gradients are {found['gradient']:.1e} apart)", flush=True)


# ---- The run

def write_random_phi_2(directory: Path, layers: int, device: str) -> None:
    """A model directory of phi-2's widths with random fp16 weights, as transformers initialises and saves them."""
    from transformers import PhiConfig, PhiForCausalLM
    torch.manual_seed(0)
    config = PhiConfig(**vars(phi2.Phi2Config(num_hidden_layers=layers, resid_pdrop=0.0)))
    with torch.device(device):
        PhiForCausalLM(config).half().save_pretrained(directory, max_shard_size="1GB")


def write_random_adapter(model: str, path: Path) -> None:
    config = lora.LoRAConfig(dropout=0.0)
    skeleton = phi2.build(model)
    lora.inject(skeleton, config)
    for module in skeleton.modules():
        if isinstance(module, lora.LoRALinear):
            for part in (module.lora_A, module.lora_B):
                part.weight = torch.nn.Parameter(torch.randn(part.weight.shape) * 0.02)
    lora.save_adapter(skeleton, config, path, model)


def prepare(args, folder: Path) -> tuple[dict, int]:
    """The model, adapter and rows of all contenders, as files; and the number of rows."""
    tokenizer_at, new_tokens = args.tokenizer, 32
    if args.random_phi_2:
        (folder / "model").mkdir()
        print(f"writing a random phi-2 of {args.random_phi_2} layers", flush=True)
        write_random_phi_2(folder / "model", args.random_phi_2, args.device)
        args.model, tokenizer_at = str(folder / "model"), tokenizer_at or Path(__file__).with_name("tiny") / "model"
        args.adapter, new_tokens = folder / "adapter", 2  # random weights never end an answer: two tokens stand for one that does
        write_random_adapter(args.model, args.adapter)
    args.model = str(checkpoint.locate(args.model))
    if args.adapter is None:
        print("training an adapter that ends its answers: 150 steps", flush=True)
        args.adapter = folder / "adapter"
        flags = {"model": args.model, "dataset": args.dataset, "steps": 150, "batch-size": 32, "learning-rate": args.learning_rate,
                 "eval-limit": 1, "out": args.adapter, "device": args.device}
        command = [sys.executable, Path(__file__).with_name("train.py"), *(f"--{name}={value}" for name, value in flags.items())]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    tokenizer = data.load_tokenizer(tokenizer_at or args.model)
    examples = data.load_examples(args.dataset, data.validation_splits(args.dataset)[0], args.rows)
    rows = [data.encode(example, tokenizer) for example in examples]
    (folder / "rows.json").write_text(json.dumps(rows))
    return {"model": args.model, "tokenizer": str(tokenizer_at or args.model), "adapter": str(args.adapter), "dtype": args.dtype,
            "device": args.device, "new_tokens": new_tokens, "keep": args.keep_dequantized, "rows": str(folder / "rows.json")}, len(rows)


def measure(job: dict, rows: int, folder: Path, rounds: int) -> dict:
    """{task: {arm: [examples a second, one for each round]}}, and the peaks of memory, once the results agree."""
    from tqdm import tqdm
    compare(job, folder)
    adapted = {arm: Contender(job | {"arm": arm}) for arm in ARMS}
    base = {arm: Contender(job | {"arm": arm, "adapter": None}) for arm in ARMS}
    rates = {task: {arm: [] for arm in ARMS} for task in TASKS if task != "train128" or rows >= 128}
    for number in tqdm(range(rounds + 1), desc="rounds", disable=None):
        for task in rates:
            for arm in ARMS:
                seconds = (adapted if TASKS[task][1] else base)[arm].do(task)["seconds"]
                count = ALONE if arm == "notebooks" else {"train16": 16 * STEPS, "train128": 128}.get(task, rows)
                if number:  # the first round warms up
                    rates[task][arm].append((1 if task == "load" else count) / seconds)
    for contender in [*adapted.values(), *base.values()]:
        contender.__exit__()
    peaks = {}
    for arm in ARMS[:2]:
        with Contender(job | {"arm": arm, "keep": False}) as fresh:
            peaks[arm] = ([fresh.do("train16")["memory"][0] for _ in range(2)][-1] - fresh.imported) / 2**20
    return {"rates": rates, "training_peak_mib": peaks}


def show(results: dict) -> None:
    print(f"\n{'examples a second (loading: loads a second)':46} {'ours':>9} {'reference':>9} {'ratio':>7} {'notebooks':>9} {'ratio':>7}")
    for task, rates in results["rates"].items():
        ratios = [median(a / b for a, b in zip(rates["ours"], rates[arm])) for arm in ARMS[1:]]
        middle = [median(rates[arm]) for arm in ARMS]
        print(f"{TASKS[task][0]:46} {middle[0]:9.2f} {middle[1]:9.2f} {ratios[0]:6.2f}x {middle[2]:9.2f} {ratios[1]:6.2f}x")
    mine, theirs = results["training_peak_mib"].values()
    print(f"{'peak memory in training above imports, MiB':46} {mine:9.2f} {theirs:9.2f} {mine / theirs:6.2f}x")


def main() -> None:
    parser = data.Parser("speed and memory beside the reference, once the results agree")
    parser.add_argument("--model", help="Hub id or directory (default: microsoft/phi-2, no GPU: tiny/model)")
    parser.add_argument("--dataset", help="Hub id or directory (default: nyu-mll/glue, no GPU: tiny/data)")
    parser.add_argument("--random-phi-2", type=int, nargs="?", const=32, metavar="LAYERS",
                        help="random weights of phi-2's size (default: 32 layers)")
    parser.add_argument("--tokenizer", type=Path, help="directory of a tokenizer.json for --random-phi-2 (default: tiny/model)")
    parser.add_argument("--adapter", type=Path, help="a run of train.py (default: one is trained, 150 steps)")
    parser.add_argument("--rows", type=int, default=256, help="validation rows; with less than 128 no steps of 128 (default: 256)")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--dtype", choices=evaluation.DTYPES, default=ranks.fast_dtype(), help="default: bf16, or fp32 as in train.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep-dequantized", action=argparse.BooleanOptionalAction, default=True,
                        help="ours keeps NF4's values beside the codes, but for the row on memory (default: it does)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="of the adapter that is trained here (default: 2e-4)")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if "--worker" in sys.argv:
        return worker(json.loads(parser.parse_args().worker))
    args = data.parse_arguments(parser)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(*prepare(args, Path(folder)), Path(folder), args.rounds)
    show(results)
    if args.json:
        args.json.write_text(json.dumps({"device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu"} | results, indent=2))


if __name__ == "__main__":
    data.run(main)
