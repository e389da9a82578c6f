"""Names, colours and stored values of labels, as every format of masks stores them."""

import colorsys
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from samed_peft.errors import InputError

IGNORED = 255
"""Label of voxels that count nowhere, in label maps of uint8 whose other labels are 0..K, K at most 254."""

TEXT_KEY = "labels"
"""Key of the JSON of label -> name in formats without a convention of their own (`.png`, `.mha`)."""

_COLOURS = (
    *("e6194b", "3cb44b", "ffe119", "4363d8", "f58231", "42d4f4", "f032e6"),
    *("bfef45", "fabed4", "469990", "dcbeff", "9a6324", "aaffc3"),
)


def label_colour(label: int) -> tuple[float, float, float]:
    """Red, green and blue in [0, 1] of label 1, 2 and so on; the same in every file and picture."""
    index = label - 1
    if index < len(_COLOURS):
        red, green, blue = (value / 255 for value in bytes.fromhex(_COLOURS[index]))
        return red, green, blue
    # Steps of the golden ratio keep any number of further hues apart.
    return colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.6, 1.0)


def checked_names(names: Mapping[int, str], path: Path) -> dict[int, str]:
    """Names in the order of their labels, each on one line; refused if empty or of a label outside 1..255."""
    odd = [label for label, name in names.items() if not 1 <= label <= 255 or not _one_line(name)]
    if odd:
        raise InputError(
            f"expected label_names of labels 1 to 255, none of them empty, found {odd[0]}: {names[odd[0]]!r} for "
            f"{path}; leave the background out"
        )
    return {label: _one_line(name) for label, name in sorted(names.items())}


def _one_line(name: str) -> str:
    """A name without line breaks and control characters, which XML, NRRD and DICOM cannot store."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u2028\u2029]", " ", name).split())


def stored_mask(mask: np.ndarray, label_values: Sequence[int] | None) -> np.ndarray:
    """Replace labels 1..K by the values that the training's label maps have for them.

    Args:
        mask: labels 0..K, 0 is background.
        label_values: value of each label 1..K, at most 255; None: they are the same.
    """
    return mask if label_values is None else np.array([0, *label_values], np.uint8)[mask]


def stored_names(class_names: Sequence[str], label_values: Sequence[int] | None) -> dict[int, str]:
    """Stored value -> name of labels 1..K; `label_values` as for `stored_mask`."""
    values = range(1, len(class_names) + 1) if label_values is None else label_values
    return dict(zip(values, class_names, strict=True))


def text_of_names(names: Mapping[int, str]) -> str:
    """JSON in ASCII, all that MetaImage keeps."""
    return json.dumps({str(label): name for label, name in names.items()})


def parsed_names(text: str) -> dict[int, str] | None:
    """Label -> name from the JSON of `text_of_names`; None for another program's text."""
    try:
        names = {int(label): name for label, name in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return names if names and all(isinstance(name, str) for name in names.values()) else None
