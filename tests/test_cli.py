"""Command lines: what the flags hold, where defaults come from, and one line for a mistake."""

import argparse
import json
import os
import re
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT, in_process, read_json, script, start_script
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_hostile import changed, hostile
from tqdm import tqdm

import train
from support import cli, commands, origin, processes

TINY = ["--model", "tiny/model", "--dataset", "tiny/data"]
MISTAKE = 2  # exit status
ARGUMENTS = {"train.py": cli.train_arguments, "eval.py": cli.eval_arguments}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """These tests say what happens on a machine without a GPU; one of them says otherwise."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # nor for nvidia-smi, where there is one


@pytest.fixture(autouse=True)
def project_folder(monkeypatch):
    monkeypatch.chdir(ROOT)


def parse(script_name: str, *flags) -> argparse.Namespace:
    return ARGUMENTS[script_name]([str(flag) for flag in flags])


def mistake(capsys, script_name: str, *flags) -> str:
    """Returns the one line of a command line that is refused."""
    with pytest.raises(SystemExit) as stopped:
        parse(script_name, *flags)
    captured = capsys.readouterr()
    assert stopped.value.code == MISTAKE
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.endswith("--help\n")
    assert captured.err.count("\n") == 1
    return captured.err


# -----------------------------------------------------------------------------
# What flags may hold


@pytest.mark.parametrize(
    "script_name, flag, value, message",
    [
        ("train.py", "--rank", "0", "must be a whole number of at least 1, not 0"),
        ("train.py", "--alpha", "0", "must be a number above 0, not 0"),
        ("train.py", "--dropout", "1", "must be a number below 1, not 1"),
        ("train.py", "--residual-dropout", "2", "must be a number below 1, not 2"),
        ("train.py", "--steps", "0", "must be a whole number of at least 1, not 0"),
        ("train.py", "--steps", "1.5", "must be a whole number of at least 1, not 1.5"),
        ("train.py", "--epochs", "-1", "must be a number above 0, not -1"),
        ("train.py", "--batch-size", "0", "must be a whole number of at least 1, not 0"),
        ("train.py", "--accumulate", "none", "must be a whole number of at least 1, not none"),
        ("train.py", "--learning-rate", "nan", "must be a number above 0, not nan"),
        ("train.py", "--learning-rate", "0", "must be a number above 0, not 0"),
        ("train.py", "--weight-decay", "-0.1", "must be a number of at least 0, not -0.1"),
        ("train.py", "--warmup-steps", "-5", "must be a whole number of at least 0, not -5"),
        ("train.py", "--max-grad-norm", "inf", "must be a number below inf, not inf"),
        ("train.py", "--limit", "-1", "must be a whole number of at least 1, not -1"),
        ("train.py", "--eval-limit", "0", "must be a whole number of at least 1, not 0"),
        ("train.py", "--eval-every", "0", "must be a whole number of at least 1, not 0"),
        ("train.py", "--save-every", "0", "must be a whole number of at least 1, not 0"),
        ("train.py", "--max-new-tokens", "0", "must be a whole number of at least 1, not 0"),
        ("train.py", "--max-new-tokens", "9999", "must be a whole number of at most 2,048, not 9"),
        ("train.py", "--max-length", "0", "must be a whole number of at least 1, not 0"),
        ("train.py", "--seed", "-1", "must be a whole number of at least 0, not -1"),
        ("train.py", "--validation", "1", "must be a number below 1, not 1"),
        ("train.py", "--dtype", "fp64", "invalid choice: 'fp64'"),
        ("train.py", "--dtype", "half", "invalid choice: 'half' (choose from "),
        ("train.py", "--steps", "1" + 20 * "0", "must be a whole number of at most 2,147"),
        ("train.py", "--batch-size", "1" + 18 * "0", "must be a whole number of at most 2,147"),
        ("train.py", "--rank", "100000000", "must be a whole number of at most 10,240, not 1"),
        ("train.py", "--alpha", "1e37", "must be a number of at most 1,000,000, not 1e37"),
        ("train.py", "--epochs", "1e308", "must be a number of at most 1,000,000, not 1e308"),
        ("train.py", "--learning-rate", "1e30", "must be a number of at most 1,000,000, not 1e30"),
        ("train.py", "--targets", "q_proj,v_proj", "must be names separated by spaces, not q"),
        ("train.py", "--device", "0", "must be cpu, cuda, or one GPU such as cuda:0, not '0'"),
        ("train.py", "--device", "gpu", "must be cpu, cuda, or one GPU such as cuda:0, not 'gpu'"),
        ("train.py", "--push", "phi-2", "'phi-2' is not a repository on the Hub: owner/name"),
        ("eval.py", "--limit", "-1", "must be a whole number of at least 1, not -1"),
        ("eval.py", "--batch-size", "0", "must be a whole number of at least 1, not 0"),
        ("eval.py", "--max-new-tokens", "-3", "must be a whole number of at least 1, not -3"),
        ("eval.py", "--mode", "guess", "invalid choice: 'guess'"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_the_name_of_its_flag(
    capsys, script_name, flag, value, message
):
    line = mistake(capsys, script_name, *TINY, flag, value)
    assert line.startswith(f"error: argument {flag}: {message}")


@pytest.mark.parametrize("script_name", ARGUMENTS)
@pytest.mark.parametrize("flag", ["--model", "--dataset", "--model-revision", "--out", "--device"])
def test_an_empty_text_is_no_value(capsys, script_name, flag):
    """As "$UNSET" leaves it: an empty path would be the current folder."""
    line = mistake(capsys, script_name, flag, "")
    assert line.startswith(f"error: argument {flag}: must ")


@pytest.mark.parametrize("flag", ["--adapter", "--split", "--compare"])
def test_an_empty_text_is_no_value_of_a_flag_of_eval(capsys, flag):
    line = mistake(capsys, "eval.py", *TINY, flag, "")
    assert line.startswith(f"error: argument {flag}: must not be empty")


def test_a_gradient_may_be_clipped_to_a_huge_norm_which_is_never():
    assert parse("train.py", *TINY, "--max-grad-norm", "1e30").max_grad_norm == 1e30


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rnak", 8], "unrecognized arguments: --rnak 8"),
        (["--lim", 8], "unrecognized arguments: --lim 8"),  # no abbreviations
        (["--steps", 5, "--epochs", 1], "not allowed with argument --steps"),
        (["@no/such/file"], "[Errno 2] No such file or directory: 'no/such/file' (a value that b"),
    ],
)
def test_flags_that_cannot_be_are_named(capsys, flags, message):
    assert message in mistake(capsys, "train.py", *TINY, *flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--premise", "A."], "--premise and --hypothesis go together"),
        (["--hypothesis", "A."], "--premise and --hypothesis go together"),
        (["--dataset", "-", "--limit", 3], "--limit is for a dataset"),
        (["--dataset", "-", "--out", "out"], "--out is for a dataset"),
        (["--dataset", "-", "--labels", "n", "e", "c"], "--labels is for a dataset"),
        (["--premise", "A.", "--hypothesis", "B.", "--split", "train"], "--split is for a dataset"),
        (["--premise", "A.", "--hypothesis", "B.", "--dataset", "-"], "--premise is one pair"),
    ],
)
def test_flags_of_eval_that_do_not_go_together_are_refused(capsys, flags, message):
    assert message in mistake(capsys, "eval.py", *TINY, *flags)


def test_an_empty_premise_is_a_premise():
    args = parse("eval.py", *TINY, "--premise", "", "--hypothesis", "")
    assert args.premise == args.hypothesis == ""


def test_standard_input_is_for_one_process(monkeypatch, capsys):
    monkeypatch.setattr(processes, "COUNT", 2)
    line = mistake(capsys, "eval.py", "--model", "tiny/model", "--dataset", "-")
    assert "--dataset - is for one process: start python eval.py, not torchrun" in line


@pytest.mark.parametrize("text", ["-", "-Nein.", "-5", "-1=x", "--no flag", "@Emma", "@tiny/args"])
def test_a_premise_may_begin_with_a_dash_or_an_at_sign_behind_an_equals_sign(text):
    args = parse("eval.py", *TINY, f"--premise={text}", f"--hypothesis={text}")
    assert (args.premise, args.hypothesis) == (text, text)


@pytest.mark.parametrize("text", ["-Nein.", "@Emma", "--hypothesis"])
def test_the_error_about_any_other_says_how_it_is_typed(capsys, text):
    line = mistake(capsys, "eval.py", *TINY, "--premise", text, "--hypothesis", "A.")
    assert "(a value that begins with @ or - is typed as --flag=value)" in line


# -----------------------------------------------------------------------------
# Commands that are printed


def test_a_command_can_be_pasted_whatever_a_path_holds():
    folder = Path("out/it's (1); echo $HOME")
    words = shlex.split(commands.command("eval.py", "--adapter", folder, "--premise", "..."))
    assert words == ["python", "eval.py", "--adapter", str(folder), "--premise", "..."]


def test_a_command_is_right_in_the_folder_where_it_is_printed(monkeypatch, tmp_path):
    assert commands.command("scripts/push.py", "--private") == "python scripts/push.py --private"
    for folder in (tmp_path, ROOT / "tiny", ROOT / "scripts"):
        monkeypatch.chdir(folder)
        for name in ("train.py", "scripts/push.py"):
            _, printed = commands.command(name).split()
            assert Path(printed).samefile(ROOT / name)


def test_processes_resume_a_run_as_they_started_it(monkeypatch):
    monkeypatch.setattr(processes, "COMMAND", "torchrun --nproc-per-node 8")
    command = "torchrun --nproc-per-node 8 train.py --resume out/run"
    assert commands.resume(Path("out/run")) == command


# -----------------------------------------------------------------------------
# Defaults


def test_the_defaults_are_those_that_the_readme_names():
    args = parse("train.py", "--model", "microsoft/phi-2")
    assert args.dataset == "nyu-mll/glue"
    assert (args.rank, args.alpha, args.dropout) == (8, 16, 0.05)
    assert args.targets == ["q_proj", "v_proj"]
    assert (args.quant, args.double_quant) == ("nf4", False)
    assert (args.learning_rate, args.weight_decay) == (2e-4, 0.01)
    assert (args.steps, args.epochs) == (40_000, None)
    assert (args.batch_size, args.accumulate) == (16, 1)
    assert args.out is None
    assert cli.new_name(args).startswith("phi-2-glue-r8-")


@pytest.mark.parametrize("make_parser", [cli.train_parser, cli.eval_parser])
def test_help_names_each_default_once(make_parser):
    parser = make_parser()
    text = re.sub(r"\s+", " ", parser.format_help())
    for action in parser._actions:
        if action.nargs != 0 and action.default is not None:
            default = re.escape(cli.as_text(action.default))
            pattern = rf"{action.option_strings[0]} [^(]*\(default: {default}\)"
            assert len(re.findall(pattern, text)) == 1, action.dest
    assert "None" not in text


def test_a_gpu_is_taken_with_phi_2_and_mnli_where_there_is_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = parse("train.py")
    assert (args.model, args.dataset) == ("microsoft/phi-2", "nyu-mll/glue")
    assert (args.device, args.dtype) == ("cuda", "bf16")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("has_bf16, expected", [(True, "bf16"), (False, "fp32")])
def test_the_dtype_on_a_cpu_is_the_one_that_it_computes_fast(monkeypatch, has_bf16, expected):
    mkldnn = torch.ops.mkldnn
    monkeypatch.setattr(mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16, raising=False)
    args = parse("train.py", *TINY)
    assert (args.device, args.dtype) == ("cpu", expected)


def test_without_a_gpu_and_a_model_tiny_args_stands_in_front(capsys):
    args = parse("train.py", "--steps", 7)
    assert (args.model, args.dataset) == ("tiny/model", "tiny/data")
    assert (args.learning_rate, args.batch_size, args.keep_dequantized) == (0.003, 32, None)
    assert args.steps == 7
    notice = capsys.readouterr().err
    assert "no CUDA device and no --model: taking tiny/args" in notice
    assert "For phi-2: --model microsoft/phi-2" in notice
    assert all(len(line) <= 79 for line in notice.splitlines())


def test_a_label_may_be_a_negative_number():
    labels = ["-1=contradiction", "0=neutral", "1=entailment"]
    assert parse("train.py", *TINY, "--labels", *labels).labels == labels


def test_its_paths_are_right_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = parse("eval.py")
    assert Path(args.model).samefile(ROOT / "tiny" / "model")
    assert Path(args.dataset).samefile(ROOT / "tiny" / "data")


def test_a_model_that_is_named_gets_nothing_of_tiny_args(capsys):
    args = parse("train.py", "--model", "tiny/model")
    assert (args.dataset, args.steps, args.learning_rate) == ("nyu-mll/glue", 40_000, 2e-4)
    assert capsys.readouterr().err == ""


def test_epochs_replace_the_steps_of_tiny_args():
    args = parse("train.py", "--epochs", 2)
    assert (args.steps, args.epochs) == (None, 2)


def test_the_notice_comes_after_the_arguments_are_checked(capsys):
    assert "tiny/args" not in mistake(capsys, "train.py", "--rank", 0)
    assert "tiny/args" not in mistake(capsys, "eval.py", "--premise", "A.")


def test_flags_come_from_a_file(tmp_path):
    text = "\ufeff# mine\n\n--rank=4  # it's low\n  --targets fc1 fc2#\n # more\n"
    text += '--out\nC:\\my#run\n--columns "my\\ rows" b \'c \\ d\'\n--dataset "~/my rows"\n'
    (tmp_path / "flags").write_text(text, encoding="utf-8")
    args = parse("train.py", f"@{tmp_path / 'flags'}", "--model=tiny/model", "--seed", 3)
    assert (args.rank, args.targets, args.seed) == (4, ["fc1", "fc2#"], 3)
    assert args.out == Path("C:\\my#run")
    assert args.columns == ["my\\ rows", "b", "c \\ d"]
    assert args.dataset == str(Path.home() / "my rows")
    assert parse("train.py", "--debug", "@tiny/args").steps == 900


@pytest.mark.parametrize(
    "content, message",
    [
        (b"--seed=1\n--out=it's\n", """No closing quotation in "--out=it's";"""),
        (b"--columns 'a #b' c d\n", """No closing quotation in "--columns 'a #b' c d";"""),
        (b'--premise "He said \\"hi\\""\n', "no quote may follow a backslash"),
        (b"--out=\xe9t\xe9\n", "'utf-8' codec can't decode byte 0xe9"),
        (b"@flags\n", "maximum recursion depth"),
    ],
)
def test_a_file_of_flags_that_cannot_be_read_is_one_line(
    capsys, monkeypatch, tmp_path, content, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flags").write_bytes(content)
    assert f"cannot read an @FILE: {message}" in mistake(capsys, "train.py", "@flags")


def test_a_pipe_of_flags_is_read_once(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as threads:
        threads.submit(pipe.write_text, "--rank 4")
        assert parse("train.py", *TINY, f"@{pipe}").rank == 4


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch, tmp_path):
    """Behind = and in a file no shell has replaced it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "flags").write_text("--compare=~/c\n--out\n~/runs/o\n")
    paths = ["--model=~/m", "--dataset=~", f"@{tmp_path / 'flags'}"]
    args = parse("eval.py", *paths, "--columns", "~", "~a", "b", "--split", "~")
    assert (args.model, args.dataset) == (f"{tmp_path}/m", str(tmp_path))
    assert (args.out, args.compare) == (tmp_path / "runs" / "o", tmp_path / "c")
    assert (args.columns, args.split) == (["~", "~a", "b"], ["~"])
    assert parse("train.py", *TINY, "--out=~/o").out == tmp_path / "o"
    with pytest.raises(ValueError, match=f"{tmp_path}/run holds no run"):
        parse("train.py", "--resume=~/run")
    with pytest.raises(ValueError, match=f"no adapter directory '{tmp_path}/run'"):
        parse("eval.py", "--adapter=~/run")


