"""SAMed's preprocessed files: HDF5 and NumPy archives that hold `image` and `label`, without an affine."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io.files import damaged, naming_damaged


def _in_3d(array: np.ndarray) -> tuple[np.ndarray, None]:
    return array[None] if array.ndim == 2 else array, None


def read_hdf5(path: Path, key: str = "image") -> tuple[np.ndarray, None]:
    """Array (D, H, W) of the dataset `key` of an HDF5 file."""
    import h5py

    with naming_damaged(path, OSError, RuntimeError), h5py.File(path, "r") as file:
        if not isinstance(file.get(key), h5py.Dataset):
            raise InputError(f"expected a dataset {key!r} in {path}, found {', '.join(file) or 'nothing'}")
        return _in_3d(np.asarray(file[key][()]))


def read_npz(path: Path, key: str = "image") -> tuple[np.ndarray, None]:
    """Array (D, H, W) under `key` in an `.npz`; pickled objects are refused."""
    errors = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)
    # Through a handle of our own, which we can close when numpy gives up half-way.
    with naming_damaged(path, *errors), path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise damaged(path, "not an .npz archive")
        if key not in file:
            raise InputError(f"expected an array {key!r} in {path}, found {', '.join(file) or 'nothing'}")
        return _in_3d(np.asarray(file[key]))
