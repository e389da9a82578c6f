"""Decide on validation cases which test-time augmentation, and which smoothing across slices, give the best masks."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from samed_peft.config import SamedConfig
from samed_peft.datasets.preprocessing import reorientation, reoriented, slice_spacing_mm
from samed_peft.io import Volume
from samed_peft.models.modeling import config_of
from samed_peft.prediction.averaging import SeenScan
from samed_peft.prediction.slices import Segmenter, choose_labels

SMOOTHING_SLICES = (0.0, 0.5, 0.75, 1.0, 1.5)
"""Standard deviations, in slices, that are tried."""

LEAST_GAIN_OF_TTA = 0.002
"""Gain of mean Dice that is worth four times the time."""

MOST_CASES = 16
"""Cases that are tried, spread over all."""


class Refinement(NamedTuple):
    """How prediction averages logits, and mean Dice without it and with it on the cases that decided.

    Attributes:
        tta: for `SamedConfig.tta`.
        smoothing_mm: for `SamedConfig.smoothing_mm`.
        dice_before: mean over cases and then classes, of plain predictions.
        dice: the same, as chosen.
    """

    tta: str
    smoothing_mm: float
    dice_before: float
    dice: float


def choose_refinement(
    model: Segmenter,
    images: Mapping[str, Volume],
    references: Mapping[str, Volume],
    *,
    tried: Sequence[str] = ("shifts",),
    batch_size: int = 8,
    accelerator: Accelerator | None = None,
) -> Refinement:
    """Choose the test-time augmentation and the smoothing that predict validation cases best.

    Each case is segmented as it is and in each augmentation, and each result smoothed by several Gaussians, with
    standard deviations in units of the median slice distance; without known distances nothing is smoothed. An
    augmentation must gain `LEAST_GAIN_OF_TTA` over the best without it.

    Args:
        model: with its adapter; what its config says about both is passed over.
        images: case -> scan (D, H, W).
        references: case -> label map of the same cases, on the same grids; their `ignored_label` counts nowhere.
        tried: augmentations besides none.
        batch_size: slices per forward pass.
        accelerator: divides the cases among its processes, all of which get the same answer; None for one process.
    """
    process, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    mine = _spread(list(images))[process::processes]
    distances = _gathered([_slice_distance_mm(images[case], config_of(model)) for case in mine], processes)
    known = [distance for distance in distances if distance is not None]
    smoothings = [number * float(np.median(known)) for number in SMOOTHING_SLICES] if known else [0.0]
    views = ("none", *tried)
    own = [
        [_dice_by_smoothing(model, images[case], references[case], smoothings, tta, batch_size) for tta in views]
        for case in mine
    ]
    return _best(np.array(_gathered(own, processes)), views, smoothings)


def _gathered(own: list[Any], processes: int) -> list[Any]:
    """The entries of all processes, the same on each."""
    return gather_object(own) if processes > 1 else own


def _best(scores: np.ndarray, views: Sequence[str], smoothings: Sequence[float]) -> Refinement:
    """The choice from Dice (cases, views, smoothings, classes)."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of classes that no case has
        means = np.nanmean(np.nanmean(scores, axis=0), axis=-1)
    best = [int(np.nanargmax(of_view)) if np.isfinite(of_view).any() else 0 for of_view in means]
    chosen = 0
    for number in range(1, len(views)):
        if means[number, best[number]] > means[chosen, best[chosen]] + (LEAST_GAIN_OF_TTA if chosen == 0 else 0):
            chosen = number
    return Refinement(
        views[chosen], round(smoothings[best[chosen]], 4), float(means[0, 0]), float(means[chosen, best[chosen]])
    )


def _spread(cases: list[str]) -> list[str]:
    """At most `MOST_CASES` of the cases, evenly spaced."""
    count = min(len(cases), MOST_CASES)
    return [cases[number * len(cases) // count] for number in range(count)]


def _slice_distance_mm(image: Volume, config: SamedConfig) -> float | None:
    """Distance of a scan's slices along the adapter's plane; None of a single slice, or if it is unknown."""
    there, _ = reorientation(image, config.orientation)
    spacing_mm = slice_spacing_mm(image, there)
    return spacing_mm if len(reoriented(image.array, there)) > 1 else None


def _dice_by_smoothing(
    model: Segmenter, image: Volume, reference: Volume, smoothings: Sequence[float], tta: str, batch_size: int
) -> np.ndarray:
    """Dice (smoothings, classes) of one case; NaN for classes that neither mask nor reference has."""
    scan = SeenScan.of(image, config_of(model))
    expected = reoriented(reference.array, scan.transform)
    counted = np.ones(expected.shape, bool)
    if reference.ignored_label is not None:
        counted = expected != reference.ignored_label
    logits = scan.logits(model, batch_size=batch_size, flips=tta == "flips", shifts=tta == "shifts")
    slices = (one for part in logits for one in part.split(1))
    # Slice by slice in step, so that the logits of a few slices are in memory, not those of a whole scan.
    copies = itertools.tee(slices, len(smoothings))
    smoothed = [scan.smoothed(copy, mm) for copy, mm in zip(copies, smoothings, strict=True)]
    masks = np.empty((len(smoothings), *expected.shape), np.uint8)
    for number, versions in enumerate(zip(*smoothed, strict=True)):
        for mask, one in zip(masks, versions, strict=True):
            mask[number] = choose_labels(model, one, scan.size_hw)[0][0]
    return np.stack([_dice(mask[counted], expected[counted], len(config_of(model).class_names)) for mask in masks])


def _dice(mask: np.ndarray, expected: np.ndarray, num_classes: int) -> np.ndarray:
    """Dice (K,) of labels (N,); NaN where both lack a class."""
    both, one, other = (
        np.bincount(labels, minlength=num_classes + 1)[1 : num_classes + 1]
        for labels in (mask[mask == expected], mask, expected)
    )
    with np.errstate(invalid="ignore"):
        dice: np.ndarray = 2 * both / (one + other)
    return dice
