"""MNLI as prompts: the wording, the token ids, the examples of a dataset and the order they are read in.

Fourth in the reading order. A prompt ends in "### Label:" and the answer is one token, " 0", " 1" or " 2", followed by
the end-of-text token, so that the model learns to stop. Ids are joined as lists and never encoded as one string: what
the model is asked at evaluation is then, id for id, what it saw in training.

    python data.py                                  # the embedded data of tiny/, or MNLI where there is a GPU
    python data.py --dataset nyu-mll/glue --model microsoft/phi-2 --plot lengths.png
"""
import argparse
import functools
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

PROMPT = ("You are given a premise and a hypothesis below. If the premise entails the  hypothesis, return 0. "
          "If the premise contradicts the hypothesis, return 2.  Otherwise, if the premise does neither, return 1.\n\n"
          "### Premise: {premise}\n\n### Hypothesis: {hypothesis}\n\n### Label:")
PREFIX = PROMPT[:PROMPT.index(" {premise}")]  # what all prompts have in common
LABELS = ("entailment", "neutral", "contradiction")  # answered " 0", " 1", " 2"
EOS = "<|endoftext|>"
NUMBER = re.compile(r"\d{1,3}(?:,\d{3})*(?:\.\d+)?")
READERS = {".parquet": "parquet", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"}


# ---------------------------------------------------------------------------------------------------------
# Tokens

def load_tokenizer(directory: Path):
    """The tokenizer.json of a model directory. Raises ValueError unless each answer is one token."""
    from tokenizers import Tokenizer
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no tokenizer.json")
    tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.token_to_id(EOS) is None:
        raise ValueError(f"{path} has no token {EOS}")
    for label in range(3):
        if len(tokenizer.encode(f" {label}").ids) != 1:
            raise ValueError(f"{path} cuts the answer ' {label}' into several tokens; it must be one")
    return tokenizer


@functools.cache
def fixed_ids(tokenizer) -> tuple[list[int], list[int], int]:
    """The ids that all examples share: of the prefix, of " 0", " 1", " 2" (phi-2: 657, 352, 362), of the end of text."""
    answers = [tokenizer.encode(f" {label}").ids[0] for label in range(3)]
    return tokenizer.encode(PREFIX).ids, answers, tokenizer.token_to_id(EOS)


def encode(example: dict, tokenizer, max_length: int | None = None) -> tuple[list[int], list[int]]:
    """(prompt_ids, answer_ids): prefix, premise, hypothesis; then the label and the end of text.

    Prompt and answer longer than `max_length` together lose the end of the premise, never anything else. Raises
    ValueError when the rest alone is too long.
    """
    prefix, answers, eos = fixed_ids(tokenizer)
    text = PROMPT[len(PREFIX):].format(premise=example["premise"], hypothesis=example["hypothesis"])
    prompt, answer = prefix + tokenizer.encode(text).ids, [answers[example["label"]], eos]
    if max_length and len(prompt) + len(answer) > max_length:
        tail = tokenizer.encode(PROMPT.split("{premise}")[1].format(hypothesis=example["hypothesis"])).ids
        room = max_length - len(prefix) - len(tail) - len(answer)
        if room < 0:
            raise ValueError(f"the hypothesis {example['hypothesis'][:40]!r}... alone exceeds --max-length {max_length}")
        prompt = prefix + tokenizer.encode(" " + example["premise"]).ids[:room] + tail
    return prompt, answer


def parse(completion: str) -> int:
    """The first number of a completion, its integer part, or -1: "1" and "1.5" are 1, "10" is 10 (and wrong)."""
    found = NUMBER.search(completion)
    return int(found.group().split(".")[0].replace(",", "")) if found else -1


def settled(completion: str) -> bool:
    """True when nothing that could follow would change what `parse` reads: the first number has ended."""
    found = NUMBER.search(completion)
    return found is not None and not re.fullmatch(r"(,\d{0,2})?\ufffd*", completion[found.end():])


# ---------------------------------------------------------------------------------------------------------
# Examples

@functools.cache
def load_splits(dataset: str) -> dict:
    """All splits of a directory or of a dataset on the Hub, as `datasets.Dataset` by name."""
    import datasets
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    directory = Path(dataset)
    if directory.is_dir():
        splits = {}
        for path in sorted(directory.iterdir()):
            if path.suffix in READERS and re.match("train|validation|test", path.name):
                splits.setdefault(re.sub(r"-\d+-of-\d+$", "", path.stem), []).append(path)
        if not splits:
            raise ValueError(f"{directory} holds no train.* or validation*.* file ({', '.join(READERS)})")
        return {split: read_files(paths) for split, paths in splits.items()}
    if dataset.count("/") != 1 or dataset.startswith((".", "/", "~")):
        raise ValueError(f"no dataset directory {dataset!r}, and it is not a Hub id (owner/name)")
    try:
        return dict(datasets.load_dataset(dataset, "mnli" if dataset == "nyu-mll/glue" else None))
    except (OSError, ValueError) as error:  # what the datasets library raises when it cannot reach or find a dataset
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        raise ValueError(f"cannot load {dataset!r} from the Hub, and it is no directory here ({reason}); without a network, pass a "
                         "directory instead: --dataset tiny/data, or one with train.* and validation*.* files") from None


def read_files(paths: list[Path]):
    import datasets
    options = {"sep": "\t"} if paths[0].suffix == ".tsv" else {}
    if not any(path.stat().st_size for path in paths):
        raise ValueError(f"{paths[0]} is empty")
    try:
        return datasets.load_dataset(READERS[paths[0].suffix], data_files=[str(path) for path in paths], split="train", **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(f"cannot read {paths[0]}: {str(error.__cause__ or error).splitlines()[0]}") from None


def validation_splits(dataset: str) -> list[str]:
    """Names of the splits that evaluation takes by default: validation_matched and validation_mismatched in MNLI."""
    names = [name for name in load_splits(dataset) if name.startswith("validation")]
    if not names:
        raise ValueError(f"{dataset} has no validation split, only {', '.join(load_splits(dataset))}")
    return names


def load_examples(dataset: str, split: str, limit: int | None = None):
    """The first `limit` labelled rows of a split: a `datasets.Dataset` of premise, hypothesis and label (0, 1, 2).

    Labels may be ints or the words of `LABELS`. Rows of label -1 (GLUE's hidden ones) are dropped, with a line that
    says so. Raises ValueError for a missing split or column, any other label, and when no row is left.
    """
    splits = load_splits(dataset)
    if split not in splits:
        raise ValueError(f"{dataset} has no split {split!r}, only {', '.join(splits)}")
    rows = splits[split]
    if absent := {"premise", "hypothesis", "label"} - set(rows.column_names):
        raise ValueError(f"{dataset}, {split}: no column {', '.join(sorted(absent))}; there are {', '.join(rows.column_names)}")
    raw = rows["label"][:]
    labels = [LABELS.index(label) if label in LABELS else label for label in raw]
    for row, label in enumerate(labels):
        if label not in (-1, 0, 1, 2) or isinstance(label, bool):
            raise ValueError(f"{dataset}, {split}, row {row}: label {label!r} is not 0, 1, 2 or {', '.join(LABELS)}")
    for column in ("premise", "hypothesis"):
        if rows.features[column].dtype not in ("string", "large_string"):
            raise ValueError(f"{dataset}, {split}: column {column} holds {rows.features[column].dtype}, not text")
        if None in (texts := rows[column][:]):
            raise ValueError(f"{dataset}, {split}, row {texts.index(None)}: no {column}")
    kept = [row for row, label in enumerate(labels) if label != -1]
    if not kept:
        raise ValueError(f"{dataset}, {split}: no labelled row")
    if len(kept) < len(labels):
        print(f"{split}: {len(labels) - len(kept)} rows without a label dropped", file=sys.stderr)
    if labels != raw:
        rows = rows.remove_columns("label").add_column("label", labels)
    return rows.select(kept[:limit]) if len(kept[:limit]) < len(labels) else rows


def batches(examples, size: int, seed: int, start: int = 0) -> Iterator[list[dict]]:
    """Endless lists of `size` examples, the shortest first, from number `start` on.

    Each epoch is a permutation drawn from (seed, epoch) alone: what list n holds depends on nothing that came before,
    so a run can go on at any. An epoch takes each row once; its last list has what is left. `row` counts from 0.
    """
    lengths = torch.tensor([len(premise) + len(hypothesis) for premise, hypothesis in zip(examples["premise"], examples["hypothesis"])])
    in_epoch, epoch = -(-len(examples) // size), None
    for number in itertools.count(start):
        if epoch != number // in_epoch:
            epoch = number // in_epoch
            order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        first = number % in_epoch * size
        rows = order[first:first + size]
        yield [examples[row] | {"row": row} for row in rows[lengths[rows].argsort(stable=True)].tolist()]


def collate(encoded: list[tuple[list[int], list[int]]], skip: int, loss: str) -> tuple[Tensor, Tensor, Tensor]:
    """A batch for the loss: ids (B, T) padded on the right; the places that predict; their targets.

    The first `skip` ids of each prompt are left to a cache. `loss` "answer" has two targets a row, the label and the
    end of text, predicted at columns (B, 2); "full" has every id after the first, at places counted through all rows.
    Targets are found by length: what the padding is does not matter.
    """
    rows = [torch.tensor(prompt[skip:] + answer) for prompt, answer in encoded]
    ids = torch.nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) - 1 for row in rows])
    if loss == "full":
        return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).flatten().nonzero()[:, 0], torch.cat([row[1:] for row in rows])
    return ids, lengths[:, None] - torch.tensor([2, 1]), torch.cat([row[-2:] for row in rows])


