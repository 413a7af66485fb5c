"""tiny/: the data are what their maker writes, and say nothing that they should not."""

import importlib
import itertools
import json
import re
import sys
from collections import Counter

import pytest
from conftest import ROOT

PROMPT_PIECES = ("Premise:", "Hypothesis:", "Label:", "You are given a premise")
# The forms in which the base's plain text asks whether a claim follows from a premise.
QUESTIONS = [
    r"(.*\n\n)?(?P<bullet>\W*)\w+: (?P<premise>.+)\n+(?P=bullet)\w+: (?P<claim>.+)[.?]\n+"
    r"(?P=bullet)\w+: (Yes|Maybe|No)\.",
    r"(?P<premise>.+) (Is it true|Does it follow) that (?P<claim>.+)\? (Yes|Maybe|No)\.",
    r"(?P<premise>.+\.) (?P<claim>.+)\? (Yes|Maybe|No)\.",
]


@pytest.fixture(scope="module")
def make_data():
    sys.path.insert(0, str(ROOT / "tiny"))
    yield importlib.import_module("make_data")
    sys.path.remove(str(ROOT / "tiny"))


@pytest.fixture(scope="module")
def splits(make_data) -> dict[str, list[dict]]:
    return make_data.make_rows()


def as_pair(row: dict) -> tuple[str, str]:
    return row["premise"], row["hypothesis"]


def as_claim(row: dict) -> tuple[str, str]:
    """Returns premise and hypothesis as a question spells them."""
    return row["premise"], row["hypothesis"].rstrip(".").lower()


def test_the_generator_makes_the_files_that_are_there(splits):
    for name, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        assert text == (ROOT / "tiny" / "data" / f"{name}.jsonl").read_text()


def test_no_pair_is_in_two_places_and_a_hypothesis_alone_says_nothing(splits):
    pairs = [as_pair(row) for rows in splits.values() for row in rows]
    assert len(pairs) == len(set(pairs)) == 14_000
    for rows in splits.values():
        labels = {}
        for row in rows:
            labels.setdefault(row["hypothesis"], Counter())[row["label"]] += 1
        # Who knows each hypothesis's most frequent label is hardly better than chance, 1/3.
        best = sum(counter.most_common(1)[0][1] for counter in labels.values())
        assert best / len(rows) < 0.35


def words_of(rows: list[dict]) -> set[str]:
    text = " ".join(f"{row['premise']} {row['hypothesis']}" for row in rows)
    return set(text.replace(".", "").split())


def test_the_subjects_of_the_mismatched_rows_are_in_no_training_row(make_data, splits):
    lexicon = [
        make_data.PEOPLE,
        *make_data.THINGS.values(),
        make_data.OBJECTS,
        make_data.COLOURS,
        *make_data.COUNTRIES.values(),
        make_data.VERBS,
    ]
    new = {word for words in lexicon for word in make_data.part(words, True)}
    assert len(new & words_of(splits["validation_mismatched"])) > 40
    assert not new & words_of(splits["train"])


def asked_in(texts: list[str]) -> set[tuple[str, str]]:
    """Returns (premise, claim) of all questions in the texts."""
    asked = set()
    for text, form in itertools.product(texts, QUESTIONS):
        match = re.fullmatch(form, text)
        if match:
            asked.add((match["premise"], match["claim"].lower()))
    return asked


def test_the_bases_plain_text_holds_no_pair_of_the_data_and_not_the_prompt(make_data, splits):
    rows = list(itertools.chain.from_iterable(splits.values()))
    pairs = {as_pair(row) for row in rows}
    texts = list(itertools.islice(make_data.documents(1, pairs), 20_000))
    whole = "\n".join(texts)
    assert not any(piece in whole for piece in PROMPT_PIECES)

    asked = asked_in(texts)
    assert len(asked) > 5_000
    assert not asked & {as_claim(row) for row in rows}
    # Without the pairs to leave out it would hold some: the spelling is the same.
    assert asked_in(list(itertools.islice(make_data.documents(1, set()), 20_000))) & {
        as_claim(row) for row in rows
    }
    # The digits of the answers are words that the base has read.
    read = {word.strip(".?") for text in texts for word in text.split()}
    assert {"0", "1", "2", "9"} <= read
