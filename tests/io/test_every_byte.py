"""Files whose header does not account for each byte, contradicts itself, or points to other files."""

import gzip
import io as streams
import re
import zipfile
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scan_files import AFFINE, WRITERS, scan_array, write_itk, write_nifti

from samed_peft import io
from samed_peft.errors import InputError
from samed_peft.io.files import naming_any_error


def _nifti(dtype=np.int16):
    return bytearray(nibabel.Nifti1Image(scan_array(dtype=dtype).T, AFFINE).to_bytes())


def _refused(path, data, message):
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        io.read_volume(path)
    assert path.name in str(caught.value)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_data_after_the_voxels_are_refused(tmp_path, suffix):
    path = tmp_path / f"scan{suffix}"
    data = WRITERS[suffix](path).read_bytes()
    _refused(path, data + b"\n", "more data than its header claims|other bytes follow")


def test_headers_that_claim_fewer_or_smaller_voxels_are_refused(tmp_path):
    fewer, smaller = _nifti(), _nifti()
    fewer[46:48] = (4).to_bytes(2, "little")  # of five slices
    _refused(tmp_path / "fewer.nii", fewer, "more data than")
    _refused(tmp_path / "fewer.nii.gz", gzip.compress(fewer), "more data than")
    smaller[72:74] = (8).to_bytes(2, "little")
    _refused(tmp_path / "bits.nii", smaller, "int16 and 8 bits")
    for suffix in (".mha", ".nrrd"):
        data = write_itk(tmp_path / f"a{suffix}").read_bytes()
        for old, new in ((b"3 4 5", b"3 4 4"), (b"MET_SHORT", b"MET_CHAR"), (b"type: short", b"type: uchar")):
            if old in data:
                _refused(tmp_path / f"less{suffix}", data.replace(old, new), "more data than")


def _packed_mha(tmp_path):
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 99, (9, 9, 9)).astype(np.int16))
    sitk.WriteImage(image, str(tmp_path / "packed.mha"), useCompression=True)
    return (tmp_path / "packed.mha").read_bytes()


def test_flipped_bits_in_compressed_metaimage_are_noticed(tmp_path):
    data = _packed_mha(tmp_path)
    start = data.index(b"LOCAL\n") + 6
    for position in np.linspace(start, len(data) - 1, 9, dtype=int):
        flipped = bytearray(data)
        flipped[position] ^= 4
        _refused(tmp_path / "flipped.mha", flipped, "cannot be read: .*(compressed|claims)")


def test_checksums_and_members_of_gzip(tmp_path):
    plain = bytes(_nifti())
    packed = gzip.compress(plain, mtime=0)
    (tmp_path / "members.nii.gz").write_bytes(gzip.compress(plain[:400]) + gzip.compress(plain[400:]))
    np.testing.assert_array_equal(io.read_volume(tmp_path / "members.nii.gz").array, scan_array())
    for data in (packed + packed, packed + bytes(9), packed[:-8] + bytes(4) + packed[-4:], packed[:-4], packed[:-9]):
        _refused(tmp_path / "bad.nii.gz", data, "cannot be read: .*damaged")


def test_a_member_of_npz_that_stands_twice_is_refused(tmp_path):
    members = []
    for value in (0.0, 1.0):
        buffer = streams.BytesIO()
        np.save(buffer, np.full((4, 4), value, np.float32))
        members.append(buffer.getvalue())
    with zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive:
        archive.writestr("image.npy", members[0])
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("image.npy", members[1])
    with pytest.raises(InputError, match=r"once, found image, image.*savez"):
        io.read_volume(tmp_path / "twice.npz")


def test_claims_are_compared_before_memory_is_allocated(tmp_path):
    """A few kilobytes that claim terabytes: numpy would raise MemoryError, or the machine would swap."""
    huge = _nifti()
    huge[42:48] = b"\xff\x7f" * 3
    _refused(tmp_path / "huge.nii.gz", gzip.compress(huge), "claims .* at most")
    text = b"NRRD0004\ntype: double\ndimension: 3\nsizes: 99999 99999 99999\nendian: little\nencoding: gzip\n\n"
    _refused(tmp_path / "huge.nrrd", text + gzip.compress(bytes(9)), "claims .* at most")
    _refused(tmp_path / "huge.mha", _packed_mha(tmp_path).replace(b"9 9 9", b"99999 99999 99999"), "claims .* at most")
    buffer = streams.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f8", "fortran_order": False, "shape": (10**5,) * 3})
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("image.npy", buffer.getvalue())
    with h5py.File(tmp_path / "huge.npy.h5", "w") as file:
        file.create_dataset("image", (10**5,) * 3, "f8", chunks=(10, 10, 10), compression="gzip")
    for name in ("huge.npz", "huge.npy.h5"):
        with pytest.raises(InputError, match=f"{name} cannot be read: .*(claims|chunks)"):
            io.read_volume(tmp_path / name)


def test_more_data_than_claimed_are_not_unpacked(tmp_path):
    import tracemalloc

    _refused(tmp_path / "warm.nii.gz", gzip.compress(bytes(_nifti()) + b"0"), "more data than")
    bomb = gzip.compress(bytes(_nifti()) + bytes(1 << 26), compresslevel=1)
    tracemalloc.start()
    _refused(tmp_path / "bomb.nii.gz", bomb, "more data than")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22