def test_any_seed_is_one_that_torch_takes():
    for seed in (2**32, 2**64 - 1, 10**40):
        torch.manual_seed(parse("train.py", *TINY, "--seed", seed).seed)
    assert parse("train.py", *TINY, "--seed", 2**32).seed == 2**32


def test_all_linear_is_a_word_and_not_a_name():
    assert parse("train.py", *TINY, "--targets", "all-linear").targets == "all-linear"


# -----------------------------------------------------------------------------
# The arguments of an adapter


@pytest.fixture
def adapter(tmp_path) -> Path:
    """An adapter of train.py, as far as command lines read it."""
    directory = tmp_path / "adapter"
    directory.mkdir()
    config = {"base_model_name_or_path": "tiny/model", "r": 8}
    saved = {"dataset": "tiny/data", "quant": "none", "dtype": "fp32", "max_length": 99}
    write_json(directory / "adapter_config.json", config)
    saved |= {"limit": 5, "batch_size": 3, "processes": 2, "versions": {}}
    write_json(directory / "args.json", saved)
    return directory


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value))


def test_an_adapter_is_evaluated_as_it_was_trained(adapter):
    args = parse("eval.py", "--adapter", adapter)
    assert (args.model, args.dataset) == ("tiny/model", "tiny/data")
    assert (args.quant, args.dtype, args.max_length) == ("none", "fp32", 99)
    assert (args.limit, args.batch_size) == (None, 64), "these are no properties of an adapter"


