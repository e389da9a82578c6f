"""The data sets of zero_flags.py, written from the hippocampi of the Decathlon and one CT of a raw BTCV folder."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import zoom

from samed_peft.config import SYNAPSE_CLASSES
from samed_peft.datasets import LabelledFolder, open_folder, write_phantom
from samed_peft.datasets.cases import read_reference, read_scan
from samed_peft.errors import InputError
from samed_peft.io import Volume, atomic_dir, read_json, write_json, write_mask, write_text, write_volume

PHANTOM_CASES, SLICES, PICTURES, FIVE = 40, 20, 59, 5
CT_CASE = "case0001"
ENLARGEMENT = 6
"""Pixels of a picture for each voxel of a hippocampus, which has 24 to 59 of 1 mm a side."""

# Folders in their order: the hippocampi, and the CTs.
Write = Callable[[Path, Path, Path], None]


@dataclass(frozen=True)
class DataSet:
    """One data set.

    Attributes:
        about: what it holds, for tables.
        write: writes it to a new folder, from the hippocampi and the CTs; None: the hippocampi as they are.
        folds_by_seed: whether each seed holds out another fold, since one fold has a single case.
    """

    about: str
    write: Write | None
    folds_by_seed: bool = False


def _phantom(folder: Path, _: Path, __: Path) -> None:
    write_phantom(folder, cases=range(PHANTOM_CASES), seed=0)


def _slices(folder: Path, _: Path, ct: Path) -> None:
    """Slices of one CT, each a NIfTI case on its own place of the scan's grid, with the organs that it shows."""
    case = open_folder(ct, layouts=["raw"]).case(CT_CASE)
    scan, labels = read_scan(case), read_reference(case).array
    if len(scan.array) < SLICES:
        raise InputError(
            f"expected a CT of {SLICES} slices at least in {scan.path}, found {len(scan.array)}; give another --ct"
        )
    if scan.affine is None:
        raise InputError(f"expected a CT with an affine, found none in {scan.path}; give another --ct")
    present = np.unique(labels[:SLICES])
    present = present[present > 0]
    names = [SYNAPSE_CLASSES[label - 1] for label in present]
    table = np.zeros(len(SYNAPSE_CLASSES) + 1, np.uint8)
    table[present] = np.arange(1, len(present) + 1)
    with atomic_dir(folder) as new:
        for number in range(SLICES):
            affine = scan.affine.copy()
            affine[:3, 3] += number * affine[:3, 2]
            one = Volume(scan.array[number : number + 1], affine)
            name = f"slice{number:02d}.nii.gz"
            write_volume(one, new / "images" / name)
            write_mask(table[labels[number : number + 1]], one, new / "masks" / name)
        write_text(new / "labels.txt", "\n".join(names) + "\n")


def _pictures(folder: Path, hippocampus: Path, _: Path) -> None:
    """A grey picture of each of some patients, sagittal and coronal in turns, where the hippocampus is largest."""
    source = open_folder(hippocampus)
    with atomic_dir(folder) as new:
        for kind in ("images", "masks"):
            (new / kind).mkdir()
        for number, case in enumerate(_first(source, PICTURES)):
            scan, labels = read_scan(source.case(case)).array, read_reference(source.case(case)).array
            picture, mask = picture_of(scan, labels, sagittal=number % 2 == 0)
            Image.fromarray(picture).save(new / "images" / f"{case}.png")
            Image.fromarray(mask).save(new / "masks" / f"{case}.png")


def picture_of(scan: np.ndarray, labels: np.ndarray, *, sagittal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Cut the slice with the most labelled voxels and enlarge it.

    Args:
        scan: (D, H, W) intensities; D grows to the head.
        labels: (D, H, W), 0 is background.
        sagittal: cut across W, or else coronal, across H.

    Returns:
        picture (h, w) uint8, the scan's percentiles 0.5 and 99.5 at 0 and 255, head at the top; mask (h, w) uint8,
        255 within any label.
    """
    axis = 2 if sagittal else 1
    others = tuple({0, 1, 2} - {axis})
    place = int((labels > 0).sum(axis=others).argmax())
    low, high = np.percentile(scan, (0.5, 99.5))
    image = np.take(scan, place, axis)[::-1].astype(np.float64)
    image = zoom((image - low) / max(high - low, 1e-9), ENLARGEMENT, order=1, mode="nearest", grid_mode=True)
    mask = np.take(labels, place, axis)[::-1] > 0
    mask = mask.repeat(ENLARGEMENT, axis=0).repeat(ENLARGEMENT, axis=1)
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8), mask.astype(np.uint8) * 255


def _five(folder: Path, hippocampus: Path, _: Path) -> None:
    """A few hippocampi in the Decathlon's layout, files and names of labels unchanged."""
    source = open_folder(hippocampus, layouts=["dataset_json"])
    described = read_json(hippocampus / "dataset.json")
    pairs = []
    with atomic_dir(folder) as new:
        for case in _first(source, FIVE):
            pair = {"image": source.images[case], "label": source.labels[case]}
            for kind, target in (("image", "imagesTr"), ("label", "labelsTr")):
                (new / target).mkdir(exist_ok=True)
                shutil.copyfile(pair[kind], new / target / pair[kind].name)
            pairs.append({"image": f"./imagesTr/{pair['image'].name}", "label": f"./labelsTr/{pair['label'].name}"})
        write_json(new / "dataset.json", described | {"training": pairs, "numTraining": FIVE, "test": [], "numTest": 0})


def _first(source: LabelledFolder, number: int) -> list[str]:
    cases = sorted(source.cases)[:number]
    if len(cases) < number:
        raise InputError(
            f"expected {number} cases at least in {source.root}, found {len(cases)}; give the whole Task04_Hippocampus "
            "with --hippocampus"
        )
    return cases


DATA_SETS: Mapping[str, DataSet] = {
    "hippocampus": DataSet("MR of 1 mm, two parts of the hippocampus", None),
    "phantom": DataSet(f"{PHANTOM_CASES} synthetic CTs of 96 x 96 x 24 voxels, eight organs", _phantom),
    "slices": DataSet(f"{SLICES} slices of one CT, each a case of its own", _slices),
    "pictures": DataSet(f"{PICTURES} grey pictures of hippocampi, a few hundred pixels a side", _pictures),
    "five": DataSet(f"{FIVE} of the hippocampi", _five, folds_by_seed=True),
}
"""Data set by name."""


def write_absent(name: str, folder: Path, *, hippocampus: Path, ct: Path) -> None:
    """Write a data set to a folder unless that exists.

    Args:
        name: one of `DATA_SETS`.
        folder: from `folder_of`.
        hippocampus: Task04_Hippocampus of the Decathlon.
        ct: raw BTCV folder.

    Raises:
        InputError: a source is missing or has too few cases or slices.
    """
    write = DATA_SETS[name].write
    if write is not None and not folder.is_dir():
        write(folder, hippocampus, ct)


def folder_of(name: str, *, data: Path, hippocampus: Path) -> Path:
    """The folder of a data set: below `data`, or the hippocampi themselves."""
    return hippocampus if DATA_SETS[name].write is None else data / name
