"""fp16: its gradients, a step that overflows, and a resume. Beside PEFT it is in test_reference.py.

Few CPUs have instructions for fp16, so the steps here have few rows.
"""

import json
import math
import signal
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import distance, in_process, ours

import data
import eval as evaluation
import lora
import train
from support import card, cli, loss_scale, processes, resume
from support.examples import load_examples

CPU = torch.device("cpu")
TINY = ("--model", "tiny/model", "--dataset", "tiny/data")
START = 2.0**19  # with which the first step overflows
STEPS = 6
RUN = (
    *TINY, "--dtype", "fp16", "--batch-size", 2, "--steps", STEPS,
    "--limit", 2, "--learning-rate", 1e-2, "--eval-limit", 2, "--max-new-tokens", 1,
)  # fmt: skip


# -----------------------------------------------------------------------------
# One step


def gradients(tiny: Path, dtype: str) -> dict[str, torch.Tensor]:
    """Returns the gradients of a step as train.py makes it, over NF4, with random A and B."""
    torch.manual_seed(0)
    model = ours(tiny, evaluation.DTYPES[dtype], "nf4")
    lora.inject(model, lora.LoRAConfig(dropout=0.0))
    parameters = lora.lora_parameters(model)
    for name, parameter in parameters.items():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    tokenizer = data.load_tokenizer(tiny)
    encoded = [data.encode(row, tokenizer) for row in load_examples("tiny/data", "train", 8)]
    args = Namespace(loss="answer", share_prefix=True, batch_size=4)
    batches = train.collated(encoded, tokenizer, args)

    found = {}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.0)

    def keep(*_):
        found.update((name, parameter.grad) for name, parameter in parameters.items())

    optimizer.register_step_pre_hook(keep)  # before they are set to zero
    scaler = loss_scale.new_scaler(dtype, CPU)
    predicted = train.count_predicted(batches)
    _, norm = train.training_step(model, optimizer, scaler, batches, predicted, math.inf)
    whole = torch.cat([gradient.flatten() for gradient in found.values()])
    assert norm.item() == pytest.approx(whole.norm().item(), rel=1e-5), "not that of a scaled loss"
    return found


def test_gradients_in_fp16_are_those_in_fp32_within_2e_3(tiny):
    """fp16 rounds each number to 5e-4 of it, in each layer twice. bf16 is at 1e-2."""
    found = gradients(tiny, "fp16")
    expected = gradients(tiny, "fp32")
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert distance(gradient, expected[name]) < 4e-3, name  # fewer numbers to average
    together = [torch.cat([part.flatten() for part in each.values()]) for each in (found, expected)]
    assert distance(*together) < 2e-3


# -----------------------------------------------------------------------------
# A run