def test_what_is_typed_comes_before_what_the_adapter_says(adapter):
    args = parse("eval.py", "--adapter", adapter, "--quant", "nf4", "--model", "other/model")
    assert (args.quant, args.dtype, args.model) == ("nf4", "fp32", "other/model")


def test_an_adapter_of_peft_names_its_model_alone(adapter):
    (adapter / "args.json").unlink()
    args = parse("eval.py", "--adapter", adapter)
    assert (args.model, args.dataset, args.quant) == ("tiny/model", "nyu-mll/glue", "nf4")
    # An args.json beside it may be another program's.
    write_json(adapter / "args.json", {"dataset": ["alpaca"], "dtype": "bfloat16"})
    assert parse("eval.py", "--adapter", adapter) == args


def test_a_path_of_a_run_is_found_from_another_folder(monkeypatch, tmp_path):
    """The run was started in `home`, and its args.json holds paths as they were typed there."""
    home = tmp_path / "home"
    (home / "models" / "mine").mkdir(parents=True)
    (home / "out" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = str(home / "models" / "mine")
    assert origin.find("models/mine", home / "out" / "run") == found
    assert origin.find("microsoft/phi-2", home / "out" / "run", home) is None
    # A run that lies elsewhere says where it was started.
    assert origin.find("models/mine", tmp_path / "runs" / "run", home) == found


def test_a_name_of_a_run_is_looked_up_where_it_was_typed_before_here(monkeypatch, tmp_path):
    name = "rows-of-a-moved-run"  # which no folder above has, up to the root
    run = tmp_path / "moved" / "out" / "run"
    started = tmp_path / "started"
    for place in (run, started, tmp_path / "moved" / name, tmp_path / "here" / name):
        place.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert origin.find(name, run, started) == str(tmp_path / "moved" / name)
    assert origin.find(name, started / "run", started) == name
    (started / name).mkdir()
    assert origin.find(name, run, started) == str(started / name)
    monkeypatch.chdir(started)  # as it was typed, where that is the same
    assert origin.find(name, run, started) == name


def test_a_revision_that_is_typed_is_taken_before_that_of_the_adapter(adapter):
    config = {"base_model_name_or_path": "me/base", "revision": "v1"}
    write_json(adapter / "adapter_config.json", config)
    assert parse("eval.py", "--adapter", adapter).model_revision == "v1"
    later = parse("eval.py", "--adapter", adapter, "--model-revision", "v2")
    assert (later.model, later.model_revision) == ("me/base", "v2")
    # It says nothing about another model.
    other = parse("eval.py", "--adapter", adapter, "--model", "me/other")
    assert other.model_revision is None


def test_a_run_is_resumed_from_any_folder(monkeypatch, tmp_path):
    run = begin(tmp_path / "run", "--model", "tiny/model", "--dataset", "tiny/data")
    assert parse("train.py", "--resume", run).model == "tiny/model"
    monkeypatch.chdir("/")
    args = parse("train.py", "--resume", run)
    assert (args.model, args.dataset) == (f"{ROOT}/tiny/model", f"{ROOT}/tiny/data")


def test_an_adapter_that_names_no_model_needs_one_to_be_typed(adapter):
    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": None})
    with pytest.raises(ValueError, match="does not name its base model; pass --model"):
        parse("eval.py", "--adapter", adapter)
    assert parse("eval.py", "--adapter", adapter, "--model", "tiny/model").model == "tiny/model"


def test_what_is_no_adapter_is_said_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="is not an adapter: it has no adapter_config.json"):
        parse("eval.py", "--adapter", tmp_path)
    with pytest.raises(ValueError, match="no adapter directory .*none"):
        parse("eval.py", "--adapter", tmp_path / "none")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file: pass the folder that it is in"):
        parse("eval.py", "--adapter", tmp_path / "adapter_model.safetensors")


