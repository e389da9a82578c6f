"""Segment a whole scan with one model or several, and add up their probabilities on the scan's own grid."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
from torch import Tensor, nn

from samed_peft.config import SamedConfig
from samed_peft.datasets.channels import scaled_slices
from samed_peft.datasets.preprocessing import (
    neighbour_step,
    reorientation,
    reoriented,
    slice_spacing_mm,
)
from samed_peft.errors import InputError
from samed_peft.io import Volume
from samed_peft.models.modeling import config_of
from samed_peft.prediction.slices import Segmenter, choose_labels, slice_channels, slice_logits, smoothed_logits

Segmenters: TypeAlias = Segmenter | Sequence[Segmenter]
"""One model, or several of the same classes whose probabilities are averaged."""

PROBABILITY_BITS: dict[int, type[np.unsignedinteger[Any]]] = {8: np.uint8, 16: np.uint16}
"""Types of stored probabilities, whose largest number stands for 1."""


def as_models(model: Segmenters) -> tuple[Segmenter, ...]:
    """The models of a single one or of several.

    Raises:
        InputError: no model is given, or they have other classes, or other numbers for them in masks, than the first.
    """
    models = (model,) if isinstance(model, nn.Module) else tuple(model)
    if not models:
        raise InputError("expected at least one model, found none")
    classes = [config_of(one).class_names for one in models]
    for number, names in enumerate(classes, start=1):
        if names != classes[0]:
            raise InputError(
                f"expected models of the same classes in the same order, found {', '.join(classes[0])} in the first "
                f"and {', '.join(names)} in model {number}; average those of one task"
            )
    stored = [tuple(config_of(one).label_values or range(1, len(classes[0]) + 1)) for one in models]
    if len(set(stored)) > 1:
        found = " and ".join(str(list(values)) for values in stored)
        raise InputError(
            f"expected models that write the same numbers into masks, found {found}; average those of one task"
        )
    return models


def new_sums(models: Sequence[Segmenter], volume: Volume, bits: int) -> np.ndarray:
    """Zeros (K + 1, D, H, W), uint8 or uint16, for the probabilities of all models."""
    return np.zeros((config_of(models[0]).num_labels, *volume.array.shape[:3]), PROBABILITY_BITS[bits])


def one_of(sums: np.ndarray, models: Sequence[Segmenter]) -> int:
    """The number that stands for a probability of 1 of each model, so that those of all add up without overflow."""
    return int(np.iinfo(sums.dtype).max) // len(models)


def segmented(
    models: Sequence[Segmenter], volume: Volume, sums: np.ndarray | None, *, batch_size: int, flips: bool
) -> np.ndarray:
    """The mask on the scan's grid; probabilities of each model are added to `sums` (K + 1, D, H, W)."""
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1; found {batch_size}")
    one = None if sums is None else one_of(sums, models)
    mask = np.empty(volume.array.shape[:3], np.uint8)
    for model in models:
        config = config_of(model)
        seen = SeenScan.of(volume, config)
        # Views in the model's orientation, through which results reach the scan's grid without another copy.
        labels, *totals = (reoriented(part, seen.transform) for part in (mask, *([] if sums is None else sums)))
        views = {"flips": flips or config.tta == "flips", "shifts": config.tta == "shifts"}
        logits = seen.logits(model, batch_size=batch_size, **views)
        start = 0
        for part in seen.smoothed(logits, config.smoothing_mm):
            batch = slice(start, start + len(part))
            labels[batch], shares = choose_labels(model, part, seen.size_hw, one=one)
            for number, total in enumerate(totals):
                total[batch] += shares[:, number].astype(total.dtype, copy=False)
            start = batch.stop
    if sums is not None and len(models) > 1:
        for number in range(len(mask)):  # a slice at a time, as the index of the largest has 64 bits a voxel
            mask[number] = sums[:, number].argmax(axis=0)
    return mask


class SeenScan(NamedTuple):
    """A scan as a model sees it.

    Attributes:
        array: normalised, (D, H, W), or (1, H, W, 3) in colour, in the model's orientation.
        transform: for `reoriented`, from the scan's orientation to the model's.
        spacing_mm: distance of its slices; None if it is unknown.
        step: slices to the neighbours that fill the outer channels; None if the slice itself does.
    """

    array: np.ndarray
    transform: np.ndarray | None
    spacing_mm: float | None
    step: int | None

    @classmethod
    def of(cls, volume: Volume, config: SamedConfig) -> Self:
        """Normalise and turn a scan as an adapter's config says."""
        there, _ = reorientation(volume, config.orientation)
        spacing = slice_spacing_mm(volume, there)
        step = _neighbour_step(volume, spacing, config)
        array = scaled_slices(volume, config.window, channels=config.channels)
        return cls(reoriented(array, there), there, spacing, step)

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of its slices."""
        return self.array.shape[1], self.array.shape[2]

    def logits(
        self, model: Segmenter, *, batch_size: int, flips: bool = False, shifts: bool = False
    ) -> Iterator[Tensor]:
        """Logits of all slices in order, see `slice_logits`."""
        with _evaluating(model):
            for start in range(0, len(self.array), batch_size):
                channels = slice_channels(self.array, slice(start, start + batch_size), self.step)
                yield from slice_logits(model, channels, batch_size=batch_size, flips=flips, shifts=shifts)

    def smoothed(self, logits: Iterable[Tensor], smoothing_mm: float) -> Iterable[Tensor]:
        """The logits smoothed across slices, see `smoothed_logits`; as they are if the distance is unknown."""
        if not smoothing_mm or self.spacing_mm is None or len(self.array) == 1:
            return logits
        return smoothed_logits(logits, smoothing_mm / self.spacing_mm)


def _neighbour_step(volume: Volume, spacing_mm: float | None, config: SamedConfig) -> int | None:
    """Slices to the neighbours that fill the outer channels; None if the slice itself does."""
    if config.neighbour_mm is None:
        return None
    name = volume.path or "the scan"
    if volume.array.ndim == 4:
        raise InputError(f"{name} is a colour picture, but the adapter sees neighbouring slices of grey scans")
    return neighbour_step(spacing_mm, config.neighbour_mm, name=name)


@contextlib.contextmanager
def _evaluating(model: Segmenter) -> Iterator[None]:
    """Evaluation mode; the mode before returns."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def rescaled(sums: np.ndarray, one: int, bits: int) -> np.ndarray:
    """Sums in which `one` stands for 1 in the full range of 8 or 16 bits; in place if their type is the same."""
    dtype = PROBABILITY_BITS[bits]
    factor = np.float32(np.iinfo(dtype).max / one)
    if factor == 1:
        return sums
    result = sums if sums.dtype == dtype else np.empty(sums.shape, dtype)
    for number in range(sums.shape[1]):  # a slice at a time: they are floats meanwhile
        result[:, number] = np.rint(sums[:, number] * factor)
    return result
