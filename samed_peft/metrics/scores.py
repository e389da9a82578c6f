"""Scores of one pair of label maps: overlap and surface distances of each class, in both conventions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import find_objects

from samed_peft.errors import InputError
from samed_peft.metrics.records import CONVENTIONS, METRICS, Comparison, Convention, Metric, Presence
from samed_peft.metrics.surfaces import SurfaceDistances, border_voxels, surface_distances

DEFAULT_TOLERANCE_MM = 2.0
"""Tolerance of the surface Dice: a habit, no property of any organ. What readers differ by is the better choice."""

Box = tuple[slice, ...]


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
    """Dice and HD95 of one pair of binary masks, with medpy's values; `score_labels` has further metrics.

    Args:
        prediction: (D, H, W) or (H, W); everything but 0 is foreground.
        reference: the same shape.
        convention: "standard" or "samed"; see the docstring of `samed_peft.metrics`.
        spacing_zyx_mm: voxel size in millimetres; for (H, W) its last two numbers. "samed" counts in voxels.

    Raises:
        InputError: shapes differ, or the convention or the spacing is unusable.
    """
    pair = _same_shape(np.asarray(prediction), np.asarray(reference))
    masks = [np.asarray(mask != 0) for mask in pair]
    units = _units((convention,), spacing_zyx_mm, ndim=masks[0].ndim)
    score = _score(masks, num_classes=1, units=units, tolerance=DEFAULT_TOLERANCE_MM)[0][convention][0]
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
    """Scores of labels 1..K of one case, label k at index k - 1.

    Args:
        prediction: (D, H, W) or (H, W) whole numbers 0..K.
        reference: the same shape.
        num_classes: K, background left out.
        convention: "standard" or "samed".
        spacing_zyx_mm: voxel size in millimetres, used by "standard".
        tolerance_mm: how far apart surfaces may be to count as equal in the surface Dice, at least 0. "samed",
            which knows no millimetres, takes it as a number of voxels.

    Raises:
        InputError: shapes differ, values are not 0..K, or the convention, spacing or tolerance is unusable.
    """
    pair = _label_maps(prediction, reference, num_classes=num_classes)
    units = _units((convention,), spacing_zyx_mm, ndim=pair[0].ndim)
    scores, _ = _score(pair, num_classes=num_classes, units=units, tolerance=checked_tolerance(tolerance_mm))
    return scores[convention]


def score_case(
    prediction: ArrayLike,
    reference: ArrayLike,
    *,
    num_classes: int,
    spacing_zyx_mm: Sequence[float] = (1.0, 1.0, 1.0),
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
) -> CaseScores:
    """`score_labels` in both conventions, at little more than the cost of one.

    Raises:
        InputError: as `score_labels`.
    """
    pair = _label_maps(prediction, reference, num_classes=num_classes)
    units = _units(CONVENTIONS, spacing_zyx_mm, ndim=pair[0].ndim)
    scores, there = _score(pair, num_classes=num_classes, units=units, tolerance=checked_tolerance(tolerance_mm))
    return {"standard": scores["standard"], "samed": scores["samed"], "presence": there}


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
    pair: Sequence[NDArray[Any]],
    *,
    num_classes: int,
    units: Mapping[Convention, tuple[float, ...]],
    tolerance: float,
) -> tuple[dict[Convention, ClassScores], list[Presence]]:
    """Scores and presence of labels 1..K (`True` is label 1) in a pair of equal shape."""
    # One pass over each volume finds every class; all that follows sees small crops only.
    boxes = [find_objects(_as_integers(labels), max_label=num_classes) for labels in pair]
    scores: dict[Convention, ClassScores] = {convention: [] for convention in units}
    there: list[Presence] = []
    for label, (predicted, referenced) in enumerate(zip(*boxes, strict=True), start=1):
        if predicted is not None and referenced is not None:
            there.append("both")
            found = _compared(pair, label, boxes=(predicted, referenced), units=units, tolerance=tolerance)
        else:
            there.append("spurious" if predicted else "missed" if referenced else "absent")
            found = {
                convention: {metric: record.absent[convention][there[-1]] for metric, record in METRICS.items()}
                for convention in units
            }
        for convention, score in found.items():
            scores[convention].append(score)
    return scores, there


def _compared(
    pair: Sequence[NDArray[Any]],
    label: int,
    *,
    boxes: tuple[Box, Box],
    units: Mapping[Convention, tuple[float, ...]],
    tolerance: float,
) -> dict[Convention, ClassScore]:
    """Scores of a class that both masks contain."""
    crops = [labels[box] == label for labels, box in zip(pair, boxes, strict=True)]
    predicted, referenced = (int(np.count_nonzero(crop)) for crop in crops)
    common = _overlap(boxes)
    shared = int(np.count_nonzero((pair[0][common] == label) & (pair[1][common] == label)))
    first, second = (border_voxels(crop) + [side.start for side in box] for crop, box in zip(crops, boxes, strict=True))
    distances: dict[tuple[float, ...], SurfaceDistances] = {}
    found: dict[Convention, ClassScore] = {}
    for convention, unit in units.items():
        if unit not in distances:  # voxels of 1 mm: both conventions read one set of distances
            distances[unit] = surface_distances(first, second, spacing=unit)
        comparison = Comparison(predicted, referenced, shared, distances[unit], tolerance)
        found[convention] = {metric: record.compute(comparison) for metric, record in METRICS.items()}
    return found


def _overlap(boxes: tuple[Box, Box]) -> Box:
    """The box common to both; empty along some axis if they are apart."""
    sides = zip(*boxes, strict=True)
    return tuple(slice(max(a.start, b.start), max(a.start, b.start, min(a.stop, b.stop))) for a, b in sides)


def _as_integers(labels: NDArray[Any]) -> NDArray[Any]:
    return labels.view(np.uint8) if labels.dtype == np.bool_ else labels


def _same_shape(prediction: NDArray[Any], reference: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    if prediction.shape != reference.shape:
        raise InputError(
            f"prediction and reference must have one shape; found {prediction.shape} and {reference.shape}. "
            "Bring the prediction to the reference's grid"
        )
    if prediction.ndim not in (2, 3) or prediction.size == 0:
        raise InputError(f"expected masks of shape (D, H, W) or (H, W) with voxels in them; found {prediction.shape}")
    return prediction, reference


def _label_maps(prediction: ArrayLike, reference: ArrayLike, *, num_classes: int) -> tuple[NDArray[Any], NDArray[Any]]:
    pair = _same_shape(np.asarray(prediction), np.asarray(reference))
    return (
        _whole_numbers(pair[0], "prediction", num_classes=num_classes),
        _whole_numbers(pair[1], "reference", num_classes=num_classes),
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
        return labels
    whole = labels.astype(np.int32)
    if not np.array_equal(whole, labels):
        raise InputError(f"labels of the {role} must be whole numbers; found fractions. Are they probabilities?")
    return whole


def _units(
    conventions: Sequence[Convention], spacing_zyx_mm: Sequence[float], *, ndim: int
) -> dict[Convention, tuple[float, ...]]:
    """What a voxel measures along each axis: the spacing in `standard`, 1 in `samed`."""
    for convention in conventions:
        if convention not in CONVENTIONS:
            raise InputError(f"convention must be one of {', '.join(CONVENTIONS)}; found {convention!r}")
    spacing = tuple(float(size) for size in spacing_zyx_mm)
    if len(spacing) not in (ndim, 3) or not all(size > 0 and math.isfinite(size) for size in spacing):
        raise InputError(f"spacing_zyx_mm must be {ndim} positive sizes in millimetres; found {tuple(spacing_zyx_mm)}")
    units: dict[Convention, tuple[float, ...]] = {"standard": spacing[-ndim:], "samed": (1.0,) * ndim}
    return {convention: units[convention] for convention in conventions}
