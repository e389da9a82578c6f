"""Put the frames of a DICOM series in order and find their grid; refuse frames without a regular one."""

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io.dicom_headers import DicomFile, numbers_of
from samed_peft.io.volumes import LPS_TO_RAS

_GROUPS = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SpacingBetweenSlices": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
}
"""Where multi-frame files keep what others have in their main part."""

_PHASES = (
    *("AcquisitionNumber", "TemporalPositionIdentifier", "EchoNumbers", "TriggerTime", "ContentTime"),
    *("AcquisitionTime", "ImageType", "InstanceNumber"),
)
"""What may tell apart the images of one place, best first."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One slice: a file, or a frame of a multi-frame file.

    Attributes:
        file: its file.
        index: number of the frame in its file, from 0.
        groups: datasets that hold its elements, the most special first.
    """

    file: DicomFile
    index: int
    groups: tuple[Any, ...]

    def numbers(self, keyword: str, count: int = 1) -> tuple[float, ...] | None:
        """Decimal numbers of an element of the frame; None if it is missing or blank."""
        for dataset in self.groups:
            if numbers := numbers_of(dataset, keyword, count, self.file.path):
                return numbers
        return None

    @property
    def size_hw(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.file.integer("Rows"), self.file.integer("Columns")

    def __str__(self) -> str:
        return f"frame {self.index + 1} of {self.file.path}" if self.file.frames > 1 else str(self.file.path)


def frames_of(file: DicomFile) -> Iterator[Frame]:
    """List the frames of a file with their functional groups.

    Raises:
        InputError: it has several frames and no groups for each of them, or groups that cannot be read.
    """
    if file.header.get_item("PerFrameFunctionalGroupsSequence") is None:
        if file.frames > 1:
            raise InputError(
                f"expected a place for each of {file.frames} frames, found no functional groups in {file.path}; "
                "videos and older multi-frame files do not say where their frames lie: export single slices or NIfTI"
            )
        yield Frame(file, 0, (file.header,))
        return
    try:
        shared = list(file.header.get("SharedFunctionalGroupsSequence") or [])[:1]
        each = list(file.header.PerFrameFunctionalGroupsSequence)
        names = sorted(set(_GROUPS.values()))
        parts = [
            tuple(item for group in (own, *shared) for name in names for item in list(group.get(name) or [])[:1])
            for own in each
        ]
    except Exception as error:  # on damaged groups pydicom raises whatever its code runs into
        raise InputError(
            f"{file.path} has functional groups that cannot be read, pydicom says: {error!r}; export it again"
        ) from error
    if len(parts) != file.frames:
        raise InputError(
            f"expected functional groups of {file.frames} frames, found {len(parts)} in {file.path}; export it again"
        )
    for index, groups in enumerate(parts):
        yield Frame(file, index, (*groups, file.header))


def without_localizers(files: Sequence[DicomFile]) -> list[DicomFile]:
    """Leave out localizers of a series that has other images too, with a warning that names them."""
    is_localizer = ["LOCALIZER" in file.text("ImageType").upper().split("\\") for file in files]
    kept = [file for file, leave in zip(files, is_localizer, strict=True) if not leave]
    if not kept or len(kept) == len(files):
        return list(files)
    left = ", ".join(str(file.path) for file, leave in zip(files, is_localizer, strict=True) if leave)
    warnings.warn(f"left out of the scan, as their ImageType says that they are localizers: {left}", stacklevel=2)
    return kept


def ordered(frames: Sequence[Frame], folder: Path) -> tuple[list[Frame], np.ndarray]:
    """Put frames in the order of their positions, along the normal of the slices.

    Returns:
        The frames, and the RAS affine of their grid.

    Raises:
        InputError: they are not the slices of one regular stack, or do not say where they lie.
    """
    _require_same(frames, folder)
    first = frames[0]
    positions = [frame.numbers("ImagePositionPatient", 3) for frame in frames]
    rows, columns = _in_plane_mm(first, is_single=len(frames) == 1)
    across, down = _axes(first, is_single=len(frames) == 1)
    normal = np.cross(across, down)
    lacking = [frame for frame, position in zip(frames, positions, strict=True) if position is None]
    if lacking and len(lacking) < len(frames):
        raise InputError(
            f"expected ImagePositionPatient in each of {len(frames)} slices, found none in {lacking[0]}; "
            "export the series again, or move the file away if it belongs to another one"
        )
    if lacking:
        frames, step = _numbered(frames, normal, folder)
        origin = np.zeros(3)
    else:
        places = np.array(positions, float)
        order = np.argsort(places @ normal, kind="stable")
        frames, places = [frames[k] for k in order], places[order]
        step, origin = _step(frames, places, normal, folder), places[0]
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2], affine[:3, 3] = across * columns, down * rows, step, origin
    return list(frames), np.asarray(LPS_TO_RAS @ affine)


