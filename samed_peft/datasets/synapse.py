"""Synapse multi-organ CT (BTCV) as Hugging Face Datasets, raw or as SAMed and TransUNet preprocess it.

Raw BTCV goes through the steps of SAMed's `preprocess_data.py` (arXiv 2304.13785): window, scale to [0, 1],
axes to (D, W, H), thirteen labels to eight. The values equal those of its preprocessed files to the last bit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from samed_peft.config import CT_WINDOW_HU
from samed_peft.datasets.builder import RowsBuilder, prepared
from samed_peft.datasets.preprocessing import normalized_array
from samed_peft.datasets.rows import SLICE_FEATURES, VOLUME_FEATURES, pack_array, slice_row
from samed_peft.datasets.slices import require_labels, require_one_grid
from samed_peft.datasets.synapse_files import Case, case_files, list_cases, scan_folder, select_cases
from samed_peft.errors import InputError
from samed_peft.io import Volume, content_fingerprint, read_labels, read_volume

__all__ = ["BTCV_TO_SYNAPSE", "list_cases", "load_synapse"]

BTCV_TO_SYNAPSE = {1: 1, 2: 2, 3: 3, 4: 4, 6: 5, 7: 6, 8: 7, 11: 8}
"""Raw BTCV label to label of `SYNAPSE_CLASSES`; the other five organs become background."""

_RAW_LABELS, _SYNAPSE_LABELS = 13, 8


def _read_pair(image_path: Path, label_path: Path, *, window: tuple[float, float] | None) -> tuple[Volume, np.ndarray]:
    """Normalised scan and labels 0..8, both (D, H, W); raw or preprocessed."""
    scan, reference = read_volume(image_path), read_labels(label_path)
    require_one_grid(scan, reference)
    if scan.normalized:
        require_labels(reference.array, _SYNAPSE_LABELS, label_path)
        return scan, reference.array.astype(np.uint8, copy=False)
    require_labels(reference.array, _RAW_LABELS, label_path)
    table = np.zeros(_RAW_LABELS + 1, np.uint8)
    table[list(BTCV_TO_SYNAPSE)] = list(BTCV_TO_SYNAPSE.values())
    image = normalized_array(scan, window)
    return Volume(image, scan.affine, scan.path, True), table[reference.array]


def _read_case(case: Case, *, window: tuple[float, float] | None) -> tuple[Volume, np.ndarray]:
    """Whole scan and labels of a case; slices are stacked."""
    if not case.slices:
        return _read_pair(case.images[0], (case.labels or case.images)[0], window=window)
    pairs = [_read_pair(path, path, window=window) for path in case.images]
    for path, (image, _) in zip(case.images, pairs, strict=True):
        if image.array.shape != pairs[0][0].array.shape:
            raise InputError(
                f"expected slices of one size in {case.name}, found {pairs[0][0].array.shape[1:]} in "
                f"{case.images[0]} and {image.array.shape[1:]} in {path}; preprocess the case again"
            )
    stack = np.concatenate([image.array for image, _ in pairs])
    return Volume(stack, None, case.images[0], True), np.concatenate([label for _, label in pairs])


def _slice_rows(case: Case, *, window: tuple[float, float] | None) -> Iterator[dict[str, Any]]:
    if case.slices:
        pairs = (_read_pair(path, path, window=window) for path in case.images)
        arrays = ((index, scan.array[0], label[0]) for index, (scan, label) in zip(case.slices, pairs, strict=True))
        orientation = None
    else:
        scan, labels = _read_pair(case.images[0], (case.labels or case.images)[0], window=window)
        arrays = ((index, scan.array[index], labels[index]) for index in range(len(labels)))
        orientation = scan.orientation
    for index, image, label in arrays:
        yield slice_row(image, label, case=case.name, index=index, orientation=orientation)


def _volume_row(case: Case, *, window: tuple[float, float] | None) -> dict[str, Any]:
    scan, label = _read_case(case, window=window)
    return {
        "image": pack_array(scan.array),
        "label": pack_array(label),
        "case": case.name,
        "affine": None if scan.affine is None else scan.affine.ravel().tolist(),
        "path": str(scan.path),
    }


@dataclass
class SynapseConfig(datasets.BuilderConfig):
    """What prepared rows depend on; Datasets names the cache folder after a hash of these and `data_dir`.

    Attributes:
        layout: "raw" or "processed".
        split: "train" (slices) or "test" (volumes).
        case_names: names of the cases, joined by commas.
        window_low: Hounsfield units that become 0, or None for percentiles of each scan.
        window_high: Hounsfield units that become 1, or None.
        fingerprint: SHA-256 over the files of the cases, so that an edited one is prepared anew.
    """

    layout: str = "raw"
    split: str = "train"
    case_names: str = ""
    window_low: float | None = None
    window_high: float | None = None
    fingerprint: str = ""


class SynapseBuilder(RowsBuilder):
    """Prepares one split; made by `load_synapse`."""

    VERSION = datasets.Version("1.1.0")
    BUILDER_CONFIG_CLASS = SynapseConfig

    def _info(self) -> datasets.DatasetInfo:
        features = SLICE_FEATURES if self.config.split == "train" else VOLUME_FEATURES
        return datasets.DatasetInfo(description="Synapse multi-organ CT, eight organs", features=features)

    def _split_generators(self, dl_manager: object) -> list[datasets.SplitGenerator]:
        del dl_manager  # the files lie on disk
        folder = scan_folder(self.config.data_dir)
        names = self.config.case_names.split(",")
        cases = [case_files(folder, self.config.split, number) for number in select_cases(folder, "", names)]
        # A list is what Datasets deals out to its processes, in order.
        return [datasets.SplitGenerator(name=self.config.split, gen_kwargs={"cases": cases})]

    def _generate_examples(self, cases: list[Case]) -> Iterator[tuple[str, dict[str, Any]]]:
        low, high = self.config.window_low, self.config.window_high
        window = None if low is None else (low, high)
        for case in cases:
            if self.config.split == "test":
                yield case.name, _volume_row(case, window=window)
            else:
                for row in _slice_rows(case, window=window):
                    yield f"{row['case']}_{row['slice']:03d}", row


def load_synapse(
    data_dir: str | Path,
    split: str,
    *,
    cases: Sequence[int | str] | None = None,
    window: tuple[float, float] | None = CT_WINDOW_HU,
    cache_dir: str | Path | None = None,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Labelled abdominal CT as a dataset of slices or of volumes.

    The folder is either raw BTCV (`Training/img/imgNNNN.nii.gz`, `Training/label/labelNNNN.nii.gz`; any case
    in any split) or preprocessed (`train_npz/caseNNNN_sliceNNN.npz`, `test_vol_h5/caseNNNN.npy.h5`; each
    split takes a case from the other folder if its own lacks it). It is prepared once; files that are edited,
    added or removed later are noticed. A killed preparation starts anew.

    Args:
        data_dir: the folder; of raw BTCV also its `Training`.
        split: "train" for slices or "test" for volumes.
        cases: cases of the split, such as 5 or "case0005"; by default those of SAMed's split that exist.
        window: Hounsfield units scaled to [0, 1], or None for each scan's own percentiles; preprocessed files
            are scaled already.
        cache_dir: where prepared rows lie; by default where Datasets keeps them.
        num_proc: processes that prepare; by default one a case, up to the number of cores.

    Returns:
        train: rows of `image` (H, W) float32 in [0, 1], `label` (H, W) uint8 in 0..8, `case` ("case0005") and
            `slice`, an int, and `orientation`, the scan's axis codes such as "LAS", or None.
        test: rows of `image` and `label` (D, H, W), `case`, `affine` (4, 4) float64 or None, and `path` of
            the scan.

    Raises:
        InputError: the folder is missing, has neither layout or lacks a case; the split is empty; an image
            lacks its label or the reverse; their shapes or affines disagree; labels are out of range; a file
            is damaged.
    """
    if split not in ("train", "test"):
        raise InputError(f"expected split 'train' or 'test', found {split!r}")
    if window is not None and not window[0] < window[1]:
        raise InputError(f"expected window (low, high) with low < high, or None; found {window}")
    if num_proc is not None and num_proc < 1:
        raise InputError(f"expected num_proc of at least 1, found {num_proc}")
    folder = scan_folder(data_dir)
    chosen = [case_files(folder, split, number) for number in select_cases(folder, split, cases)]
    low, high = (None, None) if window is None else (float(window[0]), float(window[1]))
    fingerprint = content_fingerprint(path for case in chosen for path in case.images + case.labels)
    builder = SynapseBuilder(
        config_name=f"{folder.layout}-{split}-{fingerprint[:16]}",
        cache_dir=None if cache_dir is None else str(cache_dir),
        data_dir=str(folder.root),
        layout=folder.layout,
        split=split,
        case_names=",".join(case.name for case in chosen),
        window_low=low,
        window_high=high,
        fingerprint=fingerprint,
        # Rows held in memory before they are written; a volume is a few hundred megabytes.
        writer_batch_size=16 if split == "train" else 1,
    )
    return prepared(builder, split, num_cases=len(chosen), num_proc=num_proc)
