"""Read scans from folders of DICOM slices and from multi-frame files.

pydicom reads and checks all headers first (`dicom_headers`), then the frames are put in order (`dicom_geometry`) and
decoded (`dicom_pixels`). Every image of a series is used, or named in an error or a warning.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io import dicom_headers
from samed_peft.io.dicom_geometry import frames_of, ordered, without_localizers
from samed_peft.io.dicom_headers import DicomFile
from samed_peft.io.dicom_pixels import require_grey, rescaled
from samed_peft.io.files import list_folder
from samed_peft.io.volumes import Volume, checked_affine

SUFFIXES = dicom_headers.SUFFIXES


def dicom_series(path: Path) -> tuple[str, ...]:
    """List the identifiers of the DICOM series directly in a folder, which may be empty.

    Raises:
        InputError: a file that is an image by its name or its beginning cannot be read.
    """
    return tuple(sorted({file.series for file in dicom_headers.image_files(path)}))


def holds_dicom(path: Path) -> bool:
    """Whether images of DICOM lie directly in a folder; masks and reports in DICOM do not count."""
    return dicom_headers.has_images(path)


def dicom_files(path: Path, series: str | None = None) -> list[Path]:
    """List the files of a series in a DICOM folder, in the order of their slices.

    Args:
        path: the folder.
        series: identifier of the series; None for the only one.

    Raises:
        InputError: the folder holds no series, several, or not this one; its slices do not form a regular stack.
    """
    files = _grey_files(path, series)
    frames, _ = ordered([frame for file in files for frame in frames_of(file)], path)
    return list(dict.fromkeys(frame.file.path for frame in frames))


def _grey_files(path: Path, series: str | None) -> list[DicomFile]:
    """The images of a series, in any order."""
    images = dicom_headers.image_files(path)
    of_series: dict[str, list[DicomFile]] = {}
    for file in images:
        of_series.setdefault(file.series, []).append(file)
    if series is None and len(of_series) == 1:
        series = next(iter(of_series))
    if series is None or series not in of_series:
        raise InputError(_which_series(path, of_series, series))
    files = without_localizers(of_series[series])
    _require_different(files)
    for file in files:
        require_grey(file)
    inverse = [file.path for file in files if file.text("PhotometricInterpretation").upper() == "MONOCHROME1"]
    if inverse:
        warnings.warn(
            f"{inverse[0]} is MONOCHROME1, shown with white as its smallest value; values are read as they are stored",
            stacklevel=2,
        )
    return files


def _which_series(path: Path, of_series: dict[str, list[DicomFile]], series: str | None) -> str:
    """The error for a folder that does not hold one series, or not the one that is asked for."""
    if not of_series:
        deeper = folders_below(path)
        others = f" and in {len(deeper) - 1} folders more" if len(deeper) > 1 else ""
        remedy = f" but in {deeper[0]}{others}; give such a folder" if deeper else "; check the path"
        return f"expected a folder with one DICOM series, found no DICOM files with images in {path}{remedy}"
    listed = "; ".join(
        f"{uid or 'without identifier'} ({len(files)} files, {_description(files[0])})"
        for uid, files in sorted(of_series.items())
    )
    wanted = "one DICOM series" if series is None else f"the DICOM series {series}"
    return (
        f"expected a folder with {wanted}, found {len(of_series)} series in {path}: {listed}. Choose one with "
        "samed predict --series, or give each its own folder"
    )


def _description(file: DicomFile) -> str:
    words = [file.text("Modality"), file.text("SeriesDescription")]
    return " ".join(word for word in words if word) or "no description"


def _require_different(files: Sequence[DicomFile]) -> None:
    """Refuse copies of one image."""
    first: dict[str, DicomFile] = {}
    for file in files:
        uid = file.text("SOPInstanceUID")
        if uid and uid in first:
            raise InputError(
                f"expected evenly spaced DICOM slices, found one image, SOPInstanceUID {uid}, in both "
                f"{first[uid].path} and {file.path}; move the copy away"
            )
        first[uid] = file


def folders_below(path: Path, *, depth: int = 4) -> list[Path]:
    """List folders with DICOM images in a folder, down to some depth."""
    found: list[Path] = []
    for folder in (item for item in list_folder(path) if item.is_dir() and not item.is_symlink()):
        if holds_dicom(folder):
            found.append(folder)
        if depth > 1:
            found += folders_below(folder, depth=depth - 1)
    return found


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Array (D, H, W) in the scanner's units, and RAS affine, of the only series in a DICOM folder."""
    return _read(_grey_files(path, None), path)


def read_affine(path: Path) -> np.ndarray:
    """RAS affine of the only series in a DICOM folder, from its headers."""
    frames = [frame for file in _grey_files(path, None) for frame in frames_of(file)]
    return ordered(frames, path)[1]


def read_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Array and affine, as of `read`, of a file that holds a whole scan.

    Raises:
        InputError: it holds something other than an image, or one of several slices.
    """
    file = dicom_headers.read_header(path) if dicom_headers.looks_like_dicom(path) else None
    if file is None or not file.is_image:
        raise InputError(f"expected a DICOM image, found none in {path}; give the folder of a series, or NIfTI")
    require_grey(file)
    if file.frames == 1:
        beside = [other.path for other in dicom_headers.image_files(path.parent) if other.series == file.series]
        if len(beside) > 1:
            raise InputError(
                f"expected a whole scan, found one of {len(beside)} slices of a DICOM series in {path}; give the "
                f"folder {path.parent}"
            )
    return _read([file], path)


def read_series(path: Path, series: str) -> Volume:
    """Read one of several series in a DICOM folder.

    Args:
        path: the folder.
        series: its SeriesInstanceUID.

    Returns:
        Volume as `read_volume` returns it.

    Raises:
        InputError: the folder does not hold the series, or the series cannot be read.
    """
    array, affine = _read(_grey_files(path, series), path)
    return Volume(np.ascontiguousarray(array, dtype=np.float32), checked_affine(affine, path), path)


def _read(files: Sequence[DicomFile], path: Path) -> tuple[np.ndarray, np.ndarray]:
    frames, affine = ordered([frame for file in files for frame in frames_of(file)], path)
    return rescaled(frames), affine
