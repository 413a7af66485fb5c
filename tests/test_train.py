"""train.py and eval.py as a user runs them: what a run does, what it leaves, and one clear line for every mistake."""
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, distance, in_process, read_json, reference, script
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import lora
import train

TINY = ["--model", "tiny/model", "--dataset", "tiny/data"]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The demo's flags, fewer steps and rows: a real run in a process of its own, and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = script("train.py", "@tiny/args", "--rank", 8, "--steps", 100, "--eval-limit", 200, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_run_learns_and_leaves_what_the_readme_lists(finished):
    out, printed = finished
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "args.json", "metrics.jsonl", "results.json", "trainer.safetensors",
        "predictions_validation_matched.jsonl", "predictions_validation_mismatched.jsonl", "baseline_validation_matched.jsonl",
        "baseline_validation_mismatched.jsonl", "loss.png", "confusion.png", "calibration.png", "report.html", "README.md"}
    lines = [line for line in metrics(out) if "loss" in line]
    assert [line["step"] for line in lines] == [50, 100]
    assert all(math.isfinite(line["loss"]) and line["examples_per_second"] > 0 for line in lines)
    assert lines[1]["loss"] < 0.8 * lines[0]["loss"]
    results = read_json(out / "results.json")
    for split in ("validation_matched", "validation_mismatched"):
        baseline, tuned = results["baseline"][split], results["finetuned"][split]
        assert baseline["n"] == tuned["n"] == 200 and baseline["accuracy"] < 0.3 < tuned["accuracy"] - 0.1
        assert baseline["unparsed"] > 100 and tuned["unparsed"] == 0
        rows = [json.loads(line) for line in (out / f"predictions_{split}.jsonl").read_text().splitlines()]
        assert [data.parse(row["completion"]) for row in rows] == [row["prediction"] for row in rows]
        assert sum(row["prediction"] == row["label"] for row in rows) == tuned["correct"] == round(200 * tuned["accuracy"])
        assert f"{tuned['accuracy']:.4f}" in printed


def test_args_json_holds_every_argument_and_where_it_ran(finished):
    record = read_json(finished[0] / "args.json")
    assert (record["model"], record["dataset"], record["rank"], record["steps"], record["alpha"]) == ("tiny/model", "tiny/data", 8, 100, 16)
    assert record["residual_dropout"] == 0.0 and record["versions"]["torch"] == torch.__version__


def test_eval_gives_the_accuracy_that_the_run_reported(finished, tmp_path):
    in_process(evaluation, "--adapter", finished[0], "--limit", 200, "--out", tmp_path / "again")
    expected = read_json(finished[0] / "results.json")
    found = read_json(tmp_path / "again" / "results.json")
    assert found["finetuned"] == expected["finetuned"] and found["protocol"] == expected["protocol"]


def test_peft_answers_as_we_do_with_the_runs_adapter(finished, tiny):
    from peft import PeftModel
    theirs = PeftModel.from_pretrained(reference(tiny, torch.bfloat16, "nf4"), finished[0]).train()
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokenizer = data.load_tokenizer(tiny)
    rows = [json.loads(line) for line in (finished[0] / "predictions_validation_matched.jsonl").read_text().splitlines()][:40]
    agreed = 0
    for row in rows:
        with torch.no_grad():
            logits = theirs(torch.tensor([tokenizer.encode(row["prompt"]).ids])).logits[0, -1]
        agreed += tokenizer.decode([int(logits.argmax())]) == row["completion"][:2]
    assert agreed >= 39  # in bf16 one near tie may fall otherwise


