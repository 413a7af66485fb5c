"""One contender of scripts/bench.py: a process that does tasks on request, and times them.

scripts/bench.py starts it, sends it a line of JSON for each task, and reads a line in return. Each
contender runs rows of similar length together, and its output head only on the positions of the
answers (litgpt cannot do this, and runs its head on all positions, in chunks). Its other choices
are its `ways`, of which scripts/bench.py takes the fastest.

"ours" is the six files that come first on Python's path: those of this project, or those of another
checkout. support/ comes from the same place, so of it only support.machine is imported here.
"""

import copy
import importlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import data
import eval as evaluation
import lora
import quant
import train
from support import machine

STEPS = 4  # training steps of 16 rows in one timing


@dataclass(frozen=True)
class Job:
    """What a contender is given when it starts."""

    model: str  # a directory, like the next two
    tokenizer: str
    adapter: str | None
    quant: str
    dtype: str
    device: str
    keep: bool | None = True  # whether ours keeps NF4's values beside the indices
    rows: str = ""  # a file: {"training": [[prompt ids, answer ids], ...], "evaluation": [...]}


# -----------------------------------------------------------------------------
# What all contenders have in common


class Contender:
    """A model and the work that is timed. A subclass defines how it loads and runs a batch.

    parameters: those of the adapter, by our names.
    rows_at_once: how many rows go through the model together, or None for all rows of a step.
    """

    libraries = ()

    def __init__(self, job: Job, rows: dict[str, list]):
        self.job = job
        self.rows = rows
        self.prompts = [prompt for prompt, _ in rows["evaluation"]]
        self.dtype = evaluation.DTYPES[job.dtype]
        self.tokenizer = data.load_tokenizer(job.tokenizer)
        self.prefix, self.label_ids, self.eos = data.fixed_ids(self.tokenizer)
        self.rows_at_once = None
        self.load()
        if self.parameters:
            # A learning rate of 0 takes the same time, and the adapter does not change.
            self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.0, fused=True)

    def ways(self, task: str) -> list[dict]:
        """Returns the ways to do a task, as arguments of `use`; none if it cannot do the task."""
        return [{}]

    def use(self, rows_at_once: int | None = None) -> None:
        self.rows_at_once = rows_at_once

    def train(self, batch_size: int, steps: int) -> int:
        """Takes training steps. Returns the number of their rows."""
        rows = self.rows["training"][: batch_size * steps]
        for batch in batches(rows, batch_size):
            self.backward(batch)
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return len(rows)

    def backward(self, rows: list) -> Tensor:
        """Computes the gradients of the mean loss over the rows' targets. Returns this loss."""
        loss = torch.zeros((), device=self.job.device)
        rows = sorted(rows, key=lambda row: len(row[0]))
        for batch in batches(rows, self.rows_at_once or len(rows)):
            # Each row has two targets, so this weighted mean of means is the mean over all targets.
            part = self.loss(batch) * (len(batch) / len(rows))
            part.backward()
            loss += part.detach()
        return loss

    def gradients(self) -> dict[str, Tensor]:
        return {name: parameter.grad for name, parameter in self.parameters.items()}

    def score(self, prompts: list) -> list[list[float]]:
        """Returns the probabilities of the three answers for each prompt."""
        return self.in_batches(prompts, self.score_batch)

    def write(self, prompts: list, count: int) -> list[list[int]]:
        """Returns `count` new ids for each prompt. An end of text is an id like any other."""
        written = self.in_batches(prompts, lambda batch: self.write_batch(batch, count))
        assert all(len(ids) == count for ids in written)
        return written

    def in_batches(self, prompts: list, run: Callable[[list], list]) -> list:
        """Returns the results of `run` in the order of the prompts. The longest run first."""
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        results = {}
        for numbers in batches(order, self.rows_at_once):
            results |= zip(numbers, run([prompts[number] for number in numbers]))
        return [results[number] for number in range(len(prompts))]


