"""The default names, microsoft/phi-2 and nyu-mll/glue, through the Hub's client libraries, against a Hub on loopback."""
import shutil
from concurrent.futures import ThreadPoolExecutor

import datasets
import pytest
import torch
from conftest import ROOT, read_json, reference, script
from hub import serving

FRONT = """---
configs:
- config_name: mnli
  data_files:
%s---
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """tiny/model in fp16 and in two shards, as phi-2 is on the Hub; tiny/data in GLUE's layout, with its hidden test labels."""
    model, glue = tmp_path_factory.mktemp("phi-2"), tmp_path_factory.mktemp("glue")
    reference(ROOT / "tiny" / "model", torch.float16).save_pretrained(model, max_shard_size="4MB")
    shutil.copy(ROOT / "tiny" / "model" / "tokenizer.json", model)
    (model / "pytorch_model.bin").write_bytes(b"a file that is not needed")
    (glue / "mnli").mkdir()
    splits = {"train": "train", "validation_matched": "validation_matched", "validation_mismatched": "validation_mismatched", "test_matched": "validation_matched"}
    for split, source in splits.items():
        rows = datasets.load_dataset("json", data_files=str(ROOT / "tiny" / "data" / f"{source}.jsonl"), split="train").select(range(200))
        if split == "test_matched":
            rows = rows.remove_columns("label").add_column("label", [-1] * len(rows))
        rows.to_parquet(glue / "mnli" / f"{split}-00000-of-00001.parquet")
    (glue / "README.md").write_text(FRONT % "".join(f"  - split: {split}\n    path: mnli/{split}-*\n" for split in splits))
    return {"models/microsoft/phi-2": model, "datasets/nyu-mll/glue": glue}


def environment(address: str, home) -> dict[str, str]:
    return {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}


RUN = ["train.py", "--rank", 8, "--model", "microsoft/phi-2", "--dataset", "nyu-mll/glue", "--steps", 3, "--eval-limit", 40, "--max-new-tokens", 4]


def test_the_default_names_resolve_download_and_train_and_are_then_at_hand_offline(repositories, tmp_path):
    with serving(repositories) as (address, requests):
        done = script(*RUN, "--out", tmp_path / "run", env=environment(address, tmp_path / "home"))
        assert done.returncode == 0, done.stderr
        downloaded = [request for request in requests if request.startswith("GET") and "/resolve/" in request]
    assert sum("model-0000" in request for request in downloaded) >= 2 and not any("pytorch_model" in request for request in downloaded)
    config, results = read_json(tmp_path / "run" / "adapter_config.json"), read_json(tmp_path / "run" / "results.json")
    assert config["base_model_name_or_path"] == "microsoft/phi-2"
    assert results["finetuned"].keys() == {"validation_matched", "validation_mismatched"}
    # The server is gone; what was downloaded is enough
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = script("eval.py", "--adapter", tmp_path / "run", "--limit", 20, "--mode", "score", env=environment(address, tmp_path / "home") | offline)
    assert done.returncode == 0, done.stderr
    assert "validation_mismatched" in done.stdout


def test_without_a_hub_the_error_is_one_line_that_names_the_offline_way(tmp_path):
    with serving({}) as (address, _):
        pass  # nobody listens there any more
    cases = [(RUN, "error: cannot reach the Hub for 'microsoft/phi-2'", "pass a directory instead: --model tiny/model"),
             ([*RUN, "--model", "tiny/model"], "error: cannot load 'nyu-mll/glue' from the Hub", "--dataset tiny/data")]

    def run(case):
        return script(*case[0], "--out", tmp_path / "run", env=environment(address, tmp_path / "home"))
    with ThreadPoolExecutor() as pool:  # the client libraries try again for some seconds
        for (_, error, cure), done in zip(cases, pool.map(run, cases)):
            assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(error), done.stderr
            assert cure in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_name_the_hub_does_not_know_is_one_line(repositories, tmp_path):
    with serving(repositories) as (address, _):
        for flag, name, message in (("--model", "nobody/nothing", "no model 'nobody/nothing'"), ("--dataset", "nobody/nothing", "cannot load 'nobody/nothing'")):
            done = script(*RUN, flag, name, "--out", tmp_path / "run", env=environment(address, tmp_path / "home"))
            assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"error: {message}"), done.stderr
            assert "Traceback" not in done.stderr
