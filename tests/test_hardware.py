"""Cards of several sizes: what is chosen for them, what fits, and what is said where nothing does.

The cards are not there. Their memory is scripts.plan's count on phi-2's sizes; test_count.py tries
some of them on the fake GPU. The CPU's memory is a limit of this process.
"""

import json
import re
import resource
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import ROOT, in_process, ours

import data
import eval as evaluation
import phi2
import quant
from scripts import plan
from support import cli, full_memory, machine
from support.examples import load_examples
from tiny import mnli_lengths

GIB = 2**30


# What train.py takes on a card with its defaults. 15 GB: a T4's 16 GB, as CUDA counts them.
# capability, GB: --dtype, whether NF4's values are kept, rows of an evaluation, whether a step fits
CARDS = {
    ((7, 5), 8): ("fp16", False, 32, False),
    ((7, 5), 12): ("fp16", False, 64, True),
    ((7, 5), 15): ("fp16", False, 64, True),
    ((7, 5), 24): ("fp16", True, 64, True),
    ((8, 0), 8): ("bf16", False, 32, False),
    ((8, 0), 12): ("bf16", False, 64, True),
    ((8, 0), 15): ("bf16", False, 64, True),
    ((8, 0), 24): ("bf16", True, 64, True),
    ((6, 0), 8): ("fp32", False, 16, False),
    ((6, 0), 12): ("fp32", False, 32, False),
    ((6, 0), 15): ("fp32", False, 32, False),
    ((6, 0), 24): ("fp32", False, 64, True),
}
KEEP = {False: "--no-keep-dequantized", True: "--keep-dequantized"}


# -----------------------------------------------------------------------------
# The memory of cards, counted at phi-2's sizes


@pytest.fixture(scope="module")
def prefix(tiny):
    prefix, _, _ = data.fixed_ids(data.load_tokenizer(tiny))
    return prefix  # of as many ids as with phi-2's tokenizer


@pytest.fixture(scope="module")
def planned(tmp_path_factory, prefix):
    """A function that returns a plan for a model of phi-2's sizes with so many layers."""

    def plan_of(layers: int, *flags: str) -> plan.Plan:
        directory = tmp_path_factory.mktemp("model")
        config = vars(phi2.Phi2Config(num_hidden_layers=layers)) | {"model_type": "phi"}
        (directory / "config.json").write_text(json.dumps(config))
        command = ["--model", str(directory), "--dataset", "tiny/data", "--device", "cuda", *flags]
        return plan.Plan(directory, cli.train_arguments(command))

    return plan_of


@pytest.fixture(scope="module")
def count(planned, prefix):
    """A function that returns the bytes of a step, or of an evaluation of so many rows.

    They grow by as much with each layer from the fourth on, so 4 and 5 layers say what 32 take.
    """

    @cache
    def of_layers(layers: int, rows: int, *flags: str) -> int:
        """Returns the bytes of a step where `rows` is 0."""
        plan_of = planned(layers, *flags)
        if rows:
            return plan_of.evaluation(mnli_lengths.longest_prompts(prefix)[:rows], prefix)
        encoded = mnli_lengths.longest_rows(prefix, plan_of.args.batch_size)
        return plan_of.step(encoded, len(prefix))["sum"]

    def of_phi_2(rows: int, *flags: str, layers: int = 32) -> int:
        four = of_layers(4, rows, *flags)
        return four + (layers - 4) * (of_layers(5, rows, *flags) - four)

    of_phi_2.of_layers = of_layers
    return of_phi_2


@pytest.mark.parametrize("rows, flags", [(0, ["--checkpointing"]), (64, ["--keep-dequantized"])])
def test_each_layer_takes_as_much_as_the_one_before(count, rows, flags):
    flags = ["--dtype", "bf16", *flags]
    assert count(rows, *flags, layers=8) == count.of_layers(8, rows, *flags)