def numbers(out: Path) -> list[dict]:
    """Returns the lines of training in metrics.jsonl, without times and memory."""

    def refuse(name: str):
        raise AssertionError(f"{name} is no JSON")

    text = (out / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    kept = ("step", "loss", "grad_norm", "skipped_steps")
    return [{key: line[key] for key in kept} for line in lines if "skipped_steps" in line]


def test_an_overflow_is_skipped_and_counted_and_a_resume_has_the_same_scale_and_bits(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(loss_scale, "START", START)
    monkeypatch.setattr(loss_scale, "STEPS_TO_GROW", 3)
    training_step = train.training_step
    norms = []
    changes = []

    def watched(model, *arguments):
        before = [parameter.clone() for parameter in lora.lora_parameters(model).values()]
        loss, norm = training_step(model, *arguments)
        after = lora.lora_parameters(model).values()
        changes.append(any(not torch.equal(*pair) for pair in zip(before, after)))
        norms.append(norm.item())
        assert math.isfinite(loss.item())
        if len(norms) == STEPS + 3:  # of the second run
            signal.raise_signal(signal.SIGINT)
        return loss, norm

    monkeypatch.setattr(train, "training_step", watched)
    whole = tmp_path / "whole"
    in_process(train, *RUN, "--out", whole)
    printed = capsys.readouterr().out
    is_taken = [math.isfinite(norm) for norm in norms]
    assert not is_taken[0], "the first step must overflow, or this says nothing"
    assert is_taken.count(True) >= 3
    assert changes == is_taken
    lines = numbers(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["skipped_steps"] for line in lines] == [int(not taken) for taken in is_taken]
    assert [line["grad_norm"] is not None for line in lines] == is_taken
    assert lines[-1]["loss"] < lines[0]["loss"], "it recovers"
    assert printed.count("(1 skipped: a gradient overflowed in fp16)") == is_taken.count(False)

    out = tmp_path / "run"
    in_process(train, *RUN, "--out", out)
    assert resume.load(out).state.progress.step == 3
    in_process(train, "--resume", out)
    expected = resume.load(whole)
    found = resume.load(out)
    assert found.state.scaler == expected.state.scaler
    assert found.state.scaler["scale"] < START
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name
    assert numbers(out) == lines
    # AdamW counts the steps that have changed something.
    assert found.tensors["optimizer.0.step"] == is_taken.count(True)


@pytest.mark.parametrize(
    "dtype, scale, loss, norm",
    [
        ("fp16", loss_scale.LEAST, 0.5, math.inf),
        ("fp16", loss_scale.LEAST, 0.5, math.nan),
        ("fp16", loss_scale.LEAST / 2, 0.5, math.inf),
        ("fp16", 2.0**12, math.nan, math.nan),
        ("fp16", 2.0**12, math.inf, 0.5),
        ("bf16", 2.0**12, 0.5, math.inf),
    ],
)
def test_a_step_that_is_not_finite_is_an_error_unless_the_scale_made_it_so(
    tiny, monkeypatch, dtype, scale, loss, norm
):
    monkeypatch.setattr(loss_scale, "START", scale)
    rows = load_examples("tiny/data", "train", 8)
    args = Namespace(batch_size=4, loss="answer", share_prefix=True, max_length=None, seed=0)
    args.out = "RUN"  # which the error names
    inputs = Namespace(train=rows, tokenizer=data.load_tokenizer(tiny))
    state = Namespace(rows_per_step=4, steps=2, progress=resume.Progress())
    feed = train.Feed(args, inputs, state, loss_scale.new_scaler(dtype, CPU), CPU)
    feed.prepare_next()
    returned = (0, torch.tensor(loss), torch.tensor(norm), False)
    if dtype == "fp16" and loss == 0.5 and scale == loss_scale.LEAST:
        numbers = feed.finish_step(*returned)
        assert (numbers.is_skipped, numbers.rows, numbers.loss) == (True, 4, loss)
        return
    with pytest.raises(ValueError, match="norm of its .* RUN keeps the last save") as error:
        feed.finish_step(*returned)
    assert ("--dtype fp32" in str(error.value)) == (dtype == "fp16")


# -----------------------------------------------------------------------------
# Everywhere


def test_every_dtype_of_the_flag_is_known_to_the_model_and_to_the_card():
    (choices,) = (
        action.choices for action in cli.train_parser()._actions if action.dest == "dtype"
    )
    assert set(choices) == evaluation.DTYPES.keys() == card.DTYPES.keys()
    for name, dtype in evaluation.DTYPES.items():
        assert getattr(torch, card.DTYPES[name]) is dtype


@pytest.mark.parametrize(
    "defaults, taken",
    [(["bf16", "fp16"], "fp16"), (["fp16", "bf16", "fp32"], "fp32"), (["bf16", "bf16"], "bf16")],
)
def test_where_gpus_differ_all_processes_take_a_dtype_that_each_can_compute_in(
    monkeypatch, defaults, taken
):
    monkeypatch.setattr(processes, "gather", lambda value: defaults)
    flags = ("--model", "tiny/model", "--dataset", "tiny/data", "--limit", "4", "--out", "x")
    args = cli.train_arguments([*flags, "--device", "cpu"])
    state = train.new_state(args, train.read_inputs(args))
    assert args.dtype == state.arguments["dtype"] == taken
