"""The flags of train.py and eval.py: names, what they may hold, and what --help prints.

A default of None depends on the machine or on a file; support/cli.py fills it in, and the help
text says what it is. Any other default is added to the help text by cli.Parser. In a help text
%% is one percent sign, because argparse formats it.
"""

import math
import operator
import os
import re
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction
from collections.abc import Callable
from pathlib import Path

from support import hub

CONTEXT = 2048  # positions that phi-2 was trained on
WIDEST = 10_240  # of phi-2's layers: B A has no higher rank than its layer
MOST = 2**31 - 1  # of rows, steps, tokens
HUGE = 1_000_000  # of other numbers: none that can be trained with is larger

# -----------------------------------------------------------------------------
# What a flag may hold, as types for argparse

# They raise ArgumentTypeError: of a ValueError argparse does not print the message.

BOUNDS = {
    "least": ("of at least", operator.ge),
    "most": ("of at most", operator.le),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
}


def number(kind: type, **bounds: float) -> Callable[[str], float]:
    """Returns a type for argparse: an int or a float within bounds, such as above=0, below=1.

    `least` and `most` are allowed themselves, `above` and `below` are not.
    """
    noun = "whole number" if kind is int else "number"

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # which is within no bounds
        for name, bound in bounds.items():
            words, is_within = BOUNDS[name]
            if not is_within(value, bound):
                raise ArgumentTypeError(f"must be a {noun} {words} {bound:,}, not {text}")
        return value

    return read


count = number(int, least=1, most=MOST)  # rows, steps, tokens
count_from_0 = number(int, least=0, most=MOST)
rank = number(int, least=1, most=WIDEST)
new_tokens = number(int, least=1, most=CONTEXT)  # there is room for them in the cache
number_from_0 = number(float, least=0, most=HUGE)
number_above_0 = number(float, above=0, most=HUGE)
norm = number(float, above=0, below=math.inf)  # a huge one clips no gradient
share = number(float, above=0, below=1)
dropout_share = number(float, least=0, below=1)
any_seed = number(int, least=0)


def seed(text: str) -> int:
    """Returns any whole number from 0 on, made small enough for torch's generators."""
    return any_seed(text) % 2**63


def word(text: str) -> str:
    """Returns the text as it is. Only an empty one is refused, as "$UNSET" leaves it."""
    if not text:
        raise ArgumentTypeError("must not be empty")
    return text


def name(text: str) -> str:
    """Returns the name of a model or a dataset; ~ of a path is the home folder.

    A shell replaces ~ at the beginning of a word, but not behind = and not in an @FILE.
    """
    return os.path.expanduser(word(text))


def path(text: str) -> Path:
    """Returns a path, in which ~ is the home folder."""
    return Path(name(text))


def target(text: str) -> str:
    """Returns the name of a layer."""
    if "," in text:
        raise ArgumentTypeError(f"must be names with blanks between them, not {text}")
    return word(text)


def device(text: str) -> str:
    """Returns the name of a device in torch's form. Whether it is there shows later.

    cpu:0 is cpu, by which it is asked elsewhere what runs on a CPU.
    """
    if not re.fullmatch(r"[a-z]+(:\d+)?", text.lower()) or text.lower().startswith("gpu"):
        raise ArgumentTypeError(f"must be cpu, cuda, or one GPU such as cuda:0, not {text!r}")
    return re.sub(r"^cpu:\d+$", "cpu", text.lower())


# -----------------------------------------------------------------------------
# The flags, by groups of --help. In each group those come first that most users change

# fmt: off (a flag is one filled paragraph)


def add_dataset(group) -> None:
    """Adds the flags on the rows to a parser or to a group of one."""
    add = group.add_argument
    add("--dataset", type=name,
        help="Hub id, or directory of train.* and validation*.* files (default: nyu-mll/glue; "
        "without a GPU: tiny/data); eval.py also takes -, which is JSON lines of premise and "
        "hypothesis on standard input")
    add("--dataset-revision", type=word, metavar="REVISION",
        help="branch, tag or commit of a dataset on the Hub (default: main)")
    # For files that support/examples.py cannot read by the names in its tables.
    # python -m scripts.describe shows how it has read them.
    add("--columns", nargs=3, type=word, metavar=("PREMISE", "HYPOTHESIS", "LABEL"),
        help="what the dataset calls these columns")
    add("--labels", nargs=3, type=word, metavar="MEANING",
        help="what the labels 0, 1 and 2 of the dataset mean, such as contradiction entailment "
        "neutral; or what its words mean: yes=entailment maybe=neutral no=contradiction")
    add("--validation", type=share, metavar="SHARE",
        help="share of the training rows to validate on, where the dataset has no split for it")


def add_model(group) -> None:
    """Adds the name of the model to a parser or to a group of one."""
    add = group.add_argument
    add("--model", type=name,
        help="Hub id or directory (default: microsoft/phi-2; without a GPU: tiny/model)")
    add("--model-revision", type=word, metavar="REVISION",
        help="branch, tag or commit of a model on the Hub (default: main)")


def add_model_arguments(parser: ArgumentParser) -> None:
    """Adds the flags on model and data, for train.py, eval.py and several scripts."""
    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add_model(group)
    add_dataset(group)
    # Memory: for a GPU that is too small for phi-2, or larger than it needs.
    add("--quant", choices=["nf4", "none"], default="nf4",
        help="store the frozen weights in 4 bits, or as they are")
    add("--double-quant", action="store_true",
        help="quantise the absmax values of NF4 too: 0.37 bit less per weight")
    add("--keep-dequantized", action=BooleanOptionalAction,
        help="store NF4's weights in --dtype too: the same results, faster, more memory (phi-2: "
        "5 GB; default: on a GPU with four times that left); without it a GPU computes attention "
        "twice in training rather than store it")
    add("--no-graphs", dest="graphs", action="store_false",
        help="launch the kernels of generation one by one on a GPU, not as CUDA graphs")
    # What the arithmetic is done in: fp32 for comparisons to the last digit.
    add("--dtype", choices=["bf16", "fp16", "fp32"],
        help="type of weights and activations (default: an adapter's own; else bf16, on GPUs of "
        "compute capability 7 (T4, V100) fp16, on what has instructions for neither fp32)")
    # For texts longer than MNLI's, or to bound the memory that the longest row takes.
    add("--max-length", type=count, default=512,
        help="tokens of prompt and answer at most; a longer pair loses the end of its premise, "
        "then of its hypothesis")
    # For one GPU of several, or for a CPU beside a GPU that is in use.
    add("--device", type=device,
        help="cpu, cuda, or one GPU such as cuda:1 (default: cuda where there is one)")


def add_adapter_arguments(parser: ArgumentParser) -> None:
    """Adds how much the adapter can learn."""
    add = parser.add_argument_group("adapter").add_argument
    add("--rank", type=rank, default=8,
        help="rank of the update B A, which is scaled by alpha / rank: to keep the scale give "
        "--alpha too")
    add("--alpha", type=number_above_0, default=16.0, help="the update is scaled by alpha / rank")
    add("--dropout", type=dropout_share, default=0.05,
        help="share of the adapter's input that is dropped in training")
    # The default is what the LoRA paper adapts.
    add("--targets", nargs="+", type=target, default=["q_proj", "v_proj"],
        help='linear layers to adapt, or "all-linear"')


def add_training_arguments(parser: ArgumentParser) -> None:
    """Adds the optimiser's flags."""
    group = parser.add_argument_group("training")
    add = group.add_argument
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count, help="optimiser steps (default: 40000)")
    length.add_argument("--epochs", type=number_above_0,
        help="passes over the training rows, instead of --steps")
    # Rows of a step = batch size * accumulate * processes. When memory runs out, half the
    # first and twice the second make steps of the same rows.
    add("--batch-size", type=count, default=16, help="examples in memory at once")
    add("--accumulate", type=count, default=1, help="batches that make a step")
    # AdamW and its schedule, for those who tune. A small model wants more: tiny/ has 3e-3.
    add("--learning-rate", type=number_above_0, default=2e-4, help="peak, after the warm-up")
    add("--weight-decay", type=number_from_0, default=0.01, help="weight decay of AdamW")
    add("--warmup-steps", type=count_from_0,
        help="linear warm-up, then cosine to 0 (default: 3%% of the steps)")
    add("--max-grad-norm", type=norm, default=1.0, help="gradients are clipped to this norm")
    # For a trial on a part of the data, and for the spread between runs.
    add("--limit", type=count, help="train on the first so many rows only (default: all)")
    add("--seed", type=seed, default=0,
        help="random seed of the adapter's A, the dropout and the order of rows")


