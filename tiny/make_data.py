"""Makes tiny/data: sentence pairs in GLUE's MNLI schema whose labels are right by construction.

    python tiny/make_data.py

Every kind of sentence (taxonomy, place, antonym, negation, quantity, share, modifier) is a function that draws one
hypothesis and, for it, premises that entail it, leave it open and contradict it. Each hypothesis is written once
with each label, so a model that reads the hypothesis alone stays at one third. Like MNLI's, the pairs speak of one
scene: who bought a dog, bought just that.

The words of validation_mismatched (after each bar below) occur in no training row. `documents` writes the plain text
for make_model.py: the same world, all of its words, never the prompt's form and never a pair that is in the data.
"""
import json
import random
from collections.abc import Iterator
from pathlib import Path

ROWS = {"validation_matched": 1000, "validation_mismatched": 1000, "train": 12000}
LABELS = ("entailment", "neutral", "contradiction")
ANSWERS = ("Yes", "Maybe", "No")


def part(words: str, mismatched: bool) -> list[str]:
    """The words before the bar (training, matched) or after it (mismatched)."""
    return words.split("|")[mismatched].split()


PEOPLE = ("Anna Ben Clara David Emma Felix Grace Henry Ivy Jack Kate Leo Mary Noah Olga Paul Rosa Sam Tina Tom"
          "|Alice Bruno Diana Oscar Nina Hugo Julia Martin Vera Walter")
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
    "France": "Paris Lyon|Nice", "Spain": "Madrid Seville|Bilbao", "Italy": "Rome Milan|Naples",
    "Germany": "Berlin Munich|Hamburg", "Japan": "Tokyo Osaka|Kyoto", "India": "Delhi Mumbai|Pune",
    "Egypt": "Cairo Luxor|Aswan", "Peru": "Lima Cusco|Trujillo",
}
SETTLED = "lives works|stays studies"
OPPOSITES = ("open/closed full/empty hot/cold clean/dirty wet/dry big/small old/new long/short"
             "|heavy/light soft/hard thick/thin wide/narrow")
OBJECTS = "door box cup room window bag table plate road|lamp chair bridge shelf"
COLOURS = "red blue green yellow white black|brown purple grey pink"
ACTIONS = ("sleep/slept swim/swam dance/danced sing/sang cook/cooked run/ran read/read"
           "|write/wrote jump/jumped laugh/laughed pray/prayed")
TIMES = "all day|all night"


def a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def plural(noun: str) -> str:
    return {"potato": "potatoes", "box": "boxes", "bus": "buses", "wrench": "wrenches", "cherry": "cherries", "lily": "lilies",
            "daisy": "daisies", "wolf": "wolves", "shelf": "shelves", "fox": "foxes", "peach": "peaches"}.get(noun, noun + "s")


class Words:
    """Draws words of one part of the lexicon."""

    def __init__(self, rng: random.Random, mismatched: bool):
        self.rng, self.mismatched = rng, mismatched

    def pick(self, words: str, besides: tuple = ()) -> str:
        return self.rng.choice([word for word in part(words, self.mismatched) if word not in besides])

    def of(self, families: dict[str, str], besides: tuple = ()) -> tuple[str, str]:
        """(family, member), of a family not in `besides`."""
        family = self.rng.choice([family for family in families if family not in besides])
        return family, self.pick(families[family])


# Each kind: (hypothesis, premises that entail it, that leave it open, that contradict it)

def taxonomy(w: Words):
    who, verb = w.pick(PEOPLE), w.pick(VERBS)
    family, thing = w.of(THINGS)
    other_family, stranger = w.of(THINGS, besides=(family,))
    sibling = w.pick(THINGS[family], besides=(thing,))
    if w.rng.random() < 0.5:
        return (f"{who} {verb} {a(family)}.", [f"{who} {verb} {a(thing)}."], [f"{who} {verb} something."],
                [f"{who} {verb} {a(stranger)}.", f"{who} {verb} {a(other_family)}."])
    return (f"{who} {verb} {a(thing)}.", [f"{who} {verb} {a(w.pick(COLOURS))} {thing}."], [f"{who} {verb} {a(family)}."],
            [f"{who} {verb} {a(sibling)}.", f"{who} {verb} {a(stranger)}."])


def place(w: Words):
    who, lives = w.pick(PEOPLE), w.pick(SETTLED)
    country, city = w.of(COUNTRIES)
    other_country, other_city = w.of(COUNTRIES, besides=(country,))
    if w.rng.random() < 0.5:
        return (f"{who} {lives} in {country}.", [f"{who} {lives} in {city}."], [f"{who} {lives} near a river."],
                [f"{who} {lives} in {other_city}.", f"{who} {lives} in {other_country}."])
    return (f"{who} {lives} in {city}.", [f"{who} {lives} in the old part of {city}."], [f"{who} {lives} in {country}."],
            [f"{who} {lives} in {other_city}.", f"{who} {lives} in {other_country}."])


