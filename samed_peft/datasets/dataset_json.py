"""The layout described by a `dataset.json`; nothing is decoded here.

The file comes in two dialects: that of the Medical Segmentation Decathlon (arXiv 2106.05735), which nnU-Net's first
version shares, and that of nnU-Net's second version (doi 10.1038/s41592-020-01008-z).
"""

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samed_peft.datasets.channel_choice import choose_channels, common_name
from samed_peft.datasets.folder import LabelledFolder, add_file, case_name, files_by_case, require_pairs
from samed_peft.datasets.label_scheme import DATASET_ADVICE, LabelScheme, scheme_of, with_given_names
from samed_peft.errors import InputError, printable
from samed_peft.io import is_picture, read_json, suffix_of

DATASET_FILE = "dataset.json"
DECATHLON = "Medical Segmentation Decathlon"

_CHANNEL_NAME = re.compile(r"(.+)_(\d{4})")
_COLOURS = (("r", "g", "b"), ("red", "green", "blue"), ("rgb_to_0_1",) * 3)


def open_described(
    root: Path, channels_wanted: Sequence[str], class_names: Sequence[str] | None, *, take_all: bool
) -> LabelledFolder | None:
    """A folder with a `dataset.json` in either dialect, or None; see `layouts.open_folder`."""
    path = root / DATASET_FILE
    if not os.path.isfile(path):
        return None
    content = _content(path)
    try:
        scheme = with_given_names(scheme_of(content, path), class_names)
    except InputError:  # of labels that the user's names may stand for
        if class_names is None:
            raise
        scheme = LabelScheme(tuple(class_names))
    channels, is_nnunet = _channels(content, path), _one_file_a_channel(content, root)
    images, labels = _scans_and_labels(root) if is_nnunet else _listed_files(content["training"], root)
    if _are_colours(channels) and _are_in_one_picture(images, is_nnunet):
        if channels_wanted:
            raise InputError(
                f"expected no channel, since each picture of {root} holds all three, {', '.join(channels)}; found "
                f"{' '.join(channels_wanted)}; leave it out to train in colour"
            )
        channels = ["RGB"]
    chosen = choose_channels(channels, channels_wanted, path, take_all=take_all)
    has_suffixes = is_nnunet and _have_suffixes(images, labels, root, channel_names=channels)
    further: dict[str, tuple[Path, ...]] = {}
    if has_suffixes:
        images, *others = (_channel_files(root, images, number, channel_names=channels) for number in chosen)
        further = {case: tuple(files[case] for files in others) for case in images if others}
        labels = _without_suffix(labels, images)
    several = tuple(chosen) if len(chosen) > 1 else ()
    return LabelledFolder(
        root,
        scheme.class_names,
        common_name([channels[number] for number in chosen]),
        images,
        require_pairs(images, labels, root),
        # A single channel is not recorded, so that a 4-D scan given to the adapter later is not taken silently.
        chosen[0] if len(channels) > 1 and not several else None,
        _name(content, root),
        channels=several,
        channel_names=tuple(channels[number] for number in several),
        further=further,
        label_table=scheme.table,
        channel_files=has_suffixes,
        label_values=scheme.values,
        regions=scheme.regions,
    )


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
    first_channel = listed.with_name(f"{listed.name.removesuffix(suffix)}_0000{suffix}")
    return not os.path.isfile(listed) and os.path.isfile(first_channel)


def _content(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"expected an object with labels in {path}, found {type(content).__name__}; {DATASET_ADVICE}")
    return content


def scheme_of_dataset(path: Path) -> LabelScheme:
    """Classes, label to ignore and regions of a `dataset.json` of the Decathlon or of nnU-Net."""
    if path.is_dir() or path.suffix.lower() != ".json":
        raise InputError(f"expected the dataset.json of the Decathlon or of nnU-Net, found {path}; give that file")
    return scheme_of(_content(path), path)


