"""Mixed precision without a second copy of frozen weights."""

from typing import Any

import torch
from accelerate import Accelerator
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from samed_peft.errors import InputError

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


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise InputError(f'{error.name} is not installed; pip install "samed_peft[qlora]"') from error
    return bitsandbytes


def quantize_layers(layers: nn.Module) -> None:
    """Replace all linear layers within a module by ones whose weights are 4-bit normal floats, in place.

    Products are computed in the type of their inputs.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    bitsandbytes = _bitsandbytes()
    for name, linear in [(n, m) for n, m in layers.named_modules() if type(m) is nn.Linear]:
        device = linear.weight.device
        quantized = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None, quant_type="nf4", device="meta"
        )
        weight = linear.weight.detach().clone()  # the file behind it is let go
        quantized.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=quantized)
        quantized.bias = linear.bias
        # On some CPUs bitsandbytes would repack weights in evaluation and compute in bfloat16, whatever is asked for.
        quantized.support_avx512bf16_for_cpu = False
        parent, _, last = name.rpartition(".")
        # Moving a weight is what quantizes it.
        layers.get_submodule(parent).register_module(last, quantized.to(device))


def dequantize_layers(model: nn.Module) -> None:
    """Replace 4-bit layers by plain ones with the numbers that the 4 bits stand for, in place; others stay."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and is_quantized(m)]
    for name, quantized in found:
        packed: Any = quantized.weight
        values = _bitsandbytes().functional.dequantize_4bit(packed.data, packed.quant_state)
        plain = nn.Linear(quantized.in_features, quantized.out_features, bias=quantized.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(values.float(), requires_grad=False), quantized.bias
        parent, _, last = name.rpartition(".")
        model.get_submodule(parent).register_module(last, plain)


def is_quantized(linear: nn.Linear) -> bool:
    """Whether a layer's weight is no matrix of numbers but of packed ones."""
    return not linear.weight.is_floating_point()
