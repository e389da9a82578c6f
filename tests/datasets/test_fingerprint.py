"""Fingerprints of folders of labelled scans: numbers that can be counted by hand, and data that no training can use."""

import json
import shutil

import nibabel
import numpy as np
import pytest
from conftest import GOLDEN, write_balls
from PIL import Image

from samed_peft.datasets import empty_cases, open_folder, take_fingerprint
from samed_peft.datasets.fingerprint import Fingerprint
from samed_peft.errors import InputError

_BALL = 69 + 2 * 61
"""Grid points within the middle circle of a ball (x^2 + y^2 < 25), and within those above and below (< 18.75)."""


@pytest.fixture(scope="module")
def balls(tmp_path_factory):
    root = tmp_path_factory.mktemp("balls") / "data"
    write_balls(root)
    return root


def _rewrite(path, change):
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(change(np.asarray(image.dataobj)), image.affine), path)


def test_numbers_are_those_that_can_be_counted(balls):
    found = take_fingerprint(open_folder(balls), patient_pattern="(p.)_.")
    assert (found.cases, found.patients, found.patients_with_foreground) == (4, 3, 3)
    assert (found.slices, found.empty_slices, found.patient_slices) == (24, 12, (6, 6, 12))
    assert (found.plane, found.orientation, found.orientations) == ("axial", "LPS", {"LAS": 2, "RAS": 2})
    assert (found.slice_hw, found.largest_hw, found.spacing_mm) == ((24, 20), (24, 20), (4.0, 1.0, 1.0))
    assert (found.modality, found.colour, found.normalized) == ("MR", False, False)
    assert (found.class_voxels, found.class_slices, found.class_cases) == (
        {"ball": 4 * _BALL},
        {"ball": 12},
        {"ball": 4},
    )
    # A ball is twice as bright as its background of 100, 200, 300 and 400; medians over the four scans.
    assert found.foreground[2] == pytest.approx(500, abs=5)
    assert found.body[2] == pytest.approx(500, abs=10)
    assert found.intensity_range[0] < 100 < 800 < found.intensity_range[1]


def test_voxels_to_ignore_are_no_foreground(balls, tmp_path):
    shutil.copytree(balls, tmp_path / "data")
    file = tmp_path / "data" / "dataset.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"labels": {"background": 0, "ball": 1, "ignore": 2}}))
    _rewrite(tmp_path / "data" / "labelsTr" / "p1_a.nii.gz", lambda array: array * 2)
    found = take_fingerprint(open_folder(tmp_path / "data"))
    assert (found.class_voxels, found.class_cases, found.empty_slices) == ({"ball": 3 * _BALL}, {"ball": 3}, 15)
    assert found.foreground[0] > 350  # the darkest scan's ball is not among them


def test_slices_are_those_of_the_plane(balls):
    found = take_fingerprint(open_folder(balls), ["p1_a", "p2_a"], plane="sagittal")
    assert (found.slices, found.slice_hw, found.spacing_mm) == (40, (6, 24), (1.0, 4.0, 1.0))
    assert (found.plane, found.orientation) == ("sagittal", "PIL")
    assert found.class_slices == {"ball": 2 * 9}  # |x| < 5
    assert found.cases == 2


def test_the_plane_of_isotropic_scans_is_that_with_the_fewest_labelled_slices(balls, tmp_path):
    """The label is 9 voxels long from left to right; the third axis of an array that nibabel writes is the last."""
    shutil.copytree(balls, tmp_path / "data")
    for (across, up), plane in (((9, 9), "axial"), ((9, 20), "sagittal"), ((10, 11), "axial"), ((9, 10), "sagittal")):
        for path in (tmp_path / "data").glob("*/*.nii.gz"):
            array = np.zeros((24, 30, 24), np.uint8)
            array[:across, 2:17, :up] = 1
            nibabel.save(nibabel.Nifti1Image(array, np.diag([-1, 1, 1, 1])), path)
        found = take_fingerprint(open_folder(tmp_path / "data"))
        assert (found.plane, found.slices) == (plane, 4 * 24)
        assert found.class_slices == {"ball": 4 * (up if plane == "axial" else across)}


