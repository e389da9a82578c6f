"""Mixed precision without a second copy of frozen weights."""

import torch
from accelerate import Accelerator
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn

from samed_peft.errors import InputError
from samed_peft.models.launch import require_precision

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types of matrix products by the names of options."""

_OF_ACCELERATE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def product_dtype(accelerator: Accelerator, name: str | None = None) -> torch.dtype:
    """Type of matrix products: `DTYPES[name]`, or Accelerate's mixed precision without a name.

    Raises:
        InputError: the latter is fp16, and Accelerate runs on a CPU.
    """
    if name is None:
        require_precision(accelerator)
    return _OF_ACCELERATE.get(accelerator.mixed_precision, torch.float32) if name is None else DTYPES[name]


def cast_frozen_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the encoder's frozen matrices once to the type that autocast computes their products in.

    Autocast rounds them to that type on every use, so LoRA's results stay equal; this saves the float32 original,
    autocast's copy and the time of the cast. From then on the model must run under autocast of that type. Norms,
    positions (float32 under autocast) and trained weights stay as they are.

    Args:
        model: a SAM with or without an adapter, before its optimizer is created.
        dtype: one of `DTYPES`; torch.float32 changes nothing.
    """
    if dtype == torch.float32:
        return
    # DoRA divides by norms of its layers' weights, which autocast does not round.
    normed = [m.get_base_layer() for m in model.modules() if isinstance(m, LoraLayer) and any(m.use_dora.values())]
    kept = {id(module) for module in normed}
    for name, module in model.named_modules():
        if "vision_encoder" not in name.split("."):
            continue
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.is_floating_point() and id(module) not in kept:
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.to(dtype)
        elif isinstance(module, BaseTunerLayer):
            # PEFT would cast an adapter's input to float32, and autocast back again.
            module.cast_input_dtype_enabled = False
    # Weights are views of the base's memory-mapped file: a single remaining one would keep the whole file mapped.
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype != dtype:
            tensor.data = tensor.data.clone()


def quantize_layers(layers: nn.Module) -> None:
    """Replace all linear layers of a module in place by layers with 4-bit normal-float weights.

    Products are computed in the type of their inputs.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise InputError(f'{error.name} is not installed; pip install "samed_peft[qlora]"') from error
    for name, linear in [(n, m) for n, m in layers.named_modules() if type(m) is nn.Linear]:
        device = linear.weight.device
        quantized = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None, quant_type="nf4", device="meta"
        )
        weight = linear.weight.detach().clone()  # so that the file behind it is unmapped
        quantized.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=quantized)
        quantized.bias = linear.bias
        # On some CPUs bitsandbytes repacks weights for evaluation and then always computes in bfloat16.
        quantized.support_avx512bf16_for_cpu = False
        layers.set_submodule(name, quantized.to(device))  # moving a weight quantizes it


def dequantize_layers(model: nn.Module) -> None:
    """Replace 4-bit layers in place by linear layers with the numbers that the 4 bits encode."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and not layer.weight.is_floating_point():
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            values = dequantize_bnb_weight(layer.weight).float()
            plain.weight, plain.bias = nn.Parameter(values, requires_grad=False), layer.bias
            model.set_submodule(name, plain)
