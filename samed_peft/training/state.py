"""What a run leaves on disk so that it can go on: checkpoints to the bit, and whose folder it is."""

import contextlib
import dataclasses
import math
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from torch import nn

from samed_peft.config import TINY_SAM, TINY_SAM_NOTE, SamedConfig, TrainingConfig
from samed_peft.errors import InputError
from samed_peft.io import FolderKind, atomic_dir, load_tensors, read_json, require_replaceable, save_tensors, write_json
from samed_peft.training.adalora import allocation_tensors, restore_allocation

RUN_FILE = "run.json"
"""Record of a run's settings, by which its folder is known."""

RUN_FOLDER = FolderKind(markers=(RUN_FILE,), in_place=True)
"""Output folder of a training run."""

_DEFAULTS = {
    field.name: field.default
    for kind in (SamedConfig, TrainingConfig)
    for field in dataclasses.fields(kind)
    if field.name in ("method", "layers", "rank_pattern", "lora_plus_ratio")
}
"""Options that came later than the first runs."""

_ALLOCATION_FILE = "ranks.safetensors"

_WITHOUT_EFFECT = ("num_workers", "checkpoint_steps")
"""Training settings that may change between a run and its resumption: they do not touch the result."""


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

    def at(self, step: int) -> "Progress":
        """After `step` optimizer steps."""
        return dataclasses.replace(self, step=step)

    def validated(self, dice: float, *, epoch: int) -> "Progress":
        """After a validation; the earlier of two equal epochs stays the best, and NaN is never the best."""
        if math.isnan(dice) or (self.best_dice is not None and dice <= self.best_dice):
            return self
        return dataclasses.replace(self, best_dice=dice, best_epoch=epoch)


class StopSignal:
    """Within `with`, notes SIGTERM and SIGINT, so that a run ends after its step; a second one ends it at once.

    Attributes:
        received: whether a signal came.
    """

    def __init__(self) -> None:
        self.received = False
        self._process = os.getpid()

    def __enter__(self) -> Self:
        signals = (signal.SIGTERM, signal.SIGINT)
        self._before = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() == self._process:
            self.received = True
        else:  # a forked worker, which must end when it is told to
            os.kill(os.getpid(), number)

    def on_any_process(self, accelerator: Accelerator) -> bool:
        """Whether any process got a signal; every process must ask at the same step."""
        if accelerator.num_processes == 1:
            return self.received
        flag = torch.tensor(float(self.received), device=accelerator.device)
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
        if allocation := allocation_tensors(model):
            save_tensors(allocation, folder / _ALLOCATION_FILE)
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


def require_replicas(accelerator: Accelerator) -> None:
    """Refuse setups that split one model over processes: checkpoints and adapters are read off a whole one.

    Raises:
        InputError: FSDP, DeepSpeed or the like is configured.
    """
    split = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in split:
        raise InputError(
            f"expected one process or data-parallel ones, found {accelerator.distributed_type.value} in Accelerate's "
            "configuration; the model fits on each device, so launch with --multi_gpu instead"
        )


@contextlib.contextmanager
def tracked(accelerator: Accelerator, *, start: int) -> Iterator[None]:
    """TensorBoard's log of the steps after `start`: a resumed run replaces what it repeats, any end writes it out."""
    accelerator.init_trackers("logs", init_kwargs={"tensorboard": {"purge_step": start + 1}})
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def claim_run_folder(directory: Path, settings: dict[str, Any], *, resume: bool, accelerator: Accelerator) -> None:
    """Make `directory` the folder of the run with these settings, or refuse without touching it.

    The main process does it; what it finds wrong ends all of them alike.

    Args:
        directory: output folder.
        settings: JSON values that decide the result; written to `RUN_FILE`.
        resume: whether a run already there is to be continued.
        accelerator: its processes.

    Raises:
        InputError: the folder holds other files, another run, or this run and `resume` is not set.
    """
    messages: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            _claim(directory, settings, resume=resume)
        except InputError as error:
            messages = [str(error)]
    if broadcast_object_list(messages)[0] is not None:
        raise InputError(messages[0])


def _claim(directory: Path, settings: dict[str, Any], *, resume: bool) -> None:
    record = directory / RUN_FILE
    if record.is_file():
        # A run of a time before there was some option had its default.
        found = {name: value for name, value in _DEFAULTS.items() if name in settings} | read_json(record)
        keys = sorted(set(settings) | set(found))
        differing = [
            f"{k}: {found.get(k)} there, {settings.get(k)} now" for k in keys if found.get(k) != settings.get(k)
        ]
        if differing:
            raise InputError(
                f"{directory} holds a run with other settings ({'; '.join(differing)}); "
                "choose another --output_dir, or give the same settings to go on"
            )
        if not resume:
            raise InputError(f"{directory} holds a run with these settings; pass --resume to continue it")
    else:
        require_replaceable(directory, RUN_FOLDER)
        write_json(record, settings)


def run_settings(
    config: SamedConfig, training: TrainingConfig, *, data: Sequence[str], accelerator: Accelerator
) -> dict[str, Any]:
    """Everything that decides a run's result, as JSON values.

    Args:
        config: what is trained.
        training: how.
        data: names of the data, with fingerprints of their files.
        accelerator: its processes and precision count too.
    """
    decisive = {name: value for name, value in training.to_dict().items() if name not in _WITHOUT_EFFECT}
    note = {"note": TINY_SAM_NOTE} if config.base == TINY_SAM else {}
    return {
        **note,
        **config.to_dict(),
        **decisive,
        "data": list(data),
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }
