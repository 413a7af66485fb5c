"""The flags of train.py and eval.py: names, allowed values, and help texts.

A default of None depends on the machine or on a file: support/cli.py fills it in, and the help
text describes it. cli.Parser adds any other default to the help text. In a help text %% stands
for one percent sign, because argparse formats the text.
"""

import math
import operator
import os
import re
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction
from collections.abc import Callable
from pathlib import Path

from support import hub

CONTEXT = 2048  # the number of positions that phi-2 was trained on
WIDEST = 10_240  # the widest layer of phi-2: B A has at most the rank of its layer
MOST = 2**31 - 1  # of rows, steps, tokens
HUGE = 1_000_000  # the limit for other numbers: training works with none that is larger

# -----------------------------------------------------------------------------
# The allowed values of flags, as types for argparse

# They raise ArgumentTypeError, because argparse does not print the message of a ValueError.

BOUNDS = {
    "least": ("of at least", operator.ge),
    "most": ("of at most", operator.le),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
}


def number(kind: type, **bounds: float) -> Callable[[str], float]:
    """Returns a type for argparse: an int or a float within bounds, such as above=0, below=1.

    The bounds `least` and `most` are inclusive, `above` and `below` exclusive.
    """
    noun = "whole number" if kind is int else "number"

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # is not within any bounds
        for name, bound in bounds.items():
            words, is_within = BOUNDS[name]
            if not is_within(value, bound):
                raise ArgumentTypeError(f"must be a {noun} {words} {bound:,}, not {text}")
        return value

    return read


count = number(int, least=1, most=MOST)  # rows, steps, tokens
count_from_0 = number(int, least=0, most=MOST)
rank = number(int, least=1, most=WIDEST)
new_tokens = number(int, least=1, most=CONTEXT)  # the cache has room for all of them
number_from_0 = number(float, least=0, most=HUGE)
number_above_0 = number(float, above=0, most=HUGE)
norm = number(float, above=0, below=math.inf)  # a huge norm turns clipping off
share = number(float, above=0, below=1)
dropout_share = number(float, least=0, below=1)
any_seed = number(int, least=0)


def seed(text: str) -> int:
    """Returns a seed from 0 up, reduced to the range of torch's generators."""
    return any_seed(text) % 2**63


def word(text: str) -> str:
    """Returns the text unchanged. Only an empty one, as from "$UNSET", is rejected."""
    if not text:
        raise ArgumentTypeError("must not be empty")
    return text


def name(text: str) -> str:
    """Returns the name of a model or a dataset, with ~ expanded to the home folder.

    A shell expands ~ at the beginning of a word, but not after = and not in an @FILE.
    """
    return os.path.expanduser(word(text))


def path(text: str) -> Path:
    """Returns a path, with ~ expanded to the home folder."""
    return Path(name(text))


def target(text: str) -> str:
    """Returns the name of a layer."""
    if "," in text:
        raise ArgumentTypeError(f"must be names separated by spaces, not {text}")
    return word(text)


def device(text: str) -> str:
    """Returns the name of a device. Whether the device exists is checked later."""
    if not re.fullmatch(r"cpu|(cuda|mps)(:\d+)?", text):
        raise ArgumentTypeError(f"must be cpu, cuda, or one GPU such as cuda:0, not {text!r}")
    return text


# -----------------------------------------------------------------------------
# The flags, in the groups that --help shows. Each group begins with what most users change

# fmt: off (a flag is one filled paragraph)


def add_dataset(group) -> None:
    """Adds the flags about the rows to a parser or to a group of a parser."""
    add = group.add_argument
    add("--dataset", type=name,
        help="Hub id, or directory of train.* and validation*.* files (default: nyu-mll/glue; "
        "without a GPU: tiny/data); with - eval.py reads JSON lines of premise and hypothesis "
        "from standard input")
    add("--dataset-revision", type=word, metavar="REVISION",
        help="branch, tag or commit of a dataset on the Hub (default: main)")
    # For files whose names are not in the tables that support/examples.py uses.
    # python -m scripts.describe shows how a dataset is read.
    add("--columns", nargs=3, type=word, metavar=("PREMISE", "HYPOTHESIS", "LABEL"),
        help="what the dataset calls these columns")
    add("--labels", nargs=3, type=word, metavar="MEANING",
        help="what the labels 0, 1 and 2 of the dataset mean, such as contradiction entailment "
        "neutral; or what its words mean: yes=entailment maybe=neutral no=contradiction")
    add("--validation", type=share, metavar="SHARE",
        help="share of the training rows to validate on, if the dataset has no validation split")


