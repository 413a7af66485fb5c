"""An evaluation depends on nothing but the model, the prompt and the label."""

import argparse
import io
import itertools
import json
import os
import re
import select
import shlex
import shutil
from pathlib import Path
from threading import Thread

import pytest
import torch
from conftest import ROOT, forget_what_was_read, in_process, ours, read_json, script
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import lora
import phi2
import quant
import train
from support import examples, files
from support.examples import load_examples
from support.fingerprint import digest_weights

TINY = ("--model", "tiny/model", "--dataset", "tiny/data")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An adapter of 40 steps: it ends its answers, and errs often enough."""
    out = tmp_path_factory.mktemp("run") / "run"
    command = ["train.py", *TINY, "--steps", 40, "--batch-size", 16, "--learning-rate", 2e-3]
    command += ["--dtype", "fp32", "--eval-limit", 8, "--max-new-tokens", 2, "--out", out]
    command += ["--keep-dequantized"]  # the same bits in less time
    done = script(*command)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def rows():
    return load_examples("tiny/data", "validation_matched", 70)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return data.load_tokenizer(tiny)


def adapted(tiny, run, dtype: torch.dtype) -> phi2.Phi2:
    model = ours(tiny, dtype, "nf4")
    lora.load_adapter(model, run)
    return model.eval()


# -----------------------------------------------------------------------------
# Answers


# Of a score, which is a probability. Measured on 1,000 rows: scores differ by 1e-6 in fp32, and by
# 0.015 in bf16, whose numbers have 8 bits.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.05}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["generate", "score"])
def test_an_answer_depends_neither_on_the_batch_size_nor_on_its_neighbours(
    tiny, run, rows, tokenizer, dtype, mode
):
    model = adapted(tiny, run, dtype)
    tolerance = TOLERANCE[dtype]
    rows = rows.select(range(40))

    def answers(some_rows, batch_size: int) -> list[dict]:
        protocol = evaluation.Settings(mode, max_new_tokens=4, batch_size=batch_size)
        return evaluation.evaluate(model, tokenizer, some_rows, protocol)[1]

    expected = answers(rows, 1)
    others = {
        "batches of 7": (answers(rows, 7), expected),
        "batches of 32": (answers(rows, 32), expected),
        "other neighbours": (answers(rows.select(range(20, 40)), 32), expected[20:]),
    }
    for name, (found, wanted) in others.items():
        assert len(found) == len(wanted)
        for row, alone in zip(found, wanted):
            assert row["prompt"] == alone["prompt"]
            assert row["scores"] == pytest.approx(alone["scores"], abs=tolerance), name
            _, second, best = sorted(alone["scores"])
            # In bf16 an answer may change, but only where the two best are that close.
            is_nearly_even = dtype == torch.bfloat16 and best - second < tolerance
            assert row["prediction"] == alone["prediction"] or is_nearly_even, name
    assert len({row["prediction"] for row in expected}) > 1, "one answer to all proves little"


def test_both_modes_give_the_same_scores(tiny, run, rows, tokenizer):
    model = adapted(tiny, run, torch.float32)
    written, written_rows = evaluation.evaluate(
        model, tokenizer, rows, evaluation.Settings("generate", max_new_tokens=4)
    )
    scored, scored_rows = evaluation.evaluate(model, tokenizer, rows, evaluation.Settings("score"))
    for row, expected in zip(written_rows, scored_rows):
        assert row["scores"] == pytest.approx(expected["scores"], abs=TOLERANCE[torch.float32])
    assert written["score_accuracy"] == scored["accuracy"]
    assert scored["accuracy"] == scored["score_accuracy"]


def test_scores_are_the_softmax_over_the_three_answers(tiny, run, rows, tokenizer):
    """By the definition, one prompt at a time."""
    model = adapted(tiny, run, torch.float32)
    prompts = [data.encode(row, tokenizer)[0] for row in rows.select(range(5))]
    answers = [tokenizer.encode(f" {label}").ids[0] for label in range(3)]
    found = evaluation.score(model, tokenizer, prompts)
    for answer, prompt in zip(found, prompts):
        with torch.no_grad():
            shares = model(torch.tensor(prompt))[-1, answers].softmax(dim=0).tolist()
        assert answer["scores"] == pytest.approx(shares, abs=TOLERANCE[torch.float32])
        assert answer["prediction"] == shares.index(max(shares))


@pytest.mark.parametrize("mode", ["generate", "score"])
def test_in_bf16_the_answers_are_weighed_in_fp32(tiny, run, rows, tokenizer, mode):
    """By hand, in fp64. Rounded to bf16 the same logits would tie in many rows."""
    model = adapted(tiny, run, torch.bfloat16)
    hidden = []
    model.model.register_forward_hook(lambda _, inputs, output: hidden.append(output))
    protocol = evaluation.Settings(mode, max_new_tokens=1, batch_size=len(rows))
    statistics, predictions = evaluation.evaluate(model, tokenizer, rows, protocol)
    assert statistics["ties"] == 0

    (last,) = hidden  # in the order in which the rows of a premise go together
    answers = [tokenizer.encode(f" {label}").ids[0] for label in range(3)]
    head = model.lm_head
    logits = last.double() @ head.weight[answers].double().T + head.bias[answers].double()
    prompts = [prompt for prompt, _ in data.encode_batch(rows, tokenizer)]
    order = itertools.chain.from_iterable(data.by_premise(rows, prompts))
    for number, shares in zip(order, logits.softmax(dim=-1).tolist()):
        assert predictions[number]["scores"] == pytest.approx(shares, rel=1e-5)
        if mode == "score":
            assert predictions[number]["prediction"] == shares.index(max(shares))
    best = logits.to(torch.bfloat16).sort(dim=-1).values
    assert (best[:, 2] == best[:, 1]).any(), "without ties in bf16 this proves nothing"


def test_a_head_in_nf4_is_read_too(tiny, rows, tokenizer):
    model = ours(tiny, torch.float32)
    quant.quantize_linears(model, skip=("model",))
    assert isinstance(model.lm_head, quant.NF4Linear)
    prompts = [data.encode(row, tokenizer)[0] for row in rows.select(range(3))]
    answers = [tokenizer.encode(f" {label}").ids[0] for label in range(3)]
    found = evaluation.score(model, tokenizer, prompts)
    for answer, prompt in zip(found, prompts):
        with torch.no_grad():
            shares = model(torch.tensor(prompt))[-1, answers].softmax(dim=0).tolist()
        assert answer["scores"] == pytest.approx(shares, abs=TOLERANCE[torch.float32])


@pytest.mark.parametrize("mode", ["generate", "score"])
def test_a_premise_is_read_once_for_all_of_its_hypotheses(tiny, tokenizer, mode):
    model = ours(tiny, torch.float32)
    ids = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: ids.append(len(inputs[0])))
    rows = [
        {"premise": f"Tom has {number} cats.", "hypothesis": f"{who} has a dog.", "label": 1}
        for who in ("Tom", "Ann", "He")
        for number in ("two", "three", "twenty-seven")
    ]
    protocol = evaluation.Settings(mode, max_new_tokens=1)
    evaluation.evaluate(model, tokenizer, Dataset.from_list(rows), protocol)

    prompts = [data.encode(row, tokenizer)[0] for row in rows]
    distinct = {tuple(prompt[: end + 1]) for prompt in prompts for end in range(len(prompt))}
    assert ids == [len(distinct)]
    prefix, _, _ = data.fixed_ids(tokenizer)
    own = sum(len(prompt) - len(prefix) for prompt in prompts)
    assert len(distinct) - len(prefix) < 0.7 * own


def test_an_evaluation_leaves_the_model_in_the_mode_it_was_in(tiny, rows, tokenizer):
    model = ours(tiny, torch.float32)
    for is_training in (True, False):
        model.train(is_training)
        few = rows.select(range(2))
        evaluation.evaluate(model, tokenizer, few, evaluation.Settings("score"))
        assert model.training == is_training
        assert model.model.layers[0].resid_dropout.training == is_training


@pytest.mark.parametrize("batch_size, share_prefix", [(16, True), (8, False), (1, True)])
def test_the_loss_of_a_split_is_the_one_that_training_takes(
    tiny, run, rows, tokenizer, share_prefix, batch_size
):
    """By the definition: the mean over all targets, each row by itself and whole."""
    model = adapted(tiny, run, torch.float32).train()  # with dropout in training, and none here
    few = rows.select(range(18))
    args = argparse.Namespace(
        loss="answer", share_prefix=share_prefix, batch_size=batch_size, max_length=512
    )
    loss = train.validation_loss(model, tokenizer, few, args)
    assert model.training
    model.eval()
    losses = []
    for row in few:
        prompt, answer = data.encode(row, tokenizer)
        ids = torch.tensor(prompt + answer)
        with torch.no_grad():
            by_token = torch.nn.functional.cross_entropy(model(ids)[:-1], ids[1:], reduction="none")
        losses += by_token[-2:].tolist()
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)  # fp32, summed otherwise


# -----------------------------------------------------------------------------
# The adapter's fingerprint


def test_the_adapter_says_what_it_was_trained_over(run, tiny):
    with safe_open(run / "adapter_model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["quantization"] == "nf4"
    for key in ("prompt", "tokenizer", "base_weights"):
        assert len(metadata[key]) == 16
    assert metadata["base_weights"] == digest_weights(phi2.weight_files(tiny))


def change_weights(model) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.fc1.weight"] += 0.01
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def change_tokenizer(model) -> None:
    """Spells one token in another way, and leaves out the merges that lead to it."""
    path = model / "tokenizer.json"
    raw = read_json(path)
    vocabulary = raw["model"]["vocab"]
    vocabulary["\u0120thee"] = vocabulary.pop("\u0120the")
    raw["model"]["merges"] = [
        merge
        for merge in raw["model"]["merges"]
        if "".join(merge) != "\u0120the" and "\u0120the" not in merge
    ]
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize("changed", ["base weights", "tokenizer", "quantization", "prompt"])
def test_another_base_tokenizer_quantisation_or_prompt_is_named_and_force_goes_on(
    run, tiny, tmp_path, monkeypatch, capsys, changed
):
    model = shutil.copytree(tiny, tmp_path / "model")
    quantization = "nf4"
    if changed == "base weights":
        change_weights(model)
    elif changed == "tokenizer":
        change_tokenizer(model)
    elif changed == "quantization":
        quantization = "none"
    else:
        other_prompt = data.PROMPT.replace("### Label:", "### Answer:")
        monkeypatch.setattr(data, "PROMPT", other_prompt)
    command = ["--adapter", run, "--model", model, "--quant", quantization]
    command += ["--limit", 4, "--max-new-tokens", 1]
    with pytest.raises(SystemExit) as stopped:
        in_process(evaluation, *command)
    message = str(stopped.value)
    assert f"was trained with another {changed} (" in message
    assert message.count("another") == 1, "nothing else is blamed"
    assert "--force" in message

    in_process(evaluation, *command, "--force")
    assert "validation_matched" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# One pair, and pairs from standard input

LINES = ("--model", "tiny/model", "--dataset", "-")
PAIR = b'{"premise": "%d", "hypothesis": "B."}\n'


def test_a_pair_is_answered_with_the_share_of_each_label(run, tiny, tokenizer, capsys):
    pair = {"premise": "Anna bought a big red rose.", "hypothesis": "Anna bought a flower."}
    command = ["--premise", pair["premise"], "--hypothesis", pair["hypothesis"]]
    in_process(evaluation, "--adapter", run, *command)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{run}: rank 8, 12 layers adapted, over tiny/model in nf4"

    prompt, _ = data.encode(pair | {"label": 0}, tokenizer)
    model = adapted(tiny, run, torch.float32)
    (answer,) = evaluation.complete(model, tokenizer, [prompt], 32)
    assert lines[0] == f"completion: {answer['completion']!r}"
    for line, score in zip(lines[1:], answer["scores"], strict=True):
        assert f" {score:.4f}" in line
        assert line.endswith("  <-") == (score == max(answer["scores"]))


def test_answers_are_in_the_words_of_the_rows_that_were_trained_on(
    run, tmp_path, monkeypatch, capsys
):
    """As --labels names them there, and escaped where a terminal would obey them."""
    copy = shutil.copytree(run, tmp_path / "run")
    words = ["follows", "neither", "is against\x1b"]
    files.write_json(copy / "args.json", read_json(run / "args.json") | {"label_words": words})
    in_process(evaluation, "--adapter", copy, "--premise", "A dog.", "--hypothesis", "A dog.")
    lines = capsys.readouterr().out.splitlines()[-3:]
    shown = [*words[:2], r"is against\u001b"]
    assert [line[:18] for line in lines] == [f"{n} {word:16}" for n, word in enumerate(shown)]

    monkeypatch.setattr("sys.stdin", standard_input(PAIR % 1))
    in_process(evaluation, "--adapter", copy, "--dataset", "-")
    answer = json.loads(capsys.readouterr().out)
    assert answer["answer"] == words[answer["prediction"]]


def test_an_answer_in_json_is_the_very_word_of_the_rows(run, tmp_path, monkeypatch, capsys):
    """JSON has its own escapes: a no-break space, which no terminal shows, is one letter."""
    copy = shutil.copytree(run, tmp_path / "run")
    word = "does\u00a0follow\n"
    files.write_json(copy / "args.json", read_json(run / "args.json") | {"label_words": [word] * 3})
    monkeypatch.setattr("sys.stdin", standard_input(PAIR % 1))
    in_process(evaluation, "--adapter", copy, "--dataset", "-", "--mode", "score")
    assert json.loads(capsys.readouterr().out)["answer"] == word


def test_a_program_may_wait_for_the_answer_to_each_line(monkeypatch):
    """It writes a line, and the next one when it has read the answer."""
    inputs, inputs_end = os.pipe()
    outputs, outputs_end = os.pipe()
    answers = []

    def program() -> None:
        with os.fdopen(outputs) as lines, os.fdopen(inputs_end, "wb", buffering=0) as stream:
            for number in range(3):
                stream.write(PAIR % number)
                if not select.select([lines], [], [], 60)[0]:
                    return  # which ends the input, and the test fails
                answers.append(json.loads(lines.readline())["premise"])

    monkeypatch.setattr("sys.stdin", os.fdopen(inputs))
    monkeypatch.setattr("sys.stdout", os.fdopen(outputs_end, "w"))
    other = Thread(target=program)
    other.start()
    in_process(evaluation, *LINES, "--max-new-tokens", 1)
    other.join()
    assert answers == ["0", "1", "2"]


def test_a_file_of_lines_runs_in_full_batches(monkeypatch, tmp_path):
    (tmp_path / "pairs").write_bytes(b"".join(PAIR % number for number in range(70)))
    sizes = []
    complete = evaluation.complete

    def recorded(model, tokenizer, prompts, max_new_tokens):
        sizes.append(len(prompts))
        return complete(model, tokenizer, prompts, max_new_tokens)

    monkeypatch.setattr(evaluation, "complete", recorded)
    with open(tmp_path / "pairs") as file:
        monkeypatch.setattr("sys.stdin", file)
        in_process(evaluation, *LINES, "--batch-size", 32, "--max-new-tokens", 1)
    assert sizes == [32, 32, 6]


def standard_input(content: bytes) -> io.TextIOWrapper:
    """A pipe as a badly set locale would decode it."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="ascii")


