"""Profile a call by operator and by groups of operators, for throughput.py's --profile."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from measure import DEVICE
from torch.profiler import ProfilerActivity, profile

from samed_peft import dice_ce_loss

OUTSIDE = "outside of pytorch"
"""Python and NumPy, for example resizing."""

GROUPS = {
    "outside of PyTorch": (OUTSIDE,),
    "optimizer": ("optimizer", "adam", "foreach", "lerp", "addcdiv", "addcmul"),
    "attention": ("scaled_dot_product", "flash", "efficient_attention", "fmha"),
    "GEMM": ("mm", "linear", "conv", "matmul", "cutlass"),
    "norms": ("layer_norm", "mean", "rsqrt"),
    "copies and casts": ("copy", "clone", "contiguous", "cat", "pad", "index", "repeat", "fill", "zero", "empty",
                         "gather", "scatter", "roll", "slice", "select", "narrow", "flip", "memcpy", "memset"),
    "elementwise": ("add", "sub", "mul", "div", "gelu", "relu", "sum", "pow", "sqrt", "exp", "softmax", "neg", "sin",
                    "cos", "max", "eq", "ne", "where", "isfinite", "threshold", "upsample", "abs", "clamp",
                    "elementwise", "reduce"),
}  # fmt: skip
"""Groups of operators by parts of their names; the first match counts."""


def profiled(action: Callable[[], Any], *, loss_shape: tuple[int, int, int] | None = None) -> dict[str, Any]:
    """Measure the self time of operators in a call, the second of two, as a table and as shares of groups.

    With `loss_shape`, (B, K + 1, h) of a step's logits, the loss is profiled alone and subtracted from its groups.
    """
    action()
    microseconds, table = _self_times(action)
    shares: Counter[str] = Counter()
    if loss_shape is not None:
        batch, num_labels, side = loss_shape
        logits = torch.randn(batch, num_labels, side, side, device=DEVICE, requires_grad=True)
        labels = torch.randint(num_labels, (batch, side, side), device=DEVICE)
        dice_ce_loss(logits, labels).backward()  # to warm up
        loss = _self_times(lambda: dice_ce_loss(logits, labels).backward())[0] & microseconds  # the smaller of both
        microseconds -= loss
        shares["loss"] = loss.total()
    for name, own in microseconds.items():
        kinds = (kind for kind, parts in GROUPS.items() if any(part in name.lower() for part in parts))
        shares[next(kinds, "other")] += own
    whole = sum(shares.values())
    groups = {name: round(own / whole, 4) for name, own in shares.most_common()}
    return {"table": table, "seconds": whole / 1e6, "groups": groups}


def _self_times(action: Callable[[], Any]) -> tuple[Counter[str], str]:
    """Microseconds of each operator, on the GPU if there is one, and the profiler's own table."""
    on_gpu = DEVICE.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        started = time.perf_counter()
        action()
        wall = time.perf_counter() - started
    averages = recorded.key_averages()
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = Counter({e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in averages})
    if not on_gpu:
        times[OUTSIDE] = max(0.0, 1e6 * wall - times.total())
    return times, averages.table(sort_by=order, row_limit=25, max_name_column_width=50)
