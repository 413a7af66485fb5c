"""What happens if memory runs out: an evaluation continues with fewer rows at a time.

If a step of training does not fit, the error gets a note, which cli.run prints: which flags help.
A flag that is already in use is not suggested.

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


def run_in_parts(run: Callable[[list], list], prompts: list[list[int]], protocol) -> list:
    """Returns a result for each prompt, by calling run(part) on protocol.batch_size prompts each.

    If a part does not fit, halves protocol.batch_size and prints a line on stderr. Later calls
    start with the smaller size. Raises the error if even a single prompt does not fit.
    """
    from tqdm import tqdm

    results = []
    while len(results) < len(prompts):
        part = prompts[len(results) : len(results) + protocol.batch_size]
        found = run_if_it_fits(run, part)
        if found is not None:
            results += found
            continue
        protocol.batch_size = len(part) // 2
        # print would break the progress bar.
        tqdm.write(
            f"the memory is full: evaluation goes on with a batch size of {protocol.batch_size}",
            file=sys.stderr,
        )
    return results


def run_if_it_fits(run: Callable[[list], list], prompts: list[list[int]]) -> list | None:
    """Returns run(prompts), or None if memory runs out with more than one prompt."""
    import torch

    try:
        return run(prompts)
    except Exception as error:
        if not is_out_of_memory(error) or len(prompts) == 1:
            raise
    # Not earlier: the error referred to the frames it passed through, and these to tensors.
    gc.collect()
    torch.cuda.empty_cache()  # memory divided into blocks of one size can then serve another size
    return None


# -----------------------------------------------------------------------------
# What helps


@contextmanager
def step_explained(args: argparse.Namespace, model: nn.Module) -> Iterator[None]:
    """Adds to an error in a step of training, if the memory is full, with which flags it fits."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            error.add_note(about_a_step(args, model))
        raise


def about_a_step(args: argparse.Namespace, model: nn.Module) -> str:
    """Returns what helps if a step of train.py does not fit."""
    resumed, anew = flags_of_a_step(args, model)
    cures = [f"a new run with {' or '.join(anew)}"]
    if resumed:
        cures.insert(0, f"{commands.resume(args.out)} {' '.join(resumed)}")
    return f"a step of training does not fit into the memory{either(cures)}"


def flags_of_a_step(args: argparse.Namespace, model: nn.Module) -> tuple[list[str], list[str]]:
    """Returns flags that save memory in a step: those that a resume may change, and the others.

    In each list the flags that cost the least time come first.
    """
    layers = [module for module in model.modules() if hasattr(module, "double_quant")]  # NF4Linear
    is_kept = any(layer.kept is not None for layer in layers)
    resumed = []
    # On a GPU without kept values attention is recomputed.
    can_recompute = args.device != "cpu" and not model.model.recomputes_attention
    if is_kept or (can_recompute and not args.checkpointing):
        resumed.append("--no-keep-dequantized")
    if not args.checkpointing:
        resumed.append("--checkpointing")

    anew = []
    if args.batch_size > 1:
        # The number of rows in a step stays the same.
        parts = args.batch_size if args.batch_size % 2 else 2
        size = args.batch_size // parts
        anew.append(f"--batch-size {size} --accumulate {args.accumulate * parts}")
    anew.append("a --max-length that cuts the longest rows")
    if not layers:
        anew.append("--quant nf4")
    elif not layers[0].double_quant:
        anew.append("--double-quant (0.37 bit a weight)")
    return resumed, anew


def either(cures: list[str]) -> str:
    return f"; what helps: {', or '.join(cures)}"