def test_json_lines_go_in_and_come_out_with_their_answers(
    run, rows, monkeypatch, capsys, tiny, tokenizer
):
    few = rows.select(range(10))
    given = [
        {"premise": row["premise"], "hypothesis": row["hypothesis"], "id": f"r{number}"}
        for number, row in enumerate(few)
    ]
    text = "\n".join(json.dumps(pair) + "\n" for pair in given)  # with empty lines between
    monkeypatch.setattr("sys.stdin", standard_input(text.encode()))
    in_process(evaluation, "--adapter", run, "--dataset", "-", "--batch-size", 4)
    captured = capsys.readouterr()
    assert "layers adapted" in captured.err, "the output holds answers alone"

    found = [json.loads(line) for line in captured.out.splitlines()]
    model = adapted(tiny, run, torch.float32)
    _, expected = evaluation.evaluate(model, tokenizer, few, evaluation.Settings())
    assert len(found) == len(given)
    for line, pair, answer in zip(found, given, expected):
        for key in ("premise", "hypothesis", "id"):
            assert line[key] == pair[key]
        assert line["completion"] == answer["completion"]
        assert line["prediction"] == answer["prediction"]
        assert line["scores"] == pytest.approx(answer["scores"], abs=TOLERANCE[torch.float32])


def test_in_mode_score_a_line_is_answered_by_its_scores(monkeypatch, capsys):
    """The base alone writes no number, so a written answer would be -1."""
    monkeypatch.setattr("sys.stdin", standard_input(PAIR % 1))
    in_process(evaluation, *LINES, "--mode", "score")
    answer = json.loads(capsys.readouterr().out)
    assert answer.keys() == {"premise", "hypothesis", "prediction", "scores", "answer"}
    assert answer["scores"][answer["prediction"]] == max(answer["scores"])


