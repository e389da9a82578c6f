"""Save checkpoints and load them, so that a resumed run equals an uninterrupted one to the bit."""

import dataclasses
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from samed_peft.errors import InputError, StopSignal
from samed_peft.io import atomic_dir, load_tensors, read_json, save_tensors, write_json
from samed_peft.training.adalora import allocation_tensors, restore_allocation

_ALLOCATION_FILE = "ranks.safetensors"


@dataclass(frozen=True)
class Progress:
    """Position of a run, as a checkpoint stores it.

    Attributes:
        step: optimizer steps done.
        best_dice: best mean validation Dice so far, or None.
        best_epoch: the epoch that reached it, counted from 1.
    """

    step: int = 0
    best_dice: float | None = None
    best_epoch: int | None = None

    def validated(self, dice: float, *, epoch: int) -> "Progress":
        """After a validation; the earlier of two equal epochs stays the best, and NaN is never the best."""
        if math.isnan(dice) or (self.best_dice is not None and dice <= self.best_dice):
            return self
        return dataclasses.replace(self, best_dice=dice, best_epoch=epoch)


def stop_on_any_process(stop: StopSignal, accelerator: Accelerator) -> bool:
    """Whether any process got a signal; every process must ask at the same step."""
    received = stop.received is not None
    if accelerator.num_processes == 1:
        return received
    flag = torch.tensor(float(received), device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum") > 0)


def save_checkpoint(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    progress: Progress,
    accelerator: Accelerator,
) -> None:
    """Write `directory/step-NNNNNNNN` (adapter, optimizer, position; never the base) and remove older ones.

    A checkpoint appears whole or not at all; the older one is removed only after the new one is in place.
    """
    if not accelerator.is_main_process:
        return
    trainable = _trainable(accelerator.unwrap_model(model))
    moments = {
        f"{name}|{key}": value
        for name, parameter in trainable.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
    older = _checkpoints(directory)
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"step-{progress.step:08d}"
    with atomic_dir(target) as folder:
        save_tensors({name: parameter.detach() for name, parameter in trainable.items()}, folder / "model.safetensors")
        save_tensors(moments, folder / "optimizer.safetensors")
        if allocation := allocation_tensors(model):
            save_tensors(allocation, folder / _ALLOCATION_FILE)
        write_json(folder / "state.json", {"progress": vars(progress), "scaler": scaler})
    for path in older:
        if path != target:
            shutil.rmtree(path)


def load_checkpoint(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, accelerator: Accelerator
) -> Progress:
    """Load the newest checkpoint under `directory` into model and optimizer, if there is one.

    Returns:
        The run's position; the beginning without a checkpoint.

    Raises:
        InputError: a checkpoint is damaged or belongs to another model.
    """
    found = _checkpoints(directory)
    if not found:
        return Progress()
    path = found[-1]
    state = read_json(path / "state.json")
    tensors, moments = load_tensors(path / "model.safetensors"), load_tensors(path / "optimizer.safetensors")
    trainable = _trainable(accelerator.unwrap_model(model))
    shapes = {name: value.shape for name, value in tensors.items()}
    if shapes != {name: parameter.shape for name, parameter in trainable.items()}:
        raise InputError(f"{path} belongs to another model; remove it or choose another output folder")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(tensors[name])
    for key, value in moments.items():
        name, kind = key.rsplit("|", 1)
        parameter = trainable[name]
        optimizer.state[parameter][kind] = value.to(parameter.device)  # fused AdamW counts steps there too
    if (path / _ALLOCATION_FILE).is_file():
        restore_allocation(model, load_tensors(path / _ALLOCATION_FILE))
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return Progress(**state["progress"])


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("step-*") if path.is_dir())
