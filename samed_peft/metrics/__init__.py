"""Dice and HD95 of masks and label maps, in two conventions side by side.

`standard`: millimetres; an organ absent from both masks has no score (NaN), one absent from a single mask has
Dice 0 and no distance (NaN).
`samed`: the convention of the code of SAMed (arXiv 2304.13785): voxels; a prediction without reference scores
Dice 1 and HD95 0; a missed organ, or one absent from both, scores 0 and 0.

`samed_peft.metrics.gather.SegmentationScores` offers both as an `evaluate.Metric`; it is kept apart because
importing `evaluate` takes seconds.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import find_objects

from samed_peft.errors import InputError

Convention = Literal["standard", "samed"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)

Box = tuple[slice, ...]


class Score(TypedDict):
    """Dice in [0, 1] and HD95 in millimetres (`standard`) or voxels (`samed`); NaN where undefined."""

    dice: float
    hd95: float


class ClassSummary(Score):
    """Mean scores of one class, the number of cases with a Dice, and the number of all cases."""

    n_valid: int
    n_cases: int


class Summary(TypedDict):
    """Mean over classes, and the means over cases of each class."""

    mean: Score
    classes: dict[str, ClassSummary]


ClassScores = list[Score]
"""Scores of labels 1..K: label k at index k - 1."""

CaseScores = Mapping[Convention, ClassScores]
"""The scores of one case in both conventions."""


def score_masks(
    prediction: ArrayLike,
    reference: ArrayLike,
    *,
    convention: Convention = "standard",
    spacing_zyx_mm: Sequence[float] = (1.0, 1.0, 1.0),
) -> Score:
    """Dice and HD95 of one pair of binary masks, with medpy's values.

    Args:
        prediction: (D, H, W) or (H, W); everything but 0 is foreground.
        reference: the same shape.
        convention: "standard" or "samed"; see the module's docstring.
        spacing_zyx_mm: voxel size in millimetres; for (H, W) its last two numbers. "samed" counts in voxels.

    Raises:
        InputError: shapes differ, or the convention or the spacing is unusable.
    """
    pair = _same_shape(np.asarray(prediction), np.asarray(reference))
    masks = [np.asarray(mask != 0) for mask in pair]
    scores = _score(masks, num_classes=1, conventions=(convention,), spacing_zyx_mm=spacing_zyx_mm)
    return scores[convention][0]


def score_labels(
    prediction: ArrayLike,
    reference: ArrayLike,
    *,
    num_classes: int,
    convention: Convention = "standard",
    spacing_zyx_mm: Sequence[float] = (1.0, 1.0, 1.0),
) -> ClassScores:
    """Scores of labels 1..K of one case, label k at index k - 1.

    Args:
        prediction: (D, H, W) or (H, W) whole numbers 0..K.
        reference: the same shape.
        num_classes: K, background left out.
        convention: "standard" or "samed".
        spacing_zyx_mm: voxel size in millimetres, used by "standard".

    Raises:
        InputError: shapes differ, values are not 0..K, or the convention or the spacing is unusable.
    """
    pair = _label_maps(prediction, reference, num_classes=num_classes)
    scores = _score(pair, num_classes=num_classes, conventions=(convention,), spacing_zyx_mm=spacing_zyx_mm)
    return scores[convention]


def score_case(
    prediction: ArrayLike,
    reference: ArrayLike,
    *,
    num_classes: int,
    spacing_zyx_mm: Sequence[float] = (1.0, 1.0, 1.0),
) -> CaseScores:
    """`score_labels` in both conventions, at little more than the cost of one.

    Raises:
        InputError: as `score_labels`.
    """
    pair = _label_maps(prediction, reference, num_classes=num_classes)
    return _score(pair, num_classes=num_classes, conventions=CONVENTIONS, spacing_zyx_mm=spacing_zyx_mm)


def summarise(cases: Sequence[CaseScores], class_names: Sequence[str]) -> dict[Convention, Summary]:
    """Means over cases for each class, then over classes; undefined (NaN) scores are left out and counted."""
    return {convention: _summary([case[convention] for case in cases], class_names) for convention in CONVENTIONS}


def mean_defined(values: Sequence[float]) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def without_nan(value: Any) -> Any:
    """Nested dicts and lists with every NaN replaced by None, which JSON writes as null."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _summary(cases: Sequence[ClassScores], class_names: Sequence[str]) -> Summary:
    classes: dict[str, ClassSummary] = {}
    for index, name in enumerate(class_names):
        dices = [case[index]["dice"] for case in cases]
        classes[name] = {
            "dice": mean_defined(dices),
            "hd95": mean_defined([case[index]["hd95"] for case in cases]),
            "n_valid": sum(not math.isnan(dice) for dice in dices),
            "n_cases": len(cases),
        }
    return {
        "mean": {
            "dice": mean_defined([scores["dice"] for scores in classes.values()]),
            "hd95": mean_defined([scores["hd95"] for scores in classes.values()]),
        },
        "classes": classes,
    }


