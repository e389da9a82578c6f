"""Decide on validation cases which test-time augmentation, and which smoothing across slices, give the best masks."""

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from samed_peft.datasets.preprocessing import reoriented
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
    """
    cases = _spread(list(images))
    unit_mm = _slice_distance_mm(model, images, cases)
    smoothings = [number * unit_mm for number in SMOOTHING_SLICES] if unit_mm else [0.0]
    views = ("none", *tried)
    scores = np.stack(
        [
            [_dice_by_smoothing(model, images[case], references[case], smoothings, tta, batch_size) for tta in views]
            for case in cases
        ]
    )  # cases, views, smoothings, classes
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


def _slice_distance_mm(model: Segmenter, images: Mapping[str, Volume], cases: Sequence[str]) -> float | None:
    """Median distance of the slices of scans that have several; None if none is known."""
    scans = [SeenScan.of(images[case], config_of(model)) for case in cases]
    known = [scan.spacing_mm for scan in scans if scan.spacing_mm is not None and len(scan.array) > 1]
    return float(np.median(known)) if known else None


def _dice_by_smoothing(
    model: Segmenter, image: Volume, reference: Volume, smoothings: Sequence[float], tta: str, batch_size: int
) -> np.ndarray:
    """Dice (smoothings, classes) of one case; NaN for classes that neither mask nor reference has."""
    scan = SeenScan.of(image, config_of(model))
    expected = reoriented(reference.array, scan.transform)
    counted = np.ones(expected.shape, bool)
    if reference.ignored_label is not None:
        counted = expected != reference.ignored_label
    parts: list[Tensor] = list(scan.logits(model, batch_size=batch_size, flips=tta == "flips", shifts=tta == "shifts"))
    rows = []
    for smoothing_mm in smoothings:
        chosen = [choose_labels(model, part, scan.size_hw)[0] for part in scan.smoothed(parts, smoothing_mm)]
        rows.append(_dice(np.concatenate(chosen)[counted], expected[counted], len(config_of(model).class_names)))
    return np.stack(rows)


def _dice(mask: np.ndarray, expected: np.ndarray, num_classes: int) -> np.ndarray:
    """Dice (K,) of labels (N,); NaN where both lack a class."""
    both, one, other = (
        np.bincount(labels, minlength=num_classes + 1)[1 : num_classes + 1]
        for labels in (mask[mask == expected], mask, expected)
    )
    with np.errstate(invalid="ignore"):
        dice: np.ndarray = 2 * both / (one + other)
    return dice
