"""Score one pair of label maps: overlap and surface distances of each class, in both conventions."""

import math
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samed_peft.errors import InputError
from samed_peft.metrics.records import CONVENTIONS, METRICS, Comparison, Convention, Metric, Presence
from samed_peft.metrics.surfaces import border_voxels, surface_distances

DEFAULT_TOLERANCE_MM = 2.0
"""Tolerance of the surface Dice: a common choice. The distance between readers of the same organ is a better one."""

Box = tuple[slice, ...]
Pair = tuple[NDArray[Any], NDArray[Any]]
Units = dict[Convention, tuple[float, ...]]


class Score(TypedDict):
    """Dice in [0, 1] and HD95 in millimetres (`standard`) or voxels (`samed`); NaN where undefined."""

    dice: float
    hd95: float


ClassScore = dict[Metric, float]
"""All metrics of one class: shares in [0, 1] and distances in the unit of `Score`; NaN where undefined."""

ClassScores = list[ClassScore]
"""Scores of labels 1..K: label k at index k - 1."""


class CaseScores(TypedDict):
    """The scores of one case in both conventions, and which masks contain each class, label k at index k - 1."""

    standard: ClassScores
    samed: ClassScores
    presence: list[Presence]


def score_masks(
    prediction: ArrayLike,
    reference: ArrayLike,
    *,
    convention: Convention = "standard",
    spacing_zyx_mm: Sequence[float] = (1.0, 1.0, 1.0),
) -> Score:
    """Score one pair of binary masks: Dice and HD95, equal to medpy's; `score_labels` has all metrics.

    Args:
        prediction: (D, H, W) or (H, W); everything but 0 is foreground.
        reference: the same shape.
        convention: "standard" or "samed"; see the docstring of `samed_peft.metrics`.
        spacing_zyx_mm: voxel size in millimetres; for (H, W) its last two numbers. "samed" counts in voxels.

    Raises:
        InputError: shapes differ, or the convention or the spacing is unusable.
    """
    masks = np.asarray(prediction) != 0, np.asarray(reference) != 0
    (score,) = score_labels(*masks, num_classes=1, convention=convention, spacing_zyx_mm=spacing_zyx_mm)
    return {"dice": score["dice"], "hd95": score["hd95"]}


def score_labels(
    prediction: ArrayLike,
    reference: ArrayLike,
    *,
    num_classes: int,
    convention: Convention = "standard",
    spacing_zyx_mm: Sequence[float] = (1.0, 1.0, 1.0),
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
) -> ClassScores:
    """Score labels 1..K of one case, label k at index k - 1.

    Args:
        prediction: (D, H, W) or (H, W) whole numbers 0..K.
        reference: the same shape.
        num_classes: K, background left out.
        convention: "standard" or "samed".
        spacing_zyx_mm: voxel size in millimetres, used by "standard".
        tolerance_mm: largest distance of surfaces that count as equal in the surface Dice, at least 0; in "samed" a
            number of voxels.

    Raises:
        InputError: shapes differ, values are not 0..K, or the convention, spacing or tolerance is unusable.
    """
    pair = _label_maps(prediction, reference, num_classes=num_classes)
    units = _units((convention,), spacing_zyx_mm, ndim=pair[0].ndim)
    return _score(pair, num_classes, units=units, tolerance=checked_tolerance(tolerance_mm))[0][convention]


def score_case(
    prediction: ArrayLike,
    reference: ArrayLike,
    *,
    num_classes: int,
    spacing_zyx_mm: Sequence[float] = (1.0, 1.0, 1.0),
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    ignored_label: int | None = None,
) -> CaseScores:
    """`score_labels` in both conventions, at little more than the cost of one.

    Voxels whose reference is `ignored_label` count nowhere: both masks are background there. A surface that they cut
    through ends at their edge, in both masks alike.

    Raises:
        InputError: as `score_labels`, or all voxels are to be ignored.
    """
    prediction, reference = without_ignored(prediction, reference, ignored_label)
    pair = _label_maps(prediction, reference, num_classes=num_classes)
    units = _units(CONVENTIONS, spacing_zyx_mm, ndim=pair[0].ndim)
    scores, there = _score(pair, num_classes, units=units, tolerance=checked_tolerance(tolerance_mm))
    return {"standard": scores["standard"], "samed": scores["samed"], "presence": there}


def without_ignored(prediction: ArrayLike, reference: ArrayLike, ignored_label: int | None) -> Pair:
    """Both label maps, with background where the reference has `ignored_label`.

    Raises:
        InputError: all voxels are to be ignored.
    """
    first, second = np.asarray(prediction), np.asarray(reference)
    if ignored_label is None or first.shape != second.shape:  # shapes are refused where the maps are scored
        return first, second
    counted = second != ignored_label
    if not counted.any():
        raise InputError(
            f"all {second.size} voxels of the reference are to be ignored (label {ignored_label}), so nothing can be "
            "scored; leave the case out"
        )
    background = first.dtype.type(0), second.dtype.type(0)
    return np.where(counted, first, background[0]), np.where(counted, second, background[1])


