"""A file is there whole or not at all, whatever ends its writing; JSON is read or is one error."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, full_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from support import files

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def write_together(directory, names, number: int, size: int = 4) -> None:
    with files.replacing_files(directory) as folder:
        for name in names:
            save_file({"a": torch.full((size,), float(number))}, folder / name)


# -----------------------------------------------------------------------------
# One file


def test_a_file_is_replaced_when_its_writing_succeeds(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with files.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error), files.replacing(path) as temporary:
        temporary.write_text("half of it")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk_is_one_line_and_the_file_stays_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    message = f"cannot write into {tmp_path}: File too large; what was saved before is unchanged"
    with full_disk(1000), pytest.raises(OSError) as raised:
        files.write_json(path, {"a": "x" * 2000})
    assert str(raised.value) == message
    assert files.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


# -----------------------------------------------------------------------------
# Several files


def test_files_are_replaced_together(tmp_path):
    names = ["a.safetensors", "b.safetensors"]
    write_together(tmp_path, names, 1)
    write_together(tmp_path, names, 2)
    assert sorted(os.listdir(tmp_path)) == names
    for name in names:
        assert load_file(tmp_path / name)["a"][0] == 2


def test_a_full_disk_changes_none_of_several_files(tmp_path):
    write_together(tmp_path, ["a.safetensors", "b.safetensors"], 1)
    with full_disk(5000), pytest.raises(OSError) as raised:
        with files.replacing_files(tmp_path) as folder:
            save_file({"a": torch.full((4,), 2.0)}, folder / "a.safetensors")
            save_file({"a": torch.full((4000,), 2.0)}, folder / "b.safetensors")
    assert str(raised.value).startswith(f"cannot write into {tmp_path}: ")
    assert "File too large" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]
    assert load_file(tmp_path / "a.safetensors")["a"][0] == 1


def test_the_umask_decides_who_may_read_what_safetensors_has_written(tmp_path):
    (tmp_path / "plain").write_text("")
    write_together(tmp_path, ["a.safetensors"], 1)
    plain = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == plain


def test_a_file_system_without_rights_of_files_is_written_to(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    write_together(tmp_path, ["a.safetensors"], 1)
    assert load_file(tmp_path / "a.safetensors")["a"][0] == 1


def test_what_a_killed_write_has_left_is_removed_and_nothing_else(tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from support import files
directory = Path({str(tmp_path)!r})
with files.replacing(directory / "a.json") as path, files.replacing_files(directory) as folder:
    path.write_text("half of it")
    (folder / "b.json").write_text("half of it")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    (tmp_path / ".hidden").write_text("somebody's own")
    (tmp_path / "args.json").write_text("{}")
    assert len(os.listdir(tmp_path)) == 4
    files.remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "args.json"]


# -----------------------------------------------------------------------------
# JSON


@given(rows=st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=4))
@settings(deadline=None, suppress_health_check=list(HealthCheck))
def test_lines_come_back_as_they_were_written(tmp_path, rows):
    files.write_lines(tmp_path / "rows.jsonl", rows)
    assert files.read_lines(tmp_path / "rows.jsonl") == rows


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{}\n\n[1]\n", "rows.jsonl, line 3 holds no JSON object"),
        (b'{"a": 1}\n{"a": ', "rows.jsonl, line 2 is not JSON"),
        (b'{"a": "\xff"}', "rows.jsonl, line 1 is not JSON"),
    ],
)
def test_a_line_that_is_no_object_is_named(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        files.read_lines(path)
    assert message in str(raised.value)


NO_OBJECTS = st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode())


@given(content=NO_OBJECTS | st.just(b"[" * 100_000))
@settings(deadline=None, suppress_health_check=list(HealthCheck))
def test_any_bytes_are_a_json_object_or_one_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "args.json"
    path.write_bytes(content)
    try:
        assert isinstance(files.read_json(path), dict)
    except ValueError as error:
        assert str(path) in str(error)
