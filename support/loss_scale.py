"""The scale of the loss, which training in fp16 needs. In bf16 and fp32 there is none.

fp16 holds numbers from 6e-8 to 65,504, and many gradients are smaller. So the loss is multiplied
by a scale, and with it each gradient; what the adapter gets is divided by it again, in fp32. Where
a gradient goes beyond 65,504 on the way, the step changes nothing, and the next ones have half of
the scale. (Micikevicius et al., Mixed Precision Training, 2018, section 3.2.)

torch's GradScaler does all of this, and waits for no GPU.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from support import processes

if TYPE_CHECKING:
    import torch

START = 2.0**12  # gradients measured in fp16 are as near to fp32's at 2^0 as at 2^15
LEAST = 2.0**-4  # from here on fp16 loses small gradients: a run that needs less goes wrong
STEPS_TO_GROW = 1000  # without an overflow, until the scale is doubled


def new_scaler(dtype: str, device: torch.device) -> torch.amp.GradScaler:
    """Returns the scaler of a run in this --dtype: one that does nothing but in fp16."""
    import torch

    scaler = torch.amp.GradScaler(
        device.type, init_scale=START, growth_interval=STEPS_TO_GROW, enabled=dtype == "fp16"
    )
    # It puts its scale on the device when it first scales something there. A process without a
    # row in its first step would scale nothing.
    scaler.scale(torch.zeros((), device=device))
    return scaler


def is_overflow(scaler: torch.amp.GradScaler, loss: float) -> bool:
    """Returns whether a gradient that is not finite is one that only the scale made too large.

    Then the scaler has skipped its step. A loss that is not finite is none of the scale's doing,
    and where the scale is below LEAST already, another cause is likelier.
    """
    return scaler.is_enabled() and math.isfinite(loss) and scaler.get_scale() >= LEAST


def hint(scaler: torch.amp.GradScaler) -> str:
    """Returns what the error on a step that is not finite ends with."""
    if not scaler.is_enabled():
        return ""
    return "; fp16 holds nothing beyond 65,504: --dtype fp32, in a new run, does"


def check_same(dtype: str) -> None:
    """Raises ValueError if --dtype, by default the GPU's, is not the same in all processes.

    A gradient in fp16 is scaled before it is summed over the processes, and others are not.
    """
    names = sorted(set(processes.gather(dtype)))
    if len(names) > 1:
        raise ValueError(
            f"the GPUs of these processes differ, and so does their --dtype: pass one of "
            f"{', '.join(names)} to all"
        )