def presence(case: CaseScores, index: int) -> Presence:
    """Which masks of a case contain class `index` (label `index` + 1)."""
    return case["presence"][index]


def checked_tolerance(tolerance_mm: float) -> float:
    """`tolerance_mm` as a float.

    Raises:
        InputError: it is negative or not finite.
    """
    if not 0 <= tolerance_mm < math.inf:  # written so that NaN fails too
        raise InputError(f"tolerance_mm must be 0 or a positive number of millimetres; found {tolerance_mm}")
    return float(tolerance_mm)


def _score(
    pair: Pair, num_classes: int, *, units: Units, tolerance: float
) -> tuple[dict[Convention, ClassScores], list[Presence]]:
    """Scores and presence of labels 1..K."""
    # One pass over each volume finds every class; all that follows sees small crops only.
    from scipy.ndimage import find_objects  # reading a report does not need it

    boxes = [find_objects(labels, max_label=num_classes) for labels in pair]
    scores: dict[Convention, ClassScores] = {convention: [] for convention in units}
    there: list[Presence] = []
    for label, (predicted, referenced) in enumerate(zip(*boxes, strict=True), start=1):
        if predicted is not None and referenced is not None:
            there.append("both")
            compared = _compared(pair, label, boxes=(predicted, referenced), units=units, tolerance=tolerance)
        else:
            there.append("spurious" if predicted else "missed" if referenced else "absent")
            compared = {}
        for convention, column in scores.items():
            if convention in compared:
                column.append({name: record.compute(compared[convention]) for name, record in METRICS.items()})
            else:
                column.append({name: record.absent[convention][there[-1]] for name, record in METRICS.items()})
    return scores, there


def _compared(
    pair: Pair, label: int, *, boxes: tuple[Box, Box], units: Units, tolerance: float
) -> dict[Convention, Comparison]:
    """Measurements of a class that both masks contain."""
    crops = [labels[box] == label for labels, box in zip(pair, boxes, strict=True)]
    predicted, referenced = (int(np.count_nonzero(crop)) for crop in crops)
    shared = int(np.count_nonzero(crops[0] & (pair[1][boxes[0]] == label)))
    first, second = (border_voxels(crop) + [side.start for side in box] for crop, box in zip(crops, boxes, strict=True))
    # Voxels of 1 mm: both conventions read one set of distances.
    distances = {unit: surface_distances(first, second, spacing=unit) for unit in {*units.values()}}
    return {
        convention: Comparison(predicted, referenced, shared, distances[unit], tolerance)
        for convention, unit in units.items()
    }


def _label_maps(prediction: ArrayLike, reference: ArrayLike, *, num_classes: int) -> Pair:
    first, second = np.asarray(prediction), np.asarray(reference)
    if first.shape != second.shape:
        raise InputError(
            f"prediction and reference must have one shape; found {first.shape} and {second.shape}. "
            "Bring the prediction to the reference's grid"
        )
    if first.ndim not in (2, 3) or first.size == 0:
        raise InputError(f"expected masks of shape (D, H, W) or (H, W) with voxels in them; found {first.shape}")
    return (
        _whole_numbers(first, "prediction", num_classes=num_classes),
        _whole_numbers(second, "reference", num_classes=num_classes),
    )


def _whole_numbers(labels: NDArray[Any], role: str, *, num_classes: int) -> NDArray[Any]:
    low, high = labels.min(), labels.max()
    if not (low >= 0 and high <= num_classes):  # written so that NaN fails too
        wrong = high if low >= 0 else low
        raise InputError(
            f"labels of the {role} hold {wrong:g}, but only 0..{num_classes} are named; "
            "map them to these or name more classes"
        )
    if labels.dtype.kind in "biu":
        return labels.view(np.uint8) if labels.dtype == np.bool_ else labels
    whole = labels.astype(np.int32)
    if not np.array_equal(whole, labels):
        raise InputError(f"labels of the {role} must be whole numbers; found fractions. Are they probabilities?")
    return whole


def _units(conventions: Sequence[Convention], spacing_zyx_mm: Sequence[float], *, ndim: int) -> Units:
    """Size of a voxel along each axis: the spacing in `standard`, 1 in `samed`."""
    for convention in conventions:
        if convention not in CONVENTIONS:
            raise InputError(f"convention must be one of {', '.join(CONVENTIONS)}; found {convention!r}")
    spacing = tuple(float(size) for size in spacing_zyx_mm)
    if len(spacing) not in (ndim, 3) or not all(size > 0 and math.isfinite(size) for size in spacing):
        raise InputError(f"spacing_zyx_mm must be {ndim} positive sizes in millimetres; found {tuple(spacing_zyx_mm)}")
    units: Units = {"standard": spacing[-ndim:], "samed": (1.0,) * ndim}
    return {convention: units[convention] for convention in conventions}
