"""What a folder of labelled scans is like, in numbers: `Fingerprint`, from which a training is planned."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from samed_peft.config.fields import AT_LEAST_1, NOT_NEGATIVE, JsonFields, described, documented
from samed_peft.datasets.cases import CASES_AT_ONCE, naming_files, read_pair
from samed_peft.datasets.choices import CT_NAMES, ORIENTATIONS, choose_orientation, choose_plane, class_names_for
from samed_peft.datasets.folder import Case, LabelledFolder
from samed_peft.datasets.preprocessing import reorientation, reoriented
from samed_peft.datasets.splits import patients_of
from samed_peft.errors import InputError
from samed_peft.io import Volume, is_picture

MODALITIES = ("CT", "MR", "picture", "unknown")
"""What `Fingerprint.modality` can be."""

INTENSITY_PERCENTILES = (0.5, 5.0, 50.0, 95.0, 99.5)
"""Percentiles of intensities that a fingerprint holds."""

_MR_NAMES = frozenset(
    ["mr", "mri", "t1", "t2", "flair", "t1w", "t2w", "t1c", "t1ce", "t1gd", "pd", "dwi", "adc", "t2*"]
)
_AIR_HU = (-3100.0, -900.0)
"""The lowest voxel of a CT: air at -1000, or what scanners write outside of their field of view, down to -3024."""

_MOST_HU = 32767.0
_SAMPLE = 100_000
"""Voxels that percentiles are taken of, evenly spread."""


@documented
@dataclass(frozen=True)
class Fingerprint(JsonFields):
    """What a folder of labelled scans is like. Slices are those across the chosen plane.

    Raises:
        InputError: a value is out of range.
    """

    data: str = described("SHA-256 over names and content of all files, its first 16 digits")
    cases: int = described("number of cases", must=AT_LEAST_1)
    patients: int = described("number of patients", must=AT_LEAST_1)
    patients_with_foreground: int = described("patients with a labelled voxel", must=NOT_NEGATIVE)
    slices: int = described("number of slices", must=AT_LEAST_1)
    empty_slices: int = described("slices without a labelled voxel", must=NOT_NEGATIVE)
    patient_slices: tuple[int, ...] = described(
        "slices of the patients with the fewest, of the median patient (rounded down), and of the one with the most",
        must=("be three numbers, the smallest first", lambda n: len(n) == 3 and 0 < n[0] <= n[1] <= n[2]),
    )
    slice_hw: tuple[int, ...] = described("median height and width of slices", must=("be two", lambda n: len(n) == 2))
    largest_hw: tuple[int, ...] = described("largest height and width", must=("be two", lambda n: len(n) == 2))
    spacing_mm: tuple[float, ...] | None = described(
        "median distance of slices, rows and columns; None if a scan has no affine",
        must=("be three", lambda n: len(n) == 3),
    )
    plane: str | None = described("axial, coronal or sagittal; None if slices are those that are stored")
    orientation: str | None = described("axis codes that slices are brought to, or None")
    orientations: dict[str, int] = described("axis codes -> scans stored so")  # noqa: RUF009
    modality: str = described(
        "CT, MR, picture or unknown", must=(f"be one of {', '.join(MODALITIES)}", MODALITIES.__contains__)
    )
    colour: bool = described("whether images have three colours")
    normalized: bool = described("whether intensities are in [0, 1] already, as in SAMed's files")
    intensity_range: tuple[float, ...] = described(
        "lowest and highest intensity", must=("be two", lambda n: len(n) == 2)
    )
    foreground: tuple[float, ...] | None = described(
        "0.5, 5, 50, 95 and 99.5 percentiles of labelled voxels in each scan, medians over scans"
    )
    body: tuple[float, ...] | None = described("the same of the voxels above Otsu's threshold: the body in CT and MR")
    class_voxels: dict[str, int] = described("voxels of each class")  # noqa: RUF009
    class_slices: dict[str, int] = described("slices with each class")  # noqa: RUF009
    class_cases: dict[str, int] = described("cases with each class")  # noqa: RUF009
    empty_cases: tuple[str, ...] = described("names of the cases without a labelled voxel", ())
    channels: tuple[int, ...] = described("numbers of the channels, if several fill the encoder's", ())
    channel_names: tuple[str, ...] = described("names of these channels", ())


@dataclass(frozen=True)
class CaseFacts:
    """What one case contributes to a fingerprint."""

    counts: np.ndarray  # (D, K + 1) voxels of each label in each slice, background first
    slice_hw: tuple[int, int]
    spacing_mm: tuple[float, float, float] | None
    orientation: str | None
    colour: bool
    normalized: bool
    intensity_range: tuple[float, float]
    foreground: tuple[float, ...] | None
    body: tuple[float, ...] | None

    @property
    def has_foreground(self) -> bool:
        """Whether any voxel is labelled."""
        return bool(self.counts[:, 1:].any())


def take_fingerprint(
    folder: LabelledFolder,
    cases: Sequence[str] | None = None,
    *,
    class_names: Sequence[str] | None = None,
    plane: str | None = None,
    patient_pattern: str | None = None,
) -> Fingerprint:
    """Read all scans and label maps of some cases once, a few at a time, and describe them.

    Args:
        folder: from `open_folder`.
        cases: names of its cases; by default all.
        class_names: see `class_names_for`.
        plane: "axial", "coronal" or "sagittal"; by default as `choose_plane` chooses.
        patient_pattern: see `choose_splits`.

    Raises:
        InputError: a file is damaged, a pair does not fit, a label has no name, or no voxel is labelled.
    """
    cases = tuple(folder.cases if cases is None else cases)
    if not cases:
        raise InputError(
            f"expected cases of {folder.root} to describe, found none; name one at least, or leave cases out"
        )
    names = class_names_for(folder, class_names)
    orientation = choose_orientation(folder, plane=plane or choose_plane(folder, cases))
    patients = patients_of(cases, patient_pattern)
    facts = examine_cases(folder, cases, num_classes=len(names), orientation=orientation)
    if not any(fact.has_foreground for fact in facts.values()):
        slices = sum(len(fact.counts) for fact in facts.values())
        raise InputError(
            f"expected labelled voxels in {folder.root}, found none in {slices} slices of {len(cases)} cases; a "
            "training needs some: check that the label maps are the right files"
        )
    return Fingerprint(
        data=folder.data_name("", cases, as_slices=True).strip("-"),
        plane=next((name for name, codes in ORIENTATIONS.items() if codes == orientation), None),
        orientation=orientation,
        empty_cases=tuple(case for case, fact in facts.items() if not fact.has_foreground),
        modality=_modality(folder, folder.case(cases[0], as_slices=True), facts),
        **_numbers_of_slices(facts, patients),
        **_geometry(list(facts.values())),
        **_intensities(list(facts.values())),
        **_classes(list(facts.values()), names),
        channels=folder.channels,
        channel_names=folder.channel_names,
    )


def examine_cases(
    folder: LabelledFolder, cases: Sequence[str], *, num_classes: int, orientation: str | None
) -> dict[str, CaseFacts]:
    """Read cases, a few at a time, and note what a fingerprint needs: case -> `CaseFacts`."""
    files = [folder.case(case, as_slices=True) for case in cases]
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, CASES_AT_ONCE)) as pool:
        found = pool.map(partial(_examine, num_classes=num_classes, orientation=orientation), files)
        return dict(zip(cases, found, strict=True))


def _examine(case: Case, *, num_classes: int, orientation: str | None) -> CaseFacts:
    with naming_files(case.scans[0], case.labels[0]):
        scan, labels = read_pair(case, num_classes=num_classes)
        transform, _ = reorientation(scan, orientation)
        label = reoriented(labels.array, transform)
        # Labels above K count nowhere.
        counts = np.stack([np.bincount(one.ravel(), minlength=num_classes + 1)[: num_classes + 1] for one in label])
        is_foreground = (labels.array > 0) & (labels.array <= num_classes)
        everywhere = _sample(scan.array)
        return CaseFacts(
            counts=counts,
            slice_hw=(label.shape[1], label.shape[2]),
            spacing_mm=_spacing_after(scan, transform),
            orientation=scan.orientation,
            colour=scan.array.ndim == 4 and not case.channels,
            normalized=scan.normalized,
            intensity_range=(float(scan.array.min()), float(scan.array.max())),
            foreground=_percentiles(_sample(scan.array[is_foreground])),
            body=_percentiles(everywhere[everywhere > _otsu(everywhere)]),
        )


def _sample(voxels: np.ndarray) -> np.ndarray:
    # An odd step, so that the sample never comes from a few columns of an even width alone.
    return voxels.reshape(-1)[:: max(1, voxels.size // _SAMPLE) | 1]


def _otsu(sample: np.ndarray) -> float:
    """Threshold that parts intensities best in two (Otsu 1979), outliers left out."""
    low, high = np.percentile(sample, (INTENSITY_PERCENTILES[0], INTENSITY_PERCENTILES[-1]))
    counts, edges = np.histogram(sample, 256, (low, high)) if low < high else (np.ones(256), np.full(257, low))
    below, middles = np.cumsum(counts), (edges[:-1] + edges[1:]) / 2
    sums, total = np.cumsum(counts * middles), below[-1]
    between = (total * sums - sums[-1] * below) ** 2 / np.maximum(below * (total - below), 1)
    return float(edges[np.argmax(between) + 1])


def _percentiles(sample: np.ndarray) -> tuple[float, ...] | None:
    return tuple(np.percentile(sample, INTENSITY_PERCENTILES).tolist()) if sample.size else None


def _spacing_after(scan: Volume, transform: np.ndarray | None) -> tuple[float, float, float] | None:
    """Distance of slices, rows and columns once a scan is `reoriented`."""
    if scan.affine is None:
        return None
    xyz = np.array(scan.spacing_zyx_mm[::-1])
    if transform is not None:
        xyz[transform[:, 0].astype(int)] = xyz.copy()
    x, y, z = xyz.tolist()
    return (z, y, x)


def _modality(folder: LabelledFolder, case: Case, facts: Mapping[str, CaseFacts]) -> str:
    """By the name that `dataset.json` gives, or by the air that most of the scans have if they are in HU."""
    if is_picture(case.scans[0]):
        return "picture"
    named = {name.lower() for name in folder.channel_names or (folder.modality or "",)}
    if named <= {*CT_NAMES}:
        return "CT"
    if named <= _MR_NAMES:
        return "MR"
    if folder.channels:  # of which one may be a CT and another one not
        return "unknown"
    with_air = [fact for fact in facts.values() if _AIR_HU[0] <= fact.intensity_range[0] <= _AIR_HU[1]]
    fitting = [fact for fact in with_air if fact.intensity_range[1] <= _MOST_HU]
    return "CT" if len(fitting) > len(facts) / 2 else "unknown"


def _numbers_of_slices(facts: Mapping[str, CaseFacts], patients: Mapping[str, str]) -> dict[str, Any]:
    of_patient: Counter[str] = Counter()
    for case, fact in facts.items():
        of_patient[patients[case]] += len(fact.counts)
    ordered = sorted(of_patient.values())
    return {
        "cases": len(facts),
        "patients": len(ordered),
        "patients_with_foreground": len({patients[case] for case, fact in facts.items() if fact.has_foreground}),
        "slices": sum(ordered),
        "empty_slices": sum(int((~fact.counts[:, 1:].any(axis=1)).sum()) for fact in facts.values()),
        "patient_slices": (ordered[0], ordered[(len(ordered) - 1) // 2], ordered[-1]),
    }


def _geometry(facts: Sequence[CaseFacts]) -> dict[str, Any]:
    sizes = np.array([fact.slice_hw for fact in facts])
    spacings = [fact.spacing_mm for fact in facts if fact.spacing_mm is not None]
    known = len(spacings) == len(facts)
    found = Counter(fact.orientation for fact in facts if fact.orientation)
    return {
        "slice_hw": tuple(np.median(sizes, axis=0).astype(int).tolist()),
        "largest_hw": tuple(sizes.max(axis=0).tolist()),
        "spacing_mm": tuple(np.median(spacings, axis=0).round(4).tolist()) if known else None,
        "orientations": dict(sorted(found.items())),
    }


def _intensities(facts: Sequence[CaseFacts]) -> dict[str, Any]:
    def typical(rows: list[tuple[float, ...]]) -> tuple[float, ...] | None:
        return tuple(float(f"{value:.6g}") for value in np.median(rows, axis=0)) if rows else None

    lowest, highest = zip(*(fact.intensity_range for fact in facts), strict=True)
    return {
        "colour": any(fact.colour for fact in facts),
        "normalized": all(fact.normalized for fact in facts),
        "intensity_range": (min(lowest), max(highest)),
        "foreground": typical([fact.foreground for fact in facts if fact.foreground]),
        "body": typical([fact.body for fact in facts if fact.body]),
    }


def _classes(facts: Sequence[CaseFacts], names: Sequence[str]) -> dict[str, Any]:
    voxels = np.sum([fact.counts.sum(axis=0) for fact in facts], axis=0)
    slices = np.sum([(fact.counts > 0).sum(axis=0) for fact in facts], axis=0)
    cases = np.sum([(fact.counts > 0).any(axis=0) for fact in facts], axis=0)
    columns = {"class_voxels": voxels, "class_slices": slices, "class_cases": cases}
    return {key: dict(zip(names, column[1:].tolist(), strict=True)) for key, column in columns.items()}
