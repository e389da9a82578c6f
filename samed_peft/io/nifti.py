"""NIfTI files: scans, masks, affines and names of labels."""

import contextlib
import gzip
import io
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io.atomic import atomic_file, write_bytes
from samed_peft.io.files import damaged
from samed_peft.io.label_names import label_colour
from samed_peft.io.streams import GZIP_MAGIC, Source
from samed_peft.io.volumes import Volume, warn_of_shear

SUFFIXES = (".nii.gz", ".nii")

_WORKBENCH_ECODE = 30
"""NIfTI's registered code for the XML of Caret and Connectome Workbench."""

_GEOMETRY_FIELDS = (
    *("pixdim", "qform_code", "sform_code", "xyzt_units", "srow_x", "srow_y", "srow_z"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)


_MILLIMETRES = {1: 1000.0, 3: 0.001}
"""Metres and micrometres among the codes of `xyzt_units`; others, as the unknown 0, are read as millimetres."""

_QUATERNION_ROUNDING = 1e-3
"""How far a stored quaternion's squared length may exceed 1."""


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Source]]:
    """The header, with its extensions, and the data after it, packed or not whatever the name says."""
    with path.open("rb") as stream:
        is_packed = stream.read(2) == GZIP_MAGIC
        stream.seek(0)
        source = Source(stream, path, is_packed=is_packed)
        yield _header(source, path), source


def _header(source: Source, path: Path) -> Any:
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    start = source.read(4)
    if start not in {size.to_bytes(4, order) for size in (348, 540) for order in ("little", "big")}:
        raise InputError(
            f"{path} cannot be read: it does not begin with a NIfTI header; it is damaged or of another format, name "
            "it after its format or fetch it again"
        )
    kind: Any = Nifti2Header if 540 in (int.from_bytes(start, "little"), int.from_bytes(start, "big")) else Nifti1Header
    data = start + source.read(kind.template_dtype.itemsize - len(start))
    # Unchecked: nibabel's checks set some of these fields right and write it to the log.
    stored = kind(data, check=False)
    if stored["magic"].item() == kind.pair_magic:
        raise InputError(f"{path} cannot be read: it is the header of a .hdr and .img pair; save it as a single file")
    begin = float(stored["vox_offset"]) or kind.single_vox_offset  # some writers leave 0
    if not kind.single_vox_offset <= begin < math.inf:
        raise damaged(
            path, f"its header says that voxels begin at byte {begin:g}, and is {kind.single_vox_offset} long"
        )
    header = kind.from_fileobj(io.BytesIO(data + source.read(int(begin) - len(data))))
    bits = 8 * header.get_data_dtype().itemsize
    if stored["bitpix"] != bits:
        raise damaged(path, f"its header says {header.get_data_dtype()} and {stored['bitpix']} bits a voxel")
    _normalise_quaternion(header)
    return header


def _normalise_quaternion(header: Any) -> None:
    """Shorten a quaternion that rounding made longer than 1, at which nibabel gives up."""
    fields = ("quatern_b", "quatern_c", "quatern_d")
    squared = sum(float(header[field]) ** 2 for field in fields)
    if 1 < squared <= 1 + _QUATERNION_ROUNDING:
        for field in fields:
            header[field] = float(header[field]) / math.sqrt(squared)


def _shape_xyz(header: Any) -> tuple[int, ...]:
    """The stored shape, of at least three axes and without those of length one after the third."""
    shape = [int(length) for length in header.get_data_shape()]
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    return (*shape, 1) if len(shape) == 2 else tuple(shape)


