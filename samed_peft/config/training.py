"""How an adapter is trained."""

import dataclasses
import math
from dataclasses import dataclass

from samed_peft.config.fields import JsonFields, require


@dataclass(frozen=True)
class TrainingConfig(JsonFields):
    """How an adapter is trained; the defaults are SAMed's published settings for ViT-B (arXiv 2304.13785).

    Attributes:
        learning_rate: peak rate of AdamW.
        lora_plus_ratio: learning rate of LoRA's B over that of all else (LoRA+, arXiv 2402.12354); 1 for none.
        weight_decay: decoupled weight decay.
        warmup_steps: optimizer steps of linear warm-up; 0 for none.
        decay_power: exponent of the polynomial decay.
        epochs: horizon of the decay.
        stop_epoch: epochs actually run; SAMed stops at 160 of 200.
        batch_size: slices per process and micro-batch (SAMed: 12 on each of 2 GPUs).
        accumulation_steps: micro-batches per optimizer step.
        dice_weight: share of the Dice loss; cross entropy has the rest.
        augment: whether slices are flipped and rotated.
        gradient_checkpointing: recompute encoder layers in the backward pass to save memory.
        num_workers: processes that load slices, at most one a core; 2 keep ahead of a GPU.
        checkpoint_steps: optimizer steps between two resumable checkpoints; one is written after each epoch too.
        validate_epochs: epochs between two validations; 0 for none.
        seed: seed of initialisation, order and augmentation.

    Raises:
        InputError: a value is out of range.
    """

    learning_rate: float = 0.005
    lora_plus_ratio: float = 1.0
    weight_decay: float = 0.1
    warmup_steps: int = 250
    decay_power: float = 0.9
    epochs: int = 200
    stop_epoch: int = 160
    batch_size: int = 24
    accumulation_steps: int = 1
    dice_weight: float = 0.8
    augment: bool = True
    gradient_checkpointing: bool = False
    num_workers: int = 2
    checkpoint_steps: int = 200
    validate_epochs: int = 0
    seed: int = 1234

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("epochs", "stop_epoch", "batch_size", "accumulation_steps", "checkpoint_steps"):
            value = dataclasses.asdict(self)[name]
            require(value >= 1, f"{name} must be at least 1; found {value}")
        for name in ("warmup_steps", "num_workers", "validate_epochs", "seed", "weight_decay"):
            value = dataclasses.asdict(self)[name]
            require(value >= 0, f"{name} must not be negative; found {value}")
        for name in ("learning_rate", "lora_plus_ratio"):
            value = dataclasses.asdict(self)[name]
            require(value > 0 and math.isfinite(value), f"{name} must be positive; found {value}")
        require(
            self.stop_epoch <= self.epochs,
            f"stop_epoch ({self.stop_epoch}) must not exceed epochs ({self.epochs}); give stop_epoch, --stop_epoch on "
            "the command line, too",
        )
        require(0 <= self.dice_weight <= 1, f"dice_weight must be in [0, 1]; found {self.dice_weight}")
