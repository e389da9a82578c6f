"""Label maps that are stored otherwise than as one map of numbers: a file for each class, or a colour for each."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from samed_peft.errors import InputError, printable
from samed_peft.io import IGNORED, Volume, grids_apart_mm, read_colours, read_labels

BACKGROUND = ("background", "_background_", "__background__")
"""Names of label 0 in lists of names and colours, in capitals or not."""

Colour = tuple[int, int, int, int]
"""Red, green and blue from 0 to 255, and the label that they stand for."""

_MOST_OVERLAP = 1000
"""Classes may share less than this part, a thousandth, of the smaller one: edges that two readers drew."""


def read_class_files(paths: Sequence[Path], labels: Sequence[int]) -> Volume:
    """Read one file a class into one label map.

    Where two classes overlap by less than a thousandth of the smaller one, the later one wins, with a warning.

    Args:
        paths: files of one class each, everything but 0 belonging to it, on one grid.
        labels: label of each file; 0 for a file of which only the grid counts.

    Raises:
        InputError: a file holds several numbers, grids differ, or classes overlap by more.
    """
    combined: np.ndarray | None = None
    first: Volume | None = None
    sizes: dict[int, int] = {0: 0}
    shared = 0
    names = dict(zip(labels, paths, strict=True))
    for path, label in zip(paths, labels, strict=True):
        volume = _one_class(path)
        if combined is None or first is None:
            first, combined = volume, np.zeros(volume.array.shape, np.uint8)
        _require_one_grid(volume, first)
        if label == 0:
            continue
        inside = volume.array != 0
        sizes[label] = int(np.count_nonzero(inside))
        overlaps = np.bincount(combined[inside], minlength=IGNORED + 1)
        for other in map(int, np.flatnonzero(overlaps[1:]) + 1):
            _require_small(int(overlaps[other]), (names[other], sizes[other]), (path, sizes[label]))
        shared += int(overlaps[1:].sum())
        combined[inside] = label
    assert first is not None
    assert combined is not None
    if shared:
        warnings.warn(
            printable(
                f"classes in {paths[0].parent} share {shared} voxels, less than a thousandth of each class; there the "
                "later one counts"
            ),
            stacklevel=2,
        )
    return replace(first, array=combined)


def _one_class(path: Path) -> Volume:
    volume = read_labels(path)
    values = [int(value) for value in (volume.array.min(), volume.array.max())]
    if values[0] < 0 or ((volume.array != 0) & (volume.array != values[1])).any():
        found = [int(value) for value in np.unique(volume.array)]
        raise InputError(
            f"expected one class in {path}, 0 and one other number, found {', '.join(map(str, found[:8]))}"
            f"{' ...' * (len(found) > 8)}; is it a label map of several classes, or has it smooth edges?"
        )
    return volume


def _require_one_grid(volume: Volume, first: Volume) -> None:
    if volume.array.shape != first.array.shape:
        raise InputError(
            f"expected all classes of a case on one grid, found {first.array.shape} in {first.path} and "
            f"{volume.array.shape} in {volume.path}; resample one by nearest neighbour"
        )
    if apart_mm := grids_apart_mm(volume, first):
        raise InputError(
            f"expected all classes of a case on one grid, found corners of {first.path} and {volume.path} "
            f"{apart_mm:.3g} mm apart; resample one by nearest neighbour"
        )


def _require_small(shared: int, one: tuple[Path, int], other: tuple[Path, int]) -> None:
    """Refuse an overlap of two classes, each a file and its number of voxels."""
    if shared * _MOST_OVERLAP >= min(one[1], other[1]):
        raise InputError(
            f"expected classes that do not overlap, found {shared} voxels both in {one[0]} ({one[1]} voxels) and in "
            f"{other[0]} ({other[1]}); a voxel can have one class: take these voxels out of one of them, or leave one "
            "class out with class_names"
        )


def read_coloured(path: Path, colours: Sequence[Colour]) -> Volume:
    """Read a label map in colours.

    Args:
        path: a picture.
        colours: each with its label, `io.IGNORED` for pixels that count nowhere.

    Raises:
        InputError: the picture has a colour that is not among them.
    """
    picture = read_colours(path)
    packed = _packed(picture.array)
    known = np.array(sorted((int(_packed(np.array(colour[:3]))), colour[3]) for colour in colours))
    places = np.searchsorted(known[:, 0], packed).clip(max=len(known) - 1)
    unknown = known[places, 0] != packed
    if unknown.any():
        found, counts = np.unique(packed[unknown], return_counts=True)
        most = int(found[counts.argmax()])
        others = f" and {len(found) - 1} more unknown colours" if len(found) > 1 else ""
        raise InputError(
            f"expected only colours of the colour table in {path}, found {int(counts.max())} pixels of "
            f"{[most >> 16, most >> 8 & 255, most & 255]}{others}, {int(counts.sum())} of {packed.size} pixels in all; "
            "add the colour to the table, or save the mask without smooth edges"
        )
    array = known[places, 1].astype(np.uint8)
    has_ignored = any(colour[3] == IGNORED for colour in colours)
    return replace(picture, array=array, ignored_label=IGNORED if has_ignored else None)


def _packed(colours: np.ndarray) -> np.ndarray:
    """(...) numbers of (..., 3) colours."""
    red, green, blue = np.moveaxis(colours.astype(np.int64), -1, 0)
    return (red << 16) | (green << 8) | blue


def colour_table(content: object, path: Path) -> tuple[tuple[str, ...], tuple[Colour, ...]]:
    """Class names and colours of `{"name": [red, green, blue]}`; labels are 1..K in the order of the file.

    `background` and nnU-Net's `ignore` have their meaning; black is background unless the file says otherwise.

    Raises:
        InputError: the content is of another kind, or two names have one colour.
    """
    if not isinstance(content, dict) or not content:
        raise InputError(f'expected {{"name": [red, green, blue]}} in {path}, found {content!r:.200}')
    for name, colour in content.items():
        is_colour = isinstance(colour, list) and len(colour) == 3 and all(type(value) is int for value in colour)
        if not is_colour or not all(0 <= value <= 255 for value in colour) or not name:
            raise InputError(
                f"expected three whole numbers from 0 to 255 for each name in {path}, found {name!r:.80}: "
                f"{colour!r:.80}"
            )
    name_of: dict[tuple[int, ...], str] = {}
    for name, colour in content.items():
        if (other := name_of.setdefault(tuple(colour), name)) != name:
            raise InputError(f"expected a colour for each name in {path}, found {colour} for {other!r} and {name!r}")
    special = {name: 0 for name in content if name.lower() in BACKGROUND} | {"ignore": IGNORED}
    names = tuple(name for name in content if name not in special)
    labels = special | {name: label for label, name in enumerate(names, start=1)}
    if not 1 <= len(names) < IGNORED:
        raise InputError(f"expected 1 to {IGNORED - 1} classes in {path}, background left out, found {len(names)}")
    colours = [(*colour, labels[name]) for name, colour in content.items()]
    if not any(label == 0 for label in special.values()) and [0, 0, 0] not in content.values():
        colours.append((0, 0, 0, 0))
    return names, tuple(colours)