def _affine(header: Any) -> np.ndarray:
    """The affine in millimetres."""
    affine = np.array(header.get_best_affine(), dtype=np.float64)
    affine[:3] *= _MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)
    return affine


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Array (D, H, W), or (C, D, H, W) of a 4-D file, in stored type (float64 if the header scales), and affine."""
    from nibabel.volumeutils import apply_read_scaling

    with _opened(path) as (header, source):
        dtype = header.get_data_dtype()
        if dtype.kind not in "iuf":
            raise InputError(f"expected one number a voxel, found {dtype} in {path}; export it as greyscale")
        slope, inter = header.get_slope_inter()
        slope, inter = np.float64(1 if slope is None else slope), np.float64(0 if inter is None else inter)
        affine = _affine(header)
        array = source.array(_shape_xyz(header)[::-1], dtype)
        source.finish()
    # Unscaled values need no detour through float64, which would double the memory.
    return array if (slope, inter) == (1, 0) else np.asarray(apply_read_scaling(array, slope, inter), float), affine


def read_affine(path: Path) -> np.ndarray:
    """The affine from the header alone."""
    with _opened(path) as (header, _):
        return _affine(header)


def read_names(path: Path) -> dict[int, str] | None:
    """Label -> name from a label table of Connectome Workbench; None without one."""
    with _opened(path) as (header, _):
        # TotalSegmentator leaves the code at 0.
        tables = [_parsed_table(e.content) for e in header.extensions if e.get_code() in (0, _WORKBENCH_ECODE)]
    return next((names for names in tables if names), None)


def _parsed_table(content: bytes) -> dict[int, str]:
    """Label -> name in the XML of an extension; empty for another program's XML."""
    # No label table needs a DTD, whose entities may grow without bound.
    if b"<!DOCTYPE" in content:
        return {}
    try:
        labels = ElementTree.fromstring(content.rstrip(b"\x00 \n")).iter("Label")
        names = {int(entry.attrib["Key"]): (entry.text or "").strip() for entry in labels}
    except (ElementTree.ParseError, LookupError, ValueError):
        return {}
    return {label: name for label, name in names.items() if label > 0}


def write_mask(mask: np.ndarray, like: Volume, path: Path, names: Mapping[int, str]) -> None:
    """Write a uint8 mask; that of a NIfTI scan keeps its qform and sform with their codes and its units."""
    import nibabel

    scan_header = _scan_header(like)
    image = _new_image(mask, like.affine) if scan_header is None else _mask_image(mask, scan_header)
    if names:
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension(_WORKBENCH_ECODE, _label_table(names)))
    _write(image, path)
    if scan_header is None:
        warn_of_shear(like, path)


def write_probabilities(probabilities: np.ndarray, like: Volume, path: str | Path) -> None:
    """Write probabilities as 4-D NIfTI on a scan's own grid, scaled to [0, 1] by its header, atomically.

    Volume k holds the k-th class, 0 the background. Programs that honour `scl_slope` show probabilities, among them
    nibabel and SimpleITK.

    Args:
        probabilities: (K + 1, D, H, W) uint8 or uint16, of which 255 or 65535 stands for 1.
        like: the scan, (D, H, W).
        path: `.nii.gz` or `.nii`; missing parent folders are made.

    Raises:
        InputError: the array is not on the scan's grid or of another type, or the suffix is another one.
    """
    with writing_probabilities(probabilities, like, path):
        pass


@contextlib.contextmanager
def writing_probabilities(probabilities: np.ndarray, like: Volume, path: str | Path) -> Iterator[None]:
    """`write_probabilities`, whose file appears at the end of the `with` block, unless the block raises an error."""
    path = Path(path)
    if not path.name.lower().endswith(SUFFIXES):
        raise InputError(f"expected a name ending in {' or '.join(SUFFIXES)}, found {path}; choose one of these")
    if probabilities.shape[1:] != like.array.shape[:3] or probabilities.dtype not in (np.uint8, np.uint16):
        raise InputError(
            f"expected uint8 or uint16 probabilities of {like.array.shape[:3]} voxels a class, as {like.path} has, "
            f"found {probabilities.dtype} {probabilities.shape} for {path}; take those of predict_probabilities"
        )
    scan_header = _scan_header(like)
    with atomic_file(path) as temporary:
        with temporary.open("wb") as stream:
            if path.name.lower().endswith(".gz"):
                # Higher levels save a tenth of the bytes in twice the time. A fixed time stamp, as in `_write`.
                with gzip.GzipFile("", "wb", compresslevel=1, fileobj=stream, mtime=0) as packed:
                    _write_scaled(probabilities, like, scan_header, packed.write)
            else:
                _write_scaled(probabilities, like, scan_header, stream.write)
        yield
    if scan_header is None:
        warn_of_shear(like, path)


