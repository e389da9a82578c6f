"""Slices of users' own scans: orientation, window, empty slices, colour, and refusals."""

import dataclasses
import json

import nibabel
import numpy as np
import pytest
from PIL import Image

from samed_peft.datasets.builder import load_slices
from samed_peft.datasets.choices import choose_orientation, choose_window, class_names_for
from samed_peft.datasets.layouts import open_folder
from samed_peft.datasets.rows import warn_of_absent_classes
from samed_peft.errors import InputError
from samed_peft.training.batches import SlicePreparation, TrainingSlices


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def content(modality="MRI"):
    return {"channel_names": {"0": modality}, "labels": {"background": 0, "blob": 1}}


def write_folder(root, cases, modality="MRI"):
    """`cases`: name -> (scan, label, affine), arrays in (x, y, z)."""
    for kind in ("imagesTr", "labelsTr"):
        (root / kind).mkdir(parents=True)
    (root / "dataset.json").write_text(json.dumps(content(modality)))
    for name, (image, label, affine) in cases.items():
        nibabel.save(nibabel.Nifti1Image(image, affine), root / "imagesTr" / f"{name}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label, affine), root / "labelsTr" / f"{name}.nii.gz")
    return open_folder(root)


def blob(shape=(6, 5, 4), seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 1000, shape).astype(np.int16)
    label = np.zeros(shape, np.uint8)
    label[1:3, 2:4, 1:3] = 1
    return image, label


def slices(folder, **options):
    defaults = {"num_classes": 1, "orientation": choose_orientation(folder), "window": choose_window(folder)}
    return load_slices(folder, list(folder.images), **(defaults | options))


@pytest.mark.parametrize(
    ("sizes_mm", "codes"),
    [((1, 1, 5), "LPS"), ((1, 5, 1), "LIP"), ((5, 1, 1), "PIL"), ((1, 1, 1), "LPS"), ((1, 1.05, 1), "LPS")],
)
def test_slices_lie_across_the_coarsest_axis(tmp_path, sizes_mm, codes):
    folder = write_folder(tmp_path / "d", {"a": (*blob(), np.diag([*sizes_mm, 1.0]))})
    assert choose_orientation(folder) == codes
    assert choose_orientation(folder, plane="sagittal") == "PIL"


def test_scans_of_all_orientations_give_the_same_slices(tmp_path):
    image, label = blob()
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    plain = nibabel.Nifti1Image(image, affine), nibabel.Nifti1Image(label, affine)
    cases = {}
    for codes in ("RAS", "LPI", "SRA"):
        target = nibabel.orientations.axcodes2ornt(codes)
        start = nibabel.orientations.io_orientation(affine)
        turned = [n.as_reoriented(nibabel.orientations.ornt_transform(start, target)) for n in plain]
        cases[codes.lower()] = (np.asarray(turned[0].dataobj), np.asarray(turned[1].dataobj), turned[0].affine)
    rows = slices(write_folder(tmp_path / "d", cases))
    assert len(rows) == 12
    by_case = {case: [row for row in rows if row["case"] == case] for case in cases}
    for name in ("image", "label"):
        for other in ("lpi", "sra"):
            for one, two in zip(by_case["ras"], by_case[other], strict=True):
                np.testing.assert_array_equal(one[name], two[name])
    # LPS: columns run to the left, rows to the back, so both axes of a RAS scan are turned round.
    np.testing.assert_array_equal(by_case["ras"][2]["label"], label[::-1, ::-1, 2].T)


def test_percentiles_for_mr_and_a_window_for_ct(tmp_path):
    image, label = blob()
    mr = write_folder(tmp_path / "mr", {"a": (image, label, np.eye(4)), "b": (image * 7, label, np.eye(4))})
    rows = slices(mr)
    np.testing.assert_allclose(rows[0]["image"], rows[4]["image"], atol=1e-5)
    ct = write_folder(tmp_path / "ct", {"a": (image, label, np.eye(4))}, modality="CT")
    assert (choose_window(mr), choose_window(ct)) == (None, (-125.0, 275.0))
    expected = (np.clip(image[::-1, ::-1, 1].T, -125, 275) + 125) / 400
    np.testing.assert_allclose(slices(ct)[1]["image"], expected, atol=1e-6)


@pytest.mark.parametrize(("share", "kept"), [(1.0, [0, 1, 2, 3]), (0.5, [0, 1, 2]), (0.0, [1, 2])])
def test_a_share_of_empty_slices(tmp_path, share, kept):
    folder = write_folder(tmp_path / "d", {"a": (*blob(), np.eye(4))})
    assert [row["slice"] for row in slices(folder, empty_share=share)] == kept


def test_one_channel_of_4d_scans(tmp_path):
    image, label = blob()
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "labelsTr").mkdir()
    both = np.stack([np.zeros_like(image), image], axis=-1)
    nibabel.save(nibabel.Nifti1Image(both, np.eye(4)), tmp_path / "imagesTr" / "a.nii.gz")
    nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), tmp_path / "labelsTr" / "a.nii.gz")
    listed = [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]
    names = {"modality": {"0": "T1", "1": "T2"}, "labels": {"0": "background", "1": "blob"}, "training": listed}
    (tmp_path / "dataset.json").write_text(json.dumps(names))
    rows = slices(open_folder(tmp_path, channel="T2"))
    assert rows[0]["image"].std() > 0.1