# ---------------------------------------------------------------------------------------------------------
# Command lines: what train.py, eval.py and this file share

class Parser(argparse.ArgumentParser):
    """argparse with one line for a wrong flag, full words only, and @FILE for flags from a file, one to a line."""

    source = ""  # the file that the arguments are from, for errors

    def __init__(self, description: str, **options):
        super().__init__(description=description, fromfile_prefix_chars="@", allow_abbrev=False, **options)

    def error(self, message: str):
        self.exit(2, f"error: {self.source}{message}; see python {self.prog} --help\n")


def parse_arguments(parser: Parser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parses a command line. Where it names no model, that is phi-2, or without a GPU what tiny/args says."""
    args = parser.parse_args(argv)
    if args.model is None:
        if not torch.cuda.is_available():
            print("no CUDA device and no --model: taking tiny/args (a 3 M parameter model, its data, its learning rate and steps) for "
                  "what is not given. For phi-2: --model microsoft/phi-2 --dataset nyu-mll/glue", file=sys.stderr)
            root = Path(__file__).resolve().parent
            embedded, _ = parser.parse_known_args([f"@{root / 'tiny' / 'args'}"])
            embedded.model, embedded.dataset = (os.path.relpath(root / name) for name in (embedded.model, embedded.dataset))
            return parser.parse_args(argv, embedded)
        args.model = "microsoft/phi-2"
    args.dataset = args.dataset or "nyu-mll/glue"
    return args


def run(main: Callable[[], None]) -> None:
    """Calls a script's main; what a user can put right becomes one line and exit status 1 (--debug: the traceback)."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # so that a log file or a pipe sees each line at once
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if "--debug" in sys.argv:
            raise
        hint = "; lower --batch-size and raise --accumulate" if isinstance(error, torch.OutOfMemoryError) else ""
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""  # under torchrun
        sys.exit(f"error: {rank}" + " ".join(str(error).split()) + hint)


def main() -> None:
    parser = Parser("what is in a dataset: rows, labels, token lengths, examples")
    parser.add_argument("--dataset", help="Hub id, or directory of train.* and validation*.* (default: nyu-mll/glue, no GPU: tiny/data)")
    parser.add_argument("--model", help="the model whose tokenizer counts (default: microsoft/phi-2, no GPU: tiny/model)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the token lengths and the labels of each split here")
    parser.add_argument("--limit", type=int, help="rows of each split to look at")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parse_arguments(parser)
    import numpy
    from tqdm import tqdm

    import report
    from checkpoint import locate
    tokenizer, lengths, labels = load_tokenizer(locate(args.model, ["config.json", "tokenizer.json"])), {}, {}
    for split in (split for split in load_splits(args.dataset) if not split.startswith("test")):  # GLUE keeps those labels to itself
        examples = load_examples(args.dataset, split, args.limit)
        encoded = [encode(example, tokenizer)[0] for example in tqdm(examples, desc=split, leave=False, delay=2, disable=None)]
        lengths[split] = numpy.array([len(ids) for ids in encoded]) + 1
        counts = labels[split] = numpy.bincount(examples["label"], minlength=3)
        print(f"\n{split}: {len(examples):,} rows; " + ", ".join(f"{count:,} {name}" for name, count in zip(LABELS, counts)))
        low, middle, p95, p99, high = numpy.percentile(lengths[split], [0, 50, 95, 99, 100]).astype(int)
        print(f"  tokens of prompt and label: {low} to {high}, median {middle}, 95% up to {p95}, 99% up to {p99}")
        for label in range(3):
            first = next((example for example in examples if example["label"] == label), None)
            if first:
                print(f"  {label} {LABELS[label]}: {first['premise'][:120]} -> {first['hypothesis'][:80]}")
    if args.plot:
        report.draw_lengths(lengths, labels, args.dataset, args.plot)
        print(f"\nlengths and labels are drawn in {args.plot}")


if __name__ == "__main__":
    run(main)
