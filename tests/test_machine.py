"""What a run records about the machine is right, and a machine that hides it stops no run."""

import mmap
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from support import machine

CPU = torch.device("cpu")


def test_the_environment_names_versions_commit_and_device():
    environment = machine.environment(CPU)
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["versions"].keys() == {*machine.PACKAGES, "python"}
    assert environment["device_name"]
    assert environment["processes"] == 1
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert environment["commit"] == commit.strip()


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine.commit() is None


def test_a_library_that_is_not_installed_is_left_out(monkeypatch):
    def version(package: str) -> str:
        if package == "bitsandbytes":
            raise metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    assert "bitsandbytes" not in machine.versions()
    assert machine.versions()["torch"] == "1.0"


@pytest.mark.skipif(not machine.RESET.is_file(), reason="only Linux tells a process its peak")
def test_the_peak_of_memory_starts_again_after_a_reset():
    # From the system itself: glibc may give out memory that was freed, and is resident already.
    size = 400 * 2**20
    before = machine.peak_memory(CPU, reset=True)
    with mmap.mmap(-1, size) as block:
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1
        assert machine.peak_memory(CPU) > before + 0.9 * size
    assert machine.peak_memory(CPU, reset=True) < before + 0.5 * size


@pytest.mark.parametrize("status", ["", "VmRSS:  5 kB\n"])
def test_a_system_that_hides_the_peak_gives_none(monkeypatch, tmp_path, status):
    monkeypatch.setattr(machine, "STATUS", tmp_path / "status")
    monkeypatch.setattr(machine, "RESET", tmp_path / "reset")
    (tmp_path / "status").write_text(status)
    assert machine.peak_memory(CPU, reset=True) is None
    monkeypatch.setattr(machine, "STATUS", Path("/no/such/file"))
    assert machine.peak_memory(CPU, reset=True) is None
