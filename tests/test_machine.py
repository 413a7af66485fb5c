"""What a run records about the machine is right, and a machine that hides it stops no run."""

import mmap
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from support import cli, machine

CPU = torch.device("cpu")


# -----------------------------------------------------------------------------
# The fast --dtype


CAPABILITIES = {"cuda": (8, 9), "cuda:0": (8, 9), "cuda:1": (7, 5), "cuda:2": (6, 1)}


@pytest.fixture(params=["AVX2", "bf16"])
def cpu(request, monkeypatch) -> str:
    """A CPU without instructions for 16 bits, or with those for bf16."""
    monkeypatch.setattr(machine, "cpu_computes", lambda dtype: dtype == request.param)
    return request.param


@pytest.fixture
def gpus(monkeypatch) -> None:
    """A machine with three GPUs: one of today, a T4, and a GTX 1080."""

    def capability(device: str) -> tuple[int, int]:
        if device not in CAPABILITIES:
            raise AssertionError("Invalid device id")
        return CAPABILITIES[device]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)


@pytest.mark.parametrize(
    "capability, expected",
    [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((7, 0), "fp16"), ((6, 0), "fp32")],
    ids=str,
)
def test_the_fast_dtype_of_a_gpu_is_one_that_it_has_instructions_for(
    monkeypatch, capability, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert machine.fast_dtype("cuda") == expected


@pytest.mark.parametrize(
    "device, expected",
    [("cuda", "bf16"), ("cuda:0", "bf16"), ("cuda:1", "fp16"), ("cuda:2", "fp32")],
)
def test_the_dtype_is_that_of_the_device_that_is_used(gpus, device, expected):
    args = cli.train_arguments(["--model", "tiny/model", "--device", device])
    assert (args.device, args.dtype) == (device, expected)


def test_a_cpu_beside_a_gpu_gets_a_dtype_of_its_own(gpus, cpu):
    args = cli.train_arguments(["--model", "tiny/model", "--device", "cpu"])
    assert args.dtype == {"AVX2": "fp32", "bf16": "bf16"}[cpu]
    args = cli.train_arguments(["--model", "tiny/model"])
    assert (args.device, args.dtype) == ("cuda", "bf16")


def test_a_device_that_is_not_here_counts_as_a_recent_one(gpus, cpu, monkeypatch):
    """train.py refuses it, and scripts.plan counts on it."""
    assert machine.fast_dtype("cuda:7") == "bf16"
    monkeypatch.undo()
    if not torch.cuda.is_available():
        assert machine.fast_dtype("cuda") == "bf16"
    assert machine.fast_dtype("mps") == "fp32"


@pytest.mark.parametrize(
    "device, dtype, fast",
    [("cuda:1", "bf16", "fp16"), ("cuda:2", "bf16", "fp32"), ("cpu", "fp16", None)],
)
def test_a_dtype_that_a_device_emulates_is_said(gpus, cpu, capsys, device, dtype, fast):
    """As that of an adapter, or of a run that is resumed, from another machine."""
    cli.train_arguments(["--model", "tiny/model", "--device", device, "--dtype", dtype])
    fast = fast or {"AVX2": "fp32", "bf16": "bf16"}[cpu]
    line = f"{device} has no instructions for {dtype}: the results are right, but come more slowly"
    assert capsys.readouterr().err == f"{line} than with --dtype {fast}\n"


@pytest.mark.parametrize(
    "device, dtype", [("cuda", "bf16"), ("cuda", "fp16"), ("cuda:1", "fp16"), ("cuda:2", "fp16")]
)
def test_a_dtype_that_a_device_has_needs_no_word(gpus, capsys, device, dtype):
    cli.train_arguments(["--model", "tiny/model", "--device", device, "--dtype", dtype])
    cli.train_arguments(["--model", "tiny/model", "--device", device, "--dtype", "fp32"])
    assert capsys.readouterr().err == ""


# -----------------------------------------------------------------------------
# What is recorded


def test_the_environment_names_versions_commit_and_device():
    environment = machine.environment(CPU)
    assert torch.__version__.startswith(environment["versions"]["torch"])  # without +cu128
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
