"""Clean up masks, and decide on validation cases where that helps."""

from collections.abc import Collection

import numpy as np
from scipy import ndimage


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
