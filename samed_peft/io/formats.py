"""The table of file formats. To add one, write its reader, its record here and a test."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from samed_peft.io import arrays, dicom, itk, metaimage, nifti, nrrd, pictures
from samed_peft.io.volumes import Volume

Read = Callable[[Path], tuple[np.ndarray, np.ndarray | None]]
"""Reads a file's array as stored, (D, H, W), and its affine, if it stores one."""


@dataclass(frozen=True)
class FileFormat:
    """A format of scans or masks. Its functions raise `InputError` for a bad file, and name it.

    What libraries raise while they read may be let through: `io.scans` names the file then.

    Attributes:
        name: for users.
        suffixes: endings of its files' names, in lower case.
        mask_suffix: ending of the masks that `samed predict` writes for its scans.
        read: reads a scan.
        read_affine: reads the affine from the header alone; None for formats without an affine.
        write_mask: writes a uint8 mask (D, H, W) on the grid of a scan, with label -> name; None if the format does not
            store masks.
        read_names: reads label -> name, None if the file stores none; None for formats that cannot store names.
        read_labels: reads a label map; None: as a scan.
        read_numbers: reads a label map whose numbers all count as stored; None: as `read_labels`.
        is_picture: a fourth axis holds colours.
        is_normalized: intensities are in [0, 1] already.
        has_channels: a fourth axis, in front, holds channels or time points to choose from.
    """

    name: str
    suffixes: tuple[str, ...]
    mask_suffix: str
    read: Read
    read_affine: Callable[[Path], np.ndarray | None] | None = None
    write_mask: Callable[[np.ndarray, Volume, Path, Mapping[int, str]], None] | None = None
    read_names: Callable[[Path], dict[int, str] | None] | None = None
    read_labels: Read | None = None
    read_numbers: Read | None = None
    is_picture: bool = False
    is_normalized: bool = False
    has_channels: bool = False


_NIFTI = FileFormat(
    *("NIfTI", nifti.SUFFIXES, ".nii.gz", nifti.read, nifti.read_affine, nifti.write_mask, nifti.read_names),
    has_channels=True,
)

FORMATS = (
    _NIFTI,
    FileFormat("NRRD", (".nrrd",), ".nrrd", nrrd.read, nrrd.read_affine, itk.write_nrrd_mask, nrrd.read_names),
    FileFormat(
        *("MetaImage", (".mha",), ".mha", metaimage.read, metaimage.read_affine, itk.write_mha_mask),
        read_names=metaimage.read_names,
    ),
    FileFormat(
        *("SAMed's HDF5", (".npy.h5",), _NIFTI.mask_suffix, arrays.read_hdf5),
        read_labels=partial(arrays.read_hdf5, key="label"),
        is_normalized=True,
    ),
    FileFormat(
        *("SAMed's NumPy archive", (".npz",), _NIFTI.mask_suffix, arrays.read_npz),
        read_labels=partial(arrays.read_npz, key="label"),
        is_normalized=True,
    ),
    FileFormat(
        *("PNG", (".png",), ".png", pictures.read, None, pictures.write_mask, pictures.read_names),
        read_labels=pictures.read_labels,
        read_numbers=pictures.read_numbers,
        is_picture=True,
    ),
    FileFormat(
        *("TIFF", (".tif", ".tiff"), ".png", pictures.read),
        read_labels=pictures.read_labels,
        read_numbers=pictures.read_numbers,
        is_picture=True,
    ),
    FileFormat("JPEG", (".jpg", ".jpeg"), ".png", pictures.read, read_labels=pictures.refuse_labels, is_picture=True),
)

DICOM_SERIES = FileFormat("DICOM series", (), _NIFTI.mask_suffix, dicom.read, dicom.read_affine)
"""A folder with the slices of one scan, recognised by its content and not by its name."""

DICOM_FILE = FileFormat("DICOM file", dicom.SUFFIXES, _NIFTI.mask_suffix, dicom.read_file)
"""A single file with a whole scan; not in `FORMATS`, as such files in a folder are the slices of a series."""

SUFFIXES = tuple(suffix for file_format in FORMATS for suffix in file_format.suffixes)
MASK_SUFFIXES = tuple(suffix for file_format in FORMATS if file_format.write_mask for suffix in file_format.suffixes)


def suffix_of(path: Path) -> str | None:
    """Which of `SUFFIXES` a file's name ends in, or None."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def format_of(path: Path) -> FileFormat | None:
    """Which format a file has by its name, or None."""
    known = (*FORMATS, DICOM_FILE)
    return next((file_format for file_format in known if path.name.lower().endswith(file_format.suffixes)), None)


def is_picture(path: Path) -> bool:
    """Whether a file is a picture by its name."""
    file_format = format_of(path)
    return file_format is not None and file_format.is_picture