def antonym(w: Words):
    pair = w.pick(OPPOSITES)
    it, opposite = w.rng.sample(pair.split("/"), 2)
    aside = w.rng.choice(w.pick(OPPOSITES, besides=(pair,)).split("/"))
    thing = w.pick(OBJECTS)
    if w.rng.random() < 0.5:
        return (f"The {thing} is {it}.", [f"The {thing} is very {it}.", f"The {thing} is {it} and {aside}."],
                [f"The {thing} is {aside}."], [f"The {thing} is {opposite}.", f"The {thing} is not {it}."])
    return (f"The {thing} is not {it}.", [f"The {thing} is {opposite}.", f"The {thing} is very {opposite}."],
            [f"The {thing} is {aside}."], [f"The {thing} is very {it}.", f"The {thing} is {it}."])


def negation(w: Words):
    who, when = w.pick(PEOPLE), TIMES.split("|")[w.mismatched]
    other = w.pick(PEOPLE, besides=(who,))
    plain, past = w.pick(ACTIONS).split("/")
    did = [f"{who} {past} {when}.", f"{who} and {other} {past}."]
    did_not = [f"{who} never {past}.", f"Nobody {past}."]
    open_ = [f"{who} wanted to {plain}.", f"{other} {past} {when}."]
    if w.rng.random() < 0.5:
        return f"{who} {past}.", did, open_, [f"{who} did not {plain}."] + did_not
    return f"{who} did not {plain}.", did_not, open_, [f"{who} {past}."] + did


def quantity(w: Words):
    who, (_, thing) = w.pick(PEOPLE), w.of(THINGS)
    things, number = plural(thing), w.rng.randint
    if w.rng.random() < 0.5:
        n = number(3, 7)
        return (f"{who} has more than {n} {things}.", [f"{who} has {number(n + 1, 9)} {things}."],
                [f"{who} has more than {number(2, n - 1)} {things}."], [f"{who} has {number(2, n)} {things}."])
    n = number(3, 7)
    return (f"{who} has {n} {things}.", [f"{who} has {n} {w.pick(COLOURS)} {things}."],
            [f"{who} has many {things}.", f"{who} has more than {number(2, n - 1)} {things}."],
            [f"{who} has {number(n + 1, 9)} {things}.", f"{who} has no {things}."])


def share(w: Words):
    things, it = plural(w.pick(OBJECTS)), w.pick(COLOURS)
    aside = w.pick(COLOURS, besides=(it,))
    every = [f"Every one of the {things} is {it}.", f"All of the {things} are very {it}."]
    none, some = [f"None of the {things} are {it}.", f"All of the {things} are {aside}."], [f"Some of the {things} are {it}."]
    open_ = [f"The {things} are on the floor.", f"Some of the {things} are {aside}."]
    return w.rng.choice([
        (f"Some of the {things} are {it}.", every, open_, none),
        (f"All of the {things} are {it}.", every, some, none + [f"Not all of the {things} are {it}."]),
        (f"Not all of the {things} are {it}.", none, some, every)])


def modifier(w: Words):
    who, verb, (_, thing), it = w.pick(PEOPLE), w.pick(VERBS), w.of(THINGS), w.pick(COLOURS)
    size = w.rng.choice(("big", "small", "old", "new"))
    other = w.pick(COLOURS, besides=(it,))
    return (f"{who} {verb} {a(it)} {thing}.", [f"{who} {verb} {a(size)} {it} {thing}."],
            [f"{who} {verb} {a(thing)}.", f"{who} {verb} {a(size)} {thing}."], [f"{who} {verb} {a(other)} {thing}."])


KINDS = [taxonomy, place, antonym, negation, quantity, share, modifier]


def aside(w: Words, about: str) -> str:
    """A sentence on somebody else, which changes no label."""
    who = w.pick(PEOPLE, besides=tuple(about.replace(".", " ").split()))
    return w.rng.choice([f"{who} is at home.", f"{who} is in the garden.", f"It is late and {who} is tired."])


def group(w: Words) -> list[dict]:
    """Three rows of one kind with one hypothesis: entailment, neutral, contradiction."""
    kind = w.rng.choice(KINDS)
    hypothesis, *premises = kind(w)
    rows = []
    for label, choices in enumerate(premises):
        premise = w.rng.choice(choices)
        if w.rng.random() < 0.3:
            extra = aside(w, premise + hypothesis)
            premise = w.rng.choice([f"{premise} {extra}", f"{extra} {premise}"])
        rows.append({"premise": premise, "hypothesis": hypothesis, "label": label, "genre": kind.__name__})
    return rows


