"""The project keeps what it promises about itself: layout, imports, docstrings."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from safetensors.torch import save_file

import phi2

SIX = ["lora", "quant", "phi2", "data", "eval", "train"]  # in reading order
STAND_ALONE = ["lora", "quant", "phi2"]
SUPPORT = sorted(ROOT.glob("support/*.py"))
SCRIPTS = sorted(ROOT.glob("scripts/*.py"))
TOOLS = sorted(ROOT.glob("tools/*.py"))
EXPERIMENTS = sorted(ROOT.glob("experiments/*.py"))
PROJECT = [*(ROOT / f"{name}.py" for name in SIX), *SUPPORT, *SCRIPTS, *TOOLS, *EXPERIMENTS]
README = (ROOT / "README.md").read_text()
OTHERS = [*ROOT.glob("tests/*.py"), *ROOT.glob("tiny/*.py"), *ROOT.glob("exercises/**/*.py")]
EVERY_FILE = [*PROJECT, *sorted(OTHERS)]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


# -----------------------------------------------------------------------------
# Imports: support <- the six <- scripts, tools, experiments


def module_name(path: Path) -> str:
    """Returns what a file is imported as: "lora", "support.files"; "support" for its __init__."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for path in PROJECT}


def imported_by(node: ast.stmt) -> set[str]:
    """Returns the full names that an import statement may load, modules and what is in them."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute here"
        return {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names |= imported_by(node)
    return names


def project_imports(path: Path) -> set[str]:
    """Returns the project's modules that a file imports, wherever in the file."""
    return (imports(path) & MODULES.keys()) - {"support", "scripts", "tools", "experiments"}


def test_support_imports_nothing_but_support():
    for path in SUPPORT:
        for name in project_imports(path):
            assert name.startswith("support."), f"{relative(path)} imports {name}"


@pytest.mark.parametrize("name", SIX)
def test_a_file_imports_only_what_comes_before_it_in_the_reading_order(name):
    path = MODULES[name]
    before = SIX[: SIX.index(name)]
    for imported in project_imports(path):
        assert imported in before or imported.startswith("support."), f"{name} imports {imported}"
    if name in STAND_ALONE:
        assert not project_imports(path)
    libraries = {imported.split(".")[0] for imported in imports(path)}
    assert not libraries & {"transformers", "peft", "accelerate", "pickle"}


def test_only_scripts_and_experiments_import_scripts_and_nothing_imports_tools():
    for path in EVERY_FILE:
        if path.parent.name != "tests":  # the tests look into them
            found = {
                name for name in imports(path) if name.split(".")[0] in ("scripts", "tools")
            }
            if path.name == "count.py":  # its own first part, which has to precede torch
                found -= {"tools", "tools.fake_gpu"}
            if path.parent.name in ("scripts", "experiments"):  # a script may use another
                found = {name for name in found if name.split(".")[0] != "scripts"}
            assert not found, relative(path)


def test_no_project_import_is_inside_a_function():
    for path in PROJECT:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(function):
                    inside = imported_by(node) & MODULES.keys()
                    assert not inside, f"{relative(path)}, {function.name}: {inside}"


def required(name: str) -> dict[str, SpecifierSet]:
    """Returns the versions that a file of requirements allows of each package, by its name."""
    lines = (ROOT / name).read_text().splitlines()
    read = [Requirement(line) for line in lines if line[:1] not in ("#", "-")]
    return {canonicalize_name(one.name): one.specifier for one in read}


# What the benchmark compares with, of which requirements-dev.txt has the first two.
PEERS = {"peft", "transformers", "litgpt"}


def test_requirements_txt_names_what_is_imported_and_nothing_else():
    needed = {name.replace("-", "_") for name in required("requirements.txt")}
    imported = set()
    for path in PROJECT:
        imported |= {name.split(".")[0] for name in imports(path)}
    ours = {path.name for path in ROOT.iterdir() if path.is_dir()} | set(SIX)
    assert imported - sys.stdlib_module_names - ours - PEERS == needed


def test_constraints_txt_has_one_version_of_each_package_within_its_range():
    tested = required("constraints.txt")
    for package, exact in tested.items():
        (version,) = exact
        assert version.operator == "==", package
        # A Mac and Windows have no torch==2.13.0+cpu.
        assert not Version(version.version).local, package
    ranges = required("requirements.txt") | required("requirements-dev.txt")
    for package, allowed in ranges.items():
        (version,) = tested[package]
        assert allowed.contains(version.version), package
        # What make lowest installs.
        assert ">=" in {part.operator for part in allowed}, package


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")
def test_make_says_which_python_it_needs(tmp_path):
    """Apple's is 3.9: this one, made to say so."""
    for name in ("Makefile", "requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "python3"
    says = "import sys; sys.version_info = (3, 9, 6); sys.version = '3.9.6 (default)'"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{says}; exec(sys.argv[1])" "$2"\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "demo", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == (
        f"{old} is Python 3.9.6, and 3.11 or later is needed: make PYTHON=python3.12"
    )
    assert not (tmp_path / ".venv").exists()


def test_no_imports_go_in_a_circle():
    left = {name: project_imports(path) for name, path in MODULES.items()}
    while left:
        # Take away the modules that need none of the others, until none is left.
        ready = [name for name, needed in left.items() if not needed & left.keys()]
        assert ready, f"in a circle, or behind one: {sorted(left)}"
        for name in ready:
            del left[name]


