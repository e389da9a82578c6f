"""Scans, and masks on the grid of the scan they belong to."""

import gzip
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io.atomic import atomic_file, write_bytes
from samed_peft.io.label_names import (
    TEXT_KEY,
    WORKBENCH_ECODE,
    checked_names,
    label_table,
    segment_fields,
    text_of,
)
from samed_peft.io.readers import ITK_SUFFIXES, LPS_TO_RAS, NIFTI_SUFFIXES, suffix_of
from samed_peft.io.volumes import Volume

MASK_SUFFIXES = (*NIFTI_SUFFIXES, *ITK_SUFFIXES, ".png")

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
    # A fourth axis holds channels, one of which `like` is.
    same_grid = scan.shape[:3] == like.array.shape[::-1] and np.allclose(scan.affine, like.affine, atol=1e-4)
    return scan.header if same_grid else None


def _new_nifti(array: np.ndarray, affine: np.ndarray | None) -> Any:
    import nibabel

    image: Any = nibabel.Nifti1Image(array.T, np.eye(4) if affine is None else affine)
    image.header.set_xyzt_units("mm")
    if affine is not None:
        image.set_sform(affine, code=1)
        # Some viewers read the qform only. It cannot hold a shear: one that did without would lie elsewhere.
        image.set_qform(affine, code=0 if _is_sheared(affine) else 1)
    return image


def _is_sheared(affine: np.ndarray) -> bool:
    """Whether the voxels' axes are not at right angles, by more than the rounding of stored cosines."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(axes.T @ axes - np.eye(3)).max() > 1e-5)


def _mask_nifti(mask: np.ndarray, like: Volume) -> Any:
    import nibabel

    scan_header = _scan_header(like)
    if scan_header is None:
        return _new_nifti(mask, like.affine)
    # NIfTI-2 holds the affine in float64, which float32 would move.
    kind = nibabel.Nifti2Image if isinstance(scan_header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    header = kind.header_class()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(mask.shape[::-1])
    for field in _GEOMETRY_FIELDS:
        header[field] = scan_header[field]
    header["pixdim"][4:] = 0  # a scan may keep its repetition time there
    # Without an affine argument the header's codes stay as they are.
    return kind(mask.T, None, header)


def _write_nifti(image: Any, path: Path) -> None:
    data: bytes = image.to_bytes()
    # A fixed time stamp, so that equal images give equal files.
    write_bytes(path, gzip.compress(data, compresslevel=6, mtime=0) if path.name.lower().endswith(".gz") else data)


def _write_itk(mask: np.ndarray, like: Volume, path: Path, *, fields: Mapping[str, str]) -> None:
    import SimpleITK as sitk  # noqa: N813

    image = sitk.GetImageFromArray(mask)
    if like.affine is not None:
        affine = LPS_TO_RAS @ like.affine
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        image.SetSpacing(spacing.tolist())
        image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
        image.SetOrigin(affine[:3, 3].tolist())
    for key, value in fields.items():
        image.SetMetaData(key, value)
    with atomic_file(path) as temporary:
        sitk.WriteImage(image, str(temporary), useCompression=True)


def _write_png(mask: np.ndarray, like: Volume, path: Path, *, names: Mapping[int, str]) -> None:
    from PIL import Image, PngImagePlugin

    if len(mask) != 1 or like.affine is not None:
        raise InputError(
            f"expected a picture as the scan of {path}, found {like.path or 'a scan'} of shape {like.array.shape}, "
            "whose grid a .png cannot hold; write .nii.gz"
        )
    text = PngImagePlugin.PngInfo()
    if names:
        text.add_text(TEXT_KEY, text_of(names))
    buffer = io.BytesIO()
    Image.fromarray(mask[0]).save(buffer, format="PNG", pnginfo=text)
    write_bytes(path, buffer.getvalue())


def write_mask(
    mask: np.ndarray, like: Volume, path: str | Path, *, label_names: Mapping[int, str] | None = None
) -> None:
    """Write a label mask on the grid of the scan `like`, atomically; equal masks give equal bytes.

    A NIfTI mask of a NIfTI scan keeps its qform and sform with their codes and its units. Names of labels go where
    viewers look for them: NIfTI's label table of Connectome Workbench, 3D Slicer's segments in `.nrrd`, JSON under
    `labels` in `.mha` and `.png`.

    Args:
        mask: (D, H, W) integers in 0..255, the shape of `like.array` but for its colours.
        like: the scan; without an affine the mask gets the identity.
        path: `.nii.gz`, `.nii`, `.nrrd` or `.mha`, and `.png` for pictures; missing parent folders are made.
        label_names: label -> name, background left out.

    Raises:
        InputError: the shapes differ, a value does not fit, the suffix is another one, or is `.png` for a scan that
            is no picture; a name is empty or not of a label in 1..255.
    """
    path = Path(path)
    suffix = suffix_of(path)
    if suffix not in MASK_SUFFIXES:
        known = ", ".join(MASK_SUFFIXES)
        raise InputError(f"expected a mask name ending in {known}, found {path}; choose one of these")
    mask = checked_mask(mask, like, path)
    names = checked_names(label_names or {}, path)
    if suffix == ".png":
        _write_png(mask, like, path, names=names)
    elif suffix in ITK_SUFFIXES:
        fields = segment_fields(names, mask) if suffix == ".nrrd" else {TEXT_KEY: text_of(names)}
        _write_itk(mask, like, path, fields=fields if names else {})
    else:
        _write_nifti(_with_label_table(_mask_nifti(mask, like), names), path)


def checked_mask(mask: np.ndarray, like: Volume, path: Path) -> np.ndarray:
    """A mask as contiguous uint8.

    Raises:
        InputError: its shape is not the scan's, or a value does not fit.
    """
    if mask.shape != like.array.shape[:3]:
        raise InputError(
            f"expected a mask of the scan's shape {like.array.shape[:3]} ({like.path}), found {mask.shape} "
            f"for {path}; resample it"
        )
    if mask.dtype.kind not in "biu" or mask.min() < 0 or mask.max() > 255:
        raise InputError(f"expected integer labels in 0..255, found {mask.dtype} up to {mask.max()} for {path}")
    return np.ascontiguousarray(mask, dtype=np.uint8)


def _with_label_table(image: Any, names: Mapping[int, str]) -> Any:
    import nibabel

    if names:
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension(WORKBENCH_ECODE, label_table(names)))
    return image


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
