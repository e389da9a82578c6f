"""PNG, TIFF and JPEG pictures, through Pillow: scans, masks and names of labels."""

import contextlib
import io
import math
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io.atomic import write_bytes
from samed_peft.io.files import damaged
from samed_peft.io.label_names import TEXT_KEY, parsed_names, text_of_names
from samed_peft.io.volumes import Volume

_TIFF_BITS, _TIFF_COMPRESSION = 258, 259
_TIFF_PARTS = ((273, 279), (324, 325))
"""Tags of the offsets and lengths of strips, and of tiles."""

_TIFF_DEFLATE = (8, 32946)
_TIFF_BOUNDED, _TIFF_MOST_FACTOR = (5, *_TIFF_DEFLATE, 32773), 4096
"""LZW, deflate and PackBits, and how far the first expands data at most; its codes have up to 12 bits."""

_SPREAD = {"L;2": 85, "L;4": 17}
"""Grey of 2 and 4 bits, whose numbers Pillow spreads over those of 8."""

_INFLATED_AT_ONCE = 1 << 22


def read(path: Path) -> tuple[np.ndarray, None]:
    """Array (1, H, W) or, in colour, (1, H, W, 3)."""
    return _read(path, indexed=False), None


def read_labels(path: Path) -> tuple[np.ndarray, None]:
    """Label map (1, H, W): as `read_numbers`, but if the only values are 0 and 255, 255 is label 1."""
    array, _ = read_numbers(path)
    values = np.unique(array)
    return array // 255 if values[-1] == 255 and set(values.tolist()) <= {0, 255} else array, None


def read_numbers(path: Path) -> tuple[np.ndarray, None]:
    """Label map (1, H, W) as stored; of a palette the indices count."""
    array = _read(path, indexed=True)
    if array.ndim == 4:
        if (array != array[..., :1]).any():
            raise InputError(f"expected one label a pixel, found colours in {path}; save label numbers in grey")
        array = array[..., 0]
    return array, None


def refuse_labels(path: Path) -> NoReturn:
    """Refuse a JPEG as a label map: its compression blurs edges."""
    raise InputError(f"expected a mask without loss, found JPEG in {path}, whose edges are not labels; use PNG")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Pillow's picture, of a file whose checksums and sizes are right; errors name the file."""
    from PIL import Image

    try:
        _require_sound_png(path)
        # Of a file that it opens by name, Pillow maps plain TIFF into memory, wrongly if it is turned by 90 degrees.
        with path.open("rb") as stream, Image.open(stream) as picture:
            _require_sound_tiff(picture, path)
            yield picture
    except (InputError, MemoryError, Warning):
        raise
    except Image.DecompressionBombError as error:
        raise InputError(
            f"expected a picture of at most {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels, found more in {path} "
            f"({error}); scale it down, or cut it into tiles"
        ) from error
    except Exception as error:  # on damaged files Pillow raises whatever its code runs into
        if isinstance(error, OSError) and error.strerror and error.filename is not None:
            raise InputError(f"{path} cannot be read: {error.strerror}; check its name and permissions") from error
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{path} cannot be read, Pillow says {reason}; it may be damaged or of another format than its name says, "
            "open it in a viewer and save it again, or fetch it again"
        ) from error


def _require_sound_png(path: Path) -> None:
    """Refuse a PNG with a wrong checksum or without its end, which Pillow reads as far as it gets."""
    with path.open("rb") as stream:
        if stream.read(8) != b"\x89PNG\r\n\x1a\n":
            return
        kind = b""
        while kind != b"IEND":
            head = stream.read(8)
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            data = stream.read(length) if length < 2**31 else b""
            checksum = stream.read(4)
            if len(checksum) < 4:
                raise damaged(path, "it ends before its last part, IEND")
            if zlib.crc32(data, zlib.crc32(kind)) != int.from_bytes(checksum, "big"):
                raise damaged(path, f"the checksum of its part {kind.decode('latin-1')!r} is wrong")


def _require_sound_tiff(picture: Any, path: Path) -> None:
    """Refuse a TIFF that claims more pixels than it holds, or whose deflated parts have a wrong checksum.

    libtiff inflates a part until its pixels are full, and does not look at the checksum behind. Pillow allocates what
    a header claims, and leaves pixels without data as they are.
    """
    if picture.format != "TIFF":
        return
    tags = picture.tag_v2
    compression, size, stored = tags.get(_TIFF_COMPRESSION, 1), path.stat().st_size, 0
    with path.open("rb") as stream:
        for offsets, lengths in _TIFF_PARTS:
            for offset, length in zip(_as_tuple(tags.get(offsets)), _as_tuple(tags.get(lengths)), strict=False):
                if offset + length > size:
                    raise damaged(path, f"its pixels end at byte {offset + length}, and the file has {size}")
                stored += length
                if compression in _TIFF_DEFLATE:
                    stream.seek(offset)
                    if not _is_whole(stream.read(length)):
                        raise damaged(path, f"the compressed pixels at byte {offset} are cut off")
    width, height = picture.size
    claimed = width * height * sum(_as_tuple(tags.get(_TIFF_BITS, 1))) // 8
    factor = 1 if compression == 1 else _TIFF_MOST_FACTOR if compression in _TIFF_BOUNDED else math.inf
    if claimed > (stored or size) * factor:
        raise damaged(path, f"it claims {width} x {height} pixels, {claimed} bytes, and holds {stored or size}")


