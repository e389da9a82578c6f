"""Rows of slices and volumes: their columns, among them arrays as a feature type of Datasets, and checks of a split."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value
from datasets.features.features import register_feature

from samed_peft.errors import InputError, printable


@dataclass
class ArrayFeature:
    """Column of arrays of one dtype and any shapes, stored as bytes; nested lists would take far longer to decode.

    Importing this class registers it with Datasets, which `load_from_disk` in a fresh process needs.

    Attributes:
        dtype: name of the dtype, such as "float32".
    """

    dtype: str
    pa_type: ClassVar[pa.DataType] = pa.struct({"bytes": pa.large_binary(), "shape": pa.list_(pa.int32())})
    _type: str = field(default="ArrayFeature", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        """Type of the stored column."""
        return self.pa_type

    def encode_example(self, value: Any) -> dict[str, Any]:
        """Bytes and shape of an array, or of nested lists, whose numbers must fit the dtype."""
        array = np.asarray(value)
        if array.dtype != self.dtype:
            array = self._cast(pa.array(array.ravel())).reshape(array.shape)
        return {"bytes": array.tobytes(), "shape": list(array.shape)}

    def decode_example(self, value: dict[str, Any] | None, token_per_repo_id: Any = None) -> np.ndarray | None:
        """The array; it may be written to."""
        del token_per_repo_id  # part of Datasets' interface
        if value is None:
            return None
        # Copied, since an array over the bytes themselves could not be written to.
        return np.ndarray(value["shape"], self.dtype, value["bytes"]).copy()

    def cast_storage(self, storage: pa.Array) -> pa.StructArray:
        """The stored column, also from arrays returned to `Dataset.map`, which come here as nested lists."""
        if pa.types.is_struct(storage.type):
            columns = [storage.field(part.name).cast(part.type) for part in self.pa_type]
            return pa.StructArray.from_arrays(columns, fields=list(self.pa_type), mask=storage.is_null())
        if not (pa.types.is_list(storage.type) or pa.types.is_null(storage.type)):
            raise pa.ArrowInvalid(f"expected arrays, found {storage.type}")
        rows = [self.encode_example(self._array(row.values)) if row.is_valid else None for row in storage]
        return pa.array(rows, self.pa_type)

    def _array(self, values: pa.Array) -> np.ndarray:
        """The array of one row's nested lists, which must not be ragged."""
        shape = [len(values)]
        while pa.types.is_list(values.type):
            lengths = values.value_lengths().unique().to_pylist()
            if len(lengths) != 1:
                raise pa.ArrowInvalid(f"expected an array, found lists of {lengths} entries")
            shape += lengths
            values = values.flatten()
        return self._cast(values).reshape(shape)

    def _cast(self, values: pa.Array) -> np.ndarray:
        """Flat numbers in the dtype; Arrow refuses those that do not fit, which NumPy would cut off."""
        return np.asarray(values.cast(pa.from_numpy_dtype(self.dtype)).to_numpy(zero_copy_only=False))


with warnings.catch_warnings(action="ignore", category=UserWarning):  # "experimental", but the only way
    register_feature(ArrayFeature, "ArrayFeature")

SLICE_FEATURES = Features(
    {
        "image": ArrayFeature("float32"),
        "label": ArrayFeature("uint8"),
        "case": Value("string"),
        "slice": Value("int32"),
        "orientation": Value("string"),
        "slice_spacing_mm": Value("float32"),
    }
)
"""Columns of a training split: one slice a row, image (H, W) or (H, W, 3), label (H, W)."""

VOLUME_FEATURES = Features(
    {
        "image": ArrayFeature("float32"),
        "label": ArrayFeature("uint8"),
        "case": Value("string"),
        "affine": ArrayFeature("float64"),
        "path": Value("string"),
    }
)
"""Columns of a test split: one whole scan a row, image and label (D, H, W), affine (4, 4) or None."""


def common_orientation(rows: Dataset) -> str | None:
    """Axis codes that all slices of a training split share, or None if they are unknown.

    Raises:
        InputError: they differ, so no scan to predict could be oriented as the slices were.
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
    """Warn of classes (labels 1..K) without a labelled pixel in any slice of a training split."""
    counts = np.zeros(256, np.int64)
    for row in rows.with_format(None).select_columns("label"):
        counts += np.bincount(row["label"].ravel(), minlength=256)
    absent = [name for label, name in enumerate(class_names, start=1) if not counts[label]]
    if absent:
        names = printable(", ".join(absent))
        warnings.warn(
            f"no training slice has a labelled pixel of {names}: the adapter cannot learn them, and where "
            "references lack them too, whatever it predicts has Dice 1 in the samed convention; check labels and names",
            stacklevel=2,
        )
