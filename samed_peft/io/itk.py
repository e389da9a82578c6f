"""NRRD and MetaImage files, through SimpleITK: scans, masks, affines and names of labels."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io.atomic import atomic_file
from samed_peft.io.files import damaged
from samed_peft.io.label_names import TEXT_KEY, label_colour, parsed_names, text_of_names
from samed_peft.io.volumes import LPS_TO_RAS, Volume


def damaged_itk(path: Path, error: RuntimeError) -> InputError:
    """The error for a file that ITK cannot read, with the last line of ITK's report."""
    return damaged(path, str(error).strip().splitlines()[-1])


def array_and_affine(image: Any, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Array (D, H, W) and RAS affine of a SimpleITK image.

    Raises:
        InputError: the image is not 3-D or not greyscale.
    """
    import SimpleITK as sitk  # noqa: N813

    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise InputError(
            f"expected a 3-D scan with one number a voxel, found {image.GetDimension()}-D with "
            f"{image.GetNumberOfComponentsPerPixel()} in {path}; export one greyscale volume"
        )
    return sitk.GetArrayFromImage(image), _affine(image)


def _affine(image: Any) -> np.ndarray:
    """RAS affine of a 3-D SimpleITK image or header."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return np.asarray(LPS_TO_RAS @ affine)


def _header(path: Path) -> Any:
    import SimpleITK as sitk  # noqa: N813

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise damaged_itk(path, error) from error
    return reader


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Array (D, H, W) in stored type, and affine.

    Raises:
        InputError: the file is damaged or not a greyscale volume.
    """
    import SimpleITK as sitk  # noqa: N813

    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise damaged_itk(path, error) from error
    return array_and_affine(image, path)


def read_affine(path: Path) -> np.ndarray | None:
    """The affine from the header alone; None if the image is not 3-D.

    Raises:
        InputError: the header is damaged.
    """
    header = _header(path)
    return _affine(header) if header.GetDimension() == 3 else None


def read_names(path: Path) -> dict[int, str] | None:
    """Label -> name from JSON under `labels` or from segments of 3D Slicer; None without either.

    Raises:
        InputError: the header is damaged.
    """
    header = _header(path)
    fields = {key: header.GetMetaData(key) for key in header.GetMetaDataKeys()}
    if TEXT_KEY in fields:
        return parsed_names(fields[TEXT_KEY])
    names = {}
    for key, value in fields.items():
        match = re.fullmatch(r"Segment(\d+)_LabelValue", key)
        if match and value.isdecimal() and f"Segment{match[1]}_Name" in fields:
            names[int(value)] = fields[f"Segment{match[1]}_Name"]
    return dict(sorted(names.items())) or None


def write_nrrd_mask(mask: np.ndarray, like: Volume, path: Path, names: Mapping[int, str]) -> None:
    """Write a uint8 mask that 3D Slicer opens as a named segmentation."""
    _write(mask, like, path, fields=_segment_fields(names, mask) if names else {})


def write_mha_mask(mask: np.ndarray, like: Volume, path: Path, names: Mapping[int, str]) -> None:
    """Write a uint8 mask with the names of its labels as JSON under `labels`."""
    _write(mask, like, path, fields={TEXT_KEY: text_of_names(names)} if names else {})


def _write(mask: np.ndarray, like: Volume, path: Path, *, fields: Mapping[str, str]) -> None:
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


def _segment_fields(names: Mapping[int, str], mask: np.ndarray) -> dict[str, str]:
    """Metadata by which 3D Slicer opens a label map as a named segmentation."""
    fields = {
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_SourceRepresentation": "Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    for index, (label, name) in enumerate(sorted(names.items())):
        values = {
            "ID": f"Segment_{label}",
            "Name": name,
            "NameAutoGenerated": "0",
            "LabelValue": str(label),
            "Layer": "0",
            "Color": " ".join(f"{value:.6g}" for value in label_colour(label)),
            "ColorAutoGenerated": "0",
            "Extent": _extent(mask == label),
        }
        fields |= {f"Segment{index}_{key}": value for key, value in values.items()}
    return fields


def _extent(inside: np.ndarray) -> str:
    """First and last index along x, y and z; last before first for an empty segment."""
    if not inside.any():
        return "0 -1 0 -1 0 -1"
    ends = []
    for axis in (2, 1, 0):
        hit = np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis})))
        ends += [int(hit[0]), int(hit[-1])]
    return " ".join(map(str, ends))
