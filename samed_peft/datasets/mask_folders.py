"""Layouts without a describing file: `images` and `masks` in any form, and TotalSegmentator's; nothing is decoded."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from samed_peft.datasets.folder import LabelledFolder, files_by_case, require_pairs
from samed_peft.datasets.label_files import BACKGROUND, colour_table
from samed_peft.datasets.label_scheme import scheme_of
from samed_peft.errors import InputError
from samed_peft.io import INSTANCE_ADVICE, list_folder, modality_of, read_json, read_text, suffix_of

_COLOUR_FILES, _NAME_FILES = ("colours.json", "colors.json"), ("labels.txt",)
_LABELME_IGNORE, _LABELME_IGNORED = "__ignore__", 255

_SCANS = {"ct.nii.gz": "CT", "mri.nii.gz": "MRI"}
SEGMENTATIONS, _SUFFIX = "segmentations", ".nii.gz"


def open_images_and_masks(root: Path, class_names: Sequence[str] | None) -> LabelledFolder | None:
    """`images` with scans, DICOM series or pictures and `masks`: label maps, maps in colours, or a file for each class.

    `colours.json` or `labels.txt`, in the folder or in `masks`, names colours or label numbers. With a file for each
    class, `class_names` choose some of them.
    """
    folders = (root / "images", root / "masks")
    if not all(map(os.path.isdir, folders)):
        return None
    images, masks = files_by_case(folders[0], series=True), folders[1]
    modality = _modality(images)
    colours, names = naming_files_of((root, masks))
    entries = [path for path in list_folder(masks) if not path.name.startswith(".")]
    folders_of_masks = [path for path in entries if path.is_dir()]
    if folders_of_masks and not any(suffix_of(path) for path in entries if not path.is_dir()):
        if table := colours or names:
            raise InputError(
                f"expected no {table.name} beside a file for each class, whose name says it, found {table}; remove it"
            )
        return _of_class_files(root, images, _by_case_and_class(images, folders_of_masks), class_names, modality)
    labels = require_pairs(images, files_by_case(masks), root)
    if colours:
        coloured, of_names = colour_table(read_json(colours), colours)
        return LabelledFolder(root, coloured, modality, images, labels, colours=of_names)
    if names:
        scheme = scheme_of({"labels": numbered_labels(read_text(names), names)}, names)
        return LabelledFolder(
            *(root, scheme.class_names, modality, images, labels), label_table=scheme.table, label_values=scheme.values
        )
    return LabelledFolder(root, (), modality, images, labels)


def _modality(images: Mapping[str, Path]) -> str | None:
    """The modality that DICOM headers say, if all scans are series of one."""
    found = {modality_of(path) if path.is_dir() else "" for path in images.values()}
    return (found.pop() or None) if len(found) == 1 else None


def naming_files_of(folders: Sequence[Path]) -> tuple[Path | None, Path | None]:
    """The file with colours and the one with names of labels in some folders, of which one at most may be there.

    Args:
        folders: that of the label maps last.

    Raises:
        InputError: there are several.
    """
    found = [
        [folder / name for folder in folders for name in names if os.path.isfile(folder / name)]
        for names in (_COLOUR_FILES, _NAME_FILES)
    ]
    both = [*found[0], *found[1]]
    if len(both) > 1:
        raise InputError(
            f"expected the classes of {folders[-1]} in one file, found {both[0]} and {both[1]}; remove one of them"
        )
    colours, names = (next(iter(paths), None) for paths in found)
    return colours, names


def numbered_labels(text: str, path: Path) -> dict[str, int]:
    """Name -> label number of a file with one name a line, from 1 on, or from 0 on if the first one is background.

    Labelme's `__ignore__` stands for 255, as which it writes pixels without a label.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise InputError(f"expected one class name a line in {path}, found none; write them, or remove the file")
    if odd := [line for line in lines if re.match(r"\d+\s+\d+|.*:\s*\d+\s*,\s*\d+", line)]:
        raise InputError(
            f"expected one class name a line in {path}, found {odd[0]!r:.80}; name colours in {_COLOUR_FILES[0]}, "
            'as {"name": [red, green, blue]}'
        )
    names = [line for line in lines if line != _LABELME_IGNORE]
    if names and all(re.match(r"\d+\s*[:,;=\s]\s*\S", name) for name in names):
        raise InputError(
            f"expected one class name a line in {path}, found numbers before the names, such as {names[0]!r:.80}; "
            "leave the numbers out, and name the labels in their order, from background or from label 1 on"
        )
    if len(set(names)) != len(names):
        doubled = next(name for place, name in enumerate(names) if name in names[:place])
        raise InputError(f"expected different names in {path}, found {doubled!r:.80} twice; mend the file")
    start = 0 if names and names[0].lower() in BACKGROUND else 1
    numbers = {name: number for number, name in enumerate(names, start=start)}
    return numbers | ({"ignore": _LABELME_IGNORED} if _LABELME_IGNORE in lines else {})