@pytest.mark.parametrize("capability, gigabytes", CARDS)
def test_what_is_taken_on_a_card_fits(count, planned, capability, gigabytes):
    dtype, kept, rows, fits = CARDS[capability, gigabytes]
    # fp16 takes as much as bf16.
    flags = ["--dtype", "fp32" if dtype == "fp32" else "bf16"]
    room = plan.for_tensors(gigabytes)

    # As many bytes a layer for the values as for 4 layers, and for the weights as from 4 to 5.
    four = planned(4, *flags, KEEP[False])
    five = planned(5, *flags, KEEP[False])
    free = room - (four.size() + 28 * (five.size() - four.size()))
    assert evaluation.has_room_to_keep(four.model, free * 4 / 32) == kept

    assert (count(0, *flags, KEEP[kept]) <= room) == fits
    assert count(rows, *flags, KEEP[kept]) <= room
    assert rows == 64 or count(2 * rows, *flags, KEEP[kept]) > room
    assert kept or count(0, *flags, KEEP[True]) > room, "they would fit"


def test_the_table_of_readme_is_what_is_planned(count):
    """For each card the figures of its flags, which fit, and how an evaluation is halved."""
    readme = (ROOT / "README.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in readme.splitlines() if "| a GPU of" in line]
    assert [int(card.split()[3]) for card, *_ in lines] == [8, 12, 16, 24, 80]
    for card, command, step, evaluated in lines:
        gigabytes = int(card.split()[3])
        room = plan.for_tensors(gigabytes)
        flags = command.strip("`").removeprefix("python train.py --rank 8").split()
        flags += ["--dtype", "bf16", KEEP[gigabytes >= 24]]  # as in CARDS
        counted = count(0, *flags)
        assert step == f"{counted / GIB:.1f} GiB"
        assert counted <= room

        halved = re.search(r"(\d+) rows", evaluated)
        rows = int(halved[1]) if halved else 64
        counted = count(rows, *flags)
        assert evaluated.startswith(f"{counted / GIB:.1f} GiB")
        assert counted <= room
        assert rows == 64 or count(2 * rows, *flags) > room


@pytest.mark.parametrize(
    "flags",
    [["--keep-dequantized"], ["--quant", "none"]],
    ids=lambda flags: " ".join(flags),
)
def test_each_flag_that_is_named_makes_a_step_smaller(count, planned, flags):
    flags = ["--dtype", "bf16", "--batch-size", "16", *flags]
    plan_of = planned(4, *flags)
    resumed, anew = full_memory.flags_of_a_step(plan_of.args, plan_of.model)
    named = [text.partition(" (")[0].split() for text in [*resumed, *anew]]
    named.remove("a --max-length that cuts the longest rows".split())
    assert len(named) >= 3
    before = count.of_layers(4, 0, *flags)
    for flag in named:
        assert count.of_layers(4, 0, *flags, *flag) < before, flag


# -----------------------------------------------------------------------------
# The CPU


@pytest.fixture
def tokenizer(tiny):
    return data.load_tokenizer(tiny)


@contextmanager
def memory_left(size: int) -> Iterator[None]:
    """This process can have `size` bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + size
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not machine.STATUS.is_file(), reason="needs Linux's /proc")
@pytest.mark.parametrize("quantization, size", [("none", "11.7"), ("nf4", "3.0")])
def test_a_model_that_fills_the_memory_is_not_taken_for_a_damaged_one(
    tiny, monkeypatch, quantization, size
):
    def load() -> phi2.Phi2:
        return evaluation.load_model(tiny, quantization, "fp32", "cpu")

    assert size == f"{sum(tensor.nbytes for tensor in load().state_dict().values()) / 2**20:.1f}"
    line = f"error: the model, {size} MiB, does not fit into the memory; what helps: --"
    if quantization == "none":  # NF4 has mapped the file before, to see what is quantised in it
        # The file, of 6.1 MB, is mapped twice.
        with memory_left(9 * 2**20), pytest.raises(RuntimeError, match="to mmap") as raised:
            load()
        assert cli.one_line(raised.value).startswith(line)
    monkeypatch.setattr(phi2, "read_layer", lambda *others: {"weight": torch.empty(2**50)})
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as raised:
        load()
    assert cli.one_line(raised.value).startswith(line)


@pytest.mark.skipif(not machine.STATUS.is_file(), reason="needs Linux's /proc")
def test_an_evaluation_that_fills_the_memory_gives_the_same_answers(tiny, tokenizer, capsys):
    """The allocator of the CPU fails really: keys and values of 64 rows take 1.2 GB."""
    model = ours(tiny, torch.float32)
    _, _, eos = data.fixed_ids(tokenizer)
    with torch.no_grad():
        model.lm_head.bias[eos] = 1e4  # each completion ends at once, and there is room for more
    rows = load_examples("tiny/data", "validation_matched", 70)

    def evaluate(rows, batch_size: int) -> tuple[list[dict], int]:
        protocol = evaluation.Settings(max_new_tokens=1900, batch_size=batch_size)
        _, predictions = evaluation.evaluate(model, tokenizer, rows, protocol)
        return predictions, protocol.batch_size

    evaluate(rows.select(range(2)), 2)  # libraries take memory at their first call
    with memory_left(180 * 2**20):
        found, settled = evaluate(rows, 64)
    assert settled in (4, 8, 16, 32)  # glibc may hold what was freed before, which counts as taken
    line = f"the memory is full: evaluation goes on with a batch size of {settled}\n"
    assert capsys.readouterr().err.endswith(line)
    assert found == evaluate(rows, settled)[0]  # to the bit
    for row, expected in zip(found, evaluate(rows, 64)[0]):
        assert row["scores"] == pytest.approx(expected["scores"], abs=2e-5)  # as in test_eval.py


def test_pairs_on_standard_input_are_halved_once(monkeypatch, capsys, tmp_path):
    complete = evaluation.complete
    sizes = []

    def full_beyond_8(model, tokenizer, prompts, max_new_tokens):
        sizes.append(len(prompts))
        if len(prompts) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return complete(model, tokenizer, prompts, max_new_tokens)

    monkeypatch.setattr(evaluation, "complete", full_beyond_8)
    pairs = [{"premise": f"Tom has {n} cats.", "hypothesis": "Tom has cats."} for n in range(40)]
    (tmp_path / "pairs").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    with open(tmp_path / "pairs") as file:
        monkeypatch.setattr("sys.stdin", file)
        command = ["--model", "tiny/model", "--dataset", "-", "--batch-size", 20]
        in_process(evaluation, *command, "--max-new-tokens", 1)
    assert sizes == [20, 10, 5, 5, 5, 5, 5, 5, 5, 5]
    captured = capsys.readouterr()
    assert [json.loads(line)["premise"] for line in captured.out.splitlines()] == [
        pair["premise"] for pair in pairs
    ]
    assert captured.err.count("evaluation goes on with a batch size of 5") == 1


def test_a_batch_that_is_halved_many_times_is_said_once(tiny, capsys):
    def full_beyond_1(prompts: list) -> list:
        if len(prompts) > 1:
            raise torch.OutOfMemoryError
        return prompts

    prompts = [[number] for number in range(9)]
    protocol = evaluation.Settings(batch_size=8)
    assert full_memory.run_in_parts(full_beyond_1, prompts, protocol, phi2.build(tiny)) == prompts
    line = "the memory is full: evaluation goes on with a batch size of 1\n"
    assert capsys.readouterr().err == line


def test_another_error_is_not_taken_for_a_full_memory(tiny):
    def wrong(prompts: list) -> list:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        full_memory.run_in_parts(wrong, [[1], [2]], evaluation.Settings(), phi2.build(tiny))


def test_what_is_off_already_is_not_named(tiny):
    model = phi2.build(tiny)
    quant.quantize_linears(model, double_quant=True)
    args = Namespace(
        checkpointing=True, batch_size=1, accumulate=1, device="cpu", out=Path("out/x")
    )
    text = full_memory.about_a_step(args, model)
    assert text.endswith("; what helps: a new run with a --max-length that cuts the longest rows")
    args = Namespace(**vars(args) | {"batch_size": 7, "accumulate": 3, "checkpointing": False})
    text = full_memory.about_a_step(args, model)
    assert f"--resume {Path('out/x')} --checkpointing, or a new run with --batch-size 1 " in text
    assert "--accumulate 21 or" in text

    # On a GPU, without NF4: attention is stored until --no-keep-dequantized.
    args = Namespace(**vars(args) | {"device": "cuda"})
    plain = phi2.build(tiny)
    resumed, _ = full_memory.flags_of_a_step(args, plain)
    assert resumed == ["--no-keep-dequantized", "--checkpointing"]
    plain.model.recomputes_attention = True
    resumed, _ = full_memory.flags_of_a_step(args, plain)
    assert resumed == ["--checkpointing"]
