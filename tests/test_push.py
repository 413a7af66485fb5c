"""The Hub reads the card, its code runs, what is pushed comes back, and no path is in it."""

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, read_json, script
from hub import TOKEN, serving
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from support import card, files, hub, upload


def environment(address: str, home, token: str | None = TOKEN) -> dict[str, str]:
    """The variables that make huggingface_hub talk to the Hub at `address`."""
    variables = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    if token:
        variables["HF_TOKEN"] = token
    return variables


def push(run, *flags: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    command = ("-m", "scripts.push", "--adapter", run, "--repo", "me/adapter", *flags)
    return script(*command, env=env)


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    """The directory into which the Hub of the fixture `run` puts what it is sent."""
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def run(tmp_path_factory, uploads):
    """A real run over NF4 that uploads itself at its end; its model and data are absolute paths."""
    out = tmp_path_factory.mktemp("run") / "run"
    command = ["train.py", "--model", ROOT / "tiny/model", "--dataset", ROOT / "tiny/data"]
    command += ["--keep-dequantized"]  # the same bits in less time
    command += ["--steps", 30, "--batch-size", 8, "--learning-rate", 3e-3, "--dtype", "fp32"]
    command += ["--eval-limit", 20, "--max-new-tokens", 2, "--out", out, "--push", "me/trained"]
    with serving({}, uploads) as (address, _):
        done = script(*command, env=environment(address, tmp_path_factory.mktemp("home")))
    assert done.returncode == 0, done.stderr
    assert "uploaded to http://127.0.0.1" in done.stdout
    return out


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture
def staged(tmp_path):
    directory = tmp_path / "staged"
    directory.mkdir()
    return directory


def rename(run, directory, model: str, dataset: str) -> None:
    """Writes the JSON files of a run into `directory`, under other names of model and dataset."""
    directory.mkdir(parents=True, exist_ok=True)
    args = read_json(run / "args.json") | {"model": model, "dataset": dataset}
    config = read_json(run / "adapter_config.json") | {"base_model_name_or_path": model}
    files.write_json(directory / "args.json", args)
    files.write_json(directory / "adapter_config.json", config)
    files.write_json(directory / "results.json", read_json(run / "results.json"))


def metadata(text: str):
    """The head of a card, as the Hub's library reads it."""
    from huggingface_hub import ModelCard

    return ModelCard(text).data


def assert_one_line(done: subprocess.CompletedProcess, *messages: str) -> None:
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for message in messages:
        assert message in done.stderr


# ---- The card


def test_the_card_is_one_the_hub_reads(run):
    read = metadata((run / "README.md").read_text())
    assert read.library_name == "peft"
    assert read.metrics == ["accuracy"]
    assert read.base_model is None, "a directory is no name on the Hub"
    assert read.datasets is None
    assert read.language is None, "of rows that are not MNLI's it is not known"
    results = read_json(run / "results.json")["finetuned"]
    assert {result.dataset_split: result.metric_value for result in read.eval_results} == {
        split: result["accuracy"] for split, result in results.items()
    }
    assert {result.metric_type for result in read.eval_results} == {"accuracy"}
    text = (run / "README.md").read_text()
    for split, result in results.items():
        assert f"| finetuned | {split} | {result['accuracy']:.4f} |" in text


def test_a_base_and_a_dataset_of_the_hub_are_named(run, tmp_path):
    rename(run, tmp_path / "run", "microsoft/phi-2", "nyu-mll/glue")
    read = metadata(card.card(tmp_path / "run", data.PROMPT))
    assert read.base_model == "microsoft/phi-2"
    assert read.datasets == ["nyu-mll/glue"]
    assert read.language == "en"
    assert {result.dataset_config for result in read.eval_results} == {"mnli"}


def test_the_settings_of_the_run_are_on_the_card(run):
    text = (run / "README.md").read_text()
    args = read_json(run / "args.json")
    for line in ("| rank | 8 |", "| learning rate | 0.003 |", "| quant | nf4 |", "| seed | 0 |"):
        assert line in text
    assert "double quant" not in text, "a flag that is off is not listed"
    for library, version in args["versions"].items():
        assert f"{card.plain(library)} {card.plain(version)}" in text


def test_the_card_shows_the_loss_where_it_was_drawn(copy):
    picture = "](loss.png)"
    assert picture in card.card(copy, data.PROMPT)
    (copy / "loss.png").unlink()
    assert picture not in card.card(copy, data.PROMPT)


def test_the_code_on_the_card_runs_with_peft(run, tiny, tmp_path):
    """It prints what eval.py answers, over a base that is quantised as the run's was."""
    text = (run / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert "load_in_4bit" in code, "the results are over NF4"
    assert '"path/to/model"' in code
    assert '"path/to/this/folder"' in code
    # transformers needs a tokenizer_config.json beside tokenizer.json; phi-2 has one on the Hub.
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    code = code.replace('"path/to/model"', repr(str(base)))
    code = code.replace('"path/to/this/folder"', repr(str(run)))
    (tmp_path / "code.py").write_text(code)
    theirs = script(tmp_path / "code.py")
    assert theirs.returncode == 0, theirs.stderr

    pair = ("--premise", "Anna bought a rose.", "--hypothesis", "Anna bought a flower.")
    ours = script("eval.py", "--adapter", run, *pair, "--max-new-tokens", 2)
    assert ours.returncode == 0, ours.stderr
    answer = theirs.stdout.strip().removesuffix(data.EOS)
    assert f"completion: ' {answer}'" in ours.stdout


def test_an_args_json_without_its_keys_is_one_line(copy, tmp_path):
    files.write_json(copy / "args.json", {"rank": 8})
    done = push(copy, env=environment("http://127.0.0.1:9", tmp_path / "home"))
    assert_one_line(done, "is not a run of train.py: its args.json is another one")


# ---- Names and paths


@given(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=40))
@settings(deadline=None, max_examples=60)
def test_no_name_breaks_the_card(run, tmp_path_factory, model, dataset):
    directory = tmp_path_factory.mktemp("copy") / "run"
    rename(run, directory, model, dataset)
    read = metadata(card.card(directory, data.PROMPT))
    assert read.library_name == "peft"
    assert len(read.eval_results) == 2


def test_a_name_is_text_on_the_card_and_no_markup(run, tmp_path):
    rename(run, tmp_path / "run", "<img src=x>", "[a](b) `c`\n# d | e")
    text = card.card(tmp_path / "run", data.PROMPT)
    prose, _, rest = text.partition("```python")
    prose += rest.partition("```\n")[2]  # without the code, where a name is a quoted string
    for markup in ("<img", "[a](b)", "`c`", "\n# d", "d | e"):
        assert markup not in prose
    assert "for ?img src?x?, fine-tuned on ?a??b? ?c??? d ? e to decide" in prose


@pytest.mark.parametrize(
    "path, last",
    [
        ("/home/SECRET/x", "x"),
        ("/home/SECRET/x/", "x"),
        ("/home/SECRET/", "SECRET"),
        ("~SECRET/x", "x"),
        ("~/SECRET/x", "x"),
        ("../SECRET/x", "x"),
        ("./../../SECRET/x", "x"),
        ("SECRET/a/x", "x"),
        ("file:///home/SECRET/x", "x"),
        ("C:\\Users\\SECRET\\x", "x"),
        ("C:/SECRET/x", "x"),
        ("\\\\SECRET\\share\\x", "x"),
    ],
)
def test_no_part_of_a_path_but_the_last_is_in_what_is_uploaded(copy, staged, path, last):
    rename(copy, copy, path, path)
    card.write_card(copy, data.PROMPT)
    upload.stage(copy, "me/adapter", data.PROMPT, staged)
    config = read_json(staged / "adapter_config.json")
    assert config["base_model_name_or_path"] == last
    assert read_json(staged / "args.json")["dataset"] == last
    assert metadata((staged / "README.md").read_text()).base_model is None
    for file in staged.iterdir():
        assert last == "SECRET" or b"SECRET" not in file.read_bytes()


def test_a_path_that_looks_like_a_name_on_the_hub_is_one_if_it_is_there_above_the_run(
    run, tmp_path, monkeypatch
):
    """The run was started in tmp_path, with --dataset my/pairs; the card is written elsewhere."""
    (tmp_path / "my" / "pairs").mkdir(parents=True)
    directory = tmp_path / "out" / "run"
    rename(run, directory, "my/pairs", "my/pairs")
    monkeypatch.chdir("/")
    text = card.card(directory, data.PROMPT)
    assert metadata(text).base_model is None
    assert metadata(text).datasets is None
    assert "my/pairs" not in text


# ---- The upload


def assert_same_files(folder: Path, other: Path, names) -> None:
    for name in names:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def assert_no_secret(folder: Path, *secrets: str) -> None:
    for path in folder.iterdir():
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret.encode() in content for secret in secrets), path.name


