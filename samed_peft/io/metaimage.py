"""Read MetaImage files: scans, affines and names of labels. Format: https://itk.org/Wiki/ITK/MetaIO/Documentation."""

import os
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io.files import damaged
from samed_peft.io.label_names import TEXT_KEY, parsed_names
from samed_peft.io.text_headers import (
    numbers,
    opened_data,
    ras_affine,
    read_lines,
    read_voxels,
    refuse_vectors,
    sizes_xyz,
    wanted,
)

_DTYPES = {
    **{"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4"},
    **{"MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8"},
    **{"MET_FLOAT": "f4", "MET_DOUBLE": "f8"},
}
"""MetaIO gives MET_LONG four bytes on all systems."""

_NAMES = {
    "TransformMatrix": ("TransformMatrix", "Rotation", "Orientation"),
    "Offset": ("Offset", "Position", "Origin"),
    "ElementSpacing": ("ElementSpacing", "ElementSize"),
    "BinaryDataByteOrderMSB": ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"),
}
_LAST = re.compile(r"ElementDataFile\s*[=:]\s*(.*)")


def _header(stream: BinaryIO, path: Path) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in read_lines(stream, path, is_last=lambda line: _LAST.match(line) is not None):
        match = re.match(r"([^=:]*[^=:\s])\s*[=:]\s*(.*)", line)
        if match is None or (match[1] in fields and match[1] != "Comment"):
            raise InputError(
                f"{path} cannot be read: its header has a broken or doubled line {line[:60]!r}; it is damaged or of "
                "another format than MetaImage, name it after its format or fetch it again"
            )
        fields[match[1]] = match[2]
    return fields


def _value(fields: dict[str, str], name: str, default: str) -> str:
    return next((fields[alias] for alias in _NAMES.get(name, (name,)) if alias in fields), default)


def _is_true(fields: dict[str, str], name: str, path: Path) -> bool:
    text = _value(fields, name, "False").lower()
    if text not in ("true", "false", "t", "f", "1", "0"):
        raise damaged(path, f"its field {name!r} holds {text!r} instead of True or False")
    return text[0] in "t1"


def _sizes(fields: dict[str, str], path: Path) -> list[int]:
    """The lengths of the two or three axes, fastest first, without those of length one after the third."""
    sizes = sizes_xyz(wanted(fields, "NDims", path), wanted(fields, "DimSize", path), path)
    channels = numbers(_value(fields, "ElementNumberOfChannels", "1"), 1, field="channels", path=path, kind=int)[0]
    if len(sizes) < 2 or max(sizes[3:], default=1) > 1 or channels != 1:
        raise refuse_vectors(f"axes of lengths {sizes} with {channels} numbers a voxel", path)
    if _value(fields, "DistanceUnits", "mm") not in ("mm", "?"):
        raise InputError(
            f"expected millimetres, found DistanceUnits {fields['DistanceUnits']} in {path}, which ITK ignores; scale "
            "ElementSpacing and Offset to millimetres"
        )
    return sizes


def _affine(fields: dict[str, str], path: Path) -> np.ndarray:
    count = len(_sizes(fields, path))
    unit, ones, zeros = (" ".join(values) for values in (np.eye(count).ravel().astype(str), "1" * count, "0" * count))
    directions = numbers(_value(fields, "TransformMatrix", unit), count**2, field="TransformMatrix", path=path)
    spacing = numbers(_value(fields, "ElementSpacing", ones), count, field="ElementSpacing", path=path)
    origin = numbers(_value(fields, "Offset", zeros), count, field="Offset", path=path)
    return ras_affine(np.array(directions).reshape(count, count), np.array(spacing), np.array(origin))


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Array (D, H, W), or (H, W), in stored type, and affine."""
    with path.open("rb") as stream:
        fields = _header(stream, path)
        sizes, affine = _sizes(fields, path), _affine(fields, path)
        element = wanted(fields, "ElementType", path).removesuffix("_ARRAY")
        is_text = "BinaryData" in fields and not _is_true(fields, "BinaryData", path)
        if element not in _DTYPES or is_text or _value(fields, "HeaderSize", "0") not in ("0", "-1"):
            raise InputError(
                f"expected numbers in binary without skipped bytes, found {fields} in {path}; save it again with ITK"
            )
        order = ">" if _is_true(fields, "BinaryDataByteOrderMSB", path) else "<"
        is_packed = _is_true(fields, "CompressedData", path)
        name = wanted(fields, "ElementDataFile", path)
        with opened_data(stream, path, None if name.lower() == "local" else name) as data:
            stored = str(os.fstat(data.fileno()).st_size - data.tell())
            if is_packed and _value(fields, "CompressedDataSize", stored) != stored:
                raise damaged(
                    path, f"its header claims {fields['CompressedDataSize']} compressed bytes and it has {stored}"
                )
            encoding = "gzip" if is_packed else "raw"
            array = read_voxels(data, path, tuple(reversed(sizes)), np.dtype(order + _DTYPES[element]), encoding)
    return array.reshape(array.shape[-3:]), affine


def read_affine(path: Path) -> np.ndarray:
    """The affine from the header alone."""
    with path.open("rb") as stream:
        return _affine(_header(stream, path), path)


def read_names(path: Path) -> dict[int, str] | None:
    """Label -> name from JSON under `labels`; None without it."""
    with path.open("rb") as stream:
        fields = _header(stream, path)
    return parsed_names(fields[TEXT_KEY]) if TEXT_KEY in fields else None
