"""Layouts of Synapse multi-organ CT (BTCV): raw, and as SAMed and TransUNet preprocess it. Nothing is decoded here."""

import os
import re
from collections.abc import Container
from pathlib import Path

from samed_peft.config import SYNAPSE_CLASSES
from samed_peft.datasets.folder import LabelledFolder, add_file
from samed_peft.io import list_folder

TEST_CASES = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
"""The twelve test cases of SAMed and TransUNet."""

TRAIN_CASES = (5, 6, 7, 9, 10, 21, 23, 24, 26, 27, 28, 30, 31, 33, 34, 37, 39, 40)
"""The eighteen training cases of SAMed and TransUNet."""

SPLITS = {"train": TRAIN_CASES, "test": TEST_CASES}

BTCV_TO_SYNAPSE = {1: 1, 2: 2, 3: 3, 4: 4, 6: 5, 7: 6, 8: 7, 11: 8}
"""Raw BTCV label to label of `SYNAPSE_CLASSES`; the other five organs become background."""

_RAW_LABELS = 13
_RAW_NAME = re.compile(r"(img|label)(\d{4})\.nii(\.gz)?")
_SLICE_NAME = re.compile(r"case(\d{4})_slice(\d+)\.npz")
_VOLUME_NAME = re.compile(r"case(\d{4})\.npy\.h5")


def name_of(number: int) -> str:
    """Name of a numbered case, such as "case0005"."""
    return f"case{number:04d}"


def open_raw(root: Path) -> LabelledFolder | None:
    """Raw BTCV: `img/imgNNNN.nii.gz` and `label/labelNNNN.nii.gz` in the folder, its `Training` or `RawData/Training`.

    A case may lack one of its files until it is used.
    """
    places = (root / "Training", root, root / "RawData" / "Training")
    folder = next((place for place in places if all(os.path.isdir(place / kind) for kind in ("img", "label"))), None)
    if folder is None:
        return None
    found: dict[str, dict[str, Path]] = {"img": {}, "label": {}}
    for kind, files in found.items():
        for path in list_folder(folder / kind):
            match = _RAW_NAME.fullmatch(path.name)
            if match is not None and match[1] == kind:
                add_file(files, match[2], path)
    numbers = sorted({*found["img"], *found["label"]})
    images, labels = (
        {name_of(int(n)): files.get(n, folder / kind / f"{kind}{n}.nii.gz") for n in numbers}
        for kind, files in found.items()
    )
    table = tuple(BTCV_TO_SYNAPSE.get(label, 0) for label in range(_RAW_LABELS + 1))
    return LabelledFolder(
        folder, SYNAPSE_CLASSES, "CT", images, labels, label_table=table, splits=_suggested_splits(images)
    )


def open_preprocessed(root: Path) -> LabelledFolder | None:
    """SAMed's `train_npz/caseNNNN_sliceNNN.npz` and `test_vol_h5/caseNNNN.npy.h5`; a case may be in either or both."""
    files = {name: list_folder(root / name) for name in ("train_npz", "test_vol_h5") if os.path.isdir(root / name)}
    if not files:
        return None
    volumes: dict[str, Path] = {}
    slices: dict[str, dict[int, Path]] = {}
    for path in files.get("test_vol_h5", []):
        if match := _VOLUME_NAME.fullmatch(path.name):
            volumes[name_of(int(match[1]))] = path
    for path in files.get("train_npz", []):
        if match := _SLICE_NAME.fullmatch(path.name):
            slices.setdefault(name_of(int(match[1])), {})[int(match[2])] = path
    table = tuple(range(len(SYNAPSE_CLASSES) + 1))
    splits = _suggested_splits({*volumes, *slices})
    return LabelledFolder(
        root, SYNAPSE_CLASSES, "CT", volumes, volumes, slices=slices, label_table=table, splits=splits
    )


def _suggested_splits(present: Container[str]) -> dict[str, tuple[str, ...]]:
    """SAMed's cases of each split, as far as they exist."""
    return {split: tuple(n for n in map(name_of, numbers) if n in present) for split, numbers in SPLITS.items()}
