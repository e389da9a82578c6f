"""Read scans and label maps of any format, and write masks on their grids."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io.files import naming_any_error, naming_unreadable, require_file
from samed_peft.io.formats import DICOM_SERIES, MASK_SUFFIXES, SUFFIXES, format_of, is_picture
from samed_peft.io.instances import INSTANCE_ADVICE, InstanceCheck
from samed_peft.io.label_names import checked_names
from samed_peft.io.volumes import Volume, checked_affine, checked_mask

_MOST_CLASSES = 255
"""Masks are uint8."""

_LABEL_ROUNDING = 0.05
"""How far a label may be from a whole number: writers that scale labels to bytes miss by less, resampling by more."""

PICTURE_ADVICE = (
    "greys in between come from smooth edges, and 255 may mark a border to ignore: save masks without either, "
    "of label numbers or of 0 and 255 alone, or name all of them, with class_names or in a labels.txt, whose line "
    "__ignore__ stands for 255"
)
"""What to do about pictures whose greys are not label numbers."""


Channels = int | Sequence[int] | None
"""Which volume of a 4-D file, or which ones, counted from 0."""


def _load(path: str | Path, *, labels: bool, channel: Channels = None, numbers: bool = False) -> Volume:
    """Read any supported file as stored, axes in (D, H, W) order; of a label map the `numbers` may all count."""
    path = Path(path)
    with naming_unreadable(path):
        is_folder = path.is_dir()
    file_format = DICOM_SERIES if is_folder else format_of(require_file(path))
    if file_format is None:
        raise InputError(f"expected {', '.join(SUFFIXES)} or a DICOM folder, found {path}; convert it to one of these")
    read = (numbers and file_format.read_numbers) or (labels and file_format.read_labels) or file_format.read
    with naming_any_error(path):
        array, affine = read(path)
    is_colour = file_format.is_picture and array.ndim == 4
    if not is_colour or isinstance(channel, Sequence):
        array = _in_3d(array)
        array = _chosen_channels(array, channel, path, is_4d=file_format.has_channels)
    _check(array, affine, path, ndim=3 + (is_colour or isinstance(channel, Sequence)))
    return Volume(array, affine, path, file_format.is_normalized)


def _in_3d(array: np.ndarray) -> np.ndarray:
    """A picture as a scan of one slice, and a scan without axes of length one in front of the third last."""
    if array.ndim == 2:
        return array[None]
    while array.ndim > 3 and len(array) == 1:
        array = array[0]
    return array


def _chosen_channels(array: np.ndarray, channel: Channels, path: Path, *, is_4d: bool) -> np.ndarray:
    """One volume (D, H, W), or several (D, H, W, C), of an array that may have channels in front, as Decathlon's."""
    if not isinstance(channel, Sequence):
        return _one_channel(array, channel if is_4d else None, path)
    if not is_4d or array.ndim != 4 or not len(array):
        raise InputError(
            f"expected a 4-D scan with channels {', '.join(map(str, channel))}, found a single channel in {path}; give "
            "a 4-D NIfTI file, or a file for each channel, named CASE_0000, CASE_0001 and so on"
        )
    return np.stack([_one_channel(array, one, path) for one in channel], axis=-1)


def _one_channel(array: np.ndarray, channel: int | None, path: Path) -> np.ndarray:
    if array.ndim != 4 or not len(array):
        return array
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


def _check(array: np.ndarray, affine: np.ndarray | None, path: Path, *, ndim: int) -> None:
    """Refuse arrays and affines that no scan or label map has."""
    if array.ndim != ndim or 0 in array.shape:
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


def read_volume(path: str | Path, *, channel: Channels = None) -> Volume:
    """Read a scan: a file of one of `FORMATS`, or a DICOM folder.

    Of a picture with a palette the colours count. SAMed's own files (`.npy.h5`, `.npz`) hold intensities in [0, 1]
    under the name `image` and come back with `normalized=True`.

    Args:
        path: file or folder.
        channel: which volume of a 4-D NIfTI file, counted from 0; ignored for files with a single one and for other
            formats. Several, which such a file must have, become a fourth axis.

    Returns:
        Volume with a float32 array (D, H, W); a 2-D `.npz` or picture has D = 1, a colour picture (1, H, W, 3).

    Raises:
        InputError: the file is missing, damaged, of an unknown format, not 3-D, or holds NaN or infinity; its affine
            cannot be inverted; a DICOM folder holds several series or lacks slices; an `.npy.h5` or `.npz` is not in
            [0, 1].
    """
    volume = _load(path, labels=False, channel=channel)
    with (
        naming_any_error(Path(path)),
        np.errstate(over="ignore"),
    ):  # values too large for float32 are reported below, with their file
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


def read_labels(path: str | Path, *, as_stored: bool = False) -> Volume:
    """Read a label map from any file that `read_volume` reads, but JPEG; `.npy.h5` and `.npz` hold it as `label`.

    In a picture whose only values are 0 and 255, 255 is label 1; in one with a palette, its indices are the labels.

    Args:
        path: file or folder.
        as_stored: 255 stays 255 in any picture, for label maps whose numbers are listed elsewhere.

    Returns:
        Volume with an array (D, H, W) of uint8, or of int16 if a label is negative or above 255.

    Raises:
        InputError: as `read_volume`, or a label is not a whole number, but for rounding, or does not fit int16.
    """
    volume = _load(path, labels=True, numbers=as_stored)
    array = volume.array
    if array.dtype.kind == "f":
        whole = np.rint(array)
        odd = np.abs(array - whole) > _LABEL_ROUNDING
        if odd.any():
            raise InputError(
                f"expected whole numbers as labels, found {float(array[odd][0]):g} in {path}; "
                "resample labels by nearest neighbour, and check that this is not the scan itself"
            )
        array = whole
    low, high = array.min(), array.max()
    if low < -(2**15) or high >= 2**15:
        raise InputError(f"expected labels of 16 bits, found {low:g} to {high:g} in {path}; is this the scan itself?")
    dtype = np.uint8 if low >= 0 and high <= 255 else np.int16
    return Volume(np.ascontiguousarray(array, dtype=dtype), volume.affine, volume.path, volume.normalized)


