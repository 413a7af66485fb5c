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
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import data
import lora
import phi2
import quant
import ranks

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
    """({"accuracy", "n", "correct", "unparsed"}, one prediction per example in their order); dropout is off meanwhile.

    `unparsed` completions, without a number, count as wrong. Each rank answers its share, and all get all answers.
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
        for i, prediction in zip(rows, answer(model, tokenizer, rest, cache, max_new_tokens)):
            example = examples[i]
            row = {"idx": example.get("idx", i), "prompt": data.PROMPT.format(**example), "label": example["label"]}
            predictions.append((i, row | prediction))
        bar.update(len(rows))
    bar.close()
    model.train(was_training)
    predictions = [row for _, row in sorted(ranks.gather_rows(predictions), key=lambda pair: pair[0])]
    correct = sum(row["prediction"] == row["label"] for row in predictions)
    unparsed = sum(row["prediction"] == -1 for row in predictions)
    return {"accuracy": correct / len(predictions), "n": len(predictions), "correct": correct, "unparsed": unparsed}, predictions


@torch.no_grad()
def generate(model: phi2.Phi2, prompts: list[list[int]], max_new_tokens: int, eos: int, vocab_size: int, cache: phi2.KVCache | None = None,
             settled: Callable[[list[int]], bool] = lambda ids: False, guesses: list[int] = ()) -> list[list[int]]:
    """Greedy completions of a batch of prompts (lists of ids), each up to and without `eos`.

    `cache` holds a prefix of every prompt. Ids of `vocab_size` (the tokenizer's) and above, which no text ever trained,
    are never chosen. Rows that have ended, or whose completion so far is `settled`, leave the batch. `guesses` at the first
    token stand behind each prompt, side by side at one position, unseen by one another: where one is what the model
    chooses, the token after it is known from the same pass, and a row that then ends needs no second.
    """
    device, completions, rows = model.lm_head.weight.device, [[] for _ in prompts], list(range(len(prompts)))
    start, width = cache.positions.shape[1] if cache else 0, max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) + list(guesses) for prompt in prompts], device=device)
    ends, places = torch.tensor([[len(prompt)] for prompt in prompts], device=device), torch.arange(ids.shape[1], device=device)[None]
    positions = start + torch.where(places < ends, places, phi2.NOWHERE)
    positions[:, width:] = start + ends
    columns = torch.cat((ends - 1, places[:, width:].expand(len(ids), -1)), dim=1)
    while rows:
        hidden, cache = model.model(ids, cache, positions, columns)
        chosen, alive = model.lm_head(hidden)[..., :vocab_size].argmax(dim=-1), []
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
    return completions


def complete(model, tokenizer, rest: list[list[int]], cache, max_new_tokens: int) -> list[dict]:
    """What the model writes after the prompts that the cache begins and `rest` ends, up to the end of its first number."""
    def settled(ids):
        return data.settled(tokenizer.decode(ids, skip_special_tokens=False))
    _, answers, eos = data.fixed_ids(tokenizer)
    written = generate(model, rest, max_new_tokens, eos, tokenizer.get_vocab_size(), cache, settled, answers)
    texts = tokenizer.decode_batch(written, skip_special_tokens=False)
    return [{"completion": text, "prediction": data.parse(text)} for text in texts]


def score(model, tokenizer, rest: list[list[int]], cache, max_new_tokens: int = 0) -> list[dict]:
    """The likeliest of the three answers, and the probability of each among the three."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in rest], batch_first=True)
    last = torch.tensor([[len(prompt) - 1] for prompt in rest])
    device = model.lm_head.weight.device
    logits = model(ids.to(device), cache, last.to(device))[:, 0]
    probabilities = logits.float()[:, data.fixed_ids(tokenizer)[1]].softmax(dim=-1)
    return [{"prediction": max(range(3), key=row.__getitem__), "scores": row} for row in probabilities.tolist()]


def write_predictions(predictions: list[dict], path: Path) -> None:
    with checkpoint.replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions))


