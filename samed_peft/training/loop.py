"""Optimizer steps over all epochs, from any step on, with SAMed's schedule of the learning rate."""

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from samed_peft.config import TrainingConfig
from samed_peft.errors import InputError, NonFiniteLossError
from samed_peft.models.losses import loss_parts
from samed_peft.training.adalora import orthogonality
from samed_peft.training.batches import TrainingSlices, batch_loader, epoch_batches
from samed_peft.training.sampling import ClassBalance

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """Result of one optimizer step.

    Attributes:
        number: optimizer steps done, this one included.
        steps_per_epoch: optimizer steps in each epoch.
        learning_rate: rate used in this step.
        loss: total loss; its parts are `cross_entropy` and `dice`.
    """

    number: int
    steps_per_epoch: int
    learning_rate: float
    loss: float
    cross_entropy: float
    dice: float

    @property
    def epoch(self) -> int:
        """The epoch this step belongs to, counted from 1."""
        return (self.number - 1) // self.steps_per_epoch + 1

    @property
    def ends_epoch(self) -> bool:
        """Whether this is its epoch's last step."""
        return self.number % self.steps_per_epoch == 0

    def scalars(self) -> dict[str, float]:
        """Values for a log."""
        return {
            "train/loss": self.loss,
            "train/cross_entropy": self.cross_entropy,
            "train/dice_loss": self.dice,
            "train/learning_rate": self.learning_rate,
        }


def build_optimizer(
    model: nn.Module, *, weight_decay: float, lora_plus_ratio: float = 1.0, max_grad_norm: float = 0.0
) -> torch.optim.AdamW:
    """SAMed's AdamW over the trainable weights; `train_step` sets the learning rate before each step.

    Args:
        model: with an adapter.
        weight_decay: decoupled weight decay.
        lora_plus_ratio: learning rate of LoRA's B relative to all other weights (LoRA+, arXiv 2402.12354).
        max_grad_norm: norm to which `train_step` clips the gradient of all weights together; 0 for no clipping.

    Raises:
        InputError: `lora_plus_ratio` is set, but the method has no B.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    faster = [p for name, p in trainable if ".lora_B." in name] if lora_plus_ratio != 1 else []
    if lora_plus_ratio != 1 and not faster:
        raise InputError(f"lora_plus_ratio means nothing to a method without LoRA's B; found {lora_plus_ratio}, use 1")
    faster_ids = {id(parameter) for parameter in faster}
    groups = [{"params": [p for _, p in trainable if id(p) not in faster_ids], "lr_ratio": 1.0}]
    if faster:
        groups.append({"params": faster, "lr_ratio": lora_plus_ratio})
    for group in groups:
        group["max_grad_norm"] = max_grad_norm
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), weight_decay=weight_decay, fused=True)


def steps_per_epoch(num_slices: int, training: TrainingConfig, accelerator: Accelerator) -> int:
    """Optimizer steps that one pass over all slices takes."""
    return math.ceil(num_slices / (training.batch_size * accelerator.num_processes * training.accumulation_steps))


def step_counts(num_slices: int, training: TrainingConfig, accelerator: Accelerator) -> tuple[int, int]:
    """Horizon of the learning rate's decay, and number of optimizer steps run; minutes have become steps before."""
    assert training.max_minutes is None, "settle_length decides the steps"
    if training.max_steps is not None:
        return training.max_steps, training.stop_step or training.max_steps
    per_epoch = steps_per_epoch(num_slices, training, accelerator)
    return training.epochs * per_epoch, training.stop_epoch * per_epoch


