"""PNG, TIFF and JPEG pictures, through Pillow: scans, masks and names of labels."""

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io.atomic import write_bytes
from samed_peft.io.files import naming_damaged
from samed_peft.io.label_names import TEXT_KEY, parsed_names, text_of_names
from samed_peft.io.volumes import Volume


def read(path: Path) -> tuple[np.ndarray, None]:
    """Array (1, H, W) or, in colour, (1, H, W, 3)."""
    return _read(path, indexed=False), None


def read_labels(path: Path) -> tuple[np.ndarray, None]:
    """Label map (1, H, W): of a palette the indices count, and if the only values are 0 and 255, 255 is label 1."""
    array = _read(path, indexed=True)
    if array.ndim == 4:
        if (array != array[..., :1]).any():
            raise InputError(f"expected one label a pixel, found colours in {path}; save label numbers in grey")
        array = array[..., 0]
    values = np.unique(array)
    return array // 255 if values[-1] == 255 and set(values.tolist()) <= {0, 255} else array, None


def refuse_labels(path: Path) -> NoReturn:
    """Refuse a JPEG as a label map: its compression blurs edges."""
    raise InputError(f"expected a mask without loss, found JPEG in {path}, whose edges are not labels; use PNG")


def _read(path: Path, *, indexed: bool) -> np.ndarray:
    from PIL import Image

    with naming_damaged(path, OSError, SyntaxError, Image.DecompressionBombError), Image.open(path) as picture:
        with contextlib.suppress(EOFError):
            picture.seek(1)
            raise InputError(f"expected one picture, found several pages in {path}; split it")
        picture.seek(0)
        return _pixels(picture, path, indexed=indexed)[None]


def _pixels(picture: Any, path: Path, *, indexed: bool) -> np.ndarray:
    """(H, W), or (H, W, 3) in colour; a palette that holds only greys counts as grey."""
    has_palette = picture.mode == "P" and not indexed
    shown = picture.convert("RGBA") if has_palette else picture
    if shown.mode == "RGBA":
        array = np.array(shown)
        if array[..., 3].min() < 255:
            raise InputError(f"expected an opaque picture, found transparency in {path}; flatten it")
        is_grey = has_palette and bool((array[..., :3] == array[..., :1]).all())
        return array[..., 0] if is_grey else array[..., :3]
    if shown.mode not in ("1", "L", "P", "I", "F", "RGB") and not shown.mode.startswith("I;16"):
        raise InputError(f"expected a grey or RGB picture, found mode {picture.mode} in {path}; convert it")
    return np.array(shown)


def read_names(path: Path) -> dict[int, str] | None:
    """Label -> name from JSON under `labels`; None without it."""
    from PIL import Image

    with naming_damaged(path, OSError, SyntaxError), Image.open(path) as picture:
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
