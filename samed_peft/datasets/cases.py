"""Cases read from their files: scans, references and pairs of both, whole volumes one at a time."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
from datasets import Dataset

from samed_peft.config import Windows
from samed_peft.datasets.channels import scaled_slices
from samed_peft.datasets.folder import Case, LabelledFolder
from samed_peft.datasets.label_files import read_class_files, read_coloured
from samed_peft.datasets.label_scheme import foreground, label_table, labels_of_table, require_counted
from samed_peft.errors import InputError, reason_of
from samed_peft.io import (
    INSTANCE_ADVICE,
    PICTURE_ADVICE,
    Volume,
    grids_apart_mm,
    has_whole_objects,
    is_picture,
    read_affine,
    read_channels,
    read_labels,
    read_volume,
)

_NAMING_ADVICE = "name all of them in dataset.json or with class_names, or is it the scan itself?"

CASES_AT_ONCE = 4
"""Scans that are checked at the same time, each a few hundred megabytes."""


@contextlib.contextmanager
def naming_files(*paths: Path) -> Iterator[None]:
    """Turn any error about a scan or its label map into an `InputError` that names the files."""
    try:
        yield
    except (InputError, ImportError, AssertionError, Warning):
        raise
    except Exception as error:  # libraries raise errors of many kinds for bad files
        advice = "or leave the case out"
        if not isinstance(error, MemoryError):
            advice = "look at it in a viewer, and correct it or leave the case out"
        raise InputError(
            f"{' and '.join(map(str, dict.fromkeys(paths)))} cannot be used: {reason_of(error)}; {advice}"
        ) from error


def read_scan(case: Case) -> Volume:
    """The scan of a case. nnU-Net stores one channel per file, so `channel` only applies to 4-D files."""
    if case.further:
        return read_channels([*case.scans, *case.further])
    if case.channels:
        return read_volume(case.scans[0], channel=case.channels)
    return _stacked([read_volume(path, channel=case.channel) for path in case.scans], case)


def read_reference(case: Case) -> Volume:
    """The label map of a case: stored labels, colours or a file for each class replaced by labels."""
    if case.file_labels:
        return read_class_files(case.labels, case.file_labels)
    if case.colours:
        return read_coloured(case.labels[0], case.colours)
    table = case.label_table
    labels = _stacked([read_labels(path, as_stored=table is not None) for path in case.labels], case)
    return labels if table is None else labels_of_table(labels, table)


def read_pair(case: Case, *, num_classes: int) -> tuple[Volume, Volume]:
    """Scan and labels 0..K of a case, on one grid; files of single slices are stacked."""
    scan, labels = read_scan(case), read_reference(case)
    shape = scan.array.shape[:3]
    if shape != labels.array.shape:
        raise InputError(
            f"expected a label map of the scan's shape {shape} ({scan.path}), found "
            f"{labels.array.shape} in {labels.path}; resample it to the scan by nearest neighbour"
        )
    if apart_mm := grids_apart_mm(labels, scan):
        raise InputError(
            f"expected {labels.path} on the grid of {scan.path}, found affines whose corners lie {apart_mm:.3g} mm "
            "apart; resample the label map to the scan, or copy the scan's header if the voxels do match"
        )
    _require_labels(labels, num_classes, advice=PICTURE_ADVICE if is_picture(case.labels[0]) else _NAMING_ADVICE)
    return scan, labels


def _stacked(parts: Sequence[Volume], case: Case) -> Volume:
    first = parts[0]
    if len(parts) == 1:  # no copy
        return first
    for part in parts:
        if part.array.shape != first.array.shape:
            raise InputError(
                f"expected slices of one size in {case.name}, found {first.array.shape[1:]} in {first.path} and "
                f"{part.array.shape[1:]} in {part.path}; preprocess the case again"
            )
    return replace(first, array=np.concatenate([part.array for part in parts]))


def _require_labels(labels: Volume, highest: int, *, advice: str) -> None:
    """Refuse labels outside 0..highest but that to ignore, with up to eight of them and what to do."""
    array = labels.array
    if array.min() < 0 or np.any((array > highest) & (array != (labels.ignored_label or 0))):
        found = sorted({int(value) for value in np.unique(array)} - {*range(highest + 1), labels.ignored_label})
        if has_whole_objects(array):
            advice = INSTANCE_ADVICE
        raise InputError(
            f"labels of {labels.path} hold {', '.join(map(str, found[:8]))}, but only 0..{highest} are "
            f"expected there; {advice}"
        )


def check_cases(folder: LabelledFolder, cases: Sequence[str], *, num_classes: int, window: Windows) -> None:
    """Read cases that will be scored after a training, so that a bad file stops the run before and not after it.

    Args:
        folder: from `open_folder`.
        cases: which of its cases.
        num_classes: K, background left out.
        window: see `scaled_slices`.

    Raises:
        InputError: a file is damaged, slices have different sizes, the grids of a pair differ, a label has no name, all
            voxels are to be ignored, or a scan cannot be scaled.
    """

    def check(case: Case) -> None:
        with naming_files(case.scans[0], case.labels[0]):
            scan, labels = read_pair(case, num_classes=num_classes)
            require_counted(labels)
            scaled_slices(scan, window, channels=case.channels)

    files = [folder.case(case) for case in cases]
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, CASES_AT_ONCE)) as pool:
        list(pool.map(check, files))


def empty_cases(folder: LabelledFolder, cases: Sequence[str]) -> tuple[str, ...]:
    """Those of some cases that have no labelled voxel; label maps alone are read.

    Raises:
        InputError: a label map is damaged.
    """

    def is_empty(case: Case) -> bool:
        with naming_files(case.labels[0]):
            labels = read_reference(case)
            return not foreground(labels.array, labels.ignored_label).any()

    files = [folder.case(case, as_slices=True) for case in cases]
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, CASES_AT_ONCE)) as pool:
        return tuple(itertools.compress(cases, pool.map(is_empty, files)))


class CaseVolumes(Mapping[str, Volume]):
    """case -> `Volume`, read whenever it is asked for, so that one at a time is in memory.

    Args:
        readers: case -> function that reads its volume.
    """

    def __init__(self, readers: Mapping[str, Callable[[], Volume]]) -> None:
        self._readers = readers

    @classmethod
    def of_folder(cls, folder: LabelledFolder, cases: Sequence[str]) -> tuple[Self, Self]:
        """Scans and references of some cases of a folder.

        Raises:
            InputError: see `LabelledFolder.case`.
        """
        files = [folder.case(case) for case in cases]
        scans, references = (
            cls({case.name: partial(read, case) for case in files}) for read in (read_scan, _reference_on_scan)
        )
        return scans, references

    @classmethod
    def of_rows(cls, rows: Dataset, column: str) -> Self:
        """The "image" (in [0, 1]) or "label" of each row of a split of whole volumes, from `load_synapse`."""
        plain = rows.with_format(None)
        needed = plain.select_columns([column, "affine", "path"])  # the other array is not decoded

        def read(index: int) -> Volume:
            row = needed[index]
            return Volume(row[column], row["affine"], Path(row["path"]), normalized=column == "image")

        return cls({case: partial(read, index) for index, case in enumerate(plain["case"])})

    @classmethod
    def pairs(cls, rows: Dataset) -> tuple[Self, Self]:
        """Scans and references of a split of whole volumes."""
        return cls.of_rows(rows, "image"), cls.of_rows(rows, "label")

    @classmethod
    def of_scans(cls, files: Mapping[str, Path], *, channel: int | None = None) -> Self:
        """Scans from files; `channel` of those that are 4-D."""
        return cls({case: partial(read_volume, path, channel=channel) for case, path in files.items()})

    @classmethod
    def of_masks(cls, files: Mapping[str, Path], *, label_values: Sequence[int] | None = None) -> Self:
        """Label maps from files, with labels 1..K in place of `label_values`, see `io.stored_mask`."""
        table = None if label_values is None else label_table(label_values)
        return cls({case: partial(_read_mask, path, table) for case, path in files.items()})

    def __getitem__(self, case: str) -> Volume:
        return self._readers[case]()

    def __contains__(self, case: object) -> bool:
        return case in self._readers  # a mapping's own would read the file

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def _read_mask(path: Path, table: Sequence[int] | None) -> Volume:
    return read_labels(path) if table is None else labels_of_table(read_labels(path, as_stored=True), table)


def _reference_on_scan(case: Case) -> Volume:
    """The label map with the scan's affine, as masks are written; its own may differ by rounding."""
    labels, affine = read_reference(case), read_affine(case.scans[0])
    return labels if affine is None else replace(labels, affine=affine)
