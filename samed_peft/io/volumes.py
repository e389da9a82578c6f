"""Scans and label maps: `Volume` and what reads it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io.dicom import read_dicom
from samed_peft.io.files import naming_unreadable, require_file
from samed_peft.io.readers import (
    ARRAY_SUFFIXES,
    ITK_SUFFIXES,
    NIFTI_SUFFIXES,
    PICTURE_SUFFIXES,
    SUFFIXES,
    checked_affine,
    read_hdf5,
    read_itk,
    read_nifti,
    read_npz,
    read_picture,
    suffix_of,
)


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan or label map on its own voxel grid.

    Attributes:
        array: (D, H, W); `array[z, y, x]` is voxel (x, y, z) of nibabel, SAMed's order of axes. Pictures have D = 1,
            and a fourth axis of three colours where they have any.
        affine: (4, 4) float64, voxel index (x, y, z, 1) to RAS+ millimetres; None where the file has none.
        path: file or folder it was read from.
        normalized: intensities are already in [0, 1], so no window is applied.
    """

    array: np.ndarray
    affine: np.ndarray | None = None
    path: Path | None = None
    normalized: bool = False

    @property
    def spacing_zyx_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along each axis of `array`; ones without an affine."""
        if self.affine is None:
            return (1.0, 1.0, 1.0)
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return (z, y, x)

    @property
    def orientation(self) -> str | None:
        """Where the (x, y, z) voxel axes point, as nibabel's axis codes ("LAS"); None without an affine."""
        if self.affine is None:
            return None
        from nibabel.orientations import aff2axcodes

        return "".join(str(code) for code in aff2axcodes(self.affine))


_GRID_TOLERANCE = 0.1
"""Share of a voxel by which two grids may differ: files that store affines in float32 differ by less."""


_LABEL_ROUNDING = 0.05
"""How far a label may be from a whole number: writers that scale labels to bytes miss by less, resampling by more."""


def grids_apart_mm(one: Volume, other: Volume) -> float:
    """How far two grids of one shape lie apart, at the corner where they differ most.

    Returns:
        Millimetres; 0 if it is less than a tenth of a voxel, or if a volume has no affine to compare.
    """
    if one.affine is None or other.affine is None:
        return 0.0
    last_xyz = np.array(other.array.shape[::-1]) - 1
    corners = np.array([[*(corner * last_xyz), 1] for corner in np.ndindex(2, 2, 2)])
    apart_mm = float(np.linalg.norm(corners @ (one.affine - other.affine)[:3].T, axis=1).max())
    return apart_mm if apart_mm > _GRID_TOLERANCE * min(other.spacing_zyx_mm) else 0.0


def _load(path: str | Path, *, key: str, channel: int | None = None) -> Volume:
    """Any supported file as stored, axes in (D, H, W) order."""
    path = Path(path)
    with naming_unreadable(path):
        is_folder = path.is_dir()
    if is_folder:
        return _checked(Volume(*read_dicom(path), path), None)
    suffix = suffix_of(require_file(path))
    if suffix in NIFTI_SUFFIXES:
        array, affine = read_nifti(path)
        return _checked(Volume(array.T, affine, path), channel)
    if suffix in ITK_SUFFIXES:
        return _checked(Volume(*read_itk(path), path), None)
    if suffix in PICTURE_SUFFIXES:
        return _checked(Volume(read_picture(path, indexed=key == "label"), None, path), None)
    if suffix in ARRAY_SUFFIXES:
        array = read_hdf5(path, key) if suffix == ".npy.h5" else read_npz(path, key)
        return _checked(Volume(array[None] if array.ndim == 2 else array, None, path, True), None)
    raise InputError(f"expected {', '.join(SUFFIXES)} or a DICOM folder, found {path}; convert it to one of these")


def _one_channel(array: np.ndarray, channel: int | None, path: Path | None) -> np.ndarray:
    """(D, H, W) of what may have channels in front, as Decathlon's NIfTI files do."""
    if array.ndim != 4 or len(array) < 2:
        return array[0] if array.ndim == 4 and len(array) else array
    if channel is None:
        raise InputError(
            f"expected a 3-D scan, found 4-D with {len(array)} channels or time points in {path}; choose one of 0 to "
            f"{len(array) - 1} as channel, --channel on the command line, or split it into single volumes"
        )
    if not 0 <= channel < len(array):
        raise InputError(
            f"expected a channel from 0 to {len(array) - 1}, found {channel} for {path}, which has {len(array)} "
            "channels or time points; choose another one"
        )
    return array[channel]


