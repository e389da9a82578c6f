"""Mixed precision without a second copy of frozen weights."""

import torch
from accelerate import Accelerator
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types that matrix products can be computed in, by the names of options."""

_OF_ACCELERATE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def product_dtype(accelerator: Accelerator, name: str | None = None) -> torch.dtype:
    """Type that matrix products are computed in: the one called `name` in `DTYPES`, or else Accelerate's."""
    return _OF_ACCELERATE.get(accelerator.mixed_precision, torch.float32) if name is None else DTYPES[name]


def hold_frozen_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the encoder's frozen matrices in the type that autocast computes their products in, and only in it.

    Autocast rounds them to that type whenever they are used, so no result of LoRA changes; what goes is the float32
    original, autocast's copy and the time of making it. The model has to run under autocast of that type from then on.
    What autocast computes in float32, norms and positions, stays as it is, and so does all that is trained.

    Args:
        model: a SAM with or without an adapter, before there is an optimizer.
        dtype: of `DTYPES`; nothing is to be done for torch.float32.
    """
    if dtype == torch.float32:
        return
    # DoRA divides by norms of its layers' weights, which autocast would not have rounded.
    normed = [m.get_base_layer() for m in model.modules() if isinstance(m, LoraLayer) and any(m.use_dora.values())]
    kept = {id(module) for module in normed}
    for name, module in model.named_modules():
        if "vision_encoder" not in name.split("."):
            continue
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.is_floating_point() and id(module) not in kept:
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.to(dtype)
        elif isinstance(module, BaseTunerLayer):
            # PEFT would convert what goes into an adapter to float32, and autocast back again.
            module.cast_input_dtype_enabled = False
    # Weights come as views of the base's file, and a single one left would keep all of it mapped.
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype != dtype:
            tensor.data = tensor.data.clone()
