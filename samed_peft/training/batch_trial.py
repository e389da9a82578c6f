"""Try whether a planned batch fits in memory before the first step, and take a smaller one if it does not."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, find_executable_batch_size
from torch import Tensor, nn
from torch.nn import functional as F

from samed_peft.config import TrainingConfig
from samed_peft.errors import InputError
from samed_peft.io import read_json, write_json
from samed_peft.models.losses import loss_parts
from samed_peft.training.batches import TrainingSlices, batch_loader

BATCH_FILE = "batch.json"
"""Record of the batch that a planned run found to fit in memory."""

_FIELDS = ("batch_size", "accumulation_steps")


def recorded_batch(directory: Path) -> dict[str, Any]:
    """What a run's folder records of its batch, as fields of `TrainingConfig`; empty if nothing was tried.

    Raises:
        InputError: the file is damaged.
    """
    file = directory / BATCH_FILE
    if not file.is_file():
        return {}
    found = read_json(file)
    is_sound = isinstance(found, dict) and found.keys() == {*_FIELDS}
    if not is_sound or not all(type(number) is int and 0 < number < 2**31 for number in found.values()):
        raise InputError(
            f"expected {' and '.join(_FIELDS)} of a run, whole numbers from 1 on, in {file}, found {found!r:.120}; put "
            "the right file back, or choose another --output_dir"
        )
    return dict(found)


def settle_batch(
    directory: Path, training: TrainingConfig, *, try_batch: Callable[[int], None] | None, accelerator: Accelerator
) -> TrainingConfig:
    """Take the recorded batch, or try the planned one and record what fits; all processes agree.

    A batch that does not fit is halved, or divided by a larger number if it is odd, and accumulated the more often, so
    that the slices of an optimizer step stay.

    Args:
        directory: folder of the run, claimed.
        training: with the planned batch.
        try_batch: passes a batch of so many slices through the model, without a trace; None to try nothing, for a run
            that has taken steps before or whose batch users chose.
        accelerator: its processes.

    Raises:
        InputError: not even one slice fits.
    """
    shared: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            shared = [recorded_batch(directory), None]
        except InputError as error:
            shared = [None, str(error)]
    found, refusal = broadcast_object_list(shared)
    if refusal is not None:
        raise InputError(refusal)
    if not found and try_batch is not None:
        sizes = accelerator.gather(torch.tensor([largest_batch(training.batch_size, try_batch)]).to(accelerator.device))
        if not (size := int(sizes.min())):
            raise InputError(
                f"expected memory for one slice of a training, found too little on {accelerator.device}; free memory, "
                "or give --gradient_checkpointing, a smaller --image_size or a smaller --base"
            )
        found = {
            "batch_size": size,
            "accumulation_steps": training.accumulation_steps * (training.batch_size // size),
        }
        if accelerator.is_main_process:
            write_json(directory / BATCH_FILE, found)
            if size < training.batch_size:
                print(_told(training, size, accelerator))
    return dataclasses.replace(training, **found)


def _told(training: TrainingConfig, size: int, accelerator: Accelerator) -> str:
    batches = training.accumulation_steps * (training.batch_size // size)
    of_step = batches * size * accelerator.num_processes
    return (
        f"a batch of {training.batch_size} slices does not fit in memory as planned: {size} at a time, {batches} times "
        f"for each optimizer step of {of_step} slices"
    )


def largest_batch(planned: int, try_batch: Callable[[int], None]) -> int:
    """The planned number of slices, or the largest of its successive halves that `try_batch` has memory for; 0 if none.

    Errors that are not for lack of memory are raised.
    """
    size = planned

    def smaller() -> int:
        nonlocal size
        if size == 1:
            raise _NothingFitsError
        size = max(number for number in range(1, size // 2 + 1) if size % number == 0)
        return size

    def attempt(batch_size: int) -> int:
        try:
            try_batch(batch_size)
        except MemoryError as error:  # of NumPy; Accelerate knows those of PyTorch
            raise RuntimeError(f"{batch_size} slices: out of memory.") from error
        return batch_size

    try:
        return int(find_executable_batch_size(attempt, starting_batch_size=planned, reduce_batch_size_fn=smaller)())
    except _NothingFitsError:
        return 0


class _NothingFitsError(Exception):
    """One slice does not fit."""


def pass_once(
    model: nn.Module, slices: TrainingSlices, batch_size: int, *, dice_weight: float, accelerator: Accelerator
) -> None:
    """Compute the loss of a batch and its gradients, as a training step does, and discard them.

    Weights, mode and random state are as before. Processes do nothing together here, since one alone may lack memory.

    Args:
        model: prepared by `accelerator`, but without the wrapper of several processes.
        slices: training examples, repeated if there are fewer.
        batch_size: number of them.
        dice_weight: share of the Dice loss.
        accelerator: device and precision.
    """
    device = accelerator.device
    was_training = model.training
    keys = [(0, index % len(slices)) for index in range(batch_size)]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            (batch,) = batch_loader(slices, [keys], num_workers=0, device=device)
            model.train()
            logits = _enlarged(model(pixel_values=batch["pixel_values"]).logits, batch["labels"])
            accelerator.backward(loss_parts(logits, batch["labels"], dice_weight=dice_weight).total)
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # the peak of a run is that of its training


def _enlarged(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits at the size of larger labels, at which training computes the loss."""
    if labels.shape[-1] <= logits.shape[-1]:
        return logits
    return F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
