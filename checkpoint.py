"""What lies on disk: a model as it comes from the Hub or a directory, and a training run that can go on from where it was.

Read it when another file asks for it. A file is written under another name, synced, and renamed: it is there whole or not at
all. Tensors lie in safetensors, never in pickles, with a SHA-256 of everything in the file, so that a flipped bit is found.

trainer.safetensors is all that a run goes on from: adapter, optimiser, state of the random generators, and, as JSON in its
metadata, the step, the arguments and the sums since the last line of metrics.jsonl. The order of the rows needs nothing: it
is a function of seed and step.
"""
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

FILES = ["config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json"]
NAME = "trainer.safetensors"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the path this gives; at the end it is synced and takes the place of `path` in one step."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk, for one
        raise OSError(f"cannot write {path}: {error.strerror or error}; what was saved before is as it was") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError, in one line, when it holds anything else."""
    return parse_line(Path(path).read_bytes(), str(path))


def write_json(path: Path, value) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def write_lines(rows: list[dict], path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines. Raises ValueError, in one line, when it is missing or a line is something else."""
    if not Path(path).is_file():
        raise ValueError(f"{path} is not there")
    lines = Path(path).read_bytes().split(b"\n")
    return [parse_line(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def parse_line(line: bytes | str, place: str) -> dict:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{place} holds no JSON object")
    return found


def checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 over all names, types, shapes, bytes and metadata, in the order of their names."""
    found = hashlib.sha256(json.dumps(sorted((key, text) for key, text in metadata.items() if key != "sha256")).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, in one step, with the checksum of what is in it: the same bytes for the same content."""
    from safetensors.torch import save
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", "written_by": "FLoRA"} | (metadata or {})  # two keys that ask for a checksum: a flipped bit spoils one
    content = save(tensors, metadata | {"sha256": checksum(tensors, metadata)})
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # the library writes them in any order
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary:
        temporary.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises ValueError when it is cut short, or not as it was written."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error})") from None
    if {"written_by", "sha256"} & metadata.keys() and metadata.get("sha256") != checksum(tensors, metadata):
        raise ValueError(f"{path} is damaged: its content does not fit its checksum")
    return tensors, metadata


def digest(content: bytes | str) -> str:
    """The first 16 hex digits of its SHA-256: short enough to be read in an error."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def sample(tensor: Tensor) -> bytes:
    """64 values from all over a tensor, as fp32: enough to tell one training's weights from another's, whatever type they are kept in."""
    return tensor.flatten()[::max(1, tensor.numel() // 64)][:64].float().cpu().numpy().tobytes()


def fingerprint(model, tokenizer, prompt: str, args) -> dict[str, str]:
    """What an adapter is made for, in few letters: prompt, tokenizer, weights of the base, quantisation."""
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.encode("One quick fox isn't 12,345 of them.\n\n").ids])
    return {"prompt": digest(prompt), "tokenizer": digest(vocabulary), "base_weights": model.fingerprint,
            "quantization": args.quant + ", double" * (args.quant == "nf4" and args.double_quant)}


# ---- A model on disk or on the Hub

def locate(name: str, patterns: list[str] = FILES) -> Path:
    """The directory of a model: `name` itself if it is one, else downloaded from the Hub (or its local cache).

    Raises ValueError, in one line, when there is neither.
    """
    directory = Path(name)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ValueError(f"{directory} is not a model directory: it has no config.json")
        return directory
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"no model directory {name!r}, and it is not a Hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
    offline = "without a network, pass a directory instead: --model tiny/model, or one that holds " + ", ".join(FILES[:3])
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (RepositoryNotFoundError, HFValidationError):
        raise ValueError(f"no model {name!r}: neither a directory nor a public repository on the Hub; {offline}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(f"cannot reach the Hub for {name!r}, which is no directory here ({type(error).__name__}); {offline}") from None


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, by its index where there is one."""
    if (index := directory / "model.safetensors.index.json").is_file():
        names = read_json(index).get("weight_map")
        plain = isinstance(names, dict) and all(isinstance(name, str) and Path(name).name == name for name in names.values())
        if not plain or not names:
            raise ValueError(f"{index} has no weight_map of plain file names")
        names = sorted(set(names.values()))
    elif (directory / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        raise ValueError(f"{directory} holds no model.safetensors and no model.safetensors.index.json")
    for name in names:
        if not (directory / name).is_file():
            raise ValueError(f"{index} lists {name}, which is not there: download it again")
    return [directory / name for name in names]


def model_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """All (key, tensor) of a checkpoint, under today's names; a file opened anew for each, so that what was read leaves memory."""
    from safetensors import SafetensorError, safe_open
    for path in checkpoint_files(directory):
        try:
            for key in safe_open(path, framework="pt").keys():
                with safe_open(path, framework="pt") as file:
                    yield from rename_msft(key, file.get_tensor(key))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short ({error}): download it again") from None


def rename_msft(key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Today's (key, tensor) of one in the layout of phi-2's first upload, whose Wqkv holds the rows of q, k, v.

    A key of today's layout passes unchanged. Buffers of rotary tables, in some fine-tuned uploads, are dropped.
    """
    if key.endswith("inv_freq"):
        return
    if ".query_key_value." in key:
        raise ValueError(f"{key}: the layout of transformers 4.36 (q, k, v interleaved by head) is not supported; "
                         "download the model again, the Hub's current one has q_proj, k_proj, v_proj")
    for old, new in (("transformer.embd.wte.", "model.embed_tokens."), ("transformer.h.", "model.layers."),
                     (".ln.", ".input_layernorm."), ("lm_head.input_layernorm.", "model.final_layernorm."),
                     ("lm_head.linear.", "lm_head."), (".mixer.out_proj.", ".self_attn.dense.")):
        key = key.replace(old, new)
    if ".mixer.Wqkv." in key:
        for name, part in zip("qkv", tensor.chunk(3)):
            yield key.replace("mixer.Wqkv", f"self_attn.{name}_proj"), part
    else:
        yield key, tensor


# ---- A run

def save(directory: Path, parameters: dict[str, Tensor], optimizer, random: Tensor, state: dict) -> None:
    """Writes trainer.safetensors. `random` (ranks, bytes) uint8 is what random_state gives; `state` anything JSON can hold."""
    tensors = {f"adapter.{name}": parameter for name, parameter in parameters.items()} | {"random": random}
    for number, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value for key, value in entry.items()}
    write_tensors(directory / NAME, tensors, {"state": json.dumps(state)})


def load(directory: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the state of trainer.safetensors. Raises ValueError when it is missing, damaged or not of this form."""
    path = Path(directory) / NAME
    if not path.is_file():
        raise ValueError(f"{directory} holds no {NAME}: nothing to go on from")
    tensors, metadata = read_tensors(path)
    try:
        state = json.loads(metadata["state"])
        sound = is_state(state)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        sound = False
    if not sound or "sha256" not in metadata:
        raise ValueError(f"{path} was not written by train.py: it has no checksum, or another state")
    return tensors, state


def is_state(state: dict) -> bool:
    """Whether train.py can go on from this; or the KeyError, TypeError, ValueError or AttributeError of what it is not."""
    step, logged, *counts, total = state["loop"]
    numbers = [total] + [result[key] for result in state["baseline"].values() for key in ("accuracy", "n", "correct", "unparsed")]
    return (len(counts) == 3 and all(type(count) is int for count in (step, logged, *counts)) and 0 <= logged <= step == state["step"]
            and all(type(state[key]) is int and state[key] > 0 for key in ("steps", "rows", "size"))
            and all(type(number) in (int, float) for number in numbers) and isinstance(state["arguments"], dict))


def arguments(directory: Path, known: Iterable[str]) -> dict:
    """The arguments of a run, of those `known`. Raises ValueError when the directory holds no run."""
    if (directory / NAME).is_file():
        found = load(directory)[1]["arguments"]
    elif (directory / "args.json").is_file():  # it had not come to its first step
        found = read_json(directory / "args.json")
    else:
        raise ValueError(f"{directory} holds no run to go on with: no {NAME} and no args.json")
    return {key: found[key] for key in known if key in found}


def trained_with(adapter: Path) -> dict:
    """The arguments an adapter was trained with, as defaults: all that concern evaluation, or the model alone."""
    path = adapter / "adapter_config.json"
    if not path.is_file():
        why = "it has no adapter_config.json" if adapter.is_dir() else "there is no such folder"
        raise ValueError(f"{adapter} is not an adapter: {why}")
    found = {"model": read_json(path).get("base_model_name_or_path")}
    if not found["model"]:
        raise ValueError(f"{path} does not name its base model; pass --model")
    if (adapter / "args.json").is_file():
        names = ("dataset", "quant", "double_quant", "keep_dequantized", "dtype", "max_length")
        saved = read_json(adapter / "args.json")
        found |= {name: saved[name] for name in names if name in saved}
    return found | {name: above(found[name], adapter) for name in ("model", "dataset") if name in found}


def above(name, run: Path):
    """A path that a run was started with, from here too: as it is, or below a folder that the run lies in; any other name unchanged."""
    for folder in (Path(), *Path(run).resolve().parents) if isinstance(name, str) else ():
        if (folder / name).is_dir():
            return str(folder / name)
    return name


def set_defaults(parser, saved: dict, path: Path) -> dict:
    """Makes the arguments that a file holds the parser's defaults, once they have passed as if they were typed; gives them so."""
    argv, parser.source = [], f"{path}: "
    for name, value in saved.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, list) and not any(str(item).startswith(("-", "@")) for item in value):
            argv += [flag, *map(str, value)]
        elif isinstance(value, bool):  # a flag that is off is not typed, unless it is on by default
            argv += [flag] if value else [flag.replace("--", "--no-", 1)] if parser.get_default(name) else []
        elif value is not None:
            argv.append(f"{flag}={value}")
    found, parser.source = parser.parse_args(argv), ""
    defaults = {name: getattr(found, name) for name in saved}
    parser.set_defaults(**defaults)
    return defaults


def restore(tensors: dict[str, Tensor], parameters: dict[str, Tensor], optimizer, rank: int) -> None:
    """Puts what `save` wrote back in its place: adapter, optimiser, this rank's random generators.

    Raises ValueError when the tensors are not those of this adapter.
    """
    shapes = {f"adapter.{name}": parameter.shape for name, parameter in parameters.items()}
    if any(name.startswith("optimizer.") for name in tensors):  # there is none before the first step
        for number, parameter in enumerate(parameters.values()):
            shapes |= {f"optimizer.{number}.{key}": parameter.shape for key in ("exp_avg", "exp_avg_sq")} | {f"optimizer.{number}.step": ()}
    random = tensors.get("random", torch.empty(0))
    if {name: tensor.shape for name, tensor in tensors.items() if name != "random"} != shapes or random.ndim != 2 or rank >= len(random):
        raise ValueError(f"{NAME} does not hold the tensors of this adapter and its optimiser")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"adapter.{name}"])
    entries: dict[int, dict] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            entries.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": entries})
    try:
        set_random_state(random[rank])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{NAME} holds no state of a random generator: {error}") from None


def lines_up_to(path: Path, step: int, steps: int) -> list[str]:
    """The whole lines of a metrics.jsonl that belong to no later step; not the evaluation of the last of `steps`, which is done again."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.is_file() else []:
        try:
            found = json.loads(line)
            if line.endswith("\n") and found["step"] <= step and ("loss" in found or found["step"] < steps):
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # cut short, or damaged
            continue
    return kept


def random_state(device: torch.device) -> Tensor:
    """The state of the CPU's generator and, on a GPU, of the GPU's, as bytes."""
    parts = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return torch.cat(parts)


def set_random_state(state: Tensor) -> None:
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].clone())
    if len(state) > size:
        torch.cuda.set_rng_state(state[size:])