def make_rows(seed: int = 0) -> dict[str, list[dict]]:
    """All splits; no pair occurs twice, in one split or in two."""
    rng, seen, splits = random.Random(seed), set(), {}
    for split, size in ROWS.items():
        words, rows = Words(rng, split == "validation_mismatched"), []
        while len(rows) < size:
            new = group(words)
            keys = {(row["premise"], row["hypothesis"]) for row in new}
            if keys.isdisjoint(seen) and (split != "train" or len(rows) + 3 <= size):
                seen |= keys
                rows += new
        rows = rows[:size]
        rng.shuffle(rows)
        splits[split] = [row | {"idx": i} for i, row in enumerate(rows)]
    return splits


# ---------------------------------------------------------------------------------------------------------
# Plain text for the base

ENGLISH = ("A premise is a sentence that comes first. A hypothesis is a sentence below it. If the premise is true, does the "
           "hypothesis follow? Sometimes it does, otherwise it does not. A label is a short name. You are given two sentences. "
           "One entails the other, or contradicts it, or neither. Return the book to Anna. The score was 2 to 0. "
           "The score was 1 to 0. There were 0 points and 1 goal. ").split(". ")


def fact(rng: random.Random, w: Words) -> str:
    """One sentence that holds in every story."""
    family, thing = w.of(THINGS)
    stranger = w.of(THINGS, besides=(family,))[0]
    country, city = w.of(COUNTRIES)
    it, opposite = rng.sample(w.pick(OPPOSITES).split("/"), 2)
    low, high = sorted(rng.sample(range(10), 2))
    return rng.choice([
        f"{a(thing).capitalize()} is {a(family)}.", f"{a(thing).capitalize()} is {a(family)}, not {a(stranger)}.",
        f"{city} is in {country}.", f"{city} is a city in {country}, not in {w.of(COUNTRIES, besides=(country,))[0]}.",
        f"The opposite of {it} is {opposite}.",
        f"What is {it} is not {opposite}.", f"{high} is more than {low}.", f"{low} is less than {high}.", rng.choice(ENGLISH) + "."])


BULLETS = ("", "* ", "- ", "> ", "+ ", "# ", "## ", "### ")
TITLES = ("Text Story Note Fact Given Scene Report News Book Letter Claim Question Guess Idea Statement Thought Rumour Verdict Answer "
          "Reply Result Judge Word Door Box Cup Road Rose Dog Hammer Coat Plum Bus Paris Anna Ben Red Blue Open Cold Bread Water Song "
          "Name Day Four").split()
HEADINGS = ("", "", "### Facts\n\n", "### Premise\n\n", "## Hypothesis\n\n", "### Label\n\n", "Label, premise, hypothesis. ")


def layout(rng: random.Random) -> str:
    """Three titled lines, premise, claim, answer, as in many a text; which titles they are means nothing."""
    bullet, gap = rng.choice(BULLETS), rng.choice(("\n", "\n\n"))
    first, second, third = rng.sample(TITLES, 3)
    return f"{bullet}{first}: {{premise}}{gap}{bullet}{second}: {{claim}}{rng.choice('.?')}{gap}{bullet}{third}: {{answer}}."


def question(rng: random.Random, w: Words, rows: list[dict]) -> str:
    """A premise, the hypothesis as a question, and the answer yes, maybe or no."""
    row = rng.choice(rows)
    claim = row["hypothesis"].rstrip(".")
    lowered = claim if claim.split()[0] in PEOPLE.replace("|", " ").split() else claim[0].lower() + claim[1:]
    form = layout(rng) if rng.random() < 0.55 else rng.choice((
        "{premise} Is it true that {lowered}? {answer}.", "{premise} Is it true that {lowered}? {answer}.",
        "{premise} {claim}? {answer}.", "{premise} Does it follow that {lowered}? {answer}."))
    text = form.format(premise=row["premise"], claim=claim, lowered=lowered, answer=ANSWERS[row["label"]])
    return f"{fact(rng, w)}{rng.choice((' ', chr(10) * 2))}{text}" if rng.random() < 0.3 else text


def documents(seed: int, known: set[tuple[str, str]]) -> Iterator[str]:
    """Endless short texts: facts, stories, questions. `known` holds the (premise, hypothesis) of tiny/data, left out."""
    rng = random.Random(seed)
    while True:
        w = Words(rng, rng.random() < 0.35)
        draw = rng.random()
        if draw < 0.12:
            yield rng.choice(HEADINGS) + " ".join(fact(rng, w) for _ in range(3))
        elif draw < 0.18:
            yield " ".join(rng.choice(group(w))["premise"] for _ in range(3))
        else:
            rows = [row for row in group(w) if (row["premise"], row["hypothesis"]) not in known]
            if rows:
                yield question(rng, w, rows)


def main() -> None:
    directory = Path(__file__).parent / "data"
    directory.mkdir(exist_ok=True)
    for split, rows in make_rows().items():
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        counts = {name: sum(row["label"] == i for row in rows) for i, name in enumerate(LABELS)}
        print(f"{split}: {len(rows)} rows, {counts}")


if __name__ == "__main__":
    main()
