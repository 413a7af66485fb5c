"""The memory that --plan tells beforehand is what PyTorch's allocator gives out in a real step."""
import argparse
import shutil

import pytest
import torch
from conftest import in_process, ours, read_json, script
from torch.profiler import profile

import data
import lora
import plan
import train


def measured(model, *step) -> int:
    """The most bytes the CPU's allocator had given out in forward and backward, as PyTorch's profiler saw each of them."""
    with profile(profile_memory=True) as profiler:
        loss, _ = train.batch_loss(model.train(), *step)
        loss.backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("loss, checkpointing, targets", [("answer", False, ("q_proj", "v_proj")), ("full", False, "all-linear"),
                                                          ("answer", True, ("q_proj", "v_proj"))])
def test_the_plan_is_what_the_allocator_gives_out(tiny, loss, checkpointing, targets):
    """Within 2 %: the plan rounds each tensor to 512 bytes, as on a GPU; what an operation allocates within is not in it."""
    config = lora.LoRAConfig(targets=targets)
    args = argparse.Namespace(quant="nf4", double_quant=False, keep_dequantized=False, checkpointing=checkpointing, residual_dropout=0.1, accumulate=1,
                              device="cpu", loss=loss)
    tokenizer, examples = data.load_tokenizer(tiny), data.load_examples("tiny/data", "train", 2000)
    encoded, skip = plan.longest_rows(examples, tokenizer, 8, 512), len(data.fixed_ids(tokenizer)[0])
    assert len(encoded) == 8 and len(encoded[0][0]) == max(len(data.encode(example, tokenizer)[0]) for example in examples)
    found = plan.memory(tiny, args, config, torch.float32, encoded, skip, train.batch_loss)
    model = ours(tiny, torch.float32, "nf4")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    lora.inject(model, config)
    for block in model.model.layers:
        block.resid_dropout.p = 0.1
    model.model.checkpointing = checkpointing
    assert found["base weights"] == weights
    assert found["sum"] - weights - found["adapter"] - found["its optimiser"] == pytest.approx(measured(model, encoded, skip, loss), rel=0.02)


def test_plan_needs_no_weights_and_leaves_nothing(tiny, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tiny / name, tmp_path / "model")
    command = ("--model", tmp_path / "model", "--dataset", "tiny/data", "--limit", 100, "--out", tmp_path / "run", "--plan")
    sums = []
    for more in ((), ("--batch-size", 64), ("--device", "cuda"), ("--checkpointing",), ("--rank", 64)):
        in_process(train, *command, *more)
        lines = [line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines()[1:]]
        assert [name for name, *_ in lines][-3:] == ["activations", "passing, at the peak", "sum"]
        counts = [float(count.replace(",", "")) for _, count, _ in lines]
        assert sum(counts[:-1]) == pytest.approx(counts[-1], abs=0.1 * len(counts))
        sums.append(counts[-1])
    base, rows, fused, checkpointing, rank = sums
    assert rows > 3 * base and fused < base and checkpointing < 0.5 * base and rank > base
    assert not (tmp_path / "run").exists()


def test_the_peak_stands_beside_the_plan_in_results_json(tmp_path):
    """Resident memory on a CPU is more than what the allocator gave out: glibc keeps what was freed, and is asked to."""
    out = tmp_path / "run"
    assert script("train.py", "--model", "tiny/model", "--dataset", "tiny/data", "--steps", 4, "--batch-size", 64, "--eval-limit", 4, "--out", out).returncode == 0
    found = read_json(out / "results.json")["training_memory_gib"]
    assert 0.5 * found["planned"] < found["measured"] < 3 * found["planned"], found