def _channels(content: Mapping[str, Any], path: Path) -> list[str]:
    """Names of channels 0, 1 and so on."""
    listed = content.get("channel_names", content.get("modality", {"0": ""}))
    if not isinstance(listed, dict) or sorted(listed) != sorted(str(number) for number in range(len(listed))):
        raise InputError(f'expected channels "0", "1" and so on with their names in {path}, found {listed!r:.200}')
    return [str(listed[str(number)]) for number in range(len(listed))]


def _scans_and_labels(root: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """All files of `imagesTr` and `labelsTr` by their names without suffix."""
    return files_by_case(root / "imagesTr"), files_by_case(root / "labelsTr")


def _are_colours(channels: Sequence[str]) -> bool:
    """Whether channels are those of colour pictures, by the names that nnU-Net's documentation gives them."""
    return tuple(name.lower() for name in channels) in _COLOURS


def _are_in_one_picture(images: Mapping[str, Path], is_nnunet: bool) -> bool:
    """Whether all channels of a scan are in one file: a picture, which nnU-Net calls CASE_0000."""
    numbers = {int(match[2]) for match in map(_CHANNEL_NAME.fullmatch, images) if match} if is_nnunet else set()
    return all(map(is_picture, images.values())) and numbers <= {0}


def _have_suffixes(
    images: Mapping[str, Path], labels: Mapping[str, Path], root: Path, *, channel_names: Sequence[str]
) -> bool:
    """Whether the names of scans end in the number of a channel, and not in that of a case."""
    matches = {name: _CHANNEL_NAME.fullmatch(name) for name in images}
    plain = [name for name, match in matches.items() if not match]
    if len(channel_names) > 1:
        if plain:
            raise InputError(
                f"expected a file for each channel in {root / 'imagesTr'}, named CASE_0000 and so on, found {plain[0]}"
            )
        return True
    numbers = {int(match[2]) for match in matches.values() if match}
    # Frames are numbered from 0 on as well, but so are their label maps.
    return not plain and (numbers == {0} or not images.keys() & labels.keys())


def _without_suffix(labels: Mapping[str, Path], images: Mapping[str, Path]) -> dict[str, Path]:
    """Case -> label map, also of those named CASE_0000 as the scans are."""
    found: dict[str, Path] = {}
    for name, path in labels.items():
        stem = name.removesuffix("_0000")
        add_file(found, stem if name not in images and stem in images else name, path)
    return found


def _channel_files(
    root: Path, files: Mapping[str, Path], number: int, *, channel_names: Sequence[str]
) -> dict[str, Path]:
    """Scans of one channel, each channel being a file of its own."""
    matches = {name: match for name in files if (match := _CHANNEL_NAME.fullmatch(name))}
    images = {match[1]: files[name] for name, match in matches.items() if int(match[2]) == number}
    if unlisted := [name for name, match in matches.items() if int(match[2]) >= len(channel_names)]:
        warnings.warn(
            f"{root / DATASET_FILE} lists {len(channel_names)} channel{'s' * (len(channel_names) > 1)}, so "
            f"{len(unlisted)} files of others are left out: {printable(', '.join(unlisted[:5]))}; list their channels, "
            "or rename files that are cases",
            stacklevel=3,
        )
    lacking = sorted({match[1] for match in matches.values()} - images.keys())
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
            raise InputError(
                f'expected "image" and "label" of each training case in {root / DATASET_FILE}: {entry!r:.200}'
            )
        image, label = (_listed_file(root, str(entry[kind])) for kind in ("image", "label"))
        case = case_name(label)
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
    """A file that `dataset.json` names; by its name it is below `root`, but it may be a link to elsewhere."""
    path = Path(os.path.normpath(root / listed))
    if not path.is_relative_to(root):
        raise InputError(f"expected files below {root} in its {DATASET_FILE}, found {path!s:.300}")
    if suffix_of(path) is None or not os.path.isfile(path):
        raise InputError(f"{root / DATASET_FILE} lists {path!s:.300}, which is missing or no scan; mend the list")
    return path
