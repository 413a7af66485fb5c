"""Makes tiny/data: sentence pairs in GLUE's MNLI schema whose labels are right by construction.

    python tiny/make_data.py

Every kind of sentence (taxonomy, place, antonym, negation, quantity, share, modifier) is a function
that draws one hypothesis and, for it, premises that entail it, leave it open and contradict it.
Each hypothesis is written once with each label, so a model that reads the hypothesis alone stays
at one third. As in MNLI, premise and hypothesis are about one scene: who bought a dog, bought just
that.

The words of validation_mismatched (after each bar below) occur in no training row. `documents`
writes the plain text for make_model.py: the same world, all of its words, never the form of the
prompt and never a pair that is in the data.

The files are in git, and a test compares them with what this script makes. They depend on the
order of the random draws, so a line that draws must stay in its place.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROWS = {"validation_matched": 1000, "validation_mismatched": 1000, "train": 12000}
LABELS = ("entailment", "neutral", "contradiction")
ANSWERS = ("Yes", "Maybe", "No")


# -----------------------------------------------------------------------------
# The words. Before a bar: training and validation_matched; after it: validation_mismatched

PEOPLE = (
    "Anna Ben Clara David Emma Felix Grace Henry Ivy Jack Kate Leo Mary Noah Olga Paul Rosa Sam "
    "Tina Tom|Alice Bruno Diana Oscar Nina Hugo Julia Martin Vera Walter"
)
THINGS = {
    "animal": "dog cat horse cow goat pig|fox wolf rabbit",
    "fruit": "pear plum peach apple lemon|fig cherry orange",
    "vegetable": "carrot onion potato bean|leek turnip",
    "tool": "hammer saw drill axe|wrench shovel",
    "garment": "coat hat scarf shirt|jacket skirt",
    "vehicle": "car bus truck tram|van bike",
    "flower": "rose tulip daisy|lily orchid",
}
VERBS = "bought saw found lost drew|sold painted hid"
COUNTRIES = {
    "France": "Paris Lyon|Nice",
    "Spain": "Madrid Seville|Bilbao",
    "Italy": "Rome Milan|Naples",
    "Germany": "Berlin Munich|Hamburg",
    "Japan": "Tokyo Osaka|Kyoto",
    "India": "Delhi Mumbai|Pune",
    "Egypt": "Cairo Luxor|Aswan",
    "Peru": "Lima Cusco|Trujillo",
}
SETTLED = "lives works|stays studies"
OPPOSITES = (
    "open/closed full/empty hot/cold clean/dirty wet/dry big/small old/new long/short"
    "|heavy/light soft/hard thick/thin wide/narrow"
)
OBJECTS = "door box cup room window bag table plate road|lamp chair bridge shelf"
COLOURS = "red blue green yellow white black|brown purple grey pink"
ACTIONS = (
    "sleep/slept swim/swam dance/danced sing/sang cook/cooked run/ran read/read"
    "|write/wrote jump/jumped laugh/laughed pray/prayed"
)
TIMES = ("all day", "all night")  # training and matched; mismatched
SIZES = ("big", "small", "old", "new")

PLURALS = {
    "potato": "potatoes",
    "box": "boxes",
    "bus": "buses",
    "wrench": "wrenches",
    "cherry": "cherries",
    "lily": "lilies",
    "daisy": "daisies",
    "wolf": "wolves",
    "shelf": "shelves",
    "fox": "foxes",
    "peach": "peaches",
}


def part(words: str, mismatched: bool) -> list[str]:
    """The words before the bar (training, matched) or after it (mismatched)."""
    before, after = words.split("|")
    return after.split() if mismatched else before.split()


def a(noun: str) -> str:
    article = "an" if noun[0] in "aeiou" else "a"
    return f"{article} {noun}"


def plural(noun: str) -> str:
    return PLURALS.get(noun, noun + "s")


class Words:
    """Draws words of one part of the lexicon."""

    def __init__(self, rng: random.Random, mismatched: bool):
        self.rng = rng
        self.mismatched = mismatched

    def pick(self, words: str, besides: tuple[str, ...] = ()) -> str:
        """Draws one of the words on this lexicon's side of the bar."""
        choices = [word for word in part(words, self.mismatched) if word not in besides]
        return self.rng.choice(choices)

    def pick_family(
        self, families: dict[str, str], besides: tuple[str, ...] = ()
    ) -> tuple[str, str]:
        """Draws a family that is not in `besides`, and one of its members."""
        family = self.rng.choice([family for family in families if family not in besides])
        return family, self.pick(families[family])

    def flip(self) -> bool:
        return self.rng.random() < 0.5


