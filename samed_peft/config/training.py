"""How an adapter is trained: `TrainingConfig`."""

from dataclasses import dataclass

from samed_peft.config.fields import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, JsonFields, described, documented, require


@documented
@dataclass(frozen=True)
class TrainingConfig(JsonFields):
    """How an adapter is trained; the defaults are SAMed's, as published for ViT-B (arXiv 2304.13785).

    Raises:
        InputError: a value is out of range.
    """

    learning_rate: float = described("peak rate of AdamW", 0.005, POSITIVE)
    lora_plus_ratio: float = described(
        "learning rate of LoRA's B over that of all else (LoRA+, arXiv 2402.12354); 1 for none", 1.0, POSITIVE
    )
    weight_decay: float = described("decoupled weight decay", 0.1, NOT_NEGATIVE)
    max_grad_norm: float = described(
        "norm to which the gradient of all weights together is clipped; 0 for no clipping", 0.0, NOT_NEGATIVE
    )
    warmup_steps: int = described("optimizer steps of linear warm-up; 0 for none", 250, NOT_NEGATIVE)
    decay_power: float = described("exponent of the polynomial decay", 0.9)
    epochs: int = described("horizon of the decay", 200, AT_LEAST_1)
    stop_epoch: int = described("epochs actually run; SAMed stops at 160 of 200", 160, AT_LEAST_1)
    max_steps: int | None = described(
        "optimizer steps and horizon of the decay, in place of epochs and stop_epoch", None, AT_LEAST_1
    )
    stop_step: int | None = described("optimizer steps actually run, if fewer than max_steps", None, AT_LEAST_1)
    max_minutes: float | None = described(
        "minutes of training, in place of epochs and stop_epoch; max_steps is fitted to them, from the time of a step",
        None,
        POSITIVE,
    )
    batch_size: int = described("slices per process and micro-batch (SAMed: 12 on each of 2 GPUs)", 24, AT_LEAST_1)
    accumulation_steps: int = described("micro-batches per optimizer step", 1, AT_LEAST_1)
    dice_weight: float = described(
        "share of the Dice loss; cross entropy has the rest", 0.8, ("be in [0, 1]", lambda share: 0 <= share <= 1)
    )
    schedule: str = described(
        "decay of the learning rate after the warm-up: polynomial, as in SAMed, or cosine",
        "polynomial",
        ("be polynomial or cosine", ("polynomial", "cosine").__contains__),
    )
    augment: bool = described("whether slices are augmented", True)
    augmentation: str = described(
        "samed: flips, quarter turns and small rotations; strong: rotation, scale, shift, intensities and resolution, "
        "as nnU-Net's",
        "samed",
        ("be samed or strong", ("samed", "strong").__contains__),
    )
    mirror: tuple[str, ...] = described(
        "axes that the strong augmentation mirrors: rows (up and down), columns (left and right)",
        (),
        ("be some of rows, columns", lambda names: len(names) == len(set(names) & {"rows", "columns"})),
    )
    foreground_share: float = described(
        "share of each epoch's slices that is drawn by class, so that rare ones are seen; 0 for none",
        0.0,
        ("be in [0, 1]", lambda share: 0 <= share <= 1),
    )
    weight_average: float = described(
        "decay of the moving average of the weights that is validated and saved; 0 for none",
        0.0,
        ("be in [0, 1)", lambda decay: 0 <= decay < 1),
    )
    gradient_checkpointing: bool = described("recompute encoder layers in the backward pass to save memory", False)
    num_workers: int = described(
        "processes that load slices, at most one a core; 2 keep ahead of a GPU", 2, NOT_NEGATIVE
    )
    checkpoint_steps: int = described(
        "optimizer steps between two resumable checkpoints; one is written after each epoch too", 200, AT_LEAST_1
    )
    validate_epochs: int = described("epochs between two validations; 0 for none", 0, NOT_NEGATIVE)
    patience: int = described(
        "validations in a row without a better mean Dice before training stops; 0 for any number", 0, NOT_NEGATIVE
    )
    seed: int = described("seed of initialisation, order and augmentation", 1234, NOT_NEGATIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.stop_epoch <= self.epochs,
            f"stop_epoch ({self.stop_epoch}) must not exceed epochs ({self.epochs}); give stop_epoch, --stop_epoch on "
            "the command line, too",
        )
        require(
            self.max_minutes is None or self.max_steps is None,
            f"give max_minutes ({self.max_minutes}) or max_steps ({self.max_steps}), not both: minutes decide the "
            "number of steps",
        )
        require(
            self.stop_step is None or (self.max_steps is not None and self.stop_step <= self.max_steps),
            f"stop_step ({self.stop_step}) must not exceed max_steps ({self.max_steps}); give max_steps, --max_steps "
            "on the command line, too",
        )
