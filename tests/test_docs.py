"""What README.md and docs/ say is so: links, commands, sizes, and every number of the tutorial."""

import codeop
import csv
import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, forget_what_was_read, in_process, script

import data
import lora
import phi2
import quant
import train
from support import examples, files
from tools import tutorial

README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("*/README.md")),
]
WRITTEN = "\n".join(page.read_text() for page in PAGES)
MOST_WORDS = 1200  # of README.md: one screen, then links


# -----------------------------------------------------------------------------
# README.md


def test_the_readme_is_short():
    assert len(README.split()) <= MOST_WORDS


def test_the_readmes_code_runs(monkeypatch):
    """The four lines of the idea and the training loop, for 2 steps instead of 900."""
    monkeypatch.chdir(ROOT)
    code = README.split("```python\n")[1].split("```")[0]
    assert code.count("range(900)") == 1
    tokenizer = data.load_tokenizer(ROOT / "tiny" / "model")
    prefix, _, _ = data.fixed_ids(tokenizer)
    pairs = examples.load_examples(str(ROOT / "tiny" / "data"), "train", 64)
    names = {"torch": torch, "data": data, "lora": lora, "phi2": phi2, "quant": quant}
    names |= {"train": train, "tokenizer": tokenizer, "prefix": prefix, "pairs": pairs}
    exec(code.replace("range(900)", "range(2)"), names)
    assert names["loss"].isfinite()
    trained = lora.lora_parameters(names["model"])
    assert all(parameter.any() for name, parameter in trained.items() if "lora_B" in name)


def test_the_readmes_prompt_is_the_one_that_the_model_reads():
    pair = examples.load_examples(str(ROOT / "tiny" / "data"), "train", 1)[0]
    assert f"```text\n{data.PROMPT.format(**pair)}\n```" in README


def test_the_readmes_sizes_are_phi_2s():
    with torch.device("meta"):
        model = phi2.Phi2(phi2.Phi2Config())
    lora.inject(model, lora.LoRAConfig(rank=8))
    trained = sum(parameter.numel() for parameter in lora.lora_parameters(model).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    text = re.sub(r"\s+", " ", WRITTEN)
    assert f"{trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)" in text
    assert f"{4 * trained / 1e6:.1f} MB" in WRITTEN  # the adapter's file, in fp32


# -----------------------------------------------------------------------------
# docs/tutorial.md

NUMBER = re.compile(r"\d+(?:\.\d+)?")


def unit(number: str) -> float:
    """Returns the worth of the last digit of a number: 0.01 for "0.25", 1 for "25"."""
    return 10 ** -len(number.partition(".")[2])


def test_the_tutorial_prints_what_it_says(monkeypatch):
    """Words are the same, and a number is off by one in its last digit at most.

    Other processors add in another order, and where a number is rounded it may fall to the other
    side. What counts answers after training may differ by more, and is left out.
    """
    monkeypatch.chdir(ROOT)
    text = tutorial.TUTORIAL.read_text()
    renewed = tutorial.with_outputs(text)
    assert NUMBER.sub("0", renewed) == NUMBER.sub("0", text)
    trained = "after 51 steps: "  # 51 steps later the order of sums may show in an answer
    for line, expected in zip(renewed.splitlines(), text.splitlines(), strict=True):
        if line.startswith(trained):
            continue
        for number, said in zip(NUMBER.findall(line), NUMBER.findall(expected), strict=True):
            assert float(number) == pytest.approx(float(said), abs=1.01 * unit(said)), line


def test_the_tutorials_blocks_can_be_pasted_into_python():
    """A statement with a body ends at an empty line there, and at no other place."""
    for block in tutorial.BLOCK.finditer(tutorial.TUTORIAL.read_text()):
        lines = []
        for line in [*block["code"].splitlines(), ""]:
            lines.append(line)
            if codeop.compile_command("\n".join(lines)):  # raises SyntaxError
                lines = []
        assert not lines, block["code"]


def test_the_tutorial_links_to_the_lines_that_it_names():
    text = tutorial.TUTORIAL.read_text()
    names = set(re.findall(r"`[\w.]+`\]\(\.\./(\w+)\.py#L", text))
    assert names == {"lora", "quant", "phi2", "data", "train"}
    assert tutorial.with_lines(text, tutorial.TUTORIAL.parent) == text


def test_the_tutorials_tables_are_the_results_of_the_experiments():
    text = tutorial.TUTORIAL.read_text()
    assert len(tutorial.TABLE.findall(text)) == 2
    assert tutorial.with_tables(text) == text


def test_the_picture_of_nf4_is_that_of_tinys_weights(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert tutorial.picture() == tutorial.PICTURE.read_text()


# -----------------------------------------------------------------------------
# Links


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), target


# -----------------------------------------------------------------------------
# Files and commands

# What a run, an evaluation or a script leaves, and what a model directory holds.
LEFT = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "args.json",
    "baseline_SPLIT.jsonl",
    "bench.json",
    "config.json",
    "loss.png",
    "metrics.jsonl",
    "predictions_SPLIT.jsonl",
    "results.json",
    "tokenizer.json",
    "train.csv",
    "trainer.safetensors",
}


