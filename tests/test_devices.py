"""GPUs that cannot be used, Apple's chips and Windows: one line before a download, or it works.

No such machine is here. What stands for one does what torch, the driver or the system does there.
"""

import ast
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, in_process, read_json, script
from torch.utils._python_dispatch import TorchDispatchMode

import phi2
import train
from scripts import describe
from support import best, cli, gpu, machine, processes

PHI_2 = ("--model", "microsoft/phi-2", "--dataset", "nyu-mll/glue")
CUDA_12 = '"torch<2.15" --index-url https://download.pytorch.org/whl/cu126'
CUDA_13 = '"torch<2.15" --index-url https://download.pytorch.org/whl/cu130'


@pytest.fixture(autouse=True)
def project_folder(monkeypatch):
    monkeypatch.chdir(ROOT)


# -----------------------------------------------------------------------------
# A GPU that the driver lists and torch does not see


def write_nvidia_smi(folder: Path, monkeypatch, body: str) -> None:
    """Puts an nvidia-smi in front of the PATH, and a torch that sees no GPU beside it."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def too_old() -> None:
    """Stands for torch.cuda.init, with the words of torch's c10/cuda/CUDAFunctions.cpp."""
    raise RuntimeError(
        "The NVIDIA driver on your system is too old (found version 12020). Please update your "
        "GPU driver by downloading and installing a new version"
    )


@pytest.fixture
def unseen(tmp_path, monkeypatch) -> None:
    """A T4 under a driver for CUDA 12, beside a torch for CUDA 13."""
    write_nvidia_smi(tmp_path, monkeypatch, "echo Tesla T4; echo Tesla T4")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", too_old)


@pytest.mark.parametrize("arguments", [cli.train_arguments, cli.eval_arguments])
def test_a_gpu_that_torch_does_not_see_is_one_line_with_the_cure_and_no_training_of_tiny(
    unseen, arguments
):
    with pytest.raises(ValueError) as raised:
        arguments([])
    assert str(raised.value) == (
        "there is a GPU (Tesla T4), and torch cannot use it (The NVIDIA driver on your system is "
        "too old (found version 12020)): update its driver for CUDA 13.0, or pip install "
        f"--force-reinstall {CUDA_12}; or --device cpu, which takes the small model in tiny/"
    )


def test_beside_a_torch_for_cpus_the_line_says_so(unseen, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match=r"a GPU \(Tesla T4\), and this torch is for CPUs: pip"):
        cli.train_arguments([])


@pytest.mark.skipif(torch.version.cuda is not None, reason="it needs a torch without CUDA")
def test_the_whole_script_ends_with_that_line(tmp_path, monkeypatch):
    write_nvidia_smi(tmp_path, monkeypatch, "echo Tesla T4")
    done = script("train.py", "--rank", 8, "--out", tmp_path / "run")
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is a GPU (Tesla T4), and this torch is for CPUs")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_who_names_the_cpu_gets_it(unseen, capsys):
    args = cli.train_arguments(["--device", "cpu"])
    assert (args.model, args.device) == ("tiny/model", "cpu")
    assert capsys.readouterr().err == cli.NOTICE + "\n"
    cli.train_arguments([*PHI_2, "--device", "cpu"])
    assert capsys.readouterr().err == ""


def test_who_names_a_model_is_told_why_it_is_computed_on_the_cpu(unseen, capsys):
    assert cli.train_arguments([*PHI_2]).device == "cpu"
    told = capsys.readouterr().err
    line = "this runs on the CPU: there is a GPU (Tesla T4), and torch cannot use it ("
    assert told.startswith(line)
    assert told.count("\n") == 1


def test_who_names_the_gpu_is_told_why_there_is_none(unseen):
    with pytest.raises(ValueError, match=r"--device cuda: there is a GPU \(Tesla T4\), and torch"):
        processes.start("cuda")


