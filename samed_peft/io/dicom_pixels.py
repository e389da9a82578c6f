"""Decode the pixels of DICOM frames: plain ones with NumPy, compressed ones with GDCM through SimpleITK."""

import functools
import io
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io.dicom_geometry import Frame
from samed_peft.io.dicom_headers import BIG_ENDIAN, DicomFile
from samed_peft.io.files import naming_unreadable

_PLAIN = ("", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", BIG_ENDIAN)
_JPEG = tuple(f"1.2.840.10008.1.2.4.{kind}" for kind in (50, 51, 57, 70, 80, 81, 90, 91))
_RLE = "1.2.840.10008.1.2.5"
_INTEGERS = (np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64)


def require_grey(file: DicomFile) -> None:
    """Refuse an image in colour, and one of a number type that scanners do not write."""
    colours, kind = file.integer("SamplesPerPixel", 1), file.text("PhotometricInterpretation").upper()
    if colours != 1 or kind not in ("MONOCHROME2", "MONOCHROME1", ""):
        raise InputError(
            f"expected grey slices, found {colours} numbers a pixel, {kind or 'of unknown meaning'}, in {file.path}; "
            "convert the series to grey, or save single images as PNG"
        )
    bits, stored = file.integer("BitsAllocated"), file.integer("BitsStored", file.integer("BitsAllocated"))
    if bits not in (8, 16, 32) or not 1 <= stored <= bits or not stored - 1 <= _high_bit(file) < bits:
        raise InputError(
            f"expected pixels of 8, 16 or 32 bits, found {stored} bits in {bits} up to bit {_high_bit(file)} in "
            f"{file.path}; export the series again"
        )
    if 0 in (file.integer("Rows"), file.integer("Columns")):
        raise InputError(f"expected Rows and Columns above 0, found 0 in {file.path}; export the series again")


def _high_bit(file: DicomFile) -> int:
    return file.integer("HighBit", file.integer("BitsStored", file.integer("BitsAllocated")) - 1)


def rescaled(frames: Sequence[Frame]) -> np.ndarray:
    """Array (D, H, W) of frames of one size in the scanner's units, each by its own slope and intercept.

    Whole numbers stay whole, in the smallest type that holds all that the files may store; others are float64.

    Raises:
        InputError: pixels are missing or damaged, or their compression cannot be read.
    """
    scales = [_scale(frame) for frame in frames]
    dtype = _common_type(frames, scales)
    array = np.empty((len(frames), *frames[0].size_hw), dtype)
    of_file: dict[Path, list[int]] = defaultdict(list)
    for k, frame in enumerate(frames):
        of_file[frame.file.path].append(k)
    with tempfile.TemporaryDirectory(prefix="samed_dicom_") as folder:
        for ks in of_file.values():
            planes = _stored_planes(frames[ks[0]].file, Path(folder))
            for k in ks:
                slope, intercept = scales[k]
                array[k] = planes[frames[k].index]
                if (slope, intercept) != (1.0, 0.0):
                    array[k] *= dtype.type(slope)
                    array[k] += dtype.type(intercept)
    return array


def _scale(frame: Frame) -> tuple[float, float]:
    """RescaleSlope and RescaleIntercept."""
    (slope,) = frame.numbers("RescaleSlope") or (1.0,)
    (intercept,) = frame.numbers("RescaleIntercept") or (0.0,)
    if slope == 0:
        raise InputError(f"expected a RescaleSlope other than 0, found 0 in {frame}; export the series again")
    return slope, intercept


def _common_type(frames: Sequence[Frame], scales: Sequence[tuple[float, float]]) -> np.dtype[Any]:
    """The smallest type that holds stored values, factors and results of all frames exactly."""
    if not all(value.is_integer() for scale in scales for value in scale):
        return np.dtype(np.float64)
    values: set[int] = set()
    for frame, (slope, intercept) in zip(frames, scales, strict=True):
        limits = np.iinfo(_stored_type(frame.file))
        shift = limits.bits - frame.file.integer("BitsStored", limits.bits)
        ends = [int(limits.min) >> shift, int(limits.max) >> shift]
        values |= {int(slope), int(intercept), *ends, *(int(slope) * end for end in ends)}
        values |= {int(slope) * end + int(intercept) for end in ends}
    fitting = (kind for kind in _INTEGERS if np.iinfo(kind).min <= min(values) and max(values) <= np.iinfo(kind).max)
    return np.dtype(next(fitting, np.float64))


def _stored_type(file: DicomFile) -> np.dtype[Any]:
    kind = "i" if file.integer("PixelRepresentation", 0) else "u"
    order = ">" if file.syntax == BIG_ENDIAN else "<"
    return np.dtype(f"{order}{kind}{file.integer('BitsAllocated') // 8}")


def _stored_planes(file: DicomFile, folder: Path) -> np.ndarray:
    """Array (frames, H, W) as stored, without bits that do not belong to the pixels."""
    shape = (file.frames, file.integer("Rows"), file.integer("Columns"))
    planes = _plain(file, shape) if file.length is not None else _compressed(file, shape, folder)
    allocated = 8 * planes.dtype.itemsize
    stored = file.integer("BitsStored", allocated)
    if stored < allocated:
        # Overlays may lie in the other bits. Shifting right again fills them with the sign.
        planes = (planes << (allocated - 1 - _high_bit(file))) >> (allocated - stored)
    return planes


def _plain(file: DicomFile, shape: tuple[int, ...]) -> np.ndarray:
    if file.syntax not in _PLAIN:
        raise InputError(
            f"expected compressed pixels in fragments, as the transfer syntax {file.syntax} has them, found others in "
            f"{file.path}; export the series again"
        )
    dtype = _stored_type(file)
    if file.syntax == BIG_ENDIAN and dtype.itemsize == 1:
        raise InputError(
            f"expected 16 bits in big-endian pixels, found 8 in {file.path}; convert it to explicit little endian, "
            "with dcmconv +te for instance"
        )
    count, found = int(np.prod(shape, dtype=np.int64)), file.length or 0
    if file.inflated is None:
        found = min(found, file.path.stat().st_size - file.offset)
    if found < count * dtype.itemsize:
        raise InputError(
            f"expected {count * dtype.itemsize} bytes of pixels for {' x '.join(map(str, shape))}, found {found} in "
            f"{file.path}; it was probably cut off while being copied, fetch it again"
        )
    if file.inflated is not None:
        return np.frombuffer(file.inflated, dtype, count).reshape(shape)
    with naming_unreadable(file.path):
        return np.fromfile(file.path, dtype, count, offset=file.offset).reshape(shape)


def _compressed(file: DicomFile, shape: tuple[int, ...], folder: Path) -> np.ndarray:
    from pydicom.encaps import generate_frames

    if file.syntax not in (*_JPEG, _RLE):
        raise InputError(
            f"expected JPEG, JPEG-LS, JPEG 2000 or RLE as compression, found the transfer syntax {file.syntax or '?'} "
            f"in {file.path}; decompress the series first, with gdcmconv --raw or dcmconv for instance"
        )
    with naming_unreadable(file.path), file.path.open("rb") as stream:
        stream.seek(file.offset)
        data = stream.read()
    _require_whole(data, file)
    try:
        frames = list(generate_frames(data, number_of_frames=shape[0]))
    except Exception as error:  # on damaged fragments pydicom raises whatever its code runs into
        raise InputError(f"{file.path} has pixels that pydicom refuses: {error!r}; export the series again") from error
    if len(frames) != shape[0]:
        raise InputError(f"expected {shape[0]} frames, found {len(frames)} in {file.path}; export the series again")
    return np.stack([_decoded(frame, file, shape[1:], folder) for frame in frames])


def _require_whole(data: bytes, file: DicomFile) -> None:
    """Refuse fragments that the end of the file cuts off."""
    at = 0
    while data[at : at + 4] == b"\xfe\xff\x00\xe0":
        at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
    if data[at : at + 4] != b"\xfe\xff\xdd\xe0" or len(data) < at + 8:
        raise InputError(
            f"expected compressed pixels up to the mark of their end, found the end of the file or other bytes after "
            f"{min(at, len(data))} bytes in {file.path}; it was cut off or damaged, fetch it again"
        )


def _decoded(frame: bytes, file: DicomFile, size_hw: tuple[int, ...], folder: Path) -> np.ndarray:
    """One frame (H, W) as stored. GDCM gets a file with nothing but this frame and what it needs to know."""
    import SimpleITK as sitk  # noqa: N813

    if file.syntax in _JPEG and not frame.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise InputError(f"expected the mark at the end of a JPEG frame, found none in {file.path}; fetch it again")
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(_single_frame(frame, file, size_hw, folder)))
    try:
        plane = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise InputError(f"{file.path} has compressed pixels that GDCM refuses: {reason}; export it again") from error
    plane = plane[0] if plane.ndim == 3 else plane
    if plane.shape != size_hw or plane.dtype.kind not in "iu":
        raise InputError(
            f"expected compressed pixels of shape {size_hw}, found {plane.dtype} {plane.shape} in {file.path}; "
            "export the series again"
        )
    return plane.astype(_stored_type(file), copy=False)


