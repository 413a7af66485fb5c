"""MNLI as prompts: the wording, the token ids, the order of the rows, and batches.

Fourth in the reading order. MNLI asks whether a premise entails a hypothesis (label 0), is
neutral to it (1) or contradicts it (2). An example, or pair, is a dict with a premise, a
hypothesis and a label; support/examples.py reads examples from files. In a batch each
example is a row of ids.

A prompt ends in "### Label:". The answer is two tokens: the label (" 0", " 1" or " 2") and
end of text, so that the model learns to stop. Prompt and answer are tokenised separately
and joined as lists of ids, so that the prompts of an evaluation have exactly the ids seen
in training.

For another task, begin with PROMPT, the functions that use its texts (`after_prefix`, `cut`,
`heading_ids`), the labels (`load_tokenizer`, `fixed_ids`), and how completions are read
(`parse`, `is_settled`). `collate` expects answers of two tokens.
"""

import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

# The prompt of the notebooks that this project follows, including their two double
# spaces: without them the token ids would differ.
PROMPT = (
    "You are given a premise and a hypothesis below. If the premise entails the  hypothesis, "
    "return 0. If the premise contradicts the hypothesis, return 2.  Otherwise, if the premise "
    "does neither, return 1.\n\n"
    "### Premise: {premise}\n\n### Hypothesis: {hypothesis}\n\n### Label:"
)
# What all prompts begin with, "You are given ... ### Premise:", and what follows the
# premise. The space between belongs to the premise: in this tokenizer a token includes
# the space before.
PREFIX, AFTER_PREMISE = PROMPT.split(" {premise}")
EOS = "<|endoftext|>"
# A number in a completion: 1 or 1.5 or 1,000.
NUMBER = re.compile(r"\d{1,3}(?:,\d{3})*(?:\.\d+)?")


# -----------------------------------------------------------------------------
# Tokens


def load_tokenizer(directory: Path, vocab_size: int | None = None) -> Tokenizer:
    """Returns the tokenizer in tokenizer.json of a model directory.

    Raises ValueError unless each label is one token and every id is below `vocab_size`,
    the number of rows of the embedding.
    """
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no tokenizer.json: copy the base model's")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (the library raises nothing more specific)
        raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from None
    # Settings in the file must not truncate, pad or extend our prompts. transformers'
    # add_eos_token, for example, is stored there.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None
    if tokenizer.token_to_id(EOS) is None:
        raise ValueError(f"{path} has no token {EOS}")
    count = num_known_ids(tokenizer)
    if vocab_size and count > vocab_size:
        token = tokenizer.id_to_token(count - 1)
        place = f"{path}: {token!r} has the id {count - 1}"
        raise ValueError(f"{place}, but the model has only {vocab_size} ids")
    for label in range(3):
        if len(tokenizer.encode(f" {label}").ids) != 1:
            raise ValueError(
                f"{path} cuts the label ' {label}' into several tokens; it must be one"
            )
    return tokenizer


@functools.cache
def num_known_ids(tokenizer: Tokenizer) -> int:
    """Returns the largest id plus one. The output head may have more outputs, all unused."""
    return max(tokenizer.get_vocab().values()) + 1


@functools.cache
def fixed_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int], int]:
    """Returns the ids that are the same for all examples: prefix, the labels, end of text.

    The labels " 0", " 1" and " 2" are one id each (in phi-2: 657, 352, 362).
    """
    prefix = tokenizer.encode(PREFIX).ids
    label_ids = [tokenizer.encode(f" {label}").ids[0] for label in range(3)]
    return prefix, label_ids, tokenizer.token_to_id(EOS)


def after_prefix(example: dict) -> str:
    """Returns the part of an example's prompt that follows the prefix, as text."""
    return " " + example["premise"] + AFTER_PREMISE.format(hypothesis=example["hypothesis"])