def add_model(group) -> None:
    """Adds the flags that name the model to a parser or to a group of a parser."""
    add = group.add_argument
    add("--model", type=name,
        help="Hub id or directory (default: microsoft/phi-2; without a GPU: tiny/model)")
    add("--model-revision", type=word, metavar="REVISION",
        help="branch, tag or commit of a model on the Hub (default: main)")


def add_model_arguments(parser: ArgumentParser) -> None:
    """Adds the flags about model and data, for train.py, eval.py and several scripts."""
    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add_model(group)
    add_dataset(group)
    # Memory: for a GPU that is too small for phi-2, or larger than phi-2 needs.
    add("--quant", choices=["nf4", "none"], default="nf4",
        help="store the frozen weights in 4 bits, or with none in --dtype")
    add("--double-quant", action="store_true",
        help="quantise NF4's absmax values too, which saves 0.37 bit per weight")
    add("--keep-dequantized", action=BooleanOptionalAction,
        help="also store NF4's weights in --dtype: same results, faster, more memory (phi-2: "
        "5 GB; default: on a GPU with four times that free); without it, training on a GPU "
        "computes attention twice instead of storing it")
    add("--no-graphs", dest="graphs", action="store_false",
        help="do not use CUDA graphs for generation: launch its kernels one by one")
    # The precision of the arithmetic: fp32 for comparisons to the last digit.
    add("--dtype", choices=["bf16", "fp16", "fp32"],
        help="type of weights and activations (default: the adapter's; else bf16; fp16 on GPUs of "
        "compute capability 7 (T4, V100); fp32 on hardware without instructions for either)")
    # For texts longer than MNLI's, or to limit the memory that the longest row takes.
    add("--max-length", type=count, default=512,
        help="most tokens of prompt and answer together; a longer pair loses the end of its "
        "premise, then the end of its hypothesis")
    # For one of several GPUs, or for the CPU if the GPU is in use.
    add("--device", type=device,
        help="cpu, cuda, or one GPU such as cuda:1 (default: cuda if there is one)")


def add_adapter_arguments(parser: ArgumentParser) -> None:
    """Adds the flags that define the adapter."""
    add = parser.add_argument_group("adapter").add_argument
    add("--rank", type=rank, default=8,
        help="rank of the update B A, which is scaled by alpha / rank: to keep the scale, change "
        "--alpha too")
    add("--alpha", type=number_above_0, default=16.0, help="the update is scaled by alpha / rank")
    add("--dropout", type=dropout_share, default=0.05,
        help="share of the adapter's input that is dropped in training")
    # The default layers are those that the LoRA paper adapts.
    add("--targets", nargs="+", type=target, default=["q_proj", "v_proj"],
        help='linear layers to adapt, or "all-linear"')


def add_training_arguments(parser: ArgumentParser) -> None:
    """Adds the flags about the optimiser and the rows of a step."""
    group = parser.add_argument_group("training")
    add = group.add_argument
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count, help="optimiser steps (default: 40000)")
    length.add_argument("--epochs", type=number_above_0,
        help="passes over the training rows, instead of --steps")
    # Rows in a step = batch size * accumulate * processes. If memory runs out, halve the first
    # and double the second: the steps have the same rows.
    add("--batch-size", type=count, default=16, help="examples in memory at once")
    add("--accumulate", type=count, default=1, help="batches per step")
    # AdamW and its schedule, for tuning. A small model needs a higher rate: tiny/ uses 3e-3.
    add("--learning-rate", type=number_above_0, default=2e-4,
        help="peak learning rate, after the warm-up")
    add("--weight-decay", type=number_from_0, default=0.01, help="weight decay of AdamW")
    add("--warmup-steps", type=count_from_0,
        help="linear warm-up, then cosine to 0 (default: 3%% of the steps)")
    add("--max-grad-norm", type=norm, default=1.0, help="gradients are clipped to this norm")
    # For a trial on part of the data, and to measure the spread between seeds.
    add("--limit", type=count, help="train only on the first LIMIT rows (default: all)")
    add("--seed", type=seed, default=0,
        help="random seed of the adapter's A, of dropout, and of the order of rows")


