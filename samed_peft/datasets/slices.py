"""Scans of one's own as rows of slices: Decathlon and nnU-Net folders, and folders of pictures."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from samed_peft.config import CT_WINDOW_HU
from samed_peft.datasets.builder import RowsBuilder, prepared
from samed_peft.datasets.layouts import DATASET_FILE, LabelledFolder
from samed_peft.datasets.preprocessing import normalized_array, reorientation, reoriented
from samed_peft.datasets.rows import SLICE_FEATURES, slice_row
from samed_peft.errors import InputError
from samed_peft.io import (
    PICTURE_ADVICE,
    Volume,
    content_fingerprint,
    grids_apart_mm,
    is_picture,
    numbered_names,
    read_affine,
    read_labels,
    read_volume,
)


def require_one_grid(scan: Volume, labels: Volume) -> None:
    """Refuse a label map of another shape or place than its scan.

    Raises:
        InputError: naming both files.
    """
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


def require_labels(
    label: np.ndarray, highest: int, path: Path, *, advice: str = "is it from another dataset, or the scan itself?"
) -> None:
    """Refuse labels outside 0..highest.

    Args:
        label: (D, H, W).
        highest: K.
        path: its file.
        advice: ends the message.

    Raises:
        InputError: naming up to eight of them.
    """
    if label.min() < 0 or label.max() > highest:
        found = sorted({int(value) for value in np.unique(label)} - set(range(highest + 1)))
        raise InputError(
            f"labels of {path} hold {', '.join(map(str, found[:8]))}, but only 0..{highest} are "
            f"expected there; {advice}"
        )


ORIENTATIONS = {"axial": "LPS", "coronal": "LIP", "sagittal": "PIL"}
"""Axis codes of the (x, y, z) axes that slices of each plane are brought to: as they hang on a light box."""

_AXES = {"axial": 2, "coronal": 1, "sagittal": 0}
"""World axis (right-left, posterior-anterior, inferior-superior) that each plane is perpendicular to."""

COLOUR_RANGE = (0.0, 255.0)
"""Window of 8-bit pictures."""


def choose_orientation(folder: LabelledFolder, *, plane: str | None = None) -> str | None:
    """Axis codes that all slices of a folder are brought to.

    Args:
        folder: its headers alone are read.
        plane: "axial", "coronal", "sagittal", or None for the plane across the coarsest axis, by the median of the
            scans' spacings; axial where all are alike.

    Returns:
        "LPS", "LIP" or "PIL"; None where no scan says how it lies, as pictures do not: those are sliced as stored.

    Raises:
        InputError: some scans say how they lie and others do not, or a header is damaged.
    """
    affines = {case: read_affine(path) for case, path in folder.images.items()}
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
        spacings = np.array([_world_spacing_mm(affine) for affine in affines.values() if affine is not None])
        typical = np.median(spacings, axis=0)
        # A tenth more than the others: otherwise the scans count as isotropic.
        coarsest = int(np.argmax(typical)) if typical.max() > 1.1 * np.median(typical) else _AXES["axial"]
        plane = next(name for name, axis in _AXES.items() if axis == coarsest)
    return ORIENTATIONS[plane]


def _world_spacing_mm(affine: np.ndarray) -> np.ndarray:
    """Voxel size along right-left, posterior-anterior and inferior-superior, each by the voxel axis nearest to it."""
    from nibabel.orientations import io_orientation

    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    spacing = np.ones(3)
    for voxel_axis, world_axis in enumerate(io_orientation(affine)[:, 0]):
        if np.isfinite(world_axis):
            spacing[int(world_axis)] = sizes[voxel_axis]
    return spacing


def choose_window(folder: LabelledFolder) -> tuple[float, float] | None:
    """The window of a folder's modality: SAMed's for CT, 0..255 for 8-bit pictures, each scan's percentiles else."""
    if folder.modality is not None and folder.modality.lower() in ("ct", "computed tomography"):
        return CT_WINDOW_HU
    first = next(iter(folder.images.values()))
    if is_picture(first):
        # Decided by all of them: one 16-bit picture among 8-bit ones would be cut off.
        largest = max(float(read_volume(path).array.max()) for path in folder.images.values())
        return COLOUR_RANGE if 1 < largest <= 255 else None
    return None


def read_pair(image: Path, label: Path, *, channel: int | None, num_classes: int) -> tuple[Volume, Volume]:
    """A scan and its label map.

    Args:
        image: the scan.
        label: the label map.
        channel: of a 4-D scan.
        num_classes: K; labels are 0..K.

    Raises:
        InputError: a file is damaged, the grids differ, or a label has no name.
    """
    # nnU-Net's scans have a file for each channel, which is no matter of the file's content.
    scan, labels = read_volume(image, channel=channel), read_labels(label)
    require_one_grid(scan, labels)
    advice = "name all of them in dataset.json or with class_names, or is it the scan itself?"
    if is_picture(label):
        advice = PICTURE_ADVICE
    require_labels(labels.array, num_classes, label, advice=advice)
    return scan, labels


def check_cases(
    folder: LabelledFolder, cases: Sequence[str], *, num_classes: int, window: tuple[float, float] | None
) -> None:
    """Read cases that are to be segmented and scored after a training, which one bad file would leave without a report.

    Args:
        folder: from `open_folder`.
        cases: which of its cases.
        num_classes: K, background left out.
        window: see `normalized_array`.

    Raises:
        InputError: as `read_pair`, or a scan cannot be scaled.
    """
    for case in cases:
        scan, _ = read_pair(folder.images[case], folder.labels[case], channel=folder.channel, num_classes=num_classes)
        normalized_array(scan, window)


