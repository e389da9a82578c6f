"""Note the masks that are to be replaced, so that an interrupted run that goes on takes none of them for its own."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from samed_peft.errors import InputError
from samed_peft.io import file_sha256, read_json, write_json
from samed_peft.prediction.scans import Scan

OLD_MASKS_FILE = "overwriting.json"
"""File beside masks while some are to be replaced: name of the mask -> SHA-256 of the old one."""


def note_old_masks(scans: Sequence[Scan]) -> None:
    """Note the masks of some scans as old, before anything is written.

    A kill at any time leaves the note behind; a mask that has been replaced is known by its content.

    Raises:
        InputError: there is a file of another kind in the note's place.
    """
    for folder in _folders(scans):
        noted = old_masks(folder)
        found = {scan.mask.name: file_sha256(scan.mask) for scan in scans if _is_there(scan, folder)}
        _write(folder, noted, noted | found)


def old_masks(folder: Path) -> dict[str, str]:
    """Name -> fingerprint of the masks in a folder that were to be replaced; empty if none are.

    Raises:
        InputError: the note is damaged.
    """
    path = folder / OLD_MASKS_FILE
    if not path.is_file():
        return {}
    values = read_json(path)
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise InputError(
            f"expected names and fingerprints of masks to replace in {path}, found {values!r:.80}; move it elsewhere, "
            "and segment all scans again with overwrite, --overwrite on the command line"
        )
    return values


def with_old_masks(scans: Sequence[Scan]) -> list[Scan]:
    """Those of some scans whose masks are still old ones that were to be replaced."""
    noted = {folder: old_masks(folder) for folder in _folders(scans)}
    return [scan for scan in scans if _is_old(scan.mask, noted[scan.mask.parent])]


def forget_new_masks(scans: Sequence[Scan], *, written: Collection[str]) -> None:
    """Take masks that have been replaced out of the note; the last one removes it.

    Args:
        scans: all that were to be segmented.
        written: cases whose masks are new even if they equal the old ones.
    """
    for folder in _folders(scans):
        noted = old_masks(folder)
        new = {scan.mask.name for scan in scans if scan.case in written}
        left = {name: value for name, value in noted.items() if name not in new and _is_old(folder / name, noted)}
        _write(folder, noted, left)


def _is_old(mask: Path, noted: Mapping[str, str]) -> bool:
    before = noted.get(mask.name)
    return before is not None and mask.is_file() and file_sha256(mask) == before


def _is_there(scan: Scan, folder: Path) -> bool:
    return scan.mask.parent == folder and scan.mask.is_file()


def _folders(scans: Sequence[Scan]) -> list[Path]:
    return list(dict.fromkeys(scan.mask.parent for scan in scans))


def _write(folder: Path, before: dict[str, str], after: dict[str, str]) -> None:
    if after != before:
        path = folder / OLD_MASKS_FILE
        write_json(path, after) if after else path.unlink()
