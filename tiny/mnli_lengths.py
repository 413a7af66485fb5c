"""Draws rows with the lengths of MNLI's from tiny/data, for the benchmark and the counter.

How much a batch costs depends on how much its rows differ in length, and in evaluation on what they
share. The pairs of tiny/data are short and alike, so premises of others are put before their own.
"""

import math
import random
from statistics import median

from tokenizers import Tokenizer

import data
from support import commands, examples

SOURCE = str(commands.ROOT / "tiny" / "data")
# The lengths of MNLI's rows: tokens after the shared prefix, which are distributed log-normally.
MEDIAN_TOKENS = 46
SPREAD = 0.36  # the standard deviation of their logarithm: 95 % have up to 83


def training_rows(tokenizer: Tokenizer, count: int) -> list[dict]:
    """Returns rows in the order of a training: shuffled, so the rows of a step share no premise."""
    return draw_rows(examples.load_examples(SOURCE, "train"), tokenizer, count, seed=0)


def validation_rows(tokenizer: Tokenizer, count: int) -> list[dict]:
    """Returns rows that share premises as MNLI's do.

    MNLI has three hypotheses to a premise. Those of tiny/data are shorter, and two to a premise
    share as many tokens.
    """
    pairs = examples.load_examples(SOURCE, "validation_matched")
    return draw_rows(pairs, tokenizer, count, seed=1, of_a_premise=2)


def draw_rows(
    pairs, tokenizer: Tokenizer, count: int, seed: int, of_a_premise: int = 1
) -> list[dict]:
    """Returns `count` rows with the lengths of MNLI's, made of short pairs.

    A row is one of `pairs` and its label. Premises of others are put before its own until it has as
    many tokens as were drawn for it. `of_a_premise` rows behind one another have the same premise,
    which ends with the premises of them all.
    """
    rng = random.Random(seed)
    prefix, _, _ = data.fixed_ids(tokenizer)
    premises = pairs["premise"][:]
    added = median(len(tokenizer.encode(" " + premise).ids) for premise in premises[:100])
    rows = []
    while len(rows) < count:
        group = [dict(pairs[rng.randrange(len(pairs))]) for _ in range(of_a_premise)]
        premise = " ".join(row["premise"] for row in group)
        wanted = rng.lognormvariate(math.log(MEDIAN_TOKENS), SPREAD)

        def length_with(premise: str, row: dict = group[0]) -> int:
            return len(data.encode(row | {"premise": premise}, tokenizer)[0]) - len(prefix)

        # Nearer to what is wanted with one premise more: then it is added.
        while length_with(premise) + added / 2 < wanted:
            premise = f"{rng.choice(premises)} {premise}"
        rows += [row | {"premise": premise} for row in group]
    return rows[:count]
