"""Element-wise functions as one GPU kernel, by torch.compile.

Run separately, each step of such a function would read and write its whole tensors.
"""

import functools
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

CAN_COMPILE = find_spec("triton") is not None  # until it has failed once


def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns `function` in a form that runs as one kernel on a GPU, with the same results.

    torch.compile generates the kernel at the first call, and one for the backward pass at the
    first call with gradients, which takes seconds. The number of tokens may change between
    calls. Compiling needs Triton (which torch includes for CUDA on Linux), a C compiler and
    Python.h. The function runs uncompiled if there is no Triton, or, with a warning, if compiling
    fails.
    """

    @functools.cache
    def compiled() -> Callable[..., Tensor]:
        # Each step rounds as it would on its own: in bf16 a sum of three is rounded twice.
        options = {"emulate_precision_casts": True}
        return torch.compile(function, dynamic=True, options=options)

    @functools.wraps(function)
    def run(*tensors: Tensor) -> Tensor:
        global CAN_COMPILE
        if tensors[0].is_cuda and CAN_COMPILE:
            try:
                return compiled()(*tensors)
            except torch._dynamo.exc.TorchDynamoException as error:
                CAN_COMPILE = False  # from now on every fused function runs uncompiled
                reason = str(error).partition("\n")[0]
                warnings.warn(
                    "slower without torch.compile, which needs a C compiler and Python.h: "
                    + reason,
                    stacklevel=2,
                )
        return function(*tensors)

    return run
