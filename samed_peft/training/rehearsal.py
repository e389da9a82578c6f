"""Time the first steps of a training without training: its state is as before."""

import contextlib
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import nn

from samed_peft.training.loop import Step

WARM_STEPS, TIMED_STEPS = 2, 20
"""Steps that fill caches, and those that are timed."""

_LARGEST_SHARE = 0.02
"""Share of the whole time after which no further step is timed."""


@contextlib.contextmanager
def kept_scaler(accelerator: Accelerator) -> Iterator[None]:
    """Bring the loss scaler, which all trainings of a process share, back to what it was before `with`."""
    before = None if accelerator.scaler is None else accelerator.scaler.state_dict()
    try:
        yield
    finally:
        if before:
            accelerator.scaler.load_state_dict(before)


@contextlib.contextmanager
def kept_state(model: nn.Module, optimizer: torch.optim.Optimizer, *, accelerator: Accelerator) -> Iterator[None]:
    """Bring trained weights, the optimizer's moments and the loss scaler back to what they were before `with`."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    moments = {
        parameter: {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in kept.items()}
        for parameter, kept in optimizer.state.items()
    }
    try:
        with kept_scaler(accelerator):
            yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])
        optimizer.state.clear()
        optimizer.state.update(moments)


def seconds_per_step(steps: Iterator[Step], *, limit_s: float, accelerator: Accelerator) -> float:
    """Mean time of a step after a few warm ones.

    Args:
        steps: training steps; some are taken, or all if there are fewer.
        limit_s: the time that the training may take; of a short one, fewer steps are timed.
        accelerator: its processes, which take the same number of steps.
    """
    begun = time.perf_counter()
    ends_s = [begun]
    for _ in range(WARM_STEPS + TIMED_STEPS):
        if next(steps, None) is None:
            break
        ends_s.append(time.perf_counter())
        too_long = torch.tensor(float(ends_s[-1] - begun > _LARGEST_SHARE * limit_s), device=accelerator.device)
        if accelerator.reduce(too_long, reduction="sum") > 0 and len(ends_s) > 2:
            break
    warm = min(WARM_STEPS, len(ends_s) - 2)
    return (ends_s[-1] - ends_s[warm]) / (len(ends_s) - 1 - warm)
