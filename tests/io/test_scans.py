"""Scans, label maps and masks of every format but pictures."""

import subprocess
import sys

import h5py
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from scan_files import AFFINE, WRITERS, scan_array, write_dicom, write_itk, write_nifti

from samed_peft import io
from samed_peft.errors import InputError


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_nifti(tmp_path, suffix, kind):
    path = write_nifti(tmp_path / f"scan{suffix}", kind=kind)
    volume = io.read_volume(path)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, scan_array())
    np.testing.assert_allclose(volume.affine, AFFINE)
    assert volume.spacing_zyx_mm == (3.0, 1.5, 1.5)
    assert volume.orientation == "LAS"
    assert volume.path == path
    assert not volume.normalized


def test_nifti_with_scaling_equals_get_fdata(tmp_path):
    image = nibabel.Nifti1Image(scan_array().T, AFFINE)
    image.header.set_slope_inter(0.1, -7.3)
    nibabel.save(image, tmp_path / "scan.nii.gz")
    expected = nibabel.load(tmp_path / "scan.nii.gz").get_fdata().astype(np.float32).T
    np.testing.assert_array_equal(io.read_volume(tmp_path / "scan.nii.gz").array, expected)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_itk_formats_agree_with_nifti(tmp_path, suffix):
    volume = io.read_volume(write_itk(tmp_path / f"scan{suffix}"))
    np.testing.assert_array_equal(volume.array, scan_array())
    # Origin (-90, 120) in LPS is (90, -120) in RAS; x runs to the left, y to the front.
    np.testing.assert_allclose(volume.affine, AFFINE)
    assert volume.orientation == "LAS"


def test_dicom_folder(tmp_path):
    volume = io.read_volume(write_dicom(tmp_path / "series"))
    np.testing.assert_array_equal(volume.array, scan_array())
    expected = np.array([[-1.5, 0, 0, 90], [0, -1.5, 0, 12], [0, 0, 3, -368], [0, 0, 0, 1]])
    np.testing.assert_allclose(volume.affine, expected)
    assert volume.orientation == "LPS"


def test_a_tilted_gantry_shears_the_grid(tmp_path):
    folder = write_dicom(tmp_path / "tilted")
    across, along = np.cos(np.deg2rad(20)), np.sin(np.deg2rad(20))
    for path in folder.iterdir():
        header = pydicom.dcmread(path)
        header.ImageOrientationPatient = [1, 0, 0, 0, float(f"{across:.10f}"), float(f"{-along:.10f}")]
        header.save_as(path)
    volume = io.read_volume(folder)
    for path in folder.iterdir():
        header = pydicom.dcmread(path)
        z = round((float(header.ImagePositionPatient[2]) + 368) / 3)
        np.testing.assert_array_equal(volume.array[z], header.pixel_array)
        right, anterior, superior = (volume.affine @ (0, 0, z, 1))[:3]
        np.testing.assert_allclose([-right, -anterior, superior], header.ImagePositionPatient, atol=1e-6)
    expected = [[-1.5, 0, 0], [0, -1.5 * across, 0], [0, -1.5 * along, 3]]
    np.testing.assert_allclose(volume.affine[:3, :3], expected, atol=1e-6)
    with pytest.warns(UserWarning, match="off right angles"):
        io.write_mask(np.zeros(volume.array.shape, np.uint8), volume, tmp_path / "mask.nii.gz")
    np.testing.assert_allclose(nibabel.load(tmp_path / "mask.nii.gz").affine, volume.affine, atol=1e-5)


def test_dicom_folder_with_several_series(tmp_path):
    write_dicom(tmp_path / "both")
    write_dicom(tmp_path / "both", series="1.2.3.5", first=10)
    with pytest.raises(InputError, match="one DICOM series, found 2 series"):
        io.read_volume(tmp_path / "both")


@pytest.mark.parametrize("positions", [(-368.0, -365.0, -362.0, -356.0), (-368.0, -368.0)])
def test_dicom_folder_with_missing_or_doubled_slices(tmp_path, positions):
    write_dicom(tmp_path / "gap", positions=positions)
    with pytest.raises(InputError, match="evenly spaced"):
        io.read_volume(tmp_path / "gap")


def test_folder_without_dicom(tmp_path, capfd):
    with pytest.raises(InputError, match="no DICOM files"):
        io.read_volume(tmp_path)