def table(results: dict[str, dict[str, dict]]) -> str:
    """{"baseline": {split: result}, ...} as text, a line per stage and split."""
    lines = [f"{'':10}  {'split':24} {'accuracy':>8} {'correct':>8} {'rows':>7} {'unparsed':>8}"]
    for stage, splits in results.items():
        for split, r in splits.items():
            lines.append(f"{stage:10}  {split:24} {r['accuracy']:8.4f} {r['correct']:8,} {r['n']:7,} {r['unparsed']:8,}")
    return "\n".join(lines)


def fast_dtype() -> str:
    """"bf16" on a GPU and on CPUs with AVX-512 or better; on others PyTorch multiplies in bf16 some ten times slower than in fp32."""
    fast = torch.cuda.is_available() or torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if fast else "fp32"


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
    group.add_argument("--dtype", type=dtype_name, choices=DTYPES, default=fast_dtype(),
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
    parser.add_argument("--premise", help="one pair instead of a dataset; with --hypothesis")
    parser.add_argument("--hypothesis")
    parser.add_argument("--out", type=Path, help="write results.json and predictions_<split>.jsonl here")
    if adapter := parser.parse_args().adapter:
        data.set_defaults(parser, trained_with(adapter), adapter)
    args = data.parse_arguments(parser)
    if (args.premise is None) != (args.hypothesis is None):
        parser.error("--premise and --hypothesis go together")
    directory = checkpoint.locate(args.model)
    device, tokenizer = ranks.start(args.device), data.load_tokenizer(directory)
    model = load_model(directory, args.quant, DTYPES[args.dtype], device, args.double_quant, args.keep_dequantized).eval()
    if args.adapter:
        config = lora.load_adapter(model, args.adapter)
        adapted = len(lora.lora_parameters(model)) // 2
        print(f"{args.adapter}: rank {config.rank}, {adapted}/{adapted} modules adapted")

    if args.premise is not None:
        pair = {"premise": args.premise, "hypothesis": args.hypothesis, "label": 0}
        prompt, _ = data.encode(pair, tokenizer, args.max_length)
        written, scored = (answer(model, tokenizer, [prompt], None, args.max_new_tokens)[0] for answer in (complete, score))
        print(f"completion: {written['completion']!r}")
        for label, probability in enumerate(scored["scores"]):
            print(f"{label} {data.LABELS[label]:14} {probability:.4f}" + "  <-" * (label == scored["prediction"]))
        return

    results = {}
    for split in args.split or data.validation_splits(args.dataset):
        examples = data.load_examples(args.dataset, split, args.limit)
        results[split], predictions = evaluate(model, tokenizer, examples, args.mode, args.max_new_tokens, args.batch_size,
                                               args.max_length, split)
        if args.out and ranks.FIRST:
            args.out.mkdir(parents=True, exist_ok=True)
            write_predictions(predictions, args.out / f"predictions_{split}.jsonl")
    stage = "finetuned" if args.adapter else "baseline"
    print(table({stage: results}))
    if args.out and ranks.FIRST:
        report = {"protocol": protocol(args.mode, args.max_new_tokens), stage: results}
        checkpoint.write_json(args.out / "results.json", report)


def trained_with(adapter: Path) -> dict:
    """The arguments an adapter was trained with, as defaults: all that concern evaluation, or the model alone."""
    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"{adapter} is not an adapter: it has no adapter_config.json")
    found = {"model": checkpoint.read_json(path).get("base_model_name_or_path")}
    if not found["model"]:
        raise ValueError(f"{path} does not name its base model; pass --model")
    if (adapter / "args.json").is_file():
        names = ("dataset", "quant", "double_quant", "keep_dequantized", "dtype", "max_length")
        saved = checkpoint.read_json(adapter / "args.json")
        found |= {name: saved[name] for name in names if name in saved}
    return found


def protocol(mode: str, max_new_tokens: int) -> dict:
    """What results.json says about how accuracy was measured."""
    if mode == "score":
        return {"mode": mode, "prompt": data.PROMPT, "answers": [" 0", " 1", " 2"]}
    return {"mode": mode, "prompt": data.PROMPT, "decoding": "greedy", "max_new_tokens": max_new_tokens, "parse": data.NUMBER.pattern}


if __name__ == "__main__":
    data.run(main)
    ranks.stop()
