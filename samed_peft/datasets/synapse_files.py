"""Which files make up the cases of a Synapse folder, raw BTCV or preprocessed; nothing is opened here."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from samed_peft.errors import InputError

TEST_CASES = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
"""The twelve test cases of SAMed and TransUNet."""

TRAIN_CASES = (5, 6, 7, 9, 10, 21, 23, 24, 26, 27, 28, 30, 31, 33, 34, 37, 39, 40)
"""The eighteen training cases of SAMed and TransUNet."""

_RAW_NAME = re.compile(r"(img|label)(\d{4})\.nii(\.gz)?")
_SLICE_NAME = re.compile(r"case(\d{4})_slice(\d+)\.npz")
_VOLUME_NAME = re.compile(r"case(\d{4})\.npy\.h5")


@dataclass(frozen=True)
class Case:
    """The files of one case.

    Attributes:
        name: "case0005".
        images: raw scan, or preprocessed volume, or its slices in order.
        labels: raw label map; empty where `images` hold the labels too.
        slices: numbers of the slices in `images`; empty for a volume.
    """

    name: str
    images: tuple[Path, ...]
    labels: tuple[Path, ...] = ()
    slices: tuple[int, ...] = ()


@dataclass(frozen=True)
class Folder:
    """What a data folder holds: case number to files."""

    root: Path
    layout: str
    scans: dict[int, Path]
    labels: dict[int, Path]
    slices: dict[int, dict[int, Path]]

    def numbers(self) -> list[int]:
        """Numbers of all cases that have any file, in order."""
        return sorted({*self.scans, *self.labels, *self.slices})


def _is_raw(folder: Path) -> bool:
    return (folder / "img").is_dir() and (folder / "label").is_dir()


def _scan_raw(root: Path) -> Folder:
    found: dict[str, dict[int, Path]] = {"img": {}, "label": {}}
    for kind, paths in found.items():
        for path in sorted((root / kind).iterdir()):
            match = _RAW_NAME.fullmatch(path.name)
            if match is None or match[1] != kind:
                continue
            other = paths.setdefault(int(match[2]), path)
            if other != path:
                raise InputError(f"expected one file a case, found {other} and {path}; remove one of them")
    return Folder(root, "raw", found["img"], found["label"], {})


def _scan_processed(root: Path) -> Folder:
    volumes: dict[int, Path] = {}
    slices: dict[int, dict[int, Path]] = {}
    if (root / "test_vol_h5").is_dir():
        for path in sorted((root / "test_vol_h5").iterdir()):
            if match := _VOLUME_NAME.fullmatch(path.name):
                volumes[int(match[1])] = path
    if (root / "train_npz").is_dir():
        for path in sorted((root / "train_npz").iterdir()):
            if match := _SLICE_NAME.fullmatch(path.name):
                slices.setdefault(int(match[1]), {})[int(match[2])] = path
    return Folder(root, "processed", volumes, {}, slices)


def scan_folder(data_dir: str | Path) -> Folder:
    """Find out which layout a folder has and list its files.

    Raises:
        InputError: the folder is missing, or has neither layout or both.
    """
    root = Path(data_dir).expanduser().resolve()
    if not root.is_dir():
        raise InputError(f"expected a data folder at {root}, found {'a file' if root.exists() else 'nothing'}")
    raw = [folder for folder in (root / "Training", root, root / "RawData" / "Training") if _is_raw(folder)]
    processed = (root / "train_npz").is_dir() or (root / "test_vol_h5").is_dir()
    if raw and processed:
        raise InputError(f"found both raw BTCV and preprocessed files in {root}; give each its own folder")
    if not raw and not processed:
        names = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        raise InputError(
            f"expected raw BTCV (Training/img/imgNNNN.nii.gz and Training/label/labelNNNN.nii.gz) or SAMed's "
            f"preprocessed folders (train_npz/caseNNNN_sliceNNN.npz, test_vol_h5/caseNNNN.npy.h5) in {root}, "
            f"found {names}; point data_dir at the folder that holds one of them"
        )
    return _scan_raw(raw[0]) if raw else _scan_processed(root)


def list_cases(data_dir: str | Path) -> list[str]:
    """Names of all cases in a data folder, such as "case0005", in order.

    Raises:
        InputError: the folder is missing or has neither layout.
    """
    return [f"case{number:04d}" for number in scan_folder(data_dir).numbers()]


def _case_number(case: int | str) -> int:
    match = re.fullmatch(r"(?:case)?(\d{1,4})", str(case))
    if match is None:
        raise InputError(f'expected cases such as 5, "0005" or "case0005", found {case!r}')
    return int(match[1])


def select_cases(folder: Folder, split: str, cases: Sequence[int | str] | None) -> list[int]:
    """Numbers of the cases of a split: `cases`, or those of SAMed's split that exist.

    Raises:
        InputError: a case is missing, doubled or misspelt, or none is left.
    """
    present = folder.numbers()
    if cases is None:
        wanted = list(TRAIN_CASES if split == "train" else TEST_CASES)
        numbers = [number for number in wanted if number in present]
    else:
        wanted = numbers = [_case_number(case) for case in cases]
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
    return numbers


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
    left = [number for number in select_cases(scan_folder(data_dir), split, cases) if number not in held_out]
    if not left:
        raise InputError(f"no case of split {split!r} is left when {sorted(held_out)} are held out; choose others")
    return [f"case{number:04d}" for number in left]


def require_disjoint(**splits: Sequence[int | str]) -> None:
    """Refuse splits that share a case, whose scores would say nothing.

    Raises:
        InputError: naming the two splits and the cases.
    """
    for (one, first), (two, second) in itertools.combinations(splits.items(), 2):
        shared = sorted({_case_number(case) for case in first} & {_case_number(case) for case in second})
        if shared:
            raise InputError(f"cases {shared} are in both the {one} and the {two} split; leave them out of one")


def case_files(folder: Folder, split: str, number: int) -> Case:
    """The files of one case, slices preferred for "train" and volumes for "test".

    Raises:
        InputError: an image lacks its label or the reverse, or slices to stack have gaps.
    """
    name = f"case{number:04d}"
    if folder.layout == "raw":
        if number not in folder.scans or number not in folder.labels:
            have, lack = ("img", "label") if number in folder.scans else ("label", "img")
            raise InputError(
                f"{folder.root / have}/{have}{number:04d}.nii.gz has no partner: expected "
                f"{folder.root / lack}/{lack}{number:04d}.nii.gz; add it, "
                "or leave the case out with cases=[...]"
            )
        return Case(name, (folder.scans[number],), (folder.labels[number],))
    slices = folder.slices.get(number, {})
    if slices and (split == "train" or number not in folder.scans):
        order = tuple(sorted(slices))
        if split == "test" and len(order) != order[-1] - order[0] + 1:
            gaps = sorted(set(range(order[0], order[-1])) - set(order))
            raise InputError(
                f"expected every slice of {name} in {folder.root / 'train_npz'}, but {gaps} are missing; "
                "preprocess the case again"
            )
        return Case(name, tuple(slices[index] for index in order), slices=order)
    return Case(name, (folder.scans[number],))
