"""microsoft/phi-2 and nyu-mll/glue through the Hub's client libraries, from a Hub on loopback."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ROOT, read_json, script, start_script
from hub import COMMIT, commit_of, serving
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

RUN = (
    "train.py",
    "--rank", 8,
    "--model", "microsoft/phi-2",
    "--dataset", "nyu-mll/glue",
    "--steps", 2,
    "--eval-limit", 10,
    "--max-new-tokens", 2,
)
# The splits of GLUE's MNLI, and the file of tiny/data that each is made of here.
SPLITS = {
    "train": "train",
    "validation_matched": "validation_matched",
    "validation_mismatched": "validation_mismatched",
    "test_matched": "validation_matched",
}


@pytest.fixture(scope="module", autouse=True)
def runs_without_hub(tmp_path_factory) -> dict:
    """Two runs that find no Hub. The client libraries try for 20 s: the other tests go on."""
    with serving({}) as (address, _):
        pass  # nobody listens there any more
    folder = tmp_path_factory.mktemp("without hub")
    env = environment(address, folder / "home")
    no_data = ("--model", "tiny/model", "--out", folder / "no data")
    return {
        "folder": folder,
        "no model": start_script(*RUN, "--out", folder / "no model", env=env),
        "no data": start_script(*RUN, *no_data, env=env),
    }


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> dict[str, Path]:
    return {
        "models/microsoft/phi-2": make_model(tmp_path_factory.mktemp("phi-2")),
        "datasets/nyu-mll/glue": make_dataset(tmp_path_factory.mktemp("glue")),
    }


def make_model(directory: Path) -> Path:
    """Writes tiny/model as phi-2 is on the Hub: in fp16, in shards, beside other files."""
    tiny = ROOT / "tiny" / "model"
    tensors = load_file(tiny / "model.safetensors")
    halves = {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
    save_torch_state_dict(halves, directory, max_shard_size="4MB")
    shutil.copy(tiny / "config.json", directory)
    shutil.copy(tiny / "tokenizer.json", directory)
    (directory / "pytorch_model.bin").write_bytes(b"a file that is not needed")
    return directory


def make_dataset(directory: Path) -> Path:
    """Writes 200 rows of each split of tiny/data as GLUE has them, with its hidden test labels."""
    (directory / "mnli").mkdir()
    for split, source in SPLITS.items():
        path = ROOT / "tiny" / "data" / f"{source}.jsonl"
        rows = datasets.load_dataset("json", data_files=str(path), split="train")
        rows = rows.select(range(200))
        if split.startswith("test"):
            rows = rows.remove_columns("label").add_column("label", [-1] * len(rows))
        rows.to_parquet(directory / "mnli" / f"{split}-00000-of-00001.parquet")
    shutil.copytree(directory / "mnli", directory / "rte")  # another dataset, that is not needed
    # GLUE's card begins with another dataset.
    configurations = card("ax", test="ax/test-*.parquet")
    configurations += card("mnli", **{split: f"mnli/{split}-*.parquet" for split in SPLITS})
    (directory / "README.md").write_text(f"---\nconfigs:\n{configurations}---\n")
    return directory


def environment(address: str, home: Path, offline: bool = False) -> dict[str, str]:
    """Returns the variables that make the client libraries talk to the Hub at `address`."""
    return {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
    }


def assert_one_line(done, error: str) -> None:
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(error), done.stderr


def assert_right_files(downloads: list[str]) -> None:
    shards = {request for request in downloads if "GET" in request and "model-0000" in request}
    assert len(shards) >= 2
    assert not any("pytorch_model" in request for request in downloads)


def test_the_default_names_resolve_download_and_train_and_are_then_at_hand_offline(
    repositories, tmp_path
):
    run = tmp_path / "run"
    home = tmp_path / "home"
    with serving(repositories) as (address, requests):
        done = script(*RUN, "--out", run, env=environment(address, home))
        assert done.returncode == 0, done.stderr
        downloads = [request for request in requests if "/resolve/" in request]
    assert_right_files(downloads)
    assert not any("/rte/" in request for request in downloads)
    config = read_json(run / "adapter_config.json")
    assert config["base_model_name_or_path"] == "microsoft/phi-2"
    results = read_json(run / "results.json")
    assert results["finetuned"].keys() == {"validation_matched", "validation_mismatched"}

    # The server is gone; what was downloaded is enough.
    command = ("eval.py", "--adapter", run, "--limit", 20, "--mode", "score")
    done = script(*command, env=environment(address, home, offline=True))
    assert done.returncode == 0, done.stderr
    assert "validation_mismatched" in done.stdout


# -----------------------------------------------------------------------------
# Revisions

# Of base and rows: v1 is tiny/'s, and main has moved on since.
AT_V1 = ("--model", "me/base", "--model-revision", "v1")
AT_V1 += ("--dataset", "me/rows", "--dataset-revision", "v1")
V1 = commit_of("v1")
LINE = '{"premise": "a", "hypothesis": "x", "label": 0}'
# As cards of datasets have it.
NAMES = """---
dataset_info:
  features:
  - name: label
    dtype:
      class_label:
        names:
          '0': contradiction
          '1': entailment
          '2': neutral
