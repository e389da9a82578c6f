"""Measure what a training needs: time of a step, peak memory, trainable weights."""

import statistics
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from samed_peft.io import write_json

RESOURCES_FILE = "resources.json"


def write_resources(directory: Path, model: nn.Module, ends_s: Sequence[float], *, accelerator: Accelerator) -> None:
    """Write `resources.json`, measured by this process since it began or resumed training; nothing without steps.

    `seconds_per_step` is the median over all steps but the first, which fills caches, if there are more.
    `peak_resident_gb` is the main process's resident memory (null on Windows), without the workers that load slices;
    `peak_gpu_gb` is the memory that PyTorch used on its GPU, null without one.

    Args:
        directory: the run's folder.
        model: the trained model.
        ends_s: `time.perf_counter()` before the first step and after each one.
        accelerator: its device.
    """
    seconds = [end - start for start, end in pairwise(ends_s)]
    if not seconds:
        return
    device = accelerator.device
    values = {
        "steps": len(seconds),
        "seconds_per_step": round(statistics.median(seconds[1:] or seconds), 4),
        "peak_resident_gb": _peak_resident_gb(),
        "peak_gpu_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    write_json(directory / RESOURCES_FILE, values)


def _peak_resident_gb() -> float | None:
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
