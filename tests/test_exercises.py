"""exercises/: each solution passes the exercise's tests, and a mistake is told how to be mended."""

import contextlib
import doctest
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT, script

import phi2

README = (ROOT / "exercises" / "README.md").read_text()
NAMES = sorted(path.stem for path in ROOT.glob("exercises/e?_*.py"))
EXERCISE = pytest.mark.parametrize("name", NAMES)
# PEFT on a key that it does not know.
pytestmark = pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")


def solution_of(name: str) -> ModuleType:
    return importlib.import_module(f"exercises.solutions.{name}")


def checks_of(name: str) -> list[Callable]:
    """Returns the tests that a learner runs, in their order."""
    module = importlib.import_module(f"exercises.test_{name}")
    return [test for key, test in vars(module).items() if key.startswith("test_")]


def run(test: Callable, answer: ModuleType, folder: Path) -> None:
    """Runs a learner's test on a module."""
    arguments = {"answer": answer}
    if "tmp_path" in inspect.signature(test).parameters:
        arguments["tmp_path"] = folder / test.__name__
        arguments["tmp_path"].mkdir()
    test(**arguments)


def test_there_are_nine():
    assert [name[:2] for name in NAMES] == [f"e{number}" for number in range(1, 10)]
    assert all(len(checks_of(name)) >= 2 for name in NAMES)


@EXERCISE
def test_the_solution_passes_the_checks_of_the_exercise(name, tmp_path):
    for test in checks_of(name):
        run(test, solution_of(name), tmp_path)


@EXERCISE
def test_the_numbers_in_the_text_are_those_of_the_solution(name):
    """`python -m doctest` does the same with what the learner has written."""
    exercise = importlib.import_module(f"exercises.{name}")
    names = vars(exercise) | vars(solution_of(name))
    example = doctest.DocTestParser().get_doctest(exercise.__doc__, names, name, None, 0)
    output = []
    result = doctest.DocTestRunner().run(example, out=output.append)
    assert result.attempted >= 3
    assert result.failed == 0, "".join(output)


@EXERCISE
def test_an_exercise_is_red_until_it_is_solved(name, tmp_path):
    exercise = importlib.import_module(f"exercises.{name}")
    for test in checks_of(name):
        try:
            run(test, exercise, tmp_path)
        except (NotImplementedError, pytest.fail.Exception):
            continue
        pytest.fail(f"exercises/{name}.py passes {test.__name__}: it is kept unsolved here")


@EXERCISE
def test_a_solution_has_the_names_and_parameters_that_the_exercise_asks_for(name):
    exercise = importlib.import_module(f"exercises.{name}")
    solution = solution_of(name)
    asked = [
        key
        for key, value in vars(exercise).items()
        if getattr(value, "__module__", None) == exercise.__name__ and key != "Shared"
    ]
    assert asked
    for key in asked:
        wanted = inspect.signature(getattr(exercise, key)).parameters
        found = inspect.signature(getattr(solution, key)).parameters
        assert list(found) == list(wanted), key


@EXERCISE
def test_pytest_selects_an_exercise_by_its_number(name):
    """-k 3 takes each test with a 3 anywhere in the names of its file and function."""
    names = [f"test_{name}.py", *(test.__name__ for test in checks_of(name))]
    assert set(re.findall(r"\d", " ".join(names))) == {name[1]}


def test_the_learners_file_is_tested_or_with_an_option_the_solution():
    command = ("-m", "pytest", "exercises", "-k", "6", "-p", "no:cacheprovider")
    learners = script(*command)
    assert learners.returncode == 1
    assert "NotImplementedError: exercise 6: FrozenLinear.forward" in learners.stdout
    solutions = script(*command, "--solutions")
    assert solutions.returncode == 0, solutions.stdout
    count = len(checks_of("e6_qlora_backward"))
    assert f"{count} failed" in learners.stdout
    assert f"{count} passed" in solutions.stdout


def test_the_shared_prefix_is_the_projects_layout():
    answer = solution_of("e9_shared_prefix")
    rows = [[5, 6, 7], [8], [9, 10]]
    shared = answer.share([1, 2], rows)
    layout = phi2.MaskedRows([len(row) for row in rows], prefix_length=2)
    assert torch.equal(shared.mask, layout.mask)
    assert torch.equal(shared.positions, layout.positions)


# -----------------------------------------------------------------------------
# Mistakes that learners make, as changes of the solution, and what the failure says