def test_without_a_gpu_and_without_a_model_the_embedded_one_is_taken_from_anywhere(tmp_path):
    done = script(ROOT / "train.py", "--rank", 8, "--steps", 1, "--eval-limit", 20, "--max-new-tokens", 2, cwd=tmp_path, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert "no CUDA device and no --model: taking tiny/args" in done.stderr and "--model microsoft/phi-2" in done.stderr
    (out,) = (tmp_path / "out").iterdir()
    assert out.name.startswith("model-data-r8-")
    record = read_json(out / "args.json")
    assert (record["learning_rate"], record["batch_size"], record["steps"]) == (0.003, 32, 1)


def test_accumulated_batches_train_what_one_batch_trains(tmp_path):
    """Ragged batches: a mean of the batches' means would differ in the second digit."""
    adapters = []
    for name, size, accumulate in (("one", 8, 1), ("four", 2, 4)):
        in_process(train, *TINY, "--dtype", "fp32", "--dropout", 0, "--loss", "full", "--no-share-prefix", "--batch-size", size, "--accumulate", accumulate,
             "--steps", 3, "--learning-rate", 1e-3, "--eval-limit", 8, "--max-new-tokens", 1, "--out", tmp_path / name)
        adapters.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    for key, expected in adapters[0].items():
        if "lora_B" in key:
            assert expected.norm() > 0
        assert distance(adapters[1][key], expected) < 1e-4, key  # Adam divides by its second moment, which magnifies fp32's rounding


def test_the_learning_rate_is_transformers_cosine_after_a_warm_up_without_a_step_at_zero():
    from transformers import get_cosine_schedule_with_warmup
    steps, warmup = 100, 10
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    theirs = []
    for _ in range(steps):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    mine = [train.learning_rate(step, steps, warmup) for step in range(steps)]
    assert mine[warmup:] == pytest.approx(theirs[warmup:], abs=1e-12)
    assert mine[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11]) and max(mine) == 1 and train.learning_rate(steps, steps, warmup) == pytest.approx(0)


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(tmp_path):
    content = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        in_process(train, *TINY, "--seed", seed, "--steps", 2, "--batch-size", 4, "--eval-limit", 4, "--max-new-tokens", 1, "--out", tmp_path / name)
        content.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert content[0] == content[1] != content[2]


def test_weights_and_biases_is_offline_without_a_login_and_never_asks(tmp_path):
    done = script("train.py", *TINY, "--steps", 2, "--batch-size", 4, "--eval-limit", 4, "--max-new-tokens", 1, "--eval-every", 1, "--wandb", "--out", tmp_path / "run",
                  env={"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_API_KEY": "", "WANDB_SILENT": "true"})
    assert done.returncode == 0, done.stderr
    assert "W&B: not logged in, so this run is kept offline" in done.stdout
    file, = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    rows = wandb_history(file)
    wanted = {}
    for line in metrics(tmp_path / "run"):  # W&B joins what is logged for one step
        wanted.setdefault(line.pop("step"), {}).update(line)
    assert [row["_step"] for row in rows] == list(wanted) == [0, 1, 2]
    for row, line in zip(rows, wanted.values()):
        assert {key: row.get(key) for key in line} == line and {key for key in row if not key.startswith(("_", "results.")) and "_picture." not in key} == line.keys()
    assert rows[2]["results._type"] == "table-file" and rows[2]["results.nrows"] == 4
    assert all(rows[2][f"{name}_picture._type"] == "image-file" for name in ("loss", "confusion", "calibration"))