def test_samed_files(tmp_path):
    image = np.linspace(0, 1, 60, dtype=np.float32).reshape(5, 4, 3)
    label = (image > 0.5).astype(np.float32) * 8
    with h5py.File(tmp_path / "case0001.npy.h5", "w") as file:
        file["image"], file["label"] = image, label
    np.savez(tmp_path / "case0005_slice000.npz", image=image[0], label=label[0])
    volume = io.read_volume(tmp_path / "case0001.npy.h5")
    np.testing.assert_array_equal(volume.array, image)
    assert volume.normalized
    assert volume.affine is None
    assert volume.orientation is None
    assert volume.spacing_zyx_mm == (1.0, 1.0, 1.0)
    np.testing.assert_array_equal(io.read_labels(tmp_path / "case0001.npy.h5").array, label)
    assert io.read_volume(tmp_path / "case0005_slice000.npz").array.shape == (1, 4, 3)
    assert io.read_labels(tmp_path / "case0005_slice000.npz").array.dtype == np.uint8


def test_labels_are_the_smallest_integers(tmp_path):
    for values, dtype in (([0, 255], np.uint8), ([0, 256], np.int16), ([-1, 3], np.int16)):
        path = write_nifti(tmp_path / "label.nii", np.array(values, np.float32).reshape(2, 1, 1))
        labels = io.read_labels(path)
        assert labels.array.dtype == dtype
        assert labels.array.ravel().tolist() == values


def test_labels_must_be_whole_and_small(tmp_path):
    path = write_nifti(tmp_path / "label.nii", np.array([0, 0.5], np.float32).reshape(2, 1, 1))
    with pytest.raises(InputError, match=r"whole numbers as labels, found 0\.5"):
        io.read_labels(path)
    path = write_nifti(tmp_path / "label.nii", np.array([0, 70000], np.float32).reshape(2, 1, 1))
    with pytest.raises(InputError, match="16 bits"):
        io.read_labels(path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("source", [".nii.gz", ".nrrd"])
def test_mask_lies_on_the_scans_grid(tmp_path, suffix, source):
    scan = io.read_volume(WRITERS[source](tmp_path / f"scan{source}"))
    mask = (scan.array > 0).astype(np.int64) * 3
    io.write_mask(mask, scan, tmp_path / "new" / f"mask{suffix}")
    back = io.read_labels(tmp_path / "new" / f"mask{suffix}")
    np.testing.assert_array_equal(back.array, mask)
    np.testing.assert_allclose(back.affine, scan.affine, atol=1e-5)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"mask{suffix}"]


def test_oblique_mask_through_itk(tmp_path):
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * (0.7, 0.9, 2.5), (3, -4, 5)
    io.write_mask(scan_array(dtype=np.uint8), io.Volume(scan_array(), affine), tmp_path / "mask.nrrd")
    np.testing.assert_allclose(io.read_labels(tmp_path / "mask.nrrd").affine, affine, atol=1e-9)


def test_nifti_mask_keeps_codes_and_units(tmp_path):
    image = nibabel.Nifti1Image(scan_array().T, AFFINE)
    image.set_sform(AFFINE, code=4)
    image.set_qform(AFFINE, code=3)
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, tmp_path / "scan.nii.gz")
    scan = io.read_volume(tmp_path / "scan.nii.gz")
    io.write_mask(np.ones(scan.array.shape, np.uint8), scan, tmp_path / "mask.nii.gz")
    header = nibabel.load(tmp_path / "mask.nii.gz").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (4, 3)
    assert header.get_xyzt_units() == ("mm", "sec")
    np.testing.assert_array_equal(header.get_sform(), image.header.get_sform())
    np.testing.assert_array_equal(header.get_qform(), image.header.get_qform())
    first = (tmp_path / "mask.nii.gz").read_bytes()
    io.write_mask(np.ones(scan.array.shape, np.uint8), scan, tmp_path / "mask.nii.gz")
    assert (tmp_path / "mask.nii.gz").read_bytes() == first


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_probabilities_keep_codes_and_scale(tmp_path, suffix):
    image = nibabel.Nifti2Image(scan_array().T, AFFINE)
    image.set_sform(AFFINE, code=4)
    image.set_qform(AFFINE, code=3)
    nibabel.save(image, tmp_path / "scan.nii.gz")
    scan = io.read_volume(tmp_path / "scan.nii.gz")
    stored = np.arange(2 * 60, dtype=np.uint8).reshape(2, 5, 4, 3)[:, ::-1]  # a view, as of a turned scan
    for _ in range(2):
        io.write_probabilities(stored, scan, tmp_path / "out" / f"p{suffix}")
        bytes_written = (tmp_path / "out" / f"p{suffix}").read_bytes()
    found = nibabel.load(tmp_path / "out" / f"p{suffix}")
    np.testing.assert_array_equal(np.asarray(found.dataobj.get_unscaled()).T, stored)
    np.testing.assert_allclose(found.get_fdata().T, stored / 255, atol=1e-7)
    assert (int(found.header["sform_code"]), int(found.header["qform_code"])) == (4, 3)
    np.testing.assert_array_equal(found.header.get_sform(), image.header.get_sform())
    io.write_probabilities(stored, scan, tmp_path / "out" / f"p{suffix}")
    assert (tmp_path / "out" / f"p{suffix}").read_bytes() == bytes_written


