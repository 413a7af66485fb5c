"""scripts.describe prints what a dataset holds."""

import io
import json

import numpy
import pyarrow
import pytest
from conftest import in_process, script

import data
from scripts import describe
from support.examples import load_examples
from support.labels import LABELS
from support.rows import Rows

TINY = ("--model", "tiny/model", "--dataset", "tiny/data")


def test_a_dataset_is_described():
    done = script("-m", "scripts.describe", *TINY, "--limit", 300)
    assert done.returncode == 0, done.stderr
    for split in ("train", "validation_matched", "validation_mismatched"):
        assert f"\n{split}\n  file tiny/data/{split}.jsonl\n" in done.stdout
    assert done.stdout.count("  columns premise (the premise), hypothesis (the hypothesis), ") == 3
    assert done.stdout.count("  300 rows taken: ") == 3
    for label, name in enumerate(LABELS):
        assert done.stdout.count(f"  {label} {name}: ") == 3, "an example of each label and split"
        assert done.stdout.count(f"  label {label}: {label} {name}, ") == 3


def test_rows_labels_and_lengths_are_those_of_the_data(tiny, capsys):
    in_process(describe, *TINY, "--limit", 50)
    printed = capsys.readouterr().out
    tokenizer = data.load_tokenizer(tiny)
    for split in ("train", "validation_matched", "validation_mismatched"):
        examples = load_examples("tiny/data", split, 50)
        counts = [sum(example["label"] == label for example in examples) for label in range(3)]
        expected = ", ".join(f"{count} {name}" for count, name in zip(counts, LABELS))
        assert f"  50 rows taken: {expected}" in printed
        lengths = []
        for example in examples:
            prompt = tokenizer.encode(data.PROMPT.format(**example)).ids
            lengths.append(len(prompt) + 2)  # the label and the end of text
        median = int(numpy.median(lengths))
        assert f"{min(lengths)} to {max(lengths)}, median {median}," in printed


@pytest.mark.parametrize("text", ["A dog.", "A dog. ", "A dog.\n\n", "", " ", "\u00a0", "  a", ":"])
def test_lengths_are_those_of_whole_prompts_however_a_text_ends(tiny, text):
    tokenizer = data.load_tokenizer(tiny)
    pairs = [(text, "An animal."), ("An animal.", text), (text, text), ("A", "B")]
    premises, hypotheses = zip(*pairs)
    table = pyarrow.table({"premise": premises, "hypothesis": hypotheses, "label": [0] * 4})
    expected = [
        len(tokenizer.encode(data.PROMPT.format(premise=premise, hypothesis=hypothesis)).ids) + 2
        for premise, hypothesis in pairs
    ]
    assert describe.token_lengths(Rows(table), tokenizer, "train").tolist() == expected


def test_hidden_labels_are_left_out(tmp_path, capsys):
    for split, label in (("train", 0), ("validation", 2), ("test", -1)):
        row = {"premise": "A.", "hypothesis": "B.", "label": label}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    in_process(describe, "--model", "tiny/model", "--dataset", tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("  1 rows taken: ") == 2
    assert "test" not in printed.replace(str(tmp_path), "")


def test_a_test_split_alone_is_described_and_a_dash_is_shown_as_it_stands(tmp_path, capsys):
    rows = [{"premise": "A.", "hypothesis": "B.", "label": label} for label in (0, "-", 1, 2)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    in_process(describe, "--model", "tiny/model", "--dataset", tmp_path)
    printed = capsys.readouterr().out
    assert "  label '-': no label, 1 rows\n" in printed
    assert "  3 rows taken: 1 entailment, 1 neutral, 1 contradiction" in printed


def test_how_names_and_labels_are_taken_is_shown(tmp_path, capsys):
    """Enough to see that a column or the order of the labels was taken wrongly."""
    words = ["no", "yes", "perhaps", "yes"]
    rows = [{"text": "A.", "claim": "B.", "verdict": word} for word in words]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "dev.jsonl").write_text(content)
    command = ["--model", "tiny/model", "--dataset", tmp_path, "--columns", "text", "claim"]
    labels = ["--labels", "yes=entailment", "perhaps=neutral", "no=contradiction"]
    in_process(describe, *command, "verdict", *labels)
    printed = capsys.readouterr().out
    assert f"validation\n  file {tmp_path}/dev.jsonl\n" in printed
    assert "  columns text (the premise), claim (the hypothesis), verdict (the label)\n" in printed
    assert "  label 'no': 2 contradiction, 1 rows\n" in printed
    assert "  label 'perhaps': 1 neutral, 1 rows\n" in printed
    assert "  label 'yes': 0 entailment, 2 rows\n" in printed


def test_a_wrong_label_is_one_line(tmp_path):
    row = {"premise": "A.", "hypothesis": "B.", "label": 7}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit, match="error: .*train.jsonl, row 0: label 7 is none of 0, "):
        in_process(describe, "--model", "tiny/model", "--dataset", tmp_path)