def training_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    slices: TrainingSlices,
    *,
    training: TrainingConfig,
    accelerator: Accelerator,
    start: int = 0,
) -> Iterator[Step]:
    """Train from step `start` to the last one; yields after every optimizer step.

    Args:
        model: prepared by `accelerator`.
        optimizer: prepared by `accelerator`.
        slices: training examples.
        training: epochs, batch size, learning rate and so on.
        accelerator: devices, precision, processes.
        start: optimizer steps done before, by the run that is resumed.

    Raises:
        NonFiniteLossError: before any weight is changed by that loss.
    """
    split = {"process": accelerator.process_index, "num_processes": accelerator.num_processes}
    share = training.foreground_share
    balance = ClassBalance.of_rows(slices.rows, share=share) if share else None
    size, accumulation = training.batch_size, training.accumulation_steps
    micro_batches = math.ceil(len(slices) / (size * accelerator.num_processes))
    per_epoch = steps_per_epoch(len(slices), training, accelerator)
    horizon, total = step_counts(len(slices), training, accelerator)
    rate = partial(
        learning_rate,
        peak=training.learning_rate,
        warmup_steps=training.warmup_steps,
        max_steps=horizon,
        power=training.decay_power,
        schedule=training.schedule,
    )
    epochs = (
        epoch_batches(len(slices), batch_size=size, seed=training.seed, epoch=epoch, balance=balance, **split)
        for epoch in range(start // per_epoch, math.ceil(total / per_epoch))
    )
    # One loader for all epochs: workers keep running and prefetch the next epoch's first slices.
    to_come = itertools.islice(itertools.chain.from_iterable(epochs), start % per_epoch * accumulation, None)
    loaded = batch_loader(slices, to_come, num_workers=training.num_workers, device=accelerator.device)
    for number in range(start, total):
        left_of_epoch = micro_batches - number % per_epoch * accumulation
        _seed_dropout(training.seed, step=number, process=accelerator.process_index)
        parts = train_step(
            model,
            list(itertools.islice(loaded, min(accumulation, left_of_epoch))),
            optimizer,
            accelerator=accelerator,
            learning_rate=rate(number),
            dice_weight=training.dice_weight,
        )
        yield Step(number + 1, per_epoch, rate(number), *parts)


def _seed_dropout(seed: int, *, step: int, process: int) -> None:
    # Only dropout draws from the global state; seeded by the step, it needs no place in checkpoints.
    torch.manual_seed(int(np.random.SeedSequence((seed, step, process)).generate_state(1, np.uint64)[0]))


def train_step(
    model: nn.Module,
    group: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    accelerator: Accelerator,
    learning_rate: float,
    dice_weight: float = 0.8,
) -> tuple[float, float, float]:
    """One optimizer step on the mean loss of a group of micro-batches.

    Dice and cross entropy of a micro-batch are computed over all processes together.

    Args:
        model: prepared by `accelerator`.
        group: micro-batches on the accelerator's device: `pixel_values` (B, 3, S, S) and `labels` (B, h, h).
        optimizer: prepared by `accelerator`.
        accelerator: devices, precision, processes.
        learning_rate: rate of this step.
        dice_weight: share of the Dice loss.

    Returns:
        Mean (loss, cross entropy, Dice loss), the same on every process.

    Raises:
        NonFiniteLossError: before any weight is changed.
    """
    model.train()
    for parameters in optimizer.param_groups:
        parameters["lr"] = learning_rate * parameters.get("lr_ratio", 1.0)
    parts = _accumulate(model, group, accelerator=accelerator, dice_weight=dice_weight)
    if not math.isfinite(parts[0]):
        optimizer.zero_grad()
        raise NonFiniteLossError(
            f"the loss is {parts[0]} at learning rate {learning_rate:g}; the last saved adapter and checkpoint are "
            "kept. Try a lower --learning_rate, or bf16 in place of fp16"
        )
    if max_norm := optimizer.param_groups[0].get("max_grad_norm", 0.0):
        weights = [weight for parameters in optimizer.param_groups for weight in parameters["params"]]
        accelerator.clip_grad_norm_(weights, max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return parts


def _accumulate(
    model: nn.Module, group: Sequence[Batch], *, accelerator: Accelerator, dice_weight: float
) -> tuple[float, float, float]:
    """Accumulate the gradients of a group's mean loss; return the mean (loss, cross entropy, Dice loss)."""
    totals = torch.zeros(3, device=accelerator.device)
    for index, batch in enumerate(group):
        # Processes exchange gradients once a group, with its last micro-batch.
        exchange = index == len(group) - 1
        with contextlib.nullcontext() if exchange else accelerator.no_sync(model):
            parts = loss_parts(
                _at_size_of(model(pixel_values=batch["pixel_values"]).logits, batch["labels"]),
                batch["labels"],
                dice_weight=dice_weight,
                sum_over_processes=_global_sum(accelerator),
            )
            penalty = orthogonality(model)
            if torch.isfinite(parts.total):
                accelerator.backward((parts.total if penalty is None else parts.total + penalty) / len(group))
        totals += torch.stack(parts).detach() / len(group)
    return tuple(totals.tolist())


def _at_size_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (B, K + 1, h, w) at the size of larger labels, as prediction resizes them."""
    if labels.shape[-1] <= logits.shape[-1]:
        return logits
    return F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)


def _global_sum(accelerator: Accelerator) -> Callable[[Tensor], Tensor] | None:
    if accelerator.num_processes == 1:
        return None

    def global_sum(local: Tensor) -> Tensor:
        total = accelerator.reduce(local.detach(), reduction="sum")
        # The value is the total; the gradient is the local one, times N because DDP averages over N processes.
        return total + (local - local.detach()) * accelerator.num_processes

    return global_sum


def warn_of_warmup(total: int, training: TrainingConfig) -> None:
    """Warn if a training of `total` steps ends before its warm-up does."""
    if total <= training.warmup_steps:
        last = learning_rate(
            total - 1, peak=training.learning_rate, warmup_steps=training.warmup_steps, max_steps=total
        )
        warnings.warn(
            f"all {total} steps lie within the warm-up of {training.warmup_steps}, so the learning rate rises to "
            f"{last:.2g} of {training.learning_rate:g} at most; choose --warmup_steps {total // 10}, or train longer",
            stacklevel=3,
        )


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, max_steps: int, power: float = 0.9, schedule: str = "polynomial"
) -> float:
    """Schedule of the learning rate: the rate used in optimizer step `step` (0, 1, ...).

    The original sets the rate after each step, from the number of the step just done, so the rate lags by one:
    steps 0 and 1 share the first warm-up value, and the decay counts from the end of the warm-up (SAMed's trainer,
    commit e351840).

    Args:
        step: optimizer steps done so far.
        peak: highest rate.
        warmup_steps: steps of linear warm-up; 0 for none.
        max_steps: horizon of the polynomial decay (1 - s / max_steps) ** power.
        power: exponent of the polynomial decay.
        schedule: "polynomial", or "cosine": peak * (1 + cos(pi * s / (max_steps - warmup_steps))) / 2.
    """
    previous = step - 1
    if warmup_steps and previous < warmup_steps:
        return peak * (max(previous, 0) + 1) / warmup_steps
    decayed = max(previous - warmup_steps, 0)
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * min(decayed / max(max_steps - warmup_steps, 1), 1.0))) / 2
    return peak * max(1 - decayed / max_steps, 0.0) ** power
