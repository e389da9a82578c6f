"""Read several channels of a scan, such as T1 and FLAIR, into one volume."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io.scans import read_volume
from samed_peft.io.volumes import Volume, grids_apart_mm


def read_channels(paths: Sequence[str | Path]) -> Volume:
    """Read a scan of which each channel is a file of its own, on one grid; channels of one file: `read_volume`.

    Returns:
        Volume with a float32 array (D, H, W, C), and affine and path of the first file.

    Raises:
        InputError: as `read_volume`, or a file is missing, is in colour, or differs from the first in shape or grid.
    """
    if missing := [path for path in map(Path, paths) if not path.exists()]:
        raise InputError(
            f"expected a file for each of {len(paths)} channels of a scan, found no {missing[0]}; add it, or leave the "
            "scan out"
        )
    parts = [read_volume(path) for path in paths]
    first = parts[0]
    for part in parts:
        if part.array.ndim != 3:
            raise InputError(
                f"expected one channel a file, found colours in {part.path}; save it in grey, or train on it in colour"
            )
        if part.array.shape != first.array.shape:
            raise InputError(
                f"expected all channels of a scan on one grid, found {first.array.shape} in {first.path} and "
                f"{part.array.shape} in {part.path}; resample one to the other"
            )
        if apart_mm := grids_apart_mm(part, first):
            raise InputError(
                f"expected all channels of a scan on one grid, found corners of {first.path} and {part.path} "
                f"{apart_mm:.3g} mm apart; resample one to the other"
            )
    return replace(first, array=np.stack([part.array for part in parts], axis=-1))


def first_channel(volume: Volume) -> Volume:
    """The first channel alone of a volume with several, to be shown in grey."""
    return volume if volume.array.ndim == 3 else replace(volume, array=np.ascontiguousarray(volume.array[..., 0]))
