"""From a slice of a scan to the model's pixels; one code path for training and prediction."""

import nibabel as nib
import numpy as np
from scipy import ndimage

from samed_peft.errors import InputError
from samed_peft.io import Volume

PERCENTILES = (0.5, 99.5)
"""Intensity percentiles that become 0 and 1 where no fixed window applies (MR)."""


def apply_window(array: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Clip to (low, high) and scale to [0, 1], in float32 as SAMed's preprocessing does."""
    low, high = window
    clipped = np.clip(array.astype(np.float32, copy=False), low, high)
    return (clipped - np.float32(low)) / np.float32(high - low)


def normalized_array(volume: Volume, window: tuple[float, float] | None) -> np.ndarray:
    """A volume's intensities in [0, 1].

    Args:
        volume: a scan; one that is `normalized` already is passed through.
        window: (low, high), or None for the scan's own 0.5 and 99.5 percentiles.

    Returns:
        float32 of the shape of `volume.array`.

    Raises:
        InputError: no window is given and the scan is constant.
    """
    if volume.normalized:
        return volume.array.astype(np.float32, copy=False)
    if window is None:
        low, high = (float(p) for p in np.percentile(volume.array, PERCENTILES))
        if low == high:
            raise InputError(
                f"{volume.path or 'the scan'} is constant ({low}) between its {PERCENTILES[0]} and {PERCENTILES[1]} "
                "percentiles, so it cannot be scaled; give a fixed window"
            )
        window = (low, high)
    return apply_window(volume.array, window)


def resize_image(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resize (H, W) by cubic spline, corner to corner, as SAMed does."""
    return _zoom(image, size_hw, order=3)


def resize_label(label: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resize (H, W) labels by nearest neighbour, corner to corner, as SAMed does."""
    return _zoom(label, size_hw, order=0)


def slice_to_pixels(image: np.ndarray, *, image_size: int, input_size: int | None = None) -> np.ndarray:
    """A normalised slice at the size of the model.

    Args:
        image: (H, W) in [0, 1], or (H, W, 3) in colour.
        image_size: S, pixels per side the model sees.
        input_size: size of SAMed's low-resolution bottleneck that the slice passes first, or None.

    Returns:
        (S, S) float32, or (S, S, 3).
    """
    if image.ndim == 3:
        colours = [slice_to_pixels(c, image_size=image_size, input_size=input_size) for c in np.moveaxis(image, -1, 0)]
        return np.stack(colours, axis=-1)
    if input_size is not None:
        image = resize_image(image, (input_size, input_size))
    return resize_image(image, (image_size, image_size)).astype(np.float32, copy=False)


def _zoom(array: np.ndarray, size_hw: tuple[int, int], *, order: int) -> np.ndarray:
    if array.shape == size_hw:
        return array
    factors = (size_hw[0] / array.shape[0], size_hw[1] / array.shape[1])
    return ndimage.zoom(array, factors, order=order)


def reorientation(volume: Volume, codes: str | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Transforms for `reoriented` to the orientation `codes` and back; None where there is nothing to do.

    Args:
        volume: a scan.
        codes: axis codes of the (x, y, z) axes wanted, such as "LPS", or None for as it is.
    """
    if codes is None or volume.orientation in (None, codes):
        return None, None
    found = nib.orientations.axcodes2ornt(tuple(volume.orientation))
    wanted = nib.orientations.axcodes2ornt(tuple(codes))
    transform = nib.orientations.ornt_transform
    return transform(found, wanted), transform(wanted, found)


def reoriented(array: np.ndarray, transform: np.ndarray | None) -> np.ndarray:
    """Flip and transpose (D, H, W); nibabel's transforms speak of (x, y, z), which is the reverse."""
    if transform is None:
        return array
    return np.asarray(nib.orientations.apply_orientation(array.transpose(2, 1, 0), transform).transpose(2, 1, 0))