SCRIPT = re.compile(r"(?:python|torchrun) (?:.* )?(-m (?:scripts|tools)\.\w+|train\.py|eval\.py)")
COMMAND = re.compile(
    r"(?:echo .* \| |time |\w+=\S+ )?(?:python3?|\.venv/bin/\w+|torchrun|make|pip|pytest) .+"
)


def command_lines() -> list[str]:
    """Returns every command of the pages once, in the order in which a reader comes to it."""
    lines = []
    places = re.finditer(r"^```(\w*)\n(.*?)^```$|`([^`]+)`", WRITTEN, re.MULTILINE | re.DOTALL)
    for language, block, span in (place.groups() for place in places):
        if span:
            lines.append(span.replace("\n", " "))
        elif not language:
            lines += block.replace("\\\n", " ").splitlines()
    lines = [line.removeprefix("$ ").partition("  #")[0].strip() for line in lines]
    return list(dict.fromkeys(line for line in lines if COMMAND.fullmatch(line)))


def commands() -> dict[str, list[list[str]]]:
    """Returns the words of every command of the pages, by script, such as "-m scripts.merge"."""
    found = {}
    for line in command_lines():
        line = line.rpartition(" | ")[2]  # of echo ... | python ...
        started = SCRIPT.match(line)
        if started:
            words = shlex.split(line[started.end() :], comments=True)
            found.setdefault(started[1], []).append(words)
    return found


# Those that are never written with a flag may have none.
WITH_FLAGS = [
    command
    for command, lines in sorted(commands().items())
    if any(word.startswith("--") for words in lines for word in words)
]


@pytest.mark.parametrize("command", WITH_FLAGS)
def test_every_flag_that_is_written_is_one_of_the_scripts(command):
    if command == "-m tools.count" and torch.version.cuda is not None:
        pytest.skip("tools.count needs a torch without CUDA")
    help_text = script(*command.split(), "--help").stdout
    flags = {word.split("=")[0] for words in commands()[command] for word in words}
    flags = {word for word in flags if word.startswith("--")}
    if command == "train.py":
        assert flags
        running = (ROOT / "docs" / "running.md").read_text()
        table = running.split("| to | flags |")[1].split("\n\n")[0]
        flags |= set(re.findall(r"--[a-z][\w-]*", table))
    for flag in flags:
        assert re.search(rf"{flag}\b", help_text), flag


# How those commands begin that do not run here, with the reason. They are parsed alone, above.
NOT_RUN = {
    "PIP_EXTRA_INDEX_URL=": "gigabytes from the network",
    "python3 -m venv": "gigabytes from the network",
    "pip": "gigabytes from the network",
    ".venv/bin/pip": "gigabytes from the network",
    "make": "minutes; what it runs is here, or a test",
    "pytest": "tests/test_exercises.py",
    "python -m doctest": "tests/test_exercises.py",
    "python -m experiments": "minutes; tests/test_experiments.py",
    ".venv/bin/python train.py": "README.md has the same",
    ".venv/bin/python -m pytest": "a test",
    ".venv/bin/python tests/side_by_side.py": "seconds of imports; tests/test_reference.py",
    "python -m tools.tutorial": "it writes the page that is tested above",
    "python train.py --rank 8": "a GPU, and phi-2 from the Hub",
    "torchrun": "several GPUs",
    "python eval.py --model microsoft/phi-2": "phi-2 from the Hub",
    "python -m scripts.plan --gpu 12": "phi-2's config.json from the Hub",
    "python -m scripts.plan --model microsoft/phi-2": "phi-2's config.json from the Hub",
    "python -m scripts.push": "an account on the Hub",
    "python train.py --resume out/NAME": "NAME stands for a name",
    "python -m scripts.selftest": "minutes; tests/test_selftest.py",
    "python -m scripts.bench": "an hour, and MNLI",
    "python -m tools.count": "MNLI and phi-2's tokenizer",
    "python - ": "minutes, or MNLI",
    "time python -m scripts.describe": "MNLI",
}
# What makes a command that runs small. What is typed last counts.
SMALL = {
    "train.py": "--steps 2 --batch-size 2 --eval-limit 6 --max-new-tokens 2 --keep-dequantized",
    "eval.py": "--limit 6 --max-new-tokens 2",
    "scripts.merge": "--limit 2",
    "scripts.plan": "--limit 40 --batch-size 2 --eval-limit 6 --max-new-tokens 2",
}


