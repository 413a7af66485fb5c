"""MNLI as prompts: the wording, the token ids, the order of the rows, and batches.

Fourth in the reading order. A prompt ends in "### Label:". The answer is one token,
" 0", " 1" or " 2", followed by the end-of-text token, so that the model learns to stop.
Prompt and answer are tokenised separately and joined as lists of ids: at evaluation the
model is asked, id for id, what it saw in training. An example is a dict with a premise,
a hypothesis and a label of 0 to 2; support/examples.py reads them from files.

Another task has another PROMPT, with `after_prefix` and `cut` for its texts, other
answers (`load_tokenizer`, `fixed_ids`), and another reading of them (`parse`).
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

# The wording of the original FLoRA, the notebooks that this project follows, with its two
# double spaces: without them the tokens would differ.
PROMPT = (
    "You are given a premise and a hypothesis below. If the premise entails the  hypothesis, "
    "return 0. If the premise contradicts the hypothesis, return 2.  Otherwise, if the premise "
    "does neither, return 1.\n\n"
    "### Premise: {premise}\n\n### Hypothesis: {hypothesis}\n\n### Label:"
)
# "You are given ... ### Premise:", which all prompts share, and what follows a premise. The
# space between belongs to the premise: in this tokenizer a word's token begins with its space.
PREFIX, AFTER_PREMISE = PROMPT.split(" {premise}")
EOS = "<|endoftext|>"
# The form of a number in what a model writes: 1 or 1.5 or 1,000.
NUMBER = re.compile(r"\d{1,3}(?:,\d{3})*(?:\.\d+)?")


# -----------------------------------------------------------------------------
# Tokens


def load_tokenizer(directory: Path, vocab_size: int | None = None) -> Tokenizer:
    """Reads tokenizer.json of a model directory.

    Raises ValueError unless each answer is one token, and each id is below `vocab_size`,
    the rows of the embedding.
    """
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no tokenizer.json: copy that of the base model")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (the library raises nothing more specific)
        raise ValueError(f"{path} is no tokenizer that can be read: {error}") from None
    # What another program has stored in the file must not cut, fill or lengthen our
    # prompts, as transformers' add_eos_token does.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None
    if tokenizer.token_to_id(EOS) is None:
        raise ValueError(f"{path} has no token {EOS}")
    count = num_known_ids(tokenizer)
    if vocab_size and count > vocab_size:
        token = tokenizer.id_to_token(count - 1)
        place = f"{path}: {token!r} has the id {count - 1}"
        raise ValueError(f"{place}, the model has {vocab_size} ids")
    for label in range(3):
        if len(tokenizer.encode(f" {label}").ids) != 1:
            raise ValueError(
                f"{path} cuts the answer ' {label}' into several tokens; it must be one"
            )
    return tokenizer


@functools.cache
def num_known_ids(tokenizer: Tokenizer) -> int:
    """Returns one more than the largest id. The head has more outputs, which mean nothing."""
    return max(tokenizer.get_vocab().values()) + 1


@functools.cache
def fixed_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int], int]:
    """Returns the ids that all examples share: those of prefix, answers and end of text.

    The answers are " 0", " 1" and " 2", one id each (phi-2: 657, 352, 362).
    """
    prefix = tokenizer.encode(PREFIX).ids
    answers = [tokenizer.encode(f" {label}").ids[0] for label in range(3)]
    return prefix, answers, tokenizer.token_to_id(EOS)


def after_prefix(example: dict) -> str:
    """Returns the text of a prompt after the prefix."""
    return " " + example["premise"] + AFTER_PREMISE.format(hypothesis=example["hypothesis"])


def encode(
    example: dict, tokenizer: Tokenizer, max_length: int | None = None
) -> tuple[list[int], list[int]]:
    """Returns (prompt ids, answer ids) of an example with premise, hypothesis and label.

    The prompt is the whole of PROMPT with the two texts, the answer the label (0 to 2)
    and the end of text. Where both together have more than `max_length` ids, the
    premise loses its end. Where that is not enough, there is no premise, and the
    hypothesis loses its end.
    """
    ids = tokenizer.encode(after_prefix(example)).ids
    return prompt_and_answer(example, ids, tokenizer, max_length)


def encode_batch(
    examples, tokenizer: Tokenizer, max_length: int | None = None
) -> list[tuple[list[int], list[int]]]:
    """Returns what `encode` does, of many examples: the tokenizer uses all cores for them."""
    encodings = tokenizer.encode_batch_fast([after_prefix(example) for example in examples])
    return [
        prompt_and_answer(example, encoding.ids, tokenizer, max_length)
        for example, encoding in zip(examples, encodings)
    ]


def prompt_and_answer(
    example: dict, ids: list[int], tokenizer: Tokenizer, max_length: int | None
) -> tuple[list[int], list[int]]:
    """Returns (prompt ids, answer ids), where `ids` are those of after_prefix(example)."""
    prefix, answers, eos = fixed_ids(tokenizer)
    # Ids are joined, not texts: the tokenizer could merge the end of one with the
    # other's start.
    answer = [answers[example["label"]], eos]
    if max_length is not None and len(prefix) + len(ids) + len(answer) > max_length:
        ids = cut(example, tokenizer, max_length - len(prefix) - len(answer))
    return prefix + ids, answer


# -----------------------------------------------------------------------------
# Answers, as text


def parse(completion: str) -> int:
    """Returns the first number in a completion, without its fraction, or -1 for none.

    "1" and "1.5" are 1; "10" is 10, which is a wrong answer. As in the original, a number
    has up to three digits before a comma, so "2019" is read as 201.
    """
    found = NUMBER.search(completion)
    if found is None:
        return -1
    return int(found.group().split(".")[0].replace(",", ""))


def is_settled(completion: str) -> bool:
    """Returns True when nothing that could follow would change what `parse` reads.

    That is so once a character after the first number has ended it: "1 " and "1." are
    settled. "1", "1," and "1,00" are not, which may go on to "1,000"; nor is a number
    before U+FFFD, which stands for a character whose bytes are not complete.
    """
    found = NUMBER.search(completion)
    if found is None:
        return False
    rest = completion[found.end() :]
    return re.fullmatch(r"(,\d{0,2})?\ufffd*", rest) is None


# -----------------------------------------------------------------------------
# Batches


def rows_of_steps(examples, size: int, seed: int, start: int = 0) -> Iterator[list[dict]]:
    """Yields the examples of each optimiser step, a list of `size`, from step `start` on.

    It never ends. Within a step the shortest come first. Each epoch is a permutation
    that is drawn from (seed, epoch) alone. So step n depends on nothing that came
    before, and a run can resume at any n. An epoch takes each row once; its last step
    has what is left. Each example has its index among `examples` in `row`.
    """
    steps_in_epoch = -(-len(examples) // size)  # rounded up
    order_epoch = None  # the epoch that `order` belongs to
    for number in itertools.count(start):
        epoch, place = divmod(number, steps_in_epoch)
        if epoch != order_epoch:
            # Multiplied, so that the next seed has none of this seed's epochs.
            generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**64)
            order = torch.randperm(len(examples), generator=generator)
            order_epoch = epoch
        chosen = order[place * size : (place + 1) * size].tolist()
        rows = [examples[index] | {"row": index} for index in chosen]
        # By length, so that the batches of one step hold rows of similar length.
        rows.sort(key=lambda example: len(example["premise"]) + len(example["hypothesis"]))
        yield rows


def by_premise(examples, prompts: list[list[int]]) -> list[list[int]]:
    """Returns the numbers of an evaluation's rows, in groups that have the same premise.

    What the prompts of a batch begin with alike goes through the model once, and MNLI has
    three hypotheses to each premise.

    The groups with long prompts come first. So the rows of a batch are of similar length,
    and a batch that is too large for the memory shows at once, and not after an hour.
    """
    groups = {}  # the numbers of the rows, by their premise
    for number, premise in enumerate(examples["premise"]):
        groups.setdefault(premise, []).append(number)

    def longest(group: list[int]) -> int:
        return max(len(prompts[number]) for number in group)

    return sorted(groups.values(), key=longest, reverse=True)


@dataclass
class Batch:
    """Some examples as the model takes them, one behind another, without padding.

    With a loss on the answer alone, a prefix of two ids and two rows:

        ids       P0 P1 | ... Label:     1 | ... ... Label:     0
        next_ids                  1   <end>             0   <end>

    ids: (N,) the shared prefix, then row after row.
    lengths: tokens of each row, without the prefix.
    prefix_length: tokens of the prefix; 0 where each row holds its own.
    last: how many tokens at the end of each row have an id to predict. The head runs on
        these alone. With a loss on the answer they are two. None: all tokens have one.
    next_ids: (rows * last,) the ids that these tokens are to predict, row after row.
    """

    ids: Tensor
    lengths: list[int]
    prefix_length: int
    last: int | None
    next_ids: Tensor


def collate(
    encoded: list[tuple[list[int], list[int]]], prefix_length: int, loss: str
) -> Batch:
    """Returns the batch of several examples, each (prompt ids, answer ids), for a loss.

    Loss "answer" is on two ids a row, the label and the end of text. Loss "full" is on
    every id after a row's first. That includes the prefix's, once for each row, so it
    raises ValueError where the rows would share one.
    """
    if prefix_length and loss == "full":
        raise ValueError("the full loss is on the prefix too, so rows cannot share it")
    whole = [prompt + answer for prompt, answer in encoded]
    # The end of text is predicted, but nothing is predicted from it.
    rows = [sequence[prefix_length:-1] for sequence in whole]
    # All prompts begin with the same ids, which are taken once, from the first of them.
    ids = whole[0][:prefix_length] + flat(rows)
    if loss == "answer":
        next_ids = [answer for _, answer in encoded]
        last = 2  # the prompt's last token predicts the label, and the label the end of text
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
    """Returns `room` ids for what stands after the prefix, where the texts have too many.

    They lose their ends, the premise first. The titles stay: the last asks for the
    answer.
    """
    premise = tokenizer.encode(" " + example["premise"]).ids
    after = tokenizer.encode(AFTER_PREMISE.format(hypothesis=example["hypothesis"])).ids
    if len(after) <= room:
        return premise[: room - len(after)] + after
    title, end = title_ids(tokenizer)
    hypothesis = tokenizer.encode(" " + example["hypothesis"]).ids
    return title + hypothesis[: room - len(title) - len(end)] + end


@functools.cache
def title_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the ids of what stands before a hypothesis, and of what stands after it."""
    before, after = AFTER_PREMISE.split(" {hypothesis}")
    return tokenizer.encode(before).ids, tokenizer.encode(after).ids


def check_max_length(tokenizer: Tokenizer, max_length: int | None) -> None:
    """Raises ValueError where --max-length leaves no room for a token of the texts."""
    prefix, _, _ = fixed_ids(tokenizer)
    title, end = title_ids(tokenizer)
    answer = 2  # the label and the end of text
    least = len(prefix) + len(title) + len(end) + answer + 1
    if max_length is not None and max_length < least:
        raise ValueError(
            f"--max-length {max_length} leaves no room for premise and hypothesis: the rest of "
            f"the prompt and the answer are {least - 1} tokens of this tokenizer"
        )


def count_cut(
    examples, encoded: list, tokenizer: Tokenizer, max_length: int | None
) -> int:
    """Returns how many of these examples have lost a part of their texts in `encoded`."""
    count = 0
    for example, (prompt, answer) in zip(examples, encoded):
        # A row that was cut has just max_length tokens: few rows are tokenised once more.
        if len(prompt) + len(answer) == max_length:
            whole, _ = encode(example, tokenizer)
            if len(whole) > len(prompt):
                count += 1
    return count
