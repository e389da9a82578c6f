"""Read the headers of DICOM files through pydicom, and sort out which files are images."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from samed_peft.errors import InputError
from samed_peft.io.files import list_folder, naming_unreadable

SUFFIXES = (".dcm", ".dicom", ".ima")
"""Endings of names that only DICOM files have; files of scanners often have none."""

_KEYWORDS = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesDescription", "Modality", "ImageType"),
    *("AcquisitionNumber", "TemporalPositionIdentifier", "EchoNumbers", "ContentTime", "AcquisitionTime"),
    *("TriggerTime", "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
    *("ImagerPixelSpacing", "NominalScannedPixelSpacing", "EstimatedRadiographicMagnificationFactor"),
    *("SpacingBetweenSlices", "SliceThickness", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "NumberOfFrames", "RescaleSlope"),
    *("RescaleIntercept", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    "ModalityLUTSequence",
)
_DEFLATED = "1.2.840.10008.1.2.1.99"
_UNDEFINED = 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class DicomFile:
    """A DICOM file with an image, without its pixels.

    Attributes:
        path: the file.
        header: pydicom's dataset, of which only the elements that this package needs were read.
        is_image: whether its class is one of images of scanners, and not of masks or doses for instance.
        syntax: UID of the transfer syntax; empty if the file does not say it.
        offset: where its pixels begin.
        length: bytes of its pixels; None if they lie in fragments, which compressed ones do.
        inflated: the pixels of a file that is deflated as a whole.
    """

    path: Path
    header: Any
    is_image: bool
    syntax: str
    offset: int = 0
    length: int | None = None
    inflated: bytes | None = None

    def text(self, keyword: str) -> str:
        """An element as text; empty if it is missing or blank."""
        return text_of(self.header, keyword)

    def integer(self, keyword: str, default: int | None = None) -> int:
        """A whole number of two bytes; refused if it is missing and has no default."""
        item = self.header.get_item(tag_of(keyword))
        value = None if item is None else item.value
        if isinstance(value, bytes) and len(value) >= 2:
            return int.from_bytes(value[:2], "little" if item.is_little_endian else "big")
        if isinstance(value, int):
            return value
        if default is None:
            raise InputError(f"expected {keyword} in a DICOM image, found none in {self.path}; export the series again")
        return default

    @property
    def series(self) -> str:
        """Identifier of its series."""
        return self.text("SeriesInstanceUID")

    @property
    def frames(self) -> int:
        """Number of frames; 1 unless the file says otherwise."""
        text = self.text("NumberOfFrames") or "1"
        if not (text.isascii() and text.isdecimal()) or not 1 <= int(text) < 2**20:
            raise InputError(f"expected a NumberOfFrames, found {text[:20]!r} in {self.path}; export the series again")
        return int(text)


@functools.lru_cache(maxsize=256)
def tag_of(keyword: str) -> Any:
    """The tag of an element; pydicom's own search for it takes a third of the time of reading a header."""
    from pydicom.tag import Tag

    return Tag(keyword)


def text_of(dataset: Any, keyword: str) -> str:
    """An element of a dataset as text, values parted by backslashes; empty if it is missing or blank.

    The bytes are taken as they are: pydicom's conversion warns of each value that breaks the letter of the standard.
    """
    item = dataset.get_item(tag_of(keyword))
    value = None if item is None else item.value
    if isinstance(value, bytes):
        return value.decode("latin-1").strip(" \0")
    if isinstance(value, str) or not isinstance(value, Sequence):
        return "" if value is None else str(value).strip(" \0")
    return "\\".join(map(str, value))


def numbers_of(dataset: Any, keyword: str, count: int, path: Path) -> tuple[float, ...] | None:
    """Decimal numbers of an element; None if it is missing or blank, refused if they are others than `count`."""
    text = text_of(dataset, keyword)
    if not text:
        return None
    try:
        numbers = tuple(float(part) for part in text.split("\\"))
    except ValueError:
        numbers = ()
    # Far beyond what float32 holds, or any scanner measures.
    if len(numbers) != count or not all(math.isfinite(number) and abs(number) < 1e30 for number in numbers):
        raise InputError(f"expected {count} numbers as {keyword}, found {text[:80]!r} in {path}; export it again")
    return numbers


