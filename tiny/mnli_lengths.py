"""Draws rows with the lengths of MNLI's from tiny/data, for the benchmark and the counter.

How much a batch costs depends on how much its rows differ in length, and in evaluation on what they
share. The pairs of tiny/data are short and alike, so premises of others are put before their own.

How much memory a run needs depends on its longest rows. Their lengths are here as they are, for
README.md's table.
"""

import itertools
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

# The ids of the 64 longest prompts among 37,854 rows of the training split, with phi-2's tokenizer.
LONGEST = (
    329, 328, 328, 327, 314, 312, 311, 311, 294, 283, 280, 278, 264, 257, 253, 251,
    251, 247, 247, 245, 245, 244, 243, 243, 243, 241, 238, 237, 236, 236, 232, 231,
    231, 230, 229, 229, 228, 228, 227, 225, 225, 224, 223, 219, 217, 217, 217, 217,
    216, 215, 215, 214, 214, 214, 213, 212, 212, 212, 211, 210, 208, 207, 206, 204,
)  # fmt: skip
# The 64 rows with the longest prompts of validation_matched, as an evaluation takes them: of each
# premise how many ids its prompts begin with alike, and how many they have.
LONGEST_PREMISES = (
    (261, 287, 275, 280), (266, 277, 285, 284), (222, 238, 238, 244), (191, 219, 220, 227),
    (191, 211, 206, 208), (182, 208, 209, 210), (187, 203, 201, 209), (182, 206, 193),
    (191, 202, 202, 204), (172, 195, 189, 187), (163, 185, 174, 178), (150, 180, 177, 166),
    (158, 179, 178, 180), (151, 170, 179, 168), (157, 176, 172, 175), (155, 168, 169, 175),
    (146, 168, 168, 172), (153, 172, 171, 172), (146, 170, 160, 164), (145, 165, 164, 170),
    (137, 168, 153, 151), (137, 166, 165),
)  # fmt: skip


def longest_rows(prefix: list[int], count: int) -> list[tuple[list[int], list[int]]]:
    """Returns ids of prompt and answer for the longest rows of a training, none of them alike."""
    new = itertools.count(1000)
    return [
        (prefix + list(itertools.islice(new, length - len(prefix))), [0, 1])
        for length in LONGEST[:count]
    ]


def longest_prompts(prefix: list[int]) -> list[list[int]]:
    """Returns ids of the first batch of an evaluation, alike as far as those of MNLI are."""
    new = itertools.count(1000)
    prompts = []
    for alike, *lengths in LONGEST_PREMISES:
        begin = prefix + list(itertools.islice(new, alike - len(prefix)))
        prompts += [begin + list(itertools.islice(new, length - alike)) for length in lengths]
    return prompts


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