# -----------------------------------------------------------------------------
# The kinds of sentence


@dataclass
class Scene:
    """A hypothesis, and for each label the premises that give it."""

    hypothesis: str
    entailing: list[str]
    open: list[str]
    contradicting: list[str]


def taxonomy(w: Words) -> Scene:
    who = w.pick(PEOPLE)
    verb = w.pick(VERBS)
    family, thing = w.pick_family(THINGS)
    other_family, stranger = w.pick_family(THINGS, besides=(family,))
    sibling = w.pick(THINGS[family], besides=(thing,))
    does = f"{who} {verb}"
    if w.flip():
        return Scene(
            f"{does} {a(family)}.",
            [f"{does} {a(thing)}."],
            [f"{does} something."],
            [f"{does} {a(stranger)}.", f"{does} {a(other_family)}."],
        )
    return Scene(
        f"{does} {a(thing)}.",
        [f"{does} {a(w.pick(COLOURS))} {thing}."],
        [f"{does} {a(family)}."],
        [f"{does} {a(sibling)}.", f"{does} {a(stranger)}."],
    )


def place(w: Words) -> Scene:
    who = w.pick(PEOPLE)
    lives = w.pick(SETTLED)
    country, city = w.pick_family(COUNTRIES)
    other_country, other_city = w.pick_family(COUNTRIES, besides=(country,))
    does = f"{who} {lives}"
    elsewhere = [f"{does} in {other_city}.", f"{does} in {other_country}."]
    if w.flip():
        return Scene(
            f"{does} in {country}.", [f"{does} in {city}."], [f"{does} near a river."], elsewhere
        )
    return Scene(
        f"{does} in {city}.",
        [f"{does} in the old part of {city}."],
        [f"{does} in {country}."],
        elsewhere,
    )


def antonym(w: Words) -> Scene:
    opposites = w.pick(OPPOSITES)
    it, opposite = w.rng.sample(opposites.split("/"), 2)
    unrelated = w.rng.choice(w.pick(OPPOSITES, besides=(opposites,)).split("/"))
    thing = w.pick(OBJECTS)
    if w.flip():
        return Scene(
            f"The {thing} is {it}.",
            [f"The {thing} is very {it}.", f"The {thing} is {it} and {unrelated}."],
            [f"The {thing} is {unrelated}."],
            [f"The {thing} is {opposite}.", f"The {thing} is not {it}."],
        )
    return Scene(
        f"The {thing} is not {it}.",
        [f"The {thing} is {opposite}.", f"The {thing} is very {opposite}."],
        [f"The {thing} is {unrelated}."],
        [f"The {thing} is very {it}.", f"The {thing} is {it}."],
    )


def negation(w: Words) -> Scene:
    who = w.pick(PEOPLE)
    when = TIMES[int(w.mismatched)]
    other = w.pick(PEOPLE, besides=(who,))
    plain, past = w.pick(ACTIONS).split("/")
    did = [f"{who} {past} {when}.", f"{who} and {other} {past}."]
    did_not = [f"{who} never {past}.", f"Nobody {past}."]
    wanted = [f"{who} wanted to {plain}.", f"{other} {past} {when}."]
    if w.flip():
        return Scene(f"{who} {past}.", did, wanted, [f"{who} did not {plain}.", *did_not])
    return Scene(f"{who} did not {plain}.", did_not, wanted, [f"{who} {past}.", *did])


def quantity(w: Words) -> Scene:
    who = w.pick(PEOPLE)
    _, thing = w.pick_family(THINGS)
    things = plural(thing)
    number = w.rng.randint
    if w.flip():
        n = number(3, 7)
        return Scene(
            f"{who} has more than {n} {things}.",
            [f"{who} has {number(n + 1, 9)} {things}."],
            [f"{who} has more than {number(2, n - 1)} {things}."],
            [f"{who} has {number(2, n)} {things}."],
        )
    n = number(3, 7)
    return Scene(
        f"{who} has {n} {things}.",
        [f"{who} has {n} {w.pick(COLOURS)} {things}."],
        [f"{who} has many {things}.", f"{who} has more than {number(2, n - 1)} {things}."],
        [f"{who} has {number(n + 1, 9)} {things}.", f"{who} has no {things}."],
    )


