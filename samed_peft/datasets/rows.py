"""Arrays as dataset columns: stored as raw bytes with their shape, decoded by a transform."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from samed_peft.errors import InputError

ARRAY_FEATURE = {"bytes": Value("large_binary"), "shape": List(Value("int32"))}
"""Column type of what `pack_array` returns."""

SLICE_FEATURES = Features(
    {
        "image": ARRAY_FEATURE,
        "label": ARRAY_FEATURE,
        "case": Value("string"),
        "slice": Value("int32"),
        "orientation": Value("string"),
    }
)
"""Columns of a training split: one slice a row."""

VOLUME_FEATURES = Features(
    {
        "image": ARRAY_FEATURE,
        "label": ARRAY_FEATURE,
        "case": Value("string"),
        "affine": List(Value("float64")),
        "path": Value("string"),
    }
)
"""Columns of a test split: one whole scan a row; `affine` is flat, or None."""


def pack_array(array: np.ndarray) -> dict[str, Any]:
    """Raw bytes and shape of an array; Arrow's nested lists would take tens of milliseconds to decode."""
    return {"bytes": np.ascontiguousarray(array).tobytes(), "shape": list(array.shape)}


def slice_row(
    image: np.ndarray, label: np.ndarray, *, case: str, index: int, orientation: str | None
) -> dict[str, Any]:
    """A row of `SLICE_FEATURES`: image (H, W) or (H, W, 3) float32, label (H, W) uint8."""
    return {
        "image": pack_array(image),
        "label": pack_array(label),
        "case": case,
        "slice": index,
        "orientation": orientation,
    }


def _unpack(packed: dict[str, Any], dtype: type[np.generic]) -> np.ndarray:
    # Copied, since an array over the bytes themselves could not be written to.
    return np.frombuffer(packed["bytes"], dtype=dtype).reshape(packed["shape"]).copy()


def decode_rows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Transform for `Dataset.with_transform`: packed columns to arrays, whichever of them were asked for.

    Returns:
        the batch with `image` as float32, `label` as uint8 and `affine` as (4, 4) float64 or None.
    """
    decoded = dict(batch)
    if "image" in batch:
        decoded["image"] = [_unpack(packed, np.float32) for packed in batch["image"]]
    if "label" in batch:
        decoded["label"] = [_unpack(packed, np.uint8) for packed in batch["label"]]
    if "affine" in batch:
        decoded["affine"] = [None if flat is None else np.array(flat).reshape(4, 4) for flat in batch["affine"]]
    return decoded


def common_orientation(rows: Dataset) -> str | None:
    """Axis codes that all slices of a training split share, or None if they are unknown.

    Raises:
        InputError: they differ, so that no scan to predict could be turned to lie as the slices did.
    """
    plain = rows.with_format(None)
    examples = dict(zip(plain["orientation"], plain["case"], strict=True))
    if len(examples) > 1:
        found = ", ".join(f"{codes or 'unknown'} ({case})" for codes, case in sorted(examples.items(), key=str))
        raise InputError(
            f"expected training scans of one orientation, found {found}; reorient them, with nibabel's "
            "as_closest_canonical for instance, or leave some out"
        )
    return next(iter(examples))


def warn_of_absent_classes(rows: Dataset, class_names: Sequence[str]) -> None:
    """Warn of classes that no slice of a training split has a labelled pixel of.

    Args:
        rows: from `load_synapse` or `load_slices`.
        class_names: names of labels 1..K.
    """
    counts = np.zeros(256, np.int64)
    for packed in rows.with_format(None).select_columns("label"):
        counts += np.bincount(np.frombuffer(packed["label"]["bytes"], np.uint8), minlength=256)
    absent = [name for label, name in enumerate(class_names, start=1) if not counts[label]]
    if absent:
        warnings.warn(
            f"no training slice has a labelled pixel of {', '.join(absent)}: the adapter cannot learn them, and where "
            "references lack them too, whatever it predicts has Dice 1 in the samed convention; check labels and names",
            stacklevel=2,
        )
