"""Runs the code of docs/tutorial.md, and updates its outputs, line numbers and picture.

    python -m tools.tutorial

The ```python blocks run one after another, with the same names, in the project's folder. A ```text
block that follows one gets what it printed. A link such as [`inject`](../lora.py#L1) gets the
number of the line that defines the name. A comment such as <!-- experiments.rank --> gets the
results of that question as a table. docs/nf4.svg gets the bars of its histogram. tests/test_docs.py
fails if the page or the picture is out of date.
"""

import contextlib
import io
import re
from pathlib import Path

import torch

import phi2
import quant
from experiments import report
from support import files

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.md"
PICTURE = ROOT / "docs" / "nf4.svg"

BLOCK = re.compile(r"(```python\n(?P<code>.*?)```\n)(?P<shown>\n```text\n.*?```\n)?", re.DOTALL)
TABLE = re.compile(r"(<!-- experiments\.(?P<name>\w+) -->\n)(\|.*\n)*")
BARS = re.compile(r'(<path class="bar" d=")[^"]*')
LINK = re.compile(r"\[`(?P<name>[\w.]+)`\]\((?P<path>[\w./]+\.py)#L\d+\)")


def with_outputs(text: str) -> str:
    """Returns the text of a page with the current outputs of its blocks, run in order."""
    names = {"__name__": "tutorial"}

    def run(block: re.Match) -> str:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(block["code"], "tutorial.md", "exec"), names)
        if not block["shown"]:
            return block[0]
        return f"{block[1]}\n```text\n{output.getvalue()}```\n"

    return BLOCK.sub(run, text)


def with_tables(text: str) -> str:
    """Returns the text of a page with a table of results below each <!-- experiments.NAME -->."""

    def table(found: re.Match) -> str:
        summary = files.read_json(ROOT / "experiments" / "results" / f"{found['name']}.json")
        lines = ["| arm | trained | best rate | accuracy, and its range |", "|---|---|---|---|"]
        for name, arm in summary["arms"].items():
            accuracy = report.spread(arm["accuracy"])
            rate = f"{arm['learning_rate']:.3g}"
            lines.append(f"| {name} | {arm['trained']:,} | {rate} | {accuracy} |")
        return found[1] + "\n".join(lines) + "\n"

    return TABLE.sub(table, text)


def with_lines(text: str, folder: Path) -> str:
    """Returns the text of a page in `folder` with the current line number in each link to a name.

    Raises ValueError if a file does not define the name.
    """

    def link(found: re.Match) -> str:
        path = folder / found["path"]
        *_, name = found["name"].split(".")  # of LoRALinear.forward it is forward
        lines = path.read_text(encoding="utf-8").splitlines()
        definition = re.compile(rf"\s*(class|def) {name}\b|{name} = ")
        for number, line in enumerate(lines, start=1):
            if definition.match(line):
                return f"[`{found['name']}`]({found['path']}#L{number})"
        raise ValueError(f"{found['path']} defines no {name}")

    return LINK.sub(link, text)


def with_bars(svg: str, model: str = "tiny/model") -> str:
    """Returns docs/nf4.svg with the current histogram of a layer's weights, scaled by block.

    The rest of the picture, its style and the 16 levels of NF4, is written by hand there.
    """
    phi = phi2.build(model)
    phi2.load_weights(phi, model, "cpu", torch.float32)
    blocks = phi.model.layers[0].mlp.fc1.weight.detach().reshape(-1, quant.BLOCK)
    scaled = blocks / blocks.abs().amax(dim=1, keepdim=True)
    counts = torch.histc(scaled, 80, -1, 1)
    # The first and the last bar hold the largest weight of each block, which is -1 or 1.
    heights = (150 * counts / counts[1:-1].max()).clamp(max=160).round().int()
    bars = [f"M{20 + 7.5 * bar} 190v-{height}h6.5v{height}" for bar, height in enumerate(heights)]
    return BARS.sub(r"\g<1>" + "\n".join(bars), svg)


def main() -> None:
    text = TUTORIAL.read_text(encoding="utf-8")
    text = with_lines(with_tables(with_outputs(text)), TUTORIAL.parent)
    TUTORIAL.write_text(text, encoding="utf-8")
    PICTURE.write_text(with_bars(PICTURE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