def test_what_is_pushed_comes_back_byte_for_byte_and_answers(run, uploads, tmp_path):
    back = tmp_path / "back"
    with serving({}, tmp_path / "uploads") as (address, requests):
        variables = environment(address, tmp_path / "home")
        done = push(run, env=variables)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith("/me/adapter")
        assert any(request.startswith("PUT /lfs/") for request in requests), "the adapter's way"
        download = f"snapshot_download('me/adapter', local_dir={str(back)!r})"
        code = f"from huggingface_hub import snapshot_download; {download}"
        assert script("-c", code, env=variables).returncode == 0

    names = {path.name for path in back.iterdir() if path.is_file()}
    written = {"README.md", "adapter_config.json", "args.json"}
    assert names == written | set(upload.COPIED), "nothing of the rows, nothing to resume"
    # README.md names its own repository.
    assert_same_files(back, uploads / "me" / "trained", names - {"README.md"})
    assert_same_files(back, run, upload.COPIED)
    assert_no_secret(back, TOKEN, str(ROOT), str(run.parent))

    done = script(
        *("eval.py", "--adapter", back, "--limit", 8),
        *("--model", "tiny/model", "--dataset", "tiny/data"),
    )
    assert done.returncode == 0, done.stderr
    assert "12 layers adapted" in done.stdout