MISTAKES = [
    ("e1", "self.scale * self.lora_B", "self.lora_B", "the scale alpha / rank is missing"),
    ("e1", "scale = alpha / rank", "scale = rank / alpha",
     "the scale is alpha / rank, not rank / alpha"),
    ("e1", "scale = alpha / rank", "scale = alpha", "alpha must be divided by rank"),
    ("e1", "self.base_layer(x) + ", "", r"base_layer\(x\) is missing"),
    ("e1", "return self.base_layer(x) +", "return self.scale * self.base_layer(x) +", "A x alone"),
    ("e1", ".requires_grad_(False)", "", r"base_layer\.requires_grad_\(False\) freezes"),
    ("e1", "kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))", "zeros_(self.lora_A.weight)",
     "A is zero at the start, as B is"),
    ("e1", "zeros_", "ones_", "B is not zero at the start"),
    ("e1", "base_layer.in_features, rank,", "rank, base_layer.in_features,", r"holds a weight \(b"),
    ("e1", "(self.lora_A(x))", "(self.lora_A(x).detach())", "A has no gradient: something"),
    ("e2", '    model.requires_grad_(False)', "    pass", "Trained besides the adapters: blocks"),
    ("e2", "return paths", "model.requires_grad_(False); return paths", "before the adapters"),
    ("e2", 'f".{path}".endswith(f".{target}")', "path.endswith(target)", "must not match q_proj"),
    ("e2", 'f".{path}".endswith(f".{target}")', 'path.split(".")[-1] == target', "more than one"),
    ("e2", "if not paths:", "if False:", "Raise ValueError"),
    ("e3", "layer.scale * ", "", r"It is W \+ B A: the scale is missing"),
    ("e3", "layer.lora_A.weight\n", "layer.lora_A.weight\n"
     "            delta = delta.T if delta.shape == delta.T.shape else delta\n",
     r"It is W \+ s \(B A\)\^T"),
    ("e3", "weight.copy_(weight + delta)", "weight = weight + delta", "nothing was added in place"),
    ("e3", "weight + delta)", "weight + delta.to(weight.dtype))", "rounded before and after|loses"),
    ("e3", "            model.set_submodule(path, layer.base_layer)", "", "would be added twice"),
    ("e3", "@torch.no_grad()\n", "", "Merge under torch.no_grad"),
    ("e4", '        "use_rslora": config.use_rslora,\n', "",
     "adapter_config.json, and there to_peft"),
    ("e4", '"use_rslora": config', '"rslora": config', "PEFT has a key for this"),
    ("e4", '"use_rslora": config.use_rslora', '"use_rslora": True', "with use_rslora=False"),
    ("e4", 'use_rslora=raw.get("use_rslora", False),', "", "from_peft does not read"),
    ("e4", 'raw.get("use_rslora", False)', 'raw["use_rslora"]', "Such files are plain LoRA"),
    ("e4", "self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)",
     "math.sqrt(self.alpha / self.rank)", "Only the rank goes under the root|alpha does not"),
    ("e4", "math.sqrt(self.rank) if self.use_rslora else self.rank", "self.rank",
     "That is alpha / rank, for use_rslora=False"),
    ("e5", "first << 4 | second", "second << 4 | first", "the first value goes into the high half"),
    ("e5", "blocks.abs().amax", "blocks.amax", "may be a negative number's"),
    ("e5", "(scaled, borders)", "(scaled, LEVELS)", "the next level above"),
    ("e5", "(scaled, borders)", "(scaled, borders, right=True)", "it goes to the lower one"),
    ("e5", "torch.bucketize(scaled, borders)", "((scaled + 1) * 7.5).round()", "evenly spaced"),
    ("e5", "nonzero[:, None]", "absmax[:, None]", "bucketize 15. Divide by 1 where absmax is 0"),
    ("e5", "torch.bucketize(scaled, borders)", "((blocks / absmax[:, None])[..., None] - LEVELS)"
     ".abs().argmin(-1)", "argmin then returns 0"),
    ("e5", "absmax = blocks.abs().amax(dim=1)", "absmax = blocks.abs().amax(dim=1).clamp_min(1e-8)",
     "do not store it"),
    ("e5", "(pairs >> 4, pairs & 15)", "(pairs & 15, pairs >> 4)", "packed >> 4, comes first"),
    ("e5", " * absmax[:, None]\n", "\n", "multiplied by its absmax"),
    ("e5", "weight.float()", "weight", "absmax of a weight in bf16 is in torch.bfloat16"),
    ("e6", "grad @ ctx.dequantize()", "grad @ ctx.dequantize().T", "only because W is square"),
    ("e6", "F.linear(x, dequantize(), bias)", "F.linear(x, dequantize())", "The bias is missing"),
    ("e6", "        ctx.dequantize = dequantize\n", "        weight = dequantize()\n"
     "        ctx.dequantize = lambda: weight\n        dequantize = lambda: weight\n",
     "ctx holds it"),
    ("e6", "        ctx.dequantize = dequantize\n", "        weight = dequantize()\n"
     "        ctx.save_for_backward(weight)\n        dequantize = lambda: weight\n",
     "kept by ctx.save_for_backward"),
    ("e6", "        return F", "        ctx.save_for_backward(x)\n        return F",
     "x is needed for"),
    ("e7", "lr * ratio", "lr", "the learning rate 0.001, and PEFT gives it 0.016"),
    ("e7", ".lora_B.", ".lora_A.", "The rates of A and B are exchanged"),
    ("e7", '"lr": lr}, ', '"lr": lr / ratio}, ', "lr is A's rate"),
    ("e7", "if parameter.requires_grad", "if True", "is frozen, and should be in no group"),
    ("e7", '{"params": of_a, "lr": lr}, ', "", "is in no group, and would never be trained"),
    ("e8", "norm(dim=1))  #", "norm(dim=0))  #", "the norms of W's columns"),
    ("e8", ".detach()", "", "detach it"),
    ("e8", "self.base_layer.bias)", "self.magnitude / norm * self.base_layer.bias)",
     "the bias too"),
    ("e8", "norm = weight", "norm = self.base_layer.weight", "The norm is that of W"),
    ("e8", "self.scale * ", "", r"The scale is missing in W \+ s B A"),
    ("e8", "(self.magnitude / norm)[:, None] * ", "", "It is LoRA's"),
    ("e9", "positions += range(len(prefix), len(prefix) + len(row))",
     "positions += range(start, start + len(row))", "They run on from row to row"),
    ("e9", "positions += range(len(prefix), len(prefix) + len(row))",
     "positions += range(len(row))", "Rows start at 0"),
    ("e9", "(row_of == -1) | (row_of == row_of[:, None])", "True",
     "It is wrong that a0 sees b0, a1 sees b0, b0 sees a0"),
    ("e9", "(row_of == -1) | ", "", "It is wrong that a0 does not see P0, a0 does not see P1"),
    ("e9", "is_visible & is_not_later", "(is_visible & is_not_later).T", "It is transposed"),
    ("e9", "[len(prefix) - 1, *range(start, start + len(row) - 1)]",
     "range(start - 1, start + len(row) - 1)", "before each in the flat order"),
    ("e9", "[len(prefix) - 1, *range(start, start + len(row) - 1)]",
     "range(start, start + len(row))", "own logits, which predict the one after"),
    ("e9", "targets)", 'targets, reduction="sum")', "It is a sum"),
]  # fmt: skip


