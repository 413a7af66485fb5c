"""Fingerprints: what an adapter was trained over, so that it is not used over anything else.

Another prompt, tokenizer, base or quantisation would raise no error by itself. Accuracy would
be lower, and nobody would know why.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from support.rows import Rows

FILE = "adapter_model.safetensors"
# Words, digits, an apostrophe, white space: tokenizers split these in different places.
SAMPLE = "One quick fox isn't 12,345 of them.\n\n"


def compute(
    weight_files: list[Path], tokenizer: Tokenizer, prompt: str, quantization: str
) -> dict[str, str]:
    """Returns a fingerprint: quantisation, and digests of prompt, tokenizer and base weights."""
    # The tokenizer's behaviour, not its file, which library versions write differently.
    # Sorted, because get_vocab has no fixed order.
    vocabulary = sorted(tokenizer.get_vocab().items())
    behaviour = json.dumps([vocabulary, tokenizer.encode(SAMPLE).ids])
    return {
        "prompt": digest(prompt.encode()),
        "tokenizer": digest(behaviour.encode()),
        "base_weights": digest_weights(weight_files),
        "quantization": quantization,
    }


def stamp(adapter: Path, record: dict[str, str]) -> None:
    """Adds strings, such as a fingerprint, to the metadata of an adapter's file.

    A safetensors file begins with the length of its header, in 8 bytes, and then the header, in
    JSON. The library writes metadata in no fixed order; here it is sorted, so that the same
    adapter gives the same bytes.
    """
    path = adapter / FILE
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] |= record
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def recorded(adapter: Path) -> dict[str, str]:
    """Returns the metadata of an adapter's file, or {} if there is none."""
    try:
        with safe_open(adapter / FILE, framework="numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):  # loading the adapter will report what is wrong
        return {}


def check(adapter: Path, here: dict[str, str]) -> None:
    """Raises ValueError if an adapter's fingerprint differs from `here`.

    A file from PEFT has no fingerprint, so there is nothing to compare.
    """
    there = recorded(adapter)
    for name, value in here.items():
        if there.get(name, value) != value:
            raise ValueError(
                f"{adapter} was trained with another {name.replace('_', ' ')} "
                f"({there[name]}, here {value}); --force uses it anyway"
            )


def recorded_quantization(adapter: Path) -> dict[str, str | bool]:
    """Returns the quantisation flags that an adapter's file records, or {} if it has none."""
    quantization = recorded(adapter).get("quantization", "")
    if not quantization:
        return {}
    name, _, double = quantization.partition(", ")
    return {"quant": name, "double_quant": double == "double"}


def digest_weights(weight_files: list[Path]) -> str:
    """Returns a digest of the names of all tensors and of each one's first values, up to 64.

    Fine-tuning changes the first row of nearly every tensor, so this distinguishes two models,
    and it reads only a few megabytes.
    """
    rows = {}
    for path in weight_files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                # A slice reads only its part of the file, not the whole tensor.
                values = file.get_slice(key)[:1].flatten()[:64]
                # numpy has no bf16; fp32 represents every bf16 and fp16 value exactly.
                rows[key] = values.float().numpy().tobytes()
    # Sorted by name, so that it does not matter how a model is split into files.
    return digest(b"".join(key.encode() + rows[key] for key in sorted(rows)))


def digest_rows(*splits: "Rows") -> str:
    """Returns a digest of the parts of the rows that a run uses: both texts and the label."""
    import pyarrow
    from pyarrow import compute

    content = hashlib.sha256()
    for rows in splits:
        for column in ("premise", "hypothesis", "label"):
            for batch in rows.table.select([column]).to_batches(max_chunksize=10_000):
                if not len(batch):
                    continue
                # Arrow joins the texts in a list. A zero byte follows each text.
                texts = batch.column(0).cast(pyarrow.string())
                one_list = pyarrow.ListArray.from_arrays([0, len(texts)], texts)
                content.update(compute.binary_join(one_list, "\0")[0].as_buffer())
                content.update(b"\0")
    return content.hexdigest()[:16]


def digest(content: bytes) -> str:
    """Returns the first 16 hex digits of the SHA-256, enough for this and short in an error."""
    return hashlib.sha256(content).hexdigest()[:16]
