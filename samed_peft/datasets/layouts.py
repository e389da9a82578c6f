"""Layouts of labelled scans, one record each, and `open_folder`, which finds the one that a folder has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from samed_peft.datasets.dataset_json import is_decathlon, is_nnunet, open_decathlon, open_nnunet
from samed_peft.datasets.folder import LabelledFolder, files_by_case, is_folder, require_pairs
from samed_peft.datasets.synapse_files import holds_preprocessed, holds_raw, open_preprocessed, open_raw
from samed_peft.errors import InputError
from samed_peft.io import list_folder


@dataclass(frozen=True)
class Layout:
    """One way to store labelled scans.

    Attributes:
        name: recorded in `LabelledFolder.layout`.
        title: what messages call its files.
        holds: what users have to put into the folder.
        recognised: whether a folder has this layout.
        open: folder -> `LabelledFolder`; takes `channel` and `class_names` as well if `described`.
        described: the folder has a file that describes it, which decides whatever else lies beside it.
    """

    name: str
    title: str
    holds: str
    recognised: Callable[[Path], bool]
    open: Callable[..., LabelledFolder]
    described: bool = False


def _holds_pictures(root: Path) -> bool:
    return is_folder(root / "images") and is_folder(root / "masks")


def _open_pictures(root: Path) -> LabelledFolder:
    images, masks = (files_by_case(root / name) for name in ("images", "masks"))
    return LabelledFolder(root, (), None, images, require_pairs(images, masks, root))


LAYOUTS = (
    Layout("nnunet", "nnU-Net", "dataset.json with imagesTr and labelsTr (nnU-Net)", is_nnunet, open_nnunet, True),
    Layout(
        "decathlon",
        "Decathlon",
        "dataset.json that lists scans and label maps (Decathlon)",
        is_decathlon,
        open_decathlon,
        True,
    ),
    Layout("pictures", "pictures", "images and masks (pictures)", _holds_pictures, _open_pictures),
    Layout(
        "raw",
        "raw BTCV",
        "raw BTCV (Training/img/imgNNNN.nii.gz and Training/label/labelNNNN.nii.gz)",
        holds_raw,
        open_raw,
    ),
    Layout(
        "processed",
        "preprocessed files",
        "SAMed's preprocessed folders (train_npz/caseNNNN_sliceNNN.npz, test_vol_h5/caseNNNN.npy.h5)",
        holds_preprocessed,
        open_preprocessed,
    ),
)


def open_folder(
    data_dir: str | Path,
    *,
    channel: str | None = None,
    class_names: Sequence[str] | None = None,
    layouts: Sequence[str] | None = None,
) -> LabelledFolder:
    """Find the cases of a folder in any of the `LAYOUTS`.

    Args:
        data_dir: the folder.
        channel: name or number of the channel to use if `dataset.json` lists several.
        class_names: names of labels 1..K if the folder names none, or only regions.
        layouts: names of the layouts to consider; by default all.

    Raises:
        InputError: the folder is missing or has no such layout or two, a file is missing or doubled, or the channel is
            not listed.
    """
    root = Path(data_dir).expanduser().resolve()
    names = [path.name for path in list_folder(root)]
    considered = [layout for layout in LAYOUTS if layouts is None or layout.name in layouts]
    fitting = [layout for layout in considered if layout.recognised(root)]
    fitting = [layout for layout in fitting if layout.described] or fitting
    if len(fitting) > 1:
        found = " and ".join(layout.title for layout in fitting)
        raise InputError(f"found both {found} in {root}; give each its own folder")
    if not fitting:
        raise InputError(
            f"expected {' or '.join(layout.holds for layout in considered)} in {root}, "
            f"found {', '.join(names[:8]) or 'nothing'}; point at the folder that holds one of them"
        )
    (layout,) = fitting
    if layout.described:
        folder = layout.open(root, channel=channel, class_names=class_names)
    elif channel is None:
        folder = layout.open(root)
    else:
        raise InputError(
            f"expected no channel for the {layout.title} in {root}, which have none by name; found {channel}; "
            "leave it out"
        )
    return replace(folder, layout=layout.name, class_names=folder.class_names or tuple(class_names or ()))
