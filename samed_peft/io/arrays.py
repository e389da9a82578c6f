"""SAMed's preprocessed files: HDF5 and NumPy archives that hold `image` and `label`, without an affine."""

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io.files import damaged
from samed_peft.io.streams import DEFLATE_FACTOR

_STEP = 1 << 20


def read_hdf5(path: Path, key: str = "image") -> tuple[np.ndarray, None]:
    """Array (D, H, W) or (H, W) of the dataset `key` of an HDF5 file, which lies in that file."""
    import h5py

    if not h5py.is_hdf5(path):
        raise InputError(
            f"{path} cannot be read: it does not begin as HDF5 does; it is damaged or of another format, name it after "
            "its format or fetch it again"
        )
    if (stored := path.stat().st_size) > (end := _end_of_hdf5(path)):
        raise damaged(path, f"it has {stored} bytes and its header claims {end}")
    with h5py.File(path, "r") as file:
        link = file.get(key, getlink=True) if key in file else None
        dataset = file[key] if isinstance(link, h5py.HardLink) else None
        if not isinstance(dataset, h5py.Dataset):
            raise InputError(
                f"expected a dataset {key!r} in {path}, found {', '.join(map(str, file)) or 'nothing'}; store the "
                "array under this name, not behind a link"
            )
        _require_stored(dataset, path)
        return np.asarray(dataset[()]), None


def _end_of_hdf5(path: Path) -> int:
    """Where the superblock says that the file ends; libhdf5 ignores further bytes, and refuses a shorter file itself.

    Format: https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html
    """
    with path.open("rb") as stream:
        head = stream.read(64)
    # A user block of any content may come first; shorter files are refused by libhdf5.
    if not head.startswith(b"\x89HDF") or len(head) < 64:
        return path.stat().st_size
    version = head[8]
    width = head[13] if version < 2 else head[9]
    first = {0: 24, 1: 28}.get(version, 12)
    base, end = (int.from_bytes(head[first + skip : first + skip + width], "little") for skip in (0, 2 * width))
    return base + end


def _require_stored(dataset: Any, path: Path) -> None:
    """Refuse voxels of other files, and a claim that the dataset's bytes cannot hold, before memory is allocated."""
    if dataset.is_virtual or dataset.external:
        raise InputError(f"expected voxels in {path} itself, found those of other files; store the array in the file")
    if dataset.dtype.kind not in "biuf" or not dataset.shape:
        raise InputError(f"expected an array of numbers, found {dataset.dtype} {dataset.shape} in {path}; save numbers")
    claimed, stored = dataset.size * dataset.dtype.itemsize, dataset.id.get_storage_size()
    if dataset.chunks:
        # libhdf5 2.0 takes all memory there is for chunks of fewer or more axes than their dataset.
        if len(dataset.chunks) != dataset.ndim or min(dataset.chunks) < 1:
            raise damaged(path, f"{dataset.name} of shape {dataset.shape} claims chunks {dataset.chunks}")
        chunks = math.prod(-(-length // part) for length, part in zip(dataset.shape, dataset.chunks, strict=True))
        if (found := dataset.id.get_num_chunks()) != chunks:
            raise damaged(path, f"{dataset.name} has {found} of {chunks} chunks")
        most = stored * (DEFLATE_FACTOR if dataset.id.get_create_plist().get_nfilters() else 1)
    else:
        most = stored
    if claimed > min(most, path.stat().st_size * DEFLATE_FACTOR):
        raise damaged(path, f"{dataset.name} claims {claimed} bytes and {stored} are stored")


def read_npz(path: Path, key: str = "image") -> tuple[np.ndarray, None]:
    """Array (D, H, W) or (H, W) under `key` in an `.npz`; pickled objects are refused."""
    try:
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            return _npz_member(archive, key, path), None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise damaged(path, f"it is not a whole .npz archive ({error})") from error


def _npz_member(archive: zipfile.ZipFile, key: str, path: Path) -> np.ndarray:
    names = [entry.filename.removesuffix(".npy") for entry in archive.infolist()]
    if names.count(key) != 1:
        found = ", ".join(names) or "nothing"
        raise InputError(f"expected an array {key!r} in {path}, once, found {found}; save it again with numpy.savez")
    entry = archive.infolist()[names.index(key)]
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
        raise InputError(f"expected .npz as NumPy writes it, found another compression in {path}; use numpy.savez")
    with archive.open(entry) as member:
        shape, is_fortran, dtype = _npy_header(member, path)
        size = math.prod(shape) * dtype.itemsize
        if entry.file_size != member.tell() + size or size > entry.compress_size * DEFLATE_FACTOR:
            raise damaged(
                path, f"{key!r} claims {size} bytes of voxels, {entry.file_size} bytes and {entry.compress_size} packed"
            )
        array = np.empty(shape, dtype, order="F" if is_fortran else "C")
        _fill(member, array.reshape(-1, order="A").view(np.uint8).data, path)
    return array


def _npy_header(member: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the first axis is the fastest, and type."""
    version = np.lib.format.read_magic(member)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise InputError(f"expected an array of numbers, found version {version} of .npy in {path}; save numbers")
    shape, is_fortran, dtype = readers[version](member)
    if dtype.kind not in "biuf" or min(shape, default=0) < 1:
        raise InputError(f"expected an array of numbers, found {dtype} {shape} in {path}; save numbers")
    return shape, is_fortran, dtype


def _fill(member: IO[bytes], view: memoryview, path: Path) -> None:
    done = 0
    while piece := member.read(min(_STEP, len(view) - done) or 1):  # to the end, where the checksum is
        if done + len(piece) > len(view):
            raise damaged(path, "it holds more data than its header claims")
        view[done : done + len(piece)] = piece
        done += len(piece)
    if done < len(view):
        raise damaged(path, f"its header claims {len(view)} bytes and the file has {done}")
