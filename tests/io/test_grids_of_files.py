"""Units, spaces, numbers of axes and rounding in headers: grids equal those that ITK and nibabel read."""

import gzip
import shutil
import struct

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scan_files import AFFINE, WRITERS, scan_array, write_nifti

from samed_peft import io
from samed_peft.errors import InputError
from samed_peft.io.volumes import LPS_TO_RAS


def _itk(path):
    """Array and RAS affine as ITK reads them."""
    image = sitk.ReadImage(str(path))
    count = image.GetDimension()
    affine = np.eye(max(count, 3) + 1)
    affine[:count, :count] = np.array(image.GetDirection()).reshape(count, count) * np.array(image.GetSpacing())
    affine[:count, -1] = image.GetOrigin()
    return sitk.GetArrayFromImage(image), LPS_TO_RAS @ affine[[0, 1, 2, -1]][:, [0, 1, 2, -1]]


def _equals_itk(path, *, atol=0.0):
    volume, (array, affine) = io.read_volume(path), _itk(path)
    np.testing.assert_array_equal(volume.array.ravel(), array.ravel())
    np.testing.assert_allclose(volume.affine, affine, rtol=0, atol=atol)
    np.testing.assert_array_equal(io.read_affine(path), volume.affine)
    return volume


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_oblique_grids_equal_itks_to_the_bit(tmp_path, suffix):
    rng = np.random.default_rng(0)
    for dtype in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"):
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        image = sitk.GetImageFromArray(scan_array(dtype=dtype) if dtype[0] != "u" else scan_array(dtype=dtype) % 99)
        image.SetDirection((turn * np.sign(np.linalg.det(turn))).ravel().tolist())
        image.SetSpacing(rng.uniform(0.3, 5, 3).tolist())
        image.SetOrigin(rng.normal(0, 200, 3).tolist())
        for packed in (False, True):
            sitk.WriteImage(image, str(tmp_path / f"a{suffix}"), useCompression=packed)
            _equals_itk(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("unit", ["unknown", "mm", "micron", "meter"])
def test_units_of_nifti_are_converted_and_kept_in_masks(tmp_path, unit):
    image = nibabel.Nifti1Image(scan_array().T, AFFINE)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "scan.nii.gz")
    volume = _equals_itk(tmp_path / "scan.nii.gz", atol=1e-12)
    factor = {"micron": 1e-3, "meter": 1e3}.get(unit, 1)
    np.testing.assert_allclose(volume.spacing_zyx_mm, np.array((3, 1.5, 1.5)) * factor)
    for name in ("mask.nii.gz", "mask.nrrd", "mask.mha"):
        io.write_mask((volume.array > 0).astype(np.uint8), volume, tmp_path / name)
        np.testing.assert_allclose(_itk(tmp_path / name)[1], volume.affine, rtol=1e-6)
        np.testing.assert_allclose(io.read_affine(tmp_path / name), volume.affine, rtol=1e-6)
    mask = nibabel.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(mask.affine, image.affine)
    assert mask.header.get_xyzt_units()[0] == unit


NRRD = "NRRD0005\ntype: int8\ndimension: 3\nsizes: 5 4 3\nencoding: raw\n{}\n"


def _nrrd(path, lines):
    path.write_bytes(NRRD.format("".join(f"{line}\n" for line in lines)).encode() + bytes(range(60)))
    return path


DIRECTIONS = ["space directions: (0.5,0.1,0) (0,0.7,0.2) (0,0,3)", "space origin: (10,20,30)"]


@pytest.mark.parametrize(
    "lines",
    [
        *([f"space: {space}", *DIRECTIONS] for space in ("left-posterior-superior", "RAS", "left-anterior-superior")),
        ["space dimension: 3", *DIRECTIONS],
        ["space: LPS", 'space units: "mm" "mm" "mm"', *DIRECTIONS],
        ["spacings: 2 3 4", "axis mins: 1 2 3", "centers: node cell cell"],
        ["spacings: 2 3 4", 'units: "mm" "mm" "mm"'],
        [],
    ],
)
def test_spaces_of_nrrd_equal_itks(tmp_path, lines):
    _equals_itk(_nrrd(tmp_path / "a.nrrd", lines))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["space: scanner-xyz", *DIRECTIONS], "found 'scanner-xyz'.*convert"),
        (["space: LPS", 'space units: "um" "um" "um"', *DIRECTIONS], "expected millimetres, found .*um.*scale"),
        (["spacings: 2 3 4", 'units: "cm" "cm" "cm"'], "expected millimetres, found .*cm"),
        (["axis mins: 1 2 3", "axis maxs: 2 3 4"], "expected space directions, or spacings"),
        (["kinds: RGB-color domain domain"], "one number a voxel"),
    ],
)
def test_nrrd_whose_grid_is_not_known_is_refused(tmp_path, lines, message):
    _nrrd(tmp_path / "a.nrrd", lines)
    for read in (io.read_volume, io.read_affine):
        with pytest.raises(InputError, match=message):
            read(tmp_path / "a.nrrd")


