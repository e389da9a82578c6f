"""Train an adapter from a config and slices; resumable at any step."""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel
from tqdm import tqdm

from samed_peft.adapters.save_load import add_lora, save_adapter
from samed_peft.config import TrainingConfig
from samed_peft.datasets.rows import warn_of_absent_classes
from samed_peft.errors import InputError, RunInterruptedError, StopSignal
from samed_peft.models.bases import load_sam, recorded_base
from samed_peft.models.modeling import config_of
from samed_peft.models.precision import cast_frozen_weights, product_dtype
from samed_peft.training.adalora import prune_ranks
from samed_peft.training.average import WeightAverage
from samed_peft.training.batches import training_slices
from samed_peft.training.log import EventLog
from samed_peft.training.loop import Step, build_optimizer, steps_per_epoch, training_steps, warn_of_warmup
from samed_peft.training.resources import write_resources
from samed_peft.training.runs import Run, claim_run_folder, only_run_in, run_settings
from samed_peft.training.state import Progress, load_checkpoint, save_checkpoint, stop_on_any_process
from samed_peft.training.validation import mean_dice


def fit(run: Run, *, accelerator: Accelerator, resume: bool = False) -> tuple[Path, dict[str, Any]]:
    """Train an adapter, or resume its training.

    A checkpoint is written every `checkpoint_steps` steps and after each epoch; a run that is killed and resumed
    produces the adapter of an uninterrupted one, to the bit.

    Args:
        run: what to train, on which data, and where to keep it.
        accelerator: from `start_run`: processes and precision.
        resume: whether to continue a run that is already in the folder.

    Returns:
        The folder of the adapter to use (of the best validation, or the last), and the run's settings.

    Raises:
        InputError: the folder holds something else, or base and data do not fit.
        NonFiniteLossError: training diverged.
        RunInterruptedError: a signal arrived; the state is saved.
    """
    training = run.training
    model = _fresh_model(run, accelerator)
    optimizer = build_optimizer(model, weight_decay=training.weight_decay, lora_plus_ratio=training.lora_plus_ratio)
    settings = run_settings(config_of(model), training, data=run.data, accelerator=accelerator)
    claim_run_folder(run.output_dir, settings, resume=resume, accelerator=accelerator)
    with only_run_in(run.output_dir, accelerator=accelerator):
        return _train(run, model, optimizer, accelerator=accelerator, resume=resume), settings


def _train(
    run: Run, model: PeftModel, optimizer: torch.optim.Optimizer, *, accelerator: Accelerator, resume: bool
) -> Path:
    """Train from the newest checkpoint on; returns the folder of the adapter to use."""
    out, training = run.output_dir, run.training
    total = steps_per_epoch(len(run.rows), training, accelerator) * training.stop_epoch
    prune_ranks(model, optimizer, steps=total)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    slices = training_slices(run.rows, run.config, training, label_size=model.logits_size)
    average = _average(model, training)
    state = {"accelerator": accelerator, "average": average}
    progress = load_checkpoint(out / "checkpoints", model, optimizer, **state)
    if accelerator.is_main_process:
        warn_of_warmup(total, training)
        warn_of_absent_classes(run.rows, run.config.class_names)
        if resume and not progress.step:
            warnings.warn(f"nothing to resume in {out}: it has no checkpoint, so the run begins anew", stacklevel=3)

    steps = training_steps(prepared, optimizer, slices, training=training, accelerator=accelerator, start=progress.step)
    ends_s = [time.perf_counter()]
    log = EventLog(out / "logs", start=progress.step, enabled=accelerator.is_main_process)
    with StopSignal() as stop_signal:
        for step in _with_bar(steps, done=progress.step, total=total, shown=accelerator.is_main_process):
            ends_s.append(time.perf_counter())
            log.write(step.scalars(), step=step.number)
            if average is not None:
                average.update(step.number)
            progress = dataclasses.replace(progress, step=step.number)
            if step.ends_epoch:
                with contextlib.nullcontext() if average is None else average.in_place():
                    progress = _validate_and_save(run, model, step, progress, log=log, accelerator=accelerator)
            stopping = stop_on_any_process(stop_signal, accelerator)
            if step.number == total and accelerator.is_main_process:
                # Before the last checkpoint, since a run that goes on from there has no step to measure.
                write_resources(out, model, ends_s, accelerator=accelerator)
            if stopping or step.ends_epoch or step.number % training.checkpoint_steps == 0:
                save_checkpoint(out / "checkpoints", model, optimizer, progress=progress, **state)
            if stopping:
                accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one has ended
                raise RunInterruptedError(f"stopped by a signal after step {step.number}; --resume goes on from there")
    return out / ("adapter" if progress.best_epoch is None else "adapter_best")


def _average(model: PeftModel, training: TrainingConfig) -> WeightAverage | None:
    """The moving average of the weights, if one is wanted."""
    if not training.weight_average:
        return None
    if config_of(model).method == "adalora":
        raise InputError("weight_average would bring back ranks that adalora has pruned; use 0, or another method")
    return WeightAverage(model, decay=training.weight_average)


def _fresh_model(run: Run, accelerator: Accelerator) -> PeftModel:
    """The base with an untrained adapter; its frozen weights in the type of the accelerator's precision."""
    config = dataclasses.replace(run.config, base=recorded_base(run.config.base))
    # The seed decides the fresh weights; order and augmentation depend on (seed, epoch, slice).
    set_seed(run.training.seed)
    sam = load_sam(config.base, class_names=config.class_names, image_size=config.image_size)
    if run.training.gradient_checkpointing:
        sam.activation_checkpointing_enable()
    model = add_lora(sam, config)
    cast_frozen_weights(model, product_dtype(accelerator))
    return model


def _with_bar(steps: Iterator[Step], *, done: int, total: int, shown: bool) -> Iterator[Step]:
    """The steps, under a progress bar with loss and learning rate."""
    bar = tqdm(steps, desc="training", initial=done, total=total, unit="step", disable=not shown)
    for step in bar:
        bar.set_postfix(loss=f"{step.loss:.3f}", rate=f"{step.learning_rate:.1e}", refresh=False)
        yield step


def _validate_and_save(
    run: Run, model: PeftModel, step: Step, progress: Progress, *, log: EventLog, accelerator: Accelerator
) -> Progress:
    """Validate if this epoch is due, and save the adapter: the best so far, and the last."""
    training = run.training
    if run.validation is not None and step.epoch % training.validate_epochs == 0:
        dice = mean_dice(model, *run.validation, accelerator=accelerator)
        log.write({"validation/dice": dice}, step=step.number)
        progress = progress.validated(dice, epoch=step.epoch)
        if accelerator.is_main_process and progress.best_epoch == step.epoch:
            save_adapter(model, run.output_dir / "adapter_best", training=training)
    if accelerator.is_main_process:
        save_adapter(model, run.output_dir / "adapter", training=training)
    return progress
