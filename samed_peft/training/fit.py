"""Train an adapter from a config and slices; resumable at any step."""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list, set_seed
from peft import PeftModel
from torch import nn
from tqdm import tqdm

from samed_peft.adapters.continuation import go_on_from
from samed_peft.adapters.save_load import add_lora, save_adapter
from samed_peft.config import TrainingConfig
from samed_peft.datasets.rows import warn_of_absent_classes
from samed_peft.errors import InputError, RunInterruptedError, StopSignal
from samed_peft.models.bases import load_sam, recorded_base
from samed_peft.models.modeling import config_of
from samed_peft.models.precision import cast_frozen_weights, product_dtype
from samed_peft.training.adalora import prune_ranks
from samed_peft.training.average import WeightAverage
from samed_peft.training.batch_trial import pass_once, recorded_batch, settle_batch
from samed_peft.training.batches import training_slices
from samed_peft.training.claims import FolderBefore, claim_run_folder, only_run_in
from samed_peft.training.length import Clock, Fitted, LengthRecord, Timing, fitted_steps, settle_length, steps_that_fit
from samed_peft.training.log import EventLog
from samed_peft.training.loop import Step, build_optimizer, step_counts, steps_per_epoch, training_steps, warn_of_warmup
from samed_peft.training.planning import PLAN_FILE, write_plan
from samed_peft.training.progress import Progress
from samed_peft.training.rehearsal import TIMED_STEPS, WARM_STEPS, kept_scaler, kept_state, seconds_per_step
from samed_peft.training.resources import write_resources
from samed_peft.training.runs import Run, run_settings
from samed_peft.training.state import load_checkpoint, save_checkpoint, stop_on_any_process
from samed_peft.training.validation import dice_scalars, seconds_to_validate, validation_dice


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
    optimizer = build_optimizer(
        model,
        weight_decay=training.weight_decay,
        lora_plus_ratio=training.lora_plus_ratio,
        max_grad_norm=training.max_grad_norm,
    )
    settings = run_settings(config_of(model), training, data=run.data, accelerator=accelerator)
    if run.init is not None:
        settings["init"] = go_on_from(model, run.init)
    if training.weight_average and config_of(model).method == "adalora":
        raise InputError("weight_average would bring back ranks that adalora has pruned; use 0, or another method")
    # Refuses what rows and config do not allow, before the folder is claimed.
    training_slices(run.rows, run.config, training, label_size=model.logits_size)
    before = FolderBefore.of(run.output_dir)
    exceeded = claim_run_folder(run.output_dir, settings, resume=resume, accelerator=accelerator)
    # Several trainings of one process, such as folds, must neither share a loss scaler nor fill the memory.
    with (
        only_run_in(run.output_dir, accelerator=accelerator),
        before.restored_unless_used(accelerator=accelerator),
        kept_scaler(accelerator),
    ):
        prepared, stepping = accelerator.prepare(model, optimizer)
        parts = _Parts(run, model, prepared, stepping, accelerator, before)
        progress, length = _train(parts, resume=resume, exceeded=exceeded)
        accelerator.free_memory()
    adapter = run.output_dir / ("adapter" if progress.best_epoch is None else "adapter_best")
    return adapter, settings | recorded_batch(run.output_dir) | length.decided()


@dataclass(frozen=True)
class _Parts:
    """What a training works with: the model with its adapter, and model and optimizer as Accelerate prepared them."""

    run: Run
    model: PeftModel
    prepared: nn.Module
    optimizer: AcceleratedOptimizer
    accelerator: Accelerator
    folder: FolderBefore
    average: WeightAverage | None = None

    @property
    def checkpoints(self) -> Path:
        return self.run.output_dir / "checkpoints"

    def averaging(self, training: TrainingConfig) -> "_Parts":
        """These with a moving average of the weights, from the present ones on, if one is wanted."""
        decay = training.weight_average
        return dataclasses.replace(self, average=WeightAverage(self.model, decay=decay) if decay else None)

    def save(self, progress: Progress) -> None:
        state = {"accelerator": self.accelerator, "average": self.average}
        save_checkpoint(self.checkpoints, self.model, self.optimizer, progress=progress, **state)

    def steps(self, training: TrainingConfig, *, start: int) -> Iterator[Step]:
        """Steps to the end of a training whose minutes have become steps."""
        slices = training_slices(self.run.rows, self.run.config, training, label_size=self.model.logits_size)
        accelerator = self.accelerator
        return training_steps(
            self.prepared, self.optimizer, slices, training=training, accelerator=accelerator, start=start
        )


