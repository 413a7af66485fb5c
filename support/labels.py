"""Labels as people write them, as 0, 1 and 2.

To read one more word, add it to MEANINGS. --labels says what words of any other meaning
stand for.
"""

import itertools
import re
from pathlib import Path

LABELS = ("entailment", "neutral", "contradiction")  # stored and answered as 0, 1, 2
HIDDEN = -1  # stands for the label of a row that has none

# What a label may be called, in any case.
MEANINGS = {
    0: ("0", "entailment", "entails", "entail", "e"),
    1: ("1", "neutral", "n"),
    2: ("2", "contradiction", "contradicts", "contradict", "contradictory", "c"),
    HIDDEN: ("-1", "-"),
}
NUMBERS = {word: number for number, words in MEANINGS.items() for word in words}


def as_word(label) -> str:
    """Returns a label as MEANINGS has it: "1" for 1, 1.0 and "1"; for a missing one ""."""
    return "" if label is None else str(label).strip().lower().removesuffix(".0")


def label_numbers(labels: list, given: tuple[str, ...], place: str) -> list[int]:
    """Returns labels as 0, 1, 2, or HIDDEN. Raises ValueError for any other.

    `given` is what --labels says. An error begins with `place`.
    """
    words = [as_word(label) for label in labels]
    found = set(words)
    listed = f"{place}: its labels are {', '.join(sorted(found))}"
    meanings = NUMBERS
    if given:
        said = said_labels(given)
        if not said.keys() & found:
            raise ValueError(f"{listed}, none of those that --labels says")
        # Then a number that is not among them has no meaning.
        meanings = {word: number for word, number in NUMBERS.items() if not word.isdigit()} | said
    for word in found - meanings.keys():
        row = words.index(word)
        raise ValueError(
            f"{place}, row {row}: label {labels[row]!r} is none of {', '.join(meanings)}; "
            "--labels says what three others mean, and - stands for no label"
        )
    has_two = {word for word in found if word.isdigit()} == {"0", "1"}
    # -1 is one of three answers in some files. A few rows may lack an answer by chance.
    if not given and has_two and ("-1" in found or len(words) > 30):
        raise ValueError(
            f"{listed}, of which not all may mean what they do here; --labels says it, as in "
            "--labels entailment neutral contradiction or "
            "--labels -1=contradiction 0=neutral 1=entailment"
        )
    return [meanings[word] for word in words]


def said_labels(given: tuple[str, ...]) -> dict[str, int]:
    """Returns what --labels says: the number of each word."""
    said = {}
    for number, text in enumerate(given):
        value, _, meaning = text.rpartition("=")
        said[as_word(value if "=" in text else number)] = NUMBERS.get(as_word(meaning))
    if sorted(said.values(), key=str) != [0, 1, 2]:
        raise ValueError(f"--labels {' '.join(given)} must mean each of {', '.join(LABELS)} once")
    return said


# How the card of a dataset on the Hub says that its labels have names: in the lines at the
# top of README.md, or in JSON.
CARDS = ("README.md", "dataset_infos.json", "dataset_info.json")
NAMED = re.compile(rb'---\n.*\bclass_label\b|.*"ClassLabel"', re.DOTALL)


def refuse_names_in_card(directory: Path) -> None:
    """Raises ValueError where the card of a dataset, there or above, has names for its numbers."""
    for folder, name in itertools.product((directory, directory.parent), CARDS):
        card = folder / name
        if card.is_file() and NAMED.match(card.read_bytes()):
            raise ValueError(f"{card} gives the labels names: say with --labels what they mean")