HEADER_LINES = {
    ".nrrd": [b"a" * 1000, b"dimension: -1", b"dimension: 999", b"sizes: 3 4 x", b"sizes: 0 4 5", b"encoding: zip"],
    ".mha": [
        b"NDims = -1",
        b"NDims = 999",
        b"DimSize = 3 4 x",
        b"DimSize = 3 4",
        b"ElementType = MET_ODD",
        b"a" * 1000,
    ],
}


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_headers_at_which_itk_crashes_or_hangs_are_refused(tmp_path, suffix):
    data = write_itk(tmp_path / f"a{suffix}").read_bytes()
    for line in HEADER_LINES[suffix]:
        name = re.escape(re.split(b"[:=]", line)[0].strip())
        changed, count = re.subn(rb"(?m)^" + name + rb" ?[:=].*$", line, data, count=1)
        _refused(
            tmp_path / f"b{suffix}", changed if count else data.replace(b"\n", b"\n" + line + b"\n", 1), "b.(nrrd|mha)"
        )
        doubled = data.replace(b"\n", b"\n" + data.split(b"\n")[2 if suffix == ".mha" else 3] + b"\n", 1)
        _refused(tmp_path / f"c{suffix}", doubled, "doubled")


def test_detached_voxels_come_from_the_headers_folder_alone(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    voxels = scan_array().astype("<i2").tobytes()
    for place in (tmp_path, folder):
        (place / "v.raw").write_bytes(voxels)
    (folder / "link.raw").symlink_to(tmp_path / "v.raw")
    heads = {
        ".nrrd": "NRRD0004\ntype: short\ndimension: 3\nsizes: 3 4 5\nendian: little\nencoding: raw\ndata file: {}\n",
        ".mha": "ObjectType = Image\nNDims = 3\nDimSize = 3 4 5\nElementType = MET_SHORT\nElementDataFile = {}\n",
    }
    for suffix, head in heads.items():
        path = folder / f"a{suffix}"
        path.write_text(head.format("v.raw"))
        np.testing.assert_array_equal(io.read_volume(path).array, scan_array())
        for name in (tmp_path / "v.raw", "../v.raw", "link.raw", "LIST\nv.raw", "v%d.raw 1 1 1", "absent.raw"):
            _refused(path, head.format(name).encode(), "in its folder|doubled")


def test_hdf5_that_points_to_other_files_is_refused(tmp_path):
    image = np.linspace(0, 1, 60, dtype="f4").reshape(5, 4, 3)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["image"] = image
    image.tofile(tmp_path / "other.raw")
    layout = h5py.VirtualLayout(image.shape, "f4")
    layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "image", image.shape)
    with h5py.File(tmp_path / "link.npy.h5", "w") as file:
        file["image"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "image")
    with h5py.File(tmp_path / "soft.npy.h5", "w") as file:
        file["far"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "image")
        file["image"] = h5py.SoftLink("/far")
    with h5py.File(tmp_path / "virtual.npy.h5", "w") as file:
        file.create_virtual_dataset("image", layout)
    with h5py.File(tmp_path / "stored.npy.h5", "w") as file:
        file.create_dataset("image", image.shape, "f4", external=[(str(tmp_path / "other.raw"), 0, 240)])
    for path in sorted(tmp_path.glob("*.npy.h5")):
        with pytest.raises(InputError, match=f"{path.name}.*(behind a link|of other files)"):
            io.read_volume(path)


@pytest.mark.parametrize("options", [{}, {"chunks": (2, 4, 3), "compression": "gzip"}, {"chunks": (5, 2, 2)}])
@pytest.mark.parametrize("version", [{}, {"libver": "latest"}, {"userblock_size": 512}])
def test_hdf5_stored_in_chunks(tmp_path, options, version):
    image = np.linspace(0, 1, 60, dtype="f4").reshape(5, 4, 3)
    with h5py.File(tmp_path / "a.npy.h5", "w", **version) as file:
        file.create_dataset("image", data=image, **options)
    np.testing.assert_array_equal(io.read_volume(tmp_path / "a.npy.h5").array, image)
    if "userblock_size" not in version:
        _refused(tmp_path / "longer.npy.h5", (tmp_path / "a.npy.h5").read_bytes() + b"0", "its header claims")


def test_npz_in_fortran_order_and_compressed(tmp_path):
    image = np.asfortranarray(np.linspace(0, 1, 60, dtype=">f8").reshape(5, 4, 3))
    np.savez_compressed(tmp_path / "a.npz", image=image)
    np.testing.assert_array_equal(io.read_volume(tmp_path / "a.npz").array, image.astype("f4"))


def test_libraries_errors_are_quoted_and_our_mistakes_are_not_hidden():
    with (
        pytest.raises(InputError, match=r"a\.nii cannot be read: nibabel says \w+Error: .*may be damaged"),
        naming_any_error(Path("a.nii")),
    ):
        nibabel.Nifti1Header(b"0" * 348)
    with pytest.raises(TypeError), naming_any_error(Path("a.nii")):
        io.label_colour("a")


def test_memory_that_is_not_there_is_named_as_such(tmp_path, monkeypatch):
    path = write_nifti(tmp_path / "a.nii.gz")

    def full(*_, **__):
        raise MemoryError("Unable to allocate 3.00 GiB")

    monkeypatch.setattr(np, "empty", full)
    with pytest.raises(InputError, match=r"a\.nii\.gz cannot be read: it needs more memory .*3\.00 GiB"):
        io.read_volume(path)