def _by_case_and_class(images: Mapping[str, Path], folders: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """Case -> class -> file, of `masks/CASE/CLASS.png` or `masks/CLASS/CASE.png`."""
    files = {folder.name: files_by_case(folder) for folder in folders}
    strange = sorted(files.keys() - images.keys())
    unknown = sorted({stem for found in files.values() for stem in found} - images.keys())
    by_case, by_class = not strange, not unknown
    masks = folders[0].parent
    if by_case == by_class:
        found = "both" if by_case else f"folder {strange[0]} and file {unknown[0]}, none of them named as an image"
        raise InputError(
            f"expected {masks}/CASE/CLASS.png or {masks}/CLASS/CASE.png for each CASE of the {len(images)} images, "
            f"found {found} ({len(strange)} of {len(files)} folders and {len(unknown)} file names fit no image); "
            "rename them, or add the images"
        )
    if by_case:
        found_files = files
    else:
        found_files = {case: {name: of[case] for name, of in files.items() if case in of} for case in images}
    if alone := [case for case in images if not found_files.get(case)]:
        raise InputError(
            f"expected a mask of every image in {masks}, found none of {', '.join(alone[:5])} ({len(alone)} in all); "
            "add an empty one where no class is seen, or take the image away"
        )
    return {case: found_files[case] for case in images}


def _of_class_files(
    root: Path,
    images: Mapping[str, Path],
    files: Mapping[str, Mapping[str, Path]],
    class_names: Sequence[str] | None,
    modality: str | None = None,
) -> LabelledFolder:
    """Cases with a file for each class; a class that has no file in a case is not in it."""
    there = sorted({name for of_case in files.values() for name in of_case})
    names = tuple(class_names or there)
    if class_names is None and len(there) > 1 and all(name.isdecimal() for name in there):
        raise InputError(
            f"expected class names as names of the files below {root / 'masks'}, found {len(there)} numbers "
            f"({', '.join(there[:5])}), as of one file for each object; {INSTANCE_ADVICE}"
        )
    require_known(names, there, root)
    chosen: dict[str, dict[int, Path]] = {}
    for case, of_case in files.items():
        found = {label: of_case[name] for label, name in enumerate(names, start=1) if name in of_case}
        chosen[case] = found or {0: next(iter(of_case.values()))}  # for its grid
    labels = {case: next(iter(of_case.values())) for case, of_case in chosen.items()}
    return LabelledFolder(root, names, modality, images, labels, class_files=chosen)


def require_known(names: Sequence[str], there: Sequence[str], root: Path) -> None:
    """Refuse names of classes that have no files, with those that are spelled alike."""
    doubled = [name for name in names if list(names).count(name) > 1]
    missing = [name for name in names if name not in there]
    if doubled or missing:
        name = (missing or doubled)[0]
        similar = difflib.get_close_matches(name, there, n=3)
        hint = f"did you mean {' or '.join(similar)}?" if similar and missing else "choose some of these"
        raise InputError(
            f"expected class_names that choose different ones of the {len(there)} classes with files in {root} "
            f"({', '.join(there[:20])}{' ...' * (len(there) > 20)}), found {name}; {hint}"
        )


def open_totalsegmentator(root: Path, class_names: Sequence[str] | None) -> LabelledFolder | None:
    """TotalSegmentator's: SUBJECT/ct.nii.gz (or mri.nii.gz) and SUBJECT/segmentations/CLASS.nii.gz.

    `class_names` choose some of the classes; by default all of the first subject. Every subject must have each.
    """
    # One subject that has both at least: other folders may have a subfolder of that name.
    if not any(
        os.path.isdir(path / SEGMENTATIONS) and any(os.path.isfile(path / name) for name in _SCANS)
        for path in list_folder(root)
    ):
        return None
    images, modality = _scans_of_subjects(root)
    first_subject = next(iter(images.values())).parent
    listed = [name for name in os.listdir(first_subject / SEGMENTATIONS) if name[0] != "."]
    there = sorted(_class_of(name) for name in listed if name.endswith(_SUFFIX))
    if not there:
        raise InputError(f"expected CLASS{_SUFFIX} in {first_subject / SEGMENTATIONS}, found none; unpack it again")
    names = tuple(class_names or there)
    require_known(names, there, root)
    files = {
        case: {name: image.parent / SEGMENTATIONS / f"{name}{_SUFFIX}" for name in names}
        for case, image in images.items()
    }
    lacking = [path for of_case in files.values() for path in of_case.values() if not os.path.isfile(path)]
    if lacking:
        raise InputError(
            f"expected a file of each class in every subject of {root}, found no {lacking[0]} ({len(lacking)} of "
            f"{len(files) * len(names)} files lack); choose classes that all have, with class_names, or leave subjects "
            "out"
        )
    return _of_class_files(root, images, files, names, modality)


def _scans_of_subjects(root: Path) -> tuple[dict[str, Path], str]:
    """Subject -> scan, and the modality of all."""
    images: dict[str, Path] = {}
    kinds: dict[str, list[str]] = {kind: [] for kind in _SCANS.values()}
    for subject in list_folder(root):
        scans = [name for name in _SCANS if os.path.isfile(subject / name)]
        if not scans and not os.path.isdir(subject / SEGMENTATIONS):
            continue
        if len(scans) != 1 or not os.path.isdir(subject / SEGMENTATIONS):
            raise InputError(
                f"expected {' or '.join(_SCANS)} and the folder {SEGMENTATIONS} in {subject}, found "
                f"{' and '.join(scans) or 'no scan'}; add what lacks, or take the subject away"
            )
        images[subject.name] = subject / scans[0]
        kinds[_SCANS[scans[0]]].append(subject.name)
    if all(kinds.values()):
        (one, first), (other, second) = kinds.items()
        raise InputError(
            f"expected scans of one modality in {root}, found {len(first)} of {one} ({first[0]} ...) and {len(second)} "
            f"of {other} ({second[0]} ...); give each its own folder"
        )
    (modality,) = (kind for kind, subjects in kinds.items() if subjects)
    return images, modality


def _class_of(file_name: str) -> str:
    return file_name.removesuffix(_SUFFIX)
