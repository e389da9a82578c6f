"""Score cases in memory, or in mappings that read them one by one."""

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from samed_peft.errors import InputError, printable, reason_of
from samed_peft.evaluation.pictures import case_picture, scan_window
from samed_peft.evaluation.report import Report
from samed_peft.io import Volume, grids_apart_mm
from samed_peft.metrics import DEFAULT_TOLERANCE_MM, CaseScores, checked_tolerance, score_case
from samed_peft.metrics.scores import without_ignored

Labels = Volume | np.ndarray


def _raise_or_warn(case: str, error: Exception) -> None:
    if isinstance(error, InputError):
        raise InputError(f"{case}: {error}") from error
    warn_of_failure(case, error)


def warn_of_failure(case: str, error: Exception) -> None:
    """Warn that a case is left out."""
    warnings.warn(printable(f"{case} failed and is left out: {reason_of(error)}"), stacklevel=3)


def evaluate_cases(
    predictions: Mapping[str, Labels],
    references: Mapping[str, Labels],
    *,
    class_names: Sequence[str],
    images: Mapping[str, Labels] | None = None,
    window: tuple[float, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    on_failure: Callable[[str, Exception], None] = _raise_or_warn,
    regions: Mapping[str, Sequence[int]] | None = None,
) -> Report:
    """Score every case and class in both conventions.

    Each value is looked up once, case by case, and then dropped: mappings that read or predict on access keep
    one case in memory. A case that fails is left out and named, with the reason, in the report's settings under
    `failed_cases`. A picture that cannot be made is named in a warning; its case is scored.

    Args:
        predictions: case -> (D, H, W) label map, as `Volume` or array; 0 is background.
        references: the same cases. Millimetres come from their affines; without one, a voxel counts as 1 mm and
            the report says so. Voxels of a `Volume`'s `ignored_label` count nowhere.
        class_names: names of labels 1..K.
        images: case -> scan, to make pictures of these cases.
        window: intensities of black and white in the pictures, but those of normalized or colour `Volume`s; see
            `case_picture`.
        settings: facts about the run for the report, as JSON values; `note` is printed on top, `dataset` names the
            data in a model card.
        tolerance_mm: of the surface Dice; see `metrics.score_labels`.
        on_failure: called with a case that fails and its error, and may raise it. By default, an `InputError` is
            raised, and others, as libraries raise them for bad files, become warnings.
        regions: name -> the labels 1..K that it is made of, each scored as one mask for `Report.regions`.

    Raises:
        InputError: predictions and references are of different cases, or empty; names or tolerance are unusable; a
            pair has different grids or labels without a name; or, by default, every case failed.
    """
    names, tolerance_mm = checked_names(class_names), checked_tolerance(tolerance_mm)
    check_same_cases(predictions, references)
    scores: dict[str, CaseScores] = {}
    of_regions: dict[str, CaseScores] = {}
    pictures: dict[str, bytes] = {}
    without_spacing: list[str] = []
    failed: dict[str, str] = {}
    shown_cases = set(images or ())
    for case in references:
        try:
            prediction, reference = _volume(predictions[case]), _volume(references[case])
            found = score_pair(prediction, reference, num_classes=len(names), tolerance_mm=tolerance_mm)
            of_regions[case] = score_regions(prediction, reference, regions, tolerance_mm=tolerance_mm)
            scores[case] = found
        except Exception as error:  # libraries raise errors of many kinds for bad files
            on_failure(case, error)
            failed[case] = reason_of(error)
            continue
        without_spacing += [case] if reference.affine is None else []
        if images is not None and case in shown_cases:
            with _warning_of_picture(case):
                image = images[case]
                shown = scan_window(image, window)
                pictures[case] = case_picture(image, reference, prediction, class_names=names, window=shown)
    if on_failure is _raise_or_warn:
        require_scored(scores, failed)
    lists = {"cases_without_spacing": without_spacing, "failed_cases": failed}
    filled = {name: value for name, value in lists.items() if value}
    found_settings = {**(settings or {}), "surface_dice_tolerance_mm": tolerance_mm, **filled}
    found_regions = regions_report(regions, of_regions)
    return Report(names, scores, settings=found_settings, pictures=pictures, regions=found_regions)


def regions_report(regions: Mapping[str, Sequence[int]] | None, scores: Mapping[str, CaseScores]) -> Report | None:
    """The scores of regions as `Report.regions` holds them; None without regions."""
    return Report(tuple(regions), scores) if regions else None


@contextlib.contextmanager
def _warning_of_picture(case: str) -> Iterator[None]:
    """Turn an error into a warning: the scores of a case do not need its picture."""
    try:
        yield
    except Warning:
        raise
    except Exception as error:  # of the scan's file, or of Matplotlib
        warnings.warn(printable(f"{case} is scored, but has no picture: {reason_of(error)}"), stacklevel=3)


def require_scored(scores: Collection[str], failed: Mapping[str, str]) -> None:
    """Require that not every case failed.

    Raises:
        InputError: with the first case's reason.
    """
    if failed and not scores:
        case, reason = next(iter(failed.items()))
        raise InputError(f"none of {len(failed)} cases could be scored; the first, {case}: {reason}")


def _volume(labels: Labels) -> Volume:
    return labels if isinstance(labels, Volume) else Volume(np.asarray(labels))


def checked_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Names of labels 1..K; an empty list and equal names are refused."""
    names = tuple(class_names)
    if isinstance(class_names, str) or not names or len(set(names)) != len(names):
        raise InputError(f"class_names must be different names, background left out; found {class_names!r}")
    return names


def check_same_cases(predictions: Collection[str], references: Collection[str]) -> None:
    """Require predictions and references of the same cases.

    Raises:
        InputError: naming those without a partner, or nothing was given.
    """
    if not references:
        raise InputError("found no case to evaluate: no reference was given; check the folder of references")
    # Sets, since asking a mapping may read the case.
    known, predicted = set(references), set(predictions)
    missing = [case for case in references if case not in predicted]
    extra = [case for case in predictions if case not in known]
    if missing or extra:
        raise InputError(
            "predictions and references must be of the same cases; "
            f"found no prediction of {_listed(missing)}, no reference of {_listed(extra)}. "
            "Predict the missing cases, or leave out those that have no partner"
        )


def _listed(cases: Sequence[str], *, most: int = 5) -> str:
    shown = ", ".join(cases[:most]) or "none"
    return f"{shown} and {len(cases) - most} more" if len(cases) > most else shown


def score_pair(prediction: Volume, reference: Volume, *, num_classes: int, tolerance_mm: float) -> CaseScores:
    """Score two label maps on one grid with `metrics.score_case`, in the reference's millimetres.

    Pictures and other volumes of a single slice are scored as (H, W): in 3-D all of their voxels would lie on the
    border, so that the overlap would count as surfaces that agree.

    Voxels to be ignored by the reference's `ignored_label` count nowhere.

    Raises:
        InputError: the grids differ, a label has no name, or all voxels are to be ignored; the message ends with the
            files.
    """
    arrays, spacing = _outlines(prediction, reference)
    try:
        scores = score_case(
            *arrays,
            num_classes=num_classes,
            spacing_zyx_mm=spacing,
            tolerance_mm=tolerance_mm,
            ignored_label=reference.ignored_label,
        )
        if apart_mm := grids_apart_mm(prediction, reference):
            raise InputError(
                f"prediction and reference must lie on one grid; found corners {apart_mm:.3g} mm apart. "
                "Resample the prediction to the reference's grid"
            )
    except InputError as error:
        roles = {"prediction": prediction, "reference": reference}
        files = [f"{role} {volume.path}" for role, volume in roles.items() if volume.path is not None]
        raise InputError(f"{error} ({', '.join(files)})" if files else str(error)) from error
    return scores


def score_regions(
    prediction: Volume, reference: Volume, regions: Mapping[str, Sequence[int]] | None, *, tolerance_mm: float
) -> CaseScores:
    """Score regions of several labels in a pair that `score_pair` has scored, each as one mask.

    Args:
        prediction: labels 0..K.
        reference: labels 0..K, on the same grid.
        regions: name -> the labels that it is made of; None for none.
        tolerance_mm: of the surface Dice.
    """
    found: CaseScores = {"standard": [], "samed": [], "presence": []}
    if not regions:
        return found
    arrays, spacing = _outlines(prediction, reference)
    counted = without_ignored(*arrays, reference.ignored_label)
    for labels in regions.values():
        masks = (np.isin(array, labels) for array in counted)
        scores = score_case(*masks, num_classes=1, spacing_zyx_mm=spacing, tolerance_mm=tolerance_mm)
        found["standard"] += scores["standard"]
        found["samed"] += scores["samed"]
        found["presence"] += scores["presence"]
    return found


def _outlines(prediction: Volume, reference: Volume) -> tuple[tuple[np.ndarray, np.ndarray], tuple[float, ...]]:
    """Both arrays and the size of a voxel, without the axis of a single slice."""
    shape, spacing = reference.array.shape, reference.spacing_zyx_mm
    if len(shape) != 3 or 1 not in shape or prediction.array.shape != shape:
        return (prediction.array, reference.array), spacing
    thin = shape.index(1)
    arrays = prediction.array.take(0, axis=thin), reference.array.take(0, axis=thin)
    return arrays, tuple(size for axis, size in enumerate(spacing) if axis != thin)
