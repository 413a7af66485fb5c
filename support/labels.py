"""Labels as people write them, as 0, 1 and 2.

To read one more word, add it to MEANINGS. --labels says what words of any other meaning
stand for.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

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
# How an error about a label ends.
MEANT = f"{', '.join(LABELS)}; --labels says what three others mean, and - stands for no label"


def read_labels(rows: "Dataset", given: tuple[str, ...], place: str) -> list[int]:
    """Returns the column "label" as 0, 1, 2, or HIDDEN. Raises ValueError for any other label.

    `given` is what --labels says. Where the file has names for its numbers (`ClassLabel`),
    the names decide.
    """
    meanings = label_meanings(given)
    names = getattr(rows.features["label"], "names", [])
    if given and not any(as_word(name) in meanings for name in names):
        names = []  # then --labels is about the numbers
    # All names, because the one that is no answer here may come late in the file.
    if not {as_word(name) for name in names} <= meanings.keys():
        raise ValueError(f"{place}: its labels are {', '.join(names)}, not {MEANT}")
    labels = plain_labels(rows)
    words = [as_word(names[x] if x in range(len(names)) else x) for x in labels]
    for word in set(words) - meanings.keys():
        row = words.index(word)
        raise ValueError(f"{place}, row {row}: label {labels[row]!r} is not 0, 1, 2 or {MEANT}")
    check_meanings(set(words), given, place)
    return [meanings[word] for word in words]


def check_meanings(words: set[str], given: tuple[str, ...], place: str) -> None:
    """Raises ValueError where --labels has no effect, or would be needed."""
    if given and not words & said_labels(given).keys():
        raise ValueError(
            f"{place}: no row has a label of --labels {' '.join(given)}; "
            f"there are {', '.join(sorted(words))}"
        )
    if not given and words == {"-1", "0", "1"}:
        raise ValueError(
            f"{place}: its labels are -1, 0 and 1, of which -1 may be an answer or none; "
            "--labels says what they mean, as in --labels -1=contradiction 0=neutral 1=entailment"
        )


def without_names(rows: "Dataset") -> bool:
    """Returns whether the labels are numbers that have no names in the file."""
    has_names = hasattr(rows.features["label"], "names")
    return not has_names and as_word(rows[0]["label"]).isdigit()


def refuse_names_elsewhere(directory: Path) -> None:
    """Raises ValueError where the card of a dataset on the Hub has names for its numbers."""
    folders = [directory, directory.parent] if directory.name == "data" else [directory]
    for folder in folders:
        for name, mark in (("README.md", b"class_label:"), ("dataset_infos.json", b"ClassLabel")):
            card = folder / name
            if card.is_file() and mark in card.read_bytes():
                raise ValueError(f"{card} gives the labels names: say with --labels what they mean")


def plain_labels(rows: "Dataset", column: str = "label") -> list:
    """Returns the labels as the file has them."""
    if type(rows.features[column]).__name__ == "Json":
        # Of numbers and words in one column. The library would read the word - as 0.
        texts = rows.with_format("arrow")[column][:].to_pylist()
        return [text.strip('"') for text in texts]
    return rows[column][:]  # a list: the library's column would read each value anew


def as_word(label) -> str:
    """Returns a label as MEANINGS has it: "1" for 1, 1.0 and "1"; for a missing one ""."""
    return "" if label is None else str(label).strip().lower().removesuffix(".0")


def label_meanings(given: tuple[str, ...]) -> dict[str, int]:
    """Returns the number of each word that a label may be, those of --labels included."""
    meanings = NUMBERS
    if given:  # then a number that is not among them has no meaning
        meanings = {word: number for word, number in NUMBERS.items() if not word.isdigit()}
    return meanings | said_labels(given)


def said_labels(given: tuple[str, ...]) -> dict[str, int]:
    """Returns what --labels says: the number of each word."""
    said = {}
    for number, text in enumerate(given):
        value, _, meaning = text.rpartition("=")
        said[as_word(value or number)] = NUMBERS.get(as_word(meaning))
    if given and sorted(said.values(), key=str) != [0, 1, 2]:
        raise ValueError(
            f"--labels {' '.join(given)} must mean each of {', '.join(LABELS)} once"
        )
    return said