def test_an_adapter_on_the_hub_is_evaluated_by_its_name(run, tmp_path):
    pair = ("--premise", "A red rose fell.", "--hypothesis", "A rose fell.")
    here = script("eval.py", "--adapter", run, *pair)
    assert here.returncode == 0, here.stderr
    with serving({"models/me/adapter": run}) as (address, requests):
        variables = environment(address, tmp_path / "home")
        named = ("eval.py", "--adapter", "me/adapter", "--model", ROOT / "tiny/model", *pair)
        done = script(*named, env=variables)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[1:] == here.stdout.splitlines()[1:]
        unknown = script("eval.py", "--adapter", "me/nothing", *pair, env=variables)
    line = "error: cannot load the adapter 'me/nothing' from the Hub, and it is not a directory"
    assert unknown.stderr.startswith(line)
    # What was downloaded is found again without the Hub.
    done = script(*named, env=variables | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr


def test_the_one_adapter_below_a_folder_is_found(run, tmp_path):
    checkpoint = tmp_path / "trained" / "checkpoint-500"
    checkpoint.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / name, checkpoint)
    assert hub.find_adapter(str(run)) == run
    assert hub.find_adapter(str(checkpoint)) == checkpoint
    assert hub.find_adapter(str(checkpoint.parent)) == checkpoint
    assert hub.find_adapter(str(tmp_path)) == checkpoint
    second = shutil.copytree(checkpoint, checkpoint.parent / "checkpoint-900")
    with pytest.raises(ValueError, match="holds several adapters") as raised:
        hub.find_adapter(str(checkpoint.parent))
    assert f"{checkpoint}, {second}" in str(raised.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not an adapter: it has no adapter_config.json"):
        hub.find_adapter(str(tmp_path / "empty"))


def test_the_uploaded_card_names_its_repository(run, staged, tmp_path):
    upload.stage(run, "me/adapter", data.PROMPT, staged)
    local = (run / "README.md").read_text()
    uploaded = (staged / "README.md").read_text()
    assert '"path/to/this/folder"' in local
    assert '"me/adapter"' in uploaded
    # An adapter in best/ has no card.
    (staged / "README.md").unlink()
    upload.stage(staged, "me/adapter", data.PROMPT, tmp_path)
    assert '"me/adapter"' in (tmp_path / "README.md").read_text()


def test_a_card_that_somebody_has_written_is_uploaded_as_it_is(copy, staged):
    (copy / "README.md").write_text("# Mine\n")
    upload.stage(copy, "me/adapter", data.PROMPT, staged)
    assert (staged / "README.md").read_text() == "# Mine\n"
    assert (copy / "README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_without_the_right_token_it_is_one_line_that_says_what_to_do(run, tmp_path, token):
    with serving({}, tmp_path / "uploads") as (address, _):
        done = push(run, env=environment(address, tmp_path / "home", token))
    assert done.returncode == 1
    assert "cannot upload to me/adapter" in done.stderr
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr
    assert "hf_wrong" not in done.stderr


@pytest.mark.parametrize("offline", ["0", "1"])
def test_without_a_connection_it_is_one_line_with_the_command_to_try_again(run, tmp_path, offline):
    with serving({}) as (address, _):
        pass  # nobody listens at this address any more
    variables = environment(address, tmp_path / "home") | {"HF_HUB_OFFLINE": offline}
    done = push(run, env=variables)
    assert_one_line(done, "cannot upload to me/adapter", f"--adapter {run} --repo me/adapter")


def test_a_private_upload_stays_private(run, tmp_path):
    """A repository that is there already keeps its state, whatever the upload asks for."""
    for is_there in (False, True):
        folder = tmp_path / f"uploads {is_there}"
        public = folder / "me" / "adapter"
        there = {"models/me/adapter": public} if is_there else {}
        with serving(there, folder) as (address, _):
            variables = environment(address, tmp_path / "home")
            done = push(run, "--private", env=variables)
        if is_there:
            assert_one_line(done, "me/adapter already exists and is public: nothing was")
            assert list(public.iterdir()) == []
        else:
            assert done.returncode == 0, done.stderr
            assert (public / "adapter_model.safetensors").is_file()
    again = push(run, "--private", env=variables)  # nobody listens any more
    assert_one_line(again, "--repo me/adapter --private")


def test_whatever_fails_once_a_run_has_its_results_is_one_line_and_all_else_is_done(tmp_path):
    """W&B, a picture, the page and the upload, of which no run needs any."""
    out = tmp_path / "run"
    (out / "loss.png").mkdir(parents=True)
    (out / "report.html").mkdir()
    with serving({}) as (address, _):
        pass  # nobody listens at this address any more
    variables = environment(address, tmp_path / "home")
    variables |= {"WANDB_MODE": "offline", "WANDB_PROJECT": "not/a#name", "WANDB_SILENT": "true"}
    command = ["train.py", "--model", "tiny/model", "--dataset", "tiny/data", "--out", out]
    command += ["--steps", 1, "--batch-size", 4, "--eval-limit", 4, "--max-new-tokens", 1]
    done = script(*command, "--wandb", "--push", "me/adapter", env=variables)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    beginnings = (
        "error: W&B: ",
        f"error: the pictures: cannot write into {out}: ",
        f"error: report.html: cannot write into {out}: ",
        "error: --push: cannot upload to me/adapter ",
    )
    assert len(errors) == len(beginnings), done.stderr
    for line, beginning in zip(errors, beginnings):
        assert line.startswith(beginning)
    assert "Traceback" not in done.stderr
    # The table comes before all of them, the rest after.
    assert "\nfinetuned\n" in done.stdout
    assert f"adapter and results.json are in {out}" in done.stdout
    assert f"python scripts/report.py {out}" in done.stdout
    for name in ("results.json", "loss.svg", "README.md"):
        assert (out / name).is_file(), name


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--adapter", "x"], "required: --repo"),
        (["--adapter", "x", "--repo", "me"], "is not a repository on the Hub"),
        (
            ["--adapter", "x", "--repo", "me/adapter"],
            "x is not a run of train.py: it has no adapter",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    done = script("-m", "scripts.push", *arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
