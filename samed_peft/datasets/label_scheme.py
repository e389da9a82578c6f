"""What the numbers of label maps mean: names, gaps, a label to ignore, and regions of several labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io import IGNORED, Volume

IGNORE = "ignore"
"""Name that nnU-Net gives to the label of voxels that nobody has annotated."""

UNNAMED = -1
"""Entry of a table for a stored value that stands for nothing."""

DATASET_ADVICE = "give the dataset.json of the Decathlon or of nnU-Net"


@dataclass(frozen=True)
class LabelScheme:
    """Names and stored values of labels 1..K.

    Attributes:
        class_names: names of labels 1..K.
        values: stored value of each; None if they are 1..K.
        ignored: stored value of voxels that count nowhere, or None.
        regions: name -> the labels 1..K that it is made of; regions may overlap. None without regions.
    """

    class_names: tuple[str, ...]
    values: tuple[int, ...] | None = None
    ignored: int | None = None
    regions: Mapping[str, tuple[int, ...]] | None = None

    @property
    def table(self) -> tuple[int, ...] | None:
        """Label of each stored value 0, 1 and so on, `IGNORED` or `UNNAMED`; None if 0..K are used as stored."""
        if self.values is None and self.ignored is None:
            return None
        return label_table(self.values or range(1, len(self.class_names) + 1), self.ignored)


def scheme_of(content: Mapping[str, Any], path: object) -> LabelScheme:
    """Read the labels of a `dataset.json`: `{"0": "background", "1": "liver"}` or `{"background": 0, "liver": 1}`.

    Numbers may have gaps. nnU-Net's `ignore` names the label that counts nowhere. A list makes all names but
    background regions: classes are the single numbers in them, named by `regions_class_order` (see nnU-Net's
    documentation of region-based training), which lists the number that is left of each region.

    Args:
        content: of the file.
        path: of the file, for messages.

    Raises:
        InputError: labels are missing or malformed, a value does not fit into 8 bits, or no class is left.
    """
    labels = content.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise InputError(f'expected "labels" with numbers and names in {path}, found {labels!r:.200}; {DATASET_ADVICE}')
    numbers = _numbers_by_name(labels, path)
    ignored = _ignored(numbers.pop(IGNORE, None), path)
    if any(isinstance(value, list) for value in labels.values()):
        found = {name: ids for name, ids in numbers.items() if ids != (0,)}
        values = sorted({value for ids in found.values() for value in ids})
        names = _names_of_regions(found, values, content.get("regions_class_order"), path)
    else:
        found, values = {}, sorted(value for (value,) in numbers.values() if value)
        by_value = {value: name for name, (value,) in numbers.items()}
        names = tuple(by_value[value] for value in values)
    _require_usable(values, ignored, labels, path)
    place = {value: label for label, value in enumerate(values, start=1)}
    return LabelScheme(
        names,
        None if values == list(range(1, len(values) + 1)) else tuple(values),
        ignored,
        {name: tuple(place[value] for value in ids) for name, ids in found.items()} or None,
    )


def _numbers_by_name(labels: Mapping[str, Any], path: object) -> dict[str, tuple[int, ...]]:
    """Name -> its numbers, of which only regions have several."""
    found: dict[str, tuple[int, ...]] = {}
    has_regions = any(isinstance(value, list) for value in labels.values())
    taken: set[int] = set()
    for key, value in labels.items():
        name, numbers = (key, value) if isinstance(value, int | list) else (value, key)
        ids = [str(number) for number in (numbers if isinstance(numbers, list) else [numbers])]
        # Python itself refuses to convert thousands of digits.
        is_whole = ids and all(text.isdecimal() and text.isascii() and len(text) < 10 for text in ids)
        if not is_whole or not isinstance(name, str) or name in found or len(set(ids)) != len(ids):
            raise InputError(
                f"expected different names, each with one number, or with a list of different ones as a region, in "
                f"the labels of {path}, found {key!r:.80}: {value!r:.200}; mend the file, or name the labels with "
                "class_names"
            )
        found[name] = tuple(map(int, ids))
        if not has_regions and taken.intersection(found[name]):
            raise InputError(
                f"expected one number for each name in the labels of {path}, found {key!r:.80}: {value!r:.200} beside "
                "another name of that number; mend the file, or name the labels with class_names"
            )
        taken.update(found[name])
    return found


def _ignored(numbers: tuple[int, ...] | None, path: object) -> int | None:
    if numbers is None:
        return None
    if len(numbers) != 1 or numbers[0] == 0:
        raise InputError(f"expected one number above 0 for {IGNORE!r} in the labels of {path}, found {list(numbers)}")
    return numbers[0]


def _names_of_regions(
    regions: Mapping[str, tuple[int, ...]], values: Sequence[int], order: Any, path: object
) -> tuple[str, ...]:
    """Names of the single numbers: of the region that has this number alone or gives it to the next ones last."""
    names = {ids[0]: name for name, ids in regions.items() if len(ids) == 1}
    if order is not None:
        fits = isinstance(order, list) and len(order) == len(regions)
        if not fits or any(number not in ids for number, ids in zip(order, regions.values(), strict=True)):
            raise InputError(
                f'expected in "regions_class_order" of {path} one of the numbers of each region, in their order '
                f"({', '.join(regions):.200}), found {order!r:.200}; mend the file"
            )
        for number, (name, ids) in zip(order, regions.items(), strict=True):
            names.setdefault(number, name if len(ids) == 1 else f"{name} only")
    found = tuple(names.get(value, f"label {value}") for value in values)
    if len(set(found)) != len(found):
        raise InputError(
            f"expected regions whose numbers get different names in {path}, found {', '.join(found):.300}; rename a "
            "region"
        )
    return found


def _require_usable(values: Sequence[int], ignored: int | None, labels: object, path: object) -> None:
    if not values:
        raise InputError(
            f"expected labels beside background in {path}, found {labels!s:.500}; or name them with class_names"
        )
    if 0 in values or ignored in values:
        raise InputError(
            f"expected regions without background (0) and without {IGNORE!r} ({ignored}) in {path}, found "
            f"{labels!s:.500}; take the number out of the region"
        )
    if (largest := max(*values, ignored or 0)) > IGNORED:
        raise InputError(
            f"expected labels up to {IGNORED}, as masks have 8 bits, in {path}, found {largest}; renumber the masks"
        )
    if ignored is not None and len(values) >= IGNORED:
        raise InputError(
            f"expected at most {IGNORED - 1} classes beside {IGNORE!r}, as labels have 8 bits, in {path}, found "
            f"{len(values)}; leave classes out, or have no label to ignore"
        )


def with_given_names(scheme: LabelScheme, given: Sequence[str] | None) -> LabelScheme:
    """Let a user's names stand for those of the file, where they can: of regions, or of all numbers despite gaps.

    Names of classes without gaps or regions are compared with those of the folder later, by `class_names_for`.
    """
    if given is None:
        return scheme
    if scheme.regions is not None and len(given) == len(scheme.class_names):
        return replace(scheme, class_names=tuple(given))
    has_gaps_alone = scheme.values is not None and scheme.regions is None and scheme.ignored is None
    if has_gaps_alone and len(given) == max(scheme.values or ()):
        return LabelScheme(tuple(given))
    return scheme


def foreground(labels: np.ndarray, ignored_label: int | None) -> np.ndarray:
    """Whether voxels are of one of the classes: neither background nor to be ignored."""
    return (labels != 0) & (labels != (ignored_label or 0))


def is_ignored(labels: np.ndarray, ignored_label: int | None) -> bool:
    """Whether all voxels are to be ignored."""
    return ignored_label is not None and bool((labels == ignored_label).all())


def require_counted(labels: Volume) -> None:
    """Require a voxel that counts.

    Raises:
        InputError: all voxels of the label map are to be ignored.
    """
    if is_ignored(labels.array, labels.ignored_label):
        raise InputError(
            f"expected voxels that are not to be ignored in {labels.path}, found none of {labels.array.size}, so "
            "nothing can be scored; leave the case out"
        )


def label_table(values: Sequence[int], ignored: int | None = None) -> tuple[int, ...]:
    """Label of each stored value 0, 1 and so on: 1..K for `values`, `IGNORED` for `ignored`, `UNNAMED` for others."""
    labels = {0: 0} | {value: label for label, value in enumerate(values, start=1)}
    if ignored is not None:
        labels[ignored] = IGNORED
    return tuple(labels.get(value, UNNAMED) for value in range(max(labels) + 1))


def labels_of_table(labels: Volume, table: Sequence[int]) -> Volume:
    """Replace stored values by the labels of a table, see `LabelScheme.table`.

    Raises:
        InputError: a stored value stands for nothing.
    """
    known = [value for value, label in enumerate(table) if label != UNNAMED]
    stored = labels.array
    if stored.min() < 0 or stored.max() >= len(table) or (len(known) < len(table) and not np.isin(stored, known).all()):
        found = sorted({int(value) for value in np.unique(stored)} - set(known))
        expected = f"0..{known[-1]}" if len(known) == len(table) else ", ".join(map(str, known))
        raise InputError(
            f"labels of {labels.path} hold {', '.join(map(str, found[:8]))}, but only {expected} are expected there; "
            "is it from another dataset, or the scan itself?"
        )
    array = np.array([max(label, 0) for label in table], np.uint8)[stored]
    return replace(labels, array=array, ignored_label=IGNORED if IGNORED in table else None)