def _is_whole(deflated: bytes) -> bool:
    """Whether a stream comes to its end, where its checksum is."""
    inflater = zlib.decompressobj()
    while deflated and not inflater.eof:
        inflater.decompress(deflated, _INFLATED_AT_ONCE)
        deflated = inflater.unconsumed_tail
    return inflater.eof


def _as_tuple(value: Any) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _read(path: Path, *, indexed: bool) -> np.ndarray:
    """Array (1, H, W) or (1, H, W, 3), turned as viewers show it.

    An orientation in EXIF is applied to scans and to label maps alike. Cameras store pictures as the sensor lies and
    say how to turn them; viewers and annotation tools turn them first, so masks drawn there fit the turned picture and
    have no orientation themselves. Predicted masks are written on the turned grid for the same reason. A label map that
    was copied with its picture's EXIF is turned with it.
    """
    from PIL import ImageOps

    with _opened(path) as picture:
        # A camera's MPO holds its picture first, and then previews or the other eye's picture.
        if picture.format != "MPO":
            _require_one_page(picture, path)
        raw = _raw_mode(picture)
        # In all modes but grey, Pillow takes the upper half of 16 bits.
        bits_cut = ";16" in raw and not picture.mode.startswith("I")
        if bits_cut and indexed:
            raise InputError(
                f"expected label numbers in grey or 8 bits a colour, found 16 bits in mode {picture.mode} in {path}, "
                "of which the lower ones would be lost; save it in grey without alpha"
            )
        picture.load()
        # TIFF is turned already, and then has no orientation any more.
        ImageOps.exif_transpose(picture, in_place=True)
        array = _pixels(picture, path, indexed=indexed)[None]
        if indexed and picture.mode == "L":
            array //= _SPREAD.get(raw, 1)
    if bits_cut:
        warnings.warn(f"{path} has 16 bits a colour, of which the upper 8 are read", stacklevel=2)
    return array


def _require_one_page(picture: Any, path: Path) -> None:
    with contextlib.suppress(EOFError):
        picture.seek(1)
        raise InputError(f"expected one picture, found several pages in {path}; split it")
    picture.seek(0)


def _raw_mode(picture: Any) -> str:
    """How a picture is stored, in Pillow's words; known before its pixels are loaded."""
    raw = picture.tile[0].args if picture.tile else ""
    return str(raw if isinstance(raw, str) else raw[0] if raw else "")


def _pixels(picture: Any, path: Path, *, indexed: bool) -> np.ndarray:
    """(H, W), or (H, W, 3) in colour; a palette that holds only greys counts as grey."""
    has_palette = picture.mode in ("P", "PA") and not indexed
    shown = picture.convert("RGBA") if has_palette else picture
    if shown.mode in ("RGBA", "LA"):
        array = np.array(shown)
        if array[..., -1].min() < 255:
            raise InputError(f"expected an opaque picture, found transparency in {path}; flatten it")
        is_grey = shown.mode == "LA" or (has_palette and bool((array[..., :3] == array[..., :1]).all()))
        return array[..., 0] if is_grey else array[..., :3]
    if shown.mode not in ("1", "L", "P", "I", "F", "RGB") and not shown.mode.startswith("I;16"):
        raise InputError(f"expected a grey or RGB picture, found mode {picture.mode} in {path}; convert it to RGB")
    return np.array(shown)


def read_names(path: Path) -> dict[int, str] | None:
    """Label -> name from JSON under `labels`; None without it."""
    with _opened(path) as picture:
        picture.load()  # text may follow the pixels
        return parsed_names(picture.info.get(TEXT_KEY, ""))


def write_mask(mask: np.ndarray, like: Volume, path: Path, names: Mapping[int, str]) -> None:
    """Write a uint8 mask (1, H, W) of a picture as PNG, with the names of its labels as JSON under `labels`."""
    from PIL import Image, PngImagePlugin

    if len(mask) != 1 or like.affine is not None:
        raise InputError(
            f"expected a picture as the scan of {path}, found {like.path or 'a scan'} of shape {like.array.shape}, "
            "whose grid a .png cannot hold; write .nii.gz"
        )
    text = PngImagePlugin.PngInfo()
    if names:
        text.add_text(TEXT_KEY, text_of_names(names))
    buffer = io.BytesIO()
    Image.fromarray(mask[0]).save(buffer, format="PNG", pnginfo=text)
    write_bytes(path, buffer.getvalue())