def case_rows(
    pair: tuple[Volume, Volume],
    *,
    case: str,
    window: tuple[float, float] | None,
    orientation: str | None,
    empty_share: float,
) -> Iterator[dict[str, Any]]:
    """Rows of one case's slices.

    Args:
        pair: scan and label map.
        case: its name.
        window: see `normalized_array`.
        orientation: axis codes the slices are brought to; slices lie across the last of them.
        empty_share: share of the slices without foreground to keep, evenly spread.
    """
    scan, labels = pair
    there, _ = reorientation(scan, orientation)
    image = reoriented(normalized_array(scan, window), there)
    label = reoriented(labels.array.astype(np.uint8, copy=False), there)
    empty = np.flatnonzero(~label.any(axis=(1, 2)))
    kept = empty[np.linspace(0, len(empty) - 1, round(empty_share * len(empty))).round().astype(int)]
    dropped = set(empty.tolist()) - set(kept.tolist())
    for index in range(len(label)):
        if index not in dropped:
            yield slice_row(image[index], label[index], case=case, index=index, orientation=orientation)


@dataclass
class ScansConfig(datasets.BuilderConfig):
    """What prepared rows depend on; Datasets names the cache folder after a hash of these.

    Attributes:
        files: JSON of case -> [scan, label map].
        channel: of 4-D scans, or None.
        num_classes: K.
        orientation: axis codes, or None for as stored.
        window_low: intensity that becomes 0, or None for percentiles of each scan.
        window_high: intensity that becomes 1, or None.
        empty_share: share of slices without foreground that is kept.
        fingerprint: SHA-256 over the files, so that an edited one is prepared anew.
    """

    files: str = "{}"
    channel: int | None = None
    num_classes: int = 1
    orientation: str | None = None
    window_low: float | None = None
    window_high: float | None = None
    empty_share: float = 1.0
    fingerprint: str = ""


class ScansBuilder(RowsBuilder):
    """Prepares training slices; made by `load_slices`."""

    # Part of the cache's name: raised when equal files come to give other rows.
    VERSION = datasets.Version("1.1.0")
    BUILDER_CONFIG_CLASS = ScansConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(description="Slices of labelled scans", features=SLICE_FEATURES)

    def _split_generators(self, dl_manager: object) -> list[datasets.SplitGenerator]:
        del dl_manager  # the files lie on disk
        cases = [(case, *files) for case, files in json.loads(self.config.files).items()]
        return [datasets.SplitGenerator(name="train", gen_kwargs={"cases": cases})]

    def _generate_examples(self, cases: list[tuple[str, str, str]]) -> Iterator[tuple[str, dict[str, Any]]]:
        config = self.config
        window = None if config.window_low is None else (config.window_low, config.window_high)
        for case, image, label in cases:
            pair = read_pair(Path(image), Path(label), channel=config.channel, num_classes=config.num_classes)
            options = {"window": window, "orientation": config.orientation, "empty_share": config.empty_share}
            for row in case_rows(pair, case=case, **options):
                yield f"{case}_{row['slice']:05d}", row


def load_slices(
    folder: LabelledFolder,
    cases: Sequence[str],
    *,
    num_classes: int,
    orientation: str | None,
    window: tuple[float, float] | None,
    empty_share: float = 1.0,
) -> datasets.Dataset:
    """Training slices of some cases, prepared once; files that are edited later are noticed.

    Args:
        folder: from `open_folder`.
        cases: which of its cases.
        num_classes: K, background left out.
        orientation: from `choose_orientation`.
        window: intensities scaled to [0, 1], or None for each scan's 0.5 and 99.5 percentiles.
        empty_share: share of the slices without foreground to keep, 0 to 1.

    Returns:
        rows of `image` (H, W) float32 in [0, 1], or (H, W, 3) in colour, `label` (H, W) uint8, `case`, `slice` and
        `orientation`.

    Raises:
        InputError: a file is damaged, a pair does not fit, a label has no name, or no slice is left.
    """
    if not 0 <= empty_share <= 1:
        raise InputError(f"expected a share of empty slices from 0 to 1, found {empty_share}")
    files = {case: [str(folder.images[case]), str(folder.labels[case])] for case in cases}
    fingerprint = content_fingerprint(path for pair in files.values() for path in pair)
    low, high = (None, None) if window is None else (float(window[0]), float(window[1]))
    builder = ScansBuilder(
        config_name=f"slices-{fingerprint[:16]}-empty-{float(empty_share)}",
        files=json.dumps(files),
        channel=folder.channel,
        num_classes=num_classes,
        orientation=orientation,
        window_low=low,
        window_high=high,
        empty_share=float(empty_share),
        fingerprint=fingerprint,
        writer_batch_size=16,
    )
    return prepared(builder, "train", num_cases=len(cases))


def class_names_for(folder: LabelledFolder, given: Sequence[str] | None) -> tuple[str, ...]:
    """Names of labels 1..K: those given, those of the folder, or numbers up to the largest label.

    Raises:
        InputError: more or fewer names are given than the folder has, no label map has a label, or pictures have
            others than numbers.
    """
    number = len(folder.class_names)
    if given is not None and number and len(given) != number:
        raise InputError(
            f"expected {number} class name{'s' * (number != 1)}, as many as {DATASET_FILE} has "
            f"({', '.join(folder.class_names)}), found {len(given)}: {', '.join(given)}; leave class_names out, or "
            "rename them all"
        )
    if given is not None:
        return tuple(given)
    if folder.class_names:
        return folder.class_names
    return numbered_names(map(read_labels, folder.labels.values()), folder=next(iter(folder.labels.values())).parent)
