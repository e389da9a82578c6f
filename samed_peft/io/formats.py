"""The table of file formats: each record of `FORMATS` says all that the package knows about one.

To add a format, write its reader, add its record here and a test.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from samed_peft.io import arrays, dicom, itk, nifti, pictures
from samed_peft.io.volumes import Volume

Read = Callable[[Path], tuple[np.ndarray, np.ndarray | None]]
"""Reads a file's array as stored, (D, H, W), and its affine, if it stores one."""


@dataclass(frozen=True)
class FileFormat:
    """A format of scans or masks.

    Attributes:
        name: for users.
        suffixes: endings of its files' names, in lower case.
        mask_suffix: ending of the masks that `samed predict` writes for its scans.
        read: reads a scan.
        read_labels: reads a label map; None: as a scan.
        read_affine: reads the affine from the header alone; None for formats without an affine.
        write_mask: writes a uint8 mask (D, H, W) on the grid of a scan, with label -> name; None if masks cannot be
            written in this format.
        read_names: reads label -> name, None if the file holds none; None for formats that cannot hold names.
        is_picture: a fourth axis holds colours, and 255 may stand for label 1.
        is_normalized: intensities are in [0, 1] already.
        has_channels: a fourth axis, in front, holds channels or time points to choose from.
    """

    name: str
    suffixes: tuple[str, ...]
    mask_suffix: str
    read: Read
    read_labels: Read | None = None
    read_affine: Callable[[Path], np.ndarray | None] | None = None
    write_mask: Callable[[np.ndarray, Volume, Path, Mapping[int, str]], None] | None = None
    read_names: Callable[[Path], dict[int, str] | None] | None = None
    is_picture: bool = False
    is_normalized: bool = False
    has_channels: bool = False


_NIFTI = FileFormat(
    *("NIfTI", nifti.SUFFIXES, ".nii.gz"),
    read=nifti.read,
    read_affine=nifti.read_affine,
    write_mask=nifti.write_mask,
    read_names=nifti.read_names,
    has_channels=True,
)

FORMATS = (
    _NIFTI,
    FileFormat(
        *("NRRD", (".nrrd",), ".nrrd"),
        read=itk.read,
        read_affine=itk.read_affine,
        write_mask=itk.write_nrrd_mask,
        read_names=itk.read_names,
    ),
    FileFormat(
        *("MetaImage", (".mha",), ".mha"),
        read=itk.read,
        read_affine=itk.read_affine,
        write_mask=itk.write_mha_mask,
        read_names=itk.read_names,
    ),
    FileFormat(
        *("SAMed's HDF5", (".npy.h5",), _NIFTI.mask_suffix),
        read=partial(arrays.read_hdf5, key="image"),
        read_labels=partial(arrays.read_hdf5, key="label"),
        is_normalized=True,
    ),
    FileFormat(
        *("SAMed's NumPy archive", (".npz",), _NIFTI.mask_suffix),
        read=partial(arrays.read_npz, key="image"),
        read_labels=partial(arrays.read_npz, key="label"),
        is_normalized=True,
    ),
    FileFormat(
        *("PNG", (".png",), ".png"),
        read=pictures.read,
        read_labels=pictures.read_labels,
        write_mask=pictures.write_mask,
        read_names=pictures.read_names,
        is_picture=True,
    ),
    FileFormat(
        *("TIFF", (".tif", ".tiff"), ".png"), read=pictures.read, read_labels=pictures.read_labels, is_picture=True
    ),
    FileFormat(
        *("JPEG", (".jpg", ".jpeg"), ".png"), read=pictures.read, read_labels=pictures.refuse_labels, is_picture=True
    ),
)

DICOM_SERIES = FileFormat("DICOM series", (), _NIFTI.mask_suffix, dicom.read)
"""A folder with the slices of one scan, found by its content and not by its name."""

SUFFIXES = tuple(suffix for file_format in FORMATS for suffix in file_format.suffixes)
MASK_SUFFIXES = tuple(suffix for file_format in FORMATS if file_format.write_mask for suffix in file_format.suffixes)


def suffix_of(path: Path) -> str | None:
    """The one of `SUFFIXES` that `path` ends in, or None."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def format_of(path: Path) -> FileFormat | None:
    """The format that a file's name says it has, or None."""
    suffix = suffix_of(path)
    return next((file_format for file_format in FORMATS if suffix in file_format.suffixes), None)


def is_picture(path: Path) -> bool:
    """Whether `path` is named as a picture."""
    file_format = format_of(path)
    return file_format is not None and file_format.is_picture
