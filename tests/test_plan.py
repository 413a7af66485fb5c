"""The memory that is planned beforehand is what PyTorch's allocator gives out in a real step."""

import shutil

import pytest
import torch
from conftest import ROOT, in_process, ours, read_json, script
from torch.profiler import profile

import data
import lora
import quant
import train
from scripts import plan
from support import cli, examples


def arguments(*flags):
    """train.py's arguments for the embedded model on a CPU in fp32."""
    command = ["--model", "tiny/model", "--dataset", "tiny/data", "--dtype", "fp32"]
    return cli.train_arguments([*command, "--residual-dropout", "0.1", "--device", "cpu", *flags])


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return data.load_tokenizer(tiny)


@pytest.fixture(scope="module")
def rows():
    return examples.load_examples(str(ROOT / "tiny" / "data"), "train", 2000)


def measure(model, batch) -> int:
    """The most bytes that the CPU's allocator had given out in a forward and backward pass."""
    with profile(profile_memory=True) as profiler:
        train.batch_loss(model.train(), batch).backward()
    events = profiler.profiler.kineto_results.events()
    allocations = [event for event in events if event.name() == "[memory]"]
    now = 0
    most = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    "flags",
    [
        ["--loss", "answer"],
        ["--loss", "full", "--targets", "all-linear"],
        ["--loss", "answer", "--checkpointing"],
        ["--loss", "full", "--checkpointing", "--quant", "none"],
        ["--loss", "answer", "--no-share-prefix", "--double-quant", "--keep-dequantized"],
    ],
    ids=["answer", "full", "answer-checkpointing", "full-checkpointing", "no-shared-prefix"],
)
def test_the_plan_is_what_the_allocator_gives_out(tiny, tokenizer, rows, flags):
    """Within 2 %: the plan rounds each tensor to 512 bytes, and does not see into a kernel."""
    args = arguments(*flags)
    encoded = plan.longest_rows(rows, tokenizer, 8, args.max_length)
    prefix = train.shared_prefix_length(tokenizer, args)
    planned = plan.memory(tiny, args, encoded, prefix)

    model = ours(tiny, torch.float32, args.quant, args.double_quant)
    if args.keep_dequantized:
        quant.keep_dequantized(model)
    weights = plan.size(model.state_dict().values())
    lora.inject(model, lora.LoRAConfig(args.rank, args.alpha, args.dropout, args.targets))
    for block in model.model.layers:
        block.resid_dropout.p = 0.1
    if args.checkpointing:
        model.model.checkpointing = "blocks"
    measured = measure(model, data.collate(encoded, prefix, args.loss))

    assert planned["base weights"] == weights
    in_a_step = ("logits", "activations", "passing, at the peak")
    assert sum(planned[name] for name in in_a_step) == pytest.approx(measured, rel=0.02)


def test_the_longest_rows_are_those_with_the_most_tokens(tokenizer, rows):
    encoded = plan.longest_rows(rows, tokenizer, 8, None)
    lengths = sorted((len(data.encode(row, tokenizer)[0]) for row in rows), reverse=True)
    assert [len(prompt) for prompt, _ in encoded] == lengths[:8]


def check_sum(printed: str) -> float:
    """Returns the sum in MiB that was printed, once it has been added up."""
    lines = printed.splitlines()[1:]
    lines = [line for line in lines if "values kept" not in line]  # what it would be else
    names = [line[:32].rstrip() for line in lines]
    assert names[-3:] == ["activations", "passing, at the peak", "sum"]
    counts = [float(line[32:].removesuffix("MiB").replace(",", "")) for line in lines]
    assert sum(counts[:-1]) == pytest.approx(counts[-1], abs=0.05 * len(counts))
    return counts[-1]


def test_a_plan_needs_no_weights_and_leaves_nothing(tiny, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tiny / name, model)
    run = tmp_path / "run"
    command = ("--model", model, "--dataset", "tiny/data", "--limit", 100, "--out", run)

    def total(*flags) -> float:
        in_process(plan, *command, "--dtype", "bf16", *flags)
        return check_sum(capsys.readouterr().out)

    base = total("--device", "cpu")
    assert total("--device", "cpu", "--batch-size", 64) > 3 * base
    assert total("--device", "cpu", "--checkpointing") < 0.5 * base
    assert total("--device", "cpu", "--rank", 64) > base
    # A GPU that is not here: its fused attention stores no scores.
    on_gpu = total("--device", "cuda")
    assert on_gpu < base
    assert total("--device", "cuda", "--checkpointing") < 0.8 * on_gpu
    # Attention is computed again there; where NF4's values are kept, nothing is.
    kept = total("--device", "cuda", "--keep-dequantized")
    assert total("--device", "cuda", "--keep-dequantized", "--checkpointing") < 0.6 * kept
    assert total("--device", "cuda", "--loss", "full") > on_gpu
    assert not run.exists()


def test_a_run_takes_about_as_much_as_was_planned(tmp_path, capsys):
    """Resident memory on a CPU is more than what the allocator gave out: glibc keeps what is freed.

    Makefile asks it to. So the bounds are wide.
    """
    command = ("--model", "tiny/model", "--dataset", "tiny/data", "--batch-size", 64)
    run = ("--steps", 3, "--eval-limit", 1, "--max-new-tokens", 1, "--out", tmp_path / "run")
    in_process(plan, *command)
    sum_in_gib = float(capsys.readouterr().out.split()[-2].replace(",", "")) / 1024
    done = script("train.py", *command, *run)
    assert done.returncode == 0, done.stderr
    measured = read_json(tmp_path / "run" / "results.json")["training_memory_gib"]
    assert 0.5 * sum_in_gib < measured < 3 * sum_in_gib
