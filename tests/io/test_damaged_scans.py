"""Scans with damaged headers, cut off, with flipped bits or with content that cannot be used."""

import gzip

import nibabel
import numpy as np
import pytest
from scan_files import AFFINE, WRITERS, Payload, scan_array, write_nifti

from samed_peft import io
from samed_peft.errors import InputError


@pytest.mark.parametrize("keep", [0, 0.5, 0.98])
@pytest.mark.parametrize("suffix", list(WRITERS))
def test_cut_off_files_are_refused(tmp_path, capfd, suffix, keep):
    path = tmp_path / f"scan{suffix}"
    WRITERS[suffix](path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InputError, match=r"scan.*(zero bytes|cannot be read)"):
        io.read_volume(path)


@pytest.mark.parametrize("suffix", list(WRITERS))
def test_files_of_a_few_bytes_are_refused(tmp_path, capfd, suffix):
    path = tmp_path / f"scan{suffix}"
    WRITERS[suffix](path)
    data = path.read_bytes()
    for size in range(64):
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match="scan"):
            io.read_volume(path)


@pytest.mark.parametrize("suffix", [".nii.gz", ".npz"])
def test_flipped_bits_are_noticed(tmp_path, suffix):
    path = tmp_path / f"scan{suffix}"
    if suffix == ".npz":
        np.savez(path, image=np.zeros((9, 9)))
    else:
        noise = np.random.default_rng(0).integers(0, 999, (9, 9, 9), np.int16)
        path.write_bytes(gzip.compress(nibabel.Nifti1Image(noise, AFFINE).to_bytes(), compresslevel=0, mtime=0))
    data = bytearray(path.read_bytes())
    data[600] ^= 4
    path.write_bytes(data)
    with pytest.raises(InputError, match="cannot be read"):
        io.read_volume(path)


def test_bad_content_is_refused(tmp_path):
    nan = scan_array(dtype=np.float32)
    nan[2, 1, 1] = np.nan
    colour = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    flat = AFFINE.copy()
    flat[:, 0] = 0
    write_nifti(tmp_path / "nan.nii.gz", nan)
    write_nifti(tmp_path / "four.nii.gz", np.zeros((2, 3, 4, 5), np.int16))
    write_nifti(tmp_path / "colour.nii.gz", colour)
    image = nibabel.Nifti1Image(scan_array().T, AFFINE)
    image.header.set_sform(flat, code=1)
    image.header.set_qform(None, code=0)
    nibabel.Nifti1Image(scan_array().T, None, image.header).to_filename(tmp_path / "flat.nii.gz")
    np.savez(tmp_path / "hounsfield.npz", image=scan_array())
    np.savez(tmp_path / "other.npz", volume=scan_array())
    (tmp_path / "scan.txt").write_text("no scan")
    (tmp_path / "text.nii").write_text("no scan" * 200)
    expected = {
        "nan.nii.gz": "NaN or infinity in 1 of 60",
        "four.nii.gz": "3-D scan, found 4-D",
        "colour.nii.gz": "one number a voxel",
        "flat.nii.gz": "invertible affine",
        "hounsfield.npz": r"intensities in \[0, 1\]",
        "other.npz": "found volume",
        "scan.txt": "expected .nii.gz",
        "text.nii": "cannot be read",
        "absent.nii.gz": "does not exist",
    }
    for name, message in expected.items():
        with pytest.raises(InputError, match=message) as caught:
            io.read_volume(tmp_path / name)
        assert name in str(caught.value)


def test_objects_in_npz_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "evil.npz", image=np.array([Payload(tmp_path / "ran")], dtype=object))
    with pytest.raises(InputError, match=r"evil\.npz"):
        io.read_volume(tmp_path / "evil.npz")
    assert not (tmp_path / "ran").exists()


def _headers(tmp_path):
    """Damaged NIfTI files, one for each kind of damage."""
    nibabel.save(nibabel.Nifti1Image(np.zeros((6, 5, 4), np.int16), np.eye(4)), tmp_path / "whole.nii")
    data = (tmp_path / "whole.nii").read_bytes()
    packed = bytearray(gzip.compress(np.random.default_rng(0).bytes(4000)))
    packed[15:60] = b"\xff" * 45
    (tmp_path / "packed.nii.gz").write_bytes(packed)
    yield tmp_path / "packed.nii.gz"
    fields = {"type": {"datatype": 77}, "offset": {"vox_offset": -5}, "dimensions": {"dim": [9, 6, 5, 4, 1, 1, 1, 1]}}
    for name, values in fields.items():
        header = nibabel.Nifti1Header(data[:348], check=False)
        for key, value in values.items():
            header.structarr[key] = value
        (tmp_path / f"{name}.nii").write_bytes(header.structarr.tobytes() + data[348:])
        yield tmp_path / f"{name}.nii"


def test_damaged_headers_are_named_by_every_reader(tmp_path):
    for path in _headers(tmp_path):
        for read in (io.read_volume, io.read_affine, io.read_label_names):
            with pytest.raises(InputError, match=f"{path.name} cannot be read"):
                read(path)


@pytest.mark.parametrize("field", ["srow_x", "srow_z"])
@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_an_affine_without_inverse_is_refused_in_the_header(tmp_path, field, value):
    image = nibabel.Nifti1Image(np.zeros((6, 5, 4), np.int16), np.eye(4))
    image.header.structarr[field] = value
    (tmp_path / "a.nii").write_bytes(image.header.structarr.tobytes() + bytes(4 + 240))
    for read in (io.read_volume, io.read_affine):
        with pytest.raises(InputError, match=r"invertible affine.*a\.nii"):
            read(tmp_path / "a.nii")


def test_a_header_that_claims_more_voxels_than_the_file_has(tmp_path):
    header = nibabel.Nifti1Image(np.zeros((6, 5, 4), np.int16), np.eye(4)).header
    header["dim"] = [3, 32767, 32767, 32767, 1, 1, 1, 1]
    (tmp_path / "huge.nii").write_bytes(header.structarr.tobytes() + bytes(4 + 240))
    with pytest.raises(InputError, match=r"huge\.nii cannot be read: .*claims"):
        io.read_volume(tmp_path / "huge.nii")
