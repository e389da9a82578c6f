"""Decode compressed DICOM frames with GDCM, through SimpleITK.

GDCM never sees a file of the user's: it gets frames whose ends were checked, in a file with nothing else but what it
needs to know. A call of it costs as much as decoding a small frame, so frames of one kind go to it together.
"""

import functools
import io
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io.dicom_headers import DicomFile
from samed_peft.io.files import naming_unreadable

_JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
_JPEG = (*(f"1.2.840.10008.1.2.4.{kind}" for kind in (50, 51, 57, 70, 80, 81)), *_JPEG_2000)
_RLE = "1.2.840.10008.1.2.5"

_TOGETHER = 32
"""Frames that are decoded at once; more need more memory and are hardly faster."""

_ITEM = b"\xfe\xff\x00\xe0"


def high_bit(file: DicomFile) -> int:
    """The highest bit of a pixel, as stored."""
    return file.integer("HighBit", file.integer("BitsStored", file.integer("BitsAllocated")) - 1)


def compressed_planes(files: Sequence[DicomFile]) -> Iterator[tuple[DicomFile, np.ndarray]]:
    """Each file with its whole numbers (frames, H, W).

    Raises:
        InputError: pixels are missing or damaged, or their compression cannot be read.
    """
    # One file for all frames, written over: with a new one for each, Linux waits for the disk.
    with (
        tempfile.TemporaryDirectory(prefix="samed_dicom_") as folder,
        (Path(folder) / "frame.dcm").open("wb", buffering=0) as scratch,
    ):
        for _, alike in itertools.groupby(files, _kind):
            for batch in _batches(list(alike)):
                yield from _decoded_files(batch, scratch)


def _batches(files: list[DicomFile]) -> Iterator[list[DicomFile]]:
    for start in range(0, len(files), _TOGETHER):
        yield files[start : start + _TOGETHER]


def _kind(file: DicomFile) -> tuple:
    """What frames must have in common to be decoded together."""
    allocated = file.integer("BitsAllocated")
    bits = (allocated, file.integer("BitsStored", allocated), high_bit(file), file.integer("PixelRepresentation", 0))
    return file.syntax, (file.integer("Rows"), file.integer("Columns")), bits


def _decoded_files(files: list[DicomFile], scratch: FileIO) -> Iterator[tuple[DicomFile, np.ndarray]]:
    frames = [(file, frame) for file in files for frame in _frames(file)]
    planes: list[np.ndarray] = []
    for start in range(0, len(frames), _TOGETHER):
        batch = frames[start : start + _TOGETHER]
        planes += _decoded_together(batch, scratch) or [_decoded(frame, file, scratch) for file, frame in batch]
    start = 0
    for file in files:
        own = planes[start : start + file.frames]
        yield file, own[0][None] if len(own) == 1 else np.stack(own)
        start += file.frames


def _frames(file: DicomFile) -> list[bytes]:
    """The compressed frames of a file."""
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
        frames = list(generate_frames(data, number_of_frames=file.frames))
    except Exception as error:  # on damaged fragments pydicom raises whatever its code runs into
        raise InputError(f"{file.path} has pixels that pydicom refuses: {error!r}; export the series again") from error
    if len(frames) != file.frames:
        raise InputError(f"expected {file.frames} frames, found {len(frames)} in {file.path}; export the series again")
    if file.syntax in _JPEG and not all(frame.rstrip(b"\0").endswith(b"\xff\xd9") for frame in frames):
        raise InputError(f"expected the mark at the end of a JPEG frame, found none in {file.path}; fetch it again")
    return frames


def _require_whole(data: bytes, file: DicomFile) -> None:
    """Refuse fragments that the end of the file cuts off."""
    at = 0
    while data[at : at + 4] == _ITEM:
        at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
    if data[at : at + 4] != b"\xfe\xff\xdd\xe0" or len(data) < at + 8:
        raise InputError(
            f"expected compressed pixels up to the mark of their end, found the end of the file or other bytes after "
            f"{min(at, len(data))} bytes in {file.path}; it was cut off or damaged, fetch it again"
        )


