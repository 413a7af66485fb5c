"""What an adapter was trained over, in few letters, so that it is not used over anything else."""

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

SAMPLE = "One quick fox isn't 12,345 of them.\n\n"  # words, digits, an apostrophe, white space


def fingerprint(
    weight_files: list[Path], tokenizer: Tokenizer, prompt: str, quantization: str
) -> dict[str, str]:
    """Returns digests of the prompt, the tokenizer and the base's weights, and the quantisation."""
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.encode(SAMPLE).ids])
    return {
        "prompt": digest(prompt.encode()),
        "tokenizer": digest(vocabulary.encode()),
        "base_weights": digest_weights(weight_files),
        "quantization": quantization,
    }


def digest_weights(weight_files: list[Path]) -> str:
    """Returns a digest of all names and of the first values of each tensor.

    A fine-tune changes the first row of nearly every tensor, so this tells two models apart, and
    it reads a few megabytes instead of all.
    """
    rows = {}
    for path in weight_files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    rows[key] = first_values(file.get_slice(key))
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged or cut short ({error}): download it again"
            ) from None
    return digest(b"".join(key.encode() + rows[key] for key in sorted(rows)))


def first_values(tensor) -> bytes:
    """Returns up to 64 values of a tensor's first row, as fp32."""
    return tensor[:1].flatten()[:64].float().numpy().tobytes()


def digest(content: bytes) -> str:
    """Returns the first 16 hex digits of the SHA-256: short enough to be read in an error."""
    return hashlib.sha256(content).hexdigest()[:16]
