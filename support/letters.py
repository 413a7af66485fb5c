"""What letters of people's texts do to a terminal, and to a comparison of words."""

import json
import re
import unicodedata
from collections.abc import Sequence

# Control characters but line breaks and tabs, and what turns the direction of writing
CONTROLS = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""Returns a text for a terminal, with each letter that it would obey, or not show, escaped.

    They are those that Python's repr escapes: control characters (\u001b, \n), what turns the
    direction of writing (\u202e), letters of no width, half a surrogate pair. The escapes are
    JSON's, so JSON stays what it was.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else json.dumps(letter)[1:-1] for letter in text)


def harmless(value):
    """Returns a text for a browser, with each letter that it would obey escaped as above.

    It shows line breaks and letters of no width, which some languages need. Anything but a plain
    text stays as it is.
    """
    if type(value) is not str:  # jinja's Markup is a text too, of values that were here before
        return value
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", value)


def ends(texts: Sequence[str], length: int) -> list[str]:
    """Returns the last letters of each text, or all of them where two would look the same.

    It is the end by which the paths of runs differ most often.
    """
    short = [text[-length:] for text in texts]
    return short if len(set(short)) == len(set(texts)) else list(texts)


def plain(word: str) -> str:
    """Returns a word in small letters, without white space around it or letters of no width.

    The latter, a byte order mark for example, are there by mistake, and nobody sees them.
    """
    seen = "".join(letter for letter in word if unicodedata.category(letter) != "Cf")
    return seen.strip().lower()