def _require_same(frames: Sequence[Frame], folder: Path) -> None:
    """Refuse slices of different sizes, spacings or orientations, and name the ones that differ from most."""
    for keyword, count, tolerance in (
        ("size", 0, 0.0),
        ("ImageOrientationPatient", 6, 0.01),
        ("PixelSpacing", 2, 1e-3),
    ):
        values = [frame.numbers(keyword, count) if count else frame.size_hw for frame in frames]
        groups: dict[tuple[float, ...] | None, list[Frame]] = defaultdict(list)
        for frame, value in zip(frames, values, strict=True):
            same = (key for key in groups if _alike(key, value, tolerance))
            groups[next(same, value)].append(frame)
        if len(groups) > 1:
            usual, *others = sorted(groups, key=lambda key: -len(groups[key]))
            odd = groups[others[0]]
            raise InputError(
                f"expected one {keyword} in all slices of a series, found {_shown(usual)} in {len(groups[usual])} "
                f"of them and {_shown(others[0])} in {len(odd)}, the first of which is {odd[0]}; it may be a "
                f"localizer or another scan: move it out of {folder}"
            )


def _alike(one: tuple[float, ...] | None, other: tuple[float, ...] | None, tolerance: float) -> bool:
    if one is None or other is None:
        return one is other
    return all(abs(a - b) <= tolerance for a, b in zip(one, other, strict=True))


def _shown(value: tuple[float, ...] | None) -> str:
    return "none" if value is None else " x ".join(f"{number:g}" for number in value)


def _in_plane_mm(frame: Frame, *, is_single: bool) -> tuple[float, float]:
    """Distance of rows and of columns.

    Raises:
        InputError: the file does not say it, and is not a single picture.
    """
    spacing = frame.numbers("PixelSpacing", 2)
    if spacing is None:
        spacing = _projected_mm(frame)
    if spacing is None and is_single and frame.file.text("Modality") not in ("CT", "MR", "PT"):
        warnings.warn(f"no PixelSpacing in {frame}; 1 mm is taken, so that measures in mm are wrong", stacklevel=2)
        spacing = (1.0, 1.0)
    if spacing is None or min(spacing) <= 0:
        found = "none" if spacing is None else _shown(spacing)
        raise InputError(f"expected PixelSpacing above 0 in each slice, found {found} in {frame}; export it again")
    return spacing[0], spacing[1]


