"""Where labelled scans of one's own lie: folders with a dataset.json, or folders of pictures; nothing is decoded here.

`dataset.json` comes in two dialects: that of the Medical Segmentation Decathlon (arXiv 2106.05735), which nnU-Net's
first version shares, and that of nnU-Net's second version (doi 10.1038/s41592-020-01008-z).
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samed_peft.errors import InputError
from samed_peft.io import list_folder, read_json, suffix_of

DATASET_FILE = "dataset.json"
DECATHLON = "Medical Segmentation Decathlon"

_ADVICE = "give the dataset.json of the Decathlon or of nnU-Net"

_CHANNEL_NAME = re.compile(r"(.+)_(\d{4})")
_PICTURE_FOLDERS = ("images", "masks")


@dataclass(frozen=True)
class LabelledFolder:
    """Cases of a folder, and what their labels mean.

    Attributes:
        root: the folder.
        class_names: names of labels 1..K; empty where nothing names them.
        modality: what the chosen channel shows, "CT" or "MRI" for example, lower or upper case as in the file; None
            where nothing says.
        images: case -> scan.
        labels: case -> label map.
        channel: number of the chosen channel where scans have several.
        name: what `dataset.json` calls the data, with "Medical Segmentation Decathlon" before it in a folder named as
            that's tasks are; None where nothing says.
    """

    root: Path
    class_names: tuple[str, ...]
    modality: str | None
    images: Mapping[str, Path]
    labels: Mapping[str, Path]
    channel: int | None = None
    name: str | None = None


def open_folder(
    data_dir: str | Path, *, channel: str | None = None, class_names: Sequence[str] | None = None
) -> LabelledFolder:
    """Find the cases of a Decathlon, nnU-Net or picture folder.

    Pictures lie in `images/` and `masks/` under equal names; there need be no `dataset.json`.

    Args:
        data_dir: the folder.
        channel: name or number of the channel to use, where `dataset.json` lists several.
        class_names: names of labels 1..K for a `dataset.json` whose own cannot be used, regions for example, or none.

    Raises:
        InputError: the folder has no such layout, a file is missing or doubled, or the channel is not listed.
    """
    root = Path(data_dir).expanduser().resolve()
    names = [path.name for path in list_folder(root)]
    if _is_file(root / DATASET_FILE):
        return _open_listed(root, channel, class_names)
    if all((root / name).is_dir() for name in _PICTURE_FOLDERS):
        if channel is not None:
            raise InputError(
                f"expected no channel for the pictures in {root}, which have none by name; found {channel}"
            )
        images, masks = (_by_case(root / name) for name in _PICTURE_FOLDERS)
        return LabelledFolder(root, tuple(class_names or ()), None, images, _partners(images, masks, root), None)
    found = ", ".join(names[:8]) or "nothing"
    raise InputError(
        f"expected {DATASET_FILE} with imagesTr and labelsTr (Decathlon, nnU-Net), or images and masks (pictures) in "
        f"{root}, found {found}; point at the folder that holds them"
    )


def _open_listed(root: Path, channel: str | None, class_names: Sequence[str] | None) -> LabelledFolder:
    path = root / DATASET_FILE
    content = _mapping(read_json(path), path)
    names = _listed_names(content, path, class_names)
    channels = _channels(content, path)
    number = _channel_number(channels, channel, path)
    if _one_file_a_channel(content, root):
        images = _nnunet_images(root, number, channel_names=channels)
        labels = _by_case(root / "labelsTr")
    else:
        images, labels = _listed_files(content["training"], root)
    # Of a single channel nothing is noted, so that a 4-D scan given to the adapter later is not taken silently.
    chosen = number if len(channels) > 1 else None
    partners = _partners(images, labels, root)
    return LabelledFolder(root, names, channels[number], images, partners, chosen, _name(content, root))


def _name(content: Mapping[str, Any], root: Path) -> str | None:
    name = content.get("name")
    if not isinstance(name, str) or not name.strip():
        return None
    is_task = re.fullmatch(r"Task\d\d_\w+", root.name) is not None
    return f"{DECATHLON}, {name.strip()}" if is_task else name.strip()


def _one_file_a_channel(content: Mapping[str, Any], root: Path) -> bool:
    """Whether files are named as nnU-Net's; its first version lists them as the Decathlon does, but without _0000."""
    training = content.get("training")
    if "channel_names" in content or not isinstance(training, list) or not training:
        return True
    first = training[0]
    if not isinstance(first, dict) or "image" not in first:
        return False
    listed = root / str(first["image"])
    suffix = suffix_of(listed) or ""
    return not _is_file(listed) and _is_file(listed.with_name(f"{listed.name.removesuffix(suffix)}_0000{suffix}"))


