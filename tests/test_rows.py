"""Rows in Arrow: how they are used, how --validation cuts them, and their digest."""

import hashlib
import json
import random

import pyarrow
import pytest
from conftest import ROOT

from support.examples import Reading, load_examples
from support.fingerprint import digest_rows
from support.letters import plain, printable
from support.rows import Rows, cut_by_premise

TINY = str(ROOT / "tiny" / "data")


def rows_of(*premises: str, labels=None) -> Rows:
    """A row for each premise, with its number in the hypothesis."""
    hypotheses = [f"Hypothesis {number}." for number in range(len(premises))]
    labels = labels or [0] * len(premises)
    return Rows(
        pyarrow.table({"premise": premises, "hypothesis": hypotheses, "label": labels})
    )


# -----------------------------------------------------------------------------
# Rows


def test_rows_are_dictionaries_and_columns_are_lists():
    # Of two parts: a table may be in chunks.
    rows = Rows(pyarrow.concat_tables([rows_of("a", "b").table, rows_of("c").table]))
    expected = [
        {"premise": "a", "hypothesis": "Hypothesis 0.", "label": 0},
        {"premise": "b", "hypothesis": "Hypothesis 1.", "label": 0},
        {"premise": "c", "hypothesis": "Hypothesis 0.", "label": 0},
    ]
    assert len(rows) == 3
    assert list(rows) == expected
    assert [rows[0], rows[1], rows[-1]] == expected
    assert rows["premise"] == ["a", "b", "c"]
    assert list(rows.select([2, 0])) == [expected[2], expected[0]]
    with pytest.raises(IndexError):
        rows[3]


# -----------------------------------------------------------------------------
# The cut


def test_all_rows_of_a_premise_are_in_one_part():
    premises = [f"Premise {number}." for number in range(200) for _ in range(3)]
    rows = rows_of(*premises, *premises[:30])  # and some rows are there twice
    train, validation = cut_by_premise(rows, 0.1)
    assert not set(train["premise"]) & set(validation["premise"])
    both = list(train) + list(validation)
    assert sorted(both, key=str) == sorted(rows, key=str)
    # 10 % of 630, to within the rows of a premise.
    assert 58 <= len(validation) <= 63


def test_spaces_and_capitals_make_no_other_premise():
    groups = [(f"A dog ran {number}.", f" a  Dog ran {number}. ") for number in range(50)]
    train, validation = cut_by_premise(rows_of(*sum(groups, ())), 0.2)

    def same(rows: Rows) -> set[str]:
        return {premise.replace(" ", "").lower() for premise in rows["premise"]}

    assert len(validation) == 20
    assert not same(train) & same(validation)


@pytest.mark.parametrize(
    "other",
    [
        "The\u00a0caf\u00e9 isn't open.",  # a space that does not break a line
        "The caf\u00e9 isn't\topen.\n",
        "\ufeffThe ca\u200bf\u00e9 isn't open.",  # letters of no width
        "The cafe\u0301 isn't open.",  # the accent is a character of its own
        "The caf\u00e9 isn\u2019t open .",
    ],
)
def test_a_premise_that_looks_the_same_is_no_other(other):
    rows = rows_of("The caf\u00e9 isn't open.", other, "The cafe isn't open.")
    parts = cut_by_premise(rows, 0.4)
    assert sorted(map(len, parts)) == [1, 2]


def test_texts_of_any_script_are_told_apart():
    rows = rows_of("\u732b", "\u72ac", "\u0915\u093f", "\u0915\u0940", "2", "3", "?", "!")
    train, validation = cut_by_premise(rows, 0.5)
    assert len(train) == len(validation) == 4
    assert ("?" in train["premise"]) == ("!" in train["premise"])  # without a letter all are one


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3, 0.5, 0.99])
def test_the_share_of_rows_is_about_what_was_asked(share):
    draw = random.Random(1)
    premises = [f"Premise {n}." for n in range(400) for _ in range(draw.randint(1, 5))]
    train, validation = cut_by_premise(rows_of(*premises), share)
    assert len(validation) == pytest.approx(share * len(premises), abs=5)
    assert len(train) > 0


