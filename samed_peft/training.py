"""One epoch of training, and checkpoints that resume to the bit."""

import contextlib
import math
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from samed_peft.errors import InputError
from samed_peft.io import atomic_dir, load_tensors, read_json, save_tensors, write_json
from samed_peft.losses import loss_parts

EXIT_DIVERGED = 3
"""Exit code of a run stopped by a loss that is not finite."""

EXIT_INTERRUPTED = 75
"""Exit code of a run that saved its state after SIGTERM or SIGINT and can be resumed (EX_TEMPFAIL)."""

Batch = dict[str, Tensor]


class NonFiniteLossError(ArithmeticError):
    """The loss of a step is NaN or infinite; no weight was changed in that step."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did.

    Attributes:
        number: optimizer steps done, this one included.
        learning_rate: rate in force in this step.
        loss: whole loss; its parts are `cross_entropy` and `dice`.
    """

    number: int
    learning_rate: float
    loss: float
    cross_entropy: float
    dice: float


@dataclass(frozen=True)
class Progress:
    """Where a run stands, as a checkpoint keeps it.

    Attributes:
        step: optimizer steps done.
        best_dice: best mean validation Dice so far, or None.
        best_epoch: the epoch that reached it, counted from 1.
    """

    step: int = 0
    best_dice: float | None = None
    best_epoch: int | None = None


def build_optimizer(model: nn.Module, *, weight_decay: float) -> torch.optim.AdamW:
    """SAMed's AdamW over the trainable weights; `train_epoch` sets the learning rate before each step."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=0.0, betas=(0.9, 0.999), weight_decay=weight_decay)


def train_epoch(
    model: nn.Module,
    batches: Iterable[Sequence[Batch]],
    optimizer: torch.optim.Optimizer,
    *,
    accelerator: Accelerator,
    step: int,
    rate: Callable[[int], float],
    dice_weight: float = 0.8,
    seed: int = 0,
) -> Iterator[Step]:
    """Train on groups of micro-batches, one optimizer step each; yields after every step.

    Dice and cross entropy run over the micro-batches of all processes together. Dropout depends on (seed, step,
    process) only, so that a resumed run draws what an uninterrupted one would have drawn.

    Args:
        model: prepared by `accelerator`.
        batches: groups from `grouped`; a group's gradients are averaged.
        optimizer: prepared by `accelerator`.
        accelerator: devices, precision, processes.
        step: optimizer steps done before.
        rate: learning rate of a step by its number from 0.
        dice_weight: share of the Dice loss.
        seed: seed of dropout.

    Raises:
        NonFiniteLossError: before any weight is changed by that loss.
    """
    model.train()
    for group in batches:
        learning_rate = rate(step)
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate
        seeds = np.random.SeedSequence((seed, step, accelerator.process_index))
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        parts = _accumulate(model, group, accelerator=accelerator, dice_weight=dice_weight)
        if not math.isfinite(parts[0]):
            raise NonFiniteLossError(f"the loss of step {step + 1} is {parts[0]} at learning rate {learning_rate:g}")
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        yield Step(step, learning_rate, *parts)


def _accumulate(
    model: nn.Module, group: Sequence[Batch], *, accelerator: Accelerator, dice_weight: float
) -> tuple[float, float, float]:
    """Gradients of a group's mean loss; returns the mean (loss, cross entropy, Dice loss)."""
    totals = torch.zeros(3, device=accelerator.device)
    for index, batch in enumerate(group):
        # Gradients are exchanged between processes once a group, with its last micro-batch.
        exchange = index == len(group) - 1
        with contextlib.nullcontext() if exchange else accelerator.no_sync(model):
            logits = model(pixel_values=batch["pixel_values"].to(accelerator.device, non_blocking=True)).logits
            parts = loss_parts(
                logits,
                batch["labels"].to(accelerator.device, non_blocking=True),
                dice_weight=dice_weight,
                sum_over_processes=_global_sum(accelerator),
            )
            if torch.isfinite(parts.total):
                accelerator.backward(parts.total / len(group))
        totals += torch.stack(parts).detach() / len(group)
    return tuple(totals.tolist())  # type: ignore[return-value]


def _global_sum(accelerator: Accelerator) -> Callable[[Tensor], Tensor] | None:
    if accelerator.num_processes == 1:
        return None

    def global_sum(local: Tensor) -> Tensor:
        total = accelerator.reduce(local.detach(), reduction="sum")
        # Its value is the total; its gradient is the local one, times N because DDP averages over N processes.
        return total + (local - local.detach()) * accelerator.num_processes

    return global_sum


def grouped(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Consecutive groups of `size` micro-batches; the last may be smaller."""
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def steps_per_epoch(num_rows: int, *, batch_size: int, accumulation_steps: int, num_processes: int) -> int:
    """Optimizer steps in one pass over `num_rows` slices."""
    return math.ceil(math.ceil(num_rows / (batch_size * num_processes)) / accumulation_steps)


class StopSignal:
    """Notes SIGTERM and SIGINT, so that a run ends after the step at hand; a second one ends it at once.

    Attributes:
        received: whether a signal came.
    """

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = True
        signal.signal(number, signal.SIG_DFL)

    def on_any_process(self, accelerator: Accelerator) -> bool:
        """Whether any process got a signal; every process must ask at the same step."""
        if accelerator.num_processes == 1:
            return self.received
        flag = torch.tensor(float(self.received), device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum") > 0)


def save_checkpoint(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, progress: Progress, accelerator: Accelerator
) -> None:
    """Write `directory/step-NNNNNNNN` (adapter, optimizer, position; never the base) and remove older ones.

    A checkpoint appears whole or not at all; the older one goes only after the new one is in place.
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
        write_json(folder / "state.json", {"progress": vars(progress), "scaler": scaler})
    for path in older:
        if path != target:
            shutil.rmtree(path)


def load_checkpoint(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, accelerator: Accelerator
) -> Progress:
    """Take up the newest checkpoint under `directory`, or the beginning if there is none.

    Raises:
        InputError: a checkpoint is damaged or of another model.
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
        raise InputError(f"{path} is of another model; remove it or choose another output folder")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(tensors[name])
    for key, value in moments.items():
        name, kind = key.rsplit("|", 1)
        parameter = trainable[name]
        # AdamW keeps its step counter on the CPU.
        optimizer.state[parameter][kind] = value if kind == "step" else value.to(parameter.device)
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return Progress(**state["progress"])


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("step-*") if path.is_dir())


def claim_run_folder(directory: Path, settings: dict[str, Any], *, resume: bool) -> None:
    """Make `directory` the folder of the run with these settings, or refuse without touching it.

    Args:
        directory: output folder.
        settings: JSON values that decide the result; written to `run.json`.
        resume: whether a run already there is to be continued.

    Raises:
        InputError: the folder holds other files, another run, or this run and `resume` is not set.
    """
    record = directory / "run.json"
    if record.is_file():
        found = read_json(record)
        keys = sorted(set(settings) | set(found))
        differing = [f"{k}: {found.get(k)} there, {settings.get(k)} now" for k in keys if found.get(k) != settings.get(k)]
        if differing:
            raise InputError(
                f"{directory} holds a run with other settings ({'; '.join(differing)}); "
                "choose another --output_dir, or give the same settings to go on"
            )
        if not resume:
            raise InputError(f"{directory} holds a run with these settings; pass --resume to continue it")
    elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} exists and is no run of this recipe; choose an empty or new --output_dir")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(record, settings)
