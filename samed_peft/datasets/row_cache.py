"""Verify the cache of prepared rows, and discard a damaged one so that it is prepared again."""

import contextlib
import shutil
import warnings
from pathlib import Path

from datasets import Dataset, DatasetInfo
from datasets.arrow_reader import ArrowReader
from filelock import FileLock

from samed_peft.errors import InputError, printable, reason_of
from samed_peft.io import fast_checksums, read_json, write_json

_RECORD_FILE, _INFO_FILE = "checksums.json", "dataset_info.json"
_PREFIX = "builder"
"""Datasets names files after the module of the builder; `Dataset.map` keeps its results beside them as cache-*."""


def record_checksums(folder: Path) -> None:
    """Write checksums of prepared rows beside them: of the Arrow files and of Datasets' record of them."""
    write_json(folder / _RECORD_FILE, fast_checksums(_files(folder)))


def _files(folder: Path) -> list[Path]:
    return [*sorted(folder.glob(f"{_PREFIX}-*.arrow")), folder / _INFO_FILE]


def discard_if_damaged(folder: Path, *, split: str) -> None:
    """Remove prepared rows that are damaged, incomplete or unreadable, with a warning that says why.

    Rows that were prepared before checksums were recorded are read once, and get theirs. Several processes may call
    this at the same time.

    Args:
        folder: of Datasets' cache; it may be missing.
        split: of which it holds rows.

    Raises:
        OSError: the folder may not be written.
    """
    if not folder.exists():
        return
    with FileLock(f"{folder}_builder.lock"):  # under which Datasets prepares
        if folder.exists() and (problem := _problem(folder, split)):
            warnings.warn(printable(f"prepared scans in {folder} are prepared again: {problem}"), stacklevel=2)
            # First, since rows without it do not count as prepared: this process may be killed meanwhile.
            (folder / _INFO_FILE).unlink(missing_ok=True)
            shutil.rmtree(folder)


def _problem(folder: Path, split: str) -> str | None:
    if not (folder / _INFO_FILE).is_file():
        return f"they are incomplete, {_INFO_FILE} is missing"
    if not (folder / _RECORD_FILE).exists():
        return _adopted(folder, split)
    try:
        expected, found = read_json(folder / _RECORD_FILE), fast_checksums(_files(folder))
    except InputError as error:
        return str(error)
    if expected == found:
        return None
    if not isinstance(expected, dict):
        return f"{_RECORD_FILE} is damaged"
    changed = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    return f"{changed[0]} is missing" if changed[0] not in found else f"{changed[0]} differs from its checksum"


def _adopted(folder: Path, split: str) -> str | None:
    """Why rows without checksums cannot be used; None if they can, and have checksums now."""
    try:
        info = DatasetInfo.from_directory(str(folder))
        stored = ArrowReader(str(folder), info).read(_PREFIX, split, info.splits.values())
        rows = Dataset(**stored)
        rows.data.validate(full=True)
        if (number := sum(1 for _ in rows)) != info.splits[split].num_examples:
            return f"they are incomplete, {number} of {info.splits[split].num_examples} rows are there"
    except Exception as error:  # Arrow, Datasets and Python's own for what a damaged file may hold
        return f"they cannot be read ({reason_of(error)})"
    with contextlib.suppress(InputError, OSError):  # a folder that may not be written can still be read
        record_checksums(folder)
    return None
