"""The inputs of a decision: data, machine, base, options that users give, and earlier decisions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any

from samed_peft.config import METHODS
from samed_peft.datasets.fingerprint import Fingerprint
from samed_peft.errors import InputError
from samed_peft.models.geometry import BaseGeometry
from samed_peft.training.machine import Machine


@dataclass(frozen=True)
class Constants:
    """Numbers that the rules of a plan use, all in one table."""

    # The data.
    inside_window: float = 0.5  # of the span of nine tenths of the labelled voxels, for SAMed's window to do
    least_window_hu: float = 400.0  # width of SAMed's window
    window_margin: float = 0.25  # on each side, of the span of labelled voxels, so that their surroundings show
    most_slice_distance_mm: float = 4.0  # beyond it, neighbouring slices show other anatomy
    neighbour_mm: float = 1.0  # distance of the slices in the outer channels; at least the next ones
    rare: float = 0.1  # share of the slices below which a class is rare
    foreground_share: float = 0.33  # of slices drawn by class, as nnU-Net draws patches

    # What the encoder sees.
    enlargement: float = 2.0  # times the longer side of slices: small organs of small scans gain from more pixels
    least_pixels: int = 256  # below the size that a base was trained at; bases trained at less keep their size
    most_pixels: int = 512  # SAMed's size; a quarter of the memory and time of SAM's own
    step_in_patches: int = 4  # sizes are multiples of so many patches

    # Steps and batches.
    slices_per_step: int = 32
    num_workers: int = 2  # with a GPU
    most_of_data: float = 0.25  # share of the training slices in a step, so that batches differ
    least_steps: int = 1500
    most_steps: int = 15_000  # SAMed takes 14,700
    passes: int = 20  # over all training slices
    warmup_share: float = 0.05
    most_warmup_steps: int = 250  # SAMed's

    # The optimizer.
    # SAMed's rate of 0.005 is too fast for LoRA+ and these targets. Losses after 100 steps of 16 slices of the
    # hippocampus, tiny SAM, one seed: 0.24 at 0.002 with ratios 4 and 8, 0.41 with 16; 0.25 at 0.003 and 0.35 at 0.004
    # with 8; 0.27 at 0.004 without LoRA+.
    learning_rate: float = 0.003
    batch_of_rate: int = 32  # below it, the rate falls with the square root of the batch
    max_grad_norm: float = 1.0
    weight_decay: float = 0.01
    lora_plus_ratio: float = 8.0
    rank: int = 8
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "lin1", "lin2")
    averaged_share: float = 0.05  # share of the steps that the moving average of the weights looks back
    least_averaged_steps: int = 10
    most_average: float = 0.999

    # Cases.
    folds: int = 5
    validation_share: float = 0.2
    least_patients_to_validate: int = 4  # to train on, before some of them are taken
    validations: int = 12  # over the whole training
    least_validations_for_patience: int = 8

    # Memory and time.
    share_of_memory: float = 0.8  # of the free memory
    share_of_time: float = 0.9  # the rest is for validation and saving
    token_us: float = 23.0  # of a training step on two cores of a Xeon in float32, for each token of a layer
    token_us_per_square_width: float = 2.0e-4  # the same, in proportion to the square of its width
    speed_of_bf16: float = 1.8  # over float32, on CPUs that have it
    cores_of_time: int = 2
    most_cores: int = 16  # more make such small products no faster


CONSTANTS = Constants()

OPTIONS: Mapping[str, type | UnionType] = {
    "method": str,
    "input_size": int,
    "empty_share": float | int,
    "decay_power": float | int,
    "stop_step": int,
    "test_cases": tuple,
    "split_file": str,
    "validation_cases": tuple,
}
"""Options that rules read although no decision is about them, and what their values are in a plan."""


@dataclass
class Situation:
    """What rules decide from: see `make_plan`. `chosen` grows with each decision."""

    data: Fingerprint
    machine: Machine
    base: BaseGeometry
    given: Mapping[str, Any]
    max_minutes: float | None
    seconds_per_step: float | None
    timed_work: float | None = None  # `step_work` of the step that took these seconds; None: that of this plan
    chosen: dict[str, Any] = field(default_factory=dict)

    def is_used(self, name: str) -> bool:
        """Whether the method takes an option; unknown methods are refused with their names by `SamedConfig`."""
        method = METHODS.get(self.given.get("method", "lora"))
        return method is not None and name in method.options

    @property
    def held_out_patients(self) -> tuple[int, int]:
        """Patients to test and to validate on."""
        rest = self.data.patients
        test = 0
        if self.chosen.get("fold") != "all":
            test = math.ceil(rest / self.chosen.get("folds", CONSTANTS.folds))
        if "test_cases" in self.given:
            test = len(self.given["test_cases"])
        test = min(test, rest - 1)
        rest -= test
        share = self.chosen.get("validation_share", 0.0)
        validation = max(1, round(share * rest)) if share and rest >= CONSTANTS.least_patients_to_validate else 0
        if "validation_cases" in self.given:
            validation = len(self.given["validation_cases"])
        return test, min(validation, rest - 1)

    @property
    def training_slices(self) -> int:
        """Slices to train on, if those held out are of patients like the others."""
        share = 1 - sum(self.held_out_patients) / self.data.patients
        return max(1, round(share * self._kept_slices))

    @property
    def least_training_slices(self) -> int:
        """Slices to train on at the least, whichever patients are held out."""
        held_out, (fewest, _, most) = sum(self.held_out_patients), self.data.patient_slices
        without = self.data.slices - held_out * most
        dropped = self.data.slices - self._kept_slices
        return max(1, max(without, (self.data.patients - held_out) * fewest) - dropped)

    @property
    def _kept_slices(self) -> int:
        empty = self.data.empty_slices
        return max(1, self.data.slices - empty + round(self.given.get("empty_share", 1.0) * empty))

    @property
    def slices_per_step(self) -> int:
        """Slices of an optimizer step, of all processes together."""
        return int(self.chosen["batch_size"] * self.chosen["accumulation_steps"]) * self.machine.processes

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that a pass over all training slices takes."""
        return math.ceil(self.training_slices / self.slices_per_step)

    @property
    def step_seconds(self) -> float | None:
        """Seconds that a step takes: as given, or estimated for CPUs; None for other devices."""
        if self.seconds_per_step is not None:
            return self.seconds_per_step * (self.step_work / self.timed_work if self.timed_work else 1.0)
        if self.machine.device != "cpu":
            return None
        cores = CONSTANTS.cores_of_time / min(self.machine.cores, CONSTANTS.most_cores)
        token_us = CONSTANTS.token_us + CONSTANTS.token_us_per_square_width * self.base.width**2
        seconds = token_us * 1e-6 * self.step_work / self.machine.processes * cores
        return seconds / (CONSTANTS.speed_of_bf16 if self.chosen.get("mixed_precision") == "bf16" else 1)

    @property
    def step_work(self) -> float:
        """Tokens of all layers in an optimizer step, to which its time is in proportion."""
        tokens: float = (self.chosen["image_size"] / self.base.patch_size) ** 2 * self.base.depth
        return tokens * self.slices_per_step

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training, as planned."""
        if "epochs" in self.given or "stop_epoch" in self.given:
            return int(self.given.get("stop_epoch", self.given.get("epochs"))) * self.steps_per_epoch
        if max_steps := self.given.get("max_steps") or self.chosen.get("max_steps"):
            return int(self.given.get("stop_step") or max_steps)
        of_data = self.steps_of_data
        if self.max_minutes is None or self.step_seconds is None:
            return of_data
        return max(1, int(self.max_minutes * 60 * CONSTANTS.share_of_time / self.step_seconds))

    @property
    def steps_of_data(self) -> int:
        """Optimizer steps that the number of slices asks for."""
        passes = CONSTANTS.passes * self.steps_per_epoch
        return min(max(CONSTANTS.least_steps, passes), CONSTANTS.most_steps)

    def require_time(self) -> None:
        """Refuse less time than a step takes.

        Raises:
            InputError: naming both.
        """
        seconds = self.step_seconds
        if self.max_minutes is None or seconds is None or self.max_minutes * 60 >= seconds:
            return
        how = "takes" if self.seconds_per_step is not None else "takes by estimate"
        raise InputError(
            f"expected time for one step at least, found {self.max_minutes:g} minutes ({self.max_minutes * 60:.2g} "
            f"seconds); one step of {self.slices_per_step} slices at {self.chosen['image_size']} pixels {how} "
            f"{seconds:.2g} seconds: give --max_minutes {max(1, math.ceil(100 * seconds / 60))} for about a hundred, "
            "or a smaller --image_size or --batch_size"
        )

    @property
    def free_gb(self) -> float:
        """Memory that is left for slices, with a reserve."""
        return CONSTANTS.share_of_memory * self.machine.memory_gb - self.base.weights_gb

    def slice_gb(self, image_size: int, *, checkpointed: bool) -> float:
        """Memory that a slice of a batch needs."""
        labels = len(self.data.class_voxels) + 1
        return self.base.slice_gb(image_size, num_labels=labels, checkpointed=checkpointed)
