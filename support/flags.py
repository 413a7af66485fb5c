"""The flags of train.py and eval.py: names, what they may hold, and what --help prints.

A default of None depends on the machine or on a file; support/cli.py fills it in. In a help
text %% is one percent sign, because argparse formats it.
"""

import math
import os
import re
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction
from pathlib import Path

from support import hub

CONTEXT = 2048  # positions that phi-2 was trained on
MOST = 2**31 - 1  # of whole numbers: rows, steps
HUGE = 1e6  # of other numbers: none that can be trained with is larger
WIDEST = 10_240  # of phi-2's layers

# -----------------------------------------------------------------------------
# What a flag may hold, as types for argparse

# They raise ArgumentTypeError: of a ValueError argparse does not print the message.


def integer(text: str, least: int = 0) -> int:
    """Returns a whole number of at least `least`."""
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or number < least:
        raise ArgumentTypeError(f"must be a whole number of at least {least}, not {text}")
    return number


def whole_number(text: str, least: int = 0) -> int:
    """Returns a whole number of at least `least` that counts something."""
    number = integer(text, least)
    if number > MOST:
        raise ArgumentTypeError(f"must be at most {MOST:,}, not {text}")
    return number


def count(text: str) -> int:
    """Returns a whole number of at least 1: rows, steps, tokens."""
    return whole_number(text, least=1)


def rank(text: str) -> int:
    """Returns a whole number from 1 to the width of phi-2's widest layer."""
    number = count(text)
    if number > WIDEST:
        raise ArgumentTypeError(
            f"must be at most {WIDEST:,}, not {text}: B A has no higher rank than its layer"
        )
    return number


def new_tokens(text: str) -> int:
    """Returns a whole number from 1 to phi-2's context: there is room for them in the cache."""
    number = count(text)
    if number > CONTEXT:
        raise ArgumentTypeError(f"must be at most {CONTEXT:,}, phi-2's context, not {text}")
    return number


def seed(text: str) -> int:
    """Returns any whole number from 0 on, made small enough for torch's generators."""
    return integer(text) % 2**63


def finite_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    # float() also reads "nan" and "inf", which no flag can use.
    if not math.isfinite(number):
        raise ArgumentTypeError(f"must be a number, not {text}")
    return number


def number_from_0(text: str) -> float:
    number = finite_number(text)
    if number < 0:
        raise ArgumentTypeError(f"must be at least 0, not {text}")
    return not_huge(number, text)


def number_above_0(text: str) -> float:
    return not_huge(norm(text), text)


def norm(text: str) -> float:
    """Returns a number above 0. It may be huge: a gradient is clipped to it, or never."""
    number = finite_number(text)
    if number <= 0:
        raise ArgumentTypeError(f"must be above 0, not {text}")
    return number


def not_huge(number: float, text: str) -> float:
    if number > HUGE:
        raise ArgumentTypeError(f"must be at most {HUGE:,.0f}, not {text}")
    return number


def share(text: str) -> float:
    number = finite_number(text)
    if not 0 < number < 1:
        raise ArgumentTypeError(f"must be above 0 and below 1, not {text}")
    return number


def dropout_share(text: str) -> float:
    number = finite_number(text)
    if not 0 <= number < 1:
        raise ArgumentTypeError(f"must be at least 0 and below 1, not {text}")
    return number


def dtype_name(text: str) -> str:
    """Returns the text as it is; `choices` checks it. fp16 is refused with its reason."""
    if text in ("fp16", "float16", "half"):
        raise ArgumentTypeError(
            "fp16 ends at 65,504, and the attention of phi-2 goes beyond it: "
            "take bf16, or fp32"
        )
    return text


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
    """Returns the name of a device in torch's form. Whether it is there shows later."""
    if not re.fullmatch(r"[a-z]+(:\d+)?", text.lower()) or text.lower().startswith("gpu"):
        raise ArgumentTypeError(f"must be cpu, cuda, or one GPU such as cuda:0, not {text!r}")
    return text.lower()


# -----------------------------------------------------------------------------
# The flags, by groups of --help


# The rows. The last three flags are for files that support/examples.py cannot read by the
# names in its tables; python -m scripts.describe shows how it has read them.
def add_dataset_arguments(group) -> None:
    """Adds the flags on the rows to a parser or to a group of one."""
    group.add_argument(
        "--dataset",
        type=name,
        help="Hub id, or directory of train.* and validation*.* "
        "(default: nyu-mll/glue, no GPU: tiny/data); eval.py also takes -, JSON lines of "
        "premise and hypothesis on standard input",
    )
    group.add_argument(
        "--dataset-revision",
        type=word,
        metavar="REVISION",
        help="of a dataset on the Hub: a branch, a tag or a commit (default: main)",
    )
    group.add_argument(
        "--columns",
        nargs=3,
        type=word,
        metavar=("PREMISE", "HYPOTHESIS", "LABEL"),
        help="what the dataset calls these columns",
    )
    group.add_argument(
        "--labels",
        nargs=3,
        type=word,
        metavar="MEANING",
        help="what 0, 1 and 2 mean in the dataset: contradiction entailment neutral, say; "
        "or what words mean: yes=entailment maybe=neutral no=contradiction",
    )
    group.add_argument(
        "--validation",
        type=share,
        metavar="SHARE",
        help="of train, for validation, where the dataset has no split for it",
    )