def _score(
    pair: Sequence[NDArray[Any]],
    *,
    num_classes: int,
    conventions: Sequence[Convention],
    spacing_zyx_mm: Sequence[float],
) -> dict[Convention, ClassScores]:
    """Scores of labels 1..K (`True` is label 1) of a pair of equal shape."""
    for convention in conventions:
        if convention not in CONVENTIONS:
            raise InputError(f"convention must be one of {', '.join(CONVENTIONS)}; found {convention!r}")
    spacing = _spacing(spacing_zyx_mm, pair[0].ndim)
    # One pass over each volume finds every class; the costly distances then see small crops only.
    boxes = [find_objects(_as_integers(labels), max_label=num_classes) for labels in pair]
    scores: dict[Convention, ClassScores] = {convention: [] for convention in conventions}
    for label, (predicted, referenced) in enumerate(zip(*boxes, strict=True), start=1):
        if predicted is None or referenced is None:
            for convention in conventions:
                scores[convention].append(_absent(convention, predicted is not None, referenced is not None))
            continue
        union = _union(predicted, referenced)
        crops = [labels[union] == label for labels in pair]
        for convention, score in _present(crops[0], crops[1], conventions=conventions, spacing=spacing).items():
            scores[convention].append(score)
    return scores


def _present(
    prediction: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    *,
    conventions: Sequence[Convention],
    spacing: tuple[float, ...],
) -> dict[Convention, Score]:
    """Scores of two masks with foreground; crops will do, as surfaces lie inside the union's bounding box."""
    from medpy.metric.binary import dc, hd95

    dice = float(dc(prediction, reference))
    units = {"standard": spacing, "samed": (1.0,) * len(spacing)}
    distances: dict[tuple[float, ...], float] = {}
    for convention in conventions:
        unit = units[convention]
        if unit not in distances:  # one distance serves both conventions where voxels measure 1 mm
            distances[unit] = float(hd95(prediction, reference, voxelspacing=unit))
    return {convention: {"dice": dice, "hd95": distances[units[convention]]} for convention in conventions}


def _absent(convention: Convention, predicted: bool, referenced: bool) -> Score:
    if convention == "samed":
        return {"dice": float(predicted and not referenced), "hd95": 0.0}
    return {"dice": 0.0 if predicted or referenced else math.nan, "hd95": math.nan}


def _union(first: Box, second: Box) -> Box:
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(first, second, strict=True))


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


def _spacing(spacing_zyx_mm: Sequence[float], ndim: int) -> tuple[float, ...]:
    spacing = tuple(float(size) for size in spacing_zyx_mm)
    if len(spacing) not in (ndim, 3) or not all(size > 0 and math.isfinite(size) for size in spacing):
        raise InputError(f"spacing_zyx_mm must be {ndim} positive sizes in millimetres; found {tuple(spacing_zyx_mm)}")
    return spacing[-ndim:]
