"""The project keeps what it promises about itself: its limits, its imports, and what README.md says."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, script

ORDER = ["lora", "phi2", "quant", "data", "eval", "train"]  # the core; all may import checkpoint.py and ranks.py, and bench.py all of them
SOURCES = sorted(path for pattern in ("*.py", "tests/*.py", "tiny/*.py") for path in ROOT.glob(pattern))
README = (ROOT / "README.md").read_text()


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in names | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}}


def test_files_and_functions_stay_short():
    lines = {path: len(path.read_text().splitlines()) for path in SOURCES}
    assert max(lines.values()) <= 350, max(lines, key=lines.get)
    assert sum(lines[ROOT / f"{name}.py"] for name in ORDER) < 1500
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (path.name, node.name) != ("train.py", "main"):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_what_comes_before_it_in_the_reading_order(name):
    allowed = {"lora": set(), "phi2": set(), "quant": set(), "data": set()}.get(name, set(ORDER[:ORDER.index(name)]))
    found = imported(ROOT / f"{name}.py")
    assert found & set(ORDER) <= allowed
    assert not found & {"transformers", "peft", "accelerate", "pickle"}


def test_the_model_and_the_adapters_run_with_torch_alone():
    done = subprocess.run([sys.executable, "-c", """
import sys
for name in ("bitsandbytes", "safetensors", "tokenizers", "huggingface_hub", "datasets", "wandb", "matplotlib", "tqdm", "transformers", "peft"):
    sys.modules[name] = None  # importing it now fails
import torch, lora, phi2, quant
model = phi2.Phi2(phi2.Phi2Config(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2))
print(len(lora.inject(model, lora.LoRAConfig())), *model(torch.tensor([[1, 2, 3]])).shape)
"""], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("4 1 3 50\n", "")


def test_every_module_and_every_public_function_of_the_core_says_what_it_does():
    for name in ORDER:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        assert ast.get_docstring(tree), name
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("main", "parse_arguments", "write_predictions", "read_files", "MLP",
                                                                                       "Attention", "Phi2"):
                assert ast.get_docstring(node), f"{name}.{node.name}"


# ---- README.md

def test_the_tests_that_the_readme_names_exist():
    defined = set(re.findall(r"^def (test_\w+)", "".join(path.read_text() for path in SOURCES), re.MULTILINE))
    named = set(re.findall(r"test_\w+", README.split("## Trust it")[1]))
    assert len(named) > 10 and named <= defined, named - defined


@pytest.mark.parametrize("name", ["train.py", "eval.py", "data.py", "bench.py", "lora.py"])
def test_every_flag_in_the_readme_is_one_of_the_scripts(name):
    help_text = script(name, "--help").stdout
    commands = re.findall(rf"^python {re.escape(name)} .*", README, re.MULTILINE)
    flags = {flag for command in commands for flag in re.findall(r"--[a-z][\w-]*", command)}
    if name == "train.py":
        table = README.split("| to | flags |")[1].split("\n\n")[0]
        flags |= set(re.findall(r"--[a-z][\w-]*", table))
    assert commands and all(re.search(rf"{flag}\b", help_text) for flag in flags), flags


def test_every_file_that_the_readme_names_is_there_or_is_one_that_a_run_leaves():
    left = {"adapter_config.json", "adapter_model.safetensors", "args.json", "metrics.jsonl", "results.json", "trainer.safetensors", "predictions_SPLIT.jsonl", "baseline_SPLIT.jsonl", "lengths.png", "bench.json",
            "loss.png", "confusion.png", "calibration.png", "config.json", "tokenizer.json"}
    named = set(re.findall(r"[\w./-]+\.(?:py|txt|json|jsonl|safetensors|md|png)\b", README)) - left
    assert named and all((ROOT / name).is_file() for name in named), [name for name in named if not (ROOT / name).is_file()]


def test_the_readmes_sizes_are_phi_2s(tmp_path):
    import torch

    import lora
    import phi2
    with torch.device("meta"):
        model = phi2.Phi2(phi2.Phi2Config())
    lora.inject(model, lora.LoRAConfig(rank=8))
    trained = sum(parameter.numel() for parameter in lora.lora_parameters(model).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"{trained:,} of {total:,} parameters ({trained / total:.2%})".replace("%)", " %)") in re.sub(r"\s+", " ", README)
    assert f"{4 * trained / 1e6:.1f} MB" in README


def test_tiny_is_small_and_within_its_bounds(tiny):
    import phi2
    with __import__("torch").device("meta"):
        parameters = sum(parameter.numel() for parameter in phi2.Phi2(phi2.read_config(tiny)).parameters())
    assert 1e6 < parameters < 4e6
    assert sum(path.stat().st_size for path in tiny.rglob("*")) < 10e6
