"""Read scans from folders of DICOM slices."""

from pathlib import Path
from typing import Any

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io.files import naming_damaged
from samed_peft.io.itk import array_and_affine
from samed_peft.io.volumes import LPS_TO_RAS


def _slice_step(reader: Any, count: int, path: Path) -> np.ndarray | None:
    """(3,) LPS millimetres from slice to slice; None for a single file, or if a file lacks its position.

    Gaps between slices, as a missing file leaves them, are refused; ITK would space the others evenly.
    """
    tag = "0020|0032"
    if count < 2 or not all(reader.HasMetaDataKey(k, tag) for k in range(count)):
        return None
    positions = np.array([[float(x) for x in reader.GetMetaData(k, tag).split("\\")] for k in range(count)])
    gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    typical = float(np.median(gaps))
    if typical < 1e-3 or np.abs(gaps - typical).max() > 0.1 * typical + 1e-3:
        raise InputError(
            f"expected evenly spaced DICOM slices, found gaps of {gaps.min():.3f} to {gaps.max():.3f} mm in "
            f"{path}; a file is missing or doubled, export the series again"
        )
    return np.asarray((positions[-1] - positions[0]) / (count - 1))


def dicom_series(path: Path) -> tuple[str, ...]:
    """List the identifiers of the DICOM series directly in a folder, which may be empty."""
    import SimpleITK as sitk  # noqa: N813

    return tuple(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(path)))


def holds_dicom(path: Path) -> bool:
    """Whether a DICOM series lies directly in a folder; GDCM's warning about other folders is not shown."""
    import SimpleITK as sitk  # noqa: N813

    # Not in `dicom_series`: all threads share this switch, and several of them may be reading scans.
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        return bool(dicom_series(path))
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def dicom_files(path: Path) -> list[Path]:
    """List the files of the only series in a DICOM folder, in the order of their slices.

    Raises:
        InputError: the folder holds no series, or more than one.
    """
    import SimpleITK as sitk  # noqa: N813

    series = dicom_series(path)
    if len(series) != 1:
        found = f"{len(series)} series ({', '.join(series)})" if series else "no DICOM files"
        raise InputError(f"expected a folder with one DICOM series, found {found} in {path}; give each its own folder")
    return [Path(name) for name in sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path), series[0])]


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Array (D, H, W) in the scanner's units, and RAS affine, of the only series in a DICOM folder."""
    import SimpleITK as sitk  # noqa: N813

    names = [str(name) for name in dicom_files(path)]
    reader = sitk.ImageSeriesReader()
    reader.MetaDataDictionaryArrayUpdateOn()
    reader.SetFileNames(names)
    with naming_damaged(path, RuntimeError):
        image = reader.Execute()
    array, affine = array_and_affine(image, path)
    step = _slice_step(reader, len(names), path)
    if step is not None:
        # ITK stacks slices along their normal, which a tilted gantry does not.
        affine[:3, 2] = LPS_TO_RAS[:3, :3] @ step
    return array, affine
