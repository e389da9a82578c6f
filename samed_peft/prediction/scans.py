"""List the scans to segment and plan the files of their masks."""

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from samed_peft.errors import InputError
from samed_peft.io import (
    DICOM_FILE,
    DICOM_SEG_SUFFIX,
    DICOM_SERIES,
    MASK_SUFFIXES,
    SUFFIXES,
    FileFormat,
    dicom_files,
    dicom_series,
    folders_below,
    format_of,
    holds_dicom,
    list_folder,
    looks_like_dicom,
    naming_unreadable,
    suffix_of,
)
from samed_peft.prediction.channels import files_of_channel, files_of_channels

_NOT_READ = (
    *(".mhd", ".hdr", ".img", ".nhdr", ".mgz", ".mgh", ".mnc", ".mif", ".nia", ".npy", ".h5", ".hdf5"),
    *(".bmp", ".gif", ".webp", ".jp2", ".heic", ".svs", ".ndpi"),
)
"""Endings of scans and pictures in formats that are not read."""


@dataclass(frozen=True)
class Scan:
    """A scan to be segmented.

    Attributes:
        case: its name.
        source: file or DICOM folder.
        mask: file to write its mask to.
        channel: which volume of a 4-D file, counted from 0, or which ones.
        series: which of several series in a DICOM folder.
        further: files of all channels but the first, if each of several is a file of its own.
    """

    case: str
    source: Path
    mask: Path
    channel: int | tuple[int, ...] | None = None
    series: str | None = None
    further: tuple[Path, ...] = ()

    @property
    def overlay(self) -> Path:
        """File to write a picture of the mask over the scan to."""
        return self.mask.parent / "overlays" / f"{self.case}.png"

    @property
    def probabilities(self) -> Path:
        """File to write the probabilities of all classes to."""
        return self.mask.parent / "probabilities" / f"{self.case}.nii.gz"


def list_scans(source: Path, *, series: str | None = None) -> list[Path]:
    """List the scans at a place: a file, a DICOM folder, or all scan files and DICOM folders directly in a folder.

    Args:
        source: the place.
        series: list the DICOM folders that hold this series, and nothing else.

    Raises:
        InputError: the place does not exist or holds no scan; it is a DICOM folder that cannot be read as one scan.
    """
    with naming_unreadable(source):
        if not source.exists():
            raise InputError(f"expected a scan or a folder of scans at {source}, found nothing; check the path")
        is_file = source.is_file()
    if is_file:
        _known_format(source)
        if series is not None:
            raise InputError(f"expected a DICOM folder to choose a series from, found the file {source}; leave it out")
        return [source]
    if holds_dicom(source):
        dicom_files(source, series)  # refused now and not after a large base was loaded
        return [source]
    items = [item for item in list_folder(source) if not item.name.startswith(".")]
    scans = [item for item in items if (holds_dicom(item) if item.is_dir() else suffix_of(item) is not None)]
    if series is not None:
        scans = [item for item in scans if item.is_dir() and series in dicom_series(item)]
    if not scans:
        raise InputError(_none_found(source, series))
    return scans


def warn_of_storage_order(sources: Sequence[Path], orientation: str | None) -> None:
    """Warn if scans have an orientation and the adapter does not record that of its training scans."""
    formats = [DICOM_SERIES if path.is_dir() else format_of(path) for path in sources]
    if orientation is None and any(kind and not kind.is_picture and not kind.is_normalized for kind in formats):
        warnings.warn(
            "the adapter does not record the orientation of its training scans, so slices follow the order in which "
            "each scan is stored; bring scans to the training scans' orientation, or record it with samed convert "
            "--orientation",
            stacklevel=3,
        )