def _checked(volume: Volume, channel: int | None) -> Volume:
    affine, path = volume.affine, volume.path
    is_colour = path is not None and suffix_of(path) in PICTURE_SUFFIXES and volume.array.ndim == 4
    array = volume.array if is_colour else _one_channel(volume.array, channel, path)
    if array.ndim != 3 + is_colour or 0 in array.shape:
        raise InputError(f"expected a 3-D scan, found shape {array.shape} in {path}; split it into single volumes")
    if array.dtype.kind not in "biuf":
        raise InputError(f"expected numbers, found {array.dtype} in {path}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        count = int((~np.isfinite(array)).sum())
        raise InputError(
            f"expected finite voxels, found NaN or infinity in {count} of {array.size} voxels of {path}; "
            "replace them, with the intensity of air for instance"
        )
    if affine is not None:
        checked_affine(affine, path)
    return Volume(array, affine, path, volume.normalized)


def read_volume(path: str | Path, *, channel: int | None = None) -> Volume:
    """Read a scan: `.nii`, `.nii.gz`, `.nrrd`, `.mha`, a DICOM folder, a picture, or SAMed's `.npy.h5` and `.npz`.

    Pictures are `.png`, `.tif` and `.jpg`, grey or in colour; a palette's colours count. SAMed's own files hold
    intensities in [0, 1] under the name `image` and come back with `normalized=True`.

    Args:
        path: file or folder.
        channel: which volume of a 4-D NIfTI file, counted from 0; a file with a single one and other files are
            taken whole.

    Returns:
        Volume with a float32 array (D, H, W); a 2-D `.npz` or picture has D = 1, a colour picture (1, H, W, 3).

    Raises:
        InputError: the file is missing, damaged, of an unknown kind, not 3-D, or holds NaN or infinity; its
            affine cannot be inverted; a DICOM folder holds several series or lacks slices; an `.npy.h5` or
            `.npz` is not in [0, 1].
    """
    volume = _load(path, key="image", channel=channel)
    with np.errstate(over="ignore"):  # what float32 cannot hold is reported below, with its file
        array = np.ascontiguousarray(volume.array, dtype=np.float32)
    if array.dtype != volume.array.dtype and not np.isfinite(array).all():
        raise InputError(f"expected intensities that float32 can hold, found larger ones in {path}; rescale them")
    # Half a unit of slack: resampled slices overshoot [0, 1]; Hounsfield units go far beyond.
    if volume.normalized and (array.min() < -0.5 or array.max() > 1.5):
        raise InputError(
            f"expected intensities in [0, 1], found {array.min():g} to {array.max():g} in {path}; "
            "clip and scale them as SAMed's preprocessing does, or give the scan as NIfTI"
        )
    return Volume(array, volume.affine, volume.path, volume.normalized)


def read_labels(path: str | Path) -> Volume:
    """Read a label map from any file that `read_volume` reads; `.npy.h5` and `.npz` hold it as `label`.

    In a picture whose only values are 0 and 255, 255 is label 1; of a palette the indices are the labels.

    Returns:
        Volume with an array (D, H, W) of uint8, or of int16 where a label is negative or above 255.

    Raises:
        InputError: as `read_volume`, or a label is not a whole number, but for rounding, or does not fit int16.
    """
    volume = _load(path, key="label")
    array = volume.array
    if volume.path is not None and suffix_of(volume.path) in PICTURE_SUFFIXES:
        array = _picture_labels(array, volume.path)
    if array.dtype.kind == "f":
        array = _whole_numbers(array, path)
    low, high = array.min(), array.max()
    if low < -(2**15) or high >= 2**15:
        raise InputError(f"expected labels of 16 bits, found {low:g} to {high:g} in {path}; is this the scan itself?")
    dtype = np.uint8 if low >= 0 and high <= 255 else np.int16
    return Volume(np.ascontiguousarray(array, dtype=dtype), volume.affine, volume.path, volume.normalized)


def _whole_numbers(array: np.ndarray, path: str | Path) -> np.ndarray:
    whole = np.rint(array)
    odd = np.abs(array - whole) > _LABEL_ROUNDING
    if odd.any():
        raise InputError(
            f"expected whole numbers as labels, found {float(array[odd][0]):g} in {path}; "
            "resample labels by nearest neighbour, and check that this is not the scan itself"
        )
    return whole


def _picture_labels(array: np.ndarray, path: Path) -> np.ndarray:
    if suffix_of(path) in (".jpg", ".jpeg"):
        raise InputError(f"expected a mask without loss, found JPEG in {path}, whose edges are no labels; use PNG")
    if array.ndim == 4:
        if (array != array[..., :1]).any():
            raise InputError(f"expected one label a pixel, found colours in {path}; save label numbers in grey")
        array = array[..., 0]
    values = np.unique(array)
    return array // 255 if values[-1] == 255 and set(values.tolist()) <= {0, 255} else array