def _decoded_together(frames: Sequence[tuple[DicomFile, bytes]], scratch: FileIO) -> list[np.ndarray]:
    """Frames (H, W) of one kind; none of them if one has to be looked at alone, for its error for instance."""
    syntax, size_hw, bits = _kind(frames[0][0])
    if len(frames) == 1 or syntax not in _JPEG or not all(_says_size(frame, syntax, size_hw) for _, frame in frames):
        return []
    head = _head(syntax, size_hw, bits, len(frames))
    try:
        planes = _gdcm(head, [frame for _, frame in frames], scratch)
    except RuntimeError:
        return []
    whole = np.dtype(f"{'i' if bits[-1] else 'u'}{bits[0] // 8}")
    return list(planes) if planes.shape == (len(frames), *size_hw) and planes.dtype == whole else []


def _says_size(frame: bytes, syntax: str, size_hw: tuple[int, int]) -> bool:
    """Whether the header of a JPEG frame says this size and one number a pixel."""
    if syntax in _JPEG_2000:
        width, height, left, top = (int.from_bytes(frame[at : at + 4], "big") for at in range(8, 24, 4))
        count = int.from_bytes(frame[40:42], "big")
        return frame[:4] == b"\xff\x4f\xff\x51" and (height - top, width - left, count) == (*size_hw, 1)
    at = 2
    while frame[at : at + 1] == b"\xff" and at + 10 <= len(frame):
        marker, length = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4], "big")
        # The markers of frames: C0 to CF without those of tables, and F7 of JPEG-LS.
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width = (int.from_bytes(frame[k : k + 2], "big") for k in (at + 5, at + 7))
            return (height, width, frame[at + 9]) == (*size_hw, 1)
        at += 2 + length
    return False


def _decoded(frame: bytes, file: DicomFile, scratch: FileIO) -> np.ndarray:
    """One frame (H, W) as stored."""
    syntax, size_hw, bits = _kind(file)
    try:
        plane = _gdcm(_head(syntax, size_hw, bits), [frame], scratch)
    except RuntimeError as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise InputError(f"{file.path} has compressed pixels that GDCM refuses: {reason}; export it again") from error
    plane = plane[0] if plane.ndim == 3 else plane
    if plane.shape != size_hw or plane.dtype.kind not in "iu":
        raise InputError(
            f"expected compressed pixels of shape {size_hw}, found {plane.dtype} {plane.shape} in {file.path}; "
            "export the series again"
        )
    return plane


def _gdcm(head: bytes, frames: Sequence[bytes], scratch: FileIO) -> np.ndarray:
    import SimpleITK as sitk  # noqa: N813

    padded = [frame + b"\0" * (len(frame) % 2) for frame in frames]
    fragments = b"".join(_ITEM + len(frame).to_bytes(4, "little") + frame for frame in (b"", *padded))
    scratch.seek(0)
    left = memoryview(head + fragments + b"\xfe\xff\xdd\xe0" + bytes(4))
    while left:
        left = left[scratch.write(left) :]
    scratch.truncate()
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(scratch.name))
    return sitk.GetArrayFromImage(reader.Execute())


@functools.lru_cache(maxsize=16)
def _head(syntax: str, size_hw: tuple[int, int], bits: tuple[int, int, int, int], count: int = 1) -> bytes:
    """A DICOM file up to the fragments of its pixels; the same for all slices of most series."""
    from pydicom import uid
    from pydicom.dataset import Dataset, FileMetaDataset

    many = uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage
    if bits[0] > 8:
        many = uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage
    kind = many if count > 1 else uid.SecondaryCaptureImageStorage
    single = Dataset()
    single.file_meta = FileMetaDataset()
    single.file_meta.TransferSyntaxUID = uid.UID(syntax)
    single.file_meta.MediaStorageSOPClassUID = single.SOPClassUID = kind
    single.file_meta.MediaStorageSOPInstanceUID = single.SOPInstanceUID = uid.UID("1.2.3")
    if count > 1:
        single.NumberOfFrames = count
    single.Rows, single.Columns = size_hw
    single.SamplesPerPixel, single.PhotometricInterpretation = 1, "MONOCHROME2"
    single.BitsAllocated, single.BitsStored, single.HighBit, single.PixelRepresentation = bits
    stream = io.BytesIO()
    single.save_as(stream, enforce_file_format=True)
    return stream.getvalue() + b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff"