@pytest.mark.parametrize("colour", [True, False])
def test_pictures_become_slices(tmp_path, colour):
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for name in "ab":
        picture = rng.integers(0, 256, (20, 30, 3) if colour else (20, 30), np.uint8)
        Image.fromarray(picture).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray((picture.reshape(20, 30, -1)[..., 0] > 128).astype(np.uint8) * 255).save(
            tmp_path / "masks" / f"{name}.png"
        )
    folder = open_folder(tmp_path)
    assert (choose_orientation(folder), choose_window(folder)) == (None, (0.0, 255.0))
    assert class_names_for(folder, None) == ("class 1",)
    rows = slices(folder)
    np.testing.assert_allclose(rows[1]["image"] * 255, picture, atol=1e-4)
    examples = TrainingSlices(rows, SlicePreparation(32, 8, augmentation="samed", seed=3))
    for epoch in range(6):  # turned, rotated and as they are
        example = examples[epoch, 0]
        assert example["pixel_values"].shape == (3 if colour else 1, 32, 32)
        assert (len(np.unique(example["pixel_values"].std(0, correction=0))) > 1) == colour
        assert example["labels"].shape == (8, 8)


def picture_folder(root, *masks):
    for kind in ("images", "masks"):
        (root / kind).mkdir()
    for name, mask in zip("abc", masks, strict=False):
        Image.fromarray(np.full((16, 16), 9, np.uint8)).save(root / "images" / f"{name}.png")
        Image.fromarray(np.resize(np.array(mask, np.uint8), (16, 16))).save(root / "masks" / f"{name}.png")
    return open_folder(root)


@pytest.mark.parametrize(
    ("masks", "found"),
    [
        (([0, 255], [0, 128, 255]), "1, 128, 255"),  # smooth edges
        (([0, 1, 2, 255], [0, 1]), "1, 2, 255"),  # a border that is not to count
        ((range(256),), "1, 2, 3, 4, 5, 6, 7, 8"),
        (([0, 128],), "128"),
    ],
)
def test_greys_of_masks_are_no_classes_by_themselves(tmp_path, masks, found):
    folder = picture_folder(tmp_path, *masks)
    with pytest.raises(InputError, match=rf"labels of .*masks hold {found}\b.*smooth edges.*255.*class_names"):
        class_names_for(folder, None)
    with pytest.raises(InputError, match=r"masks/..png hold .*, but only 0\.\.1 .*smooth edges.*255.*class_names"):
        load_slices(folder, list(folder.images), num_classes=1, orientation=None, window=(0, 255))


def test_masks_may_lack_a_class(tmp_path):
    folder = picture_folder(tmp_path, [0, 1], [0, 2, 4], [0, 255])
    assert class_names_for(folder, None) == ("class 1", "class 2", "class 3", "class 4")