def _single_frame(frame: bytes, file: DicomFile, size_hw: tuple[int, ...], folder: Path) -> Path:
    allocated = file.integer("BitsAllocated")
    bits = (allocated, file.integer("BitsStored", allocated), _high_bit(file), file.integer("PixelRepresentation", 0))
    path, padded = folder / "frame.dcm", frame + b"\0" * (len(frame) % 2)
    fragments = _ITEM + bytes(4) + _ITEM + len(padded).to_bytes(4, "little") + padded + b"\xfe\xff\xdd\xe0" + bytes(4)
    path.write_bytes(_head_of_frame(file.syntax, size_hw, bits) + fragments)
    return path


_ITEM = b"\xfe\xff\x00\xe0"


@functools.lru_cache(maxsize=16)
def _head_of_frame(syntax: str, size_hw: tuple[int, ...], bits: tuple[int, int, int, int]) -> bytes:
    """A DICOM file up to the fragments of its pixels; the same for all slices of most series."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID, SecondaryCaptureImageStorage

    single = Dataset()
    single.file_meta = FileMetaDataset()
    single.file_meta.TransferSyntaxUID = UID(syntax)
    single.file_meta.MediaStorageSOPClassUID = single.SOPClassUID = SecondaryCaptureImageStorage
    single.file_meta.MediaStorageSOPInstanceUID = single.SOPInstanceUID = UID("1.2.3")
    single.Rows, single.Columns = size_hw
    single.SamplesPerPixel, single.PhotometricInterpretation = 1, "MONOCHROME2"
    single.BitsAllocated, single.BitsStored, single.HighBit, single.PixelRepresentation = bits
    stream = io.BytesIO()
    single.save_as(stream, enforce_file_format=True)
    return stream.getvalue() + b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff"
