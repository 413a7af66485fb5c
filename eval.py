"""Accuracy on a split, and the answer to a single pair.

Fifth in the reading order. Mode "generate" lets the model write a completion, greedily,
and reads the first number in it; a completion without a number counts as wrong. Mode
"score" compares the probabilities of the three labels after "### Label:", in one
forward pass. It shows what a model knows even if it would not write it.

    python eval.py --adapter out/demo                                       # every validation split
    python eval.py --model microsoft/phi-2 --split validation_matched --mode score
    python eval.py --adapter out/demo --premise "A dog ran." --hypothesis "An animal ran."
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves it out

from support import cli

if __name__ == "__main__":
    cli.answer_help(cli.eval_parser)  # before torch is imported, which takes seconds

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

import data
import lora
import phi2
import quant
from support import (
    checkpoints,
    claims,
    examples,
    files,
    fingerprint,
    full_memory,
    machine,
    metrics,
    origin,
    packing,
    peft_files,
    processes,
    typed_pairs,
)
from support.fused import fused
from support.labels import LABELS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# On a GPU each of these runs as one kernel from here on, in training too, with the same
# bits forward and backward: every step within it rounds as it would on its own.
phi2.rotate = fused(phi2.rotate)
phi2.add_branches = fused(phi2.add_branches)


# -----------------------------------------------------------------------------
# Predictions for prompts


@torch.no_grad()
def generate(
    model: phi2.Phi2,
    prompts: list[list[int]],
    prefix: list[int],
    max_new_tokens: int,
    num_known_ids: int,
    is_finished: Callable[[list[int]], bool],
) -> tuple[list[list[int]], Tensor]:
    """Returns a greedy completion of each of B prompts, and hidden states (B, C).

    As in phi2.generate, each token is the likeliest one. (As in transformers, the logits are
    in the model's dtype, and of equal ones the lowest id is taken.) But whole rows are run
    only once: the layout stores their keys and values, and the decoder runs one new token
    per row (support/packing.py).

    A completion ends as soon as is_finished(its ids) is true, or at `max_new_tokens`. The
    hidden states are those of each prompt's last token, from which the output head computes
    the logits of the first new token. All prompts begin with `prefix`. The head has more
    outputs than the tokenizer has ids: ids from `num_known_ids` on are never chosen.
    """
    device = model.lm_head.weight.device
    # 1. Run all prompts at once. Because there is room for completions, the layout stores keys and
    #    values. The output head runs only on each prompt's last token.
    ids, layout = pack_prompts(prompts, prefix, device, room=max_new_tokens)
    hidden = model.model(ids, layout, last=1)

    decoder = packing.Decoder(model, layout)
    completions = [[] for _ in prompts]
    prompt_of = list(range(len(prompts)))  # the prompt of each row in the batch
    unfinished = set(prompt_of)
    logits = model.lm_head(hidden)
    while True:
        # 2. Choose the likeliest next token of each row. Finished rows may be among them.
        chosen = logits[:, :num_known_ids].argmax(dim=-1).tolist()
        for number, token in zip(prompt_of, chosen):
            if number in unfinished:
                completions[number].append(token)
                if len(completions[number]) == max_new_tokens or is_finished(completions[number]):
                    unfinished.remove(number)
        if not unfinished:
            return completions, hidden

        # 3. Run each row's new token through the model, without finished rows if dropping them
        #    pays. `kept` are the indices of the rows that stay.
        kept = decoder.drop([number not in unfinished for number in prompt_of])
        prompt_of = [prompt_of[row] for row in kept]
        logits = decoder.run([completions[number][-1] for number in prompt_of])


def complete(
    model: phi2.Phi2, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int
) -> list[dict]:
    """Returns the completion, the predicted label and the scores for each prompt.

    A completion ends with the end-of-text token, or as soon as its first number is settled,
    because further text would not change the prediction. The scores are those of `score`.
    """
    prefix, label_ids, eos = data.fixed_ids(tokenizer)

    def is_finished(ids: list[int]) -> bool:
        # All ids are decoded each time, because a token may end within a character.
        return ids[-1] == eos or data.is_settled(tokenizer.decode(ids, skip_special_tokens=False))

    completions, hidden = generate(
        model, prompts, prefix, max_new_tokens, data.num_known_ids(tokenizer), is_finished
    )
    # The end-of-text token is not part of the text.
    ended = [ids[:-1] if ids[-1] == eos else ids for ids in completions]
    texts = tokenizer.decode_batch(ended, skip_special_tokens=False)
    return [
        {"completion": text, "prediction": data.parse(text), "scores": scores}
        for text, scores in zip(texts, label_scores(model, hidden, label_ids))
    ]


@torch.no_grad()
def score(model: phi2.Phi2, tokenizer: Tokenizer, prompts: list[list[int]]) -> list[dict]:
    """Returns for each prompt the likeliest label, and the probabilities of all three."""
    prefix, label_ids, _ = data.fixed_ids(tokenizer)
    ids, layout = pack_prompts(prompts, prefix, model.lm_head.weight.device)
    # One forward pass. Only the last token of each prompt, before the answer, is needed.
    hidden = model.model(ids, layout, last=1)
    return [
        {"prediction": scores.index(max(scores)), "scores": scores}
        for scores in label_scores(model, hidden, label_ids)
    ]


def pack_prompts(
    prompts: list[list[int]], prefix: list[int], device: torch.device, room: int = 0
) -> tuple[Tensor, packing.PackedRows]:
    """Returns the flat ids (N,) of prompts that begin with `prefix`, and their layout.

    A beginning that prompts share, such as a premise, goes through the model only once.
    `room` is the number of tokens that may be added to each prompt.
    """
    rows = [prompt[len(prefix) :] for prompt in prompts]
    # Equal beginnings are folded into one. For the rows 5 6 7 and 5 6 8,
    #   own_ids   is 5 6 7 8,
    #   token_of  is 0 1 2 0 1 3, the indices of the rows' tokens in own_ids.
    # (The last token of two equal rows is one token; its hidden state is returned for both.)
    own_ids, token_of = packing.fold(rows)
    lengths = [len(row) for row in rows]
    ids = torch.tensor(prefix + own_ids).to(device, non_blocking=True)
    return ids, packing.PackedRows(lengths, len(prefix), device, token_of, room)


def label_scores(
    model: phi2.Phi2, hidden: Tensor, label_ids: list[int]
) -> list[list[float]]:
    """Returns the probabilities of the three labels, from prompts' hidden states (B, C).

    They add up to one: the softmax is over the logits of the labels' three ids only.
    """
    head = model.lm_head
    weight = head.weight
    if isinstance(head, quant.NF4Linear):  # from a checkpoint whose output head is in NF4
        weight = head.dequantize()
    # Three rows of the output head, in fp32. In bf16 a logit has two to three digits:
    # the two best would often be equal, and the smaller label would win because it
    # comes first.
    logits = hidden.float() @ weight[label_ids].float().T + head.bias[label_ids].float()
    scores = logits.softmax(dim=-1).tolist()
    if not all(math.isfinite(score) for row in scores for score in row):
        raise ValueError(
            "the model's logits are not finite: its numbers or the adapter's are too large, for "
            "example after training with too high a --learning-rate, or for --dtype fp16"
        )
    # Nine digits distinguish all fp32 numbers, so equal scores in a file are a true tie.
    return [[float(f"{score:.9g}") for score in row] for row in scores]


# -----------------------------------------------------------------------------
# Accuracy on a split


@dataclass
class Settings:
    """How predictions are made."""

    mode: str = "generate"  # or "score"
    max_new_tokens: int = 32  # the most tokens that the model may write for a prompt
    batch_size: int = 64  # prompts at a time; without a backward pass many fit
    max_length: int | None = None  # of prompt and answer together, in tokens

    def record(self) -> dict:
        """Returns how accuracy was measured, as results.json records it."""
        if self.mode == "score":
            return {"mode": "score", "prompt": data.PROMPT, "answers": [" 0", " 1", " 2"]}
        return {
            "mode": "generate",
            "prompt": data.PROMPT,
            "decoding": "greedy",
            "max_new_tokens": self.max_new_tokens,
            "parse": data.NUMBER.pattern,
        }


def evaluate(
    model: phi2.Phi2, tokenizer: Tokenizer, pairs, settings: Settings, title: str = "evaluating"
) -> tuple[dict, list[dict]]:
    """Returns the statistics of a split's pairs, and the prediction for each pair, in order.

    `pairs` are support/rows.py's: pairs[0] is an example, pairs["premise"] a column. Dropout
    is off during the evaluation. With several processes, each of which has the whole model,
    each one takes a part of the pairs, and all of them return all predictions. A prediction
    depends only on its prompt, apart from rounding: another batch size changes scores in
    their last digits, and in bf16 two scores that are nearly equal may swap.
    """
    was_training = model.training
    model.eval()
    encoded = data.encode_batch(pairs, tokenizer, settings.max_length)
    # The model reads only the prompts.
    prompts = [prompt for prompt, _ in encoded]
    groups = data.by_premise(pairs, prompts)
    # Each process takes every COUNT-th group, so all pairs of a premise are in
    # one process.
    mine = list(itertools.chain.from_iterable(groups[processes.NUMBER :: processes.COUNT]))

    found = []  # (index of the pair, its prediction), in the order of the batches
    # For tqdm, None means no bar if the output is not a terminal.
    disable = None if processes.IS_FIRST else True
    with tqdm(total=len(mine), desc=title, unit="row", leave=False, disable=disable) as bar:
        batch_size = settings.batch_size  # a copy, because `predict` may halve it
        for start in range(0, len(mine), batch_size):
            indices = mine[start : start + batch_size]
            batch = [prompts[index] for index in indices]
            found += zip(indices, predict(model, tokenizer, batch, settings))
            bar.update(len(indices))
    model.train(was_training)

    # Collect what all processes have found, and restore the order of the pairs.
    prediction_of = dict(itertools.chain.from_iterable(processes.gather(found)))
    predictions = [
        describe(pair, index, len(prompts[index])) | prediction_of[index]
        for index, pair in enumerate(pairs)
    ]
    cut = data.count_cut(pairs, encoded, tokenizer, settings.max_length)
    return metrics.statistics(predictions) | {"cut": cut}, predictions


def predict(
    model: phi2.Phi2, tokenizer: Tokenizer, prompts: list[list[int]], settings: Settings
) -> list[dict]:
    """Returns the predictions for a batch of prompts, in the mode of the settings.

    If memory runs out, halves settings.batch_size, runs the batch in parts of this size,
    and keeps the size for later batches.
    """

    def predict_part(prompts: list[list[int]]) -> list[dict]:
        if settings.mode == "score":
            return score(model, tokenizer, prompts)
        return complete(model, tokenizer, prompts, settings.max_new_tokens)

    return full_memory.run_in_parts(predict_part, prompts, settings, model)


def describe(pair: dict, index: int, tokens: int) -> dict:
    """Returns what predictions_SPLIT.jsonl records about a pair, apart from the prediction.

    "prompt" is the whole text; "tokens" is how many tokens of it the model has read.
    """
    # If the dataset has an idx, it replaces our index.
    known = {key: pair[key] for key in ("idx", "genre", "label") if pair.get(key) is not None}
    return {"idx": index, "tokens": tokens} | known | {"prompt": data.PROMPT.format(**pair)}


# -----------------------------------------------------------------------------
# The model


def load_model(
    directory: Path,
    quantization: str,
    dtype: str,
    device: str | torch.device,
    double_quant: bool = False,
    keep: bool | None = False,
) -> phi2.Phi2:
    """Returns the base with its weights: three of the four lines that are QLoRA's core.

    The fourth, lora.inject(model, config), follows later, once the layers have their
    weights. `quantization` is "nf4" or "none"; `dtype` is a key of DTYPES. For `keep` see
    `choose_what_is_stored`. None, the default of the scripts, asks `has_room_to_keep`.
    """
    model = phi2.build(directory)  # empty, on the meta device
    if quantization == "nf4":
        # nn.Linear becomes NF4Linear, still empty.
        quant.quantize_linears(model, phi2.not_quantized(directory), double_quant)
    with full_memory.explained(full_memory.about_loading, model, DTYPES[dtype]):
        # Loads layer by layer; each NF4Linear quantises its weight.
        phi2.load_weights(model, directory, device, DTYPES[dtype])
        if keep is None:
            keep = has_room_to_keep(model, machine.free_memory(device))
        choose_what_is_stored(model, keep, device)
    return model.eval()


def has_room_to_keep(model: phi2.Phi2, free: int) -> bool:
    """Returns whether `free` bytes hold the dequantised weights and a training beside them.

    machine.free_memory returns 0 for a CPU. Without NF4 there is nothing to dequantise, and
    the result is True.
    """
    # With the default flags phi-2 takes 16 GB in training, three times as much as its
    # dequantised weights alone, 5 GB (README.md). Four times leaves a margin.
    return free >= 4 * quant.dequantized_size(model)


def choose_what_is_stored(model: phi2.Phi2, keep: bool, device: str | torch.device) -> None:
    """Chooses less time (`keep`) or less memory.

    With `keep` the dequantised weights of NF4 layers are stored. Without it W is dequantised
    each time it is used, and over a base of any kind a GPU recomputes attention in the
    backward pass, instead of storing the padded copies of q, k and v.
    """
    if keep:
        quant.keep_dequantized(model)
    elif torch.device(device).type != "cpu":
        model.model.recomputes_attention = True


def fingerprint_of(
    args: argparse.Namespace, directory: Path, tokenizer: Tokenizer
) -> dict[str, str]:
    """Returns what an adapter depends on: digests of base, tokenizer and prompt; and --quant.

    --dtype is not among it, because it only changes how numbers are rounded.
    """
    # Double quantisation rounds absmax, so the dequantised weights differ.
    quantization = args.quant
    if args.quant == "nf4" and args.double_quant:
        quantization = "nf4, double"
    return fingerprint.compute(phi2.weight_files(directory), tokenizer, data.PROMPT, quantization)


# -----------------------------------------------------------------------------
# The script


def main() -> None:
    args = cli.eval_arguments()
    device = processes.start(args.device)
    if args.premise is not None:
        return answer_pair(args, device)
    if args.dataset == "-":
        return answer_lines(args, device)
    if args.out is None:
        return evaluate_splits(args, device)
    # No other run may write there until this one ends.
    with claims.claimed(args.out, cli.check_out):
        return evaluate_splits(args, device)


def load(
    args: argparse.Namespace, device: torch.device, output=None
) -> tuple[phi2.Phi2, Tokenizer]:
    """Returns the model that the arguments name, with its adapter, and its tokenizer."""
    directory = checkpoints.find(args.model, phi2.read_config, revision=args.model_revision)
    tokenizer = data.load_tokenizer(directory, phi2.read_config(directory).vocab_size)
    data.check_max_length(tokenizer, args.max_length)
    model = load_model(
        directory, args.quant, args.dtype, device, args.double_quant, args.keep_dequantized
    )
    model.uses_graphs = args.graphs
    if args.adapter:
        if not args.force:
            # An adapter of another program has no fingerprint, and passes.
            fingerprint.check(args.adapter, fingerprint_of(args, directory, tokenizer))
        config = peft_files.read_config(args.adapter, lora.LoRAConfig)
        lora.load_adapter(model, args.adapter, config)
        adapted = len(lora.lora_parameters(model)) // 2  # an A and a B for each
        base = f"{args.model} in {args.dtype if args.quant == 'none' else args.quant}"
        layers = f"rank {config.rank}, {adapted} layers adapted"
        print(f"{args.adapter}: {layers}, over {base}", file=output)
    return model, tokenizer


def answer_pair(args: argparse.Namespace, device: torch.device) -> None:
    """Prints the completion (in mode "generate") and each label's probability for one pair."""
    pair = {"premise": args.premise, "hypothesis": args.hypothesis}
    typed_pairs.check(pair, "the command line")
    model, tokenizer = load(args, device)
    (prediction,) = predict_pairs(model, tokenizer, [pair], settings_of(args))
    typed_pairs.print_prediction(prediction, words_of(args), args.max_length)


def answer_lines(args: argparse.Namespace, device: torch.device) -> None:
    """Prints the pairs from standard input with their answers, one JSON object per line."""
    if sys.stdin is None:
        raise ValueError("--dataset - reads standard input, which is closed")
    # Standard output is for answers only.
    model, tokenizer = load(args, device, output=sys.stderr)
    settings = settings_of(args)
    for pairs in typed_pairs.batches(sys.stdin.buffer, args.batch_size):
        predictions = predict_pairs(model, tokenizer, pairs, settings)
        typed_pairs.print_lines(pairs, predictions, words_of(args))


def words_of(args: argparse.Namespace) -> list[str]:
    """Returns the words for 0, 1 and 2 that --labels named in training, or else the usual ones."""
    return list(args.origin.words if args.origin else LABELS)


def predict_pairs(
    model: phi2.Phi2, tokenizer: Tokenizer, pairs: list[dict], settings: Settings
) -> list[dict]:
    """Returns the predictions for pairs without labels, with a key "cut" if a pair was cut."""
    # Any label will do: it only affects the ids of the correct answer, which are
    # not used here.
    labelled = [pair | {"label": 0} for pair in pairs]
    encoded = data.encode_batch(labelled, tokenizer, settings.max_length)
    predictions = predict(model, tokenizer, [prompt for prompt, _ in encoded], settings)
    for example, ids, prediction in zip(labelled, encoded, predictions):
        if data.count_cut([example], [ids], tokenizer, settings.max_length):
            prediction["cut"] = True
    return predictions


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(args.mode, args.max_new_tokens, args.batch_size, args.max_length)


def evaluate_splits(args: argparse.Namespace, device: torch.device) -> None:
    """Evaluates each split, prints the statistics, and with --out writes them to files."""
    # The data is read first, so that a mistake shows before the model is loaded.
    reading = origin.reading_of(args)
    names = args.split or examples.validation_splits(args.dataset, reading)
    splits = {
        name: examples.load_examples(args.dataset, name, args.limit, reading)
        for name in dict.fromkeys(names)  # each once
    }
    others = read_others(args.compare, splits)

    model, tokenizer = load(args, device)
    settings = settings_of(args)
    # The names that train.py uses, so that one table can show both.
    stage = "finetuned" if args.adapter else "baseline"
    results = {
        "model": args.model,
        "adapter": str(args.adapter) if args.adapter else None,
        "quant": args.quant,
        "dtype": args.dtype,
        "protocol": settings.record(),
        "dataset": args.dataset,
        "dataset_revision": examples.hub_commit(args.dataset, args.dataset_revision),
        "rows": examples.count_rows(args.dataset, splits, reading),
        stage: {},
    }
    for name, rows in splits.items():
        results[stage][name], predictions = evaluate(model, tokenizer, rows, settings, name)
        if name in others:
            compared = metrics.compare(others[name], predictions)
            results.setdefault("compared", {})[name] = {"run": str(args.compare)} | compared
        # Written after each split, so that no prediction is lost if a later split fails.
        if args.out and processes.IS_FIRST:
            files.write_lines(args.out / f"predictions_{name}.jsonl", predictions)

    print_results(args, splits, results, results[stage])
    if args.out and processes.IS_FIRST:
        files.write_json(args.out / "results.json", results)


def read_others(folder: Path | None, splits: dict) -> dict[str, list[dict]]:
    """Returns by split the predictions that --compare names. Raises ValueError if rows differ."""
    others = {}
    if folder is None:
        return others
    for name, pairs in splits.items():
        others[name] = metrics.read_predictions(folder / f"predictions_{name}.jsonl")
        here = [describe(pair, index, tokens=0) for index, pair in enumerate(pairs)]
        metrics.check_same_rows(others[name], here)
    return others


def print_results(
    args: argparse.Namespace, splits: dict, results: dict, statistics_of: dict[str, dict]
) -> None:
    """Prints which rows were read, a table of all splits, and the details of each split."""
    # Only the first process prints: processes.start has silenced the others.
    taken = ", ".join(f"{len(rows):,} rows of {name}" for name, rows in splits.items())
    print(f"{args.dataset}: {taken}")
    print(metrics.table(results))
    for name, statistics in statistics_of.items():
        print(f"\n{name}\n{metrics.details(statistics)}")
        if statistics["cut"]:
            print(f"{statistics['cut']:,} prompts were cut to --max-length {args.max_length}")


if __name__ == "__main__":
    cli.run(main)
    processes.stop()
