"""Converts labels as people write them to 0, 1 and 2.

To support another word, add it to MEANINGS. Users give the meaning of any other word with
--labels.
"""

import itertools
import re
from pathlib import Path

from support.letters import plain

LABELS = ("entailment", "neutral", "contradiction")  # stored and answered as 0, 1, 2
NO_LABEL = -1  # stands for the label of a row that has none

# The words for each label, in upper or lower case.
MEANINGS = {
    0: ("0", "entailment", "entails", "entail", "e"),
    1: ("1", "neutral", "n"),
    2: ("2", "contradiction", "contradicts", "contradict", "contradictory", "c"),
    NO_LABEL: ("-1", "-"),
}
NUMBERS = {word: number for number, words in MEANINGS.items() for word in words}


def as_word(label) -> str:
    """Returns a label in the form that MEANINGS uses: "1" for 1, 1.0 and "1.00"; "" for None."""
    return "" if label is None else re.sub(r"\.0+$", "", plain(str(label)))


def label_numbers(labels: list, label_of_row, given: tuple[str, ...], place: str) -> list[int]:
    """Returns the distinct labels of a column as 0, 1, 2, or NO_LABEL.

    `label_of_row` is an Arrow array with the index into `labels` of each row. `given` is the
    value of --labels. Raises ValueError for any other label, with `place` and the first such
    row in its message.
    """
    words = [as_word(label) for label in labels]
    meanings = NUMBERS
    if given:  # then numbers that --labels does not mention have no meaning
        others = {word: number for word, number in NUMBERS.items() if not word.isdigit()}
        meanings = others | said_labels(given)
    for number, word in enumerate(words):
        if word not in meanings:
            row = label_of_row.index(number)  # the first that has it
            raise ValueError(
                f"{place}, row {row}: label {repr(labels[number])[:60]} is none of "
                f"{', '.join(meanings)}; --labels says what three others mean, and - stands for "
                "no label"
            )
    return [meanings[word] for word in words]


def check_meanings(words: set[str], rows: int, given: tuple[str, ...], place: str) -> None:
    """Raises ValueError if --labels has no effect on a split's labels, or seems to be needed."""
    listed = f"{place}: its labels are {', '.join(sorted(words))}"
    said = said_labels(given)
    if said and not said.keys() & words:
        raise ValueError(f"{listed}, none of which --labels mentions: {', '.join(said)}")
    # If no label is 2, then 0 and 1 may be two classes, or -1, 0 and 1 three classes. Signs of
    # that: both 0 and 1 occur, -1 occurs, so many rows without a 2. One sign may be chance.
    numbers = words & {"0", "1", "2"}
    signs = [numbers == {"0", "1"}, "-1" in words, rows > 30]
    if not said and numbers and "2" not in numbers and sum(signs) > 1:
        raise ValueError(
            f"{listed}, which may be two classes, which are not supported, or three in another "
            "order; --labels entailment neutral contradiction says what 0, 1 and 2 mean, --labels "
            "-1=contradiction 0=neutral 1=entailment what other numbers mean"
        )


def said_labels(given: tuple[str, ...]) -> dict[str, int]:
    """Returns the number that --labels gives to each word."""
    said = {}
    for number, text in enumerate(given):
        value, _, meaning = text.rpartition("=")
        said[as_word(value if "=" in text else number)] = NUMBERS.get(as_word(meaning))
    if given and sorted(said.values(), key=str) != [0, 1, 2]:
        raise ValueError(f"--labels {' '.join(given)} must mean each of {', '.join(LABELS)} once")
    return said


# The files of a dataset's card on the Hub, and a pattern that shows that labels have names there:
# above the second line of dashes in README.md, or in the JSON file.
CARDS = ("README.md", "dataset_infos.json")
NAMED = re.compile(rb'(?s)(?:\xef\xbb\xbf)?---\s(?:(?!\n---).)*\bclass_label\b|\{.*"ClassLabel"')


def refuse_names_in_card(directory: Path) -> None:
    """Raises ValueError if a dataset's card, in its folder or two above, has names for labels."""
    directory = directory.resolve()
    for folder, name in itertools.product((directory, *directory.parents[:2]), CARDS):
        card = folder / name
        if card.is_file() and NAMED.match(card.read_bytes()):
            raise ValueError(f"{card} gives the labels names: say with --labels what they mean")