def skipped_files(source: Path, scans: Sequence[Path], outputs: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """What lies beside the scans of a folder, but for hidden files and the masks.

    Args:
        source: the folder, or a file, which has nothing beside it.
        scans: from `list_scans`.
        outputs: files and folders that are written.

    Returns:
        What may hold scans all the same: files of formats that are not read, folders with scans; and other files.
    """
    if not source.is_dir():
        return [], []
    is_series = list(scans) == [source]
    maybe: list[Path] = []
    others: list[Path] = []
    known, own = set(scans), [Path(os.path.realpath(path)) for path in outputs]
    for item in list_folder(source):
        real = os.path.realpath(item)
        if item.name.startswith(".") or item in known or any(path.is_relative_to(real) for path in own):
            continue
        if item.is_dir():
            (maybe if _holds_scans(item) else others).append(item)
        elif is_series:  # its other files are the series' own, or its reports
            maybe += [item] if suffix_of(item) else []
        else:
            (maybe if item.name.lower().endswith(_NOT_READ) else others).append(item)
    return maybe, others


def _holds_scans(folder: Path) -> bool:
    try:
        below = list_folder(folder)
        return any(suffix_of(path) for path in below) or holds_dicom(folder) or bool(folders_below(folder))
    except InputError:  # it may not be listed
        return True


def _none_found(source: Path, series: str | None) -> str:
    """The error for a folder without scans, which may lie further down."""
    wanted = "" if series is None else f"the DICOM series {series} among "
    expected = f"expected {wanted}scans ending in {', '.join(SUFFIXES)} or folders of DICOM series in {source}"
    deeper = folders_below(source)
    if not deeper:
        return f"{expected}, found none; check the path"
    others = f" and in {len(deeper) - 1} folders more" if len(deeper) > 1 else ""
    return (
        f"{expected}, found none there but DICOM images in {deeper[0]}{others}; give such a folder or the one it is in"
    )


def _known_format(path: Path) -> FileFormat:
    file_format = DICOM_SERIES if path.is_dir() else format_of(path)
    if file_format in (None, DICOM_FILE):
        is_dicom = path.is_file() and looks_like_dicom(path)
        if is_dicom and file_format is None:
            raise InputError(f"{path} is a DICOM file whose name does not say so; give the folder of its series")
        file_format = file_format if is_dicom else None
    if file_format is None:
        raise InputError(f"expected {', '.join(SUFFIXES)} or a folder, found {path}; convert it to one of these")
    return file_format


def plan_masks(
    sources: Sequence[Path],
    output: Path,
    *,
    channel: int | Sequence[int] | None = None,
    channel_files: bool | None = None,
    dicom_seg: bool = False,
    series: str | None = None,
) -> list[Scan]:
    """Name cases and their mask files.

    If names are nnU-Net's, ending in the channel's number (`files_of_channel`), one channel's scans are taken, or all
    of those that are seen together, and the ending is left out of the case's name.

    Args:
        sources: from `list_scans`.
        output: folder of the masks, or for a single scan the name of its mask.
        channel: of 4-D files or of nnU-Net's names, or several; None stands for 0 in the latter.
        channel_files: `SamedConfig.channel_files` of the adapter.
        dicom_seg: masks of DICOM series become DICOM SEG and not NIfTI.
        series: which of several series in a DICOM folder, as given to `list_scans`; a part of the case's name, so that
            another one's mask is not taken for it.

    Raises:
        InputError: two scans have one name, a mask would replace a scan or lie among scans, an option does not fit, a
            file is of unknown format, or the only file is of another channel.
    """
    numbers = () if channel is None else (channel,) if isinstance(channel, int) else tuple(channel)
    if any(number < 0 for number in numbers):
        raise InputError(f"channel must not be negative; found {', '.join(map(str, numbers))}")
    if dicom_seg and (other := [path for path in sources if not path.is_dir()]):
        raise InputError(f"expected DICOM series for DICOM SEG, found {other[0]}; leave dicom_seg out for other scans")
    chosen_series = "" if series is None else "_" + re.sub(r"[^0-9A-Za-z.-]", "_", series)
    named = [(_case_of(path) + chosen_series, path) for path in sources]
    further: dict[str, tuple[Path, ...]] = {}
    of_file = numbers if len(numbers) > 1 else next(iter(numbers), None)
    if isinstance(of_file, tuple):
        if (of_cases := files_of_channels(named, of_file, channel_files)) is not None:
            named = [(case, paths[0]) for case, paths in of_cases]
            further = {case: paths[1:] for case, paths in of_cases if len(paths) > 1}
    elif (chosen := files_of_channel(named, of_file, channel_files)) is not None:
        named, of_file = list(chosen), None
    _require_different(named)
    file = _single_mask(named, output, dicom_seg)
    scans = []
    for case, path in named:
        suffix = DICOM_SEG_SUFFIX if dicom_seg else _known_format(path).mask_suffix
        of_case = None if case in further else of_file
        scans.append(Scan(case, path, file or output / f"{case}{suffix}", of_case, series, further.get(case, ())))
        _require_elsewhere(scans[-1], len(sources) > 1, dicom_seg)
    return scans


def _case_of(path: Path) -> str:
    # A file that ends in .nii may be a folder of DICOM slices all the same.
    suffix = None if path.is_dir() else suffix_of(path) or (path.suffix if format_of(path) else None)
    name = path.name if path.name not in ("", "..") else path.resolve().name
    return name[: len(name) - len(suffix)] if suffix else name


def _require_different(named: Sequence[tuple[str, Path]]) -> None:
    first: dict[str, Path] = {}
    for case, path in named:
        if case in first:
            raise InputError(
                f"expected one scan named {case}, found {first[case].name} and {path.name} in {path.parent}; "
                "rename one or put it into another folder"
            )
        first[case] = path


def _single_mask(named: Sequence[tuple[str, Path]], output: Path, dicom_seg: bool) -> Path | None:
    """Return `output` if it is the name of a mask, None if it is a folder."""
    allowed = (DICOM_SEG_SUFFIX,) if dicom_seg else MASK_SUFFIXES
    suffix = suffix_of(output) or (DICOM_SEG_SUFFIX if output.suffix.lower() == DICOM_SEG_SUFFIX else None)
    if output.is_dir() or (suffix is None and not output.exists()):
        return None
    if suffix not in allowed:
        raise InputError(f"expected a folder or a mask name ending in {', '.join(allowed)}, found {output}; choose one")
    if len(named) > 1:
        raise InputError(
            f"expected a folder for the masks of {len(named)} scans, found the name {output}; give a folder"
        )
    return output


def _require_elsewhere(scan: Scan, is_one_of_many: bool, dicom_seg: bool) -> None:
    """Refuse masks that would replace scans, or be taken for scans the next time."""
    files = {"mask": scan.mask, "overlay": scan.overlay, "probability file": scan.probabilities}
    for kind, file in files.items():
        if file.resolve() in [path.resolve() for path in (scan.source, *scan.further)]:
            raise InputError(f"the {kind} of {scan.source} would replace the scan; choose another output")
    folder, scans = scan.mask.parent.resolve(), scan.source.parent.resolve()
    if is_one_of_many and (folder == scans or (dicom_seg and folder.parent == scans)):
        raise InputError(
            f"expected an output folder outside of that of the scans, found {folder} in {scans}; choose another one"
        )
    if dicom_seg and folder == scan.source.resolve():
        raise InputError(f"expected the DICOM SEG of {scan.source} outside of that folder, found {scan.mask}; move it")