def test_a_fingerprint_survives_json_and_a_move_but_no_edit(balls, tmp_path):
    found = take_fingerprint(open_folder(balls))
    assert Fingerprint.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    shutil.copytree(balls, tmp_path / "elsewhere")
    assert take_fingerprint(open_folder(tmp_path / "elsewhere")) == found
    _rewrite(tmp_path / "elsewhere" / "imagesTr" / "p1_a_0000.nii.gz", lambda array: array + 1)
    assert take_fingerprint(open_folder(tmp_path / "elsewhere")).data != found.data
    with pytest.raises(
        InputError, match=r"patient_slices must be three numbers, the smallest first; found \(6, 5, 12\)"
    ):
        Fingerprint.from_dict(found.to_dict() | {"patient_slices": [6, 5, 12]})


@pytest.mark.parametrize(
    ("name", "lowest", "modality"), [("scan", -1000, "CT"), ("scan", 0, "unknown"), ("T2", -1000, "MR")]
)
def test_scans_with_air_are_ct_unless_they_are_named_otherwise(balls, tmp_path, name, lowest, modality):
    shutil.copytree(balls, tmp_path / "data")
    description = tmp_path / "data" / "dataset.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"channel_names": {"0": name}}))
    for path in (tmp_path / "data" / "imagesTr").iterdir():
        _rewrite(path, lambda array: np.where(array < np.median(array), lowest, array).astype(np.float32))
    assert take_fingerprint(open_folder(tmp_path / "data")).modality == modality


def test_preprocessed_slices_have_no_spacing():
    found = take_fingerprint(open_folder(GOLDEN / "btcv" / "processed"))
    raw = take_fingerprint(open_folder(GOLDEN / "btcv" / "raw"))
    assert (found.modality, found.normalized, found.spacing_mm, found.plane) == ("CT", True, None, None)
    assert (raw.modality, raw.normalized, raw.plane) == ("CT", False, "axial")
    assert found.class_voxels == raw.class_voxels


def test_pictures_may_be_in_colour(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for number in range(3):
        mask = np.zeros((10, 14 + number), np.uint8)
        mask[2 : 4 + number, 3:5] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
        Image.fromarray(np.repeat(mask[..., None], 3, axis=2)).save(tmp_path / "images" / f"{number}.png")
    found = take_fingerprint(open_folder(tmp_path), class_names=("polyp",))
    assert (found.modality, found.colour, found.plane, found.spacing_mm) == ("picture", True, None, None)
    assert (found.slice_hw, found.largest_hw, found.intensity_range) == ((10, 15), (10, 16), (0.0, 255.0))
    assert found.class_voxels == {"polyp": 2 * (2 + 3 + 4)}


def test_data_without_foreground_are_refused_with_their_numbers(balls, tmp_path):
    shutil.copytree(balls, tmp_path / "data")
    labels = sorted((tmp_path / "data" / "labelsTr").iterdir())
    for path in labels[:3]:
        _rewrite(path, np.zeros_like)
    folder = open_folder(tmp_path / "data")
    found = take_fingerprint(folder, patient_pattern="(p.)_.")
    assert (found.patients_with_foreground, found.empty_cases) == (1, ("p1_a", "p1_b", "p2_a"))
    assert empty_cases(folder, folder.cases) == found.empty_cases
    with pytest.raises(InputError, match=r"found none in 18 slices of 3 cases; .*check that the label maps"):
        take_fingerprint(folder, ["p1_a", "p1_b", "p2_a"])
    with pytest.raises(InputError, match="found none; name one at least"):
        take_fingerprint(folder, [])


def test_real_scans(real_scans):
    hippocampus = open_folder(real_scans / "Task04_Hippocampus")
    found = take_fingerprint(hippocampus, hippocampus.cases[:20])
    assert (found.cases, found.modality, found.spacing_mm, found.plane) == (20, "MR", (1.0, 1.0, 1.0), "sagittal")
    assert found.class_cases == {"Anterior": 20, "Posterior": 20}
    ct = take_fingerprint(open_folder(real_scans / "btcv_like"))
    # 20 slices of 2 mm and 112 of 3 mm; only spleen, liver, stomach, aorta and pancreas are in both scans.
    assert (ct.modality, ct.plane, ct.patient_slices, ct.largest_hw) == ("CT", "axial", (20, 20, 112), (512, 512))
    assert {name for name, cases in ct.class_cases.items() if cases == 2} == {
        *("spleen", "liver", "stomach", "aorta", "pancreas")
    }
    assert ct.intensity_range[0] == -1024
