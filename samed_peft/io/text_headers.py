"""Read what NRRD and MetaImage have in common: a header of text, and voxels after it or in a file beside it.

Teem and MetaIO, which ITK reads them with, crash on some damaged headers and let others pass. So nothing of a file is
given to them: lines, values and sizes are checked here, and each byte of voxels is accounted for.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io.files import damaged
from samed_peft.io.streams import Source
from samed_peft.io.volumes import LPS_TO_RAS

_MOST_BYTES = 1 << 22
"""Of a header; a segmentation of 3D Slicer with a hundred structures has some 100,000."""

_MOST_AXES = 16


def read_lines(stream: BinaryIO, path: Path, *, is_last: Callable[[str], bool]) -> Iterator[str]:
    """The lines of a header, up to and with its last one."""
    left = _MOST_BYTES
    while line := stream.readline(left):
        left -= len(line)
        if left <= 0:
            raise damaged(path, f"its header has no end within {_MOST_BYTES} bytes")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            text = line.decode("latin-1")
        yield (text := text.strip())
        if is_last(text):
            return


def wanted(fields: dict[str, str], name: str, path: Path) -> str:
    """The value of a field that must be there."""
    if name not in fields:
        raise damaged(path, f"its header lacks the field {name!r}")
    return fields[name]


def numbers(text: str, count: int, *, field: str, path: Path, kind: type = float) -> list:
    """Exactly `count` numbers of a field."""
    try:
        values = [kind(word) for word in text.split()]
    except ValueError as error:
        raise damaged(path, f"its field {field!r} holds something other than numbers ({error})") from error
    if len(values) != count:
        raise damaged(path, f"its field {field!r} holds {len(values)} values instead of {count}")
    return values


def sizes_xyz(dimension: str, sizes: str, path: Path) -> list[int]:
    """The lengths of all axes, fastest first."""
    count = numbers(dimension, 1, field="dimension", path=path, kind=int)[0]
    if not 1 <= count <= _MOST_AXES:
        raise damaged(path, f"its header claims {count} dimensions")
    lengths = numbers(sizes, count, field="sizes", path=path, kind=int)
    if min(lengths) < 1:
        raise damaged(path, f"its header claims axes of length {lengths}")
    return lengths


def ras_affine(directions: np.ndarray, spacing: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """RAS affine of two, three or more axes: directions one a row, spacing and origin in LPS, as ITK defines them."""
    count = min(len(spacing), 3)
    affine = np.eye(4)
    affine[:count, :count] = directions[:count, :count].T * spacing[:count]
    affine[:count, 3] = origin[:count]
    return np.asarray(LPS_TO_RAS @ affine)


def refuse_vectors(count: object, path: Path) -> InputError:
    """The error for a file with several numbers a voxel."""
    return InputError(
        f"expected a 3-D scan with one number a voxel, found {count} in {path}; export one greyscale volume"
    )


@contextlib.contextmanager
def opened_data(stream: BinaryIO, path: Path, name: str | None) -> Iterator[BinaryIO]:
    """The stream of the voxels: the header's own or, with a name, that of a plain file beside the header."""
    if name is None:
        yield stream
        return
    file = path.parent / name
    is_plain = not re.search(r"[/\\:%]", name) and name.split()[:1] not in ([], ["LIST"])
    if not is_plain or not file.is_file() or file.resolve().parent != path.parent.resolve():
        raise InputError(
            f"expected the voxels of {path} in it, or in a file in its folder, found {name!r}; save the scan as a "
            "single file"
        )
    with file.open("rb") as data:
        yield data


def read_voxels(stream: BinaryIO, path: Path, shape: tuple[int, ...], dtype: np.dtype, encoding: str) -> np.ndarray:
    """All that is left of a stream as an array; `encoding` is raw, gzip (zlib too), ascii or hex."""
    source = Source(stream, path, is_packed=encoding == "gzip")
    count = math.prod(shape)
    if encoding in ("raw", "gzip"):
        array = source.array(shape, dtype)
        source.finish()
        return array
    # Characters that a value takes at least: a digit and a space, or two digits a byte.
    source.require(2 * count - 1 if encoding == "ascii" else 2 * count * dtype.itemsize)
    text = stream.read().decode("ascii")
    if encoding == "ascii":
        kind = float if dtype.kind == "f" else int
        return np.array(numbers(text, count, field="voxels", path=path, kind=kind), dtype).reshape(shape)
    data = bytes.fromhex(text)
    if len(data) != count * dtype.itemsize:
        raise damaged(path, f"its header claims {count * dtype.itemsize} bytes and the file has {len(data)}")
    return np.frombuffer(data, dtype).reshape(shape)
