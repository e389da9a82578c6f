"""Segment a whole scan with one model or several, and add up their probabilities on the scan's own grid."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from torch import nn

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
from samed_peft.prediction.slices import Segmenter, segment_slices, slice_channels

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
        there, _ = reorientation(volume, config.orientation)
        array = reoriented(scaled_slices(volume, config.window, channels=config.channels), there)
        step = _neighbour_step(volume, slice_spacing_mm(volume, there), config)
        # Views in the model's orientation, through which results reach the scan's grid without another copy.
        labels, *totals = (reoriented(part, there) for part in (mask, *([] if sums is None else sums)))
        with _evaluating(model):
            for start in range(0, len(array), batch_size):
                batch = slice(start, start + batch_size)
                labels[batch], shares = segment_slices(
                    model, slice_channels(array, batch, step), batch_size=batch_size, flips=flips, one=one
                )
                for number, total in enumerate(totals):
                    total[batch] += shares[:, number].astype(total.dtype, copy=False)
    if sums is not None and len(models) > 1:
        for number in range(len(mask)):  # a slice at a time, as the index of the largest has 64 bits a voxel
            mask[number] = sums[:, number].argmax(axis=0)
    return mask


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
