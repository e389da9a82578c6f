"""One reader for each file format: arrays as they are stored, and affines."""

import contextlib
import gzip
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io.files import require_file

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""ITK's world axes point left, posterior, superior; nibabel's right, anterior, superior. Its own inverse."""

NIFTI_SUFFIXES = (".nii.gz", ".nii")
ITK_SUFFIXES = (".nrrd", ".mha")
ARRAY_SUFFIXES = (".npy.h5", ".npz")
PICTURE_SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg")
SUFFIXES = NIFTI_SUFFIXES + ITK_SUFFIXES + ARRAY_SUFFIXES + PICTURE_SUFFIXES


def suffix_of(path: Path) -> str | None:
    """The one of `SUFFIXES` that `path` ends in, or None."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def is_picture(path: Path) -> bool:
    """Whether `path` is named as a picture."""
    return suffix_of(path) in PICTURE_SUFFIXES


def damaged(path: Path, reason: object) -> InputError:
    """The error for a file that is not what its name says."""
    return InputError(f"{path} cannot be read: {reason}; it is damaged, cut off or of another format, fetch it again")


@contextlib.contextmanager
def nifti_errors(path: Path) -> Iterator[None]:
    """Everything nibabel raises on a damaged file, as the one error for it."""
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    theirs = (ImageFileError, HeaderDataError, WrapStructError)
    try:
        yield
    except InputError:
        raise
    except (*theirs, OSError, EOFError, OverflowError, ValueError, zlib.error) as error:
        raise damaged(path, error) from error


def checked_affine(affine: np.ndarray, path: Path | None) -> np.ndarray:
    """An affine that has an inverse.

    Raises:
        InputError: it has none, or holds NaN or infinity.
    """
    # Relative to the axes' lengths, so that micrometre voxels are not mistaken for flat ones.
    scale = float(np.prod(np.linalg.norm(affine[:3, :3], axis=0)))
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) <= 1e-6 * scale:
        raise InputError(
            f"expected an invertible affine, found {affine.tolist()} in {path}; its header is broken, "
            "export the scan again"
        )
    return affine


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Array (X, Y, Z) in stored type, or float64 where the header scales, and affine.

    Raises:
        InputError: the file is damaged or holds more than one number a voxel.
    """
    import nibabel

    with nifti_errors(path):
        data = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            data = gzip.decompress(data)  # to the end, where the checksum is
        is_nifti2 = data[:4] in (struct.pack("<i", 540), struct.pack(">i", 540))
        image: Any = (nibabel.Nifti2Image if is_nifti2 else nibabel.Nifti1Image).from_bytes(data)
        proxy = image.dataobj
        if proxy.dtype.kind not in "iuf":
            raise InputError(f"expected one number a voxel, found {proxy.dtype} in {path}; export it as greyscale")
        # Before memory is asked for, of which a damaged header may claim any amount.
        claimed = int(proxy.offset) + math.prod(map(int, proxy.shape)) * proxy.dtype.itemsize
        if claimed > len(data):
            raise damaged(path, f"its header claims {claimed} bytes and the file has {len(data)}")
        # Unscaled values need no detour through float64, which would double the memory.
        array = proxy.get_unscaled() if (proxy.slope, proxy.inter) == (1, 0) else image.get_fdata(caching="unchanged")
        return np.asarray(array), np.asarray(image.affine, dtype=np.float64)


def read_affine(path: Path) -> np.ndarray | None:
    """The affine of a NIfTI or ITK file from its header alone, voxels unread; None for formats without one.

    Raises:
        InputError: the file is missing, its header is damaged, or the affine has no inverse.
    """
    import nibabel
    import SimpleITK as sitk  # noqa: N813

    suffix = suffix_of(require_file(path))
    if suffix in NIFTI_SUFFIXES:
        with nifti_errors(path):
            image: Any = nibabel.load(path)
            return checked_affine(np.asarray(image.affine, dtype=np.float64), path)
    if suffix not in ITK_SUFFIXES:
        return None
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise damaged(path, str(error).strip().splitlines()[-1]) from error
    return checked_affine(_itk_affine(reader), path) if reader.GetDimension() == 3 else None


def _itk_affine(image: Any) -> np.ndarray:
    """RAS affine of a 3-D SimpleITK image or header."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return np.asarray(LPS_TO_RAS @ affine)


def from_itk(image: Any, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Array (D, H, W) and RAS affine of a SimpleITK image."""
    import SimpleITK as sitk  # noqa: N813

    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise InputError(
            f"expected a 3-D scan with one number a voxel, found {image.GetDimension()}-D with "
            f"{image.GetNumberOfComponentsPerPixel()} in {path}; export one greyscale volume"
        )
    return sitk.GetArrayFromImage(image), _itk_affine(image)


def read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Array (D, H, W) as stored and RAS affine of a `.nrrd` or `.mha`.

    Raises:
        InputError: the file is damaged or no greyscale volume.
    """
    import SimpleITK as sitk  # noqa: N813

    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise damaged(path, str(error).strip().splitlines()[-1]) from error
    return from_itk(image, path)


def read_hdf5(path: Path, key: str) -> np.ndarray:
    """The dataset `key` of an HDF5 file.

    Raises:
        InputError: the file is damaged or lacks it.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if not isinstance(file.get(key), h5py.Dataset):
                raise InputError(f"expected a dataset {key!r} in {path}, found {', '.join(file) or 'nothing'}")
            return np.asarray(file[key][()])
    except (OSError, RuntimeError) as error:
        raise damaged(path, error) from error


def read_npz(path: Path, key: str) -> np.ndarray:
    """The array `key` of an `.npz`; pickled objects are refused.

    Raises:
        InputError: the file is damaged, lacks it or holds Python objects.
    """
    try:
        # Through a handle of our own, which stays ours to close when numpy gives up half-way.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise damaged(path, "not an .npz archive")
            if key not in file:
                raise InputError(f"expected an array {key!r} in {path}, found {', '.join(file) or 'nothing'}")
            return np.asarray(file[key])
    except InputError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise damaged(path, error) from error


def read_picture(path: Path, *, indexed: bool) -> np.ndarray:
    """Array (1, H, W) or, in colour, (1, H, W, 3) of a PNG, TIFF or JPEG.

    Args:
        path: the file.
        indexed: whether a palette's indices are meant, as in label maps, and not its colours.

    Raises:
        InputError: the file is damaged, has several pages or transparency, or is of an unusual colour model.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            if _has_second_page(picture):
                raise InputError(f"expected one picture, found several pages in {path}; split it")
            return _pixels(picture, path, indexed=indexed)[None]
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise damaged(path, error) from error


def _pixels(picture: Any, path: Path, *, indexed: bool) -> np.ndarray:
    """(H, W), or (H, W, 3) in colour; a palette of greys alone is no colour."""
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


def _has_second_page(picture: Any) -> bool:
    try:
        picture.seek(1)
    except EOFError:
        return False
    finally:
        picture.seek(0)
    return True
