"""SAMed's augmentation: quarter turns and flips, or small rotations, of a slice and its labels together."""

from functools import lru_cache

import numpy as np
from scipy import ndimage

Pair = tuple[np.ndarray, np.ndarray]


def rot_flip(array: np.ndarray, *, quarter_turns: int, axis: int) -> np.ndarray:
    """Turn (H, W) by `quarter_turns` times 90 degrees, then flip along `axis`; a view of `array`."""
    return np.flip(np.rot90(array, quarter_turns), axis=axis)


def rotate(array: np.ndarray, *, degrees: int) -> np.ndarray:
    """Rotate (H, W) or (H, W, 3) by nearest neighbour, size kept, zeros at the corners."""
    height, width = array.shape[:2]
    pixels = np.zeros((height * width + 1, *array.shape[2:]), array.dtype)
    pixels[1:] = array.reshape(height * width, *array.shape[2:])
    return pixels.take(_sources(height, width, degrees), axis=0)


# SAMed has 40 angles; a megabyte each at 512 x 512.
@lru_cache(maxsize=40)
def _sources(height: int, width: int, degrees: int) -> np.ndarray:
    """Source (1, 2, ... row by row) of each pixel of a rotated slice; 0 is outside the slice.

    Computed by SciPy itself, so that ties are broken as in SAMed.
    """
    numbers = np.arange(1, height * width + 1, dtype=np.int32).reshape(height, width)
    return ndimage.rotate(numbers, degrees, order=0, reshape=False)


def augment(image: np.ndarray, label: np.ndarray, *, rng: np.random.Generator) -> Pair:
    """SAMed's random augmentation (arXiv 2304.13785 and its code).

    Half the slices are turned by a multiple of 90 degrees and flipped, a quarter are rotated by -20..19 degrees, a
    quarter stay as they are. Of an image (H, W) or (H, W, 3) and a label (H, W), either views or new arrays are
    returned, whose sides may have changed places.
    """
    if rng.random() > 0.5:
        turns, axis = int(rng.integers(4)), int(rng.integers(2))
        return rot_flip(image, quarter_turns=turns, axis=axis), rot_flip(label, quarter_turns=turns, axis=axis)
    if rng.random() > 0.5:
        degrees = int(rng.integers(-20, 20))
        return rotate(image, degrees=degrees), rotate(label, degrees=degrees)
    return image, label
