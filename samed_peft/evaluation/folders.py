"""Score a folder of masks against a folder of references, matched by file name."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from samed_peft.datasets.label_scheme import LabelScheme, label_table, labels_of_table
from samed_peft.datasets.reference_folders import ReferenceFolder, open_references
from samed_peft.errors import InputError, InterruptedBySignalError, StopSignal, reason_of
from samed_peft.evaluation.cases import checked_names, regions_report, score_pair, score_regions
from samed_peft.evaluation.pictures import case_picture
from samed_peft.evaluation.report import Report
from samed_peft.io import (
    SUFFIXES,
    Volume,
    is_picture,
    list_folder,
    numbered_names,
    read_label_names,
    read_labels,
    read_volume,
    suffix_of,
)
from samed_peft.metrics import DEFAULT_TOLERANCE_MM, CaseScores, checked_tolerance

Files = Mapping[str, Sequence[Path]]
"""Case -> the files of that name; more than one are refused."""


def evaluate_folders(
    predictions: Path,
    references: Path,
    *,
    class_names: Sequence[str] | LabelScheme | None = None,
    images: Path | None = None,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    on_failure: Callable[[str, str], None],
) -> Report:
    """Score the masks in one folder against those in another, one case in memory at a time.

    Files belong together if their names without suffix are equal; scans for pictures may be named as nnU-Net's, where
    `a_0000` is the scan of `a`. A case that cannot be scored is left out, named in the report's settings under
    `failed_cases`, and given to `on_failure` with the reason at once. Without names, classes are "class 1" up to the
    largest label of the references, each of which is then read twice. With a `LabelScheme`, from `scheme_of_dataset`,
    both folders hold its stored values, voxels that it ignores count nowhere, and its regions are scored too.

    References may be stored in any way that training reads (`open_references`): a file for each class, colours with
    `colours.json`, or numbers with `labels.txt`. Files of classes are chosen by `class_names`, or else by the names in
    the predicted masks.

    Raises:
        InputError: a folder is missing or has no label maps, no name is in both, every case failed, or no case has
            an image.
        InterruptedBySignalError: Ctrl-C or SIGTERM arrived; the case at hand was finished.
    """
    tolerance_mm = checked_tolerance(tolerance_mm)
    predicted = _without_companions(list_files(predictions))
    described, referenced, scheme = _opened(references, predicted, class_names)
    _require_shared_name(predicted, referenced)
    scans = {} if images is None else _scans_of(sorted(referenced), images)
    names, regions = scheme.class_names, scheme.regions
    scores: dict[str, CaseScores] = {}
    of_regions: dict[str, CaseScores] = {}
    pictures: dict[str, bytes] = {}
    without_spacing: list[str] = []
    failed: dict[str, str] = {}
    for case in _until_stopped(sorted({*predicted, *referenced})):
        try:
            prediction = _labels(_only(predicted, case, predictions), scheme, is_reference=False)
            if described is None:
                reference = _labels(_only(referenced, case, references), scheme, is_reference=True)
            else:
                reference = described.read(case)
                _require_names(prediction, scheme)
            found = score_pair(prediction, reference, num_classes=len(names), tolerance_mm=tolerance_mm)
            of_regions[case] = score_regions(prediction, reference, regions, tolerance_mm=tolerance_mm)
            scores[case] = found
            without_spacing += [case] if reference.affine is None else []
            if case in scans:
                pictures[case] = _picture(_only(scans, case, images), reference, prediction, class_names=names)
        except Exception as error:  # libraries raise errors of many kinds for bad files
            scored = "scored, but has no picture: " if case in scores else ""
            failed[case] = _writable(f"{scored}{reason_of(error)}")
            on_failure(case, failed[case])
    if not scores:
        raise InputError(f"none of the {len(failed)} cases in {predictions} and {references} could be scored")
    without_image = [] if images is None else [case for case in scores if case not in scans]
    lists = {"cases_without_spacing": without_spacing, "cases_without_image": without_image, "failed_cases": failed}
    settings = {
        "predictions": _writable(str(predictions)),
        "references": _writable(str(references)),
        "surface_dice_tolerance_mm": tolerance_mm,
        **{name: found for name, found in lists.items() if found},
    }
    return Report(names, scores, settings=settings, pictures=pictures, regions=regions_report(regions, of_regions))


def _opened(
    references: Path, predicted: Files, class_names: Sequence[str] | LabelScheme | None
) -> tuple[ReferenceFolder | None, Files, LabelScheme]:
    """References that are not plain label maps, the files of all of them, and their classes."""
    if class_names is not None and not isinstance(class_names, LabelScheme):
        class_names = checked_names(class_names)
    described = open_references(references, predicted.keys(), class_names, named=_names_of_masks(predicted))
    if described is not None:
        return described, _files_of(described), described.scheme
    referenced = list_files(references)
    if class_names is None:
        _require_shared_name(predicted, referenced)  # before all are read
        class_names = numbered_names(_readable(referenced), folder=references)
    scheme = class_names if isinstance(class_names, LabelScheme) else LabelScheme(tuple(class_names))
    return None, referenced, scheme


def _files_of(described: ReferenceFolder) -> dict[str, list[Path]]:
    """Case -> files of references that are described, in some of which nothing may be found."""
    found = {_writable(case): list(of_case.labels) for case, of_case in described.cases.items()}
    return found | {_writable(case): [described.folder / case] for case in described.failing}


def _names_of_masks(predicted: Files) -> LabelScheme | None:
    """Names and numbers of classes as the first predicted mask holds them; None if it holds none."""
    path = next(iter(predicted.values()))[0]
    try:
        names = read_label_names(path) or {}
    except InputError:  # which is this case's failure
        return None
    values = sorted(names)
    if not values or len(set(names.values())) != len(names):
        return None
    return LabelScheme(
        tuple(names[value] for value in values), None if values == [*range(1, len(values) + 1)] else tuple(values)
    )


def _require_names(prediction: Volume, scheme: LabelScheme) -> None:
    """Refuse a mask whose own names say that its numbers stand for other classes than those of the references."""
    assert prediction.path is not None, "it was read from a file"
    values = scheme.values or range(1, len(scheme.class_names) + 1)
    found = read_label_names(prediction.path) or {}
    for value, name in zip(values, scheme.class_names, strict=True):
        if found.get(value, name) != name:
            raise InputError(
                f"expected label {value} of {prediction.path} to be {name}, as the references have it, found "
                f"{found[value]} by the names in that file; give class_names in the order of the masks' labels"
            )


def _labels(path: Path, scheme: LabelScheme, *, is_reference: bool) -> Volume:
    """A label map with labels 1..K; references alone may have voxels to ignore."""
    if scheme.table is None:
        return read_labels(path)
    values = scheme.values or range(1, len(scheme.class_names) + 1)
    return labels_of_table(read_labels(path, as_stored=True), scheme.table if is_reference else label_table(values))


def _until_stopped(cases: Sequence[str]) -> Iterator[str]:
    """The cases, under a progress bar; a signal ends it when the case at hand is done."""
    with StopSignal() as stop:
        for done, case in enumerate(tqdm(cases, unit="case", leave=False, disable=None), start=1):
            yield case
            if stop.received is not None and done < len(cases):
                raise InterruptedBySignalError(
                    f"stopped by a signal when {done} of {len(cases)} cases were scored; no report is written, start "
                    "again to score all of them",
                    stop.received,
                )


def list_files(folder: Path, *, folders_too: bool = False) -> dict[str, list[Path]]:
    """List the files of each case in `folder` itself, without hidden ones and those of other kinds.

    With `folders_too`, folders count as well, which may be DICOM series. A folder without any such file is refused.
    """
    found: dict[str, list[Path]] = {}
    for path in list_folder(folder):
        suffix = "" if folders_too and path.is_dir() else suffix_of(path)
        if suffix is not None and not path.name.startswith("."):
            found.setdefault(_writable(path.name[: len(path.name) - len(suffix)]), []).append(path)
    if not found:
        raise InputError(f"expected files ending in {', '.join(SUFFIXES)} in {folder}, found none; check the folder")
    return found


def _without_companions(files: Files) -> dict[str, list[Path]]:
    """Leave out nnU-Net's probabilities (`.npz`) and previews (pictures) beside a mask of another format."""
    masks = {
        case: [path for path in paths if not (is_picture(path) or suffix_of(path) == ".npz")]
        for case, paths in files.items()
    }
    return {case: masks[case] or list(paths) for case, paths in files.items()}


