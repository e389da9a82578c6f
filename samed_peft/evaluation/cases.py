"""Score cases in memory, or in mappings that read them one by one."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from samed_peft.errors import InputError
from samed_peft.evaluation.pictures import case_picture, scan_window
from samed_peft.evaluation.report import Report
from samed_peft.io import Volume, grids_apart_mm
from samed_peft.metrics import DEFAULT_TOLERANCE_MM, CaseScores, checked_tolerance, score_case

Labels = Volume | np.ndarray


def evaluate_cases(
    predictions: Mapping[str, Labels],
    references: Mapping[str, Labels],
    *,
    class_names: Sequence[str],
    images: Mapping[str, Labels] | None = None,
    window: tuple[float, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
) -> Report:
    """Score every case and class in both conventions.

    Each value is looked up once, case by case, and then dropped: mappings that read or predict on access keep
    one case in memory.

    Args:
        predictions: case -> (D, H, W) label map, as `Volume` or array; 0 is background.
        references: the same cases. Millimetres come from their affines; without one, a voxel counts as 1 mm and
            the report says so.
        class_names: names of labels 1..K.
        images: case -> scan, to make pictures of these cases.
        window: intensities of black and white in the pictures, but those of normalized or colour `Volume`s; see
            `case_picture`.
        settings: facts about the run for the report, as JSON values; `note` is printed on top, `dataset` names the
            data in a model card.
        tolerance_mm: of the surface Dice; see `metrics.score_labels`.

    Raises:
        InputError: predictions and references are of different cases, or empty; names or tolerance are unusable; or
            a pair has different grids or labels without a name.
    """
    names, tolerance_mm = checked_names(class_names), checked_tolerance(tolerance_mm)
    _check_cases(predictions, references)
    scores: dict[str, CaseScores] = {}
    pictures: dict[str, bytes] = {}
    without_spacing: list[str] = []
    for case in references:
        prediction, reference = _volume(predictions[case]), _volume(references[case])
        try:
            scores[case] = score_pair(prediction, reference, num_classes=len(names), tolerance_mm=tolerance_mm)
        except InputError as error:
            raise InputError(f"{case}: {error}") from error
        without_spacing += [case] if reference.affine is None else []
        if images is not None and case in images:
            image = images[case]
            shown = scan_window(image, window)
            pictures[case] = case_picture(image, reference, prediction, class_names=names, window=shown)
    found = {"cases_without_spacing": without_spacing} if without_spacing else {}
    found_settings = {**(settings or {}), "surface_dice_tolerance_mm": tolerance_mm, **found}
    return Report(names, scores, settings=found_settings, pictures=pictures)


def _volume(labels: Labels) -> Volume:
    return labels if isinstance(labels, Volume) else Volume(np.asarray(labels))


def checked_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Names of labels 1..K; an empty list and equal names are refused."""
    names = tuple(class_names)
    if isinstance(class_names, str) or not names or len(set(names)) != len(names):
        raise InputError(f"class_names must be different names, background left out; found {class_names!r}")
    return names


def _check_cases(predictions: Mapping[str, Labels], references: Mapping[str, Labels]) -> None:
    if not references:
        raise InputError("found no case to evaluate: no reference was given; check the folder of references")
    missing = [case for case in references if case not in predictions]
    extra = [case for case in predictions if case not in references]
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

    Raises:
        InputError: the grids differ or a label has no name; the message ends with the files.
    """
    arrays, shape = (prediction.array, reference.array), reference.array.shape
    spacing: tuple[float, ...] = reference.spacing_zyx_mm
    if len(shape) == 3 and 1 in shape and prediction.array.shape == shape:
        thin = shape.index(1)
        arrays = prediction.array.take(0, axis=thin), reference.array.take(0, axis=thin)
        spacing = tuple(size for axis, size in enumerate(spacing) if axis != thin)
    try:
        scores = score_case(*arrays, num_classes=num_classes, spacing_zyx_mm=spacing, tolerance_mm=tolerance_mm)
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
