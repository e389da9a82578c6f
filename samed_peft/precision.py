"""Mixed precision without a second copy of frozen weights."""

import torch
from accelerate import Accelerator
from torch import nn

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def half_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """Type that an accelerator computes matrix products in, or None for float32."""
    return _DTYPES.get(accelerator.mixed_precision)


def hold_frozen_weights(encoder: nn.Module, dtype: torch.dtype) -> None:
    """Keep the encoder's frozen matrices in the type that autocast computes their products in, and only in it.

    Autocast rounds them to that type whenever they are used, so no result changes; what goes is the float32 original,
    autocast's copy and the time of making it. The model has to run under autocast of that type from then on. What
    autocast computes in float32, norms and positions, stays as it is, and so does all that is trained.

    Args:
        encoder: a SAM's `vision_encoder`, with or without an adapter.
        dtype: torch.bfloat16 or torch.float16.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not any(p.requires_grad for p in module.parameters()):
            module.to(dtype)
