"""train.py: what a run does, what it leaves, and that it trains what it says."""

import io
import itertools
import json
import math
import re
import shutil
import signal
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, distance, in_process, ours, read_json, reference, script
from safetensors.torch import load_file

import data
import eval as evaluation
import lora
import train
from support import files, loss_scale, resume, runlog
from support.examples import load_examples

TINY = ("--model", "tiny/model", "--dataset", "tiny/data")
SHORT = ("--eval-limit", 4, "--max-new-tokens", 1)
SPLITS = ("validation_matched", "validation_mismatched")


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -----------------------------------------------------------------------------
# A real run

ROWS = 60  # evaluated of each split
STEPS = 150
TOKENS = 4  # written to each prompt


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """The demo's flags with fewer steps and rows, as a user runs them.

    Returns the run's folder, and what it printed.
    """
    out = tmp_path_factory.mktemp("finished") / "run"
    less = ["--steps", STEPS, "--batch-size", 8, "--eval-limit", ROWS, "--max-new-tokens", TOKENS]
    done = script("train.py", "@tiny/args", "--rank", 8, *less, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def run(finished) -> Path:
    return finished[0]


def test_a_run_leaves_what_the_readme_lists(run):
    by_split = [f"baseline_{split}.jsonl" for split in SPLITS]
    by_split += [f"predictions_{split}.jsonl" for split in SPLITS]
    assert {path.name for path in run.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "args.json",
        "loss.png",
        "loss.svg",
        "metrics.jsonl",
        "report.html",
        "results.json",
        "trainer.safetensors",
        *by_split,
    }


def test_a_run_learns_and_prints_what_it_has_learned(finished):
    out, printed = finished
    lines = [line for line in read_rows(out / "metrics.jsonl") if "loss" in line]
    # Each step at first, when the loss falls fast
    assert [line["step"] for line in lines] == [*range(1, 11), *range(20, 101, 10), 150]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert all(line["examples_per_second"] > 0 for line in lines)
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    for split, finetuned in read_json(out / "results.json")["finetuned"].items():
        assert f"{finetuned['accuracy']:.4f}" in printed, split


def test_a_run_teaches_the_base_to_answer(run):
    results = read_json(run / "results.json")
    for split in SPLITS:
        baseline = results["baseline"][split]
        finetuned = results["finetuned"][split]
        assert baseline["n"] == finetuned["n"] == ROWS
        # The base writes no number. Who always gives the same answer has a third right.
        assert baseline["accuracy"] < 0.3
        assert finetuned["accuracy"] > 0.4
        assert baseline["unparsed"] > ROWS / 2
        assert finetuned["unparsed"] == 0
        assert finetuned["loss"] < 0.1 * baseline["loss"]


def test_the_predictions_are_those_that_results_json_counts(run):
    results = read_json(run / "results.json")
    for split in SPLITS:
        rows = read_rows(run / f"predictions_{split}.jsonl")
        correct = 0
        for row in rows:
            assert row["prediction"] == data.parse(row["completion"])
            correct += row["prediction"] == row["label"]
        assert len(rows) == ROWS
        assert results["finetuned"][split]["correct"] == correct
        assert results["finetuned"][split]["accuracy"] == pytest.approx(correct / ROWS)


def test_args_json_holds_every_argument_and_where_it_ran(run):
    record = read_json(run / "args.json")
    assert (record["model"], record["dataset"]) == ("tiny/model", "tiny/data")
    assert (record["rank"], record["alpha"], record["targets"]) == (8, 16, ["q_proj", "v_proj"])
    assert (record["steps"], record["batch_size"], record["learning_rate"]) == (STEPS, 8, 0.003)
    assert record["residual_dropout"] == 0.0  # config.json says so
    assert torch.__version__.startswith(record["versions"]["torch"])  # without +cu128
    assert record["processes"] == 1


def test_eval_gives_the_accuracy_that_the_run_reported(run, tmp_path):
    same = ["--limit", ROWS, "--max-new-tokens", TOKENS]
    in_process(evaluation, "--adapter", run, *same, "--out", tmp_path / "again")
    reported = read_json(run / "results.json")
    again = read_json(tmp_path / "again" / "results.json")
    assert again["protocol"] == reported["protocol"]
    assert (again["adapter"], again["quant"], again["dtype"]) == (str(run), "nf4", "bf16")
    for split in SPLITS:
        expected = reported["finetuned"][split]
        del expected["loss"]  # how long a training would go on is no question for eval.py
        assert again["finetuned"][split] == expected


def test_peft_answers_as_we_do_with_the_runs_adapter(run, tiny):
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(reference(tiny, torch.bfloat16, "nf4"), run)
    theirs.train()  # see conftest.reference
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokenizer = data.load_tokenizer(tiny)
    agreed = 0
    rows = read_rows(run / "predictions_validation_matched.jsonl")[:40]
    for row in rows:
        ids = torch.tensor([tokenizer.encode(row["prompt"]).ids])
        with torch.no_grad():
            shares = theirs(ids).logits[0, -1].float().softmax(dim=0)
        best, second = shares.topk(2).values
        # In bf16, whose numbers have 8 bits, an answer may differ, but only of two that are close.
        if best - second > 0.05:
            assert tokenizer.decode([shares.argmax().item()]) == row["completion"][:2]
            agreed += 1
    assert agreed > 20


def test_an_adapter_of_another_model_is_refused(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(read_json(path) | {"target_modules": ["fc1"]}))
    with pytest.raises(SystemExit) as stopped:
        in_process(evaluation, "--adapter", copy, "--limit", 4)
    name = "base_model.model.model.layers.0.mlp.fc1.lora_A.weight"
    assert f"lacks tensors: 12, among them {name}" in stopped.value.code


@pytest.mark.parametrize("has_adapter", [False, True], ids=["base", "adapter"])
def test_answers_are_those_of_all_32_tokens_though_most_rows_stop_early(run, tiny, has_adapter):
    model = ours(tiny, torch.float32, "nf4")
    if has_adapter:
        lora.load_adapter(model, run)
    model.eval()
    tokenizer = data.load_tokenizer(tiny)
    prefix, _, _ = data.fixed_ids(tokenizer)
    rows = load_examples("tiny/data", "validation_matched", 60)
    prompts = [data.encode(row, tokenizer)[0] for row in rows]
    answers = evaluation.complete(model, tokenizer, prompts, 32)
    whole, _ = evaluation.generate(
        model, prompts, prefix, 32, tokenizer.get_vocab_size(), is_finished=lambda ids: False
    )
    texts = tokenizer.decode_batch(whole, skip_special_tokens=False)
    for answer, written in zip(answers, texts, strict=True):
        text = written.partition(data.EOS)[0]
        assert answer["prediction"] == data.parse(text)
        assert text.startswith(answer["completion"])


def test_scores_are_the_softmax_of_the_references_three_logits(tiny):
    model = ours(tiny, torch.float32)
    theirs = reference(tiny, torch.float32)
    tokenizer = data.load_tokenizer(tiny)
    _, answers, _ = data.fixed_ids(tokenizer)
    rows = load_examples("tiny/data", "validation_matched", 30)
    protocol = evaluation.Settings("score", batch_size=7)
    statistics, predictions = evaluation.evaluate(model, tokenizer, rows, protocol)
    correct = 0
    for prediction, row in zip(predictions, rows, strict=True):
        ids = torch.tensor([tokenizer.encode(prediction["prompt"]).ids])
        with torch.no_grad():
            logits = theirs(ids).logits[0, -1, answers]
        assert prediction["scores"] == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)
        assert prediction["prediction"] == logits.argmax().item()
        assert prediction["label"] == row["label"]
        correct += prediction["prediction"] == row["label"]
    assert statistics["correct"] == correct