# -----------------------------------------------------------------------------
# The arguments of a run that is resumed


def begin(folder: Path, *flags) -> Path:
    """Writes args.json as a run does that was stopped before its first step."""
    args = parse("train.py", *flags, "--out", folder)
    folder.mkdir()
    write_json(folder / "args.json", cli.as_json(args) | {"commit": "0123", "processes": 1})
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        TINY,
        [],  # tiny/args
        ["--epochs", 1.5, "--limit", 9],
        [*TINY, "--targets", "all-linear", "--no-share-prefix", "--loss", "full", "--wandb"],
        [*TINY, "--targets", "fc1", "fc2", "--limit", 9, "--warmup-steps", 0, "--alpha", 7.5],
        [*TINY, "--push", "me/adapter", "--double-quant", "--dtype", "fp32", "--device", "cpu"],
    ],
)
def test_a_run_is_resumed_with_its_own_arguments(tmp_path, flags):
    run = begin(tmp_path / "run", *flags)
    args = parse("train.py", "--resume", run)
    saved = read_json(run / "args.json")
    kept = (*vars(args), "started_in")
    expected = {name: saved[name] for name in kept} | {"resume": str(run)}
    assert cli.as_json(args) == expected


def test_what_makes_no_other_run_may_be_typed(tmp_path):
    run = begin(tmp_path / "run", *TINY, "--epochs", 1)
    free = ["--steps", 90, "--eval-every", 5, "--save-every", 6, "--checkpointing", "--wandb"]
    # The model and the rows may have moved: their digests are compared when they are read.
    free += ["--model", "elsewhere/model", "--dataset", "elsewhere/data"]
    args = parse("train.py", "--resume", run, "--out", run, *free, "--rank", 8)
    assert (args.steps, args.epochs) == (90, None)
    assert (args.eval_every, args.save_every) == (5, 6)
    assert args.checkpointing and args.wandb
    assert (args.model, args.dataset) == ("elsewhere/model", "elsewhere/data")