def share(w: Words) -> Scene:
    things = plural(w.pick(OBJECTS))
    it = w.pick(COLOURS)
    other = w.pick(COLOURS, besides=(it,))
    all_are = f"All of the {things} are {it}."
    not_all_are = f"Not all of the {things} are {it}."
    some_are = f"Some of the {things} are {it}."
    every = [f"Every one of the {things} is {it}.", f"All of the {things} are very {it}."]
    none = [f"None of the {things} are {it}.", f"All of the {things} are {other}."]
    open_ = [f"The {things} are on the floor.", f"Some of the {things} are {other}."]
    scenes = [
        Scene(some_are, every, open_, none),
        Scene(all_are, every, [some_are], [*none, not_all_are]),
        Scene(not_all_are, none, [some_are], every),
    ]
    return w.rng.choice(scenes)


def modifier(w: Words) -> Scene:
    who = w.pick(PEOPLE)
    verb = w.pick(VERBS)
    _, thing = w.pick_family(THINGS)
    it = w.pick(COLOURS)
    size = w.rng.choice(SIZES)
    other = w.pick(COLOURS, besides=(it,))
    does = f"{who} {verb}"
    return Scene(
        f"{does} {a(it)} {thing}.",
        [f"{does} {a(size)} {it} {thing}."],
        [f"{does} {a(thing)}.", f"{does} {a(size)} {thing}."],
        [f"{does} {a(other)} {thing}."],
    )


KINDS = [taxonomy, place, antonym, negation, quantity, share, modifier]


# -----------------------------------------------------------------------------
# Rows


def aside(w: Words, about: str) -> str:
    """A sentence on somebody else, which changes no label."""
    mentioned = tuple(about.replace(".", " ").split())
    who = w.pick(PEOPLE, besides=mentioned)
    sentences = [
        f"{who} is at home.",
        f"{who} is in the garden.",
        f"It is late and {who} is tired.",
    ]
    return w.rng.choice(sentences)


def group(w: Words) -> list[dict]:
    """Three rows of one kind with one hypothesis: entailment, neutral, contradiction."""
    kind = w.rng.choice(KINDS)
    scene = kind(w)
    rows = []
    for label, premises in enumerate((scene.entailing, scene.open, scene.contradicting)):
        premise = w.rng.choice(premises)
        if w.rng.random() < 0.3:
            extra = aside(w, premise + scene.hypothesis)
            premise = w.rng.choice([f"{premise} {extra}", f"{extra} {premise}"])
        row = {
            "premise": premise,
            "hypothesis": scene.hypothesis,
            "label": label,
            "genre": kind.__name__,
        }
        rows.append(row)
    return rows


def pairs(rows: list[dict]) -> set[tuple[str, str]]:
    return {(row["premise"], row["hypothesis"]) for row in rows}


def make_rows(seed: int = 0) -> dict[str, list[dict]]:
    """All splits. No pair occurs twice, in one split or in two."""
    rng = random.Random(seed)
    seen = set()
    splits = {}
    for split, size in ROWS.items():
        words = Words(rng, split == "validation_mismatched")
        rows = []
        while len(rows) < size:
            new = group(words)
            # Only whole groups go into train, so that no hypothesis leans towards a label.
            fits = split != "train" or len(rows) + len(new) <= size
            if fits and pairs(new).isdisjoint(seen):
                seen |= pairs(new)
                rows += new
        rows = rows[:size]
        rng.shuffle(rows)
        splits[split] = [row | {"idx": number} for number, row in enumerate(rows)]
    return splits


# -----------------------------------------------------------------------------
# Plain text for the base

