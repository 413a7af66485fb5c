"""What happens if memory runs out: an evaluation continues with fewer rows at a time.

If nothing can continue, the error gets a note, which cli.run prints: what did not fit, and which
flags help. A flag that is already in use is not suggested.

torch is imported where it is used, so that --help need not wait for it.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from support import commands

if TYPE_CHECKING:
    import torch
    from torch import nn

# Parts of torch's error messages: on a CPU; for a file there; on a Mac's GPU, or if CUDA itself
# finds no memory; if cuBLAS finds none.
TEXTS = (
    "DefaultCPUAllocator", "Cannot allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an error means that there is no memory left for a tensor or a library."""
    # By name, because using the class would import torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS)


# -----------------------------------------------------------------------------
# Fewer rows at a time


def run_in_parts(
    run: Callable[[list], list], prompts: list[list[int]], settings, model: nn.Module
) -> list:
    """Returns a result for each prompt, by calling run(part) on settings.batch_size prompts each.

    If a part does not fit, halves settings.batch_size and prints a line on stderr. Later calls
    start with the smaller size. Raises the error if even a single prompt does not fit.
    """
    from tqdm import tqdm

    results = []
    is_halved = False
    while len(results) < len(prompts):
        part = prompts[len(results) : len(results) + settings.batch_size]
        found = run_if_it_fits(run, part, model)
        if found is None:
            settings.batch_size = len(part) // 2
            is_halved = True
            continue
        results += found
        if is_halved:  # printed once, when a size has worked
            # print would break the progress bar.
            tqdm.write(
                f"{memory_of(model)} is full: evaluation goes on with a batch size of "
                f"{settings.batch_size}",
                file=sys.stderr,
            )
            is_halved = False
    return results


def run_if_it_fits(
    run: Callable[[list], list], prompts: list[list[int]], model: nn.Module
) -> list | None:
    """Returns run(prompts), or None if memory runs out with more than one prompt."""
    import torch

    try:
        return run(prompts)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if len(prompts) == 1:
            error.add_note(about_a_prompt(prompts[0], model))
            raise
    # Not earlier: the error referred to the frames it passed through, and these to tensors.
    gc.collect()
    torch.cuda.empty_cache()  # memory divided into blocks of one size can then serve another size
    return None


# -----------------------------------------------------------------------------
# What helps


@contextmanager
def explained(describe: Callable[..., str], *details) -> Iterator[None]:
    """Adds describe(*details) as a note to an error that means that the memory is full."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            error.add_note(describe(*details))
        raise


def about_loading(model: nn.Module, dtype: torch.dtype) -> str:
    """Returns what helps if the base does not fit, and how much memory it takes."""
    size = sum(parameter.numel() * dtype.itemsize for parameter in model.parameters())
    # A model may hold its dequantised weights already, which are no part of the base.
    buffers = [buffer for name, buffer in model.named_buffers() if not name.endswith(".kept")]
    size += sum(buffer.nbytes for buffer in buffers)
    cures = [*kept_values(model), *quantization(model), *another_device(model)]
    takes = f"{size / 2**20:,.1f} MiB"
    return f"the model, {takes}, does not fit into {memory_of(model)}{either(cures)}"


def about_a_prompt(prompt: list[int], model: nn.Module) -> str:
    """Returns what helps if a single prompt does not fit beside the model."""
    row = f"a row of {len(prompt)} tokens"
    cures = [*kept_values(model), f"a --max-length below {len(prompt)}", *another_device(model)]
    return f"not even {row} fits into {memory_of(model)} beside the model{either(cures)}"


def about_a_step(args: argparse.Namespace, model: nn.Module) -> str:
    """Returns what helps if a step of train.py does not fit."""
    resumed, anew = flags_of_a_step(args, model)
    cures = [f"a new run with {' or '.join(anew)}"]
    if resumed:
        cures.insert(0, f"{commands.resume(args.out)} {' '.join(resumed)}")
    return f"a step of training does not fit into {memory_of(model)}{either(cures)}"


def flags_of_a_step(args: argparse.Namespace, model: nn.Module) -> tuple[list[str], list[str]]:
    """Returns flags that save memory in a step: those that a resume may change, and the others.

    In each list the flags that cost the least time come first.
    """
    resumed = kept_values(model)
    if not args.checkpointing:
        if not resumed and not model.model.recomputes_attention and args.device != "cpu":
            resumed.append("--no-keep-dequantized")  # then attention is recomputed
        resumed.append("--checkpointing")

    anew = []
    if args.batch_size > 1:
        # The number of rows in a step stays the same.
        parts = args.batch_size if args.batch_size % 2 else 2
        size = args.batch_size // parts
        anew.append(f"--batch-size {size} --accumulate {args.accumulate * parts}")
    return resumed, [*anew, "a --max-length that cuts the longest rows", *quantization(model)]


def either(cures: list[str]) -> str:
    return f"; what helps: {', or '.join(cures)}" if cures else ""


def kept_values(model: nn.Module) -> list[str]:
    """Returns the flag that drops the kept values, the dequantised weights, if any are stored."""
    is_kept = any(layer.kept is not None for layer in nf4_layers(model))
    return ["--no-keep-dequantized"] if is_kept else []


def quantization(model: nn.Module) -> list[str]:
    """Returns the flag that stores the base in fewer bits."""
    layers = nf4_layers(model)
    if not layers:
        return ["--quant nf4"]
    return [] if layers[0].double_quant else ["--double-quant (0.37 bit a weight)"]


def nf4_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "double_quant")]


def another_device(model: nn.Module) -> list[str]:
    return ["--device cpu"] if memory_of(model) == "the GPU" else []


def memory_of(model: nn.Module) -> str:
    """Returns the name of the memory that holds a model, which may be partly loaded."""
    devices = {parameter.device.type for parameter in model.parameters()}
    return "the memory" if devices <= {"cpu", "meta"} else "the GPU"
