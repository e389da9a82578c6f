"""Scores by medpy itself, as in SAMed's test: the reference for the package's own distances."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects

from samed_peft.metrics.scores import Score


def medpy_scores(
    prediction: NDArray[np.integer],
    reference: NDArray[np.integer],
    *,
    num_classes: int,
    spacing_zyx_mm: Sequence[float] | None = None,
    crop: bool = True,
) -> list[Score]:
    """Dice and HD95 of labels 1..K by medpy, absent classes as in SAMed's test (arXiv 2304.13785).

    Args:
        prediction: (D, H, W) or (H, W) labels 0..K.
        reference: the same shape.
        num_classes: K, background left out.
        spacing_zyx_mm: voxel size, for distances in millimetres; None for voxels, as in SAMed.
        crop: compute inside the bounding box of both masks, which gives the same scores in a fraction of the time.
    """
    from medpy.metric.binary import dc, hd95  # takes seconds to import

    scores: list[Score] = []
    for label in range(1, num_classes + 1):
        masks = prediction == label, reference == label
        if masks[0].any() and masks[1].any():
            if crop:
                (box,) = find_objects((masks[0] | masks[1]).astype(np.uint8))
                masks = masks[0][box], masks[1][box]
            scores.append({"dice": float(dc(*masks)), "hd95": float(hd95(*masks, voxelspacing=spacing_zyx_mm))})
        else:
            # A missed organ, or one that neither mask contains, scores 0 and 0.
            scores.append({"dice": float(masks[0].any()), "hd95": 0.0})
    return scores
