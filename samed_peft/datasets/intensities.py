"""Whether a scan's intensities are of the kind that an adapter was trained on."""

import warnings

import numpy as np

from samed_peft.datasets.preprocessing import PERCENTILES
from samed_peft.io import Volume

_LEAST_SPAN, _LEAST_INSIDE, _MOST_ABOVE = 0.05, 0.02, 0.5
"""A CT may be air for the most part, which lies below any window; half of it above is no patient."""

_SAMPLE = 250_000


def warn_of_window(volume: Volume, window: tuple[float, float] | None) -> None:
    """Warn where a fixed window would leave next to nothing of a scan, with figures.

    That is where what is left spans less than 5 % of the window, less than 2 % of the voxels lie within it, or more
    than half lie above. CTs in Hounsfield units pass a window for CT; MR, scans in other units or in [0, 1] do not.

    Args:
        volume: a scan; one that is `normalized` should fill [0, 1], the ends of which hold what was cut off.
        window: the adapter's (low, high), or None for percentiles, which fit any scan.
    """
    if window is None:
        return
    # An odd step, so that no column of an even width is all there is.
    voxels = volume.array.reshape(-1)[:: max(1, volume.array.size // _SAMPLE) | 1]
    if voxels.min() == voxels.max():
        return  # an empty slice, of whatever kind
    low, high = (0.0, 1.0) if volume.normalized else window
    is_below, is_above = (voxels <= low, voxels >= high) if volume.normalized else (voxels < low, voxels > high)
    below, above = float(is_below.mean()), float(is_above.mean())
    first, last = (float(value) for value in np.percentile(voxels, PERCENTILES))
    span = (np.clip(last, low, high) - np.clip(first, low, high)) / (high - low)
    if span < _LEAST_SPAN or 1 - below - above < _LEAST_INSIDE or above > _MOST_ABOVE:
        target = f"the adapter's window, {low:g} to {high:g}"
        if volume.normalized:
            target = "the [0, 1] that it was scaled to"
        warnings.warn(
            f"{volume.path or 'the scan'} holds {first:g} to {last:g} (99 % of its voxels), which hardly fit {target}: "
            f"{100 * below:.0f} % lie below, {100 * above:.0f} % above, "
            f"and the scan spans {100 * span:.0f} % of it; is it of the kind, and in the units, that the adapter was "
            "trained on?",
            stacklevel=3,
        )
