"""An evaluation that depends on nothing but the model, the prompt and the label."""
import io
import json
import shutil

import pytest
import torch
from conftest import ROOT, in_process, ours, read_json, script

import checkpoint
import data
import eval as evaluation
import lora
import train

TINY = ("--model", "tiny/model", "--dataset", "tiny/data")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An adapter of 60 steps: it ends its answers, and errs often enough."""
    out = tmp_path_factory.mktemp("run") / "run"
    done = script("train.py", *TINY, "--steps", 60, "--batch-size", 32, "--learning-rate", 3e-3, "--dtype", "fp32", "--eval-limit", 8, "--max-new-tokens", 2,
                  "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def examples():
    return data.load_examples("tiny/data", "validation_matched", 130)


def adapted(tiny, run, dtype):
    model = ours(tiny, dtype, "nf4")
    lora.load_adapter(model, run)
    return model.eval()


# What is promised, as evaluate says it. Measured on 1,000 rows: scores differ by 1e-6 in fp32, and by 0.015 in bf16, whose numbers
# have 8 bits: there an answer may change only where the two best are closer than that.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 0.05)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["generate", "score"])
def test_an_answer_depends_neither_on_the_batch_size_nor_on_its_neighbours(tiny, run, examples, dtype, tolerance, mode):
    model, tokenizer = adapted(tiny, run, dtype), data.load_tokenizer(tiny)
    found = {size: evaluation.evaluate(model, tokenizer, examples, mode, 4, size)[1] for size in (1, 7, 64)}
    found["alone"] = evaluation.evaluate(model, tokenizer, examples.select(range(100, 130)), mode, 4, 64)[1]  # other neighbours
    for size, rows in found.items():
        for row, expected in zip(rows, found[1][100:] if size == "alone" else found[1]):
            assert row["prompt"] == expected["prompt"] and row["scores"] == pytest.approx(expected["scores"], abs=tolerance)
            best, second = sorted(expected["scores"])[:0:-1]
            assert row["prediction"] == expected["prediction"] or best - second < tolerance and dtype == torch.bfloat16
    assert len({row["prediction"] for row in found[1]}) > 1, "one answer to all would prove little"


def test_the_loss_of_a_row_is_the_one_that_training_takes(tiny, run, examples):
    model, tokenizer = adapted(tiny, run, torch.float32), data.load_tokenizer(tiny)
    result, rows = evaluation.evaluate(model, tokenizer, examples, "generate", 4)
    for skip in (0, len(data.fixed_ids(tokenizer)[0])):
        encoded = [data.encode(example, tokenizer) for example in examples]
        with torch.no_grad():
            losses = [train.batch_loss(model, [row], skip, "answer")[0].item() / 2 for row in encoded]
        assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-4)
    assert result["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_both_modes_give_the_same_scores(tiny, run, examples):
    model, tokenizer = adapted(tiny, run, torch.float32), data.load_tokenizer(tiny)
    (written, first), (scored, second) = (evaluation.evaluate(model, tokenizer, examples, mode, 4) for mode in ("generate", "score"))
    assert [x for row in first for x in row["scores"]] == pytest.approx([x for row in second for x in row["scores"]], abs=2e-5)
    assert written["score_accuracy"] == scored["accuracy"] == scored["score_accuracy"]


# ---- The adapter's fingerprint

def test_the_adapter_says_what_it_was_trained_over(run, tiny):
    _, metadata = checkpoint.read_tensors(run / "adapter_model.safetensors")
    assert metadata["quantization"] == "nf4" and all(len(metadata[key]) == 16 for key in ("prompt", "tokenizer", "base_weights"))
    assert metadata["base_weights"] == ours(tiny, torch.bfloat16).fingerprint, "whatever the dtype"


@pytest.mark.parametrize("what", ["base weights", "tokenizer", "quantization", "prompt"])
def test_another_base_tokenizer_quantisation_or_prompt_is_named_and_force_goes_on(run, tiny, tmp_path, monkeypatch, capsys, what):
    from safetensors.torch import load_file, save_file
    shutil.copytree(tiny, tmp_path / "model")
    if what == "base weights":
        tensors = load_file(tmp_path / "model" / "model.safetensors")
        tensors["model.layers.2.mlp.fc1.weight"] += 0.01
        save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    elif what == "tokenizer":
        raw = read_json(tiny / "tokenizer.json")
        raw["model"]["vocab"] = {{"\u0120the": "\u0120thee"}.get(token, token): number for token, number in raw["model"]["vocab"].items()}
        raw["model"]["merges"] = [merge for merge in raw["model"]["merges"] if "\u0120the" not in ("".join(merge), *merge)]
        (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(raw))
    elif what == "prompt":
        monkeypatch.setattr(data, "PROMPT", data.PROMPT.replace("### Label:", "### Answer:"))
    command = ["--adapter", run, "--model", tmp_path / "model", "--limit", 4, "--max-new-tokens", 1, "--quant", "none" if what == "quantization" else "nf4"]
    with pytest.raises(SystemExit) as error:
        in_process(evaluation, *command)
    assert f"was trained with another {what}" in str(error.value) and " and another " not in str(error.value) and "--force" in str(error.value)
    in_process(evaluation, *command, "--force")
    assert "validation_matched" in capsys.readouterr().out


# ---- Rows from standard input, and another run to compare with

def test_json_lines_go_in_and_come_out_with_their_answers(run, examples, monkeypatch, capsys, tiny):
    given = [{"premise": row["premise"], "hypothesis": row["hypothesis"], "id": f"r{i}"} for i, row in enumerate(examples.select(range(10)))]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(json.dumps(row) + "\n" for row in given)))
    in_process(evaluation, "--adapter", run, "--dataset", "-", "--batch-size", 4)
    captured = capsys.readouterr()
    found = [json.loads(line) for line in captured.out.splitlines()]
    assert [{key: row[key] for key in ("premise", "hypothesis", "id")} for row in found] == given
    expected = evaluation.evaluate(adapted(tiny, run, torch.float32), data.load_tokenizer(tiny), examples.select(range(10)))[1]
    assert [(row["completion"], row["prediction"]) for row in found] == [(row["completion"], row["prediction"]) for row in expected]
    assert "modules adapted" in captured.err


@pytest.mark.parametrize("line, message", [("{", "line 2 of standard input is not JSON"), ("[]", "line 2 of standard input holds no JSON object"),
                                           ('{"premise": "a"}', "line 2 of standard input has no text as premise and hypothesis")])
def test_a_bad_line_is_named(monkeypatch, capsys, line, message):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"premise": "A.", "hypothesis": "B."}\n' + line + "\n"))
    with pytest.raises(SystemExit) as error:
        in_process(evaluation, "--model", "tiny/model", "--dataset", "-", "--batch-size", 1, "--max-new-tokens", 1)
    assert message in str(error.value) and len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("more, message", [(("--split", "validation"), "has no split 'validation'"), (("--compare", "nowhere"), "nowhere/predictions_validation_matched.jsonl is not there"),
                                           (("--dataset", "-", "--limit", 3), "rows come from standard input")])
def test_what_is_wrong_is_said_before_a_model_is_loaded(monkeypatch, capsys, more, message):
    monkeypatch.setattr(evaluation, "load_model", None)
    with pytest.raises(SystemExit) as stopped:
        in_process(evaluation, *TINY, *more)
    assert message in str(stopped.value) + capsys.readouterr().err


def test_an_evaluation_does_not_write_over_a_run(run):
    before = (run / "results.json").read_bytes()
    with pytest.raises(SystemExit, match="holds a run of train.py, whose results this would replace"):
        in_process(evaluation, "--adapter", run, "--limit", 2, "--out", run)
    assert (run / "results.json").read_bytes() == before


@pytest.mark.parametrize("device", ["gpu", "mps:7"] + ["cuda"] * (not torch.cuda.is_available()))
def test_a_device_that_is_not_there_is_one_line(device):
    with pytest.raises(SystemExit, match=f"error: --device {device}: ") as stopped:
        in_process(evaluation, *TINY, "--device", device)
    assert "\n" not in stopped.value.code


def test_a_run_finds_its_model_and_its_data_from_any_folder(run, tmp_path, capsys):
    in_process(evaluation, "--adapter", run, "--limit", 2)
    here = capsys.readouterr().out
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")  # the run was started with tiny/model, in a folder above it
    shutil.copytree(run, tmp_path / "out" / run.name)
    (tmp_path / "elsewhere").mkdir()
    in_process(evaluation, "--adapter", tmp_path / "out" / run.name, "--limit", 2, cwd=tmp_path / "elsewhere")
    assert capsys.readouterr().out.splitlines()[1:] == here.splitlines()[1:]


def test_compare_tests_two_runs_on_the_same_rows(run, tmp_path, capsys):
    in_process(evaluation, *TINY, "--limit", 40, "--mode", "score", "--out", tmp_path / "base")
    in_process(evaluation, "--adapter", run, "--limit", 40, "--compare", tmp_path / "base", "--out", tmp_path / "tuned")
    found = read_json(tmp_path / "tuned" / "results.json")["mcnemar"]["validation_matched"]
    base, tuned = ([json.loads(line) for line in (tmp_path / name / "predictions_validation_matched.jsonl").read_text().splitlines()] for name in ("base", "tuned"))
    right = [(a["prediction"] == a["label"], b["prediction"] == b["label"]) for a, b in zip(base, tuned)]
    assert (found["n"], found["only_first"], found["only_second"]) == (40, right.count((True, False)), right.count((False, True)))
    assert "McNemar p = " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="not of the same rows: 40 and 39 rows"):
        in_process(evaluation, "--adapter", run, "--limit", 39, "--compare", tmp_path / "base")