# -----------------------------------------------------------------------------
# lora.py, quant.py and phi2.py stand alone

LORA_ALONE = """
from pathlib import Path

import torch

import lora


def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


config = lora.LoRAConfig(rank=2, dropout=0.0, targets=("0", "2"))
model = build()
x = torch.randn(5, 8)
base = model(x)
assert lora.inject(model, config) == ["0", "2"]
assert torch.equal(model(x), base)

# A few steps on the adapters alone.
parameters = list(lora.lora_parameters(model).values())
assert len(parameters) == 4
optimizer = torch.optim.SGD(parameters, lr=0.1)
for _ in range(3):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
trained = model(x)
assert not torch.allclose(trained, base)

lora.save_adapter(model, config, Path("adapter"), "a/base")
restored = build()
assert lora.load_adapter(restored, Path("adapter")) == config
assert torch.equal(restored(x), trained)
lora.merge(restored)
assert torch.allclose(restored(x), trained, atol=1e-6)
"""

QUANT_ALONE = """
import sys

import torch

sys.modules["bitsandbytes"] = None  # importing it now fails: NF4 itself needs torch alone
import quant

linear = torch.nn.Linear(128, 64)
packed, absmax = quant.quantize(linear.weight)
weight = quant.dequantize(packed, absmax, linear.weight.shape, torch.float32)
del sys.modules["bitsandbytes"]

model = torch.nn.Sequential(linear)
assert quant.quantize_linears(model) == ["0"]
x = torch.randn(3, 128, requires_grad=True)
y = model(x)
assert torch.equal(y, torch.nn.functional.linear(x, weight, linear.bias))
y.sum().backward()
assert torch.equal(x.grad, torch.ones(3, 64) @ weight)
"""

PHI2_ALONE = """
import torch

import phi2

model = phi2.load_weights(phi2.build("."), ".", "cpu", torch.float32)
logits = model(torch.tensor([1, 2, 3]))
assert logits.shape == (3, 50)
assert logits.isfinite().all()

# The logits of the last token alone.
assert torch.allclose(model(torch.tensor([1, 2, 3]), last=1), logits[-1:], atol=1e-5)
"""


def write_small_phi(directory: Path) -> None:
    """Writes config.json and model.safetensors of a phi of 50 words and two layers."""
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    tensors = phi2.Phi2(phi2.Phi2Config(**sizes, partial_rotary_factor=0.5)).state_dict()
    config = {"model_type": "phi", "partial_rotary_factor": 0.5, **sizes}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")


# Each in a fork of one new Python, which has imported torch and has nothing of the project.
EACH_ALONE = """
import os
import torch

for name in os.listdir():
    pid = os.fork()
    if pid == 0:
        os.chdir(name)
        exec(open("job").read(), {})
        break
    _, status = os.waitpid(pid, 0)
    assert status == 0, name
"""


def test_lora_quant_and_phi2_each_do_their_job_alone_in_an_empty_folder(tmp_path):
    jobs = {"lora": LORA_ALONE, "quant": QUANT_ALONE, "phi2": PHI2_ALONE}
    for name, job in jobs.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.py").write_text(MODULES[name].read_text())
        others = [other for other in SIX + ["support", "scripts", "tools"] if other != name]
        alone = f"assert not any(map(importlib.util.find_spec, {others}))"
        (folder / "job").write_text(f"import importlib.util\n{alone}\n{job}")
    write_small_phi(tmp_path / "phi2")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", EACH_ALONE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


# -----------------------------------------------------------------------------
# How it is written


def test_no_line_is_longer_than_100_columns():
    for path in EVERY_FILE:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{relative(path)}, line {number}"


def used_elsewhere(name: str) -> set[str]:
    """Returns the attributes of one of the six that the rest of the project or README.md uses."""
    alias = "evaluation" if name == "eval" else name
    used = set(re.findall(rf"\b{alias}\.(\w+)", README))
    for path in PROJECT:
        if path != MODULES[name]:
            used |= set(re.findall(rf"\b{alias}\.(\w+)", path.read_text()))
    return used


@pytest.mark.parametrize("name", SIX)
def test_every_module_and_every_public_function_of_the_six_says_what_it_does(name):
    """Public is what another file uses, and every class."""
    tree = ast.parse(MODULES[name].read_text())
    assert ast.get_docstring(tree)
    used = used_elsewhere(name)
    for node in tree.body:
        is_used = isinstance(node, ast.FunctionDef) and node.name in used
        if is_used or isinstance(node, ast.ClassDef):
            assert ast.get_docstring(node), node.name


def test_every_file_of_support_scripts_and_tools_says_what_it_is_for():
    for path in (*SUPPORT, *SCRIPTS, *TOOLS):
        assert ast.get_docstring(ast.parse(path.read_text())), relative(path)


# -----------------------------------------------------------------------------
# tiny/


def test_tiny_is_small_and_within_its_bounds(tiny):
    with torch.device("meta"):
        model = phi2.Phi2(phi2.read_config(tiny))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 1e6 < parameters < 4e6
    assert sum(path.stat().st_size for path in tiny.rglob("*")) < 10e6
