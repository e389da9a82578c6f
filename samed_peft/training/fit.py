"""A whole training run, from a configuration and slices to an adapter on disk; resumable at any step."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from tqdm import tqdm

from samed_peft.adapters.save_load import add_lora, save_adapter
from samed_peft.config import SamedConfig, TrainingConfig
from samed_peft.datasets.rows import warn_of_absent_classes
from samed_peft.errors import RunInterruptedError
from samed_peft.io import Volume
from samed_peft.models.bases import load_sam
from samed_peft.models.modeling import config_of
from samed_peft.models.precision import hold_frozen_weights, product_dtype
from samed_peft.training import state
from samed_peft.training.adalora import prune_ranks
from samed_peft.training.batches import TrainingSlices
from samed_peft.training.loop import Step, build_optimizer, steps_per_epoch, training_steps
from samed_peft.training.resources import StepClock, write_resources
from samed_peft.training.validation import mean_dice

Volumes = Mapping[str, Volume]


@dataclass(frozen=True)
class Run:
    """What is trained on what, and where it is kept.

    Attributes:
        config: what the adapter is to be.
        training: how it is trained.
        rows: training slices, from `load_synapse` or `load_slices`.
        output_dir: gets `adapter`, `adapter_best` with a validation, `checkpoints`, `logs`, `run.json` and
            `resources.json`.
        data: names of all data that decide the result, kept in `run.json`.
        validation: scans and references to validate on, or None.
    """

    config: SamedConfig
    training: TrainingConfig
    rows: Dataset
    output_dir: Path
    data: tuple[str, ...]
    validation: tuple[Volumes, Volumes] | None = None


def fit(run: Run, *, accelerator: Accelerator, resume: bool = False) -> tuple[Path, dict[str, Any]]:
    """Train an adapter, or go on with training it.

    A checkpoint is written every `checkpoint_steps` steps and after each epoch; a run that is killed and resumed ends
    with the adapter of one that was not, to the bit.

    Args:
        run: what to train.
        accelerator: its processes and precision; made with `log_with="tensorboard"` and the run's folder.
        resume: whether a run already in the folder is to be continued.

    Returns:
        The folder of the adapter to use (of the best validation, or the last), and the run's settings.

    Raises:
        InputError: the folder holds something else, or base and data do not fit.
        NonFiniteLossError: training diverged.
        RunInterruptedError: a signal came; everything is saved.
    """
    out, training = run.output_dir, run.training
    # The seed decides the fresh weights; order and augmentation depend on (seed, epoch, slice).
    set_seed(training.seed)
    sam = load_sam(run.config.base, class_names=run.config.class_names, image_size=run.config.image_size)
    if training.gradient_checkpointing:
        sam.activation_checkpointing_enable()
    model = add_lora(sam, run.config)
    hold_frozen_weights(model, product_dtype(accelerator))
    config = config_of(sam)  # with the base's fingerprint and revision
    optimizer = build_optimizer(model, weight_decay=training.weight_decay, lora_plus_ratio=training.lora_plus_ratio)
    per_epoch = steps_per_epoch(len(run.rows), training, accelerator)
    prune_ranks(model, optimizer, steps=per_epoch * training.stop_epoch)
    trained = prepared, optimizer = accelerator.prepare(model, optimizer)
    seed = training.seed if training.augment else None
    slices = TrainingSlices(run.rows, image_size=config.image_size, label_size=sam.logits_size, seed=seed)

    settings = state.run_settings(config, training, data=run.data, accelerator=accelerator)
    state.claim_run_folder(out, settings, resume=resume, accelerator=accelerator)
    progress = state.load_checkpoint(out / "checkpoints", *trained, accelerator=accelerator)
    if accelerator.is_main_process:
        warn_of_absent_classes(run.rows, config.class_names)
        if resume and not progress.step:
            warnings.warn(f"nothing to resume in {out}: it has no checkpoint, so the run begins anew", stacklevel=2)
    steps = training_steps(prepared, optimizer, slices, training=training, accelerator=accelerator, start=progress.step)
    bar = tqdm(steps, desc="training", initial=progress.step, unit="step", disable=not accelerator.is_main_process)
    clock = StepClock()
    with state.tracked(accelerator, start=progress.step), state.StopSignal() as stop_signal:
        for step in bar:
            clock.step_done()
            progress = progress.at(step.number)
            accelerator.log(step.scalars(), step=step.number)
            _show(bar, step, total=step.steps_per_epoch * training.stop_epoch)
            if run.validation is not None and step.ends_epoch and step.epoch % training.validate_epochs == 0:
                dice = mean_dice(model, *run.validation, accelerator=accelerator)
                accelerator.log({"validation/dice": dice}, step=step.number)
                progress = progress.validated(dice, epoch=step.epoch)
                if accelerator.is_main_process and progress.best_epoch == step.epoch:
                    save_adapter(model, out / "adapter_best", training=training)
            if step.ends_epoch and accelerator.is_main_process:
                save_adapter(model, out / "adapter", training=training)
            stopping = stop_signal.on_any_process(accelerator)
            if stopping or step.ends_epoch or step.number % training.checkpoint_steps == 0:
                state.save_checkpoint(out / "checkpoints", *trained, progress=progress, accelerator=accelerator)
            if stopping:
                raise RunInterruptedError(f"stopped by a signal after step {step.number}; --resume goes on from there")
    if accelerator.is_main_process:
        write_resources(out, model, clock, accelerator=accelerator)
    return out / ("adapter" if progress.best_epoch is None else "adapter_best"), settings


def _show(bar: "tqdm[Step]", step: Step, *, total: int) -> None:
    bar.total = total
    bar.set_postfix(loss=f"{step.loss:.3f}", rate=f"{step.learning_rate:.1e}", refresh=False)