def mistaken(name: str, right: str, wrong: str) -> ModuleType:
    """Returns the solution with `wrong` in the place of `right`."""
    source = Path(solution_of(name).__file__).read_text()
    assert source.count(right) == 1, right
    module = ModuleType(name)
    exec(source.replace(right, wrong), vars(module))
    return module


@pytest.mark.parametrize("number, right, wrong, cure", MISTAKES)
def test_the_failure_leads_to_the_cure(number, right, wrong, cure, tmp_path):
    (name,) = [name for name in NAMES if name.startswith(number)]
    answer = mistaken(name, right, wrong)
    messages = []
    for test in checks_of(name):
        with contextlib.suppress(Exception):  # from the learner's own line: it speaks for itself
            try:
                run(test, answer, tmp_path)
            except pytest.fail.Exception as failure:
                messages.append(str(failure))
    assert re.search(cure, re.sub(r"\s+", " ", " ".join(messages)))


# -----------------------------------------------------------------------------
# exercises/README.md


def test_the_readme_fits_two_screens_and_says_what_the_exercises_say():
    assert len(README.splitlines()) <= 60
    for name in NAMES:
        text = importlib.import_module(f"exercises.{name}").__doc__
        assert re.search(r"\(arXiv:\d{4}\.\d{5},\ssections? \d", text)
        title = text.splitlines()[0]
        number, minutes = re.fullmatch(r"Exercise (\d): .+\. (\d+) minutes\.", title).groups()
        assert number == name[1]
        assert re.search(rf"^\| {number} \| \[.+\]\({name}\.py\) \| {minutes} \|", README, re.M)


def test_what_the_readme_sends_a_reader_to_is_there():
    """`lora.merge` is a name in lora.py, `phi2.MaskedRows.attend` one in its class."""
    named = set(re.findall(r"`(lora|quant|phi2|data|eval|train)\.([A-Za-z_.]+)`", README))
    named = {(file, path) for file, path in named if path != "py"}
    assert len(named) >= 9
    for file, path in named:
        found = importlib.import_module(file)
        for part in path.split("."):
            found = getattr(found, part)