def _train(parts: _Parts, *, resume: bool, exceeded: Mapping[str, Any]) -> tuple[Progress, LengthRecord]:
    """Train from the newest checkpoint on; returns where the training ended, and what was decided on its length."""
    run, accelerator, is_main = parts.run, parts.accelerator, parts.accelerator.is_main_process
    record = LengthRecord.shared(run.output_dir, accelerator=accelerator)
    parts = parts.averaging(record.settled(run.training))
    state = {"accelerator": accelerator, "average": parts.average}
    progress = load_checkpoint(parts.checkpoints, parts.model, parts.optimizer, **state)
    if is_main and resume and not progress.step:
        warnings.warn(
            f"nothing to resume in {run.output_dir}: it has no checkpoint, so the run begins anew", stacklevel=3
        )
    parts = _with_fitting_batch(parts, progress)
    run = parts.run
    clock = Clock.started(progress, max_minutes=run.training.max_minutes)
    fit_steps = partial(_fit_steps, parts, progress, clock)
    length = settle_length(record, run.training, progress, exceeded=exceeded, fit_steps=fit_steps)
    if is_main:
        _write_settlement(run, length, record)
    training = length.settled(run.training)
    if not progress.step:  # the average of fresh weights is these weights
        parts = parts.averaging(training)
    parts = dataclasses.replace(parts, run=dataclasses.replace(run, training=training))
    horizon, total = step_counts(len(run.rows), training, accelerator)
    prune_ranks(parts.model, parts.optimizer.optimizer, steps=total)
    if is_main:
        warn_of_warmup(total, training)
        warn_of_absent_classes(run.rows, run.config.class_names)
        if exceeded:
            print(length.extension_note(horizon=horizon))
    progress = length.given_new_patience(progress)
    if not (progress.is_out_of_patience(training.patience) or clock.was_over(progress)):
        progress = _take_steps(parts, progress, total=total, clock=clock)
    if progress.step < total and not progress.is_out_of_patience(training.patience):
        length = dataclasses.replace(length, stop_step=progress.step)
        if is_main:
            length.write(run.output_dir)
    return progress, length


def _with_fitting_batch(parts: _Parts, progress: Progress) -> _Parts:
    """The same with a batch that fits in memory: the recorded one, or before the first step the plan's, if it does."""
    run, accelerator = parts.run, parts.accelerator
    is_planned = run.plan is not None and not (run.plan.is_given("batch_size") or progress.step)
    slices = training_slices(run.rows, run.config, run.training, label_size=parts.model.logits_size)
    options = {"dice_weight": run.training.dice_weight, "accelerator": accelerator}
    training = settle_batch(
        run.output_dir,
        run.training,
        try_batch=partial(pass_once, parts.model, slices, **options) if is_planned else None,
        accelerator=accelerator,
    )
    return dataclasses.replace(parts, run=dataclasses.replace(run, training=training))


