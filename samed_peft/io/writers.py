"""Scans, and masks on the grid of the scan they belong to."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io.files import atomic_file, write_bytes
from samed_peft.io.readers import ITK_SUFFIXES, LPS_TO_RAS, NIFTI_SUFFIXES, suffix_of
from samed_peft.io.volumes import Volume

_GEOMETRY_FIELDS = (
    *("pixdim", "qform_code", "sform_code", "xyzt_units", "srow_x", "srow_y", "srow_z"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)


def _scan_header(like: Volume) -> Any:
    """The NIfTI header `like` was read from, or None where there is none or it says something else by now."""
    import nibabel

    if (
        like.affine is None
        or like.path is None
        or suffix_of(like.path) not in NIFTI_SUFFIXES
        or not like.path.is_file()
    ):
        return None
    scan: Any = nibabel.load(like.path)
    same_grid = scan.shape == like.array.shape[::-1] and np.allclose(scan.affine, like.affine, atol=1e-4)
    return scan.header if same_grid else None


def _new_nifti(array: np.ndarray, affine: np.ndarray | None) -> Any:
    import nibabel

    image: Any = nibabel.Nifti1Image(array.T, np.eye(4) if affine is None else affine)
    image.header.set_xyzt_units("mm")
    if affine is not None:
        image.set_qform(affine, code=1)  # some viewers read only this one
        image.set_sform(affine, code=1)
    return image


def _mask_nifti(mask: np.ndarray, like: Volume) -> Any:
    import nibabel

    scan_header = _scan_header(like)
    if scan_header is None:
        return _new_nifti(mask, like.affine)
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(mask.shape[::-1])
    for field in _GEOMETRY_FIELDS:
        header[field] = scan_header[field]
    header["pixdim"][4:] = 0  # a scan may keep its repetition time there
    # Without an affine argument the header's codes stay as they are.
    return nibabel.Nifti1Image(mask.T, None, header)


def _write_nifti(image: Any, path: Path) -> None:
    data: bytes = image.to_bytes()
    # A fixed time stamp, so that equal images give equal files.
    write_bytes(path, gzip.compress(data, compresslevel=6, mtime=0) if path.name.lower().endswith(".gz") else data)


def _write_itk(mask: np.ndarray, like: Volume, path: Path) -> None:
    import SimpleITK as sitk  # noqa: N813

    image = sitk.GetImageFromArray(mask)
    if like.affine is not None:
        affine = LPS_TO_RAS @ like.affine
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        image.SetSpacing(spacing.tolist())
        image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
        image.SetOrigin(affine[:3, 3].tolist())
    with atomic_file(path) as temporary:
        sitk.WriteImage(image, str(temporary), useCompression=True)


def write_mask(mask: np.ndarray, like: Volume, path: str | Path) -> None:
    """Write a label mask on the grid of the scan `like`, atomically; equal masks give equal bytes.

    A NIfTI mask of a NIfTI scan keeps its qform and sform with their codes and its units.

    Args:
        mask: (D, H, W) integers in 0..255, the shape of `like.array`.
        like: the scan; without an affine the mask gets the identity.
        path: `.nii.gz`, `.nii`, `.nrrd` or `.mha`; missing parent folders are made.

    Raises:
        InputError: the shapes differ, a value does not fit, or the suffix is another one.
    """
    path = Path(path)
    suffix = suffix_of(path)
    if mask.shape != like.array.shape:
        raise InputError(
            f"expected a mask of the scan's shape {like.array.shape} ({like.path}), found {mask.shape} "
            f"for {path}; resample it"
        )
    if mask.dtype.kind not in "biu" or mask.min() < 0 or mask.max() > 255:
        raise InputError(f"expected integer labels in 0..255, found {mask.dtype} up to {mask.max()} for {path}")
    if suffix not in NIFTI_SUFFIXES + ITK_SUFFIXES:
        known = ", ".join(NIFTI_SUFFIXES + ITK_SUFFIXES)
        raise InputError(f"expected a mask name ending in {known}, found {path}; choose one of these")
    mask = np.ascontiguousarray(mask, dtype=np.uint8)
    if suffix in ITK_SUFFIXES:
        _write_itk(mask, like, path)
        return
    _write_nifti(_mask_nifti(mask, like), path)


def write_volume(volume: Volume, path: str | Path) -> None:
    """Write a scan as NIfTI in its own number type, atomically; equal scans give equal bytes.

    Args:
        volume: array (D, H, W) of uint8, int16, int32, float32 or float64; without affine: the identity.
        path: `.nii.gz` or `.nii`; missing parent folders are made.

    Raises:
        InputError: the array is not 3-D or of another type, or the suffix is another one.
    """
    path = Path(path)
    if volume.array.ndim != 3 or volume.array.dtype not in (
        np.uint8,
        np.int16,
        np.int32,
        np.float32,
        np.float64,
    ):
        raise InputError(f"expected a 3-D scan of numbers, found {volume.array.dtype} {volume.array.shape} for {path}")
    if suffix_of(path) not in NIFTI_SUFFIXES:
        raise InputError(f"expected a scan name ending in .nii.gz or .nii, found {path}; choose one of these")
    _write_nifti(_new_nifti(volume.array, volume.affine), path)
