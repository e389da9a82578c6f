"""From a slice of a scan to the model's pixels: intensities, orientation, and resizing by SAMed's cubic splines.

Two resizers evaluate the same splines. Training resizes single slices on the CPU with `resize_image`, whose sums run in
SciPy's order, so that SAMed's training is reproduced to the last bit in a tenth of the time of `scipy.ndimage.zoom`.
Prediction multiplies whole batches by `spline_matrix` on their device; it differs by rounding in float64, before the
result is rounded to float32. They stay two: matrix products cannot keep SciPy's order, and ordered sums would slow
prediction down. For both, the weights of a pair of sizes are computed once.
"""

import warnings
from functools import lru_cache
from itertools import pairwise

import nibabel as nib
import numpy as np
from scipy import ndimage, sparse

from samed_peft.config import Windows, windows_of
from samed_peft.errors import InputError, printable
from samed_peft.io import Volume

PERCENTILES = (0.5, 99.5)
"""Intensity percentiles that become 0 and 1 without a fixed window (MR)."""


def apply_window(array: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Clip to (low, high) and scale to [0, 1], in float32 as SAMed's preprocessing does."""
    low, high = window
    scaled = np.clip(array.astype(np.float32, copy=False), low, high)
    scaled -= np.float32(low)
    scaled /= np.float32(high - low)
    return scaled


def normalized_array(volume: Volume, window: tuple[float, float] | None) -> np.ndarray:
    """Scale a scan's intensities to [0, 1] in float32, by (low, high) or else by its 0.5 and 99.5 percentiles.

    A `normalized` scan is passed through; a constant one without a window is refused.
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
    """Resize (H, W) floats by cubic spline, corner to corner, bit for bit as SAMed does: the resizer of training."""
    if image.shape == size_hw:
        return image
    coefficients = np.ascontiguousarray(ndimage.spline_filter(image, order=3, output=np.float64).T)
    taps, weights = _spline_taps(image.shape[0], size_hw[0])
    sums = _spline_sums(image.shape[1], size_hw[1])
    resized = np.empty(size_hw, image.dtype)
    for start in range(0, size_hw[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        weighted = [
            coefficients.take(tap, axis=1) * weight for tap, weight in zip(taps[rows].T, weights[rows].T, strict=True)
        ]
        resized[rows] = (sums @ np.concatenate(weighted)).T
    return resized


def resize_label(label: np.ndarray, size_hw: tuple[int, int], *, via: tuple[int, int] | None = None) -> np.ndarray:
    """Resize labels (..., H, W) by nearest neighbour, corner to corner, as SAMed does.

    They are resized to `via` first if it is given: nearest neighbour twice is not nearest neighbour once.
    """
    steps = [label.shape[-2:], *([] if via is None else [via]), size_hw]
    if all(step == size_hw for step in steps):
        return label
    rows, columns = (_nearest_through(*sizes) for sizes in zip(*steps, strict=True))
    resized = label[..., rows, :][..., columns]
    resized[..., rows == _OUTSIDE, :] = 0
    resized[..., columns == _OUTSIDE] = 0
    return resized


_ROWS_AT_ONCE = 64
"""Intermediate results of so many rows stay in the processor's cache."""

_OUTSIDE = -1
"""Index of a place that rounding moved past the last pixel; SciPy puts zero there."""


def _places(old: int, new: int) -> np.ndarray:
    """Position of each of `new` pixels among `old` ones; rounded as in SciPy, so that ties fall alike."""
    step = (old - 1) / (new - 1) if new > 1 else 1.0
    return np.arange(new) * step


@lru_cache(maxsize=256)
def _nearest_through(*sizes: int) -> np.ndarray:
    """Index of the first size's pixel that each pixel of the last size takes, or `_OUTSIDE`."""
    index = np.arange(sizes[0])
    for old, new in pairwise(sizes):
        places = _places(old, new)
        step = np.where(places > old - 1, _OUTSIDE, np.floor(places + 0.5).astype(int))
        index = np.where(step == _OUTSIDE, _OUTSIDE, index[step])
    return index


@lru_cache(maxsize=256)
def _spline_taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """The four B-spline coefficients (new, 4) behind each new pixel, and their weights."""
    places = _places(old, new)
    start = np.floor(places)
    t = places - start
    z = 1 - t
    first, second, third = z * z * z / 6, (t * t * (t - 2) * 3 + 4) / 6, (z * z * (z - 2) * 3 + 4) / 6
    weights = np.stack([first, second, third, 1 - first - second - third], axis=1)
    weights[places > old - 1] = 0
    period = max(2 * old - 2, 1)
    taps = np.abs(start[:, None].astype(int) + np.arange(-1, 3)) % period
    return np.where(taps < old, taps, period - taps), weights  # mirrored at both ends


@lru_cache(maxsize=256)
def _spline_sums(old: int, new: int) -> sparse.csr_array:
    """(new, 4 old) sums over the four taps of the other axis and, within each, the four of this one.

    One row of it adds its sixteen numbers from left to right, which is SciPy's order: so they round alike.
    """
    taps, weights = _spline_taps(old, new)
    columns = taps[:, None, :] + old * np.arange(4)[:, None]
    entries = np.broadcast_to(weights[:, None, :], columns.shape).ravel()
    return sparse.csr_array((entries, columns.ravel(), 16 * np.arange(new + 1)), shape=(new, 4 * old))


@lru_cache(maxsize=16)
def spline_matrix(old: int, new: int) -> np.ndarray:
    """Matrix (new, old) float64 that resizes one axis: the resizer of prediction. Shared, so never write to it."""
    taps, weights = _spline_taps(old, new)
    sums = sparse.csr_array((weights.ravel(), taps.ravel(), 4 * np.arange(new + 1)), shape=(new, old))
    return sums @ ndimage.spline_filter1d(np.eye(old), order=3, axis=0)


def slice_to_pixels(image: np.ndarray, *, image_size: int, input_size: int | None = None) -> np.ndarray:
    """Resize a slice (H, W) in [0, 1], or (H, W, 3) in colour, to the model's (image_size, image_size) float32.

    With `input_size`, it passes SAMed's low-resolution bottleneck of that size first.
    """
    if image.ndim == 3:
        colours = [slice_to_pixels(c, image_size=image_size, input_size=input_size) for c in np.moveaxis(image, -1, 0)]
        return np.stack(colours, axis=-1)
    if input_size is not None:
        image = resize_image(image, (input_size, input_size))
    return resize_image(image, (image_size, image_size)).astype(np.float32, copy=False)


def slice_spacing_mm(volume: Volume, transform: np.ndarray | None) -> float | None:
    """Distance of neighbouring slices of a scan after `reoriented` with `transform`; None if it is unknown."""
    if volume.affine is None:
        return None
    axis = 2 if transform is None else int(np.flatnonzero(transform[:, 0] == 2)[0])
    return volume.spacing_zyx_mm[2 - axis]


def neighbour_step(spacing_mm: float | None, neighbour_mm: float, *, name: object) -> int:
    """Number of slices to a neighbour at a distance of about `neighbour_mm`, at least one.

    Raises:
        InputError: the spacing of the scan called `name` is unknown.
    """
    if spacing_mm is None:
        raise InputError(
            f"expected scans whose spacing is known, for neighbouring slices at {neighbour_mm:g} mm; {name} has none. "
            "Leave neighbour_mm out, or give scans with an affine"
        )
    return max(1, round(neighbour_mm / spacing_mm))


def reorientation(volume: Volume, codes: str | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Transforms for `reoriented` to axis codes such as "LPS" and back; None if nothing has to change."""
    if codes is None or volume.orientation in (None, codes):
        return None, None
    found, wanted = (nib.orientations.axcodes2ornt(tuple(axes)) for axes in (volume.orientation, codes))
    transform = nib.orientations.ornt_transform
    return transform(found, wanted), transform(wanted, found)


def reoriented(array: np.ndarray, transform: np.ndarray | None) -> np.ndarray:
    """Flip and transpose (D, H, W), or (D, H, W, C); nibabel's transforms are for (x, y, z), the reverse."""
    if transform is None:
        return array
    return np.asarray(nib.orientations.apply_orientation(array.swapaxes(0, 2), transform)).swapaxes(0, 2)


_LEAST_SPAN, _LEAST_INSIDE, _MOST_ABOVE = 0.05, 0.02, 0.5
"""Most of a CT may be air, which lies below any window; but no patient has half of the voxels above it."""

_FAT_HU, _LEAST_ABOVE = -60.0, 0.05
"""Nearly every CT, and crops of it around an organ too, have voxels below the former: fat at -100, air at -1000."""

_SAMPLE = 250_000


def warn_of_window(volume: Volume, window: Windows) -> None:
    """Warn, with figures, if a fixed window leaves next to nothing of a scan.

    The warning comes if the clipped scan spans less than 5 % of the window, if less than 2 % of the voxels lie within
    it, or if more than half lie above. For windows of CT, which reach below fat, it also comes if a scan has neither
    air nor fat, and no negative voxels or more than 5 % above the window. CTs in Hounsfield units pass; MR and scans in
    other units or in [0, 1] do not.

    Args:
        volume: a scan; a `normalized` one should fill [0, 1], with the clipped voxels at 0 and 1.
        window: the adapter's (low, high), several, which are taken together, or None for percentiles, which fit any
            scan.
    """
    windows = windows_of(window)
    if not windows:
        return
    window = min(low for low, _ in windows), max(high for _, high in windows)
    # An odd step, so that the sample never comes from a few columns of an even width alone.
    voxels = volume.array.reshape(-1)[:: max(1, volume.array.size // _SAMPLE) | 1]
    if voxels.min() == voxels.max():
        return  # an empty slice, of whatever kind
    low, high = (0.0, 1.0) if volume.normalized else window
    is_below, is_above = (voxels <= low, voxels >= high) if volume.normalized else (voxels < low, voxels > high)
    below, above = float(is_below.mean()), float(is_above.mean())
    first, last = (float(value) for value in np.percentile(voxels, PERCENTILES))
    span = (np.clip(last, low, high) - np.clip(first, low, high)) / (high - low)
    lacks_air = not volume.normalized and low <= _FAT_HU and _lacks_air_and_fat(voxels, above)
    if lacks_air or span < _LEAST_SPAN or 1 - below - above < _LEAST_INSIDE or above > _MOST_ABOVE:
        window_text = f"the adapter's window, {low:g} to {high:g}"
        target = "the [0, 1] that it was scaled to" if volume.normalized else window_text
        path = printable(volume.path or "the scan")
        warnings.warn(
            f"{path} holds {first:g} to {last:g} (99 % of its voxels), which hardly fit {target}: "
            f"{100 * below:.0f} % lie below, {100 * above:.0f} % above, and the scan spans {100 * span:.0f} % of it"
            f"{', without the air and fat of a CT' if lacks_air else ''}; "
            "is it of the kind, and in the units, that the adapter was trained on?",
            stacklevel=3,
        )


def _lacks_air_and_fat(voxels: np.ndarray, above: float) -> bool:
    """Tell a scan of another kind from CT: it lacks air and fat, and unlike CT of an organ alone, has bright voxels."""
    lowest = float(np.percentile(voxels, 0.1))
    return lowest >= 0 or (lowest > _FAT_HU and above > _LEAST_ABOVE)
