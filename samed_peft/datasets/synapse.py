"""Synapse multi-organ CT (BTCV) as Hugging Face Datasets, raw or as SAMed and TransUNet preprocess it.

Raw BTCV goes through the steps of SAMed's `preprocess_data.py` (arXiv 2304.13785): window, scale to [0, 1],
axes to (D, W, H), thirteen labels to eight. The values equal those of its preprocessed files to the last bit.
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from samed_peft.config import CT_WINDOW_HU
from samed_peft.datasets.builder import prepared_rows
from samed_peft.datasets.cases import check_cases
from samed_peft.datasets.folder import LabelledFolder
from samed_peft.datasets.layouts import open_folder
from samed_peft.datasets.splits import Splits
from samed_peft.datasets.synapse_files import SPLITS, name_of
from samed_peft.errors import InputError


def open_synapse(data_dir: str | Path) -> LabelledFolder:
    """Find the cases of raw BTCV or of SAMed's preprocessed folders.

    Raises:
        InputError: the folder is missing, or has neither layout or both.
    """
    return open_folder(data_dir, layouts=("raw", "processed"))


def load_synapse(
    data_dir: str | Path,
    split: str,
    *,
    cases: Sequence[int | str] | None = None,
    window: tuple[float, float] | None = CT_WINDOW_HU,
    cache_dir: str | Path | None = None,
    num_proc: int | None = None,
    held_out: Sequence[str] = (),
    verify: bool = True,
) -> Dataset:
    """Labelled abdominal CT as a dataset of slices or of volumes.

    The folder is either raw BTCV (`Training/img/imgNNNN.nii.gz`, `Training/label/labelNNNN.nii.gz`; any case
    in any split) or preprocessed (`train_npz/caseNNNN_sliceNNN.npz`, `test_vol_h5/caseNNNN.npy.h5`; each
    split takes a case from the other folder if its own lacks it). It is prepared once; files that are edited,
    added or removed later are noticed. A killed preparation starts anew, and rows in the cache that are damaged are
    prepared again, with a warning.

    Args:
        data_dir: the folder; of raw BTCV also its `Training`.
        split: "train" for slices or "test" for volumes.
        cases: cases of the split, such as 5 or "case0005"; by default those of SAMed's split that exist.
        window: Hounsfield units scaled to [0, 1], or None for each scan's own percentiles; preprocessed files
            are scaled already.
        cache_dir: folder for prepared rows; by default the cache of Datasets.
        num_proc: processes that prepare; by default one a case, up to the number of cores.
        held_out: names of cases to read first, see `check_cases`.
        verify: see `load_slices`.

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
    folder = open_synapse(data_dir)
    names = _select_cases(folder, split, cases)
    check_cases(folder, held_out, num_classes=len(folder.class_names), window=window)
    return prepared_rows(
        folder,
        names,
        name=folder.data_name(f"{folder.layout}-{split}", names, as_slices=split == "train"),
        split=split,
        window=window,
        cache_dir=cache_dir,
        num_proc=num_proc,
        verify=verify,
        num_classes=len(folder.class_names),
    )


def synapse_cases(
    data_dir: str | Path,
    *,
    train: Sequence[int | str] | None = None,
    test: Sequence[int | str] | None = None,
    validation: Sequence[int | str] = (),
) -> tuple[LabelledFolder, Splits]:
    """Open a folder with Synapse's cases and split them.

    Args:
        data_dir: raw BTCV or SAMed's preprocessed folders.
        train: cases to train on, such as 5 or "case0005", in place of SAMed's; those to validate on are left out.
        test: cases to test on, in place of SAMed's.
        validation: cases to validate on.

    Raises:
        InputError: the folder or a case is missing, no case is left, or two splits share one.
    """
    cases = Splits(
        train=split_cases(data_dir, "train", train, without=validation),
        test=split_cases(data_dir, "test", test),
        validation=split_cases(data_dir, "test", validation) if validation else [],
    )
    require_disjoint(**cases._asdict())
    return open_synapse(data_dir), cases


def list_cases(data_dir: str | Path) -> list[str]:
    """Names of all cases in a data folder, such as "case0005", in order.

    Raises:
        InputError: the folder is missing or has neither layout.
    """
    return sorted(open_synapse(data_dir).cases)


def split_cases(
    data_dir: str | Path,
    split: str,
    cases: Sequence[int | str] | None = None,
    *,
    without: Sequence[int | str] = (),
) -> list[str]:
    """Names of the cases of a split, less some that are held out.

    Args:
        data_dir: the folder.
        split: "train" or "test".
        cases: in place of SAMed's split.
        without: cases to leave out.

    Raises:
        InputError: the folder or a case is missing, or no case is left.
    """
    held_out = {_case_number(case) for case in without}
    left = [n for n in _select_cases(open_synapse(data_dir), split, cases) if _case_number(n) not in held_out]
    if not left:
        raise InputError(f"no case of split {split!r} is left when {sorted(held_out)} are held out; choose others")
    return left


def require_disjoint(**splits: Sequence[int | str]) -> None:
    """Refuse splits that share a case, whose scores would say nothing.

    Raises:
        InputError: naming the two splits and the cases.
    """
    for (one, first), (two, second) in itertools.combinations(splits.items(), 2):
        shared = sorted({_case_number(case) for case in first} & {_case_number(case) for case in second})
        if shared:
            raise InputError(f"cases {shared} are in both the {one} and the {two} split; leave them out of one")


def _case_number(case: int | str) -> int:
    match = re.fullmatch(r"(?:case)?(\d{1,4})", str(case))
    if match is None:
        raise InputError(f'expected cases such as 5, "0005" or "case0005", found {case!r}')
    return int(match[1])


def _select_cases(folder: LabelledFolder, split: str, cases: Sequence[int | str] | None) -> list[str]:
    """Names of the cases of a split: `cases`, each of which must exist, or those of SAMed's split that exist."""
    present = sorted(map(_case_number, folder.cases))
    wanted = list(SPLITS[split]) if cases is None else [_case_number(case) for case in cases]
    numbers = [number for number in wanted if cases is not None or number in present]
    missing = sorted(set(numbers) - set(present))
    doubled = sorted({number for number in numbers if numbers.count(number) > 1})
    if missing or doubled:
        raise InputError(
            f"expected different cases that exist in {folder.root}, found missing {missing} "
            f"and doubled {doubled}; it holds {present}"
        )
    if not numbers:
        raise InputError(
            f"split {split!r} is empty: expected some of the cases {wanted} in {folder.root}, "
            f"found {present}; choose others with cases=[...]"
        )
    return [name_of(number) for number in numbers]