def add_model_revision(group) -> None:
    group.add_argument(
        "--model-revision",
        type=word,
        metavar="REVISION",
        help="of a model on the Hub: a branch, a tag or a commit (default: main)",
    )


# The model and the data, for train.py, eval.py and several scripts. The first two flags
# are what a user with other weights or other rows changes.
def add_model_arguments(parser: ArgumentParser) -> None:
    """Adds the flags on model and data."""
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--model",
        type=name,
        help="Hub id or directory (default: microsoft/phi-2, no GPU: tiny/model)",
    )
    add_model_revision(group)
    add_dataset_arguments(group)
    # Memory: for a GPU that is too small for phi-2, or larger than it needs.
    group.add_argument(
        "--quant",
        choices=["nf4", "none"],
        default="nf4",
        help="frozen weights in 4 bits, or as they are (default: nf4)",
    )
    group.add_argument(
        "--double-quant",
        action="store_true",
        help="quantise the absmax values of NF4 too: 0.37 bit less per weight",
    )
    group.add_argument(
        "--keep-dequantized",
        action=BooleanOptionalAction,
        help="hold NF4's values in --dtype beside the codes: the same bits, faster, more "
        "memory (phi-2: 5 GB; default: on a GPU with four times that left); without it a GPU "
        "computes attention twice in training rather than store it",
    )
    group.add_argument(
        "--no-graphs",
        dest="graphs",
        action="store_false",
        help="launch each kernel of generation on a GPU by itself, not steps as CUDA graphs",
    )
    # What the arithmetic is done in: fp32 for comparisons to the last digit.
    group.add_argument(
        "--dtype",
        type=dtype_name,
        choices=["bf16", "fp32"],
        help="of weights and activations "
        "(default: bf16; on a CPU without instructions for it, fp32)",
    )
    # For texts longer than MNLI's, or to bound the memory that the longest row takes.
    group.add_argument(
        "--max-length",
        type=count,
        default=512,
        help="tokens of prompt and answer; "
        "longer ones lose the end of the premise, then of the hypothesis (default: 512)",
    )
    # For one GPU of several, cuda:1, or for a CPU beside a GPU that is in use.
    group.add_argument("--device", type=device, help="default: cuda where there is one")


# How much the adapter can learn. A user of other data changes --rank and --targets first.
def add_adapter_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("adapter")
    group.add_argument("--rank", type=rank, default=8, help="default: 8")
    group.add_argument(
        "--alpha",
        type=number_above_0,
        default=16.0,
        help="the update is scaled by alpha / rank (default: 16)",
    )
    group.add_argument(
        "--dropout",
        type=dropout_share,
        default=0.05,
        help="on the adapter's input (default: 0.05)",
    )
    group.add_argument(
        "--targets",
        nargs="+",
        type=target,
        # what the LoRA paper adapts
        default=["q_proj", "v_proj"],
        help='linear layers to adapt, or "all-linear" (default: q_proj v_proj)',
    )


# The optimiser. Most runs change the number of steps and the batch alone.
def add_training_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    # How long: --epochs for those who think in passes over their data.
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count, help="optimiser steps (default: 40000)")
    length.add_argument(
        "--epochs",
        type=number_above_0,
        help="passes over the training rows, instead of --steps",
    )
    # Rows of a step = batch size * accumulate * processes. When memory runs out, half the
    # first and twice the second make steps of the same rows.
    group.add_argument(
        "--batch-size",
        type=count,
        default=16,
        help="examples in memory at once (default: 16)",
    )
    group.add_argument(
        "--accumulate",
        type=count,
        default=1,
        help="batches to a step (default: 1)",
    )
    # AdamW and its schedule, for those who tune. A small model wants more: tiny/ has 3e-3.
    group.add_argument(
        "--learning-rate",
        type=number_above_0,
        default=2e-4,
        help="default: 2e-4",
    )
    group.add_argument(
        "--weight-decay",
        type=number_from_0,
        default=0.01,
        help="default: 0.01",
    )
    group.add_argument(
        "--warmup-steps",
        type=whole_number,
        help="linear warm-up, then cosine to 0 (default: 3%% of the steps)",
    )
    group.add_argument(
        "--max-grad-norm",
        type=norm,
        default=1.0,
        help="gradients are clipped to this norm (default: 1)",
    )
    # For a trial on a part of the data, and for the spread between runs.
    group.add_argument("--limit", type=count, help="first training rows only")
    group.add_argument(
        "--seed",
        type=seed,
        default=0,
        help="of the adapter's A, the dropout and the order of rows (default: 0)",
    )