@pytest.mark.parametrize(
    "flags, difference",
    [
        (["--rank", 16], "--rank 16 (it has 8)"),
        (["--seed", 5], "--seed 5 (it has 0)"),
        (["--validation", 0.1], "--validation 0.1 (it has None)"),
        (["--targets", "fc1", "fc2"], "--targets fc1 fc2 (it has q_proj v_proj)"),
        (["--no-share-prefix"], "--share-prefix False (it has True)"),
        (["--rank", 4, "--limit", 7], "--rank 4 (it has 8), --limit 7 (it has None)"),
    ],
)
def test_what_would_make_another_run_is_refused_with_the_difference(tmp_path, flags, difference):
    run = begin(tmp_path / "run", *TINY)
    with pytest.raises(ValueError) as raised:
        parse("train.py", "--resume", run, *flags)
    expected = f"{run} cannot resume with {difference}: that would be another run"
    assert sorted(str(raised.value)) == sorted(expected)  # the differences come in any order


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("rank", "eight", "--rank must be a whole number of at least 1, not eight"),
        ("rank", True, "--rank must be a whole number of at least 1, not True"),
        ("rank", None, "--rank must be a whole number of at least 1, not None"),
        ("steps", 2.5, "--steps must be a whole number of at least 1, not 2.5"),
        ("dropout", [0.5], "--dropout must be a number of at least 0, not [0.5]"),
        ("loss", "both", "--loss must be one of answer, full, not both"),
        ("dtype", "fp64", "--dtype must be one of bf16, fp16, fp32, not fp64"),
        ("double_quant", "no", "--double-quant must be true or false, not 'no'"),
    ],
)
def test_a_damaged_argument_of_a_run_is_one_line(tmp_path, name, value, message):
    run = begin(tmp_path / "run", *TINY)
    write_json(run / "args.json", read_json(run / "args.json") | {name: value})
    with pytest.raises(ValueError) as raised:
        parse("train.py", "--resume", run)
    assert str(raised.value) == f"the arguments in {run}: {message}"