def test_a_gpu_that_the_user_hides_is_none(unseen, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cli.train_arguments([]).model == "tiny/model"
    assert capsys.readouterr().err == cli.NOTICE + "\n"


@pytest.mark.parametrize("body", ["exit 9", "true", "echo", "echo No devices were found"])
def test_an_nvidia_smi_that_lists_no_gpu_changes_nothing(tmp_path, monkeypatch, body):
    write_nvidia_smi(tmp_path, monkeypatch, body)
    assert cli.train_arguments([]).model == "tiny/model"


def test_a_name_that_is_no_text_is_shown_as_far_as_it_is(tmp_path, monkeypatch):
    write_nvidia_smi(tmp_path, monkeypatch, r"printf 'Tesla \377T4\n'")
    assert gpu.unusable().startswith("there is a GPU (Tesla \ufffdT4)")


def test_a_script_that_computes_nothing_does_not_ask(unseen, monkeypatch):
    monkeypatch.setattr(sys, "argv", [describe.__file__])
    assert describe.parse_arguments().model == "tiny/model"


# -----------------------------------------------------------------------------
# A GPU that fails at its first kernel

NO_KERNEL = (
    "CUDA error: no kernel image is available for execution on the device\n"
    "CUDA kernel errors might be asynchronously reported at some other API call"
)


class WithoutKernels(TorchDispatchMode):
    """A GPU for which torch has no kernels: its memory is given out, and nothing runs on it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.device(kwargs.get("device") or "cpu").type != "cuda":
            return function(*args, **kwargs)
        if "empty" in function.name():
            return function(*args, **(kwargs | {"device": "meta"}))
        raise torch.AcceleratorError(NO_KERNEL)


@pytest.fixture
def old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)  # before a tensor is made there
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))
    monkeypatch.setattr(machine, "fast_dtype", lambda *device: "fp32")
    with WithoutKernels():
        torch.empty(0, device="cuda")  # which is no proof of a GPU
        yield


def test_a_gpu_without_kernels_is_one_line_with_the_cure_before_any_download(
    old_gpu, tmp_path, capsys
):
    """A download would end in another error: the tests are offline."""
    with pytest.raises(SystemExit) as stopped:
        in_process(train, "--rank", 8, "--device", "cuda", "--out", tmp_path / "run")
    assert stopped.value.code == (
        f"error: --device cuda: torch cannot use it ({NO_KERNEL.splitlines()[0]}); it has none "
        f"for compute capability 6.0: pip install --force-reinstall {CUDA_12}"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "capability, cure",
    [((6, 1), CUDA_12), ((7, 0), CUDA_12), ((9, 0), CUDA_13), ((12, 0), CUDA_13)],
)
def test_for_a_gpu_that_is_too_new_the_cure_is_a_newer_cuda(monkeypatch, capability, cure):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert gpu.cure(torch.AcceleratorError(NO_KERNEL), "cuda").endswith(cure)


def test_what_a_gpu_reports_is_not_blamed_on_the_models_file(tiny, monkeypatch):
    def fail(tensor) -> bool:
        raise torch.AcceleratorError(NO_KERNEL)

    monkeypatch.setattr(torch.Tensor, "aminmax", fail)  # the first kernel after the copy
    with pytest.raises(torch.AcceleratorError, match="^CUDA error: no kernel image"):
        phi2.load_weights(phi2.build(tiny), tiny)


# -----------------------------------------------------------------------------
# Apple's chips


@pytest.mark.parametrize("device", ["mps", "mps:0", "xpu", "hpu", "meta"])
def test_other_devices_are_refused_in_one_line(device):
    with pytest.raises(ValueError) as raised:
        processes.start(device)
    assert str(raised.value) == (
        f"--device {device}: only cpu and cuda are supported, not Apple's GPUs (mps) and others; "
        "pass --device cpu"
    )


def test_on_macos_the_peak_of_memory_comes_from_getrusage_in_bytes(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(machine, "STATUS", Path("/no/such/file"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert before <= machine.peak_memory(torch.device("cpu"), reset=True) < 1.1 * before


# -----------------------------------------------------------------------------
# Windows

# What a resume of two steps takes and leaves, without NF4, whose kernels take seconds to import.
SHORT = ("--limit", 4, "--batch-size", 4, "--eval-limit", 2, "--max-new-tokens", 1)
RUN = ("--model", "tiny/model", "--dataset", "tiny/data", "--quant", "none", "--dtype", "fp32")


def in_use() -> set[str]:
    """Returns the files that this process has open or mapped into its memory."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.exists()]
    is_open = {os.path.realpath(link) for link in links}
    lines = Path("/proc/self/maps").read_text().splitlines()
    return is_open | {line.split(maxsplit=5)[-1] for line in lines}


@pytest.fixture
def windows_rules(monkeypatch) -> list[str]:
    """No file that is open or mapped may be replaced, renamed or removed: error 5 or 1224 there.

    Returns the names of those that were replaced.
    """
    replaced = []

    def watch(name: str) -> None:
        function = getattr(os, name)

        def run(*paths, **options):
            for path in paths:
                if os.path.realpath(path) in in_use():
                    raise PermissionError(13, f"Windows does not {name} what is in use", str(path))
            if name == "replace":
                replaced.append(Path(paths[1]).name)
            return function(*paths, **options)

        monkeypatch.setattr(os, name, run)

    for name in ("replace", "rename", "remove", "unlink"):
        watch(name)
    return replaced


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is mapped")
def test_a_run_is_trained_resumed_and_evaluated_under_the_rules_of_windows(
    tmp_path, windows_rules
):
    out = tmp_path / "run"
    often = ("--save-every", 1, "--eval-every", 1, "--keep-best")
    in_process(train, *RUN, *SHORT, *often, "--steps", 1, "--out", out)
    first = read_json(out / "results.json")
    windows_rules.clear()
    in_process(train, "--resume", out, "--steps", 2)
    assert windows_rules.count("trainer.safetensors") >= 1
    assert {"adapter_model.safetensors", "results.json", "report.html"} <= {*windows_rules}
    assert read_json(out / "results.json")["baseline"] == first["baseline"]
    assert best.read(out)["step"] in (1, 2)
    shutil.rmtree(out)  # nothing of it is in use any more


# Of Python's modules and of os, what Windows lacks.
POSIX = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}
POSIX |= {f"os.{name}" for name in ("fork", "getuid", "killpg", "mkfifo", "setsid", "uname")}
POSIX |= {f"signal.{name}" for name in ("SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2")}


def used(path: Path) -> set[str]:
    """Returns the modules that a file imports, and the attributes of modules that it names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


def test_nothing_that_windows_lacks_is_needed_to_train_evaluate_and_resume():
    found = {}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("scripts/*.py")]:
        if lacking := used(path) & POSIX:
            found[path.name] = lacking
    # It is imported where macOS has it, inside the function that needs it.
    assert found == {"machine.py": {"resource"}}