def looks_like_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM does, with or without the preamble of 128 bytes."""
    with naming_unreadable(path), path.open("rb") as stream:
        head = stream.read(132)
    if head[128:] == b"DICM":
        return True
    # Older scanners write the elements alone, from group 8 or 2 on, each with a type of two letters or a length.
    if len(head) < 132 or head[:2] not in (b"\x08\0", b"\x02\0") or head[3] != 0:
        return False
    return (head[4:6].isalpha() and head[4:6].isupper()) or int.from_bytes(head[4:8], "little") <= 1024


def read_header(path: Path) -> DicomFile | None:
    """Read the header of a DICOM file; None if it holds no pixels, as a report or DICOMDIR.

    Raises:
        InputError: the file is cut off or damaged, or pydicom cannot read it for another reason.
    """
    import pydicom

    tags = [tag_of(keyword) for keyword in _KEYWORDS]
    with naming_unreadable(path), path.open("rb") as stream:
        try:
            header: Any = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=tags, force=True)
            syntax = text_of(header.file_meta, "TransferSyntaxUID")
            kinds = {text_of(header, "SOPClassUID"), text_of(header.file_meta, "MediaStorageSOPClassUID")} - {""}
            names = [pydicom.uid.UID_dictionary.get(kind, ("",))[0] for kind in kinds]
            inflated = bytes(pydicom.dcmread(path).get("PixelData") or b"") if syntax == _DEFLATED else None
        except (OSError, Warning):
            raise
        except Exception as error:  # on damaged files pydicom raises whatever its code runs into
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            raise InputError(
                f"{path} cannot be read as DICOM, pydicom says: {reason}; fetch or export it again"
            ) from error
        is_standard = any(kind.startswith("1.2.840.10008.") for kind in kinds)
        is_other = len(kinds) == 1 and "Storage" in names[0] and "Image Storage" not in names[0]
        # A class of a manufacturer need not be of images. A file that is cut off has no series yet, or part of a class.
        is_private = len(kinds) == 1 and not is_standard and bool(text_of(header, "SeriesInstanceUID"))
        if header.get_item("Rows") is None and (is_other or is_private):
            return None
        is_image = not is_other
        if inflated is not None:
            return DicomFile(path, header, is_image, syntax, 0, len(inflated), inflated)
        offset, length = _pixel_element(stream, path, is_big_endian=syntax == BIG_ENDIAN)
    return DicomFile(path, header, is_image, syntax, offset, length)


BIG_ENDIAN = "1.2.840.10008.1.2.2"


def _pixel_element(stream: BinaryIO, path: Path, *, is_big_endian: bool) -> tuple[int, int | None]:
    """Where the pixels begin in a file of which pydicom has read all elements before, and how many bytes they have."""
    head = stream.read(12)
    order = "big" if is_big_endian else "little"
    tag = head[:4] if not is_big_endian else head[1::-1] + head[3:1:-1]
    if tag != b"\xe0\x7f\x10\0" or len(head) < 12:
        found = "floating-point pixels" if tag in (b"\xe0\x7f\x08\0", b"\xe0\x7f\x09\0") else "its end"
        raise InputError(
            f"expected pixels of whole numbers after the header, found {found} in {path}; the file is cut off or of a "
            "kind that cannot be read, export the series again"
        )
    is_explicit = head[4:6] in (b"OB", b"OW", b"UN")
    length = int.from_bytes(head[8:12] if is_explicit else head[4:8], order)  # type: ignore[arg-type]
    return stream.tell() - (0 if is_explicit else 4), None if length == _UNDEFINED else length


def image_files(folder: Path) -> list[DicomFile]:
    """Read the headers of all images directly in a folder; other files and other DICOM objects are left out.

    Raises:
        InputError: a file that is an image by its name or its beginning cannot be read, or the folder cannot.
    """
    images: list[DicomFile] = []
    others: list[DicomFile] = []
    odd: list[Path] = []
    for path in _visible_files(folder):
        if not looks_like_dicom(path):
            odd.append(path)
        elif (file := read_header(path)) is not None:
            (images if file.is_image else others).append(file)
    series = {file.series for file in images}
    for file in others:
        if file.series in series and file.series:
            raise InputError(
                f"expected images alone in the series {file.series}, found the class "
                f"{file.text('SOPClassUID')} in {file.path}; the file is damaged or misplaced, move it away"
            )
    suffixes = {_kind_of_name(file.path) for file in images} | set(SUFFIXES)
    for path in odd:
        if _kind_of_name(path) in suffixes and not _is_text(path):
            raise InputError(
                f"expected a DICOM file, as its name and the files beside it are, found {_content(path)} in {path}; "
                "it may be a slice that was damaged or cut off: fetch it again, or move it away if it belongs elsewhere"
            )
    return images


def _visible_files(folder: Path) -> list[Path]:
    """Files directly in a folder, links to missing files among them, which are refused when they are opened."""
    with naming_unreadable(folder):
        paths = [path for path in list_folder(folder) if not path.name.startswith(".")]
        return [path for path in paths if path.is_file() or (path.is_symlink() and not path.exists())]


def has_images(folder: Path) -> bool:
    """Whether an image of DICOM lies directly in a folder, or a file that begins as one and cannot be read."""
    for path in _visible_files(folder):
        try:
            is_dicom = looks_like_dicom(path)
        except InputError:  # told when the file itself is read, if it is a scan at all
            continue
        try:
            file = read_header(path) if is_dicom else None
        except InputError:  # told when the folder is read
            return True
        if file is not None and file.is_image:
            return True
    return False


def modality_of(folder: Path) -> str:
    """Modality of the first image of DICOM directly in a folder, "CT" or "MR" for example; empty if none says it.

    Raises:
        InputError: a file that begins as DICOM cannot be read.
    """
    for path in _visible_files(folder):
        file = read_header(path) if looks_like_dicom(path) else None
        if file is not None and file.is_image:
            return file.text("Modality")
    return ""


def _kind_of_name(path: Path) -> str:
    """The suffix of a name; none if it is a number, as of names that are identifiers."""
    suffix = path.suffix.lower()
    return "" if suffix[1:].isdecimal() else suffix


def _content(path: Path) -> str:
    return "zero bytes" if path.stat().st_size == 0 else "other bytes"


def _is_text(path: Path) -> bool:
    """Whether a file without DICOM's endings is a text beside the images, as README or a list of check sums."""
    if path.suffix.lower() in SUFFIXES:
        return False
    with naming_unreadable(path), path.open("rb") as stream:
        head = stream.read(512)
    return bool(head) and all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in head)
