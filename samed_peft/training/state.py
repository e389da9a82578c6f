"""Save checkpoints and load them, so that a resumed run equals an uninterrupted one to the bit."""

import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from samed_peft.errors import InputError, StopSignal
from samed_peft.io import (
    atomic_dir,
    check_files,
    file_sha256,
    load_tensors,
    read_json,
    save_tensors,
    with_checksums,
    without_checksums,
    write_json,
)
from samed_peft.training.adalora import allocation_tensors, restore_allocation
from samed_peft.training.average import WeightAverage
from samed_peft.training.progress import Progress, is_number

_WEIGHTS_FILE, _MOMENTS_FILE = "model.safetensors", "optimizer.safetensors"
_ALLOCATION_FILE = "ranks.safetensors"
_AVERAGE_FILE = "average.safetensors"
_STATE_FILE = "state.json"
_SCALER_FACTORS, _SCALER_COUNTS = ("scale", "growth_factor", "backoff_factor"), ("growth_interval", "_growth_tracker")
"""Fields of a loss scaler's state: those that are multiplied, in float32, and those that are counted, in int32."""


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
    average: WeightAverage | None = None,
) -> None:
    """Write `directory/step-NNNNNNNN` (adapter, optimizer, average, position; never the base) and remove older ones.

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
        save_tensors({name: parameter.detach() for name, parameter in trainable.items()}, folder / _WEIGHTS_FILE)
        save_tensors(moments, folder / _MOMENTS_FILE)
        if allocation := allocation_tensors(model):
            save_tensors(allocation, folder / _ALLOCATION_FILE)
        if average is not None:
            save_tensors(average.tensors(), folder / _AVERAGE_FILE)
        sums = {path.name: file_sha256(path) for path in folder.iterdir()}
        values = {"progress": vars(progress), "scaler": scaler}
        write_json(folder / _STATE_FILE, with_checksums(values, _STATE_FILE, sums))
    _remove_all_but(target, older)


def _remove_all_but(newest: Path, checkpoints: list[Path]) -> None:
    for path in checkpoints:
        if path != newest:
            shutil.rmtree(path)


def load_checkpoint(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    accelerator: Accelerator,
    average: WeightAverage | None = None,
) -> Progress:
    """Load the newest checkpoint under `directory`, if there is one, into what was saved, and remove older ones.

    Returns:
        The run's position; the beginning without a checkpoint.

    Raises:
        InputError: a checkpoint is damaged or belongs to another model.
    """
    found = _checkpoints(directory)
    if not found:
        return Progress()
    path = found[-1]
    progress, scaler = _read_state(path)
    tensors, moments = load_tensors(path / _WEIGHTS_FILE), load_tensors(path / _MOMENTS_FILE)
    trainable = _trainable(accelerator.unwrap_model(model))
    # Before the first step, when it is decided whether there is an average, that is the weights.
    file = path / (_AVERAGE_FILE if progress.step or (path / _AVERAGE_FILE).is_file() else _WEIGHTS_FILE)
    averaged = None if average is None else load_tensors(file)
    for weights in (tensors, *([] if averaged is None else [averaged])):
        if {name: value.shape for name, value in weights.items()} != {n: p.shape for n, p in trainable.items()}:
            raise InputError(f"{path} belongs to another model; remove it or choose another output folder")
    for key, value in moments.items():
        if (name := key.rpartition("|")[0]) not in trainable or value.shape not in (trainable[name].shape, ()):
            raise InputError(
                f"expected the optimizer's moments of this model in {path / _MOMENTS_FILE}, found {key!r:.80} of shape "
                f"{tuple(value.shape)}; {_REMEDY}"
            )
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(tensors[name])
    if average is not None and averaged is not None:
        average.load(averaged)
    for key, value in moments.items():
        name, _, kind = key.rpartition("|")
        parameter = trainable[name]
        optimizer.state[parameter][kind] = value.to(parameter.device)  # fused AdamW counts steps there too
    if (path / _ALLOCATION_FILE).is_file():
        restore_allocation(model, load_tensors(path / _ALLOCATION_FILE))
    if accelerator.scaler is not None and scaler:  # a scaler that is switched off has no state
        accelerator.scaler.load_state_dict(scaler)
    if accelerator.is_main_process:
        _remove_all_but(path, found)
    return progress


_REMEDY = "remove this checkpoint to resume from none, or fetch it again"


def _read_state(path: Path) -> tuple[Progress, dict[str, float] | None]:
    """Position of the run and state of the loss scaler, after comparing all files with their checksums."""
    file = path / _STATE_FILE
    values = read_json(file)
    if not isinstance(values, dict):
        raise InputError(f"expected an object in {file}, found {type(values).__name__}; {_REMEDY}")
    state = without_checksums(values, file)
    optional = [name for name in (_ALLOCATION_FILE, _AVERAGE_FILE) if (path / name).is_file()]
    check_files(values, file, (_WEIGHTS_FILE, _MOMENTS_FILE, *optional))
    found, scaler = state.get("progress"), state.get("scaler")
    progress = Progress.from_dict(found)
    if progress is None:
        raise InputError(
            f"expected the step, best_dice and best_epoch of a run as progress in {file}, found {found!r:.120}; "
            f"{_REMEDY}"
        )
    if scaler not in (None, {}) and not _is_scaler(scaler):
        raise InputError(
            f"expected null or the numbers {', '.join(_SCALER_FACTORS + _SCALER_COUNTS)} as scaler in {file}, found "
            f"{scaler!r:.120}; {_REMEDY}"
        )
    return progress, scaler or None


def _is_scaler(state: object) -> bool:
    return (
        isinstance(state, dict)
        and state.keys() == {*_SCALER_FACTORS, *_SCALER_COUNTS}
        and all(is_number(state[name]) and 0 < state[name] < 1e38 for name in _SCALER_FACTORS)
        and all(type(state[name]) is int and 0 <= state[name] < 2**31 for name in _SCALER_COUNTS)
    )


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("step-*") if path.is_dir())