def add_forward_arguments(parser: ArgumentParser) -> None:
    """Adds the flags about what a step computes, and how. The defaults are the fastest."""
    add = parser.add_argument_group("forward and backward pass").add_argument
    # For comparisons with code that also trains on the prompt's tokens.
    add("--loss", choices=["answer", "full"], default="answer",
        help="mean loss over the answer's tokens, or over all tokens")
    # Off for comparisons: slower, and dropout is drawn separately for each row.
    add("--share-prefix", action=BooleanOptionalAction, default=True,
        help="run the shared beginning of all prompts once per batch, not once per row; its "
        "dropout is then drawn only once too (default: on)")
    add("--residual-dropout", type=dropout_share,
        help="dropout after attention and MLP (default: as in config.json, 0.1 for phi-2)")
    # For long rows or large batches that would not fit otherwise.
    add("--checkpointing", action="store_true",
        help="recompute each transformer block in the backward pass: slower, less memory")


def add_output_arguments(parser: ArgumentParser) -> None:
    """Adds what is measured, saved and sent. None of it changes how the adapter is trained."""
    add = parser.add_argument_group("evaluation and output").add_argument
    # How much is evaluated: an evaluation can take longer than a short training.
    add("--eval-limit", type=count,
        help="evaluate only on the first EVAL_LIMIT rows of each validation split (default: all)")
    add("--eval-every", type=count, help="also evaluate every EVAL_EVERY steps")
    add("--log-every", type=count,
        help="report the loss every LOG_EVERY steps (default: every step up to 10, every tenth up "
        "to 100, then every fiftieth)")
    add("--keep-best", action="store_true",
        help="with --eval-every: keep the adapter with the best accuracy in RUN/best/")
    add("--max-new-tokens", type=new_tokens, default=32,
        help="most tokens that the model writes for a prompt in evaluation")
    # Against crashes: --resume continues from the last save, at most --save-every steps back.
    add("--save-every", type=count, default=500,
        help="save what --resume needs every SAVE_EVERY steps, and before each evaluation")
    add("--resume", type=path, metavar="RUN",
        help="resume this run with its own arguments; --steps may be changed")
    add("--out", type=path,
        help="folder of the run (default: in out/, named by model, dataset, rank and time)")
    # To share a result, or to watch a run from elsewhere. By default nothing is sent.
    add("--push", metavar="OWNER/NAME", type=hub.repository,
        help="upload adapter, card and results to the Hub at the end")
    add("--wandb", action="store_true",
        help="log to Weights & Biases, or to a local folder without a login or a network")


def add_eval_arguments(parser: ArgumentParser) -> None:
    """Adds the flags of eval.py other than those about model and data."""
    add = parser.add_argument
    # What is evaluated: without --adapter only the base.
    add("--adapter", type=name,
        help="run of train.py, or any PEFT LoRA adapter: a directory or a Hub id; the adapter's "
        "files name the model")
    add("--split", nargs="+", type=word,
        help="splits to evaluate (default: every validation split)")
    add("--limit", type=count,
        help="evaluate only on the first LIMIT rows of each split (default: all)")
    add("--mode", choices=["generate", "score"], default="generate",
        help="read the first number in the text that the model writes, or compare the "
        "probabilities of the three answers")
    add("--max-new-tokens", type=new_tokens, default=32,
        help="most tokens that the model writes for a prompt in mode generate")
    add("--batch-size", type=count, default=64,
        help="prompts in memory at once; halved if they do not fit")
    # To use an adapter over another base on purpose: its fingerprint is not compared.
    add("--force", action="store_true",
        help="also use an adapter of another prompt, tokenizer, base or quantisation")
    add("--compare", type=path, metavar="RUN",
        help="McNemar's test against the predictions of another run, or of an eval.py --out")
    # To try an adapter by hand.
    add("--premise", help="first text of one pair, instead of a dataset")
    add("--hypothesis", help="second text of that pair")
    add("--out", type=path, help="write results.json and predictions_SPLIT.jsonl to this folder")
