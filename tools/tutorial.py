"""Runs the code of docs/tutorial.md, and writes into it what it prints and where things stand.

    python -m tools.tutorial

A block of ```python is run after those before it, with the same names, from the project's folder.
Where a ```text block follows, it gets what was printed. A link such as [`inject`](../lora.py#L1)
gets the line that defines the name. tests/test_docs.py fails where the file is out of date.
"""

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.md"

BLOCK = re.compile(r"(```python\n(?P<code>.*?)```\n)(?P<shown>\n```text\n.*?```\n)?", re.DOTALL)
LINK = re.compile(r"\[`(?P<name>[\w.]+)`\]\((?P<path>[\w./]+\.py)#L\d+\)")


def with_outputs(text: str) -> str:
    """Returns the text of a page with what each of its blocks prints, run one after another."""
    names = {"__name__": "tutorial"}

    def run(block: re.Match) -> str:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(block["code"], "tutorial.md", "exec"), names)
        if not block["shown"]:
            return block[0]
        return f"{block[1]}\n```text\n{output.getvalue()}```\n"

    return BLOCK.sub(run, text)


def with_lines(text: str, folder: Path) -> str:
    """Returns the text of a page in `folder` with the line of each name that it links to.

    Raises ValueError where a file does not define the name.
    """

    def link(found: re.Match) -> str:
        path = folder / found["path"]
        *_, name = found["name"].split(".")  # of a method, such as LoRALinear.forward, the last
        lines = path.read_text(encoding="utf-8").splitlines()
        definition = re.compile(rf"\s*(class|def) {name}\b|{name} = ")
        for number, line in enumerate(lines, start=1):
            if definition.match(line):
                return f"[`{found['name']}`]({found['path']}#L{number})"
        raise ValueError(f"{found['path']} defines no {name}")

    return LINK.sub(link, text)


def main() -> None:
    text = TUTORIAL.read_text(encoding="utf-8")
    text = with_lines(with_outputs(text), TUTORIAL.parent)
    TUTORIAL.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
