"""Scans, masks, atomic files and folders, weights."""

import gzip
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pydicom
import pytest
import torch
from scan_files import AFFINE, scan_array, write_dicom, write_itk, write_nifti

from samed_peft import io
from samed_peft.errors import InputError
from samed_peft.io.atomic import _HOST


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


WRITERS = {
    ".nii": write_nifti,
    ".nii.gz": write_nifti,
    ".nrrd": write_itk,
    ".mha": write_itk,
    ".npz": lambda path: np.savez(path, image=np.random.default_rng(0).random((6, 50, 50))) or path,
    ".npy.h5": lambda path: [h5py.File(path, "w")][0].create_dataset("image", data=np.ones((3, 9, 9))).file.close(),
}


@pytest.mark.parametrize("keep", [0, 0.5, 0.98])
@pytest.mark.parametrize("suffix", list(WRITERS))
def test_cut_off_files_are_refused(tmp_path, capfd, suffix, keep):
    path = tmp_path / f"scan{suffix}"
    WRITERS[suffix](path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InputError, match=r"scan.*(zero bytes|cannot be read)"):
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


def test_json_and_text(tmp_path):
    io.write_json(tmp_path / "deep" / "a.json", {"mean": 1.5, "name": "Gallenblase ä"})
    assert io.read_json(tmp_path / "deep" / "a.json") == {"mean": 1.5, "name": "Gallenblase ä"}
    with pytest.raises(ValueError, match="JSON compliant"):
        io.write_json(tmp_path / "deep" / "a.json", math.nan)
    assert io.read_json(tmp_path / "deep" / "a.json")["mean"] == 1.5
    io.write_text(tmp_path / "a.md", "one\n")
    assert io.read_text(tmp_path / "a.md") == "one\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.md", "deep"]
    for text in ("{", '{"a": NaN}', ""):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match=r"bad\.json"):
            io.read_json(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        io.read_json(tmp_path / "bad.json")
    with pytest.raises(InputError, match="does not exist"):
        io.read_json(tmp_path / "absent.json")


def test_failed_write_keeps_the_old_file(tmp_path):
    io.write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), io.atomic_file(tmp_path / "a") as temporary:
        temporary.write_text(str(1 // 0))
    assert io.read_text(tmp_path / "a") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def fill(path, text):
    with io.atomic_dir(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(text)


def test_atomic_dir_replaces_as_a_whole(tmp_path):
    path = tmp_path / "parent" / "out"
    fill(path, "old")
    (path / "stale").write_text("stale")
    fill(path, "new")
    assert (path / "sub" / "file").read_text() == "new"
    assert not (path / "stale").exists()
    with pytest.raises(FileNotFoundError), io.atomic_dir(path) as folder:
        (folder / "absent" / "file").write_text("half")
    assert [item.name for item in path.iterdir()] == ["sub"]
    assert [item.name for item in path.parent.iterdir()] == ["out"]
    (tmp_path / "file").write_text("a file")
    with pytest.raises(InputError, match="found a file"), io.atomic_dir(tmp_path / "file"):
        pass


KILLED_BETWEEN_RENAMES = """
import os, signal, sys
from samed_peft import io
rename = os.rename
def rename_once(*names):
    rename(*names)
    os.kill(os.getpid(), signal.SIGKILL)
with io.atomic_dir(sys.argv[1]) as folder:
    (folder / "half").write_text("half")
    if sys.argv[2] == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
    os.rename = rename_once
"""


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_killed_atomic_dir_is_repaired(tmp_path, moment):
    path = tmp_path / "out"
    fill(path, "old")
    subprocess.run([sys.executable, "-c", KILLED_BETWEEN_RENAMES, path, moment], check=False)
    assert path.exists() == (moment == "writing")
    assert len(list(tmp_path.iterdir())) == 2
    io.recover_dir(path)
    assert (path / "sub" / "file").read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_backup_beside_a_complete_folder_goes(tmp_path):
    fill(tmp_path / "out", "new")
    (tmp_path / ".backup-out").mkdir()
    io.recover_dir(tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_live_temporaries_of_others_stay(tmp_path):
    other = tmp_path / f".tmp-{_HOST}-{os.getppid()}-0a0b0c0d-out"
    other.mkdir()
    dead = tmp_path / f".tmp-{_HOST}-4194399-0a0b0c0d-out"  # above the largest process number
    dead.mkdir()
    elsewhere = tmp_path / ".tmp-00000000-4194399-0a0b0c0d-out"  # another machine's, where that number may live
    elsewhere.mkdir()
    fill(tmp_path / "out", "new")
    assert {item.name for item in tmp_path.iterdir()} == {other.name, elsewhere.name, "out"}


def test_tensors_round_trip(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "a": shared,
        "transposed": shared.T,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "n": torch.tensor(3),
    }
    io.save_tensors(tensors, tmp_path / "w.safetensors", metadata={"kind": "test"})
    loaded = io.load_tensors(tmp_path / "w.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_damaged_tensors_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    io.save_tensors({"a": torch.ones(100)}, path)
    data = path.read_bytes()
    for size in (0, 5, 60, len(data) - 3):
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match=r"w\.safetensors"):
            io.load_tensors(path)
    io.save_tensors({"good": torch.ones(1), "bad": torch.tensor([1.0, math.inf])}, path)
    with pytest.raises(InputError, match=r"tensor 'bad' of .*w\.safetensors"):
        io.load_tensors(path)


class Payload:
    """Makes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_weights(tmp_path, zipped):
    state = {"a.weight": torch.randn(3, 2), "b": torch.arange(3).bfloat16()}
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    loaded = io.load_torch_weights(tmp_path / "w.pth")
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "found an empty dict"),
        ([torch.ones(1)], "found list"),
        (torch.ones(1), "found Tensor"),
        ({"model": {"a": torch.ones(1)}}, "found 'model': dict"),
        ({3: torch.ones(1)}, "found a key of type int: Tensor"),
        ({"n": torch.ones(2, dtype=torch.int64)}, r"'n' \(int64, strided, cpu\)"),
        ({"n": torch.ones(2, dtype=torch.bool)}, r"'n' \(bool"),
        ({"n": torch.ones(2, dtype=torch.complex64)}, r"'n' \(complex64"),
        ({"n": torch.ones(2).to(torch.float8_e4m3fn)}, r"torch\._utils\._rebuild_tensor_v3"),
        ({"n": torch.eye(3).to_sparse()}, r"torch\._utils\._rebuild_sparse_tensor"),
        ({"n": torch.empty(3, device="meta")}, r"'n' \(float32, strided, meta"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_without_plain_weights_are_named(tmp_path, value, message, zipped):
    path = tmp_path / "w.pth"
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=message):
        io.load_torch_weights(path)


def test_unsafe_torch_files_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    for value in ({"a": torch.ones(1), "x": Payload(tmp_path / "ran")}, [torch.ones(1)], {"epoch": 3}, {}):
        torch.save(value, path)
        with pytest.raises(InputError, match=r"w\.pth"):
            io.load_torch_weights(path)
    path.write_bytes(pickle.dumps({"x": Payload(tmp_path / "ran")}))
    with pytest.raises(InputError, match="cannot be loaded safely"):
        io.load_torch_weights(path)
    torch.save({"a": torch.ones(5000)}, path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match="cannot be loaded safely"):
        io.load_torch_weights(path)
    torch.save({"a": torch.tensor(math.nan)}, path)
    with pytest.raises(InputError, match="tensor 'a'"):
        io.load_torch_weights(path)
    assert not (tmp_path / "ran").exists()


def test_fingerprint(tmp_path):
    def fingerprint(folder):
        return io.content_fingerprint(sorted(folder.glob("**/*.txt"), reverse=True))

    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "a.txt").write_text("a")
        (tmp_path / name / "sub" / "b.txt").write_text("b")
    first = fingerprint(tmp_path / "one")
    assert fingerprint(tmp_path / "two") == first
    (tmp_path / "two" / "a.txt").write_text("A")
    edited = fingerprint(tmp_path / "two")
    (tmp_path / "two" / "a.txt").rename(tmp_path / "two" / "c.txt")
    assert len({first, edited, fingerprint(tmp_path / "two")}) == 3
    with pytest.raises(InputError, match="absent"):
        io.content_fingerprint([tmp_path / "absent"])


def test_importing_io_is_light():
    code = "import sys, samed_peft.io; print({'torch', 'SimpleITK', 'h5py'} & set(sys.modules))"
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.strip() == "set()"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", "expected a file name, found the folder"),
        ("folder", "expected a file name, found the folder"),
        ("file/out.pth", "file is a file; choose another name"),
        ("file/deeper/out.pth", "file is a file; choose another name"),
    ],
)
def test_a_file_that_cannot_be_there_is_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=message):
        io.write_text(name, "text")
    with pytest.raises(InputError, match=message):
        io.require_writable_file(name)


def test_a_name_that_is_too_long_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be written: File name too long"):
        io.write_text(tmp_path / ("a" * 300), "text")


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file"), io.atomic_dir(tmp_path / "file" / "out"):
        pass


def test_a_place_that_may_not_be_written_is_refused_and_left_alone(tmp_path, monkeypatch):
    def denied(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", denied)
    with pytest.raises(InputError, match=r"new/a\.txt cannot be written: Permission denied in"):
        io.write_text(tmp_path / "new" / "a.txt", "text")
    with pytest.raises(InputError, match="Permission denied"), io.atomic_dir(tmp_path / "new"):
        pass
    assert not list(tmp_path.iterdir())


FILLED = io.FolderKind(in_place=True)


def test_a_folder_to_write_into_is_tried_before_it_is_needed(tmp_path):
    (tmp_path / "file").touch()
    for name, message in (
        ("file", "expected a folder or a free name at .*file, found a file"),
        ("file/deeper", "expected a folder above .*deeper, but .*file is a file"),
        ("a" * 300, "cannot be written: File name too long"),
    ):
        with pytest.raises(InputError, match=message):
            io.require_replaceable(tmp_path / name, FILLED)
    io.require_replaceable(tmp_path, FILLED)
    io.require_replaceable(tmp_path / "new" / "deeper", FILLED)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform != "linux", reason="a folder that not even root may write")
def test_a_folder_that_takes_no_files_is_refused():
    for name in ("/proc", "/proc/new"):
        with pytest.raises(InputError, match=f"{name} cannot be written: .* in /proc; choose another place"):
            io.require_replaceable(name, FILLED)


def test_a_file_is_no_folder_to_replace(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"expected a folder or a free name at .*file, found a file"):
        io.require_replaceable(tmp_path / "file", io.FolderKind(markers=("mark",)))


def test_an_error_while_writing_stays_what_it_is(tmp_path):
    with pytest.raises(OSError, match="No space left"), io.atomic_file(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_more_than_its_own_files_is_not_replaced(tmp_path):
    own, any_with_mark = io.FolderKind(("mark",), allowed="mark|own"), io.FolderKind(("mark",))
    (tmp_path / "mark").touch()
    io.require_replaceable(tmp_path, own)
    (tmp_path / "thesis.txt").touch()
    io.require_replaceable(tmp_path, any_with_mark)
    with pytest.raises(InputError, match=r"other files thesis\.txt, which must not be lost"):
        io.require_replaceable(tmp_path, own)


def test_a_folder_that_lacks_one_of_its_markers_is_not_replaced(tmp_path):
    kind = io.FolderKind(("one", "two"))
    io.require_replaceable(tmp_path, kind)
    (tmp_path / "one").touch()
    with pytest.raises(InputError, match=r"with one and two at .*, found other files, which must not be lost"):
        io.require_replaceable(tmp_path, kind)
    (tmp_path / "two").touch()
    io.require_replaceable(tmp_path, kind)


def test_a_folder_whose_content_may_not_be_listed_is_not_replaced(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(InputError, match="out cannot be read: Permission denied"):
        io.require_replaceable(tmp_path / "out", io.FolderKind(("mark",)))


def test_a_folder_replaced_as_a_whole_needs_the_folder_above(tmp_path, monkeypatch):
    tried, touch = [], Path.touch
    monkeypatch.setattr(Path, "touch", lambda path: tried.append(path.parent) or touch(path))
    (tmp_path / "out").mkdir()
    for in_place in (True, False):
        io.require_replaceable(tmp_path / "out", io.FolderKind(in_place=in_place))
    assert tried == [tmp_path / "out", tmp_path]


def test_the_root_folder_is_not_replaced(monkeypatch):
    monkeypatch.setattr(Path, "touch", lambda path: None)
    monkeypatch.setattr(Path, "unlink", lambda path: None)
    with pytest.raises(InputError, match="found other files, which must not be lost"):
        io.require_replaceable(Path.cwd().anchor, io.FolderKind(("mark",)))


def _headers(tmp_path):
    """Damaged NIfTI files, by what is wrong with them."""
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
