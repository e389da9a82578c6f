"""Clean up masks, and decide on validation cases where that helps."""

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from scipy import ndimage

from samed_peft.errors import InputError
from samed_peft.evaluation.cases import check_same_cases, checked_names
from samed_peft.io import Volume, grids_apart_mm

_TIE = 1e-12
"""Differences of mean Dice up to here are rounding."""


def largest_parts(mask: np.ndarray, labels: Collection[int] | None = None) -> np.ndarray:
    """Keep the largest connected part of classes; smaller ones become background.

    Voxels that touch at a face, an edge or a corner are connected (26 neighbours). Of equally large parts the
    first in the array stays.

    Args:
        mask: (D, H, W) uint8, 0 is background.
        labels: of the classes that this is done for; None for all.

    Returns:
        A new array of the same shape and type.
    """
    kept = mask.copy()
    for label, box in enumerate(ndimage.find_objects(mask), start=1):
        if box is None or (labels is not None and label not in labels):
            continue
        inside = kept[box]
        is_label = mask[box] == label
        parts, count = ndimage.label(is_label, structure=np.ones((3, 3, 3)))
        if count > 1:
            largest = 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
            inside[is_label & (parts != largest)] = 0
    return kept


def choose_postprocessing(
    masks: Mapping[str, Volume],
    references: Mapping[str, Volume],
    class_names: Sequence[str],
) -> tuple[str, ...]:
    """Choose the classes of which the largest part alone is kept, for `SamedConfig.keep_largest`, as nnU-Net does.

    A class is chosen if that raises its mean Dice over the cases in which mask or reference has it;
    ties do not count. The parts that are removed become background, so no other class's Dice can fall.

    Args:
        masks: case -> mask (D, H, W) of a validation case, segmented without post-processing; read one at a time.
        references: case -> label map of the same cases, on the same grids; their `ignored_label` counts nowhere.
        class_names: of labels 1..K.

    Returns:
        The chosen classes in their order.

    Raises:
        InputError: masks and references are of different cases, of none, or on different grids.

    Source:
        nnU-Net (Isensee et al., Nature Methods 2021), `determine_postprocessing`, class by class.
    """
    names = checked_names(class_names)
    check_same_cases(list(masks), list(references))
    gains: dict[str, list[float]] = {name: [] for name in names}
    for case in references:
        mask, reference = masks[case], references[case]
        _require_one_grid(case, mask, reference)
        kept = largest_parts(mask.array)
        ignored = reference.ignored_label
        counts = np.ones(kept.shape, bool) if ignored is None else reference.array != ignored
        for label in {int(label) for label in np.unique(mask.array[kept != mask.array])}:
            is_label = (reference.array == label) & counts
            before, after = (_dice((array == label) & counts, is_label) for array in (mask.array, kept))
            if label <= len(names) and not math.isnan(before + after):
                gains[names[label - 1]].append(after - before)
    # Cases in which nothing is removed gain nothing, so a sum above 0 is a mean above 0.
    return tuple(name for name, of_cases in gains.items() if math.fsum(of_cases) > _TIE)


def _dice(one: np.ndarray, other: np.ndarray) -> float:
    """NaN if both are empty."""
    total = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / total if total else math.nan


def _require_one_grid(case: str, mask: Volume, reference: Volume) -> None:
    shapes = mask.array.shape, reference.array.shape
    if shapes[0] != shapes[1] or grids_apart_mm(mask, reference):
        raise InputError(
            f"expected mask and reference of {case} on one grid, found {shapes[0]} voxels in the mask "
            f"{mask.path or ''} and {shapes[1]} in the reference {reference.path or ''}, or other positions; segment "
            "the references' scans"
        )
