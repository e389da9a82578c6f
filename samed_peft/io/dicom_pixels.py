"""Decode the pixels of DICOM frames: plain ones with NumPy, compressed ones through `dicom_compressed`."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io.dicom_compressed import compressed_planes, high_bit
from samed_peft.io.dicom_geometry import Frame
from samed_peft.io.dicom_headers import BIG_ENDIAN, DicomFile
from samed_peft.io.files import naming_unreadable

_PLAIN = ("", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", BIG_ENDIAN)
_INTEGERS = (np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64)


def require_grey(file: DicomFile) -> None:
    """Refuse an image in colour, with a table of values, or of a number type that scanners do not write."""
    colours, kind = file.integer("SamplesPerPixel", 1), file.text("PhotometricInterpretation").upper()
    if colours != 1 or kind not in ("MONOCHROME2", "MONOCHROME1", ""):
        raise InputError(
            f"expected grey slices, found {colours} numbers a pixel, {kind or 'of unknown meaning'}, in {file.path}; "
            "convert the series to grey, or save single images as PNG"
        )
    if "ModalityLUTSequence" in file.header:
        raise InputError(
            f"expected values scaled by a slope, found a table of values (Modality LUT) in {file.path}; convert the "
            "series to NIfTI with a tool that applies it"
        )
    bits, stored = file.integer("BitsAllocated"), file.integer("BitsStored", file.integer("BitsAllocated"))
    if bits not in (8, 16, 32) or not 1 <= stored <= bits or not stored - 1 <= high_bit(file) < bits:
        raise InputError(
            f"expected pixels of 8, 16 or 32 bits, found {stored} bits in {bits} up to bit {high_bit(file)} in "
            f"{file.path}; export the series again"
        )
    if 0 in (file.integer("Rows"), file.integer("Columns")):
        raise InputError(f"expected Rows and Columns above 0, found 0 in {file.path}; export the series again")


def rescaled(frames: Sequence[Frame]) -> np.ndarray:
    """Array (D, H, W) of frames of one size in the scanner's units, each by its own slope and intercept.

    Whole numbers stay whole, in the smallest type that holds all that the files may store; others are float64.

    Raises:
        InputError: pixels are missing or damaged, or their compression cannot be read.
    """
    scales = [_scale(frame) for frame in frames]
    dtype = _common_type(frames, scales)
    array = np.empty((len(frames), *frames[0].size_hw), dtype)
    of_file: dict[DicomFile, list[int]] = defaultdict(list)
    for k, frame in enumerate(frames):
        of_file[frame.file].append(k)
    for file, planes in _stored_planes(list(of_file)):
        for k in of_file[file]:
            slope, intercept = scales[k]
            array[k] = planes[frames[k].index]
            if slope != 1:
                array[k] *= dtype.type(slope)
            if intercept != 0:
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


def _stored_planes(files: Sequence[DicomFile]) -> Iterator[tuple[DicomFile, np.ndarray]]:
    """Each file with its array (frames, H, W) as stored, without bits that do not belong to the pixels."""
    packed = [file for file in files if file.length is None]
    yield from ((file, _pixel_bits(file, _plain(file))) for file in files if file.length is not None)
    yield from ((file, _pixel_bits(file, planes)) for file, planes in compressed_planes(packed))


def _pixel_bits(file: DicomFile, planes: np.ndarray) -> np.ndarray:
    planes = planes.astype(_stored_type(file), copy=False)
    allocated = 8 * planes.dtype.itemsize
    stored = file.integer("BitsStored", allocated)
    if stored < allocated:
        # Overlays may lie in the other bits. Shifting right again fills them with the sign.
        planes = (planes << (allocated - 1 - high_bit(file))) >> (allocated - stored)
    return planes


def _plain(file: DicomFile) -> np.ndarray:
    if file.syntax not in _PLAIN:
        raise InputError(
            f"expected compressed pixels in fragments, as the transfer syntax {file.syntax} has them, found others in "
            f"{file.path}; export the series again"
        )
    dtype, shape = _stored_type(file), (file.frames, file.integer("Rows"), file.integer("Columns"))
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