# What a step computes, and how. The defaults are the fastest; most runs leave them alone.
def add_forward_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("forward and backward pass")
    # For comparisons with code that trains on the prompt's tokens too.
    group.add_argument(
        "--loss",
        choices=["answer", "full"],
        default="answer",
        help="on the answer's tokens, or on all of them (default: answer)",
    )
    # Off for comparisons: slower, and dropout is drawn for each row alone.
    group.add_argument(
        "--share-prefix",
        action=BooleanOptionalAction,
        default=True,
        help="run what all prompts begin with once a batch, not once a row; "
        "dropout is then drawn once for it too",
    )
    group.add_argument(
        "--residual-dropout",
        type=dropout_share,
        help="on the base's branches (default: that of config.json, 0.1 for phi-2)",
    )
    # For long rows or large batches that do not fit otherwise.
    group.add_argument(
        "--checkpointing",
        action="store_true",
        help="recompute each block in the backward pass: slower, less memory",
    )


# What is measured, saved and sent. None of these flags changes how the adapter is trained.
def add_output_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation and output")
    # How much is evaluated, which can take longer than a short training.
    group.add_argument(
        "--eval-limit",
        type=count,
        help="first rows of each validation split only, in every evaluation",
    )
    group.add_argument(
        "--eval-every", type=count, help="evaluate after each so many steps too"
    )
    group.add_argument(
        "--keep-best",
        action="store_true",
        help="with --eval-every: keep the adapter of the best accuracy in RUN/best/",
    )
    group.add_argument(
        "--max-new-tokens",
        type=new_tokens,
        default=32,
        help="written to each prompt in evaluation (default: 32)",
    )
    # Against crashes: at most --save-every steps are lost, and --resume takes the rest.
    group.add_argument(
        "--save-every",
        type=count,
        default=500,
        help="save what --resume needs after each so many steps, and before each evaluation "
        "(default: 500)",
    )
    group.add_argument(
        "--resume",
        type=path,
        metavar="RUN",
        help="resume this run, with its arguments; more --steps may be given",
    )
    group.add_argument(
        "--out",
        type=path,
        help="default: out/ and a name made of model, dataset, rank and time",
    )
    # To share a result, or to watch a run from elsewhere. Without them nothing is sent.
    group.add_argument(
        "--push",
        metavar="OWNER/NAME",
        type=hub.repository,
        help="upload adapter, card and results to the Hub at the end",
    )
    group.add_argument(
        "--wandb",
        action="store_true",
        help="log to Weights & Biases; into a local folder when not logged in",
    )


def add_eval_arguments(parser: ArgumentParser) -> None:
    """Adds what eval.py has besides the flags on model and data."""
    # What is evaluated: without --adapter the base alone.
    parser.add_argument(
        "--adapter",
        type=name,
        help="run of train.py, or any PEFT LoRA adapter: a directory or a Hub id; "
        "it names its model",
    )
    parser.add_argument("--split", nargs="+", type=word, help="default: every validation split")
    parser.add_argument("--limit", type=count, help="first rows of each split only")
    # How: "generate" writes an answer and reads the number in it; "score" compares the
    # probabilities of the three answers, so that none is unparsed.
    parser.add_argument(
        "--mode",
        choices=["generate", "score"],
        default="generate",
        help="read the answer in written text (the default), or score the three answers",
    )
    parser.add_argument(
        "--max-new-tokens", type=new_tokens, default=32, help="in mode generate (default: 32)"
    )
    parser.add_argument("--batch-size", type=count, default=64, help="default: 64")
    # For an adapter that was trained elsewhere on purpose: its fingerprint is not compared.
    parser.add_argument(
        "--force",
        action="store_true",
        help="take an adapter of another prompt, tokenizer, base or quantisation too",
    )
    parser.add_argument(
        "--compare",
        type=path,
        metavar="RUN",
        help="McNemar's test against the predictions of another run or --out",
    )
    # To try an adapter by hand.
    parser.add_argument(
        "--premise", help="one pair instead of a dataset; with --hypothesis"
    )
    parser.add_argument("--hypothesis", help="the second text of that pair")
    parser.add_argument(
        "--out", type=path, help="write results.json and predictions_SPLIT.jsonl here"
    )