def batches(rows: list, size: int) -> list[list]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def pad(sequences: list[list[int]], filler: int, side: str = "right") -> Tensor:
    """Returns B sequences as one tensor (B, longest)."""
    tensors = [torch.tensor(sequence) for sequence in sequences]
    return pad_sequence(tensors, batch_first=True, padding_value=filler, padding_side=side)


# -----------------------------------------------------------------------------
# The contenders


class Ours(Contender):
    """This project: all rows of a step at once, and 64 rows in evaluation."""

    def load(self) -> None:
        self.model = self.load_base()
        if self.job.adapter:
            lora.load_adapter(self.model, Path(self.job.adapter))
        self.model.eval()  # without dropout, like the others
        self.parameters = lora.lora_parameters(self.model)

    def load_base(self) -> torch.nn.Module:
        job = self.job
        return evaluation.load_model(
            Path(job.model), job.quant, job.dtype, job.device, keep=job.keep
        )

    def loss(self, rows: list) -> Tensor:
        batch = data.collate(rows, len(self.prefix), "answer")
        return train.batch_loss(self.model, batch) / len(batch.next_ids)

    def in_batches(self, prompts: list, run: Callable[[list], list]) -> list:
        # They come in the order of eval.py, with the rows of a premise together.
        return list(itertools.chain.from_iterable(map(run, batches(prompts, 64))))

    def score_batch(self, prompts: list) -> list[list[float]]:
        answers = evaluation.score(self.model, self.tokenizer, prompts)
        return [answer["scores"] for answer in answers]

    def write_batch(self, prompts: list, count: int) -> list[list[int]]:
        completions, _ = evaluation.generate(
            self.model,
            prompts,
            self.prefix,
            count,
            self.model.config.vocab_size,
            is_finished=lambda ids: False,
        )
        return completions


class Reference(Contender):
    """transformers + PEFT + bitsandbytes.

    Rows are padded at their end, where no earlier token sees the padding. So no mask is needed, and
    torch takes its fastest attention. Only generation needs rows that end together.
    """

    libraries = ("peft", "transformers.models.phi.modeling_phi")

    def load(self) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        job = self.job
        options = {}
        if job.quant == "nf4":
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=self.dtype
            )
        self.base = AutoModelForCausalLM.from_pretrained(
            job.model, dtype=self.dtype, device_map={"": job.device}, **options
        )
        self.base.generation_config.eos_token_id = None  # so that no row ends early
        self.model = self.base
        if job.adapter:
            self.model = PeftModel.from_pretrained(self.base, job.adapter, is_trainable=True)
        # On some CPUs bitsandbytes repacks its weights in eval mode. Without dropout the modes do
        # not differ otherwise.
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        self.parameters = {
            name.removeprefix(lora.PEFT_PREFIX).replace(".default", ""): parameter
            for name, parameter in self.model.named_parameters()
            if "lora_" in name
        }

    def ways(self, task: str) -> list[dict]:
        if task == "load":
            return [{}]
        sizes = {"train16": [16], "train128": [16, 32]}.get(task, [16, 32, 64])
        return [
            {"rows_at_once": size, "attention": attention}
            for size, attention in itertools.product(sizes, ("sdpa", "eager"))
        ]

    def use(self, rows_at_once: int | None = None, attention: str = "sdpa") -> None:
        super().use(rows_at_once)
        self.base.set_attn_implementation(attention)

    def logits(self, sequences: list[list[int]], last: int) -> Tensor:
        """Returns the logits of each sequence's last tokens, (B, last, vocabulary)."""
        ids = pad(sequences, self.eos).to(self.job.device)
        hidden = self.base.model(ids, use_cache=False).last_hidden_state
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=ids.device)
        columns = lengths[:, None] + torch.arange(-last, 0, device=ids.device)
        return self.base.lm_head(hidden.take_along_dim(columns[:, :, None], dim=1))

    def loss(self, rows: list) -> Tensor:
        logits = self.logits([prompt + answer[:-1] for prompt, answer in rows], last=2)
        targets = torch.tensor([answer for _, answer in rows], device=logits.device)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.inference_mode()
    def score_batch(self, prompts: list) -> list[list[float]]:
        logits = self.logits(prompts, last=1)[:, 0, self.label_ids]
        return logits.float().softmax(dim=-1).tolist()

    @torch.inference_mode()
    def write_batch(self, prompts: list, count: int) -> list[list[int]]:
        ids = pad(prompts, self.eos, "left")
        mask = pad([[1] * len(prompt) for prompt in prompts], 0, "left")
        ids = self.model.generate(
            input_ids=ids.to(self.job.device),
            attention_mask=mask.to(self.job.device),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=self.eos,
        )
        return ids[:, -count:].tolist()


