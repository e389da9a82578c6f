"""What fills the encoder's three channels: one slice, colours, several channels of a scan, or several windows."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from samed_peft.config import Windows, windows_of
from samed_peft.config.windows import ENCODER_CHANNELS
from samed_peft.datasets.preprocessing import apply_window, normalized_array
from samed_peft.errors import InputError
from samed_peft.io import Volume


def scaled_slices(volume: Volume, window: Windows, *, channels: Sequence[int] | None = None) -> np.ndarray:
    """The slices of a scan in [0, 1]: (D, H, W), or (D, H, W, 3) with a last axis for the encoder's channels.

    Each channel of a scan is scaled by itself. Of two channels or windows, the second fills the third one too.

    Args:
        volume: (D, H, W), a colour picture (1, H, W, 3), or with `channels` (D, H, W, C).
        window: (low, high), for each channel alike; two or three windows of a scan with a single one; None for the
            percentiles of each scan or channel.
        channels: numbers of the C channels that the scan must have, for messages; None or empty for a single one.

    Raises:
        InputError: the scan lacks a channel or has too many, is in colour or in [0, 1] already where several windows
            are wanted, or is constant without a window.
    """
    windows = windows_of(window)
    if channels:
        _require_channels(volume, channels)
        return _filled(
            [_channel(volume, place, window, number) for place, number in enumerate(channels)], volume.array.shape
        )
    if len(windows) > 1:
        _require_intensities(volume, len(windows))
        return _filled([apply_window(volume.array, one) for one in windows], volume.array.shape)
    if volume.array.ndim == 4 and (len(volume.array) != 1 or volume.array.shape[-1] != ENCODER_CHANNELS):
        raise InputError(
            f"expected a scan with a single channel, or a colour picture, found {volume.array.shape[-1]} channels of "
            f"{volume.path or 'the scan'}; choose one of them, as the adapter has no channels"
        )
    return normalized_array(volume, windows[0] if windows else None)


def _channel(volume: Volume, place: int, window: Windows, number: int) -> np.ndarray:
    try:
        one = replace(volume, array=np.ascontiguousarray(volume.array[..., place]))
        return normalized_array(one, next(iter(windows_of(window)), None))
    except InputError as error:
        raise InputError(f"channel {number}: {error}") from error


def _filled(parts: Sequence[np.ndarray], shape: Sequence[int]) -> np.ndarray:
    """(D, H, W, 3) of two or three arrays (D, H, W)."""
    filled = np.empty((*shape[:3], ENCODER_CHANNELS), np.float32)
    for place in range(ENCODER_CHANNELS):
        filled[..., place] = parts[min(place, len(parts) - 1)]
    return filled


def _require_channels(volume: Volume, channels: Sequence[int]) -> None:
    found = volume.array.shape[3] if volume.array.ndim == 4 else 1
    if found != len(channels):
        raise InputError(
            f"expected {len(channels)} channels ({', '.join(map(str, channels))}) of {volume.path or 'the scan'}, "
            f"found {found}; read them together, with io.read_volume(path, channel={tuple(channels)}) from a 4-D file "
            "or with io.read_channels from a file for each"
        )


def _require_intensities(volume: Volume, number: int) -> None:
    found = "colours" if volume.array.ndim == 4 else "intensities in [0, 1]" if volume.normalized else None
    if found:
        raise InputError(
            f"expected intensities for {number} windows, as CT in Hounsfield units has them, found {found} in "
            f"{volume.path or 'the scan'}; leave windows out, or give the scan as it came from the scanner"
        )