def _projected_mm(frame: Frame) -> tuple[float, ...] | None:
    """Distances in the plane of the detector or film, which X-ray pictures have; divided by the magnification."""
    for keyword in ("ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        if spacing := frame.numbers(keyword, 2):
            if frame.file.text("Modality") in ("CT", "MR", "PT"):
                raise InputError(
                    f"expected PixelSpacing in each slice, found {keyword} alone in {frame}, which is not measured in "
                    "the patient; export the series again"
                )
            (factor,) = frame.numbers("EstimatedRadiographicMagnificationFactor") or (1.0,)
            factor = factor if factor > 0 else 1.0
            warnings.warn(f"no PixelSpacing in {frame}; {keyword} is taken, of the detector's plane", stacklevel=2)
            return tuple(value / factor for value in spacing)
    return None


def _axes(frame: Frame, *, is_single: bool) -> tuple[np.ndarray, np.ndarray]:
    """Directions of increasing column and row in LPS, of length one."""
    values = frame.numbers("ImageOrientationPatient", 6)
    if values is None and is_single and frame.numbers("ImagePositionPatient", 3) is None:
        values = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # told by the warning about its position
    if values is None:
        raise InputError(f"expected ImageOrientationPatient in each slice, found none in {frame}; export it again")
    axes = np.array(values).reshape(2, 3)
    lengths = np.linalg.norm(axes, axis=1)
    if np.abs(lengths - 1).max() > 0.05 or abs(axes[0] @ axes[1]) > 0.01:
        raise InputError(
            f"expected two directions at right angles as ImageOrientationPatient, found {_shown(values)} in {frame}; "
            "export it again"
        )
    if np.abs(lengths - 1).max() > 1e-3:
        axes = axes / lengths[:, None]
    return axes[0], axes[1]


def _numbered(frames: Sequence[Frame], normal: np.ndarray, folder: Path) -> tuple[list[Frame], np.ndarray]:
    """Frames without positions by their InstanceNumber, and the step that SpacingBetweenSlices says."""
    spacing = frames[0].numbers("SpacingBetweenSlices")
    if len(frames) == 1:
        warnings.warn(f"no ImagePositionPatient in {frames[0]}; its origin is taken as 0", stacklevel=3)
        (thickness,) = spacing or frames[0].numbers("SliceThickness") or (1.0,)
        return list(frames), normal * (thickness if thickness > 0 else 1.0)
    numbers = [frame.file.text("InstanceNumber") for frame in frames]
    if spacing is None or spacing[0] <= 0 or len(set(numbers)) < len(numbers) or not all(map(str.isdecimal, numbers)):
        raise InputError(
            f"expected ImagePositionPatient in each slice, or InstanceNumber and SpacingBetweenSlices instead, found "
            f"none in {frames[0]} and {len(frames) - 1} others of {folder}; their order and distance are unknown, "
            "export the series again"
        )
    warnings.warn(
        f"no ImagePositionPatient in {frames[0]} and the others of its series: they are ordered by InstanceNumber, "
        f"{spacing[0]:g} mm apart as SpacingBetweenSlices says, with the origin at 0",
        stacklevel=3,
    )
    order = sorted(range(len(frames)), key=lambda k: int(numbers[k]))
    return [frames[k] for k in order], normal * spacing[0]


def _step(frames: Sequence[Frame], places: np.ndarray, normal: np.ndarray, folder: Path) -> np.ndarray:
    """(3,) LPS millimetres from slice to slice, which a tilted gantry does not move along their normal."""
    if len(frames) == 1:
        (thickness,) = frames[0].numbers("SpacingBetweenSlices") or frames[0].numbers("SliceThickness") or (1.0,)
        return np.asarray(normal * (thickness if thickness > 0 else 1.0))
    _refuse_doubled(frames, places @ normal, folder)
    gaps = np.linalg.norm(np.diff(places, axis=0), axis=1)
    typical = float(np.median(gaps))
    step = np.asarray((places[-1] - places[0]) / (len(places) - 1))
    away = np.linalg.norm(places - (places[0] + np.arange(len(places))[:, None] * step), axis=1)
    if np.abs(gaps - typical).max() > 0.1 * typical + 1e-3 or away.max() > 0.5 * typical:
        odd = int(np.abs(gaps - typical).argmax())
        raise InputError(
            f"expected evenly spaced DICOM slices, found gaps of {gaps.min():.3f} to {gaps.max():.3f} mm in {folder}, "
            f"the oddest between {frames[odd]} and {frames[odd + 1]}; a file is missing, doubled or of another scan, "
            "export the series again"
        )
    return step


def _refuse_doubled(frames: Sequence[Frame], heights: np.ndarray, folder: Path) -> None:
    """Refuse several images at one place, and say what they differ in."""
    starts = np.concatenate([[0], np.nonzero(np.diff(heights) > 1e-3)[0] + 1, [len(heights)]])
    counts = np.diff(starts)
    if counts.max() == 1:
        return
    where = int(counts.argmax())
    one, other = frames[starts[where]], frames[starts[where] + 1]
    if counts.min() < counts.max() or len(counts) == 1:
        raise InputError(
            f"expected evenly spaced DICOM slices, found {counts.max()} at one place in {folder}, {one} and {other} "
            "among them; move the one that is doubled or of another scan away"
        )
    kinds = [(name, sorted({frame.file.text(name) for frame in frames})) for name in _PHASES]
    apart = next((f", which differ in {name} ({', '.join(v)})" for name, v in kinds if len(v) == counts.max()), "")
    raise InputError(
        f"expected evenly spaced DICOM slices, found {counts.max()} at each of {len(counts)} places in {folder}{apart}"
        f", as {one} and {other}: phases, echoes or copies of one scan; put the files of one of them into a folder of "
        "its own"
    )
