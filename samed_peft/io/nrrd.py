"""Read NRRD files: scans, affines and names of labels. Format: https://teem.sourceforge.net/nrrd/format.html."""

import re
from dataclasses import dataclass
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

_TYPES = {
    "i1": "signed char, int8, int8_t",
    "u1": "uchar, unsigned char, uint8, uint8_t",
    "i2": "short, short int, signed short, signed short int, int16, int16_t",
    "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
    "i4": "int, signed int, int32, int32_t",
    "u4": "uint, unsigned int, uint32, uint32_t",
    "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
    "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
    "f4": "float",
    "f8": "double",
}
_DTYPES = {name: dtype for dtype, names in _TYPES.items() for name in names.split(", ")}

_ENCODINGS = {
    **{"raw": "raw", "gzip": "gzip", "gz": "gzip"},
    **{"ascii": "ascii", "text": "ascii", "txt": "ascii", "hex": "hex"},
}

_FIELDS = frozenset(
    [
        *("content", "number", "type", "blocksize", "dimension", "space", "spacedimension", "sizes", "spacings"),
        *("thicknesses", "axismins", "axismaxs", "centers", "centerings", "labels", "units", "min", "max", "oldmin"),
        *("oldmax", "endian", "encoding", "lineskip", "byteskip", "sampleunits", "spaceunits", "spaceorigin"),
        *("spacedirections", "measurementframe", "datafile", "kinds"),
    ]
)
"""Names without their blanks, which are optional in some of them."""

_TO_LPS = {
    **dict.fromkeys(("", "left-posterior-superior", "lps"), (1, 1, 1)),
    **dict.fromkeys(("right-anterior-superior", "ras"), (-1, -1, 1)),
    **dict.fromkeys(("left-anterior-superior", "las"), (1, -1, 1)),
}
"""Signs of the axes of a space; ITK takes a space without a name, as it writes itself for 2-D and 4-D, as LPS."""

_MILLIMETRES = ("", "mm", "millimeter", "millimeters", "millimetre", "millimetres")
_DOMAIN_KINDS = ("domain", "space", "time", "???", "none")


@dataclass(frozen=True)
class _Header:
    """Fields, texts (`key:=value`) and the file they are from."""

    fields: dict[str, str]
    texts: dict[str, str]
    path: Path

    def words(self, name: str, count: int, pattern: str = r"\S+") -> list[str] | None:
        """The `count` parts of a field; None without the field."""
        if name not in self.fields:
            return None
        words = re.findall(pattern, self.fields[name])
        if len(words) != count:
            raise damaged(self.path, f"its field {name!r} holds {len(words)} values instead of {count}")
        return words

    def vector(self, text: str) -> np.ndarray:
        """The numbers of "(1,2,3)"."""
        inner = text.strip().removeprefix("(").removesuffix(")")
        return np.array(numbers(inner.replace(",", " "), inner.count(",") + 1, field="vector", path=self.path))


def _header(stream: BinaryIO, path: Path) -> _Header:
    if not re.fullmatch(rb"NRRD000[1-5]\s*", stream.readline(16)):
        raise InputError(
            f"{path} cannot be read: it does not begin as NRRD does; it is damaged or of another format, name it after "
            "its format or fetch it again"
        )
    fields: dict[str, str] = {}
    texts: dict[str, str] = {}
    for line in read_lines(stream, path, is_last=lambda line: not line):
        if not line or line.startswith("#"):
            continue
        match = re.match(r"(.*?)(:=|: |:$)(.*)", line)
        name = match[1].lower().replace(" ", "") if match else ""
        if match and match[2] == ":=":
            texts[match[1]] = re.sub(r"\\([n\\])", lambda found: "\n" if found[1] == "n" else "\\", match[3])
        elif match is None or name not in _FIELDS or name in fields:
            raise damaged(path, f"its header has an unknown, broken or doubled line {line[:60]!r}")
        else:
            fields[name] = match[3].strip()
    return _Header(fields, texts, path)


def _axes(header: _Header) -> tuple[list[int], list[int]]:
    """The lengths of all axes, fastest first, and which two or three of them are those of the scan."""
    path = header.path
    sizes = sizes_xyz(wanted(header.fields, "dimension", path), wanted(header.fields, "sizes", path), path)
    count = len(sizes)
    kinds = [kind.lower() in _DOMAIN_KINDS for kind in header.words("kinds", count) or ["domain"] * count]
    directions = header.words("spacedirections", count, r"none|\([^()]*\)") or [""] * count
    is_spatial = [kind and direction != "none" for kind, direction in zip(kinds, directions, strict=True)]
    axes = [axis for axis in range(count) if sizes[axis] > 1 or is_spatial[axis]]
    while len(axes) > 3 and sizes[axes[-1]] == 1:
        axes.pop()
    if len(axes) not in (2, 3) or not all(is_spatial[axis] for axis in axes):
        raise refuse_vectors(f"axes of lengths {sizes} of the kinds {header.fields.get('kinds', 'unknown')}", path)
    return sizes, axes


