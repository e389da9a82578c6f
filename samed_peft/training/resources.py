"""Measure what a training needs: time of a step, peak memory, trainable weights."""

import statistics
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from samed_peft.io import write_json

RESOURCES_FILE = "resources.json"


class StepClock:
    """Measures the time of steps."""

    def __init__(self) -> None:
        self._ends = [time.perf_counter()]

    def step_done(self) -> None:
        """Record the end of a step."""
        self._ends.append(time.perf_counter())

    @property
    def steps(self) -> int:
        """Number of steps done."""
        return len(self._ends) - 1

    @property
    def median_seconds(self) -> float:
        """Median time of a step, without the first if there are more: it fills caches. NaN without steps."""
        seconds = [end - start for start, end in zip(self._ends, self._ends[1:], strict=False)]
        return statistics.median(seconds[1:] or seconds) if seconds else float("nan")


def write_resources(directory: Path, model: nn.Module, clock: StepClock, *, accelerator: Accelerator) -> None:
    """Write `resources.json`, measured by this process since it began or resumed training; nothing without steps.

    `peak_resident_gb` is the main process's resident memory (null on Windows), without the workers that load slices;
    `peak_gpu_gb` is the memory that PyTorch used on its GPU, null without one.
    """
    if not clock.steps:
        return
    device = accelerator.device
    values = {
        "steps": clock.steps,
        "seconds_per_step": round(clock.median_seconds, 4),
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
