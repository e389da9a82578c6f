"""Read the data part of a file, unpacked in bounded steps, with each byte accounted for."""

import math
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from samed_peft.io.files import damaged

try:
    from isal import isal_zlib as inflate  # two to three times as fast, with the same checks of what it reads
except ImportError:  # some machines lack wheels of it
    import zlib as inflate  # type: ignore[no-redef]

GZIP_MAGIC = b"\x1f\x8b"
DEFLATE_FACTOR = 1032
"""How far deflate can expand data at most, https://zlib.net/zlib_tech.html."""

_BYTES_IN = 1 << 20
_BYTES_OUT = 1 << 22


class Source:
    """The rest of an open file, of which a header must claim each byte.

    Args:
        stream: at the first byte of the data.
        path: for the errors.
        is_packed: the data are a gzip or zlib stream, or several members of gzip; their checksums are verified.
    """

    def __init__(self, stream: BinaryIO, path: Path, *, is_packed: bool) -> None:
        self._stream = stream
        self._path = path
        self._inflater = inflate.decompressobj(inflate.MAX_WBITS | 32) if is_packed else None
        self._packed = b""
        stored = os.fstat(stream.fileno()).st_size - stream.tell()
        self._most = stored * (DEFLATE_FACTOR if is_packed else 1)

    def require(self, size: int) -> None:
        """Refuse a claim that the file cannot hold, before memory is allocated for it."""
        if size > self._most:
            raise damaged(self._path, f"its header claims {size} bytes and the file can hold {self._most} at most")

    def read(self, size: int) -> bytes:
        """The next `size` bytes."""
        self.require(size)
        data = bytearray(size)
        self._fill(memoryview(data))
        return bytes(data)

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The next bytes as an array."""
        if min(shape, default=0) < 1:
            raise damaged(self._path, f"its header claims axes of length {shape[::-1]}")
        self.require(math.prod(shape) * dtype.itemsize)
        array = np.empty(shape, dtype)
        self._fill(array.reshape(-1).view(np.uint8).data)
        return array

    def rest(self, most: int) -> bytes:
        """All that is left, refused if it is more than `most` bytes."""
        data = b""
        while len(data) <= most and (piece := self._next(most + 1 - len(data))):
            data += piece
        if len(data) > most:
            raise self._longer()
        return data

    def finish(self) -> None:
        """Refuse data that the header does not claim."""
        if self._next(1):
            raise self._longer()

    def _longer(self) -> Exception:
        return damaged(self._path, "it holds more data than its header claims")

    def _fill(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            if self._inflater is None:
                count = self._stream.readinto(view[done:])  # type: ignore[attr-defined]
            else:
                piece = self._next(len(view) - done)
                count = len(piece)
                view[done : done + count] = piece
            if not count:
                raise damaged(self._path, f"its header claims {len(view)} bytes and the file has {done}")
            done += count

    def _next(self, most: int) -> bytes:
        """Up to `most` bytes, none at the end of the file alone."""
        if self._inflater is None:
            return self._stream.read(most)
        while True:
            data = self._packed or self._stream.read(_BYTES_IN)
            if self._inflater.eof:
                if not data:
                    return b""
                if not data.startswith(GZIP_MAGIC):
                    raise damaged(self._path, "other bytes follow its compressed data")
                self._inflater = inflate.decompressobj(inflate.MAX_WBITS | 16)
            try:
                piece = self._inflater.decompress(data, min(most, _BYTES_OUT))
            except inflate.error as error:  # type: ignore[misc]  # a class without type in its stubs
                raise damaged(self._path, f"its compressed data are wrong ({error})") from error
            self._packed = self._inflater.unused_data or self._inflater.unconsumed_tail
            if piece:
                return piece
            if not data and not self._inflater.eof:
                raise damaged(self._path, "its compressed data end too early")