def test_a_run_is_not_written_over(tmp_path):
    run = begin(tmp_path / "run", *TINY)
    command = f"python train.py --resume {run}"
    with pytest.raises(ValueError, match=f"holds a run already: .*, or resume it: {command}"):
        cli.check_out(run)


@pytest.mark.parametrize("name", ["README.md", "results.json"])
def test_nobodys_files_are_written_over(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds a {name} already: choose another --out"):
        cli.check_out(tmp_path)


def test_a_run_is_not_resumed_into_another_folder(tmp_path, capsys):
    """There it would lose its metrics, or write over another run."""
    run = begin(tmp_path / "run", *TINY)
    line = mistake(capsys, "train.py", "--resume", run, "--out", tmp_path / "other")
    assert f"--resume {run} writes into {run}, not into --out" in line


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no run to resume"):
        parse("train.py", "--resume", tmp_path)


# -----------------------------------------------------------------------------
# Restarts by torchrun


def test_restarts_need_a_folder_to_find_again(monkeypatch, capsys):
    monkeypatch.setattr(processes, "MAX_RESTARTS", 3)
    assert "--max-restarts needs --out" in mistake(capsys, "train.py", *TINY)


def test_a_run_that_torchrun_starts_again_is_resumed(monkeypatch, tmp_path):
    run = begin(tmp_path / "run", *TINY, "--steps", 9)
    monkeypatch.setattr(processes, "MAX_RESTARTS", 3)
    monkeypatch.setattr(processes, "RESTARTS", 1)
    args = parse("train.py", *TINY, "--steps", 9, "--out", run)
    assert (args.resume, args.out, args.steps) == (run, run, 9)


def test_a_restart_after_a_refusal_does_not_take_the_run_of_another_torchrun(monkeypatch, tmp_path):
    run = begin(tmp_path / "run", *TINY)
    write_json(run / "args.json", read_json(run / "args.json") | {"torchrun": "another"})
    monkeypatch.setattr(processes, "MAX_RESTARTS", 3)
    monkeypatch.setattr(processes, "RESTARTS", 1)
    monkeypatch.setattr(processes, "TORCHRUN", "this one")
    assert parse("train.py", *TINY, "--out", run).resume is None
    monkeypatch.setattr(processes, "TORCHRUN", "another")
    assert parse("train.py", *TINY, "--out", run).resume == run


def test_a_restart_before_anything_was_written_starts_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "MAX_RESTARTS", 3)
    monkeypatch.setattr(processes, "RESTARTS", 1)
    args = parse("train.py", *TINY, "--out", tmp_path / "run")
    assert (args.resume, args.out) == (None, tmp_path / "run")


# -----------------------------------------------------------------------------
# Anything in args.json is the arguments or one error


@hostile
@given(data=st.data())
def test_any_args_json_of_a_run_is_its_arguments_or_one_error(tmp_path_factory, data):
    run = begin(tmp_path_factory.mktemp("runs") / "run", *TINY)
    saved = read_json(run / "args.json")
    write_json(run / "args.json", changed(saved, data.draw))
    try:
        args = parse("train.py", "--resume", run)
    except (ValueError, SystemExit) as error:  # SystemExit, where flags do not go together
        assert str(error).strip()
        return
    assert args.loss in ("answer", "full")
    assert args.rank >= 1 and type(args.rank) is int
    assert type(args.learning_rate) is float
    assert args.targets == "all-linear" or all(type(name) is str for name in args.targets)
    assert args.out == args.resume == run


