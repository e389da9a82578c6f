"""A folder of labelled scans in any layout: the files of each case, and the meaning of the labels."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from samed_peft.datasets.label_files import Colour
from samed_peft.errors import InputError
from samed_peft.io import content_fingerprint, holds_dicom, list_folder, naming_unreadable, suffix_of


@dataclass(frozen=True)
class Case:
    """Files of one case, and how to read them.

    Attributes:
        name: of the case.
        scans: its scan; of a case stored slice by slice, a file for each slice, in order.
        labels: its label map, one for each slice, or one for each class; the same files if these hold both.
        channel: see `LabelledFolder`.
        label_table: see `LabelledFolder`.
        numbers: number of each slice; empty for a whole scan.
        file_labels: label of each file of `labels` if each has one class, see `label_files.read_class_files`.
        colours: see `LabelledFolder`.
        channels: see `LabelledFolder`.
        further: files of all channels but the first, if each is a file of its own.
    """

    name: str
    scans: tuple[Path, ...]
    labels: tuple[Path, ...]
    channel: int | None = None
    label_table: tuple[int, ...] | None = None
    numbers: tuple[int, ...] = ()
    file_labels: tuple[int, ...] = ()
    colours: tuple[Colour, ...] = ()
    channels: tuple[int, ...] = ()
    further: tuple[Path, ...] = ()

    @property
    def parts(self) -> tuple["Case", ...]:
        """The case itself or, if it is stored slice by slice, a case for each slice."""
        if not self.numbers:
            return (self,)
        files = zip(self.scans, self.labels, self.numbers, strict=True)
        return tuple(replace(self, scans=(scan,), labels=(label,), numbers=(number,)) for scan, label, number in files)


@dataclass(frozen=True)
class LabelledFolder:
    """Cases of a folder, and the meaning of their labels.

    Attributes:
        root: the folder.
        class_names: names of labels 1..K; empty if nothing names them.
        modality: of the chosen channel, "CT" or "MRI" for example, lower or upper case as in the file; None if unknown.
        images: case -> scan, a file or the folder of a DICOM series.
        labels: case -> label map; the same file if it holds both, and one of several if each class has its own.
        channel: number of the chosen channel if scans have several.
        name: of the data in `dataset.json`, preceded by "Medical Segmentation Decathlon" if the folder is named like
            one of its tasks; None if unknown.
        slices: case -> slice number -> file with that slice and its labels, of cases stored slice by slice.
        label_table: label used for each stored label 0, 1 and so on, with `io.IGNORED` for those that count nowhere and
            `label_scheme.UNNAMED` for those that stand for nothing; None if stored labels are used as they are.
        splits: suggested cases for "train" and "test"; empty if the layout suggests none.
        layout: name of the layout, see `layouts.LAYOUTS`.
        channel_files: whether each channel is a file of its own, named CASE_0000 and so on.
        label_values: stored value of each label 1..K; None if they are 1..K.
        regions: name -> the labels 1..K that it is made of; None without regions.
        class_files: case -> label -> file, of cases with a file for each class.
        colours: of label maps in colours, each with its label.
        channels: numbers of the chosen channels if several fill the encoder's; `channel` is None then.
        channel_names: their names.
        further: case -> files of all chosen channels but the first, which `images` has, if each is a file of its own.
    """

    root: Path
    class_names: tuple[str, ...]
    modality: str | None
    images: Mapping[str, Path]
    labels: Mapping[str, Path]
    channel: int | None = None
    name: str | None = None
    slices: Mapping[str, Mapping[int, Path]] = field(default_factory=dict)
    label_table: tuple[int, ...] | None = None
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    layout: str = ""
    channel_files: bool = False
    label_values: tuple[int, ...] | None = None
    regions: Mapping[str, tuple[int, ...]] | None = None
    class_files: Mapping[str, Mapping[int, Path]] = field(default_factory=dict)
    colours: tuple[Colour, ...] = ()
    channels: tuple[int, ...] = ()
    channel_names: tuple[str, ...] = ()
    further: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)

    @property
    def cases(self) -> tuple[str, ...]:
        """Names of all cases."""
        return tuple(dict.fromkeys((*self.images, *self.slices)))

    def case(self, name: str, *, as_slices: bool = False) -> Case:
        """Files of a case: its whole scan, or its slices if only they exist.

        Args:
            name: of the case.
            as_slices: prefer the files of single slices, which may have gaps.

        Raises:
            InputError: the case is unknown, its scan lacks a label map or the reverse, or its slices have gaps.
        """
        if name not in self.cases:
            raise InputError(f"expected a case of {self.root}, found {name}; there are {', '.join(self.cases[:20])}")
        slices = self.slices.get(name, {})
        if not slices or (name in self.images and not as_slices):
            image, labels = self.images[name], self.labels[name]
            for path, partner in ((image, labels), (labels, image)):
                with naming_unreadable(partner):
                    if not (partner.is_file() or partner.is_dir()):
                        raise InputError(
                            f"{path} has no partner: expected {partner}; add it, or leave the case out with cases=[...]"
                        )
            of_classes = self.class_files.get(name, {})
            return Case(
                *(name, (image,), tuple(of_classes.values()) or (labels,), self.channel, self.label_table),
                file_labels=tuple(of_classes),
                colours=self.colours,
                channels=self.channels,
                further=self.further.get(name, ()),
            )
        numbers = tuple(sorted(slices))
        files = tuple(slices[number] for number in numbers)
        if not as_slices and len(numbers) != numbers[-1] - numbers[0] + 1:
            gaps = sorted(set(range(numbers[0], numbers[-1])) - set(numbers))
            raise InputError(
                f"expected every slice of {name} in {files[0].parent}, but {gaps} are missing; "
                "preprocess the case again"
            )
        return Case(name, files, files, self.channel, self.label_table, numbers)

    def data_name(self, prefix: str, cases: Iterable[str], *, as_slices: bool = False) -> str:
        """A name for the data of some cases, for runs to record: `prefix` and a fingerprint of the files' content.

        The colours of label maps count too, since they may be swapped without a change in these files.
        """
        chosen = [self.case(case, as_slices=as_slices) for case in cases]
        paths = dict.fromkeys(path for case in chosen for path in case.scans + case.further + case.labels)
        files = [file for path in paths for file in ([path] if path.is_file() else _files_in(path))]
        colours = f"-{hashlib.sha256(repr(self.colours).encode()).hexdigest()[:8]}" if self.colours else ""
        return f"{prefix}-{content_fingerprint(files)[:16]}{colours}"

    def held_out_names(self, test: Iterable[str], validation: Iterable[str]) -> tuple[str, ...]:
        """`data_name` of the cases to test on and of those to validate on, which choose the adapter that is tested."""
        if self.splits:
            return tuple(self.data_name(f"{self.layout}-test", cases) for cases in (test, validation) if cases)
        return self.data_name("test", test), self.data_name("validation", validation)


def case_name(path: Path) -> str:
    """The file's name without suffix, or a folder's; it must be UTF-8, as in reports and prepared slices."""
    if (readable := path.name.encode("utf-8", errors="replace").decode()) != path.name:
        raise InputError(f"expected file names in UTF-8, found {readable} in {path.parent}; rename it")
    return path.name[: len(path.name) - len("" if path.is_dir() else suffix_of(path) or "")]


def _files_in(series: Path) -> list[Path]:
    return [path for path in list_folder(series) if path.is_file()]


def files_by_case(folder: Path, *, series: bool = False) -> dict[str, Path]:
    """Case -> its one scan, label map or picture in a folder; other files are left out.

    With `series`, folders with DICOM images count too.
    """
    found: dict[str, Path] = {}
    for path in list_folder(folder):
        if path.name.startswith("."):
            continue
        if series and path.is_dir():
            if holds_dicom(path):
                add_file(found, case_name(path), path)
        elif suffix_of(path) is not None:
            add_file(found, case_name(path), path)
    if not found:
        raise InputError(f"expected scans or pictures in {folder}, found none; check the folder")
    return found


def add_file(found: dict[str, Path], case: str, path: Path) -> None:
    """Note the file of a case, which must not have another one."""
    if (other := found.setdefault(case, path)) != path:
        raise InputError(f"expected one file a case, found {other} and {path}; remove one of them")


def require_pairs(images: Mapping[str, Path], labels: Mapping[str, Path], root: Path) -> dict[str, Path]:
    """Label maps in the order of the scans; each scan must have one, and the reverse."""
    alone = sorted(images.keys() ^ labels.keys())
    if alone:
        kind = "label map" if alone[0] in images else "scan"
        raise InputError(
            f"expected a scan and a label map of every case in {root}, found no {kind} of {', '.join(alone[:5])} "
            f"({len(alone)} in all); add it, or take the other file away"
        )
    return {case: labels[case] for case in images}