def add_forward_arguments(parser: ArgumentParser) -> None:
    """Adds what a step computes, and how. The defaults are the fastest."""
    add = parser.add_argument_group("forward and backward pass").add_argument
    # For comparisons with code that trains on the prompt's tokens too.
    add("--loss", choices=["answer", "full"], default="answer",
        help="mean loss over the answer's tokens, or over all of them")
    # Off for comparisons: slower, and dropout is drawn for each row alone.
    add("--share-prefix", action=BooleanOptionalAction, default=True,
        help="run what all prompts begin with once a batch, not once a row; dropout is then "
        "drawn once for it too (default: on)")
    add("--residual-dropout", type=dropout_share,
        help="dropout after attention and MLP (default: that of config.json, 0.1 for phi-2)")
    # For long rows or large batches that do not fit otherwise.
    add("--checkpointing", action="store_true",
        help="recompute each block in the backward pass: slower, less memory")


def add_output_arguments(parser: ArgumentParser) -> None:
    """Adds what is measured, saved and sent. None of it changes how the adapter is trained."""
    add = parser.add_argument_group("evaluation and output").add_argument
    # How much is evaluated, which can take longer than a short training.
    add("--eval-limit", type=count,
        help="evaluate on the first so many rows of each validation split (default: all)")
    add("--eval-every", type=count, help="also evaluate every so many steps")
    add("--log-every", type=count,
        help="report the loss every so many steps (default: each of the first 10, every tenth to "
        "100, then every 50)")
    add("--keep-best", action="store_true",
        help="with --eval-every: keep the adapter of the best accuracy in RUN/best/")
    add("--max-new-tokens", type=new_tokens, default=32,
        help="tokens written to each prompt in evaluation, at most")
    # Against crashes: at most --save-every steps are lost, and --resume takes the rest.
    add("--save-every", type=count, default=500,
        help="save what --resume needs every so many steps, and before each evaluation")
    add("--resume", type=path, metavar="RUN",
        help="resume this run, with its arguments; more --steps may be given")
    add("--out", type=path,
        help="folder of the run (default: out/ and a name of model, dataset, rank and time)")
    # To share a result, or to watch a run from elsewhere. Without them nothing is sent.
    add("--push", metavar="OWNER/NAME", type=hub.repository,
        help="upload adapter, card and results to the Hub at the end")
    add("--wandb", action="store_true",
        help="log to Weights & Biases; into a local folder when not logged in")


def add_eval_arguments(parser: ArgumentParser) -> None:
    """Adds what eval.py has besides the flags on model and data."""
    add = parser.add_argument
    # What is evaluated: without --adapter the base alone.
    add("--adapter", type=name,
        help="run of train.py, or any PEFT LoRA adapter: a directory or a Hub id; it names its "
        "model")
    add("--split", nargs="+", type=word,
        help="splits to evaluate (default: every validation split)")
    add("--limit", type=count,
        help="evaluate on the first so many rows of each split (default: all)")
    add("--mode", choices=["generate", "score"], default="generate",
        help="read the first number of the text that the model writes, or compare the "
        "probabilities of the three answers")
    add("--max-new-tokens", type=new_tokens, default=32,
        help="tokens written to each prompt in mode generate, at most")
    add("--batch-size", type=count, default=64,
        help="prompts in memory at once; half as many where so many do not fit")
    # For an adapter that was trained elsewhere on purpose: its fingerprint is not compared.
    add("--force", action="store_true",
        help="use an adapter of another prompt, tokenizer, base or quantisation too")
    add("--compare", type=path, metavar="RUN",
        help="McNemar's test against the predictions of another run, or of an --out")
    # To try an adapter by hand.
    add("--premise", help="first text of one pair, instead of a dataset")
    add("--hypothesis", help="second text of that pair")
    add("--out", type=path, help="write results.json and predictions_SPLIT.jsonl here")