@hostile
@given(data=st.data())
def test_any_files_of_an_adapter_are_its_arguments_or_one_error(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("adapter")
    config = {"base_model_name_or_path": "tiny/model"}
    saved = {"dataset": "tiny/data", "quant": "nf4", "double_quant": False, "dtype": "bf16"}
    write_json(directory / "adapter_config.json", changed(config, data.draw))
    write_json(directory / "args.json", changed(saved | {"max_length": 512}, data.draw))
    try:
        args = parse("eval.py", "--adapter", directory)
    except ValueError as error:
        assert str(error).strip()
        return
    assert args.quant in ("nf4", "none")
    assert args.dtype in ("bf16", "fp32")
    assert type(args.max_length) is int
    assert type(args.model) is str and type(args.dataset) is str


def test_a_name_that_is_too_long_for_a_path_is_no_folder(tmp_path):
    assert origin.find("0" * 9999, tmp_path) is None


# -----------------------------------------------------------------------------
# The frame of every script: one line, or the traceback


def run_with(error: BaseException) -> str:
    """Returns what a script prints when its main raises `error`."""

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    return stopped.value.code


def test_an_error_of_the_user_is_one_line():
    assert run_with(ValueError("a\n  thing")) == "error: a thing"
    assert run_with(FileNotFoundError(2, "No such file", "a.json")).startswith("error: [Errno 2]")
    assert run_with(KeyboardInterrupt()) == "interrupted"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory"),
        RuntimeError("CUDA error: out of memory"),
        MemoryError("Cannot allocate memory (os error 12)"),
    ],
)
def test_memory_that_runs_out_is_one_line_with_what_helps_before_it(error):
    """What helps is in tests/test_hardware.py."""
    assert run_with(error) == f"error: {error}"
    error.add_note("a step does not fit")
    assert run_with(error) == f"error: a step does not fit: {error}"


def test_an_error_without_a_text_has_its_name():
    assert run_with(MemoryError()) == "error: MemoryError"


def test_ctrl_c_while_libraries_are_imported_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", None)  # to be put back
    monkeypatch.setattr(sys, "argv", ["train.py"])
    cli.answer_help(cli.train_parser)
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "interrupted\n"
    sys.excepthook(ZeroDivisionError, ZeroDivisionError("by 0"), None)
    assert capsys.readouterr().err == "ZeroDivisionError: by 0\n"


def test_of_several_processes_the_one_that_failed_is_named(monkeypatch):
    monkeypatch.setattr(processes, "COUNT", 2)
    monkeypatch.setattr(processes, "NUMBER", 1)
    assert run_with(ValueError("a thing")) == "error: process 1: a thing"


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--debug"])
    with pytest.raises(ValueError):
        cli.run(lambda: int("a thing"))


def test_a_bug_is_a_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0)


# -----------------------------------------------------------------------------
# Mistakes that show once files are read: one line, and what was there before stays


def broken_model(folder: Path, change) -> list:
    """Returns the flags for a copy of tiny/model in which `change` has broken something."""
    model = folder / "broken"
    shutil.copytree(ROOT / "tiny" / "model", model)
    change(model)
    return ["--model", model]


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


