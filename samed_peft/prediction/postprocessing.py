"""What is done to a finished label mask."""

import numpy as np
from scipy import ndimage


def keep_largest(mask: np.ndarray) -> np.ndarray:
    """Keep the largest connected part of each class; smaller ones become background.

    Voxels that touch at a face, an edge or a corner are connected (26 neighbours). Of equally large parts the one
    that comes first in the array stays.

    Args:
        mask: (D, H, W) uint8, 0 is background.

    Returns:
        A new array of the same shape and type.
    """
    kept = mask.copy()
    for label, box in enumerate(ndimage.find_objects(mask), start=1):
        if box is None:
            continue
        inside = kept[box]
        is_label = mask[box] == label
        parts, count = ndimage.label(is_label, structure=np.ones((3, 3, 3)))
        if count > 1:
            largest = 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
            inside[is_label & (parts != largest)] = 0
    return kept