def test_wrong_probabilities_are_refused(tmp_path):
    like = io.Volume(scan_array(), AFFINE)
    for array, name, message in (
        (np.zeros((2, 3, 4, 5), np.uint8), "p.nii.gz", r"\(5, 4, 3\) voxels a class.*found uint8 \(2, 3, 4, 5\)"),
        (np.zeros((2, 5, 4, 3), np.float32), "p.nii.gz", "uint8 or uint16.*found float32"),
        (np.zeros((2, 5, 4, 3), np.uint8), "p.nrrd", r"ending in \.nii\.gz or \.nii"),
    ):
        with pytest.raises(InputError, match=message):
            io.write_probabilities(array, like, tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_a_mask_of_nifti_2_keeps_the_affine_to_the_bit(tmp_path):
    affine = AFFINE + 1e-9
    affine[3] = (0, 0, 0, 1)
    scan = io.read_volume(write_nifti(tmp_path / "scan.nii.gz", affine=affine, kind=nibabel.Nifti2Image))
    io.write_mask(np.ones(scan.array.shape, np.uint8), scan, tmp_path / "mask.nii.gz", label_names={1: "liver"})
    back = io.read_labels(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(back.affine, affine)
    assert back.array.all()
    assert io.read_label_names(tmp_path / "mask.nii.gz") == {1: "liver"}


def test_mask_without_affine(tmp_path):
    like = io.Volume(np.zeros((2, 3, 4), np.float32), None, None, True)
    io.write_mask(np.ones((2, 3, 4), np.uint8), like, tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(io.read_labels(tmp_path / "mask.nii.gz").affine, np.eye(4))


def test_wrong_masks_are_refused(tmp_path):
    like = io.Volume(scan_array(), AFFINE)
    for mask, name, message in (
        (np.zeros((3, 4, 5), np.uint8), "mask.nii.gz", r"shape \(5, 4, 3\).*found \(3, 4, 5\)"),
        (np.full((5, 4, 3), 256), "mask.nii.gz", "0..255"),
        (np.zeros((5, 4, 3)), "mask.nii.gz", "integer labels"),
        (np.zeros((5, 4, 3), np.uint8), "mask.jpg", "ending in"),
        (np.zeros((5, 4, 3), np.uint8), "mask.png", "expected a picture"),
    ):
        with pytest.raises(InputError, match=message):
            io.write_mask(mask, like, tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_write_volume_round_trip(tmp_path):
    io.write_volume(io.Volume(scan_array(), AFFINE), tmp_path / "scan.nii.gz")
    back = io.read_volume(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(back.array, scan_array())
    np.testing.assert_allclose(back.affine, AFFINE)
    with pytest.raises(InputError, match=r"ending in \.nii\.gz"):
        io.write_volume(io.Volume(scan_array(), AFFINE), tmp_path / "scan.mha")


def test_importing_io_is_light():
    code = "import sys; from samed_peft.io import *; print({'torch', 'SimpleITK', 'h5py', 'nibabel'} & {*sys.modules})"
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.strip() == "set()"


def test_labels_off_by_rounding(tmp_path):
    # nibabel scales float labels to the whole range of the type they are to be stored in.
    labels = np.arange(14, dtype=np.float64).reshape(1, 1, 14)
    image = nibabel.Nifti1Image(labels, np.eye(4))
    image.set_data_dtype(np.uint8)
    nibabel.save(image, tmp_path / "scaled.nii.gz")
    assert not np.array_equal(nibabel.load(tmp_path / "scaled.nii.gz").get_fdata(), labels)
    for name, array in (("near", [[[0, 0.9999, 2.0001]]]), ("far", [[[0, 0.9, 1]]])):
        nibabel.save(nibabel.Nifti1Image(np.array(array, np.float32), np.eye(4)), tmp_path / f"{name}.nii.gz")
    np.testing.assert_array_equal(io.read_labels(tmp_path / "scaled.nii.gz").array, labels.T)
    np.testing.assert_array_equal(io.read_labels(tmp_path / "near.nii.gz").array.ravel(), [0, 1, 2])
    with pytest.raises(InputError, match=r"found 0\.9 in"):
        io.read_labels(tmp_path / "far.nii.gz")


def test_the_switch_of_itks_warnings_is_left_alone(tmp_path, monkeypatch):
    """All threads share it, and several of them may be reading scans."""
    series, shown = write_dicom(tmp_path / "series"), []
    monkeypatch.setattr(sitk.ProcessObject, "SetGlobalWarningDisplay", shown.append)
    io.read_volume(series)
    assert io.holds_dicom(series)
    assert not io.holds_dicom(tmp_path)
    assert shown == []
