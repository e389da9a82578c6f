"""How the scans of a folder should be sliced, scaled and named: chosen from its headers, modality and labels."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from samed_peft.config import CT_WINDOW_HU, Windows
from samed_peft.datasets.cases import naming_files, read_reference
from samed_peft.datasets.dataset_json import DATASET_FILE
from samed_peft.datasets.folder import LabelledFolder
from samed_peft.datasets.preprocessing import reorientation, reoriented
from samed_peft.errors import InputError
from samed_peft.io import is_picture, numbered_names, read_affine, read_labels, read_volume

T = TypeVar("T")

ORIENTATIONS = {"axial": "LPS", "coronal": "LIP", "sagittal": "PIL"}
"""Axis codes of the (x, y, z) axes that slices of each plane are brought to, as on a light box; z is across them."""

_CASES_FOR_PLANE = 16
"""Label maps that are read to choose a plane."""

CT_NAMES = ("ct", "computed tomography")
"""Names of a CT's modality, in lower case."""


def describe_folder(
    folder: LabelledFolder,
    *,
    class_names: Sequence[str] | None = None,
    plane: str | None = None,
    window: Windows | Sequence[float] = None,
) -> dict[str, Any]:
    """Choose the fields of `SamedConfig` that depend on the data: classes, regions, window, orientation and channels.

    Args:
        folder: from `open_folder`.
        class_names: see `class_names_for`.
        plane: see `choose_orientation`.
        window: (low, high), or two or three such windows, instead of the one from `choose_window`.

    Raises:
        InputError: as these functions.
    """
    return {
        "class_names": class_names_for(folder, class_names),
        "window": tuple(window) if window else choose_window(folder),
        "orientation": choose_orientation(folder, plane=plane),
        "channel": folder.channel,
        "channels": folder.channels or None,
        "channel_names": folder.channel_names or None,
        "channel_files": folder.channel_files,
        "label_values": folder.label_values,
        "regions": folder.regions,
    }


def choose_orientation(folder: LabelledFolder, *, plane: str | None = None) -> str | None:
    """Choose the axis codes that all slices of a folder are brought to.

    Args:
        folder: only its headers are read.
        plane: "axial", "coronal", "sagittal", or None for the plane across the coarsest axis, by the median of the
            scans' spacings; axial if all are alike.

    Returns:
        "LPS", "LIP" or "PIL"; None if no scan has an affine, as pictures: those are sliced as stored.

    Raises:
        InputError: some scans have an affine and others do not, or a header is damaged.
    """
    affines = {case: _read(read_affine, path) for case, path in folder.images.items()}
    silent = [case for case, affine in affines.items() if affine is None]
    if len(silent) == len(affines):
        if plane is not None:
            raise InputError(
                f"expected scans with an orientation to cut {plane} slices from, found none in {folder.root}"
            )
        return None
    if silent:
        raise InputError(
            f"expected all scans of {folder.root} with an orientation or none, found {', '.join(silent[:5])} without"
        )
    if plane is None:
        plane = _plane_across_the_coarsest([affine for affine in affines.values() if affine is not None])
    return ORIENTATIONS[plane or "axial"]


def choose_plane(folder: LabelledFolder, cases: Sequence[str]) -> str | None:
    """Choose the plane of slices from headers and labels.

    Args:
        folder: from `open_folder`; all its headers are read.
        cases: of these, the label maps of at most 16, evenly spread, are read if no axis is the coarsest.

    Returns:
        The plane across the coarsest axis. If all are alike, the one with the fewest labelled slices, which show the
        most of each object, if it saves a tenth of those of axial slices, or else axial. None if no scan has an affine.

    Raises:
        InputError: as `choose_orientation`, or a label map is damaged.
    """
    if choose_orientation(folder) is None:
        return None
    affines = [_read(read_affine, path) for path in folder.images.values()]
    if plane := _plane_across_the_coarsest([affine for affine in affines if affine is not None]):
        return plane
    labelled = np.zeros(3, np.int64)  # slices of each plane, in the order of `ORIENTATIONS`
    for case in (folder.case(name) for name in cases[:: math.ceil(len(cases) / _CASES_FOR_PLANE)]):
        with naming_files(*case.labels):
            labels, affine = read_reference(case), read_affine(case.scans[0])
            there, _ = reorientation(replace(labels, affine=affine), ORIENTATIONS["axial"])
            is_labelled = (labels.array > 0) & (labels.array != labels.ignored_label)
            mask = reoriented(is_labelled, there)
            labelled += [int(mask.any(axis=axes).sum()) for axes in ((1, 2), (0, 2), (0, 1))]
    fewest = int(np.argmin(labelled))
    return tuple(ORIENTATIONS)[fewest] if labelled[fewest] <= 0.9 * labelled[0] else "axial"


def _plane_across_the_coarsest(affines: Sequence[np.ndarray]) -> str | None:
    """By the median of the spacings; None if no axis is coarser than the others by a tenth."""
    typical = np.median([_world_spacing_mm(affine) for affine in affines], axis=0)
    if typical.max() <= 1.1 * np.median(typical):
        return None
    return next(plane for plane, codes in ORIENTATIONS.items() if codes[-1] == "LPS"[np.argmax(typical)])


def _world_spacing_mm(affine: np.ndarray) -> np.ndarray:
    """Voxel size along right-left, posterior-anterior and inferior-superior, each by the voxel axis nearest to it."""
    from nibabel.affines import voxel_sizes
    from nibabel.orientations import io_orientation

    return voxel_sizes(affine)[np.argsort(io_orientation(affine)[:, 0])]


def choose_window(folder: LabelledFolder) -> tuple[float, float] | None:
    """The window that fits a folder: SAMed's for CT, 0..255 for 8-bit pictures, None (each scan's percentiles) else."""
    if folder.modality is not None and folder.modality.lower() in CT_NAMES:
        return CT_WINDOW_HU
    if is_picture(next(iter(folder.images.values()))):
        # Decided by all of them: one 16-bit picture among 8-bit ones would be cut off.
        paths = [*folder.images.values(), *itertools.chain(*folder.further.values())]
        largest = max(float(_read(read_volume, path).array.max()) for path in paths)
        return (0.0, 255.0) if 1 < largest <= 255 else None
    return None


def class_names_for(folder: LabelledFolder, given: Sequence[str] | None) -> tuple[str, ...]:
    """Names of labels 1..K: those given, those of the folder, or numbers up to the largest label.

    Raises:
        InputError: more or fewer names are given than the folder has, no label map has a label, or labels of pictures
            are greys and not numbers.
    """
    number = len(folder.class_names)
    if given is not None and number not in (0, len(given)):
        source = DATASET_FILE if folder.layout == "dataset_json" else f"layout {folder.layout!r}"
        raise InputError(
            f"expected {number} class name{'s' * (number != 1)}, as many as {source} has "
            f"({', '.join(folder.class_names)}), found {len(given)}: {', '.join(given)}; leave class_names out, or "
            "rename them all"
        )
    if given is not None:
        return tuple(given)
    if folder.class_names:
        return folder.class_names
    label_maps = (_read(read_labels, path) for path in folder.labels.values())
    return numbered_names(label_maps, folder=next(iter(folder.labels.values())).parent)


def _read(read: Callable[[Path], T], path: Path) -> T:
    with naming_files(path):
        return read(path)
