"""The memory that is planned beforehand is what PyTorch's allocator gives out in a real step."""

import json
import shutil
from collections.abc import Callable

import pytest
import torch
from conftest import ROOT, in_process, ours
from torch.profiler import profile

import data
import eval as evaluation
import lora
import phi2
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


def measure(run: Callable[[], None]) -> int:
    """Returns the most bytes that the CPU's allocator had given out while `run` ran."""
    with profile(profile_memory=True) as profiler:
        run()
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
    planned = plan.Plan(tiny, args).step(encoded, prefix)

    model = ours(tiny, torch.float32, args.quant, args.double_quant)
    if args.keep_dequantized:
        quant.keep_dequantized(model)
    weights = plan.size(model.state_dict().values())
    lora.inject(model, lora.LoRAConfig(args.rank, args.alpha, args.dropout, args.targets))
    for block in model.model.layers:
        block.resid_dropout.p = 0.1
    model.model.recomputes_blocks = args.checkpointing
    batch = data.collate(encoded, prefix, args.loss)
    measured = measure(lambda: train.batch_loss(model.train(), batch).backward())

    assert planned["base weights"] == weights
    in_a_step = ("logits", "activations", "temporary, at the peak")
    assert sum(planned[name] for name in in_a_step) == pytest.approx(measured, rel=0.02)


def test_the_plan_of_an_evaluation_is_what_the_allocator_gives_out(tiny, tokenizer, rows):
    """Within 2 %, as above."""
    args = arguments("--quant", "none", "--max-new-tokens", "24")
    prompts = plan.first_prompts(rows, tokenizer, args.max_length)
    prefix, _, _ = data.fixed_ids(tokenizer)
    planned = plan.Plan(tiny, args)
    beside_the_model = planned.evaluation(prompts, prefix) - planned.size()

    model = ours(tiny, torch.float32)

    def generate() -> None:
        known = data.num_known_ids(tokenizer)
        evaluation.generate(model, prompts, prefix, 24, known, is_finished=lambda ids: False)

    assert beside_the_model == pytest.approx(measure(generate), rel=0.02)


def test_the_prompts_of_an_evaluation_are_those_that_it_begins_with(tokenizer, rows, monkeypatch):
    batches = []

    def predict(model, tokenizer, prompts, settings):
        batches.append(prompts)
        return [{"prediction": 0, "scores": [1.0, 0.0, 0.0]} for _ in prompts]

    monkeypatch.setattr(evaluation, "predict", predict)
    evaluation.evaluate(torch.nn.Module(), tokenizer, rows, evaluation.Settings())
    assert plan.first_prompts(rows, tokenizer, None) == batches[0]
    assert len(batches[0]) == 64


def test_the_longest_rows_are_those_with_the_most_tokens(tokenizer, rows):
    encoded = plan.longest_rows(rows, tokenizer, 8, None)
    lengths = sorted((len(data.encode(row, tokenizer)[0]) for row in rows), reverse=True)
    assert [len(prompt) for prompt, _ in encoded] == lengths[:8]


def check_sum(printed: str) -> float:
    """Returns the sum in MiB of the step that was printed, once it has been added up."""
    lines = printed[printed.index("base weights") :].splitlines()
    names = [line[:32].rstrip() for line in lines]
    end = names.index("sum") + 1
    assert names[end - 3 : end] == ["activations", "temporary, at the peak", "sum"]
    assert names[end].startswith("evaluation, ")
    lines = lines[:end]
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
    command += ("--eval-limit", 4, "--max-new-tokens", 1)

    def total(*flags) -> float:
        in_process(plan, *command, "--dtype", "bf16", *flags)
        printed = capsys.readouterr().out
        is_assumed = "cuda" in flags and "--keep-dequantized" not in flags
        assert printed.startswith("with --no-keep-dequantized") == is_assumed
        return check_sum(printed)

    base = total("--device", "cpu")
    assert total("--device", "cpu", "--batch-size", 64) > 3 * base
    assert total("--device", "cpu", "--checkpointing") < 0.5 * base
    # A GPU that is not here: its fused attention stores no scores.
    on_gpu = total("--device", "cuda")
    assert on_gpu < base
    assert total("--device", "cuda", "--checkpointing") < 0.8 * on_gpu
    # Attention is computed again there; where NF4's values are kept, nothing is.
    kept = total("--device", "cuda", "--keep-dequantized")
    assert total("--device", "cuda", "--keep-dequantized", "--checkpointing") < 0.6 * kept
    assert not run.exists()


@pytest.fixture
def phi_2_of_4_layers(tiny, tmp_path):
    """A directory with the sizes of phi-2, and without weights."""
    config = vars(phi2.Phi2Config(num_hidden_layers=4)) | {"model_type": "phi"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(tiny / "tokenizer.json", tmp_path)
    return tmp_path


def test_a_plan_for_a_card_says_what_is_taken_there(phi_2_of_4_layers, capsys):
    command = ("--model", phi_2_of_4_layers, "--dataset", "tiny/data", "--limit", 100, "--gpu")

    def printed(*words) -> list[str]:
        in_process(plan, *command, *words)
        return capsys.readouterr().out.splitlines()

    first, *lines = printed(24)
    assert ", nf4, bf16, on cuda: " in first
    assert lines[1].startswith("base weights, dequantised ")
    assert lines[-1].split() == ["for", "tensors,", "of", "24", "GB", "22,118.4", "MiB"]

    first, *lines = printed(1.6, "--dtype", "fp32")
    assert ", nf4, fp32, on cuda: " in first
    names = [line[:32].rstrip() for line in lines]
    assert "base weights, dequantised" not in names
    tried = [name for name in names if name.startswith("evaluation, ")]
    assert tried == [f"evaluation, {rows} rows at a time" for rows in (64, 32, 16)]
    assert lines[-1].startswith("a step does not fit; what helps: --checkpointing, or --batch-size")

    assert printed(0.5)[-1] == "an evaluation does not fit, not even of one row"


def test_a_plan_for_a_gpu_that_is_not_here_is_not_for_this_machine(monkeypatch):
    """This machine takes tiny/ where nothing is said, and fp32 if its CPU has no bf16."""

    def planned(*words) -> tuple:
        monkeypatch.setattr("sys.argv", ["plan.py", *words])
        args = plan.parse_arguments()
        return args.model, args.device, args.dtype

    assert planned("--device", "cuda") == ("microsoft/phi-2", "cuda", "bf16")
    assert planned("--gpu", "8") == ("microsoft/phi-2", "cuda", "bf16")
    assert planned("--gpu", "8", "--dtype", "fp32")[2] == "fp32"
    assert planned("--device", "cpu")[:2] == ("tiny/model", "cpu")
    with pytest.raises(SystemExit):
        planned("--gpu", "8", "--device", "cpu")