def read_colours(path: str | Path) -> Volume:
    """Read a label map whose labels are colours: a picture, but no JPEG; of a palette the colours count.

    Returns:
        Volume with an array (1, H, W, 3) of uint8; grey counts as three equal colours.

    Raises:
        InputError: as `read_labels`, or the file is not a picture or has more than 8 bits a colour.
    """
    path = Path(path)
    file_format = format_of(path)
    if file_format is None or not file_format.is_picture:
        raise InputError(f"expected a picture with a colour for each label, found {path}; convert it to PNG")
    if file_format.read_numbers is None:  # JPEG
        read_labels(path)
    volume = _load(path, labels=False)
    if volume.array.dtype.kind == "f" or volume.array.min() < 0 or volume.array.max() > 255:
        raise InputError(f"expected colours of 8 bits, found {volume.array.dtype} in {path}; save it as RGB of 8 bits")
    array = volume.array if volume.array.ndim == 4 else np.stack([volume.array] * 3, axis=-1)
    if array.dtype == bool:  # black and white in one bit
        array = array * np.uint8(255)
    return Volume(array.astype(np.uint8), None, path)


def read_affine(path: str | Path) -> np.ndarray | None:
    """Read the affine of a file, or of a DICOM folder, from its header alone; None for formats without one.

    Raises:
        InputError: the file is missing, its header is damaged, or the affine has no inverse.
    """
    path = Path(path)
    with naming_unreadable(path):
        is_folder = path.is_dir()
    file_format = DICOM_SERIES if is_folder else format_of(require_file(path))
    with naming_any_error(path):
        affine = file_format.read_affine(path) if file_format and file_format.read_affine else None
    return None if affine is None else checked_affine(affine, path)


def read_label_names(path: str | Path) -> dict[int, str] | None:
    """Read the names of labels from a mask file.

    Returns:
        label -> name, background left out; None if the file or its format holds no names.

    Raises:
        InputError: the file is missing or damaged.
    """
    file_format = format_of(path := require_file(path))
    with naming_any_error(path):
        return file_format.read_names(path) if file_format and file_format.read_names else None


def write_mask(
    mask: np.ndarray, like: Volume, path: str | Path, *, label_names: Mapping[int, str] | None = None
) -> None:
    """Write a label mask on the grid of the scan `like`, atomically; equal masks give equal bytes.

    A NIfTI mask of a NIfTI scan keeps its qform and sform with their codes and its units. Names of labels go where
    viewers look for them: NIfTI's label table of Connectome Workbench, 3D Slicer's segments in `.nrrd`, JSON under
    `labels` in `.mha` and `.png`.

    Args:
        mask: (D, H, W) integers in 0..255, the shape of `like.array` but for its colours.
        like: the scan; without an affine the mask gets the identity.
        path: ends in one of `MASK_SUFFIXES`, `.png` for pictures alone; missing parent folders are made.
        label_names: label -> name, background left out.

    Raises:
        InputError: the shapes differ, a value does not fit, the suffix is another one, or is `.png` for a scan other
            than a picture; a name is empty or not of a label in 1..255.
    """
    path = Path(path)
    file_format = format_of(path)
    if file_format is None or file_format.write_mask is None:
        raise InputError(
            f"expected a mask name ending in {', '.join(MASK_SUFFIXES)}, found {path}; choose one of these"
        )
    names = checked_names(label_names or {}, path)
    file_format.write_mask(checked_mask(mask, like, path), like, path, names)


def numbered_names(label_maps: Iterable[Volume], *, folder: Path) -> tuple[str, ...]:
    """Make names "class 1", "class 2" and so on, up to the largest label, for label maps without names.

    Args:
        label_maps: taken one at a time.
        folder: their folder, for the errors.

    Raises:
        InputError: no label is above 0, labels number objects and not classes, or the values of pictures are greys and
            not label numbers.
    """
    instances = InstanceCheck()
    found: set[int] = set()
    in_pictures: set[int] = set()
    for volume in label_maps:
        labels = {int(label) for label in np.unique(volume.array) if label > 0}
        found |= labels
        instances.add(volume.array, labels)
        if volume.path is not None and is_picture(volume.path):
            in_pictures |= labels
    if not found:
        raise InputError(f"expected label maps with labels above 0, found none in {folder}; check these files")
    # A class may be too rare for a small folder to have it, but not most of them.
    are_greys = bool(in_pictures) and (max(in_pictures) == 255 or max(in_pictures) > 2 * len(in_pictures))
    if instances.are_likely(numbers_are_odd=are_greys or max(found) > _MOST_CLASSES):
        raise InputError(
            f"expected labels 1, 2 and so on for classes that nothing names, found numbers up to {max(found)} in "
            f"{folder}; {INSTANCE_ADVICE}"
        )
    if are_greys:
        shown = ", ".join(map(str, sorted(in_pictures)[:8])) + " ..." * (len(in_pictures) > 8)
        raise InputError(
            f"expected labels 1, 2 and so on, or 255 alone, in pictures whose classes nothing names, but labels of "
            f"{folder} hold {shown}; {PICTURE_ADVICE}"
        )
    return tuple(f"class {label}" for label in range(1, max(found) + 1))
