"""Position of a run: what decides, besides weights, how its training goes on and when it stops."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

PARTING = 3
"""Validations in a row after which falling training losses and falling validation Dice are reported."""

_POSITION = ("step", "best_dice", "best_epoch")
"""Fields that every version has stored; later ones have defaults."""


@dataclass(frozen=True)
class Progress:
    """Position of a run, as a checkpoint stores it.

    Attributes:
        step: optimizer steps done.
        best_dice: best mean validation Dice so far, or None.
        best_epoch: the epoch that reached it, counted from 1.
        since_best: validations since then, or since the start without any.
        loss_sum: sum of the training losses since the last validation.
        loss_steps: number of these losses.
        recent: (mean training loss, validation Dice) of the last validations, at most `PARTING` + 1.
        has_parted: whether training and validation have been reported to part ways.
        seconds: time used for training so far.
    """

    step: int = 0
    best_dice: float | None = None
    best_epoch: int | None = None
    since_best: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    recent: tuple[tuple[float, float], ...] = ()
    has_parted: bool = False
    seconds: float = 0.0

    def stepped(self, step: int, *, loss: float, seconds: float) -> "Progress":
        """After an optimizer step, `seconds` after the start of the training."""
        total, number = self.loss_sum + loss, self.loss_steps + 1
        return dataclasses.replace(self, step=step, seconds=seconds, loss_sum=total, loss_steps=number)

    def validated(self, dice: float, *, epoch: int) -> "Progress":
        """After a validation; the earlier of two equal epochs stays the best, and NaN is never the best."""
        is_defined = not math.isnan(dice)
        best: dict[str, Any] = {"since_best": self.since_best + 1}
        if is_defined and (self.best_dice is None or dice > self.best_dice):
            best = {"best_dice": dice, "best_epoch": epoch, "since_best": 0}
        recent: tuple[tuple[float, float], ...] = ()
        if is_defined and self.loss_steps:
            recent = (*self.recent, (self.loss_sum / self.loss_steps, dice))[-PARTING - 1 :]
        return dataclasses.replace(self, **best, recent=recent, loss_sum=0.0, loss_steps=0)

    def parting(self) -> str | None:
        """What to say when training loss and validation Dice have both fallen `PARTING` times in a row; else None."""
        pairs = list(zip(self.recent, self.recent[1:], strict=False))
        if self.has_parted or len(pairs) < PARTING or not all(a[0] > b[0] and a[1] > b[1] for a, b in pairs):
            return None
        (first_loss, first_dice), (loss, dice) = self.recent[0], self.recent[-1]
        return (
            f"training and validation part ways: over {PARTING} validations in a row the training loss fell from "
            f"{first_loss:.4f} to {loss:.4f} and the validation Dice from {first_dice:.4f} to {dice:.4f}; the adapter "
            f"of epoch {self.best_epoch} (Dice {self.best_dice:.4f}) is kept. --patience {PARTING} would stop here; "
            "more cases or fewer epochs help"
        )

    def is_out_of_patience(self, patience: int) -> bool:
        """Whether `patience` validations in a row have brought no better Dice; never for 0."""
        return 0 < patience <= self.since_best

    @classmethod
    def from_dict(cls, found: object) -> "Progress | None":
        """The progress that a checkpoint stored, of this version or an earlier one; None for anything else."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(found, dict) or not {*_POSITION} <= found.keys() <= fields:
            return None
        values = {field.name: field.default for field in dataclasses.fields(cls)} | found
        recent = values["recent"]
        if not isinstance(recent, list | tuple) or len(recent) > PARTING + 1:
            return None
        if not all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_finite, pair)) for pair in recent):
            return None
        progress = cls(**values | {"recent": tuple((loss, dice) for loss, dice in recent)})
        return progress if progress._is_possible() else None

    def _is_possible(self) -> bool:
        counts = (self.step, self.since_best, self.loss_steps, 0 if self.best_epoch is None else self.best_epoch)
        shares = (0 if self.best_dice is None else self.best_dice, *(dice for _, dice in self.recent))
        return (
            all(type(count) is int and 0 <= count < 10**9 for count in counts)
            and all(is_number(share) and share <= 1 for share in shares)
            and _is_finite(self.loss_sum)
            and is_number(self.seconds)
            and isinstance(self.has_parted, bool)
        )


def is_number(value: object) -> bool:
    """Whether a JSON value is a number, 0 or more and finite."""
    return _is_finite(value) and value >= 0  # type: ignore[operator]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and -math.inf < value < math.inf
