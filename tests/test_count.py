"""tools/count.py: the scripts run on a GPU that is not there, and what is counted is right.

Here device errors show without a GPU: a tensor left on the CPU, a wait in each step, and more.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from subprocess import PIPE

import pytest
import torch
from conftest import ROOT, read_json
from test_hardware import CARDS

import data
import phi2
from scripts import plan
from support import cli, examples, files, packing
from tiny import mnli_lengths

pytestmark = pytest.mark.skipif(
    not shutil.which("g++") or torch.version.cuda is not None,
    reason="needs g++, and a torch without CUDA",
)
TINY = ["--model", "tiny/model", "--device", "cuda", "--dtype", "bf16"]
SHORT = ["--steps", 2, "--batch-size", 4, "--max-new-tokens", 2]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A function that returns what `python ARGUMENTS` prints, which needs the fake GPU.

    One process imports torch for all.
    """
    folder = tmp_path_factory.mktemp("printed")
    numbers = itertools.count()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tests" / "counted.py"]
    with subprocess.Popen(
        command, stdin=PIPE, stdout=PIPE, text=True, cwd=ROOT, env=environment
    ) as server:

        def python(*arguments) -> str:
            path = folder / f"{next(numbers)}.txt"
            job = {"arguments": list(map(str, arguments)), "path": str(path)}
            print(json.dumps(job), file=server.stdin, flush=True)
            status = server.stdout.readline()
            assert status == "0\n", path.read_text()
            return path.read_text()

        yield python
        server.stdin.close()


@pytest.fixture(scope="module")
def count(python):
    """A function that returns what `python -m tools.count ARGUMENTS` prints."""
    return partial(python, "-m", "tools.count")


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> list:
    """The flag for a dataset with the rows of two steps, and two to evaluate."""
    folder = tmp_path_factory.mktemp("few")
    rows = list(examples.load_examples(str(ROOT / "tiny" / "data"), "train", 10))
    files.write_lines(folder / "train.jsonl", rows[:8])
    files.write_lines(folder / "validation.jsonl", rows[8:])
    return ["--dataset", folder]


def waits(output: str, place: str) -> int:
    """Returns how often a file of the project has waited for the GPU."""
    return sum(int(number) for number in re.findall(rf"(\d+)  .*: {place}:\d+\n", output))


@pytest.fixture(scope="module")
def run(count, few, tmp_path_factory):
    """A run of train.py on the fake GPU, and what was counted.

    In fp16, where a step does what it does in bf16, and more: the loss is scaled.
    """
    out = tmp_path_factory.mktemp("count") / "run"
    return out, count("train.py", *TINY, *few, *SHORT, "--dtype", "fp16", "--out", out)


def test_a_step_of_training_waits_for_the_gpu_once(run, tiny):
    _, output = run
    first = 1  # how many ids it predicts
    losses = 2  # before and after the training
    assert waits(output, "processes.py") == 2 + first + losses
    assert waits(output, "train.py") == waits(output, "data.py") == waits(output, "quant.py") == 0
    # A copy and a look for numbers that are not finite, for each tensor that is loaded.
    assert waits(output, "phi2.py") == 2 * len(phi2.find_tensors(tiny))