def _affine(header: _Header, axes: list[int], count: int) -> np.ndarray:
    """RAS affine in millimetres, as ITK reads it."""
    fields, path = header.fields, header.path
    space = fields.get("space", "").lower()
    signs = _TO_LPS.get(space)
    units = header.words("spaceunits", count, r'"([^"]*)"') or header.words("units", count, r'"([^"]*)"') or []
    if any(units[axis].strip().lower() not in _MILLIMETRES for axis in axes if axis < len(units)):
        raise InputError(
            f"expected millimetres, found the units {units} in {path}, which ITK and 3D Slicer ignore; scale space "
            "directions and space origin, or spacings, to millimetres"
        )
    if signs is None:
        raise InputError(
            f"expected the space left-posterior-superior, right-anterior-superior or left-anterior-superior, found "
            f"{space!r} in {path}, which does not say where the patient's left is; convert it to one of these"
        )
    flips = np.array(signs[: len(axes)], float)
    directions = header.words("spacedirections", count, r"none|\([^()]*\)")
    if directions is None:
        return _affine_of_spacings(header, axes, count, flips)
    vectors = [header.vector(directions[axis])[: len(axes)] for axis in axes]
    origin = header.vector(fields["spaceorigin"])[: len(axes)] if "spaceorigin" in fields else np.zeros(len(axes))
    if any(len(vector) != len(axes) for vector in (*vectors, origin)):
        raise damaged(path, f"its space directions and origin {vectors}, {origin} do not have {len(axes)} values each")
    # In Teem's order, so that rounding is the same.
    spacing = np.array([np.sqrt(sum(value * value for value in vector)) for vector in vectors])
    if not (spacing > 0).all():
        raise damaged(path, f"its space directions {vectors} have no length")
    return ras_affine(np.array(vectors) * (1 / spacing)[:, None] * flips, spacing, origin * flips)


def _affine_of_spacings(header: _Header, axes: list[int], count: int, flips: np.ndarray) -> np.ndarray:
    """RAS affine of a file without directions."""
    fields, path = header.fields, header.path
    spaced, mins = header.words("spacings", count), header.words("axismins", count)
    if (spaced and fields.keys() & {"space", "spacedimension"}) or (mins and not spaced):
        raise InputError(
            f"expected space directions, or spacings without a space, in {path}, found {sorted(fields)}; export it"
        )
    spacing = np.array(numbers(" ".join(spaced or ["1"] * count), count, field="spacings", path=path))[axes]
    origin = np.zeros(len(axes))
    if "spaceorigin" in fields:
        origin = header.vector(fields["spaceorigin"])[: len(axes)] * flips
    elif mins:
        is_node = [
            centre.lower() == "node"
            for centre in (header.words("centers", count) or header.words("centerings", count) or ["cell"] * count)
        ]
        half = np.where(np.array(is_node)[axes], 0, spacing / 2)
        origin = np.array(numbers(" ".join(mins), count, field="axis mins", path=path))[axes] + half
    if len(origin) != len(axes):
        raise damaged(path, f"its space origin does not have {len(axes)} values")
    return ras_affine(np.eye(len(axes)), spacing, origin)


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Array (D, H, W), or (H, W), in stored type, and affine."""
    with path.open("rb") as stream:
        header = _header(stream, path)
        fields = header.fields
        sizes, axes = _axes(header)
        affine = _affine(header, axes, len(sizes))
        code = _DTYPES.get(wanted(fields, "type", path).lower())
        encoding = _ENCODINGS.get(wanted(fields, "encoding", path).lower())
        skips = {fields.get("lineskip", "0"), fields.get("byteskip", "0")}
        if code is None or encoding is None or not skips <= {"0", "-1"}:
            raise InputError(
                f"expected numbers in the encoding raw, gzip, ascii or hex without skipped bytes, found {fields} in "
                f"{path}; save it again with encoding gzip"
            )
        order = {"little": "<", "big": ">"}.get(fields.get("endian", "").lower(), "")
        if not order and code[1] != "1" and encoding != "ascii":
            raise damaged(path, "its header lacks a field 'endian' of little or big")
        with opened_data(stream, path, fields.get("datafile")) as data:
            array = read_voxels(data, path, tuple(reversed(sizes)), np.dtype(order + code), encoding)
    return array.reshape([sizes[axis] for axis in reversed(axes)]), affine


def read_affine(path: Path) -> np.ndarray:
    """The affine from the header alone."""
    with path.open("rb") as stream:
        header = _header(stream, path)
    sizes, axes = _axes(header)
    return _affine(header, axes, len(sizes))


def read_names(path: Path) -> dict[int, str] | None:
    """Label -> name from JSON under `labels` or from segments of 3D Slicer; None without either."""
    with path.open("rb") as stream:
        texts = _header(stream, path).texts
    if TEXT_KEY in texts:
        return parsed_names(texts[TEXT_KEY])
    names = {}
    for key, value in texts.items():
        match = re.fullmatch(r"Segment(\d+)_LabelValue", key)
        if match and value.isdecimal() and f"Segment{match[1]}_Name" in texts:
            names[int(value)] = texts[f"Segment{match[1]}_Name"]
    return dict(sorted(names.items())) or None