def encode_batch(
    examples, tokenizer: Tokenizer, max_length: int | None = None
) -> list[tuple[list[int], list[int]]]:
    """Returns (prompt ids, answer ids) of each example.

    The prompt is all of PROMPT with the two texts filled in. The answer is the label's id
    and the end of text. If both together have more than `max_length` ids, the end of the
    premise is cut off. If that is not enough, the premise is left out and the end of the
    hypothesis is cut off.
    """
    prefix, label_ids, eos = fixed_ids(tokenizer)
    # The tokenizer runs on all CPU cores.
    encodings = tokenizer.encode_batch_fast([after_prefix(example) for example in examples])
    encoded = []
    for example, encoding in zip(examples, encodings):
        ids = encoding.ids
        answer = [label_ids[example["label"]], eos]
        if max_length is not None and len(prefix) + len(ids) + len(answer) > max_length:
            ids = cut(example, tokenizer, max_length - len(prefix) - len(answer))
        # Ids are joined, not texts: in a joined text the tokenizer could merge the end
        # of the prompt with the answer. (The prefix can be cut off a prompt: a test
        # shows that its ids and those of the rest are the ids of the whole.)
        encoded.append((prefix + ids, answer))
    return encoded


def encode(
    example: dict, tokenizer: Tokenizer, max_length: int | None = None
) -> tuple[list[int], list[int]]:
    """Returns (prompt ids, answer ids) of a single example."""
    (encoded,) = encode_batch([example], tokenizer, max_length)
    return encoded


# -----------------------------------------------------------------------------
# Reading completions


def parse(completion: str) -> int:
    """Returns the first number in a completion without its fraction, or -1 if there is none.

    "1" and "1.5" are read as 1. "10" is read as 10, which is a wrong answer. As in those
    notebooks, the first group has at most three digits, so "2019" is read as 201.
    """
    found = NUMBER.search(completion)
    if found is None:
        return -1
    return int(found.group().split(".")[0].replace(",", ""))


def is_settled(completion: str) -> bool:
    """Returns True only if `parse` reads the same number however the completion continues.

    A further character settles the first number: "1 " and "1." are settled. "1", "1," and
    "1,00" are not, because they may become "1,000". Nor is a number before U+FFFD, which
    stands for a character whose bytes are still incomplete. ("1.5" counts as not settled.)
    """
    found = NUMBER.search(completion)
    if found is None:
        return False
    rest = completion[found.end() :]
    can_grow = re.fullmatch(r"(,\d{0,2})?\ufffd*", rest)
    return not can_grow


# -----------------------------------------------------------------------------
# Batches


def rows_of_steps(examples, size: int, seed: int, start: int = 0) -> Iterator[list[dict]]:
    """Yields a list of `size` examples for each optimiser step, from step `start` on, forever.

    `examples` is a sequence of dicts. Each epoch uses every example once, in an order drawn
    from (seed, epoch) alone. So step n does not depend on earlier steps, and a run can
    resume at any step. The last step of an epoch has the examples that are left. Each
    example gets a key "row", its index in `examples`.

    Within a step the shortest examples come first, so that each of its batches (or the parts
    of one, within the attention of PackedRows) has rows of similar length, and little padding.
    """
    steps_in_epoch = -(-len(examples) // size)  # rounded up
    order_epoch = None  # the epoch that `order` belongs to
    for number in itertools.count(start):
        epoch, place = divmod(number, steps_in_epoch)
        if epoch != order_epoch:
            # Multiplied, so that the next seed does not repeat this seed's epochs.
            generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**64)
            order = torch.randperm(len(examples), generator=generator)
            order_epoch = epoch
        chosen = order[place * size : (place + 1) * size].tolist()
        rows = [examples[index] | {"row": index} for index in chosen]
        rows.sort(key=lambda example: len(example["premise"]) + len(example["hypothesis"]))
        yield rows


def by_premise(examples, prompts: list[list[int]]) -> list[list[int]]:
    """Returns the indices of an evaluation's examples, in groups with the same premise.

    A beginning that several prompts of a batch share goes through the model only once,
    and MNLI has three hypotheses for each premise. `prompts` are the examples' prompt ids;
    examples["premise"] is the column of all premises.

    Groups with long prompts come first. So prompts in a batch have similar lengths, and a
    batch that is too large for the memory shows at once instead of after an hour.
    """
    groups = {}  # indices, by premise
    for index, premise in enumerate(examples["premise"]):
        groups.setdefault(premise, []).append(index)

    def longest(group: list[int]) -> int:
        return max(len(prompts[index]) for index in group)

    return sorted(groups.values(), key=longest, reverse=True)


