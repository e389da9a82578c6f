"""A scan in all 48 orientations, on straight, turned and sheared grids, gives one and the same mask."""

import dataclasses
import itertools

import nibabel as nib
import numpy as np
import pytest
import torch

from samed_peft.io import Volume, read_labels, read_volume, write_mask
from samed_peft.models.bases import load_sam
from samed_peft.prediction.inference import predict_volume

SHAPE_XYZ = (6, 9, 7)
ORIENTATIONS = [
    np.array([*zip(axes, flips, strict=True)], float)
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]
LPS = nib.orientations.axcodes2ornt(("L", "P", "S"))


def _turned():
    """About 20 degrees around an axis that is none of the grid's."""
    axis = np.array([1.0, 2.0, 3.0]) / np.sqrt(14)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    angle = np.deg2rad(20)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


SPACING = np.diag([0.7, 0.9, 2.5])
SHEAR = np.array([[1, 0.1, 0], [0, 1, 0.15], [0, 0, 1]])
GRIDS = {
    "straight": SPACING,
    "turned": _turned() @ SPACING,
    "sheared": SHEAR @ SPACING,
}


def _affine(grid):
    affine = np.eye(4)
    affine[:3, :3] = GRIDS[grid]
    affine[:3, 3] = (-117.3, 48.9, 1020.4)
    return affine


@pytest.fixture(scope="module")
def model():
    """Random weights that see a small scan, in the orientation LPS."""
    torch.manual_seed(3)
    sam = load_sam("tiny-sam", class_names=("a", "b", "c"), image_size=64)
    sam.samed_config = dataclasses.replace(sam.samed_config, window=(0.0, 1.0), orientation="LPS")
    return sam


def _phantom():
    """Ellipsoids off the centre and a ramp: no flip or exchange of axes maps it to itself."""
    x, y, z = np.meshgrid(*(np.linspace(0, 1, n) for n in SHAPE_XYZ), indexing="ij")
    scan = 0.3 * x + 0.15 * y**2 + 0.05 * z
    scan[((x - 0.3) / 0.3) ** 2 + ((y - 0.6) / 0.25) ** 2 + ((z - 0.4) / 0.4) ** 2 < 1] += 0.5
    scan[((x - 0.8) / 0.2) ** 2 + ((y - 0.2) / 0.2) ** 2 + ((z - 0.7) / 0.3) ** 2 < 1] += 0.3
    return scan.astype(np.float32)


def _mask_of(model, path, *, suffix):
    """The mask as (X, Y, Z) in LPS, by way of files, and its affine in that order and as written."""
    scan = read_volume(path)
    mask = path.with_name(f"mask{suffix}")
    write_mask(predict_volume(model, scan), scan, mask, label_names={1: "a", 2: "b", 3: "c"})
    back = read_labels(mask)
    # Of the mask alone: its own affine must tell where its voxels are.
    turn = nib.orientations.ornt_transform(nib.orientations.io_orientation(back.affine), LPS)
    canonical = nib.orientations.apply_orientation(back.array.T, turn)
    return canonical, back.affine @ nib.orientations.inv_ornt_aff(turn, back.array.T.shape), back.affine


@pytest.mark.parametrize("grid", GRIDS)
def test_all_48_orientations_give_one_mask(model, tmp_path, grid):
    affine = _affine(grid)
    expected = expected_affine = None
    for ornt in ORIENTATIONS:
        array = nib.orientations.apply_orientation(_phantom(), ornt)
        placed = affine @ nib.orientations.inv_ornt_aff(ornt, SHAPE_XYZ)
        path = tmp_path / "scan.nii.gz"
        nib.save(nib.Nifti1Image(array, placed), path)
        canonical, canonical_affine, as_written = _mask_of(model, path, suffix=".nii.gz")
        # A millionth of a voxel, as seen from the scan's own voxels.
        stored = nib.load(path).affine
        corner = (*(np.array(array.shape) - 1), 1)
        np.testing.assert_allclose(np.linalg.solve(stored, as_written @ corner), corner, atol=1e-6, rtol=0)
        np.testing.assert_allclose(as_written, placed, atol=1e-4)
        if expected is None:
            expected, expected_affine = canonical, canonical_affine
            assert len(np.unique(expected)) > 1
            flips = [np.flip(expected, axes) for n in (1, 2, 3) for axes in itertools.combinations(range(3), n)]
            assert not any(np.array_equal(flip, expected) for flip in flips), "the mask would hide an exchange"
        np.testing.assert_array_equal(canonical, expected)
        np.testing.assert_allclose(canonical_affine, expected_affine, atol=1e-3)


@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("grid", GRIDS)
def test_other_formats_give_that_mask_too(model, tmp_path, grid, suffix):
    affine = _affine(grid)
    masks = []
    for ornt in (ORIENTATIONS[0], ORIENTATIONS[13], ORIENTATIONS[30]):
        placed = affine @ nib.orientations.inv_ornt_aff(ornt, SHAPE_XYZ)
        path = tmp_path / "scan.nii"
        nib.save(nib.Nifti1Image(nib.orientations.apply_orientation(_phantom(), ornt), placed), path)
        canonical, _, as_written = _mask_of(model, path, suffix=suffix)
        masks.append(canonical)
        np.testing.assert_allclose(as_written, read_volume(path).affine, atol=1e-6 * 0.7, rtol=0)
    np.testing.assert_array_equal(masks[1], masks[0])
    np.testing.assert_array_equal(masks[2], masks[0])


def test_a_sheared_grid_keeps_its_sform_and_claims_no_qform(tmp_path):
    array = np.zeros(SHAPE_XYZ[::-1], np.uint8)
    for grid, code in (("straight", 1), ("turned", 1), ("sheared", 0)):
        write_mask(array, Volume(array, _affine(grid)), tmp_path / "mask.nii")
        header = nib.load(tmp_path / "mask.nii").header
        assert (int(header["qform_code"]), int(header["sform_code"])) == (code, 1)
        np.testing.assert_allclose(header.get_best_affine(), _affine(grid), atol=1e-4)
