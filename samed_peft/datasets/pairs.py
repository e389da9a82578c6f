"""What must hold of a scan and its label map."""

from pathlib import Path

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io import Volume, grids_apart_mm


def require_one_grid(scan: Volume, labels: Volume) -> None:
    """Refuse a label map of another shape or place than its scan.

    Raises:
        InputError: naming both files.
    """
    shape = scan.array.shape[:3]
    if shape != labels.array.shape:
        raise InputError(
            f"expected a label map of the scan's shape {shape} ({scan.path}), found "
            f"{labels.array.shape} in {labels.path}; resample it to the scan by nearest neighbour"
        )
    if apart_mm := grids_apart_mm(labels, scan):
        raise InputError(
            f"expected {labels.path} on the grid of {scan.path}, found affines whose corners lie {apart_mm:.3g} mm "
            "apart; resample the label map to the scan, or copy the scan's header if the voxels do match"
        )


def require_labels(
    label: np.ndarray, highest: int, path: Path, *, advice: str = "is it from another dataset, or the scan itself?"
) -> None:
    """Refuse labels outside 0..highest.

    Args:
        label: (D, H, W).
        highest: K.
        path: its file.
        advice: ends the message.

    Raises:
        InputError: naming up to eight of them.
    """
    if label.min() < 0 or label.max() > highest:
        found = sorted({int(value) for value in np.unique(label)} - set(range(highest + 1)))
        raise InputError(
            f"labels of {path} hold {', '.join(map(str, found[:8]))}, but only 0..{highest} are "
            f"expected there; {advice}"
        )