@pytest.fixture
def project(tmp_path):
    """A folder with the project's files for a reader who runs its commands, and rows of his."""
    for name in ("train.py", "eval.py", "scripts", "support", "tiny"):
        (tmp_path / name).symlink_to(ROOT / name)
    rows = list(examples.load_examples(str(ROOT / "tiny" / "data"), "train", 40))
    (tmp_path / "my-rows").mkdir()
    files.write_lines(tmp_path / "my-rows" / "train.jsonl", rows)
    files.write_lines(tmp_path / "my-rows" / "validation.jsonl", rows)
    words = ("follows", "unclear", "contradicts")
    (tmp_path / "my-pairs").mkdir()
    with open(tmp_path / "my-pairs" / "train.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "claim", "verdict"])
        for row in rows:
            table.writerow([row["premise"], row["hypothesis"], words[row["label"]]])
    yield tmp_path
    forget_what_was_read()


def run_written(line: str, folder: Path, monkeypatch) -> None:
    """Runs a command of the pages in this process, from a folder, and on few rows."""
    echo, _, line = line.rpartition(" | ")
    started = SCRIPT.match(line)
    name = started[1].removeprefix("-m ")
    words = []
    for word in shlex.split(line[started.end() :]):
        words += [word] if "*" not in word else sorted(folder.glob(word))
    if not {"--help", "--resume", "--premise", "-"} & set(words):
        words += SMALL.get(name, "").split()
    (folder / "typed").write_text(" ".join(shlex.split(echo)[1:]))
    with open(folder / "typed") as file:
        monkeypatch.setattr("sys.stdin", file)
        in_process(importlib.import_module(name.removesuffix(".py")), *words, cwd=folder)


def test_every_command_runs_in_its_order_or_is_named(project, monkeypatch, capsys):
    ran = []
    for line in command_lines():
        if line.startswith(tuple(NOT_RUN)):
            continue
        if "out/other" in line:  # another run
            shutil.copytree(project / "out" / "demo", project / "out" / "other")
        try:
            run_written(line, project, monkeypatch)
        except SystemExit as stopped:
            assert not stopped.code, f"{line}: {stopped.code}\n{capsys.readouterr().err}"
        ran.append(line)
    assert len(ran) > 15
    written = "\n".join(["", *command_lines()])
    assert not [name for name in NOT_RUN if f"\n{name}" not in written], "of an older page"


def test_every_script_that_is_named_is_there():
    named = set(re.findall(r"-m (scripts|tools|experiments)\.(\w+)", WRITTEN))
    assert ("scripts", "plan") in named
    for folder, name in named:
        assert (ROOT / folder / f"{name}.py").is_file(), name


def test_every_file_that_is_named_for_readers_is_there_or_is_one_that_a_run_leaves():
    endings = "py|txt|json|jsonl|safetensors|md|png|svg"
    named = set(re.findall(rf"[\w./-]+\.(?:{endings})\b", README + CONTRIBUTING)) - LEFT
    assert named
    # Of a link to docs/, such as [running.md](docs/running.md), the text is the name alone.
    places = (ROOT, ROOT / "docs")
    assert not [name for name in named if not any((place / name).is_file() for place in places)]


def test_every_target_that_is_named_is_there():
    targets = set(re.findall(r"^make (\w+)|`make (\w+)`", WRITTEN, re.MULTILINE))
    targets = {name for pair in targets for name in pair if name}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), target


# -----------------------------------------------------------------------------
# docs/proof.md


def claims() -> dict[str, list[str]]:
    """Returns the tests of each claim, as pytest takes them."""
    tests = {}
    for line in (ROOT / "docs" / "proof.md").read_text().splitlines():
        if line.startswith("| ") and line != "| claim | test |":
            claim, cell = line.strip("|").rsplit("|", 1)
            tests[claim.strip()] = re.findall(r"`(.+?)`", cell)
    return tests


def test_every_claim_has_a_test():
    assert len(claims()) > 40
    missing = []
    for claim, tests in claims().items():
        assert tests, claim
        for test in tests:
            file, name = re.fullmatch(r"(tests/test_\w+\.py)::(test_\w+)", test).groups()
            if f"\ndef {name}(" not in (ROOT / file).read_text():
                missing.append(test)
    assert not missing


def test_what_the_readme_says_is_proved_is_a_claim_with_a_test():
    section = README.split("## Trust it")[1].split("\n## ")[0]
    said = re.findall(r"^- (.+)", section, re.MULTILINE)
    assert len(said) > 5
    assert set(said) <= claims().keys()