def test_a_premise_with_more_rows_than_were_asked_for_stays_in_train():
    premises = ["Most rows have this."] * 90 + [f"Premise {n}." for n in range(10)]
    for _, validation in [cut_by_premise(rows_of(*premises), share) for share in (0.02, 0.05)]:
        assert "Most rows have this." not in validation["premise"]
    # Where every premise has more, the smallest is taken.
    _, validation = cut_by_premise(rows_of(*["a"] * 60, *["b"] * 40), 0.05)
    assert validation["premise"] == ["b"] * 40


def test_rows_of_one_premise_cannot_be_cut():
    with pytest.raises(ValueError, match="keeps a premise together, and all rows have the same"):
        cut_by_premise(rows_of("A dog ran.", "a dog ran. "), 0.5)


def test_the_first_rows_for_validation_are_of_every_label_where_a_file_is_sorted():
    premises = [f"Premise {number}." for number in range(900)]
    labels = [0] * 300 + [1] * 300 + [2] * 300
    _, validation = cut_by_premise(rows_of(*premises, labels=labels), 0.1)
    assert set(validation["label"][:30]) == {0, 1, 2}


def test_the_cut_depends_on_no_seed_and_on_no_limit(tmp_path):
    rows = rows_of(*(f"Premise {number // 3}." for number in range(300)))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = Reading(validation=0.1)
    every = load_examples(str(tmp_path), "validation", None, reading)
    random.seed(7)
    first = load_examples(str(tmp_path), "validation", 10, reading)
    assert list(first) == list(every)[:10]
    again = load_examples(str(tmp_path), "train", 10, reading)
    assert list(again) == list(load_examples(str(tmp_path), "train", None, reading))[:10]
    assert not set(again["premise"]) & set(every["premise"])


# -----------------------------------------------------------------------------
# The digest


def digest_by_definition(*splits) -> str:
    """All premises, then all hypotheses, then all labels, each with a zero byte behind it."""
    content = b""
    for rows in splits:
        for column in ("premise", "hypothesis", "label"):
            content += b"".join(str(row[column]).encode() + b"\0" for row in rows)
    return hashlib.sha256(content).hexdigest()[:16]


def test_the_digest_is_that_of_every_text_and_label():
    """A run that was started by an earlier version goes on over the same rows."""
    train = load_examples(TINY, "train")
    validation = load_examples(TINY, "validation_matched", 100)
    assert digest_rows(train) == digest_by_definition(train)
    assert digest_rows(train, validation) == digest_by_definition(train, validation)


def test_the_digest_is_of_the_rows_and_not_of_how_they_are_stored():
    texts = ["", "caf\u00e9 \U0001f339", "a\0b", "c"] * 6000
    whole = rows_of(*texts).table
    parts = [whole.slice(20_000), whole.slice(0, 0), whole.slice(0, 20_000)]
    large = pyarrow.concat_tables(parts[2:] + parts[:2])
    large = large.set_column(0, "premise", large["premise"].cast(pyarrow.large_string()))
    expected = digest_by_definition(list(Rows(whole)))
    assert digest_rows(Rows(whole)) == digest_rows(Rows(large)) == expected
    assert digest_rows(Rows(pyarrow.concat_tables(parts))) != expected, "the order counts"


# -----------------------------------------------------------------------------
# Letters


@pytest.mark.parametrize(
    "text, printed",
    [
        ("Anna said \"no\" \\ caf\u00e9 \U0001f339", "Anna said \"no\" \\ caf\u00e9 \U0001f339"),
        ("\x1b[2J\x07", r"\u001b[2J\u0007"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("\x9b2J", r"\u009b2J"),
        ("a\u202eb\u2066c", r"a\u202eb\u2066c"),
        ("a\u2028b\u200bc\ufeff", r"a\u2028b\u200bc\ufeff"),
        ("\ud83d", r"\ud83d"),
        ("a\U000e0001", r"a\udb40\udc01"),
    ],
)
def test_what_a_terminal_would_obey_or_not_show_is_escaped(text, printed):
    assert printable(text) == printed
    line = json.dumps({"premise": text}, ensure_ascii=False)
    assert json.loads(printable(line)) == {"premise": text}


def test_a_plain_word_has_no_letters_that_nobody_sees():
    assert plain("\ufeff Entailment\u200b\u00a0") == "entailment"