def test_bad_cases_are_named(tmp_path):
    image, label = blob()
    affine = np.eye(4)
    moved = np.diag([1.0, 1, 1, 1])
    moved[0, 3] = 5
    bad = {
        "labels": ((image, label * 2, affine), r"labels of .*a.nii.gz hold 2, but only 0..1 .*class_names"),
        "constant": ((np.ones_like(image), label, affine), "a_0000.nii.gz is constant"),
        "shape": ((image, label[:-1], affine), r"label map of the scan's shape \(4, 5, 6\)"),
    }
    for name, (case, message) in bad.items():
        folder = write_folder(tmp_path / name, {"a": case})
        with pytest.raises(InputError, match=message):
            slices(folder)
    folder = write_folder(tmp_path / "moved", {"a": (image, label, affine)})
    nibabel.save(nibabel.Nifti1Image(label, moved), folder.labels["a"])
    with pytest.raises(InputError, match="5 mm apart"):
        slices(folder)
    with pytest.raises(InputError, match="share of empty slices"):
        slices(folder, empty_share=2)


def test_an_edited_file_is_prepared_anew(tmp_path):
    image, label = blob()
    folder = write_folder(tmp_path / "d", {"a": (image, label, np.eye(4))})
    before = slices(folder)[1]["label"].sum()
    nibabel.save(nibabel.Nifti1Image(np.zeros_like(label), np.eye(4)), folder.labels["a"])
    assert before > 0
    assert slices(folder)[1]["label"].sum() == 0


@pytest.mark.parametrize("cases", ["a", "ab"])  # in this process, and in others
@pytest.mark.parametrize("held_out", [(), ("b",)])
def test_unexpected_errors_name_the_files(tmp_path, cases, held_out):
    folder = write_folder(tmp_path / "d", {"a": (*blob(), np.eye(4)), "b": (*blob(seed=1), np.eye(4))})
    folder = dataclasses.replace(folder, label_table=(0, 300))  # NumPy: OverflowError
    case = "b" if held_out else "[ab]"
    files = rf"\S*imagesTr/{case}_0000\.nii\.gz and \S*labelsTr/{case}\.nii\.gz"
    with pytest.raises(InputError, match=rf"^{files} cannot be used: OverflowError: .*300.*leave the case out$"):
        load_slices(folder, cases, num_classes=1, orientation=None, window=None, held_out=held_out)


@pytest.mark.parametrize("below", ["", "below"])
def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, below):
    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file" / below)
    folder = write_folder(tmp_path / "d", {"a": (*blob(), np.eye(4))})
    with pytest.raises(InputError, match=r"Datasets keeps prepared scans .*file.*; .*HF_HOME.*HF_DATASETS_CACHE"):
        slices(folder)


def test_no_slice_left(tmp_path):
    image, label = blob()
    folder = write_folder(tmp_path / "d", {"a": (image, label * 0, np.eye(4))})
    with pytest.raises(InputError, match="no slice is left"):
        slices(folder, empty_share=0)


def test_class_names_are_as_many_as_the_folder_has(tmp_path):
    folder = write_folder(tmp_path / "d", {"a": (*blob(), np.eye(4))})
    assert class_names_for(folder, ["lesion"]) == ("lesion",)
    with pytest.raises(InputError, match=r"expected 1 class name, as many as .*has \(blob\), found 2: a, b"):
        class_names_for(folder, ["a", "b"])


def test_classes_without_a_labelled_pixel_are_told(tmp_path):
    image, label = blob()
    label[4, 4, 3] = 3
    rows = slices(write_folder(tmp_path / "d", {"a": (image, label, np.eye(4))}), num_classes=4)
    with pytest.warns(UserWarning, match="no training slice has a labelled pixel of b, d: .*Dice 1"):
        warn_of_absent_classes(rows, ("a", "b", "c", "d"))
    warn_of_absent_classes(rows, ("a",))


def test_pictures_have_no_plane(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / kind / "a.png")
    with pytest.raises(InputError, match="expected scans with an orientation"):
        choose_orientation(open_folder(tmp_path), plane="axial")
