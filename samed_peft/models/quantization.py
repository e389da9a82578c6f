"""The frozen encoder in 4 bits, by bitsandbytes, as in QLoRA (arXiv 2305.14314)."""

from typing import Any

from torch import nn

from samed_peft.errors import InputError


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
