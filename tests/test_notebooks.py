"""The notebooks: every cell runs, in the order in which a reader runs them."""

import ast
import os
import re
import subprocess
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, read_json
from forks import python_command
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

COLAB = ROOT / "notebooks" / "colab.ipynb"
# The demo with few steps and rows. The flags of phi-2's cell are replaced by these too.
SHORT = "@tiny/args --rank 8 --steps 2 --batch-size 8 --limit 40 --eval-limit 4 --max-new-tokens 1"


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters(source: str) -> dict[str, str]:
    """Returns what the first cell sets."""
    assignments = ast.parse(source).body
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assignments}


def working_tree(folder: Path) -> Path:
    """Returns a repository whose last commit is the project as it lies here."""
    repository = folder / "project.git"
    subprocess.run(["git", "clone", "--quiet", "--bare", ROOT, repository], check=True)
    git = ["git", f"--git-dir={repository}", f"--work-tree={ROOT}"]
    subprocess.run([*git, "add", "--all"], cwd=ROOT, check=True)
    author = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    commit = ["commit", "--quiet", "--allow-empty", "--message", "the working tree"]
    subprocess.run([*git, *author, *commit], cwd=ROOT, check=True)
    return repository


def environment(folder: Path, python: Path) -> dict[str, str]:
    """Returns Colab's: `python` is this one, google.colab is there. Nothing is downloaded."""
    colab = folder / "packages" / "google" / "colab"
    colab.mkdir(parents=True)
    (colab / "drive.py").write_text("def mount(folder):\n    print('Mounted at', folder)\n")
    return os.environ | {
        "PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]]),
        "PYTHONPATH": str(folder / "packages"),
        "PIP_NO_INDEX": "1",
    }


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """The executed notebook and its run, with another first cell."""
    folder = tmp_path_factory.mktemp("colab")
    notebook = nbformat.read(COLAB, as_version=4)
    settings = {
        "REPOSITORY": working_tree(folder).as_uri(),
        "FOLDER": str(folder / "flora"),
        "RUN": str(folder / "drive" / "flora" / "run"),
        "TINY": SHORT,
        "PHI2": SHORT,
    }
    first = code_cells(notebook)[0]
    assert first.metadata.tags == ["parameters"]
    assert parameters(first.source).keys() == settings.keys()
    first.source = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    client = NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(folder)}}
    )
    with python_command(folder) as python:
        client.execute(env=environment(folder, python))  # an exception in a cell is one here
    return notebook, Path(settings["FOLDER"]), Path(settings["RUN"])


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_colabs_notebook_trains_resumes_reports_and_answers(colab):
    notebook, folder, run = colab
    _, _, install, demo, drive, phi2, resume, report, pair = code_cells(notebook)
    assert (folder / "README.md").is_file()
    # All is there, torch too, so pip installs nothing.
    assert not re.search("ERROR|Collecting|installed", printed(install))
    assert "finetuned" in printed(demo)
    assert (folder / "out" / "demo" / "results.json").is_file()
    assert "Mounted" in printed(drive)
    assert "finetuned" in printed(phi2)
    assert read_json(run / "args.json")["save_every"] == 100
    assert "finetuned" in printed(resume)
    assert report.outputs[0].data["text/html"] == (run / "report.html").read_text()
    assert len(re.findall(r"^[012] (?:entailment|neutral|contradiction)", printed(pair), re.M)) == 3


def test_colabs_notebook_is_stored_without_outputs_and_needs_nothing_of_colab_but_drive():
    notebook = nbformat.read(COLAB, as_version=4)
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None
    sources = "\n".join(cell.source for cell in code_cells(notebook))
    assert re.findall(r"google.*", sources) == ["google.colab import drive"]


# -----------------------------------------------------------------------------
# notebooks/walkthrough.ipynb

WALKTHROUGH = ROOT / "notebooks" / "walkthrough.ipynb"


def test_the_walkthrough_runs_with_fewer_steps_and_rows(tmp_path):
    notebook = nbformat.read(WALKTHROUGH, as_version=4)
    first = code_cells(notebook)[0]
    assert first.metadata.tags == ["parameters"]
    for name, few in (("ROWS", 6), ("STEPS", 3)):
        setting = re.compile(rf"^{name} = \d+", re.MULTILINE)
        first.source, count = setting.subn(f"{name} = {few}", first.source)
        assert count == 1
    resources = {"metadata": {"path": str(WALKTHROUGH.parent)}}
    with python_command(tmp_path) as python:

        class Kernel(AsyncKernelManager):
            """A fork, which has torch already."""

            def format_kernel_cmd(self, extra_arguments=None) -> list[str]:
                _, *arguments = super().format_kernel_cmd(extra_arguments)
                return [str(python), *arguments]

        options = {"timeout": 300, "resources": resources, "kernel_manager_class": Kernel}
        NotebookClient(notebook, **options).execute()
    # Its last cell asserts that the adapter gives the same answers when it is loaded again.
    last = printed(code_cells(notebook)[-1])
    assert re.match(r"\{.*\}\nloaded again: [01]\.\d+ as written", last)


def test_the_walkthrough_is_stored_with_small_outputs_and_three_pictures():
    notebook = nbformat.read(WALKTHROUGH, as_version=4)
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    pictures = [output.data for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    assert WALKTHROUGH.stat().st_size < 150_000
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "the base: 0.000 as written" in text
    assert str(ROOT) not in WALKTHROUGH.read_text()
