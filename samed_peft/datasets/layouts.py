"""Layouts of labelled scans, one record each, and `open_folder`, which finds the one that a folder has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from samed_peft.datasets.dataset_json import DATASET_FILE, open_described
from samed_peft.datasets.folder import LabelledFolder
from samed_peft.datasets.mask_folders import open_images_and_masks, open_totalsegmentator
from samed_peft.datasets.synapse_files import open_preprocessed, open_raw
from samed_peft.errors import InputError
from samed_peft.io import list_folder


@dataclass(frozen=True)
class Layout:
    """One way to store labelled scans.

    If a file in the folder describes it, it counts whatever else lies there, and `open` also takes the channel and
    class names given by users. If it may have a file for each class, `open` also takes class names, which choose some.
    """

    name: str  # recorded in `LabelledFolder.layout`
    title: str  # the name of its files in messages
    holds: str  # the files and folders that users have to provide
    open: Callable[..., LabelledFolder | None]  # None for a folder of another layout
    described: bool = False
    has_class_files: bool = False


_DESCRIBED = "dataset.json with imagesTr and labelsTr (Decathlon, nnU-Net)"
_MASKS = "images and masks (pictures or volumes)"
_SUBJECTS = "a folder for each subject with ct.nii.gz or mri.nii.gz and segmentations/CLASS.nii.gz (TotalSegmentator)"
_RAW = "raw BTCV (Training/img/imgNNNN.nii.gz and Training/label/labelNNNN.nii.gz)"
_PROCESSED = "SAMed's preprocessed folders (train_npz/caseNNNN_sliceNNN.npz, test_vol_h5/caseNNNN.npy.h5)"

LAYOUTS = (
    Layout("dataset_json", DATASET_FILE, _DESCRIBED, open_described, described=True),
    Layout("pictures", "images and masks", _MASKS, open_images_and_masks, has_class_files=True),
    Layout("totalsegmentator", "TotalSegmentator's", _SUBJECTS, open_totalsegmentator, has_class_files=True),
    Layout("raw", "raw BTCV", _RAW, open_raw),
    Layout("processed", "preprocessed files", _PROCESSED, open_preprocessed),
)
"""A new layout is one function and one line here."""


def open_folder(
    data_dir: str | Path,
    *,
    channel: str | Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    layouts: Sequence[str] | None = None,
    take_all: bool = False,
) -> LabelledFolder:
    """Find the cases of a folder in any of the `LAYOUTS`.

    Args:
        data_dir: the folder.
        channel: name or number of the channel to use if `dataset.json` lists several, or those of two or three, which
            fill the encoder's channels in their order.
        class_names: names of labels 1..K if the folder names none, or only regions; of a folder with a file for each
            class, those to use, in the order of labels.
        layouts: names of the layouts to consider; by default all.
        take_all: without `channel`, take all channels of a `dataset.json` that lists two or three.

    Raises:
        InputError: the folder is missing or has no such layout or two, a file is missing or doubled, or a channel is
            not listed.
    """
    root = Path(data_dir).expanduser().resolve()
    names = [path.name for path in list_folder(root)]
    wanted = [channel] if isinstance(channel, str) else list(channel or ())
    considered = [layout for layout in LAYOUTS if layouts is None or layout.name in layouts]
    fitting: list[tuple[Layout, LabelledFolder]] = []
    for layout in considered:
        if layout.described:
            folder = layout.open(root, wanted, class_names, take_all=take_all)
        else:
            folder = layout.open(root, class_names) if layout.has_class_files else layout.open(root)
        if folder is not None:
            fitting.append((layout, folder))
            if layout.described:
                break
    if len(fitting) > 1:
        found = " and ".join(layout.title for layout, _ in fitting)
        raise InputError(f"found both {found} in {root}; give each its own folder")
    if not fitting:
        raise InputError(
            f"expected {' or '.join(layout.holds for layout in considered)} in {root}, "
            f"found {', '.join(names[:8]) or 'nothing'}; point data_dir at the folder that holds one of them"
        )
    ((layout, folder),) = fitting
    if wanted and not layout.described:
        raise InputError(
            f"expected no channel for the {layout.title} in {root}, which have none by name; found {' '.join(wanted)}; "
            "leave it out"
        )
    return replace(folder, layout=layout.name, class_names=folder.class_names or tuple(class_names or ()))
