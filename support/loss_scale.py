"""Loss scaling, which training in fp16 needs. bf16 and fp32 do not need it.

fp16 represents magnitudes from 6e-8 to 65,504, and many gradients are smaller. So the loss, and
with it each gradient, is multiplied by a scale; the adapter's gradients are divided by it again,
in fp32. If a gradient exceeds 65,504 on the way, the step is skipped and the scale is halved for
the next steps. (Micikevicius et al., Mixed Precision Training, 2018, section 3.2.)

torch's GradScaler does all of this without waiting for the GPU.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

START = 2.0**12  # measured fp16 gradients are equally close to fp32's from 2^0 to 2^15
LEAST = 2.0**-4  # below this fp16 loses small gradients: a run that needs less has gone wrong
STEPS_TO_GROW = 1000  # after so many steps without overflow the scale is doubled


def new_scaler(dtype: str, device: torch.device) -> torch.amp.GradScaler:
    """Returns the scaler of a run in this --dtype. It does nothing unless the dtype is fp16."""
    import torch

    scaler = torch.amp.GradScaler(
        device.type, init_scale=START, growth_interval=STEPS_TO_GROW, enabled=dtype == "fp16"
    )
    # The scaler creates its scale on the device when it first scales something. A process
    # without a row in its first step would scale nothing.
    scaler.scale(torch.zeros((), device=device))
    return scaler


def is_overflow(scaler: torch.amp.GradScaler, loss: float) -> bool:
    """Returns whether the scale alone can explain a gradient that is not finite.

    Then the scaler has skipped the step. The scale cannot explain a loss that is not finite,
    and if it is already below LEAST, another cause is likelier.
    """
    return scaler.is_enabled() and math.isfinite(loss) and scaler.get_scale() >= LEAST


def hint(scaler: torch.amp.GradScaler) -> str:
    """Returns the end of the error message about a step that is not finite."""
    if not scaler.is_enabled():
        return ""
    return "; fp16 cannot hold numbers beyond 65,504: start a new run with --dtype fp32"
