"""Write label masks as DICOM SEG, through highdicom."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from samed_peft import __version__
from samed_peft.errors import InputError
from samed_peft.io.atomic import atomic_file
from samed_peft.io.dicom import dicom_files
from samed_peft.io.files import naming_unreadable
from samed_peft.io.label_names import checked_names, label_colour
from samed_peft.io.volumes import LPS_TO_RAS, Volume, checked_mask

DICOM_SEG_SUFFIX = ".dcm"
_LONG_STRING = 64
"""Most characters of a segment's name, by DICOM's value representation LO."""

_REFERRED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
"""What a SEG repeats of each slice."""


def require_highdicom() -> Any:
    """Import highdicom.

    Raises:
        InputError: it is not installed.
    """
    try:
        import highdicom
    except ImportError as error:
        raise InputError(
            'DICOM SEG needs highdicom, which is not installed; pip install "samed_peft[dicom]"'
        ) from error
    return highdicom


def write_dicom_seg(
    mask: np.ndarray,
    like: Volume,
    path: str | Path,
    *,
    label_names: Mapping[int, str] | None = None,
    series: str | None = None,
) -> None:
    """Write a label mask as a binary DICOM SEG that refers to the slices of its series, atomically.

    Unlike `write_mask`, equal masks give files with identifiers and times of their own, as DICOM asks for.

    Args:
        mask: (D, H, W) integers in 0..255, the shape of `like.array`.
        like: the scan; `like.path` is the folder of its DICOM series.
        path: `.dcm`; missing parent folders are made.
        label_names: label -> name, background left out; others up to the largest label are called by their numbers.
        series: which of several series in the folder `like` was read from; None for the only one.

    Raises:
        InputError: highdicom is missing, the scan is not a DICOM series with one file a slice or lacks headers that a
            SEG must repeat, the mask is not the scan's, or the suffix is another one.
    """
    highdicom = require_highdicom()
    path = Path(path)
    if path.suffix.lower() != DICOM_SEG_SUFFIX:
        raise InputError(f"expected a DICOM SEG name ending in {DICOM_SEG_SUFFIX}, found {path}; choose such a name")
    mask = checked_mask(mask, like, path)
    names = checked_names(label_names or {}, path)
    slices = _source_slices(like, series)
    # Binary segments are numbered without gaps.
    last = max(int(mask.max()), 1, *names)
    described = [_segment(highdicom, label, names.get(label, f"label {label}")) for label in range(1, last + 1)]
    with warnings.catch_warnings():
        # Scanners often break the letter of the standard in names and numbers, and that is not ours to mend.
        # All threads share the filters, and other warnings of other threads must be shown.
        warnings.filterwarnings("ignore", module=r"(pydicom|highdicom)\b")
        try:
            seg = _segmentation(highdicom, slices, mask, described)
        except (AttributeError, KeyError, ValueError) as error:
            raise InputError(
                f"expected a series that a DICOM SEG can refer to, found one that highdicom refuses in {like.path}: "
                f"{type(error).__name__}: {error}; write .nii.gz"
            ) from error
        with atomic_file(path) as temporary:
            seg.save_as(temporary)


def _source_slices(like: Volume, series: str | None) -> list[Any]:
    """Headers of the series' files, one for each slice of `like.array` and in its order."""
    import pydicom

    if like.path is None or not like.path.is_dir() or like.affine is None:
        raise InputError(f"expected a DICOM series for a DICOM SEG, found {like.path}; write .nii.gz for other scans")
    files = dicom_files(like.path, series)
    if len(files) != len(like.array):
        raise InputError(
            f"expected one file a slice, found {len(files)} files for {len(like.array)} slices in {like.path}; "
            "a DICOM SEG of a multi-frame series is not supported, write .nii.gz"
        )
    with naming_unreadable(like.path):  # whatever else may be wrong was told by `dicom_files`
        slices: list[Any] = [pydicom.dcmread(file, stop_before_pixels=True, force=True) for file in files]
    for header in slices:
        blank = [name for name in _REFERRED if not header.get(name)]
        if blank:
            raise InputError(
                f"expected a series that a DICOM SEG can refer to, found no {' and no '.join(blank)} in "
                f"{header.filename}; write .nii.gz"
            )
    to_lps = LPS_TO_RAS @ like.affine
    for index, header in enumerate(slices):
        if header.get("SliceThickness") is None:  # a CT may leave it out, a SEG may not
            header.SliceThickness = like.spacing_zyx_mm[0]
        if "ImagePositionPatient" not in header:
            raise InputError(f"expected ImagePositionPatient in each slice, found none in {header.filename}")
        apart_mm = np.linalg.norm(np.array(header.ImagePositionPatient, float) - (to_lps @ (0, 0, index, 1))[:3])
        if apart_mm > 0.1 * min(like.spacing_zyx_mm):
            raise InputError(
                f"expected slice {index} at the position in its file, found it {apart_mm:.2f} mm away in "
                f"{header.filename}; was the volume changed after reading? Write .nii.gz"
            )
    return slices


def _segment(highdicom: Any, label: int, name: str) -> Any:
    from pydicom.sr.codedict import codes

    method = highdicom.AlgorithmIdentificationSequence(
        name="samed_peft", version=__version__, family=codes.DCM.ArtificialIntelligence
    )
    bytes_rgb = [round(255 * value) for value in label_colour(label)]
    return highdicom.seg.SegmentDescription(
        segment_number=label,
        segment_label=name.replace("\\", "/")[:_LONG_STRING],
        # Only its name says what a segment shows; 3D Slicer uses these two codes for unknown tissue.
        segmented_property_category=codes.SCT.Tissue,
        segmented_property_type=codes.SCT.Tissue,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=method,
        display_color=highdicom.color.CIELabColor.from_rgb(*bytes_rgb),
    )


def _segmentation(highdicom: Any, slices: Sequence[Any], mask: np.ndarray, described: Sequence[Any]) -> Any:
    return highdicom.seg.Segmentation(
        source_images=slices,
        pixel_array=mask,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=described,
        series_instance_uid=highdicom.UID(),
        series_number=100,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="samed_peft",
        manufacturer_model_name="samed_peft",
        software_versions=__version__,
        device_serial_number="0",
        series_description="samed_peft segmentation",
        omit_empty_frames=bool(mask.any()),
    )