def test_a_typed_pair_that_is_cut_says_so(monkeypatch, capsys, tokenizer):
    fits = {"premise": "A man sleeps.", "hypothesis": "A man rests."}
    length = sum(map(len, data.encode(fits | {"label": 0}, tokenizer)))
    longer = fits | {"premise": fits["premise"] + " A"}
    lines = f"{json.dumps(fits)}\n{json.dumps(longer)}\n"
    monkeypatch.setattr("sys.stdin", standard_input(lines.encode()))
    shortest = ("--max-length", length, "--mode", "score")
    in_process(evaluation, *LINES, *shortest)
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer.get("cut") for answer in answers] == [None, True]
    assert answers[1]["premise"] == longer["premise"]

    pair = ("--premise", longer["premise"], "--hypothesis", longer["hypothesis"])
    in_process(evaluation, "--model", "tiny/model", *pair, *shortest)
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == f"the pair was cut to --max-length {length}"


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 of standard input is not JSON"),
        ("[]", "line 2 of standard input holds no JSON object"),
        ('{"hypothesis": "a"}', "line 2 of standard input has no text as premise"),
        ('{"text": "a", "b": "c"}', "it needs premise and hypothesis; its keys are text, b"),
        ('{"premise": "a"}', "line 2 of standard input has no text as hypothesis"),
        ('{"premise": "a", "hypothesis": 1}', "has no text as hypothesis"),
        ('{"premise": "\\ud83d", "hypothesis": "b"}', "has a premise that is not Unicode"),
        (b'{"premise": "caf\xe9", "hypothesis": "b"}', "line 2 of standard input is not JSON: "),
    ],
)
def test_a_bad_line_is_named_once_those_before_it_are_answered(monkeypatch, capsys, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    content = PAIR % 1 + line + b"\n" + PAIR % 3
    monkeypatch.setattr("sys.stdin", standard_input(content))
    with pytest.raises(SystemExit) as stopped:
        in_process(evaluation, *LINES, "--max-new-tokens", 1)
    assert message in str(stopped.value)
    assert len(capsys.readouterr().out.splitlines()) == 1, "the line before it is answered"


# -----------------------------------------------------------------------------
# The script


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--split", "validation"), "has no split 'validation'"),
        (("--compare", "none"), "file or directory: 'none/predictions_validation_matched.jsonl'"),
        (("--dataset", "-", "--limit", 3), "--limit is for a dataset"),
        (("--premise", "A."), "--premise and --hypothesis go together"),
        (("--out", "README.md"), f"[Errno 17] File exists: '{ROOT / 'README.md'}'"),
        (("--out", "README.md/x"), f"[Errno 20] Not a directory: '{ROOT / 'README.md/x'}'"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(evaluation, "load_model", None)
    with pytest.raises(SystemExit) as stopped:
        in_process(evaluation, *TINY, *arguments)
    assert message in str(stopped.value) + capsys.readouterr().err


def test_premises_that_were_cut_are_counted_on_the_screen(capsys):
    limits = ["--limit", 8, "--max-length", 72]
    twice = ["validation_matched", "validation_matched"]
    in_process(evaluation, *TINY, "--split", *twice, "--mode", "score", *limits)
    printed = capsys.readouterr()
    assert re.search(r"\n[1-8] prompts were cut to --max-length 72\n", printed.out)
    assert printed.err.count("validation_matched: ") == 1, "a split that is named twice"


def test_logits_that_are_not_finite_are_no_answer(run, tmp_path, capsys):
    """As an adapter gives them that has diverged: each of its numbers is finite."""
    adapter = shutil.copytree(run, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {key: 1e20 * tensor.sign() for key, tensor in load_file(path).items()}
    save_file(tensors, path, metadata)
    for mode in ("score", "generate"):
        message = "the model.s logits are not finite"
        with pytest.raises(SystemExit, match=message):
            in_process(evaluation, "--adapter", adapter, "--limit", 4, "--mode", mode)


def test_an_evaluation_does_not_write_over_a_run(run):
    before = (run / "results.json").read_bytes()
    message = "holds a run already: choose another --out"
    with pytest.raises(SystemExit, match=message):
        in_process(evaluation, "--adapter", run, "--limit", 2, "--out", run)
    assert (run / "results.json").read_bytes() == before


ABSENT_DEVICES = ["mps:7"] if torch.cuda.is_available() else ["mps:7", "cuda"]


@pytest.mark.parametrize("device", ABSENT_DEVICES)
def test_a_device_that_is_not_there_is_one_line(monkeypatch, device):
    monkeypatch.setattr(examples, "load_examples", None)  # before any work
    with pytest.raises(SystemExit, match=f"error: --device {device}: ") as stopped:
        in_process(evaluation, *TINY, "--device", device)
    assert "\n" not in stopped.value.code


def test_a_run_finds_its_model_and_its_data_from_any_folder(run, tmp_path, capsys):
    in_process(evaluation, "--adapter", run, "--limit", 2)
    here = capsys.readouterr().out
    # The run was started with tiny/model, which is now in a folder above it.
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    copy = shutil.copytree(run, tmp_path / "out" / run.name)
    saved = read_json(copy / "args.json")
    (copy / "args.json").write_text(json.dumps(saved | {"started_in": str(tmp_path / "gone")}))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    in_process(evaluation, "--adapter", copy, "--limit", 2, cwd=elsewhere)
    there = capsys.readouterr().out
    # The first two lines name the folders.
    assert there.splitlines()[1] == f"{tmp_path}/{here.splitlines()[1]}"
    assert there.splitlines()[2:] == here.splitlines()[2:]


# -----------------------------------------------------------------------------
# Rows that have to be read in a way of their own

COLUMNS = ("--columns", "text", "claim", "verdict")
LABELS = ("--labels", "contradiction", "neutral", "entailment")  # 0 and 2 the other way round


def rows_of_tiny(first: int) -> list[dict]:
    lines = (ROOT / "tiny" / "data" / "train.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[first : first + 60]]


def write_rows(folder: Path, names: tuple[str, str, str], first: int) -> Path:
    """Writes 60 rows of tiny/data as a split train, with these columns."""
    folder.mkdir(exist_ok=True)
    with open(folder / "train.jsonl", "w") as file:
        for row in rows_of_tiny(first):
            values = (row["premise"], row["hypothesis"], row["label"])
            file.write(json.dumps(dict(zip(names, values))) + "\n")
    return folder


@pytest.fixture(scope="module")
def own_way(tmp_path_factory) -> tuple[Path, str]:
    """A run over rows that are read by three flags, and the command that it prints at its end."""
    folder = tmp_path_factory.mktemp("own way")
    rows = write_rows(folder / "rows", COLUMNS[1:], first=0)
    command = ("train.py", "--model", "tiny/model", "--dataset", rows, *COLUMNS, *LABELS)
    command += ("--validation", 0.2, "--steps", 1, "--max-new-tokens", 1)
    done = script(*command, "--out", folder / "its run; (1)")
    assert done.returncode == 0, done.stderr
    return folder / "its run; (1)", done.stdout.splitlines()[-1].removeprefix("try: ")


def rows_read(capsys, *arguments, out: Path) -> tuple[dict[str, int], str]:
    """Returns the label of each prompt of train that an evaluation has read, and its notes."""
    forget_what_was_read()
    in_process(evaluation, *arguments, "--mode", "score", "--split", "train", "--out", out)
    lines = (out / "predictions_train.jsonl").read_text().splitlines()
    notes = [line for line in capsys.readouterr().err.splitlines() if "does not hold" in line]
    return {row["prompt"]: row["label"] for row in map(json.loads, lines)}, "".join(notes)


def right_rows(first: int, is_turned: bool = False) -> dict[str, int]:
    """Returns the label of each prompt, as it is written or with 0 and 2 the other way round."""
    labels = {data.PROMPT.format(**row): row["label"] for row in rows_of_tiny(first)}
    return {prompt: 2 - label if is_turned else label for prompt, label in labels.items()}


def test_the_command_that_a_run_prints_at_its_end_can_be_pasted(own_way):
    run, command = own_way
    python, *words = shlex.split(command)
    assert python == "python"
    done = script(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{run}: rank 8")


def test_flags_of_a_runs_rows_are_not_typed_for_standard_input(own_way, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", standard_input(PAIR % 1))
    in_process(evaluation, "--adapter", own_way[0], "--dataset", "-", "--max-new-tokens", 1)
    assert json.loads(capsys.readouterr().out)["premise"] == "1"


def test_the_rows_of_a_run_are_read_like_the_runs_wherever_they_are(own_way, tmp_path, capsys):
    run, _ = own_way
    rows, notes = rows_read(capsys, "--adapter", run, out=tmp_path / "own")
    assert notes == ""
    assert rows.items() < right_rows(0, is_turned=True).items(), "without those of --validation"

    moved = shutil.copytree(run.parent / "rows", tmp_path / "moved")
    adapter = ("--adapter", run, "--dataset", moved)
    assert rows_read(capsys, *adapter, out=tmp_path / "again") == (rows, "")
    results = read_json(tmp_path / "again" / "results.json")
    assert results["dataset"] == str(moved)
    assert results["rows"]["train"]["used"] == results["finetuned"]["train"]["n"] == len(rows)


def test_a_run_is_resumed_over_its_rows_wherever_they_are(own_way, tmp_path, capsys):
    forget_what_was_read()
    run = shutil.copytree(own_way[0], tmp_path / "run")
    moved = shutil.copytree(own_way[0].parent / "rows", tmp_path / "moved")
    in_process(train, "--resume", run, "--dataset", moved, "--steps", 2)
    assert "resuming after step 1 of 2" in capsys.readouterr().out
    saved = read_json(run / "args.json")
    assert (saved["dataset"], saved["labels"]) == (str(moved), list(LABELS[1:]))


def test_other_rows_are_not_read_like_the_runs_and_a_line_says_so(own_way, tmp_path, capsys):
    run, _ = own_way
    other = write_rows(tmp_path / "rows", ("premise", "hypothesis", "label"), first=100)
    adapter = ("--adapter", run, "--dataset", other)
    rows, note = rows_read(capsys, *adapter, out=tmp_path / "out")
    assert rows == right_rows(100)
    unused = "--columns text claim verdict --labels contradiction neutral entailment"
    assert note.startswith(f"{other} does not hold the rows that {run} was trained with, so")
    assert note.endswith(f"are not used: {unused} --validation 0.2")

    # What is typed holds for these rows, and is not among what is not used.
    rows, note = rows_read(capsys, *adapter, *LABELS, out=tmp_path / "typed")
    assert rows == right_rows(100, is_turned=True)
    assert "--labels" not in note


def test_rows_that_have_changed_under_their_name_are_not_read_like_the_runs(
    own_way, tmp_path, capsys
):
    run = shutil.copytree(own_way[0], tmp_path / "run")
    rows = write_rows(tmp_path / "rows", ("premise", "hypothesis", "label"), first=200)
    saved = read_json(run / "args.json")
    (run / "args.json").write_text(json.dumps(saved | {"dataset": str(rows)}))
    found, note = rows_read(capsys, "--adapter", run, out=tmp_path / "out")
    assert found == right_rows(200)
    assert "--labels contradiction neutral entailment" in note


# -----------------------------------------------------------------------------
# Two runs


def test_compare_tests_two_runs_on_the_same_rows(run, tmp_path, capsys):
    base = tmp_path / "base"
    tuned = tmp_path / "tuned"
    in_process(evaluation, *TINY, "--limit", 40, "--mode", "score", "--out", base)
    with_adapter = ["--adapter", run, "--compare", base]
    in_process(evaluation, *with_adapter, "--limit", 40, "--out", tuned)
    printed = capsys.readouterr().out

    def right(directory) -> list[bool]:
        lines = (directory / "predictions_validation_matched.jsonl").read_text().splitlines()
        predictions = [json.loads(line) for line in lines]
        return [row["prediction"] == row["label"] for row in predictions]

    pairs = list(zip(right(base), right(tuned)))
    compared = read_json(tuned / "results.json")["compared"]["validation_matched"]
    assert compared["n"] == 40
    assert compared["only_first"] == pairs.count((True, False))
    assert compared["only_second"] == pairs.count((False, True))
    there = sum(first for first, _ in pairs) / 40
    assert compared["run"] == str(base)
    assert f"against {base} ({there:.4f}):\n" in printed
    assert "McNemar p = " in printed
    with pytest.raises(SystemExit, match="not of the same rows: 40 and 39 rows"):
        in_process(evaluation, *with_adapter, "--limit", 39)
