"""How long a training is: its number of steps, fitted to minutes or not, and what a run records of it."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from samed_peft.config import TrainingConfig
from samed_peft.errors import InputError
from samed_peft.io import read_json, write_json
from samed_peft.training.planning import Plan
from samed_peft.training.progress import Progress, is_number
from samed_peft.training.replanning import OF_STEPS, decisions_for_steps, expected_steps

LENGTH_FILE = "length.json"
"""Record of what was decided on a run's length after its start."""

LENGTH_FIELDS = ("epochs", "stop_epoch", "max_steps", "stop_step", "max_minutes")
"""Fields of `TrainingConfig` that say how long a training is; a run that resumes may exceed them."""

_LARGEST_ERROR = 1 / 3
"""Share by which the steps that fit may differ from those expected before decisions are made anew."""

_PLANNED_SHARE = 0.97
"""Share of the minutes that steps are planned for: steps that take a little longer than timed must not be cut off."""


@dataclass(frozen=True)
class LengthRecord:
    """What `LENGTH_FILE` holds.

    Attributes:
        max_steps: steps that were fitted to minutes; None if none were.
        stop_step: the step after which the minutes were used up, if that was before `max_steps`.
        seconds_per_step: as timed for `max_steps`.
        decisions: of the plan that were made anew for `max_steps`, by name.
        extended: each time that a run went on for longer: the "step" from which on, and the settings of its length
            "before" and "after".
    """

    max_steps: int | None = None
    stop_step: int | None = None
    seconds_per_step: float | None = None
    decisions: dict[str, Any] = field(default_factory=dict)
    extended: tuple[dict[str, Any], ...] = ()

    @property
    def latest(self) -> dict[str, Any]:
        """Settings of the run's length in force, of those that were exceeded."""
        return {name: value for entry in self.extended for name, value in entry["after"].items()}

    def settled(self, training: TrainingConfig) -> TrainingConfig:
        """The training with steps in place of minutes, of which the warm-up takes a tenth at most."""
        if training.max_minutes is None:
            return training
        steps: dict[str, Any] = {"max_steps": self.max_steps, "stop_step": self.stop_step}
        decided = dataclasses.replace(training, max_minutes=None, **steps, **self.decisions)
        if self.max_steps is None:
            return decided
        return dataclasses.replace(decided, warmup_steps=min(decided.warmup_steps, self.max_steps // 10))

    def decided(self) -> dict[str, Any]:
        """What settings of a finished run add to those it was started with."""
        steps = {"max_steps": self.max_steps, "stop_step": self.stop_step}
        return steps | self.decisions if self.max_steps is not None else {}

    def settlement_note(self, training: TrainingConfig) -> str:
        """One line on the decisions that were made anew."""
        changes = ", ".join(
            f"{name} {value:g} in place of {vars(training)[name]:g}" for name, value in self.decisions.items()
        )
        return (
            f"{self.max_steps} steps of {self.seconds_per_step:.2g} s fit into {training.max_minutes:g} minutes, other "
            f"than planned; by the plan's rules for so many steps: {changes}"
        )

    def extension_note(self, *, horizon: int) -> str:
        """One line on the last time that the run went on for longer."""
        entry = self.extended[-1]
        names = entry["before"]
        changes = ", ".join(f"{name} {entry['after'][name]} in place of {names[name]}" for name in names)
        return (
            f"from step {entry['step']} on with {changes}: the learning rate follows a horizon of {horizon} steps from "
            "there on"
        )

    def given_new_patience(self, progress: Progress) -> Progress:
        """A run's position, with its patience renewed where it goes on for longer."""
        if self.extended and self.extended[-1]["step"] == progress.step:
            return dataclasses.replace(progress, since_best=0)
        return progress

    @classmethod
    def read(cls, directory: Path) -> "LengthRecord":
        """The record of a run's folder; an empty one if nothing was decided yet.

        Raises:
            InputError: the file is damaged.
        """
        file = directory / LENGTH_FILE
        if not file.is_file():
            return cls()
        found = read_json(file)
        if not isinstance(found, dict) or not found.keys() <= {field.name for field in dataclasses.fields(cls)}:
            raise _damaged(file, found)
        extended = found.get("extended", [])
        if not isinstance(extended, list):
            raise _damaged(file, found)
        record = cls(**found | {"extended": tuple(extended)})
        steps = [number for number in (record.max_steps, record.stop_step) if number is not None]
        is_sound = all(type(number) is int and 0 < number < 10**9 for number in steps)
        if not is_sound or not all(map(_is_extension, record.extended)) or not _are_decisions(record.decisions):
            raise _damaged(file, found)
        return record

    @classmethod
    def shared(cls, directory: Path, *, accelerator: Accelerator) -> "LengthRecord":
        """The record of a run's folder as the main process reads it; the same on all processes."""
        (record,) = broadcast_object_list([cls.read(directory) if accelerator.is_main_process else None])
        assert record is not None, "the main process has read it"
        return record

    def write(self, directory: Path) -> None:
        """Write the record into a run's folder."""
        write_json(directory / LENGTH_FILE, dataclasses.asdict(self))


def _are_decisions(found: object) -> bool:
    return isinstance(found, dict) and found.keys() <= {*OF_STEPS} and all(map(is_number, found.values()))


def _is_extension(entry: object) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"step", "before", "after"} or type(entry["step"]) is not int:
        return False
    sides = [entry["before"], entry["after"]]
    return all(
        isinstance(side, dict)
        and side.keys() <= {*LENGTH_FIELDS}
        and all(value is None or is_number(value) for value in side.values())
        for side in sides
    )


def _damaged(file: Path, found: object) -> InputError:
    return InputError(
        f"expected max_steps, stop_step, seconds_per_step, decisions and extended, as decided for a run, in {file}, "
        f"found {found!r:.120}; put the right file back, or choose another --output_dir"
    )


@dataclass(frozen=True)
class Timing:
    """What a training takes, in seconds: a step, saving after an epoch, what was spent to find out, a validation."""

    step_s: float
    epoch_end_s: float
    spent_s: float
    validation_s: float = 0.0

    def of_epoch_end(self, training: TrainingConfig) -> float:
        """Seconds of saving and, spread over epochs, validating."""
        return self.epoch_end_s + (self.validation_s / training.validate_epochs if training.validate_epochs else 0.0)


class Fitted(NamedTuple):
    """Steps that fit into minutes."""

    steps: int  # further ones
    decisions: dict[str, Any] | None  # that are made anew for them; None if it is too late for that
    seconds_per_step: float


def fitted_steps(
    training: TrainingConfig, plan: Plan | None, progress: Progress, *, fit: Callable[[TrainingConfig], int]
) -> tuple[int, dict[str, Any] | None]:
    """Number of further steps that fit, and the decisions that a plan's rules make anew if it expected others.

    Args:
        training: as it was planned.
        plan: that it follows, or None.
        progress: position of the run; decisions are made before its first step only.
        fit: number of steps that fit, validations included.
    """
    steps = fit(training)
    if plan is None or progress.step:
        return steps, None
    expected = expected_steps(plan)
    if expected is not None and abs(steps - expected) <= _LARGEST_ERROR * expected:
        return steps, {}
    # How often is validated decides how many steps fit, and the other way round: once each way.
    every = decisions_for_steps(plan, steps).get("validate_epochs", training.validate_epochs)
    steps = fit(dataclasses.replace(training, validate_epochs=every))
    made = decisions_for_steps(plan, steps, validate_epochs=every)
    return steps, {name: value for name, value in made.items() if value != vars(training)[name]}


def settle_length(
    record: LengthRecord,
    training: TrainingConfig,
    progress: Progress,
    *,
    exceeded: Mapping[str, Any],
    fit_steps: Callable[[], Fitted],
) -> LengthRecord:
    """Decide how many steps a training takes, unless that is recorded.

    Args:
        record: what was decided before.
        training: how long it shall be.
        progress: its position.
        exceeded: recorded settings of its length that are larger now, from `claim_run_folder`.
        fit_steps: finds the further steps that fit into the minutes; called at need, by all processes.
    """
    settled = record
    if exceeded:
        after = {name: vars(training)[name] for name in exceeded}
        entry = {"step": progress.step, "before": dict(exceeded), "after": after}
        settled = LengthRecord(decisions=record.decisions, extended=(*record.extended, entry))
    if training.max_minutes is not None and settled.max_steps is None:
        further, made, seconds = fit_steps()
        settled = dataclasses.replace(
            settled,
            max_steps=progress.step + further,
            seconds_per_step=round(seconds, 4),
            decisions=settled.decisions if made is None else made,
        )
    return settled


def steps_that_fit(training: TrainingConfig, timing: Timing, *, used_s: float, per_epoch: int) -> int:
    """Number of steps that fit into the minutes that are left, with the ends of their epochs.

    Args:
        training: with `max_minutes`.
        timing: of this training.
        used_s: seconds of the minutes that are used, those for timing included.
        per_epoch: optimizer steps in an epoch.

    Raises:
        InputError: not one does.
    """
    assert training.max_minutes is not None
    left_s = max(_PLANNED_SHARE * (60 * training.max_minutes - used_s), 0.0)
    end_s = timing.of_epoch_end(training)
    epochs, rest_s = divmod(left_s, per_epoch * timing.step_s + end_s)
    # An epoch that is not finished ends like the others.
    steps = int(epochs) * per_epoch + max(math.floor((rest_s - end_s) / timing.step_s), 0)
    if steps < 1:
        needed = used_s + (timing.step_s + end_s) / _PLANNED_SHARE
        raise InputError(
            f"expected minutes for one step more at least, found max_minutes {training.max_minutes:g} "
            f"({60 * training.max_minutes:.3g} s): here a step takes {timing.step_s:.2g} s, validating and saving "
            f"{end_s:.2g} s, and {used_s:.2g} s are used, {timing.spent_s:.2g} s of them for timing; give "
            f"--max_minutes {math.ceil(needed / 0.6) / 100:g} or more"
        )
    return steps


@dataclass(frozen=True)
class Clock:
    """Time that a training has used, over resumptions.

    Attributes:
        begun_s: `time.perf_counter()` when it had used no time.
        limit_s: seconds after which it ends; None for no limit.
    """

    begun_s: float
    limit_s: float | None

    @classmethod
    def started(cls, progress: Progress, *, max_minutes: float | None) -> "Clock":
        """A clock that goes on from the time a run has used."""
        return cls(time.perf_counter() - progress.seconds, None if max_minutes is None else 60 * max_minutes)

    def seconds(self) -> float:
        """Seconds used so far."""
        return time.perf_counter() - self.begun_s

    def was_over(self, progress: Progress) -> bool:
        """Whether the time was used up at a position, whose adapter is saved then."""
        return self.limit_s is not None and progress.seconds >= self.limit_s

    def is_over(self, accelerator: Accelerator) -> bool:
        """Whether the time is used up, as the main process sees it; every process must ask at the same step."""
        if self.limit_s is None:
            return False
        is_over = self.seconds() >= self.limit_s
        return bool(broadcast_object_list([is_over])[0]) if accelerator.num_processes > 1 else is_over