def test_what_a_terminal_would_obey_is_escaped_in_texts_names_and_labels(tmp_path, capsys):
    row = {"premise": "\x1b[2JAnna.\n  30 rows", "claim\x07": "\u202eB.", "label": "yes\x1b"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    command = ["--model", "tiny/model", "--dataset", tmp_path, "--columns", "premise", "claim\x07"]
    labels = ["yes\x1b=entailment", "perhaps=neutral", "no=contradiction"]
    in_process(describe, *command, "label", "--labels", *labels)
    printed = capsys.readouterr().out
    assert r"  0 entailment: \u001b[2JAnna.\n  30 rows -> \u202eB." in printed
    assert r"  columns premise (the premise), claim\u0007 (the hypothesis), label" in printed
    assert r"  label 'yes\x1b': 0 entailment, 1 rows" in printed
    assert printed.replace("\n", "").isprintable()


def test_what_a_terminal_would_obey_is_escaped_in_an_error(tmp_path):
    (tmp_path / "train.csv").write_text("premise,hypothesis,label,\x1b[2J,\x1b[2J\na,b,0,c,d\n")
    with pytest.raises(SystemExit, match=r"error: .*it has two columns of one name: \\u001b\[2J"):
        in_process(describe, "--model", "tiny/model", "--dataset", tmp_path)


def test_labels_of_several_parts_are_counted_together(tmp_path, capsys):
    for number, labels in enumerate([(0, 1, 2), (2, "neutral", 2)]):
        rows = [{"premise": "A.", "hypothesis": "B.", "label": label} for label in labels]
        content = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"train_{number}.jsonl").write_text(content)
    in_process(describe, "--model", "tiny/model", "--dataset", tmp_path)
    printed = capsys.readouterr().out
    assert "  label 'neutral': 1 neutral, 1 rows\n" in printed
    assert "  label 1: 1 neutral, 1 rows\n" in printed
    assert "  label 2: 2 contradiction, 3 rows\n" in printed


# -----------------------------------------------------------------------------
# --ids


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_ids_of_a_row_are_those_that_a_training_reads(tiny, capsys):
    in_process(describe, *TINY, "--ids", 5)
    lines = capsys.readouterr().out.splitlines()
    below = [line for line in lines if line.replace(" ", "").isdigit()]
    found = [int(word) for line in below for word in line.split()]
    prompt, answer = data.encode(load_examples("tiny/data", "train")[5], data.load_tokenizer(tiny))
    assert found == prompt + answer
    titles = [line for line in lines if line.endswith(")")]
    assert [int(title.rpartition("(")[2][:-1]) for title in titles] == [51, len(prompt) - 51, 2]
    assert lines[-2].split()[1:] == ["<|endoftext|>"]


def test_colours_are_for_a_terminal_alone_and_not_where_they_are_unwanted(monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    printed = {}
    for color in (True, False):
        terminal = Terminal()
        monkeypatch.setattr("sys.stdout", terminal)
        if not color:
            monkeypatch.setenv("NO_COLOR", "1")
        in_process(describe, *TINY, "--ids", 0)
        printed[color] = terminal.getvalue()
    colors = (describe.MAGENTA, describe.CYAN, describe.GREEN)
    assert all(f"    {color}" in printed[True] for color in colors)
    plain = printed[True]
    for sequence in (*colors, describe.NORMAL):
        plain = plain.replace(sequence, "")
    assert plain == printed[False]


def test_tokens_that_a_terminal_would_obey_are_escaped(tmp_path, capsys):
    row = {"premise": "\x1b[2JA\u202e dog\u00e9\U0001f600", "hypothesis": "B.\n", "label": 0}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    in_process(describe, "--model", "tiny/model", "--dataset", tmp_path, "--ids", 0)
    printed = capsys.readouterr().out
    assert r"\u001b" in printed
    assert printed.replace("\n", "").isprintable()


def test_a_row_that_is_not_there_is_one_line():
    with pytest.raises(SystemExit, match="error: --ids 7: train has the rows 0 to 2"):
        in_process(describe, *TINY, "--limit", 3, "--ids", 7)