def _write_scaled(
    probabilities: np.ndarray, like: Volume, scan_header: Any, write: Callable[[bytes | memoryview], object]
) -> None:
    """Write header and voxels, slice by slice, so that no second copy of them is in memory."""
    blank = np.zeros(like.array.shape[:3], np.uint8)
    header = (_new_image(blank, like.affine) if scan_header is None else _mask_image(blank, scan_header)).header
    header.set_data_dtype(probabilities.dtype)
    header.set_data_shape(probabilities.shape[::-1])
    header["pixdim"][4] = 1
    header["scl_slope"], header["scl_inter"] = 1 / np.iinfo(probabilities.dtype).max, 0
    header["vox_offset"], header["magic"] = header.single_vox_offset, header.single_magic
    write(header.binaryblock + bytes(header.single_vox_offset - len(header.binaryblock)))
    for part in probabilities:
        for slice_yx in part:
            write(np.ascontiguousarray(slice_yx).data)


def _mask_image(mask: np.ndarray, scan_header: Any) -> Any:
    import nibabel

    # NIfTI-2 stores the affine in float64, which float32 would move.
    kind = nibabel.Nifti2Image if isinstance(scan_header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    header = kind.header_class()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(mask.shape[::-1])
    for field in _GEOMETRY_FIELDS:
        header[field] = scan_header[field]
    header["pixdim"][4:] = 0  # a scan may keep its repetition time there
    # Without an affine argument the header's codes stay as they are.
    return kind(mask.T, None, header)


def _scan_header(like: Volume) -> Any:
    """The header of the NIfTI file that `like` was read from; None for other scans and for a file changed since."""
    path = like.path
    if like.affine is None or path is None or not path.name.lower().endswith(SUFFIXES) or not path.is_file():
        return None
    with _opened(path) as (header, _):
        # A fourth axis holds channels, one of which `like` is.
        same_shape = _shape_xyz(header)[:3] == like.array.shape[::-1]
        tolerance_mm = 1e-4 * min(like.spacing_zyx_mm)
        return header if same_shape and np.allclose(_affine(header), like.affine, atol=tolerance_mm) else None


def _new_image(array: np.ndarray, affine: np.ndarray | None) -> Any:
    import nibabel

    image: Any = nibabel.Nifti1Image(array.T, np.eye(4) if affine is None else affine)
    image.header.set_xyzt_units("mm")
    if affine is not None:
        image.set_sform(affine, code=1)
        # Some viewers read the qform only. It cannot express a shear (axes not at right angles, by more than the
        # rounding of stored cosines), so a sheared grid goes without one.
        axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        image.set_qform(affine, code=0 if np.abs(axes.T @ axes - np.eye(3)).max() > 1e-5 else 1)
    return image


def _label_table(names: Mapping[int, str]) -> bytes:
    """XML of a Caret volume with a label table, as Workbench and TotalSegmentator write it."""
    root = ElementTree.Element("CaretExtension")
    volume = ElementTree.SubElement(root, "VolumeInformation", Index="0")
    table = ElementTree.SubElement(volume, "LabelTable")
    for label, name in sorted({0: "background", **names}.items()):
        colour = (0.0, 0.0, 0.0) if label == 0 else label_colour(label)
        entry = ElementTree.SubElement(table, "Label", Key=str(label))
        for key, value in zip(("Red", "Green", "Blue", "Alpha"), (*colour, float(label > 0)), strict=True):
            entry.set(key, f"{value:.6g}")
        entry.text = name
    ElementTree.SubElement(volume, "VolumeType").text = "Label"
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def _write(image: Any, path: Path) -> None:
    data: bytes = image.to_bytes()
    # A fixed time stamp, so that equal images give equal files.
    write_bytes(path, gzip.compress(data, compresslevel=6, mtime=0) if path.name.lower().endswith(".gz") else data)


def write_volume(volume: Volume, path: str | Path) -> None:
    """Write a scan as NIfTI in its own number type, atomically; equal scans give equal bytes.

    Args:
        volume: array (D, H, W) of uint8, int16, int32, float32 or float64; without affine: the identity.
        path: `.nii.gz` or `.nii`; missing parent folders are made.

    Raises:
        InputError: the array is not 3-D or of another type, or the suffix is another one.
    """
    path, array = Path(path), volume.array
    if array.ndim != 3 or array.dtype not in (np.uint8, np.int16, np.int32, np.float32, np.float64):
        raise InputError(f"expected a 3-D scan of numbers, found {array.dtype} {array.shape} for {path}")
    if not path.name.lower().endswith(SUFFIXES):
        raise InputError(f"expected a scan name ending in {' or '.join(SUFFIXES)}, found {path}; choose one of these")
    _write(_new_image(array, volume.affine), path)