class LitGPT(Contender):
    """litgpt, if it is installed. It has no scoring, and on a CPU no 4 bits."""

    libraries = ("litgpt.lora", "litgpt.generate.base")

    def load(self) -> None:
        from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
        from litgpt.scripts.convert_hf_checkpoint import copy_weights_phi

        known = json.loads((Path(self.job.model) / "config.json").read_bytes())
        sizes = {
            "n_layer": known["num_hidden_layers"],
            "n_embd": known["hidden_size"],
            "n_head": known["num_attention_heads"],
            "intermediate_size": known["intermediate_size"],
            "rotary_percentage": known["partial_rotary_factor"],
            "padded_vocab_size": known["vocab_size"],
        }
        if self.job.adapter:  # of rank 8 and alpha 16 on q and v
            sizes |= {"lora_r": 8, "lora_alpha": 16, "lora_query": True, "lora_value": True}
        config = Config.from_name("phi-2", **sizes)
        weights = {}
        apart = {}  # q, k and v, until all three of a layer are there
        for file in Path(self.job.model).glob("*.safetensors"):
            copy_weights_phi(config, apart, weights, load_file(file))
        self.model = GPT(config)
        self.model.load_state_dict(weights, strict=False)
        self.model.to(self.job.device, self.dtype)
        mark_only_lora_as_trainable(self.model)
        self.parameters = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        if self.job.adapter:
            saved = load_file(Path(self.job.adapter) / "adapter_model.safetensors")
            for name, part in self.parts(lambda parameter: parameter.data).items():
                part.copy_(saved[lora.PEFT_PREFIX + name])

    def parts(self, tensor_of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Returns views, by our names, of its tensors, which hold q and then v."""
        parts = {}
        for number, block in enumerate(self.model.transformer.h):
            for matrix in ("lora_A", "lora_B"):
                q, v = tensor_of(getattr(block.attn.qkv, matrix)).chunk(2)
                parts[f"model.layers.{number}.self_attn.q_proj.{matrix}.weight"] = q
                parts[f"model.layers.{number}.self_attn.v_proj.{matrix}.weight"] = v
        return parts

    def gradients(self) -> dict[str, Tensor]:
        return self.parts(lambda parameter: parameter.grad)

    def ways(self, task: str) -> list[dict]:
        # A micro-batch of 1 is its default in training.
        sizes = {"train16": [1, 16], "train128": [1, 16, 32], "write2": [64], "write32": [64]}
        return [{"rows_at_once": size} for size in sizes.get(task, [])]

    def loss(self, rows: list) -> Tensor:
        from litgpt.utils import chunked_cross_entropy

        ids = pad([prompt + answer[:-1] for prompt, answer in rows], self.eos)
        targets = [[-100] * (len(prompt) - 1) + answer for prompt, answer in rows]
        logits = self.model(ids.to(self.job.device), lm_head_chunk_size=128)
        return chunked_cross_entropy(logits, pad(targets, -100).to(self.job.device))

    @cached_property
    def merged(self) -> torch.nn.Module:
        """The model for generation, with the adapter merged into the weights, as litgpt does it."""
        from litgpt.lora import merge_lora_weights

        model = copy.deepcopy(self.model).eval()
        merge_lora_weights(model)
        return model

    def write_batch(self, prompts: list, count: int) -> list[list[int]]:
        from litgpt.generate.base import batched_generate_fn

        written = []
        for length, group in itertools.groupby(prompts, key=len):  # it takes rows of equal length
            ids = torch.tensor(list(group), device=self.job.device)
            self.merged.max_seq_length = length + count
            self.merged.set_kv_cache(len(ids), device=ids.device, dtype=self.dtype)
            steps = batched_generate_fn(
                self.merged,
                ids,
                max_returned_tokens=length + count,
                sample_args={"temperature": 0.0},
                include_prompt=False,
                include_eos=False,
            )
            written += torch.cat([torch.stack(step) for step in steps], dim=1).tolist()
        return written


# "before" is ours of another checkout.
CONTENDERS = {"ours": Ours, "before": Ours, "reference": Reference, "litgpt": LitGPT}

# -----------------------------------------------------------------------------
# The tasks


def load_anew(contender: Contender) -> int:
    # Without keeping NF4's values, which the reference does not do either.
    job = replace(contender.job, quant="nf4", keep=False)
    type(contender)(job, contender.rows)
    return 1


@dataclass(frozen=True)
class Task:
    title: str
    run: Callable[[Contender], int]  # does it once, and returns the number of rows
    has_adapter: bool = True


def score(contender: Contender) -> int:
    return len(contender.score(contender.prompts))


def write(count: int) -> Callable[[Contender], int]:
    return lambda contender: len(contender.write(contender.prompts, count))


TASKS = {
    "train16": Task("training, 16 rows a step", lambda contender: contender.train(16, STEPS)),
    "train128": Task("training, 128 rows a step", lambda contender: contender.train(128, 1)),
    "score": Task("scoring, fine-tuned", score),
    "score base": Task("scoring, the base", score, has_adapter=False),
    "write2": Task("generation of 2 tokens, fine-tuned", write(2)),
    "write32": Task("generation of 32 tokens, the base", write(32), has_adapter=False),
    "load": Task("loading and quantising, loads a second", load_anew),
}


def time_task(contender: Contender, run: Callable[[Contender], int]) -> dict:
    on_gpu = contender.job.device.startswith("cuda")
    if on_gpu:  # memory was returned after the last task, so the first run has to allocate it
        run(contender)
        torch.cuda.synchronize()
    begin = time.perf_counter()
    rows = run(contender)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    if on_gpu:  # the other contenders need the memory
        torch.cuda.empty_cache()
    return {"rate": rows / seconds, "peak": peak_memory(contender.job)}


def peak_memory(job: Job) -> float:
    return machine.peak_memory(torch.device(job.device)) or math.nan


def results(contender: Contender) -> dict:
    """Returns what is compared before anything is timed.

    The loss and its gradients are over 32 rows, in two batches if the contender takes 16 at a time.
    There are scores and 32 new ids for each of 64 prompts. litgpt has no scores.
    """
    prompts = contender.prompts[:64]
    contender.use(**contender.ways("train16")[-1])
    loss = contender.backward(contender.rows["training"][:32])
    gradients = {name: grad.cpu().contiguous() for name, grad in contender.gradients().items()}
    contender.use(**contender.ways("write32")[0])
    written = contender.write(prompts, 32)
    scores = contender.score(prompts) if contender.ways("score") else None
    return {"loss": loss.item(), "gradients": gradients, "written": written, "scores": scores}


# -----------------------------------------------------------------------------
# The process


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # for what libraries print
    kind = CONTENDERS[sys.argv[1]]
    job = Job(**json.loads(sys.argv[2]))
    # Libraries that are imported only when first used would count as memory of the training.
    quant.kernels()
    for library in kind.libraries:
        importlib.import_module(library)
    imported = peak_memory(job)
    contender = kind(job, json.loads(Path(job.rows).read_bytes()))
    answer = {"imported": imported, "ways": {task: contender.ways(task) for task in TASKS}}
    print(json.dumps(answer), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "save" in request:
            answer = results(contender)
            save_file(answer.pop("gradients"), request["save"])
        else:
            contender.use(**request["way"])
            answer = time_task(contender, TASKS[request["task"]].run)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