# -----------------------------------------------------------------------------
# A step


def test_the_learning_rate_is_transformers_cosine_after_a_warm_up_without_a_step_at_zero():
    from transformers import get_cosine_schedule_with_warmup

    steps = 100
    warmup = 10
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    theirs = []
    for _ in range(steps):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    mine = [train.schedule(step, steps, warmup) for step in range(steps)]
    assert mine[warmup:] == pytest.approx(theirs[warmup:], abs=1e-12)
    assert mine[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert max(mine) == 1
    assert train.schedule(steps, steps, warmup) == pytest.approx(0)


@pytest.mark.parametrize("steps, warmup", [(1, 0), (16, 0), (17, 1), (100, 3), (40_000, 1200)])
def test_the_warm_up_is_3_percent_of_the_steps_unless_it_is_given(steps, warmup):
    for step in (0, 1, warmup, steps // 2, steps - 1):
        expected = train.schedule(step, steps, warmup)
        assert train.schedule(step, steps, None) == expected
    assert train.schedule(0, steps, None) > 0


def test_accumulated_batches_train_what_one_batch_trains(tmp_path):
    """Ragged batches: a mean of the batches' means would differ in the second digit."""
    flags = ["--dtype", "fp32", "--dropout", 0, "--loss", "full", "--learning-rate", 1e-3]
    flags += ["--steps", 3, *SHORT]
    one = tmp_path / "one"
    four = tmp_path / "four"
    in_process(train, *TINY, *flags, "--batch-size", 8, "--out", one)
    in_process(train, *TINY, *flags, "--batch-size", 2, "--accumulate", 4, "--out", four)
    found = load_file(four / "adapter_model.safetensors")
    for key, expected in load_file(one / "adapter_model.safetensors").items():
        assert expected.norm() > 0  # B has left zero
        # Adam divides by its second moment, which magnifies fp32's rounding.
        assert distance(found[key], expected) < 1e-4, key


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(tmp_path):
    def adapter(name: str, *flags) -> dict:
        out = tmp_path / name
        in_process(train, *TINY, "--steps", 2, "--batch-size", 4, *SHORT, *flags, "--out", out)
        return load_file(out / "adapter_model.safetensors")

    first = adapter("first", "--seed", 1)
    same = adapter("same", "--seed", 1, "--eval-every", 1)  # which draws nothing
    other = adapter("other", "--seed", 2)
    for key, tensor in first.items():
        assert torch.equal(tensor, same[key])
        assert not torch.equal(tensor, other[key])


def loss_by_hand(model, rows, loss: str) -> float:
    """The mean of train.batch_loss over all targets, row by row and without a shared prefix."""
    tokenizer = data.load_tokenizer(ROOT / "tiny" / "model")
    total = 0.0
    targets = 0
    for row in rows:
        batch = data.collate([data.encode(row, tokenizer)], 0, loss)
        with torch.no_grad():
            total += train.batch_loss(model, batch).item()
        targets += len(batch.next_ids)
    return total / targets


@pytest.mark.parametrize("loss", ["answer", "full"])
def test_a_step_on_either_loss_and_on_all_layers(tmp_path, tiny, loss):
    """And the validation loss is the loss that is trained."""
    out = tmp_path / "run"
    flags = ["--loss", loss, "--targets", "all-linear", "--quant", "none", "--dtype", "fp32"]
    flags += ["--steps", 2, "--batch-size", 3, "--eval-every", 1, *SHORT]
    in_process(train, *TINY, *flags, "--out", out)
    tensors = load_file(out / "adapter_model.safetensors")
    assert len(tensors) == 2 * 6 * 6  # A and B for 6 layers in each of 6 blocks
    evaluated = [line for line in read_rows(out / "metrics.jsonl") if "loss" not in line]
    assert [line["step"] for line in evaluated] == [0, 1, 2]

    model = ours(tiny, torch.float32)
    for split in SPLITS:
        rows = load_examples("tiny/data", split, 4)
        # Rounding apart: these rows are summed one by one.
        expected = pytest.approx(loss_by_hand(model, rows, loss), rel=1e-5)
        assert evaluated[0][f"{split}_loss"] == expected
    lora.load_adapter(model, out)
    model.eval()
    results = read_json(out / "results.json")
    for split in SPLITS:
        rows = load_examples("tiny/data", split, 4)
        expected = pytest.approx(loss_by_hand(model, rows, loss), rel=1e-5)
        assert evaluated[2][f"{split}_loss"] == results["finetuned"][split]["loss"] == expected
        assert evaluated[2][f"{split}_loss"] != evaluated[0][f"{split}_loss"]


def test_a_feed_prepares_the_rows_of_each_step_and_counts_the_step_before(tiny):
    """Ten rows, four a step, from the second step on: three steps, of which the first has two."""
    rows = load_examples("tiny/data", "train", 10)
    args = Namespace(batch_size=3, loss="answer", share_prefix=True, max_length=None, seed=0)
    tokenizer = data.load_tokenizer(tiny)
    inputs = Namespace(train=rows, tokenizer=tokenizer)
    progress = resume.Progress(step=2)
    state = Namespace(rows_per_step=4, steps=5, progress=progress)
    device = torch.device("cpu")
    feed = train.Feed(args, inputs, state, loss_scale.new_scaler("fp32", device), device)
    expected = itertools.islice(data.rows_of_steps(rows, size=4, seed=0), 2, 5)
    taken = 0
    for number, step in enumerate(expected, 1):
        assert feed.current.rows == step
        assert [len(batch.lengths) for batch in feed.current.batches] in ([2], [3, 1])
        assert feed.num_predicted == 2 * len(step)  # the label and the end of text of each row
        taken += len(step)
        feed.prepare_next()
        loss, norm = torch.tensor([0.5, 0.25])
        numbers = feed.finish_step(progress.step, loss, norm, number == 2)
        assert (numbers.grad_norm, numbers.stops) == (0.25, number == 2)
        progress.add(numbers)
        assert (progress.step, progress.rows, progress.loss) == (2 + number, taken, number / 2)
    assert feed.current.rows == feed.current.batches == []
    assert feed.num_predicted == 0


def test_the_loss_that_a_run_reports_is_the_mean_over_the_targets_of_its_steps(tmp_path, tiny):
    """At a learning rate at which nothing changes, so that the base gives all of the losses."""
    out = tmp_path / "run"
    flags = ["--dtype", "fp32", "--quant", "none", "--dropout", 0, "--learning-rate", 1e-30]
    flags += ["--limit", 6, "--steps", 2, "--batch-size", 2, "--accumulate", 2, *SHORT]
    flags += ["--log-every", 2]
    in_process(train, *TINY, *flags, "--out", out)
    reported = [line["loss"] for line in read_rows(out / "metrics.jsonl") if "loss" in line]

    model = ours(tiny, torch.float32)
    steps = data.rows_of_steps(load_examples("tiny/data", "train", 6), size=4, seed=0)
    losses = [loss_by_hand(model, next(steps), "answer") for _ in range(2)]  # of 4 rows, and of 2
    assert reported == [pytest.approx(sum(losses) / 2, rel=1e-5)]


def test_an_evaluation_takes_no_part_of_a_lines_time_and_none_of_it_is_lost(tmp_path):
    log = runlog.RunLog(Namespace(out=tmp_path, dtype="bf16"), None, torch.device("cpu"))
    log.file = io.StringIO()
    started = time.perf_counter()
    log.start_clock()
    time.sleep(0.05)  # training
    log.stop_clock()
    time.sleep(0.2)  # an evaluation
    log.start_clock()
    time.sleep(0.05)  # training
    log.write_training(resume.Progress(step=20, logged=10, rows=40), 1e-3, 1.0)
    whole = time.perf_counter() - started
    line = json.loads(log.file.getvalue())
    assert 0.1 <= line["seconds"] <= whole - 0.2
    assert line["examples_per_second"] == pytest.approx(40 / line["seconds"])


def test_the_rows_before_a_resume_make_no_line_faster(tmp_path):
    """Of 10 steps 8 were taken before a Ctrl-C, in a time that nothing has saved."""
    rates = []
    for before in (0, 32):
        log = runlog.RunLog(Namespace(out=tmp_path, dtype="bf16"), None, torch.device("cpu"))
        log.file = io.StringIO()
        log.untimed = before
        log.start_clock()
        time.sleep(0.2 * (40 - before) / 40)
        log.write_training(resume.Progress(step=20, logged=10, rows=40), 1e-3, 1.0)
        line = json.loads(log.file.getvalue())
        assert line["seconds"] == pytest.approx(40 / line["examples_per_second"])
        rates.append(line["examples_per_second"])
        assert log.untimed == 0
    assert rates[1] == pytest.approx(rates[0], rel=0.5)


def test_a_resumed_run_knows_which_rows_were_taken_before(tmp_path, monkeypatch):
    out = tmp_path / "run"
    flags = ["--steps", 5, "--batch-size", 2, "--log-every", 4, *SHORT, "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(train.StopRequest, "__bool__", lambda stop: True)  # after its first step
        in_process(train, *TINY, *flags)
    seen = []
    write = runlog.RunLog.write_training

    def write_and_see(log, progress, *others):
        seen.append((log.untimed, progress.rows))
        write(log, progress, *others)

    monkeypatch.setattr(runlog.RunLog, "write_training", write_and_see)
    in_process(train, "--resume", out)
    assert seen == [(2, 8), (0, 2)]


# -----------------------------------------------------------------------------
# The script


def test_epochs_count_rows(tmp_path, capsys):
    flags = ["--limit", 10, "--batch-size", 4, "--epochs", 1.5, *SHORT]
    in_process(train, *TINY, *flags, "--out", tmp_path / "run")
    assert "10 rows, 5 steps of 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "epochs, steps, rows, expected",
    [
        (None, 7, 10, 7),
        (1.0, None, 8, 2),
        (1.0, None, 9, 3),  # the last step has one row
        (2.0, None, 9, 6),
        (0.1, None, 9, 1),
    ],
)
def test_the_last_step_of_an_epoch_may_be_smaller(epochs, steps, rows, expected):
    assert train.count_steps(Namespace(epochs=epochs, steps=steps), rows, 4) == expected


def test_prompts_that_are_cut_are_counted(tmp_path, capsys, tiny):
    longest = 75
    tokenizer = data.load_tokenizer(tiny)
    rows = load_examples("tiny/data", "train", 12)
    lengths = [sum(map(len, data.encode(row, tokenizer))) for row in rows]
    too_long = sum(length > longest for length in lengths)
    assert 0 < too_long < 12
    flags = ["--limit", 12, "--epochs", 2, "--batch-size", 5, "--max-length", longest, *SHORT]
    in_process(train, *TINY, *flags, "--out", tmp_path / "run")
    printed = capsys.readouterr().out
    assert f"\n{2 * too_long} prompts were cut to --max-length {longest}\n" in printed
    line = rf"\n\d+ prompts of validation_matched are cut to --max-length {longest}\n"
    assert re.search(line, printed)


def test_a_hypothesis_that_is_too_long_alone_is_trained_on_and_counted(tmp_path, tiny):
    """It ended the training at the step that met it, and each resume."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = list(load_examples("tiny/data", "train", 8))
    rows[2] |= {"hypothesis": "Anna bought a flower. " * 30}
    for split in ("train", "dev"):
        files.write_lines(folder / f"{split}.jsonl", rows)
    flags = ["--epochs", 2, "--batch-size", 4, *SHORT, "--max-length", 128]
    in_process(train, *TINY, *flags, "--dataset", folder, "--out", tmp_path / "run")
    results = read_json(tmp_path / "run" / "results.json")
    assert results["rows"]["train"]["cut"] == 2
    assert results["baseline"]["validation"]["cut"] == 1
    assert results["finetuned"]["validation"]["cut"] == 1


def test_ctrl_c_ends_the_step_and_saves_the_adapter_so_far(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    batch_loss = train.batch_loss
    calls = 0

    def interrupted_in_step_3(model, batch):
        nonlocal calls
        calls += 1
        if calls == baseline + 3:
            signal.raise_signal(signal.SIGINT)
        return batch_loss(model, batch)

    baseline = 2 * 2  # batches of the evaluation before: two splits of 4 rows
    monkeypatch.setattr(train, "batch_loss", interrupted_in_step_3)
    flags = ["--steps", 9, "--batch-size", 2, "--learning-rate", 1e-3, *SHORT]
    in_process(train, *TINY, *flags, "--out", out)
    printed = capsys.readouterr().out
    last = printed.splitlines()[-1]
    assert last == (
        f"stopped and saved after step 3 of 9; to resume: python train.py --resume {out}"
    )
    shown = (out / "report.html").read_text()
    assert "Step 3 of 9" in shown
    assert "http-equiv" not in shown, "it would be read again and again"
    saved = resume.load(out)
    assert saved.state.progress.step == 3
    for key, tensor in load_file(out / "adapter_model.safetensors").items():
        assert torch.equal(tensor, saved.tensors["adapter." + key.removeprefix(lora.PEFT_PREFIX)])
    in_process(evaluation, "--adapter", out, "--limit", 4, "--mode", "score")


def test_without_a_gpu_and_without_a_model_the_embedded_one_is_taken_from_anywhere(tmp_path):
    command = [ROOT / "train.py", "--rank", 8, "--steps", 1, *SHORT]
    done = script(*command, cwd=tmp_path, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert "no CUDA device and no --model: taking tiny/args" in done.stderr
    assert "--model microsoft/phi-2" in done.stderr
    (out,) = (tmp_path / "out").iterdir()
    assert out.name.startswith("model-data-r8-")
    record = read_json(out / "args.json")
    assert record["learning_rate"] == 0.003
    assert record["batch_size"] == 32
    assert record["steps"] == 1


# -----------------------------------------------------------------------------
# Weights & Biases


def test_weights_and_biases_is_offline_without_a_login_and_one_run_when_resumed(tmp_path):
    out = tmp_path / "run"
    flags = ["--steps", 2, "--batch-size", 4, "--eval-every", 1, *SHORT, "--wandb"]
    no_login = {
        "NETRC": str(tmp_path / "netrc"),
        "WANDB_CONFIG_DIR": str(tmp_path / "config"),
        "WANDB_API_KEY": "",
        "WANDB_SILENT": "true",
    }
    chosen = {"WANDB_PROJECT": "my-thesis", "WANDB_NAME": "run-7", "WANDB_TAGS": "a,b"}
    done = script("train.py", *TINY, *flags, "--out", out, env=no_login | chosen)
    assert done.returncode == 0, done.stderr
    assert "W&B: not logged in, so this run is kept offline" in done.stdout

    wanted = {}
    for line in read_rows(out / "metrics.jsonl"):  # W&B joins what is logged for one step
        wanted.setdefault(line.pop("step"), {}).update(line)
    (file,) = (out / "wandb").glob("offline-run-*/run-*.wandb")
    (described,) = wandb_records(file, "run")
    assert (described.project, described.display_name) == ("my-thesis", "run-7")
    assert set(described.tags) == {"a", "b"}
    history = [history_row(record.item) for record in wandb_records(file, "history")]
    assert [row["_step"] for row in history] == list(wanted) == [0, 1, 2]
    for row, line in zip(history, wanted.values()):
        assert numbers_in(row) == line

    check_that_a_resume_is_the_same_run(out, file.name, no_login)


def check_that_a_resume_is_the_same_run(out: Path, name: str, no_login: dict) -> None:
    """WANDB_MODE=online without a key is offline too. Nobody says again what it is called."""
    online = no_login | {"WANDB_MODE": "online"}
    command = read_json(out / "args.json")["command"]
    assert command.startswith("python train.py --model ")
    done = script("train.py", "--resume", out, "--steps", 3, env=online)
    assert done.returncode == 0, done.stderr
    assert read_json(out / "args.json")["command"] == command
    assert "W&B: not logged in, so this run is kept offline" in done.stdout
    parts = list((out / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [path.name for path in parts] == [name, name]
    for part in parts:
        (described,) = wandb_records(part, "run")
        assert (described.project, described.display_name) == ("my-thesis", "run-7")


def test_where_weights_and_biases_refuses_a_key_the_run_is_kept_offline(
    tmp_path, monkeypatch, capsys
):
    import wandb

    def refuse(prompt: bool) -> bool:  # a real refusal takes 12 seconds
        raise wandb.errors.AuthenticationError("no network")

    monkeypatch.setattr(wandb, "login", refuse)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    identity = runlog.wandb_identity(tmp_path, {})
    runlog.start_wandb(tmp_path, {"wandb_run": identity}).finish()
    assert "W&B: no network, so this run is kept offline" in capsys.readouterr().out
    assert len(list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))) == 1


def test_weights_and_biases_variables_win_over_what_was_saved_and_that_over_the_defaults(
    monkeypatch, tmp_path
):
    for variable in runlog.IDENTITY.values():
        monkeypatch.delenv(variable, raising=False)
    run = tmp_path / "run"
    new = runlog.wandb_identity(run, {})
    assert (new["project"], new["name"]) == ("flora", "run")
    assert new["id"] != runlog.wandb_identity(run, {})["id"]
    saved = {"id": "an-id", "project": "my-thesis", "name": "run-7", "entity": "my-team"}
    assert runlog.wandb_identity(run, saved) == saved
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    monkeypatch.setenv("WANDB_ENTITY", "their-team")
    found = runlog.wandb_identity(run, saved)
    assert found == saved | {"id": "another", "entity": "their-team"}


def numbers_in(row: dict) -> dict:
    """Returns what a line of W&B holds besides its own entries."""
    return {key: value for key, value in row.items() if not key.startswith("_")}


BLOCK = 32768  # bytes, of LevelDB's log format
HEAD = 7  # bytes: checksum (4), length (2), kind (1); the file itself begins with as many
WHOLE = 1  # kinds of a piece: a record, or the first, a middle, or the last part of one
LAST = 4


def wandb_records(path: Path, field: str) -> list:
    """Returns the "run" or the "history" records of an offline run.

    They are protobuf in LevelDB's log format.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    records = []
    parts = b""
    place = HEAD
    while place + HEAD <= len(content):
        left_in_block = BLOCK - place % BLOCK
        if left_in_block < HEAD:  # no room for another head: the rest of the block is empty
            place += left_in_block
            continue
        length = int.from_bytes(content[place + 4 : place + 6], "little")
        kind = content[place + 6]
        place += HEAD
        parts += content[place : place + length]
        place += length
        if kind in (WHOLE, LAST):
            record = Record.FromString(parts)
            parts = b""
            if record.HasField(field):
                records.append(getattr(record, field))
    return records


def history_row(items) -> dict:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


# -----------------------------------------------------------------------------
# LoRA alone


def test_lora_wraps_any_linear_layer():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7, bias=False))
    assert lora.inject(model, lora.LoRAConfig(rank=2, targets=("0",))) == ["0"]
    assert model(torch.randn(3, 5)).shape == (3, 7)