def _writable(text: str) -> str:
    """`text` with a question mark for each byte of a file name that is not UTF-8, which reports cannot store."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _require_shared_name(predicted: Files, referenced: Files) -> None:
    """Refuse folders without a single pair, such as those of raw BTCV with img0001 and label0001."""
    if not predicted.keys() & referenced.keys():
        one, other = (next(iter(files.values()))[0] for files in (predicted, referenced))
        raise InputError(
            f"expected masks named as their references, found {_writable(one.name)} in {one.parent} and "
            f"{_writable(other.name)} in {other.parent}; rename one folder's files so that names without suffix agree"
        )


def _only(files: Files, case: str, folder: Path | None) -> Path:
    found = files.get(case, ())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(f"expected one file of this name in {folder}, found {names}")
    return found[0]


def _readable(references: Files) -> Iterator[Volume]:
    for path in (path for paths in references.values() for path in paths):
        # A case that cannot be read fails with this message when it is its turn.
        with contextlib.suppress(Exception):
            volume = read_labels(path)
            yield volume


def _scans_of(cases: Sequence[str], images: Path) -> dict[str, list[Path]]:
    found = list_files(images, folders_too=True)
    # nnU-Net ends the names of scans with the number of the channel.
    scans = {case: found.get(case) or found.get(f"{case}_0000", []) for case in cases}
    if not any(scans.values()):
        raise InputError(f"expected images named as the references in {images}, found {', '.join(sorted(found)[:5])}")
    return {case: paths for case, paths in scans.items() if paths}


def _picture(path: Path, reference: Volume, prediction: Volume, *, class_names: Sequence[str]) -> bytes:
    image = read_volume(path)
    try:
        return case_picture(image, reference, prediction, class_names=class_names)
    except InputError as error:
        raise InputError(f"{error} (image {path})") from error
