"""Reference label maps without their scans, stored in any way that training reads."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from samed_peft.datasets.cases import read_reference
from samed_peft.datasets.folder import Case, add_file, case_name
from samed_peft.datasets.label_files import colour_table
from samed_peft.datasets.label_scheme import LabelScheme, scheme_of
from samed_peft.datasets.mask_folders import SEGMENTATIONS, naming_files_of, numbered_labels, require_known
from samed_peft.errors import InputError
from samed_peft.io import Volume, list_folder, read_json, read_text, suffix_of

ClassFiles = Mapping[str, Mapping[str, Path]]
"""Case -> class -> file."""


@dataclass(frozen=True)
class ReferenceFolder:
    """Label maps of a folder, and what they mean.

    Attributes:
        folder: where they are.
        scheme: names and numbers of the classes.
        cases: case -> its files.
        failing: case -> why it cannot be read.
    """

    folder: Path
    scheme: LabelScheme
    cases: Mapping[str, Case]
    failing: Mapping[str, str] = field(default_factory=dict)

    def read(self, case: str) -> Volume:
        """The label map of a case, labels 1..K.

        Raises:
            InputError: it has none, or one that cannot be read.
        """
        if case in self.failing:
            raise InputError(self.failing[case])
        if case not in self.cases:
            raise InputError(f"expected a reference of {case} in {self.folder}, found none")
        return read_reference(self.cases[case])


def open_references(
    folder: Path,
    predicted: Collection[str],
    class_names: Sequence[str] | LabelScheme | None,
    *,
    named: LabelScheme | None,
) -> ReferenceFolder | None:
    """Label maps in colours or with names in `labels.txt`, or a file for each class; None for others.

    A file for each class may be `CASE/CLASS.*`, `CLASS/CASE.*` or, as TotalSegmentator's, `CASE/segmentations/CLASS.*`.

    Args:
        folder: of the references; `colours.json` and `labels.txt` may lie in it, or beside a folder `masks`.
        predicted: cases that are scored, which tell folders of cases from those of classes.
        class_names: names that users give, or the labels of their `dataset.json`; of classes with files, those to read.
        named: names and numbers that predicted masks have for classes, which choose classes with files otherwise.

    Raises:
        InputError: colours or names are described twice, a name has no files, or folders fit neither cases nor classes.
    """
    entries = [path for path in list_folder(folder) if not path.name.startswith(".")]
    folders = [path for path in entries if path.is_dir()]
    colours, names = naming_files_of((folder.parent, folder) if folder.name == "masks" else (folder,))
    files = [path for path in entries if not path.is_dir() and suffix_of(path)]
    if folders and not files:
        found, needs_all = _class_files(folder, folders, predicted)
        return _of_class_files(folder, found, _chosen(class_names, named, found, folder), needs_all=needs_all)
    is_described = isinstance(class_names, LabelScheme)
    if colours and is_described:
        raise InputError(
            f"expected the classes of {folder} in one file, found {colours} beside a dataset.json; leave one out"
        )
    if colours:
        found_names, table = colour_table(read_json(colours), colours)
        scheme = LabelScheme(_renamed(found_names, class_names, colours))
        return ReferenceFolder(folder, scheme, _cases(files, colours=table))
    if names and not is_described:
        scheme = scheme_of({"labels": numbered_labels(read_text(names), names)}, names)
        scheme = replace(scheme, class_names=_renamed(scheme.class_names, class_names, names))
        return ReferenceFolder(folder, scheme, _cases(files, label_table=scheme.table))
    return None


def _renamed(names: tuple[str, ...], given: Any, source: Path) -> tuple[str, ...]:
    if given is not None and len(given) != len(names):
        raise InputError(
            f"expected {len(names)} class names, as many as {source} has ({', '.join(names):.300}), found "
            f"{len(given)}: {', '.join(given):.300}; leave class_names out, or rename them all"
        )
    return names if given is None else tuple(given)


def _cases(files: Sequence[Path], **meaning: Any) -> dict[str, Case]:
    """Cases with a label map each."""
    found: dict[str, Path] = {}
    for path in files:
        add_file(found, case_name(path), path)
    return {case: Case(case, (), (path,), **meaning) for case, path in found.items()}


def _class_files(folder: Path, folders: Sequence[Path], predicted: Collection[str]) -> tuple[ClassFiles, bool]:
    """Case -> class -> file, and whether every case must have each class, as TotalSegmentator's."""
    below = {path.name: path / SEGMENTATIONS if (path / SEGMENTATIONS).is_dir() else path for path in folders}
    needs_all = any(path.name == SEGMENTATIONS for path in below.values())
    files: dict[str, dict[str, Path]] = {name: {} for name in below}
    for name, path in below.items():
        for file in list_folder(path):
            if not file.name.startswith(".") and not file.is_dir() and suffix_of(file):
                add_file(files[name], case_name(file), file)
    stems = {stem for found in files.values() for stem in found}
    by_case, by_class = (bool(names & {*predicted}) for names in (files.keys(), stems))
    if by_case == by_class:
        found = "both" if by_case else f"folders such as {min(files)} with files such as {min(stems, default='none')}"
        raise InputError(
            f"expected files of label maps in {folder}, or {folder}/CASE/CLASS.nii.gz or {folder}/CLASS/CASE.nii.gz "
            f"for each CASE of the {len(predicted)} predictions ({', '.join(sorted(predicted)[:3])}), found {found}; "
            "rename them, or give another folder"
        )
    if by_case:
        return files, needs_all
    return {case: {name: of[case] for name, of in files.items() if case in of} for case in sorted(stems)}, False


def _chosen(
    class_names: Sequence[str] | LabelScheme | None, named: LabelScheme | None, files: ClassFiles, folder: Path
) -> LabelScheme:
    """Classes to read: those that users name, or that predicted masks do, or else all, in the order of the alphabet."""
    there = sorted({name for of_case in files.values() for name in of_case})
    if isinstance(class_names, LabelScheme):
        scheme = class_names
    elif class_names is not None:
        scheme = LabelScheme(tuple(class_names))
    else:
        scheme = named or LabelScheme(tuple(there))
    require_known(scheme.class_names, there, folder)
    return scheme


def _of_class_files(folder: Path, files: ClassFiles, scheme: LabelScheme, *, needs_all: bool) -> ReferenceFolder:
    cases, failing = {}, {}
    for case, of_case in files.items():
        found = {label: of_case[name] for label, name in enumerate(scheme.class_names, start=1) if name in of_case}
        lacking = [name for name in scheme.class_names if name not in of_case]
        if not of_case or (needs_all and lacking):
            failing[case] = (
                f"expected a file of each class of {case} in {folder}, found none of {', '.join(lacking[:5])}; choose "
                "classes that all cases have, with class_names, or leave the case out"
            )
            continue
        chosen = found or {0: next(iter(of_case.values()))}  # for its grid
        cases[case] = Case(case, (), tuple(chosen.values()), file_labels=tuple(chosen))
    return ReferenceFolder(folder, scheme, cases, failing)