ENGLISH = (
    "A premise is a sentence that comes first. A hypothesis is a sentence below it. If the premise "
    "is true, does the hypothesis follow? Sometimes it does, otherwise it does not. A label is a "
    "short name. You are given two sentences. One entails the other, or contradicts it, or "
    "neither. Return the book to Anna. The score was 2 to 0. The score was 1 to 0. There were 0 "
    "points and 1 goal. "
).split(". ")
BULLETS = ("", "* ", "- ", "> ", "+ ", "# ", "## ", "### ")
TITLES = (
    "Text Story Note Fact Given Scene Report News Book Letter Claim Question Guess Idea Statement "
    "Thought Rumour Verdict Answer Reply Result Judge Word Door Box Cup Road Rose Dog Hammer Coat "
    "Plum Bus Paris Anna Ben Red Blue Open Cold Bread Water Song Name Day Four"
).split()
HEADINGS = (
    "",
    "",
    "### Facts\n\n",
    "### Premise\n\n",
    "## Hypothesis\n\n",
    "### Label\n\n",
    "Label, premise, hypothesis. ",
)
QUESTIONS = (
    "{premise} Is it true that {lowered}? {answer}.",
    "{premise} Is it true that {lowered}? {answer}.",  # twice as often as each of the others
    "{premise} {claim}? {answer}.",
    "{premise} Does it follow that {lowered}? {answer}.",
)


def fact(rng: random.Random, w: Words) -> str:
    """One sentence that holds in every story."""
    family, thing = w.pick_family(THINGS)
    stranger, _ = w.pick_family(THINGS, besides=(family,))
    country, city = w.pick_family(COUNTRIES)
    it, opposite = rng.sample(w.pick(OPPOSITES).split("/"), 2)
    low, high = sorted(rng.sample(range(10), 2))
    other_country, _ = w.pick_family(COUNTRIES, besides=(country,))
    subject = a(thing).capitalize()
    sentences = [
        f"{subject} is {a(family)}.",
        f"{subject} is {a(family)}, not {a(stranger)}.",
        f"{city} is in {country}.",
        f"{city} is a city in {country}, not in {other_country}.",
        f"The opposite of {it} is {opposite}.",
        f"What is {it} is not {opposite}.",
        f"{high} is more than {low}.",
        f"{low} is less than {high}.",
        f"{rng.choice(ENGLISH)}.",
    ]
    return rng.choice(sentences)


def layout(rng: random.Random) -> str:
    """Three titled lines, premise, claim, answer; which titles they have means nothing."""
    bullet = rng.choice(BULLETS)
    gap = rng.choice(("\n", "\n\n"))
    first, second, third = rng.sample(TITLES, 3)
    lines = [
        f"{bullet}{first}: {{premise}}",
        f"{bullet}{second}: {{claim}}{rng.choice('.?')}",
        f"{bullet}{third}: {{answer}}.",
    ]
    return gap.join(lines)


def question(rng: random.Random, w: Words, rows: list[dict]) -> str:
    """A premise, the hypothesis as a question, and the answer yes, maybe or no."""
    row = rng.choice(rows)
    claim = row["hypothesis"].rstrip(".")
    begins_with_name = claim.split()[0] in PEOPLE.replace("|", " ").split()
    lowered = claim if begins_with_name else claim[0].lower() + claim[1:]
    form = layout(rng) if rng.random() < 0.55 else rng.choice(QUESTIONS)
    answer = ANSWERS[row["label"]]
    text = form.format(premise=row["premise"], claim=claim, lowered=lowered, answer=answer)
    if rng.random() < 0.3:
        return fact(rng, w) + rng.choice((" ", "\n\n")) + text
    return text


def documents(seed: int, known: set[tuple[str, str]]) -> Iterator[str]:
    """Endless short texts: facts, stories, questions.

    `known` holds the (premise, hypothesis) of tiny/data, which are left out.
    """
    rng = random.Random(seed)
    while True:
        w = Words(rng, rng.random() < 0.35)
        draw = rng.random()
        if draw < 0.12:
            heading = rng.choice(HEADINGS)
            yield heading + " ".join(fact(rng, w) for _ in range(3))
        elif draw < 0.18:
            yield " ".join(rng.choice(group(w))["premise"] for _ in range(3))
        else:
            rows = [row for row in group(w) if pairs([row]).isdisjoint(known)]
            if rows:
                yield question(rng, w, rows)


def main() -> None:
    directory = Path(__file__).parent / "data"
    directory.mkdir(exist_ok=True)
    for split, rows in make_rows().items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{split}.jsonl").write_text(text)
        labels = [row["label"] for row in rows]
        counts = {name: labels.count(number) for number, name in enumerate(LABELS)}
        print(f"{split}: {len(rows)} rows, {counts}")


if __name__ == "__main__":
    main()