def wandb_history(path: Path) -> list[dict]:
    """What an offline run holds to be sent: records of protobuf in LevelDB's log format, in blocks of 32 KiB after a head of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record
    content, place, parts, rows = path.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no room for another head: the rest of the block is empty
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(content[place + 4:place + 6], "little"), content[place + 6]
        parts, place = parts + content[place + 7:place + 7 + length], place + 7 + length
        if kind in (1, 4):  # whole, or the last of its parts
            record, parts = Record.FromString(parts), b""
            if record.HasField("history"):
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
    return rows


@pytest.mark.parametrize("loss", ["answer", "full"])
def test_a_step_on_either_loss_and_on_all_layers(tmp_path, loss):
    in_process(train, *TINY, "--loss", loss, "--targets", "all-linear", "--quant", "none", "--steps", 2, "--batch-size", 4, "--eval-limit", 4, "--eval-every", 1,
         "--max-new-tokens", 1, "--out", tmp_path / "run")
    assert len(load_file(tmp_path / "run" / "adapter_model.safetensors")) == 2 * 6 * 6
    assert [line["step"] for line in metrics(tmp_path / "run") if "validation_matched_accuracy" in line] == [0, 1, 2]


def test_ctrl_c_ends_the_step_and_saves_the_adapter_so_far(tmp_path):
    command = [sys.executable, "train.py", *TINY, "--steps", "5000", "--batch-size", "2", "--eval-limit", "4", "--max-new-tokens", "1", "--learning-rate", "1e-3",
               "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "loss" not in process.stdout.readline():  # step 50 is reached
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped and saved after step" in output.splitlines()[-1] and "Traceback" not in errors
    assert f"python train.py --resume {tmp_path / 'run'}" in output.splitlines()[-1]
    in_process(evaluation, "--adapter", tmp_path / "run", "--limit", 4)


def test_a_run_is_not_written_over(finished):
    with pytest.raises(SystemExit) as stopped:
        in_process(train, *TINY, "--out", finished[0])
    assert "holds a run already" in stopped.value.code


def test_epochs_count_rows(tmp_path, capsys):
    in_process(train, *TINY, "--limit", 10, "--batch-size", 4, "--epochs", 1.5, "--eval-limit", 4, "--max-new-tokens", 1, "--out", tmp_path / "run")
    assert "10 rows, 5 steps of 4" in capsys.readouterr().out


# ---- One pair

def test_one_pair_is_answered_with_probabilities(finished, capsys):
    in_process(evaluation, "--adapter", finished[0], "--premise", "Anna bought a big red rose.", "--hypothesis", "Anna bought a red rose.")
    lines = capsys.readouterr().out.splitlines()
    assert "12/12 modules adapted" in lines[0] and lines[1].startswith("completion: ' ")
    probabilities = [float(line.split()[2]) for line in lines[2:5]]
    assert abs(sum(probabilities) - 1) < 1e-3 and lines[2 + probabilities.index(max(probabilities))].endswith("<-")


# ---- Generation and scoring

@pytest.mark.parametrize("adapter", [False, True], ids=["base", "adapter"])
def test_answers_are_those_of_all_32_tokens_though_most_rows_stop_early(finished, tiny, adapter):
    model, tokenizer = evaluation.load_model(tiny, "nf4", torch.float32, "cpu", keep=True).eval(), data.load_tokenizer(tiny)
    if adapter:
        lora.load_adapter(model, finished[0])
    examples = data.load_examples("tiny/data", "validation_matched", 200)
    _, predictions = evaluation.evaluate(model, tokenizer, examples)
    prompts = [data.encode(example, tokenizer)[0] for example in examples]
    whole = tokenizer.decode_batch(evaluation.generate(model, prompts, 32, tokenizer.token_to_id(data.EOS), tokenizer.get_vocab_size())[0], skip_special_tokens=False)
    assert [row["prediction"] for row in predictions] == [data.parse(text) for text in whole]
    assert all(text.startswith(row["completion"]) for row, text in zip(predictions, whole))


def test_scores_are_the_softmax_of_the_references_three_logits(tiny):
    model, tokenizer = evaluation.load_model(tiny, "none", torch.float32, "cpu"), data.load_tokenizer(tiny)
    examples = data.load_examples("tiny/data", "validation_matched", 30)
    result, predictions = evaluation.evaluate(model, tokenizer, examples, mode="score", batch_size=7)
    theirs = reference(tiny, torch.float32)
    for row, example in zip(predictions, examples):
        with torch.no_grad():
            logits = theirs(torch.tensor([tokenizer.encode(row["prompt"]).ids])).logits[0, -1, data.fixed_ids(tokenizer)[1]]
        assert row["scores"] == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)
        assert row["prediction"] == int(logits.argmax()) and row["label"] == example["label"]
    assert result["correct"] == sum(row["prediction"] == row["label"] for row in predictions)


# ---- Mistakes: one line, status 1, and what was there before stays

def broken_model(tmp_path, change) -> Path:
    directory = tmp_path / "broken"
    shutil.copytree(ROOT / "tiny" / "model", directory)
    change(directory)
    return directory


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


def reshape(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.2.mlp.fc1.weight"] = tensors["model.layers.2.mlp.fc1.weight"][:, :100].contiguous()
    save_file(tensors, directory / "model.safetensors")


def other_architecture(directory):
    path = directory / "config.json"
    path.write_text(json.dumps(read_json(path) | {"model_type": "llama"}))


def lose_a_shard(directory):
    index = {"metadata": {}, "weight_map": {key: "model-00001-of-00002.safetensors" for key in load_file(directory / "model.safetensors")}}
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def rows(*examples):
    def write(directory: Path) -> None:
        for split in ("train", "validation"):
            (directory / f"{split}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    return write


GOOD = {"premise": "Anna bought a dog.", "hypothesis": "Anna bought an animal.", "label": 0}
MISTAKES = {
    "no such model": (["--model", "no/such/model"], "no model directory 'no/such/model'"),
    "a shard not there": (lose_a_shard, "lists model-00001-of-00002.safetensors, which is not there"),
    "a truncated file": (truncate, "model.safetensors is damaged or cut short"),
    "a shape": (reshape, "model.layers.2.mlp.fc1.weight has shape (768, 100), config.json asks for (768, 192)"),
    "an architecture": (other_architecture, "model_type 'llama' is not supported"),
    "a target": (["--targets", "q_porj"], "target 'q_porj' matches no linear layer; there are dense, fc1, fc2, k_proj, lm_head, q_proj, v_proj; nearest: q_proj"),
    "no such dataset": (["--dataset", "no/such/data"], "no dataset directory 'no/such/data'"),
    "a column": (rows({"premise": "a", "label": 0}), "no column hypothesis"),
    "a label": (rows(GOOD, GOOD | {"label": 3}), "row 1: label 3 is not 0, 1, 2"),
    "an empty split": (rows(), "train.jsonl is empty"),
    "rank 0": (["--rank", "0"], "rank must be a whole number of at least 1, not 0"),
    "dropout 1": (["--dropout", "1"], "dropout must be at least 0 and below 1"),
    "a length": (["--max-length", "50"], "alone exceeds --max-length 50"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_lost(tmp_path, capsys, mistake):
    change, message = MISTAKES[mistake]
    arguments = list(change) if isinstance(change, list) else []
    if not isinstance(change, list):
        data_file = "column" in mistake or "label" in mistake or "split" in mistake
        if data_file:
            change(tmp_path)
            arguments = ["--dataset", tmp_path]
        else:
            arguments = ["--model", broken_model(tmp_path, change)]
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_model.safetensors").write_bytes(b"an earlier run's")
    with pytest.raises(SystemExit) as stopped:
        in_process(train, *TINY, "--steps", 1, "--eval-limit", 4, "--max-new-tokens", 1, "--out", out, *arguments)
    assert str(stopped.value.code).startswith("error: ") and message in stopped.value.code and "\n" not in stopped.value.code
    assert (out / "adapter_model.safetensors").read_bytes() == b"an earlier run's"


def test_a_mistake_ends_a_process_with_status_1_one_line_and_no_traceback(tmp_path):
    done = script("train.py", *TINY, "--rank", 0, "--out", tmp_path / "run")
    assert (done.returncode, done.stdout) == (1, "") and done.stderr == "error: rank must be a whole number of at least 1, not 0\n"
    done = script("train.py", *TINY, "--rank", 0, "--out", tmp_path / "run", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr
    done = script("eval.py", "--adapter", tmp_path)
    assert (done.returncode, done.stderr) == (1, f"error: {tmp_path} is not an adapter: it has no adapter_config.json\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, message", [(["--rnak", "8"], "unrecognized arguments: --rnak"), (["--steps", "0"], "--steps must be above 0"),
                                                (["--dtype", "fp64"], "invalid choice: 'fp64'"), (["--steps", "5", "--epochs", "1"], "not allowed with")])
def test_wrong_flags_end_with_status_2_and_say_which(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        in_process(train, *TINY, *arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_an_adapter_of_another_model_is_refused(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    path = tmp_path / "run" / "adapter_config.json"
    path.write_text(json.dumps(read_json(path) | {"target_modules": ["fc1"]}))
    with pytest.raises(SystemExit) as stopped:
        in_process(evaluation, "--adapter", tmp_path / "run", "--limit", 4)
    assert "lacks 12 tensors, among them base_model.model.model.layers.0.mlp.fc1.lora_A.weight" in stopped.value.code


def test_lora_wraps_any_linear_layer():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7, bias=False))
    assert lora.inject(model, lora.LoRAConfig(rank=2, targets=("0",))) == ["0"]
    assert model(torch.randn(3, 5)).shape == (3, 7)
