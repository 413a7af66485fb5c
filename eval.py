"""Accuracy on a split, and the answer to a single pair.

Fifth in the reading order. Mode "generate" lets the model write, greedily, and reads the first number of what it wrote,
as the notebooks of the original FLoRA did: a model that does not answer gets nothing. Mode "score" compares the three
answers at the position after "### Label:", one forward pass; it shows what a model knows even if it would not say it.

    python eval.py --adapter out/demo                                       # every validation split
    python eval.py --model microsoft/phi-2 --split validation_matched --mode score
    python eval.py --adapter out/demo --premise "Anna bought a dog." --hypothesis "Anna bought an animal."
"""
import argparse
import ctypes
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import data
import lora
import phi2
import quant
import ranks
import report

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_model(directory: Path, quantization: str, dtype: torch.dtype, device: str, double_quant: bool = False, keep: bool = False):
    """The four lines that this project is about, less the adapter."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        # glibc gives a large freed block back to the system, and each layer of a CPU faults its pages in anew: let it keep 256 MiB
        for option, value in ((-1, 2 ** 28), (-3, 2 ** 25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    model = phi2.build(directory)
    if quantization == "nf4":
        quant.quantize_linears(model, double_quant=double_quant)
    phi2.load_weights(model, directory, device, dtype)
    if keep:
        quant.keep_dequantized(model)
    return model


@torch.no_grad()
def evaluate(model: phi2.Phi2, tokenizer, examples, mode: str = "generate", max_new_tokens: int = 32, batch_size: int = 64,
             max_length: int | None = None, desc: str = "evaluating") -> tuple[dict, list[dict]]:
    """(report.statistics of the predictions, one prediction per example in their order); dropout is off meanwhile.

    Each rank answers its share, and all get all answers. An answer depends on its prompt alone, in fp32 to the last bits of
    its scores; in bf16, where a batch of another size is rounded otherwise, it may differ where two answers are all but even.
    """
    was_training = model.training
    model.eval()
    prefix = data.fixed_ids(tokenizer)[0]
    prompts = [data.encode(example, tokenizer, max_length)[0] for example in examples]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # rows of one length together, the longest first
    order, cache, predictions = order[ranks.RANK::ranks.WORLD], model.prefill(prefix), []
    bar = tqdm(total=len(order), desc=desc, unit="row", leave=False, disable=None if ranks.FIRST else True)
    for start in range(0, len(order), batch_size):
        rows = order[start:start + batch_size]
        rest = [prompts[i][len(prefix):] for i in rows]
        answer = score if mode == "score" else complete
        for i, found in zip(rows, answer(model, tokenizer, rest, cache, max_new_tokens, [examples[i]["label"] for i in rows])):
            row = {"idx": i, "tokens": len(prompts[i])} | {key: examples[i][key] for key in ("idx", "genre", "label") if key in examples[i]}
            predictions.append((i, row | {"prompt": data.PROMPT.format(**examples[i])} | found))
        bar.update(len(rows))
    bar.close()
    model.train(was_training)
    predictions = [row for _, row in sorted(ranks.gather_rows(predictions), key=lambda pair: pair[0])]
    return report.statistics(predictions), predictions


@torch.no_grad()
def generate(model: phi2.Phi2, prompts: list[list[int]], max_new_tokens: int, eos: int, vocab_size: int, cache: phi2.KVCache | None = None,
             settled: Callable[[list[int]], bool] = lambda ids: False, guesses: list[int] = ()) -> tuple[list[list[int]], Tensor]:
    """Greedy completions of a batch of prompts (lists of ids), each up to and without `eos`; and the logits of the first pass.

    `cache` holds a prefix of every prompt. Ids of `vocab_size` (the tokenizer's) and above, which no text ever trained,
    are never chosen. Rows that have ended, or whose completion so far is `settled`, leave the batch. `guesses` at the first
    token stand behind each prompt, side by side at one position, unseen by one another: where one is what the model
    chooses, the token after it is known from the same pass, and a row that then ends needs no second. The logits (B, 1 +
    guesses, vocab) are those after the prompt and after each guess.
    """
    device, completions, rows = model.lm_head.weight.device, [[] for _ in prompts], list(range(len(prompts)))
    start, width = cache.positions.shape[1] if cache else 0, max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) + list(guesses) for prompt in prompts], device=device)
    ends, places = torch.tensor([[len(prompt)] for prompt in prompts], device=device), torch.arange(ids.shape[1], device=device)[None]
    positions = start + torch.where(places < ends, places, phi2.NOWHERE)
    positions[:, width:] = start + ends
    columns, first_pass = torch.cat((ends - 1, places[:, width:].expand(len(ids), -1)), dim=1), None
    while rows:
        hidden, cache = model.model(ids, cache, positions, columns)
        logits = model.lm_head(hidden)
        first_pass = logits if first_pass is None else first_pass
        chosen, alive = logits[..., :vocab_size].argmax(dim=-1), []
        if guesses:  # the wrong ones must not be seen again
            cache.positions[:, -len(guesses):].masked_fill_(ids[:, width:] != chosen[:, :1], phi2.NOWHERE)
        for i, (row, (first, *second)) in enumerate(zip(rows, chosen.tolist())):
            for token in [first] + [token for guess, token in zip(guesses, second) if guess == first]:
                if token == eos:
                    break
                completions[row].append(token)
                if len(completions[row]) == max_new_tokens or settled(completions[row]):
                    break
            else:
                alive.append(i)
        if len(alive) < len(rows):
            rows, cache = [rows[i] for i in alive], cache.select(torch.tensor(alive, dtype=torch.long, device=device))
        ids = torch.tensor([[completions[row][-1]] for row in rows], device=device)
        positions = torch.tensor([[start + len(prompts[row]) + len(completions[row]) - 1] for row in rows], device=device)
        columns, guesses = torch.zeros_like(positions), ()
    return completions, first_pass


def complete(model, tokenizer, rest: list[list[int]], cache, max_new_tokens: int, labels: list[int] = ()) -> list[dict]:
    """What the model writes after the prompts that the cache begins and `rest` ends, up to the end of its first number.

    With "scores" as `score` has them and, where labels are given, "loss", that of training: the mean over label and end of text.
    """
    def settled(ids):
        return data.settled(tokenizer.decode(ids, skip_special_tokens=False))
    _, answers, eos = data.fixed_ids(tokenizer)
    written, logits = generate(model, rest, max_new_tokens, eos, tokenizer.get_vocab_size(), cache, settled, answers)
    texts = tokenizer.decode_batch(written, skip_special_tokens=False)
    scores = shares(logits[:, 0], answers)
    found = [{"completion": text, "prediction": data.parse(text), "scores": row} for text, row in zip(texts, scores)]
    if not labels:
        return found
    rows, labels = torch.arange(len(rest)), torch.tensor(labels)
    label, end = (logits[rows, column].float().log_softmax(dim=-1) for column in (0 * labels, 1 + labels))
    losses = -(label[rows, torch.tensor(answers)[labels]] + end[:, eos]) / 2
    return [row | {"loss": short(loss)} for row, loss in zip(found, losses.tolist())]


def score(model, tokenizer, rest: list[list[int]], cache, max_new_tokens: int = 0, labels: list[int] = ()) -> list[dict]:
    """The likeliest of the three answers, and the probability of each among the three."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in rest], batch_first=True)
    last = torch.tensor([[len(prompt) - 1] for prompt in rest])
    device = model.lm_head.weight.device
    logits = model(ids.to(device), cache, last.to(device))[:, 0]
    return [{"prediction": max(range(3), key=row.__getitem__), "scores": row} for row in shares(logits, data.fixed_ids(tokenizer)[1])]


def shares(logits: Tensor, answers: list[int]) -> list[list[float]]:
    """The softmax over the three answers alone of logits (B, vocab)."""
    return [[short(share) for share in row] for row in logits[:, answers].float().softmax(dim=-1).tolist()]


def short(number: float) -> float:
    """Six digits of a number, which is what fp32 knows and a reader of the file wants."""
    return float(f"{number:.6g}")


def dtype_name(name: str) -> str:
    """What --dtype says, with a reason why it cannot be fp16."""
    if name in ("fp16", "float16", "half"):
        raise argparse.ArgumentTypeError("fp16 ends at 65,504, and the attention of phi-2 goes beyond it: take bf16, or fp32")
    return name


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments on model and data that train.py has too."""
    group = parser.add_argument_group("model and data")
    group.add_argument("--model", help="Hub id or directory (default: microsoft/phi-2, no GPU: tiny/model)")
    group.add_argument("--dataset", help="Hub id or directory of train.* and validation*.* (default: nyu-mll/glue, no GPU: tiny/data)")
    group.add_argument("--quant", choices=["nf4", "none"], default="nf4", help="frozen weights in 4 bits, or as they are (default: nf4)")
    group.add_argument("--double-quant", action="store_true", help="quantise the absmax values of NF4 too: 0.37 bit less per weight")
    group.add_argument("--keep-dequantized", action="store_true",
                       help="hold NF4's values in --dtype beside the codes: the same bits, faster, more memory (phi-2: 5 GB)")
    group.add_argument("--dtype", type=dtype_name, choices=DTYPES, default=ranks.fast_dtype(),
                       help="of weights and activations (default: bf16; on a CPU without instructions for it, fp32)")
    group.add_argument("--max-length", type=int, default=512,
                       help="tokens of prompt and answer; longer ones lose the end of the premise (default: 512)")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda where there is one")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def main() -> None:
    parser = data.Parser("accuracy on MNLI, or the answer to one pair")
    add_model_arguments(parser)
    parser.add_argument("--adapter", type=Path, help="directory of a run of train.py, or any PEFT LoRA adapter; it names its model")
    parser.add_argument("--split", nargs="+", help="default: every validation split")
    parser.add_argument("--limit", type=int, help="first rows of each split only")
    parser.add_argument("--mode", choices=["generate", "score"], default="generate")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="in mode generate (default: 32)")
    parser.add_argument("--batch-size", type=int, default=64, help="default: 64")
    parser.add_argument("--force", action="store_true", help="take an adapter of another prompt, tokenizer, base or quantisation too")
    parser.add_argument("--compare", type=Path, metavar="RUN", help="McNemar's test against the predictions of another run or --out")
    parser.add_argument("--premise", help="one pair instead of a dataset; with --hypothesis")
    parser.add_argument("--hypothesis")
    parser.add_argument("--out", type=Path, help="write results.json and predictions_<split>.jsonl here")
    if adapter := parser.parse_args().adapter:
        checkpoint.set_defaults(parser, checkpoint.trained_with(adapter), adapter)
    args = data.parse_arguments(parser)
    if (args.premise is None) != (args.hypothesis is None):
        parser.error("--premise and --hypothesis go together")
    if args.dataset == "-" and (args.out or args.compare or args.split or args.limit or args.premise):
        parser.error("with --dataset - rows come from standard input: no --out, --compare, --split, --limit or --premise")
    if args.out and (args.out / "args.json").exists():
        raise ValueError(f"{args.out} holds a run of train.py, whose results this would replace: choose another --out")
    splits = [] if args.premise is not None or args.dataset == "-" else args.split or data.validation_splits(args.dataset)
    splits = {split: data.load_examples(args.dataset, split, args.limit) for split in splits}
    others = {split: report.read_predictions(args.compare / f"predictions_{split}.jsonl") for split in splits if args.compare}
    directory = checkpoint.locate(args.model)
    device, tokenizer = ranks.start(args.device), data.load_tokenizer(directory)
    model = load_model(directory, args.quant, DTYPES[args.dtype], device, args.double_quant, args.keep_dequantized).eval()
    if args.adapter:
        config = lora.load_adapter(model, args.adapter, None if args.force else checkpoint.fingerprint(model, tokenizer, data.PROMPT, args))
        adapted = len(lora.lora_parameters(model)) // 2
        print(f"{args.adapter}: rank {config.rank}, {adapted}/{adapted} modules adapted", file=sys.stderr if args.dataset == "-" else None)

    if args.premise is not None:
        prompt, _ = data.encode({"premise": args.premise, "hypothesis": args.hypothesis, "label": 0}, tokenizer, args.max_length)
        found = complete(model, tokenizer, [prompt], None, args.max_new_tokens)[0]
        print(f"completion: {found['completion']!r}")
        for label, probability in enumerate(found["scores"]):
            print(f"{label} {data.LABELS[label]:14} {probability:.4f}" + "  <-" * (probability == max(found["scores"])))
        return
    if args.dataset == "-":
        return answer_lines(model, tokenizer, args)

    results, compared = {}, {}
    for split, examples in splits.items():
        results[split], predictions = evaluate(model, tokenizer, examples, args.mode, args.max_new_tokens, args.batch_size,
                                               args.max_length, split)
        if args.out and ranks.FIRST:
            args.out.mkdir(parents=True, exist_ok=True)
            checkpoint.write_lines(predictions, args.out / f"predictions_{split}.jsonl")
        compared |= {split: report.mcnemar(others[split], predictions)} if others else {}
    found = {"protocol": report.protocol(args.mode, args.max_new_tokens)}
    found |= {"finetuned" if args.adapter else "baseline": results, "mcnemar": compared}
    print(report.table(found), *(f"\n{split}\n{report.details(result)}" for split, result in results.items()), sep="\n")
    if args.out and ranks.FIRST:
        checkpoint.write_json(args.out / "results.json", found)


def answer_lines(model, tokenizer, args) -> None:
    """JSON lines from standard input, each of a premise and a hypothesis, to standard output, with their answers."""
    prefix = data.fixed_ids(tokenizer)[0]
    cache, lines = model.prefill(prefix), ((number, line) for number, line in enumerate(sys.stdin, 1) if line.strip())
    while batch := list(itertools.islice(lines, args.batch_size)):
        rows = []
        for number, line in batch:
            row = checkpoint.parse_line(line, f"line {number} of standard input")
            if not all(isinstance(row.get(key), str) for key in ("premise", "hypothesis")):
                raise ValueError(f"line {number} of standard input has no text as premise and hypothesis")
            rows.append(row)
        rest = [data.encode(row | {"label": 0}, tokenizer, args.max_length)[0][len(prefix):] for row in rows]
        for row, found in zip(rows, complete(model, tokenizer, rest, cache, args.max_new_tokens)):
            print(json.dumps(row | found, ensure_ascii=False))


if __name__ == "__main__":
    data.run(main)
    ranks.stop()
