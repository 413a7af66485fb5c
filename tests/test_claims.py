"""One process at a time writes into a folder, and what ends it leaves the folder free."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT, in_process, read_json

import eval as evaluation
import train
from scripts import merge
from support import claims, cli, files

TINY = ("--model", "tiny/model", "--dataset", "tiny/data")
SHORT = ("--steps", 1, "--limit", 4, "--batch-size", 4, "--eval-limit", 2, "--max-new-tokens", 1)
IN_USE = "another process is writing into {}: wait until it has ended, or choose another --out"

# Claims a folder, says whether it could, and keeps it until its standard input ends.
CLAIM = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from support import claims
try:
    with claims.claimed(Path(sys.argv[1])):
        print("claimed", flush=True)
        sys.stdin.read()
except ValueError as error:
    print(error, flush=True)
"""


def start_claim(folder) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen) -> None:
    process.communicate()
    assert process.returncode == 0


# -----------------------------------------------------------------------------
# The claim


def test_of_several_processes_one_has_the_folder_and_the_others_are_refused(tmp_path):
    folder = tmp_path / "out" / "run"
    processes = [start_claim(folder) for _ in range(4)]
    lines = sorted(process.stdout.readline().strip() for process in processes)
    assert lines == [*[IN_USE.format(folder)] * 3, "claimed"]
    for process in processes:
        end(process)
    # (A folder that one of the others had made may be left, empty.)
    assert not any(path.is_file() for path in tmp_path.rglob("*")), "nothing was written"


def test_a_killed_process_leaves_the_folder_free(tmp_path):
    process = start_claim(tmp_path)
    assert process.stdout.readline() == "claimed\n"
    (tmp_path / f".1{files.UNFINISHED}").mkdir()
    with pytest.raises(ValueError, match="another process"), claims.claimed(tmp_path):
        pass
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    with claims.claimed(tmp_path):
        assert os.listdir(tmp_path) == [claims.LOCK], "what was being written is removed"
    assert not tmp_path.exists(), "it is empty"


def test_a_new_folder_has_a_number_where_its_name_is_taken(tmp_path):
    folder = tmp_path / "out" / "run"
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(claims.make_new, [folder] * 8))
    names = {"run", "run-2", "run-3", "run-4", "run-5", "run-6", "run-7", "run-8"}
    assert {path.name for path in made} == names
    assert set(os.listdir(folder.parent)) == names


def test_through_a_link_a_folder_is_made_where_the_link_leads(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "runs")
    assert claims.make_new(tmp_path / "out" / "run") == tmp_path / "out" / "run"
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "other")
    with claims.claimed(tmp_path / "link") as folder:
        (folder / "args.json").write_text("{}")
    assert (tmp_path / "disk" / "runs" / "run").is_dir()
    assert os.listdir(tmp_path / "disk" / "other") == ["args.json"]


def test_what_was_written_stays_when_its_process_fails(tmp_path):
    with pytest.raises(RuntimeError), claims.claimed(tmp_path / "run") as folder:
        (folder / "args.json").write_text("{}")
        raise RuntimeError
    assert os.listdir(tmp_path / "run") == ["args.json"]


def test_what_another_process_has_left_is_seen_once_the_folder_is_claimed(tmp_path):
    """It may have ended since the arguments were checked."""
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a results.json already"):
        with claims.claimed(tmp_path, cli.check_out):
            pass
    assert os.listdir(tmp_path) == ["results.json"]


# -----------------------------------------------------------------------------
# The scripts


def refusal(script, *arguments, cwd=ROOT) -> str:
    with pytest.raises(SystemExit) as stopped:
        in_process(script, *arguments, cwd=cwd)
    return stopped.value.code


def test_every_script_that_writes_a_folder_leaves_alone_one_that_is_in_use(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    files.write_json(adapter / "adapter_config.json", {"base_model_name_or_path": "tiny/model"})
    out = tmp_path / "out"
    line = "error: " + IN_USE.format(out)
    with claims.claimed(out):
        assert refusal(train, *TINY, *SHORT, "--out", out) == line
        assert refusal(evaluation, *TINY, "--out", out) == line
        assert refusal(merge, "--adapter", adapter, "--out", out) == line
        # A run that was stopped before its first save, and is resumed twice.
        arguments = cli.as_json(cli.train_arguments([*TINY, "--rank", "4"]))
        (out / "args.json").write_text(json.dumps(arguments))
        assert refusal(train, "--resume", out) == line
        assert set(os.listdir(out)) == {claims.LOCK, "args.json"}


def test_two_runs_of_one_second_have_two_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "new_name", lambda args: "name")
    model_and_data = ("--model", ROOT / "tiny/model", "--dataset", ROOT / "tiny/data")
    for seed in (1, 2):
        in_process(train, *model_and_data, *SHORT, "--seed", seed, cwd=tmp_path)
    runs = {path.name: read_json(path / "args.json") for path in (tmp_path / "out").iterdir()}
    assert {name: (args["seed"], args["out"]) for name, args in runs.items()} == {
        "name": (1, "out/name"),
        "name-2": (2, "out/name-2"),
    }


@pytest.mark.parametrize("out", [[], ["--out", "deep/in/out"]])
def test_a_run_that_fails_before_it_has_begun_leaves_nothing(tmp_path, out):
    line = refusal(train, "--model", ROOT / "tiny/model", "--dataset", "no", *out, cwd=tmp_path)
    assert "no dataset directory 'no'" in line
    assert not any("phi" in path.name or path.is_file() for path in tmp_path.rglob("*"))