@pytest.mark.parametrize(
    "flags",
    [
        ["--loss", "full", "--checkpointing", "--double-quant", "--no-keep-dequantized"],
        ["--no-share-prefix", "--quant", "none", "--dtype", "fp32", "--accumulate", 2]
        + ["--targets", "all-linear", "--eval-every", 1],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_every_way_of_training_runs_on_a_gpu(count, few, tmp_path, flags):
    output = count("train.py", *TINY, *few, *SHORT, *flags, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert "counted: " in output


def test_a_run_resumes_and_is_evaluated_on_a_gpu(count, few, run):
    out, _ = run
    assert "3 steps" in count("train.py", "--resume", out, "--steps", 3)
    evaluated = count("eval.py", *TINY, *few, "--adapter", out, "--mode", "score")
    assert re.search(r"^validation +\d\.\d{4} ", evaluated, re.MULTILINE)


# -----------------------------------------------------------------------------
# What is counted, of two layers of phi-2's size


@pytest.fixture(scope="module")
def rows(tiny):
    """The rows that are counted by default, as far as one task takes them."""
    tokenizer = data.load_tokenizer(tiny)
    drawn = mnli_lengths.validation_rows(tokenizer, 64)
    return [data.encode(row, tokenizer) for row in drawn]


@pytest.fixture(scope="module")
def prefix_length(tiny):
    prefix, _, _ = data.fixed_ids(data.load_tokenizer(tiny))
    return len(prefix)


@pytest.fixture(scope="module")
def costs(count, tmp_path_factory):
    """What each task costs where NF4's values are not kept."""
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    printed = count("--random-phi-2", 2, "--json", path)
    costs = read_json(path)["indices alone"]
    for task, cost in costs.items():
        assert re.search(rf"{task} +indices alone +{cost['launches']:,} +{cost['waits']} ", printed)
    return costs


def test_the_arithmetic_is_that_of_the_tokens(costs, rows, prefix_length):
    """Products of the layers' weights.

    Attention, in which rows are padded to the longest, and the adapters add less than 4 %.
    """
    own_ids, _ = packing.fold([prompt[prefix_length:] for prompt, _ in rows])
    tokens = prefix_length + len(own_ids)
    square = 2560 * 2560
    first = 12 * square * tokens  # q, k, v and dense, and 8 squares in the MLP
    # In the last layer all tokens give keys and values, and one of each row the rest.
    last = 2 * square * tokens + 10 * square * len(rows)
    # Of the head three rows alone, too few to count.
    assert 1 <= costs["score"]["tflop"] * 1e12 / (2 * (first + last)) < 1.04
    assert costs["score"]["launches"] < 120


def test_a_step_of_generation_is_one_launch_after_the_first(costs):
    """Beside it the new ids go to the GPU, and the chosen ones are picked and come back.

    What makes the CPU wait, or copies to the GPU, is an error in what is recorded.
    """
    assert costs["ramble"]["waits"] == costs["answer"]["waits"] + 30
    assert costs["ramble"]["launches"] <= costs["answer"]["launches"] + 30 * 4


def test_the_memory_is_that_of_the_plan(costs, rows, prefix_length, tmp_path):
    config = vars(phi2.Phi2Config(num_hidden_layers=2, resid_pdrop=0.0))
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "phi"}))
    arguments = ["--model", tmp_path, "--dataset", "tiny/data", "--device", "cuda"]
    arguments += ["--dtype", "bf16", "--dropout", 0]
    args = cli.train_arguments(list(map(str, arguments)))
    encoded = sorted(rows[:16], key=lambda row: len(row[0]))
    planned = plan.Plan(tmp_path, args).step(encoded, prefix_length)["sum"] / 2**30
    assert planned == pytest.approx(costs["train16"]["peak_gib"], rel=0.05)


# -----------------------------------------------------------------------------
# Cards of several sizes


@pytest.fixture(scope="module")
def found(python, tmp_path_factory) -> dict:
    """What tests/fake_cards.py finds."""
    folder = tmp_path_factory.mktemp("cards")
    python("tests/fake_cards.py", folder)
    return read_json(folder / "found.json") | {"folder": folder}


def test_on_a_card_an_evaluation_takes_as_many_rows_as_planned(found):
    """With fewer rows it fits only if nothing is left of the batch that has failed."""
    assert found["cards"].keys() == {"bf16, 8 GB", "bf16, 24 GB", "fp32, 12 GB"}
    for name, card in found["cards"].items():
        dtype, gigabytes, _ = name.replace(",", "").split()
        capability = (6, 0) if dtype == "fp32" else (8, 0)
        _, kept, rows, _ = CARDS[capability, int(gigabytes)]
        assert card["kept"] == kept
        assert card["recomputes"] == (not kept)
        assert card["rows"] == rows
        assert card["answers"] == 64
        line = f"the GPU is full: evaluation goes on with a batch size of {rows}\n"
        assert card["printed"] == (line if rows < 64 else "")


def test_a_step_that_does_not_fit_names_flags_with_which_the_run_resumes(found):
    errors = found["errors"]
    run = found["folder"] / "run"
    assert errors["too little"].startswith(
        "error: a step of training does not fit into the GPU; what helps: "
        f"python train.py --resume {run} --no-keep-dequantized --checkpointing, or a new run with "
        "--batch-size 32 --accumulate 2 or a --max-length that cuts the longest rows or "
        "--double-quant (0.37 bit a weight): CUDA out of memory. Tried to allocate "
    )
    assert errors["resumed"] == ""
    assert errors["is finished"]


def test_where_nothing_fits_the_line_says_what_does_not_and_what_helps(found):
    errors = found["errors"]
    assert errors["no room for the model"].startswith(
        "error: the model, 2.2 MiB, does not fit into the GPU; what helps: "
        "--no-keep-dequantized, or --double-quant (0.37 bit a weight), or --device cpu: CUDA out "
        "of memory."
    )
    assert errors["no room for a pair"].startswith(
        "error: not even a row of 71 tokens fits into the GPU beside the model; what helps: "
        "--no-keep-dequantized, or a --max-length below 71, or --device cpu: CUDA out of memory."
    )
