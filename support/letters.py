"""Handles characters in people's texts that affect a terminal or the comparison of words."""

import json
import unicodedata
from collections.abc import Sequence


def printable(text: str) -> str:
    r"""Returns a text for a terminal, with the characters that it would obey, or hide, escaped.

    These are the ones that Python's repr escapes: control characters (\u001b, \n), a change of
    writing direction (\u202e), characters without width, half a surrogate pair. The escapes are
    JSON's, so a JSON text keeps its meaning.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else json.dumps(letter)[1:-1] for letter in text)


def ends(texts: Sequence[str], length: int) -> list[str]:
    """Returns the last `length` characters of each text, or whole texts if two would look equal.

    The ends are shown because the paths of runs usually differ there.
    """
    short = [text[-length:] for text in texts]
    return short if len(set(short)) == len(set(texts)) else list(texts)


def plain(word: str) -> str:
    """Returns a word in lower case, without surrounding white space or invisible characters.

    Invisible characters, such as a byte order mark, are there by mistake.
    """
    seen = "".join(letter for letter in word if unicodedata.category(letter) != "Cf")
    return seen.strip().lower()