@dataclass
class Batch:
    """Some examples in the form that the model takes: one row after another, without padding.

    A row is an example's prompt, without the shared prefix, and its label. Its end of text
    is predicted, but is not an input.

    For a loss on the answer only, a prefix of two ids, and two rows:

        ids       P0 P1 | ... Label:     1 | ... ... Label:     0
        next_ids                  1   <end>             0   <end>

    ids: (N,) the shared prefix, then row after row.
    lengths: the number of tokens in each row, without the prefix.
    prefix_length: the number of tokens in the prefix; 0 if each row contains its own.
    last: how many tokens at the end of each row predict an id: two for a loss on the answer,
        None if all tokens do. The output head runs on these tokens only.
    next_ids: the ids that these tokens should predict, row after row: (rows * last,) or (N,).
    """

    ids: Tensor
    lengths: list[int]
    prefix_length: int
    last: int | None
    next_ids: Tensor


def collate(
    encoded: list[tuple[list[int], list[int]]], prefix_length: int, loss: str
) -> Batch:
    """Returns a batch of examples, each given as (prompt ids, answer ids), for a loss.

    Loss "answer" is on two ids per row: the label and the end of text. Loss "full" is on
    every id of the example but the first. These include the prefix, once for each row, so
    a shared prefix raises ValueError.
    """
    if prefix_length and loss == "full":
        raise ValueError("the full loss is on the prefix too, so rows cannot share it")
    whole = [prompt + answer for prompt, answer in encoded]
    rows = [sequence[prefix_length:-1] for sequence in whole]
    # All prompts begin with the same prefix. It is taken once, from the first prompt.
    ids = whole[0][:prefix_length] + flat(rows)
    if loss == "answer":
        next_ids = [answer for _, answer in encoded]
        last = 2  # the prompt's last token predicts the label, the label the end of text
    else:
        next_ids = [sequence[1:] for sequence in whole]  # each token predicts the next one
        last = None
    return Batch(
        ids=torch.tensor(ids),
        lengths=[len(row) for row in rows],
        prefix_length=prefix_length,
        last=last,
        next_ids=torch.tensor(flat(next_ids)),
    )


def flat(lists: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


# -----------------------------------------------------------------------------
# Pairs that are too long for --max-length


def cut(example: dict, tokenizer: Tokenizer, room: int) -> list[int]:
    """Returns the ids of a prompt after its prefix, shortened to `room` ids.

    The end of the premise is cut off first, then that of the hypothesis. The headings
    stay, because the last one, "### Label:", asks for the answer.
    """
    premise = tokenizer.encode(" " + example["premise"]).ids
    after = tokenizer.encode(AFTER_PREMISE.format(hypothesis=example["hypothesis"])).ids
    if len(after) <= room:
        return premise[: room - len(after)] + after
    heading, end = heading_ids(tokenizer)
    hypothesis = tokenizer.encode(" " + example["hypothesis"]).ids
    return heading + hypothesis[: room - len(heading) - len(end)] + end


@functools.cache
def heading_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the ids of what precedes a hypothesis, and of what follows it."""
    before, after = AFTER_PREMISE.split(" {hypothesis}")
    return tokenizer.encode(before).ids, tokenizer.encode(after).ids


def check_max_length(tokenizer: Tokenizer, max_length: int | None) -> None:
    """Raises ValueError if --max-length leaves no room for any token of the two texts."""
    prefix, _, _ = fixed_ids(tokenizer)
    heading, end = heading_ids(tokenizer)
    answer = 2  # the label and the end of text
    least = len(prefix) + len(heading) + len(end) + answer + 1
    if max_length is not None and max_length < least:
        raise ValueError(
            f"--max-length {max_length} leaves no room for premise and hypothesis: the rest of "
            f"the prompt and the answer are {least - 1} tokens of this tokenizer"
        )


def count_cut(
    examples, encoded: list, tokenizer: Tokenizer, max_length: int | None
) -> int:
    """Returns how many of these examples were shortened to fit `max_length` in `encoded`."""
    count = 0
    for example, (prompt, answer) in zip(examples, encoded):
        # A row that was cut has exactly max_length tokens, so few rows are
        # tokenised again.
        if len(prompt) + len(answer) == max_length:
            whole, _ = encode(example, tokenizer)
            if len(whole) > len(prompt):
                count += 1
    return count