---
"""
FOUR_NAMES = NAMES.replace("neutral", "neutral\n          '3': hidden")
OLD_NAMES = json.dumps({
    "owner--rows": {
        "features": {
            "label": {
                "names": ["contradiction", "entailment", "neutral"],
                "_type": "ClassLabel",
            }
        }
    }
})
A = "a.jsonl"
B = "b.jsonl"
PARTS = {"a-00000-of-00001.jsonl": LINE, "b-00000-of-00001.jsonl": LINE}


def card(configuration: str, **files: str) -> str:
    """Returns the lines of a card on a configuration, {split: file}. Several are joined."""
    lines = [f"  - split: {split}\n    path: {name}\n" for split, name in files.items()]
    return f"- config_name: {configuration}\n  data_files:\n{''.join(lines)}"


@pytest.fixture(scope="module")
def revisions(tmp_path_factory) -> dict[str, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("revisions")
    tiny = ROOT / "tiny" / "model"
    later = shutil.copytree(tiny, folder / "later model")
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.layers.0.mlp.fc1.weight"] += 1
    save_file(tensors, later / "model.safetensors", {"format": "pt"})
    rows = []
    for shift in (0, 1):  # in the later rows each label is another one
        rows.append(folder / f"rows {shift}")
        rows[-1].mkdir()
        for split in ("train", "validation"):
            source = split.replace("validation", "validation_matched")
            lines = (ROOT / "tiny" / "data" / f"{source}.jsonl").read_text().splitlines()[:24]
            values = [json.loads(line) for line in lines]
            shifted = [row | {"label": (row["label"] + shift) % 3} for row in values]
            text = "".join(json.dumps(row) + "\n" for row in shifted)
            (rows[-1] / f"{split}.jsonl").write_text(text)
    return {
        "models/me/base": {"v1": tiny, "main": later},
        "datasets/me/rows": {"v1": rows[0], "main": rows[1]},
    }


@pytest.fixture(scope="module")
def at_v1(revisions, tmp_path_factory) -> tuple[Path, Path]:
    """A run over v1 of model and rows, and its cache of the Hub."""
    folder = tmp_path_factory.mktemp("at v1")
    command = ("train.py", "--rank", 8, *AT_V1, "--steps", 2, "--max-new-tokens", 2)
    with serving(revisions) as (address, _):
        env = environment(address, folder / "home")
        done = script(*command, "--out", folder / "run", env=env)
    assert done.returncode == 0, done.stderr
    return folder / "run", folder / "home"


def test_args_json_holds_the_commits_that_the_hub_gave(at_v1):
    run, _ = at_v1
    args = read_json(run / "args.json")
    assert args["model_revision"] == V1
    assert args["dataset_revision"] == V1


def test_a_run_is_evaluated_over_the_revisions_that_it_was_trained_over(
    revisions, at_v1, tmp_path
):
    run, home = at_v1
    expected = read_json(run / "results.json")["finetuned"]["validation"]
    command = ("eval.py", "--adapter", run, "--max-new-tokens", 2, "--out")
    with serving(revisions) as (address, _):
        env = environment(address, tmp_path / "home")
        done = script(*command, tmp_path / "there", env=env)
        assert done.returncode == 0, done.stderr
    env = environment(address, home, offline=True)  # the server is gone
    done = script(*command, tmp_path / "offline", env=env)
    assert done.returncode == 0, done.stderr
    for name in ("there", "offline"):
        results = read_json(tmp_path / name / "results.json")
        assert results["dataset_revision"] == V1
        assert results["finetuned"]["validation"]["confusion"] == expected["confusion"]
        assert results["finetuned"]["validation"]["nll"] == pytest.approx(expected["nll"])


def test_a_run_is_resumed_over_the_revisions_that_it_was_trained_over(revisions, at_v1, tmp_path):
    run = shutil.copytree(at_v1[0], tmp_path / "run")
    with serving(revisions) as (address, _):
        env = environment(address, tmp_path / "home")
        done = script("train.py", "--resume", run, "--steps", 3, env=env)
        assert done.returncode == 0, done.stderr
        # What was typed at the start may be typed again, as torchrun does.
        done = script("train.py", "--resume", run, "--steps", 4, *AT_V1, env=env)
        assert done.returncode == 0, done.stderr
        later = ("--dataset", "me/rows", "--dataset-revision", "main")
        done = script("train.py", "--resume", run, "--steps", 5, *later, env=env)
    assert_one_line(done, f"error: {run} was trained with another set of training rows")


def test_without_a_network_another_revision_of_the_cache_is_not_taken(at_v1):
    command = ("-m", "scripts.describe", "--model", "tiny/model", "--dataset", "me/rows")
    env = environment("http://127.0.0.1:9", at_v1[1], offline=True)
    other = commit_of("main")
    done = script(*command, "--dataset-revision", other, env=env)
    line = f"error: cannot load the dataset 'me/rows' at revision {other!r} from the Hub"
    assert_one_line(done, line)


def test_the_revision_in_pefts_configuration_is_that_of_its_base(revisions, at_v1, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copy(at_v1[0] / "adapter_model.safetensors", adapter)
    config = read_json(at_v1[0] / "adapter_config.json")
    pair = ("--premise", "A dog ran.", "--hypothesis", "An animal ran.")
    command = ("eval.py", "--adapter", adapter, *pair)
    with serving(revisions) as (address, _):
        env = environment(address, tmp_path / "home")
        for revision, fits in (("v1", True), (None, False)):
            (adapter / "adapter_config.json").write_text(
                json.dumps(config | {"base_model_name_or_path": "me/base", "revision": revision})
            )
            done = script(*command, env=env)
            assert (done.returncode == 0) == fits, done.stderr
    assert "was trained with another base weights" in done.stderr


@pytest.mark.parametrize(
    "flags, error",
    [
        (
            ("--model", "me/base", "--model-revision", "v9"),
            "error: cannot load the model 'me/base' at revision 'v9' from the Hub",
        ),
        (
            ("--dataset", "me/rows", "--dataset-revision", "v9"),
            "error: cannot load the dataset 'me/rows' at revision 'v9' from the Hub",
        ),
        (("--model-revision", "v1"), "error: --model-revision is for a model on the Hub, and"),
        (("--dataset-revision", "v1"), "error: --dataset-revision is for a dataset on the Hub"),
    ],
)
def test_a_revision_that_is_not_there_is_one_line(revisions, tmp_path, flags, error):
    command = ("-m", "scripts.describe", "--model", "tiny/model", "--dataset", "tiny/data")
    with serving(revisions) as (address, _):
        done = script(*command, *flags, env=environment(address, tmp_path / "home"))
    assert_one_line(done, error)


# -----------------------------------------------------------------------------
# What the Hub cannot give


@pytest.mark.parametrize(
    "flag, error",
    [
        ("--model", "error: cannot load the model 'nobody/nothing' from the Hub"),
        ("--dataset", "error: cannot load the dataset 'nobody/nothing' from the Hub"),
    ],
)
def test_a_name_the_hub_does_not_know_is_one_line(repositories, tmp_path, flag, error):
    with serving(repositories) as (address, _):
        env = environment(address, tmp_path / "home")
        done = script(*RUN, flag, "nobody/nothing", "--out", tmp_path / "run", env=env)
    assert_one_line(done, error)
    assert "a private or gated repo, make sure you are authenticated" in done.stderr


@pytest.mark.parametrize(
    "files, said",
    [
        # In GLUE's tsv a quote is a letter.
        (
            {"train.tsv": 'premise\thypothesis\tlabel\n"A.\tB.\t0\nC."\tD.\t2\n'},
            "train: 2 rows; 2 taken, none of neutral",
        ),
        (
            {"data/train.csv": 'premise,hypothesis,label\n"a,b,0\n'},
            f"{COMMIT}/data/train.csv: line 2: unexpected end of data; a quote within",
        ),
        # The card gives the number 0 another meaning than ours.
        (
            {"train.jsonl": LINE, "README.md": NAMES},
            "train: 1 rows; 1 taken, none of entailment or neutral",
        ),
        # As old versions of `datasets` have written it.
        (
            {"train.jsonl": LINE, "dataset_infos.json": OLD_NAMES},
            "train: 1 rows; 1 taken, none of entailment or neutral",
        ),
        # It may have a fourth name, which no row has.
        (
            {"train.jsonl": LINE, "README.md": FOUR_NAMES},
            "train: 1 rows; 1 taken, none of entailment or neutral",
        ),
        (
            {"train.jsonl": LINE, "README.md": NAMES.replace("contradiction", "REFUTES")},
            "train.jsonl, row 0: label 'REFUTES' is none of",
        ),
        # It says which file is which split, whatever they are called.
        (
            {"a.jsonl": LINE, "b.jsonl": LINE, "README.md": card("default", train_en=A, dev=B)},
            "train: 1 rows; 1 taken, none of neutral or contradiction\nvalidation: 1 rows",
        ),
        (
            {**PARTS, "README.md": card("default", train="'*.jsonl'")},
            "train: 2 rows; 2 taken",
        ),
        (
            {"a-00001-of-00002.jsonl": LINE, "README.md": card("default", train="a-*")},
            f"{COMMIT}/a-00001-of-00002.jsonl: not one file, and not all parts of one",
        ),
        (
            {"a.jsonl": LINE, "README.md": card("one", train=A) + card("two", train=A)},
            "available configs: ['one', 'two']); pass the folder that you mean, ",
        ),
        ({"train.jsonl": LINE, "README.md": "---\n- : [\n---\n"}, "the card of 'owner/rows' does"),
        (
            {"en/train.jsonl": LINE, "fr/train.jsonl": LINE},
            f"{COMMIT}/fr/train.jsonl: not one file, and not all parts of one, for the split train",
        ),
        (
            {"rows.py": "a", "README.md": NAMES},
            "error: the dataset 'owner/rows' holds no files of rows on the Hub (.parquet, .arrow",
        ),
    ],
    ids=[
        *("quotes", "an open quote", "names", "names in JSON", "four names", "other names"),
        *("splits", "two tables", "a missing part", "two configurations", "no YAML"),
        "several datasets",
        "no rows",
    ],
)
def test_a_dataset_on_the_hub_is_read_as_its_folder_is(tmp_path, files, said):
    for name, content in files.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        is_list = content.startswith("- config_name")
        path.write_text(f"---\nconfigs:\n{content}---\n" if is_list else content)
    command = ("-m", "scripts.describe", "--model", "tiny/model", "--dataset", "owner/rows")
    with serving({"datasets/owner/rows": tmp_path / "data"}) as (address, _):
        env = environment(address, tmp_path / "home")
        env["HF_DATASETS_CACHE"] = "/dev/null/none"  # nothing can be written there
        done = script(*command, env=env)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_weights_of_a_kind_that_is_not_read_are_not_downloaded(repositories, tmp_path):
    model = shutil.copytree(repositories["models/microsoft/phi-2"], tmp_path / "model")
    config = read_json(model / "config.json")
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))
    with serving({"models/somebody/phi-2-GPTQ": model}) as (address, requests):
        env = environment(address, tmp_path / "home")
        done = script(*RUN, "--model", "somebody/phi-2-GPTQ", env=env)
    assert done.returncode == 1
    assert "config.json: weights quantised as" in done.stderr.splitlines()[-1]
    assert any("config.json" in request for request in requests)
    assert not any("safetensors" in request for request in requests)


def test_a_cache_that_cannot_be_written_is_named(repositories, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with serving(repositories) as (address, _):
        env = environment(address, tmp_path / "file" / "home")
        command = ("-m", "scripts.describe", "--model", "tiny/model", "--dataset")
        done = script(*command, "nyu-mll/glue", env=env)
    assert_one_line(done, "error: cannot load the dataset 'nyu-mll/glue'")
    assert str(tmp_path / "file") in done.stderr


def test_without_a_hub_the_error_is_one_line_that_names_the_offline_way(runs_without_hub):
    errors = {}
    for name in ("no model", "no data"):
        process = runs_without_hub[name]
        _, errors[name] = process.communicate(timeout=600)
        assert process.returncode == 1
        assert "Traceback" not in errors[name]
    no_model = errors["no model"].splitlines()[-1]
    assert no_model.startswith("error: cannot load the model 'microsoft/phi-2' from the Hub")
    assert no_model.endswith("without a network, pass a directory: --model path/to/it")
    no_data = errors["no data"].splitlines()[-1]
    assert no_data.startswith("error: cannot load the dataset 'nyu-mll/glue' from the Hub")
    assert no_data.endswith("without a network, pass a directory: --dataset path/to/it")
    for name in errors:
        assert not (runs_without_hub["folder"] / name).exists()