def test_metaimage_in_other_units_is_refused(tmp_path):
    data = WRITERS[".mha"](tmp_path / "a.mha").read_bytes()
    (tmp_path / "a.mha").write_bytes(data.replace(b"ElementType", b"DistanceUnits = um\nElementType"))
    with pytest.raises(InputError, match="found DistanceUnits um"):
        io.read_volume(tmp_path / "a.mha")


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_two_axes_and_trailing_axes_of_one(tmp_path, suffix):
    flat = sitk.GetImageFromArray(scan_array()[0])
    flat.SetSpacing((0.5, 0.7))
    flat.SetOrigin((3, 4))
    sitk.WriteImage(flat, str(tmp_path / f"flat{suffix}"))
    volume = _equals_itk(tmp_path / f"flat{suffix}", atol=1e-6)
    assert volume.array.shape == (1, 4, 3)
    io.write_mask((volume.array > 0).astype(np.uint8), volume, tmp_path / f"mask{suffix}")
    np.testing.assert_allclose(_itk(tmp_path / f"mask{suffix}")[1], volume.affine, atol=1e-6)
    sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(scan_array())]), str(tmp_path / f"four{suffix}"))
    assert _equals_itk(tmp_path / f"four{suffix}").array.shape == (5, 4, 3)


def test_trailing_axes_of_nifti_and_leading_ones_of_arrays(tmp_path):
    nibabel.save(nibabel.Nifti1Image(scan_array().T[..., None, None], AFFINE), tmp_path / "five.nii")
    assert io.read_volume(tmp_path / "five.nii").array.shape == (5, 4, 3)
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 4, 5, 1, 3), np.float32), AFFINE), tmp_path / "vector.nii")
    with pytest.raises(InputError, match="expected a 3-D scan"):
        io.read_volume(tmp_path / "vector.nii")
    np.savez(tmp_path / "a.npz", image=np.zeros((1, 1, 5, 4, 3), np.float32))
    assert io.read_volume(tmp_path / "a.npz").array.shape == (5, 4, 3)


@pytest.mark.parametrize("excess", [5e-7, 1e-4])
def test_a_quaternion_longer_than_one_by_rounding(tmp_path, excess):
    data = bytearray(nibabel.Nifti1Image(scan_array().T, np.diag([0.8, 0.8, 3, 1])).to_bytes())
    data[252:268] = struct.pack("<hh3f", 1, 0, *[np.sqrt((1 + excess) / 3)] * 3)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(data))
    volume = _equals_itk(tmp_path / "a.nii.gz", atol=1e-6)
    io.write_mask(np.ones(volume.array.shape, np.uint8), volume, tmp_path / "mask.nii.gz")
    np.testing.assert_allclose(nibabel.load(tmp_path / "mask.nii.gz").affine, volume.affine, atol=1e-6)


def test_nifti_is_packed_or_not_whatever_its_name_says(tmp_path):
    for suffix, other in ((".nii", ".nii.gz"), (".nii.gz", ".nii")):
        shutil.copy(write_nifti(tmp_path / f"a{suffix}"), tmp_path / f"b{other}")
        volume = io.read_volume(tmp_path / f"b{other}")
        np.testing.assert_array_equal(volume.array, scan_array())
        io.write_mask(np.ones(volume.array.shape, np.uint8), volume, tmp_path / f"mask{other}", label_names={1: "a"})
        assert (nibabel.load(tmp_path / f"mask{other}").get_fdata() == 1).all()
        assert io.read_label_names(tmp_path / f"mask{other}") == {1: "a"}


def test_other_formats_under_the_name_of_nifti_are_told_apart(tmp_path):
    for name in ("a.nii", "a.nrrd", "a.mha", "a.npy.h5"):
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(900))
        with pytest.raises(InputError, match=rf"{name} cannot be read: .*of another format.*name it after its format"):
            io.read_volume(tmp_path / name)
    pair = nibabel.Nifti1Pair(scan_array().T, AFFINE)
    nibabel.save(pair, tmp_path / "p.img")
    shutil.copy(tmp_path / "p.hdr", tmp_path / "p.nii")
    with pytest.raises(InputError, match=r"p\.nii cannot be read: it is the header of a \.hdr and \.img pair"):
        io.read_volume(tmp_path / "p.nii")