def _mapping(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"expected an object with labels in {path}, found {type(value).__name__}; {_ADVICE}")
    return value


def _listed_names(content: Mapping[str, Any], path: Path, given: Sequence[str] | None) -> tuple[str, ...]:
    """The listed names, or those given if the listed ones are of a kind that cannot be used, such as regions."""
    try:
        return class_names_of(content, path)
    except InputError:
        if given is None:
            raise
        return tuple(given)


def class_names_of(content: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Names of labels 1..K in the content of a `dataset.json`, background left out.

    Raises:
        InputError: there are no labels, they have gaps, or they are regions of several labels.
    """
    labels = content.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise InputError(f'expected "labels" with numbers and names in {path}, found {labels!r}; {_ADVICE}')
    by_number: dict[int, str] = {}
    for key, value in labels.items():
        number, name = (value, key) if isinstance(value, int) else (key, value)
        if not str(number).isdecimal() or not isinstance(name, str) or int(number) in by_number:
            raise InputError(
                f"expected one number for each name in the labels of {path}, found {key!r}: {value!r}; "
                "regions of several labels are not supported, name the labels with class_names"
            )
        by_number[int(number)] = name
    names = [by_number[number] for number in sorted(by_number)]
    if sorted(by_number) != list(range(len(by_number))) or "ignore" in names or len(set(names)) != len(names):
        raise InputError(
            f"expected labels 0..K without gaps, different names, and none to be ignored, in {path}, found {labels}; "
            "renumber the masks, or name the labels with class_names"
        )
    if len(names) < 2:
        raise InputError(f"expected labels beside background in {path}, found {labels}; or name them with class_names")
    return tuple(names[1:])


def names_of_dataset(path: Path) -> tuple[str, ...]:
    """Class names of a `dataset.json` of the Medical Segmentation Decathlon or of nnU-Net, background left out.

    Args:
        path: the file; its `labels` are `{"0": "background", "1": "liver"}` or `{"background": 0, "liver": 1}`.

    Raises:
        InputError: the file has no such labels, or they are not 0..K.
    """
    if path.is_dir() or path.suffix.lower() != ".json":
        raise InputError(f"expected the dataset.json of the Decathlon or of nnU-Net, found {path}; give that file")
    return class_names_of(_mapping(read_json(path), path), path)


def _channels(content: Mapping[str, Any], path: Path) -> list[str]:
    """Names of channels 0, 1 and so on."""
    listed = content.get("channel_names", content.get("modality", {"0": ""}))
    if not isinstance(listed, dict) or sorted(listed) != sorted(str(number) for number in range(len(listed))):
        raise InputError(f'expected channels "0", "1" and so on with their names in {path}, found {listed!r}')
    return [str(listed[str(number)]) for number in range(len(listed))]


def _channel_number(channels: list[str], wanted: str | None, path: Path) -> int:
    if wanted is None and len(channels) == 1:
        return 0
    if wanted is not None:
        matching = [n for n, name in enumerate(channels) if wanted.lower() in (name.lower(), str(n))]
        if len(matching) == 1:
            return matching[0]
    listed = ", ".join(f"{number} ({name})" for number, name in enumerate(channels))
    found = "none chosen" if wanted is None else f"{wanted!r}"
    raise InputError(f"expected one of the channels {listed} of {path}, found {found}; choose one by name or number")


def _by_case(folder: Path) -> dict[str, Path]:
    """Case -> its one file in a folder; a case is the name without suffix."""
    found: dict[str, Path] = {}
    for path in list_folder(folder):
        suffix = suffix_of(path)
        if suffix is None or path.name.startswith("."):
            continue
        case = _case_of(path)
        if case in found:
            raise InputError(f"expected one file a case, found {found[case]} and {path}; remove one of them")
        found[case] = path
    if not found:
        raise InputError(f"expected scans or pictures in {folder}, found none; check the folder")
    return found


def _case_of(path: Path) -> str:
    """The name without suffix.

    Raises:
        InputError: it is not UTF-8, which reports and prepared slices are.
    """
    if (readable := path.name.encode("utf-8", errors="replace").decode()) != path.name:
        raise InputError(f"expected file names in UTF-8, found {readable} in {path.parent}; rename it")
    return path.name[: -len(suffix_of(path) or "")]


def _nnunet_images(root: Path, number: int, *, channel_names: list[str]) -> dict[str, Path]:
    """Scans of one channel, each channel being a file of its own."""
    files = _by_case(root / "imagesTr")
    matches = {name: _CHANNEL_NAME.fullmatch(name) for name in files}
    if not all(matches.values()):
        plain = next(name for name, match in matches.items() if not match)
        if len(channel_names) == 1:
            return files
        raise InputError(
            f"expected a file for each channel in {root / 'imagesTr'}, named CASE_0000 and so on, found {plain}"
        )
    images = {match[1]: files[name] for name, match in matches.items() if match and int(match[2]) == number}
    lacking = sorted({match[1] for match in matches.values() if match} - images.keys())
    if lacking:
        raise InputError(
            f"expected a file ending in _{number:04d} ({channel_names[number]}) of every case in "
            f"{root / 'imagesTr'}, found none of {', '.join(lacking[:5])}; add it or leave the case out"
        )
    return images


def _listed_files(training: list[Any], root: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Scans and label maps that Decathlon's `training` lists."""
    images: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    case_of_scan: dict[Path, str] = {}
    for entry in training:
        if not isinstance(entry, dict) or not {"image", "label"} <= entry.keys():
            raise InputError(f'expected "image" and "label" of each training case in {root / DATASET_FILE}: {entry!r}')
        image, label = (_listed_file(root, str(entry[kind])) for kind in ("image", "label"))
        case = _case_of(label)
        if case in images:
            if label == labels[case]:
                raise InputError(f"{root / DATASET_FILE} lists {case} twice; mend the list")
            raise InputError(
                f"expected different names, since cases are named after their label maps, found {labels[case]} and "
                f"{label} in {root / DATASET_FILE}; rename them"
            )
        # As one scan, a link to it included, it could be trained on and held out.
        other = case_of_scan.setdefault(image.resolve(), case)
        if other != case:
            raise InputError(f"{root / DATASET_FILE} lists {image} with {other} and with {case}; mend the list")
        images[case], labels[case] = image, label
    if not images:
        raise InputError(f"expected training cases in {root / DATASET_FILE}, found none; is it a test set?")
    return images, labels


def _listed_file(root: Path, listed: str) -> Path:
    """A file that `dataset.json` names; by its name it lies below `root`, though it may be a link."""
    path = Path(os.path.normpath(root / listed))
    if not path.is_relative_to(root):
        raise InputError(f"expected files below {root} in its {DATASET_FILE}, found {path}")
    if suffix_of(path) is None or not _is_file(path):
        raise InputError(f"{root / DATASET_FILE} lists {path}, which is missing or no scan; mend the list")
    return path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no file can have such a name, or none may be looked for there
        return False


def _partners(images: Mapping[str, Path], labels: Mapping[str, Path], root: Path) -> dict[str, Path]:
    alone = sorted(images.keys() ^ labels.keys())
    if alone:
        kind = "label map" if alone[0] in images else "scan"
        raise InputError(
            f"expected a scan and a label map of every case in {root}, found no {kind} of {', '.join(alone[:5])} "
            f"({len(alone)} in all); add it, or take the other file away"
        )
    return {case: labels[case] for case in images}