def _take_steps(parts: _Parts, progress: Progress, *, total: int, clock: Clock) -> Progress:
    """Take steps until `total`, until the time is over or until patience is; validate and save on the way."""
    run, training, accelerator = parts.run, parts.run.training, parts.accelerator
    is_main = accelerator.is_main_process
    ends_s = [time.perf_counter()]
    log = EventLog(run.output_dir / "logs", start=progress.step, enabled=is_main)
    steps = parts.steps(training, start=progress.step)
    with StopSignal() as stop_signal:
        for step in _with_bar(steps, done=progress.step, total=total, shown=is_main):
            ends_s.append(time.perf_counter())
            parts.folder.is_used = True
            log.write(step.scalars(), step=step.number)
            if parts.average is not None:
                parts.average.update(step.number)
            progress = progress.stepped(step.number, loss=step.loss, seconds=clock.seconds())
            is_last = step.number == total or clock.is_over(accelerator)
            if step.ends_epoch or is_last:
                is_due = is_last and training.max_steps is not None  # which may lie within an epoch
                with contextlib.nullcontext() if parts.average is None else parts.average.in_place():
                    progress = _validate_and_save(parts, step, progress, log=log, is_due=is_due)
                progress = dataclasses.replace(progress, seconds=clock.seconds())
                is_last = is_last or progress.is_out_of_patience(training.patience) or clock.is_over(accelerator)
            stopping = stop_on_any_process(stop_signal, accelerator)
            if is_last and is_main:
                # Before the last checkpoint, since a run that goes on from there has no step to measure.
                write_resources(run.output_dir, parts.model, ends_s, accelerator=accelerator)
            if stopping or step.ends_epoch or is_last or step.number % training.checkpoint_steps == 0:
                parts.save(progress)
            if stopping:
                accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one has ended
                raise RunInterruptedError(f"stopped by a signal after step {step.number}; --resume goes on from there")
            if is_last:
                break
    return progress


def _write_settlement(run: Run, length: LengthRecord, before: LengthRecord) -> None:
    """Record length and plan of a run that can begin or go on, and say what was decided anew."""
    if length != before:
        length.write(run.output_dir)
    if run.plan is not None:
        write_plan(run.plan, run.output_dir / PLAN_FILE)
    if length.decisions and length.decisions != before.decisions:
        print(length.settlement_note(run.training))


def _fit_steps(parts: _Parts, progress: Progress, clock: Clock) -> Fitted:
    """Further steps that fit into the minutes; the first ones are tried and undone."""
    run, accelerator, minutes = parts.run, parts.accelerator, parts.run.training.max_minutes
    assert minutes is not None, "asked for minutes only"
    begun = time.perf_counter()
    most = progress.step + WARM_STEPS + TIMED_STEPS
    trial = dataclasses.replace(run.training, max_minutes=None, max_steps=most)
    with kept_state(parts.model, parts.optimizer, accelerator=accelerator):
        step_s = seconds_per_step(
            parts.steps(trial, start=progress.step), limit_s=60 * minutes, accelerator=accelerator
        )
    before_saving = time.perf_counter()
    parts.save(progress)
    epoch_end_s, validation_s = 2 * (time.perf_counter() - before_saving), 0.0  # checkpoint and adapter
    if run.validation is not None and run.training.validate_epochs:
        validation_s = seconds_to_validate(parts.model, *run.validation, accelerator=accelerator)
    timing = Timing(step_s, epoch_end_s, time.perf_counter() - begun, validation_s)
    (timing, used_s) = broadcast_object_list([timing, clock.seconds()])
    per_epoch = steps_per_epoch(len(run.rows), run.training, accelerator)
    fit = partial(steps_that_fit, timing=timing, used_s=used_s, per_epoch=per_epoch)
    return Fitted(*fitted_steps(run.training, run.plan, progress, fit=fit), timing.step_s)


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


def _validate_and_save(parts: _Parts, step: Step, progress: Progress, *, log: EventLog, is_due: bool) -> Progress:
    """Validate if this epoch or the end is due, and save the adapter: the best so far, and the last."""
    run, training, accelerator = parts.run, parts.run.training, parts.accelerator
    is_due = is_due or (step.ends_epoch and step.epoch % max(training.validate_epochs, 1) == 0)
    if run.validation is not None and training.validate_epochs and is_due:
        dice, by_class = validation_dice(parts.model, *run.validation, accelerator=accelerator)
        log.write(dice_scalars(dice, by_class), step=step.number)
        progress = progress.validated(dice, epoch=step.epoch)
        if (parting := progress.parting()) is not None:
            progress = dataclasses.replace(progress, has_parted=True)
            if accelerator.is_main_process:
                warnings.warn(parting, stacklevel=4)
        if accelerator.is_main_process and progress.since_best == 0:
            save_adapter(parts.model, run.output_dir / "adapter_best", training=training)
    if accelerator.is_main_process:
        save_adapter(parts.model, run.output_dir / "adapter", training=training)
    return progress