def reshape(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.2.mlp.fc1.weight"
    tensors[name] = tensors[name][:, :100].contiguous()
    save_file(tensors, model / "model.safetensors")


def change_architecture(model: Path) -> None:
    config = read_json(model / "config.json")
    write_json(model / "config.json", config | {"model_type": "llama"})


def lose_a_shard(model: Path) -> None:
    shard = "model-00001-of-00002.safetensors"
    weight_map = {key: shard for key in load_file(model / "model.safetensors")}
    (model / "model.safetensors").unlink()
    write_json(model / "model.safetensors.index.json", {"weight_map": weight_map})


def dataset_of(folder: Path, *rows: dict) -> list:
    """Returns the flags for a dataset of these rows."""
    for split in ("train", "validation"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    return ["--dataset", folder]


ROW = {"premise": "Anna bought a dog.", "hypothesis": "Anna bought an animal.", "label": 0}
TARGET = (
    "no linear layer that takes an adapter matches ['q_porj']; there are dense, fc1, fc2, k_proj, "
    "q_proj, v_proj"
)
# By what is wrong: the flags, or what makes them from an empty folder, and a part of the line.
MISTAKES = {
    "no such model": (["--model", "no/such/model"], "no model directory 'no/such/model'"),
    "no such dataset": (["--dataset", "no/such/data"], "no dataset directory 'no/such/data'"),
    "a target": (["--targets", "q_porj"], TARGET),
    "a length": (["--max-length", "50"], "--max-length 50 leaves no room for"),
    "a warm-up": (["--warmup-steps", "2"], "--warmup-steps 2: the run has only 1 steps"),
    "a shard not there": (
        lambda folder: broken_model(folder, lose_a_shard),
        "lists model-00001-of-00002.safetensors, which is not there",
    ),
    "a truncated file": (
        lambda folder: broken_model(folder, truncate),
        "model.safetensors is damaged or cut short",
    ),
    "a shape": (
        lambda folder: broken_model(folder, reshape),
        "weight has shape (768, 100), not (768, 192)",
    ),
    "an architecture": (
        lambda folder: broken_model(folder, change_architecture),
        "model_type 'llama' is not supported",
    ),
    "a column": (
        lambda folder: dataset_of(folder, {"premise": "a", "label": 0}),
        "no columns are called hypothesis",
    ),
    "a label": (
        lambda folder: dataset_of(folder, ROW, ROW | {"label": 3}),
        "row 1: label 3 is none of 0, ",
    ),
    "an empty split": (dataset_of, "train.jsonl: it holds no rows"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_lost(tmp_path, name):
    flags, message = MISTAKES[name]
    if callable(flags):
        flags = flags(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_model.safetensors").write_bytes(b"an earlier run's")
    short = ["--steps", 1, "--eval-limit", 4, "--max-new-tokens", 1, "--out", out]
    with pytest.raises(SystemExit) as stopped:
        in_process(train, *TINY, *short, *flags)
    line = stopped.value.code
    assert line.startswith("error: ")
    assert message in line
    assert "\n" not in line
    assert (out / "adapter_model.safetensors").read_bytes() == b"an earlier run's"


def test_a_script_ends_with_status_1_one_line_and_no_traceback_but_with_debug(tmp_path):
    command = ("train.py", "--model", "no/such/model", "--out", tmp_path / "run")
    done = script(*command)
    line = "error: no model directory 'no/such/model', and it is not a Hub id (owner/name): "
    line += "say with --model where it is\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
    done = script(*command, "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_script_ends_with_status_2_at_a_wrong_flag():
    done = script("eval.py", "--limit", -1)
    line = "error: argument --limit: must be a whole number of at least 1, not -1; "
    assert (done.returncode, done.stdout) == (MISTAKE, "")
    assert done.stderr == line + "see python eval.py --help\n"


# -----------------------------------------------------------------------------
# Other machines


@pytest.mark.parametrize("name", ["train.py", "eval.py"])
def test_help_does_not_wait_for_torch(name):
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = script("-c", code, name, fresh=True)
    assert done.stdout.startswith(f"usage: python {name} ")
    assert done.stderr == "False\n"


@pytest.mark.parametrize("name", ["train.py", "eval.py", "scripts/report.py"])
@pytest.mark.parametrize("option", ["-P", "-I"])
def test_a_script_starts_from_any_folder_in_pythons_safe_mode(tmp_path, name, option):
    done = script(option, ROOT / name, "--help", cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python ")


def test_every_script_finds_the_project_before_it_imports_it():
    scripts = set(ROOT.glob("scripts/*.py")) - {ROOT / "scripts" / "contenders.py"}
    for path in [ROOT / "train.py", ROOT / "eval.py", *scripts]:  # (bench.py starts the former)
        text = path.read_text()
        found = re.search(r"^(from|import) (support|data|scripts)\b", text, re.MULTILINE)
        if found and "__main__" in text:
            assert "sys.path.insert(0, " in text[: found.start()], path.name


def test_a_reader_that_goes_away_is_no_error():
    """As `| head -1` does."""
    process = start_script("-m", "scripts.describe", *TINY, fresh=True)
    assert process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=600) == 1
    assert "roken pipe" not in errors
    assert "Traceback" not in errors


def test_what_is_written_to_closed_outputs_is_discarded(monkeypatch, capsys):
    """As 2>&- closes them: the progress bars need a stream, and print would take the other one."""
    monkeypatch.setattr(sys, "stderr", None)
    cli.prepare_outputs()
    print("a notice", file=sys.stderr)
    list(tqdm(range(2)))
    monkeypatch.setattr(sys, "stdout", None)
    cli.prepare_outputs()
    print("an answer")
    assert capsys.readouterr().out == ""


def test_output_is_utf_8_whatever_the_locale_says(tmp_path):
    rows = [ROW | {"premise": "\u00c9milie \u65e5\u672c.", "label": label} for label in range(3)]
    flags = dataset_of(tmp_path, *rows)
    command = ("-m", "scripts.describe", "--model", "tiny/model", *flags)
    for encoding in ("ascii", "cp1252"):
        fresh = encoding == "ascii"  # one by Python itself, one as the tests start it
        done = script(*command, env={"PYTHONIOENCODING": encoding}, fresh=fresh)
        assert done.returncode == 0, done.stderr
        assert "0 entailment: \u00c9milie \u65e5\u672c. -> " in done.stdout
