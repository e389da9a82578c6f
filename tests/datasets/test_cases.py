"""Cases read from their files: the volumes that rows would hold, names of data, and checks before a training."""

import dataclasses
import shutil

import numpy as np
import pytest
from conftest import GOLDEN

from samed_peft.datasets import CaseVolumes, check_cases, describe_folder, load_slices, load_synapse, open_folder
from samed_peft.datasets.preprocessing import normalized_array
from samed_peft.errors import InputError
from samed_peft.io import content_fingerprint, read_labels, read_volume, write_mask

BTCV = GOLDEN / "btcv"
WINDOW = (-125.0, 275.0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("layout", ["raw", "processed"])
def test_volumes_from_files_equal_those_of_rows(layout):
    cases = ["case0001", "case0005", "case0038"]  # preprocessed, one of them has slices alone
    in_rows = CaseVolumes.pairs(load_synapse(BTCV / layout, "test", cases=cases, num_proc=1))
    folder = open_folder(BTCV / layout)
    scans, references = CaseVolumes.of_folder(folder, cases)
    assert list(scans) == list(references) == cases
    for case in cases:
        scan, reference = scans[case], references[case]
        scaled = dataclasses.replace(scan, array=normalized_array(scan, WINDOW))
        for one, two in zip((scaled, reference), (volumes[case] for volumes in in_rows), strict=True):
            np.testing.assert_array_equal(one.array, two.array)
            assert one.array.dtype == two.array.dtype
            assert np.array_equal(one.affine, two.affine) if two.affine is not None else one.affine is None
        assert scan.normalized == (layout == "processed")


@pytest.mark.parametrize("layout", ["raw", "processed"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_names_of_data_are_those_of_the_rows(layout, split):
    folder, cases = open_folder(BTCV / layout), ["case0001", "case0005"]
    name = folder.data_name(f"{layout}-{split}", cases, as_slices=split == "train")
    assert name == load_synapse(BTCV / layout, split, cases=cases, num_proc=1).config_name
    assert folder.data_name("validation", []) == f"validation-{content_fingerprint([])[:16]}"


def test_names_of_data_do_not_change():
    """Runs that were begun with an earlier version are resumed by these names."""
    names = {
        ("raw", "train"): "raw-train-fdcdf3dda897cf6e",
        ("raw", "test"): "raw-test-9c935263ec08ed9b",
        ("processed", "train"): "processed-train-0bc005889ba0e740",
        ("processed", "test"): "processed-test-4014e42a948cc219",
    }
    for (layout, split), name in names.items():
        cases = ["case0005"] if split == "train" else ["case0038"]
        folder = open_folder(BTCV / layout)
        assert folder.data_name(f"{layout}-{split}", cases, as_slices=split == "train") == name


def test_any_layout_becomes_slices():
    raw, processed = (open_folder(BTCV / layout) for layout in ("raw", "processed"))
    chosen = describe_folder(raw)
    assert (chosen["window"], chosen["channel"], chosen["class_names"]) == (WINDOW, None, raw.class_names)
    options = {"num_classes": 8, "orientation": None, "window": WINDOW}
    one, two = (load_slices(folder, ["case0005"], **options) for folder in (raw, processed))
    expected = load_synapse(BTCV / "raw", "train", cases=[5], num_proc=1)
    for rows in (one, two):
        for row, other in zip(rows, expected, strict=True):
            assert row["slice"] == other["slice"]
            np.testing.assert_array_equal(row["image"], other["image"])
            np.testing.assert_array_equal(row["label"], other["label"])


@pytest.mark.parametrize(("share", "kept"), [(1.0, [0, 1, 2, 3, 4, 5]), (0.5, [0, 3, 4, 5]), (0.0, [4, 5])])
def test_a_share_of_empty_slices_counts_over_the_case_however_it_is_stored(tmp_path, share, kept):
    shutil.copytree(BTCV / "processed", tmp_path / "data")
    for number in range(4):
        path = tmp_path / "data" / "train_npz" / f"case0005_slice{number:03d}.npz"
        image = read_volume(path).array[0]
        np.savez(path, image=image, label=np.zeros_like(image))
    folder = open_folder(tmp_path / "data")
    rows = load_slices(folder, ["case0005"], num_classes=8, orientation=None, window=None, empty_share=share)
    assert list(rows["slice"]) == kept


def test_references_lie_on_their_scan():
    folder = open_folder(BTCV / "raw")
    scans, references = CaseVolumes.of_folder(folder, ["case0001"])
    np.testing.assert_array_equal(references["case0001"].affine, scans["case0001"].affine)
    stored = read_labels(folder.labels["case0001"]).array
    np.testing.assert_array_equal(references["case0001"].array, np.array(folder.label_table)[stored])


def test_cases_are_checked_before_a_training(tmp_path):
    shutil.copytree(BTCV / "raw", tmp_path / "raw")
    path = tmp_path / "raw" / "Training" / "label" / "label0038.nii.gz"
    labels = read_labels(path)
    write_mask(np.where(labels.array == 6, 14, labels.array).astype(np.uint8), labels, path)
    folder = open_folder(tmp_path / "raw")
    check_cases(folder, ["case0001", "case0007"], num_classes=8, window=WINDOW)
    with pytest.raises(InputError, match=r"label0038\.nii\.gz hold 14, but only 0\.\.13 .*another dataset"):
        check_cases(folder, ["case0001", "case0038"], num_classes=8, window=WINDOW)
    with pytest.raises(InputError, match="found case0099; there are case0001, case0005"):
        check_cases(folder, ["case0099"], num_classes=8, window=WINDOW)
    path.unlink()
    with pytest.raises(InputError, match=r"img0038\.nii\.gz has no partner: expected .*label0038\.nii\.gz; add it"):
        check_cases(open_folder(tmp_path / "raw"), ["case0038"], num_classes=8, window=WINDOW)


def test_volumes_of_one_column_and_of_scans():
    rows = load_synapse(BTCV / "raw", "test", cases=["case0038"], num_proc=1)
    scans, references = CaseVolumes.pairs(rows)
    for column, volumes in (("image", scans), ("label", references)):
        one = CaseVolumes.of_rows(rows, column)
        assert list(one) == list(volumes) == ["case0038"]
        np.testing.assert_array_equal(one["case0038"].array, volumes["case0038"].array)
    path = open_folder(BTCV / "raw").images["case0038"]
    np.testing.assert_array_equal(CaseVolumes.of_scans({"a": path}, channel=3)["a"].array, read_volume(path).array)


def test_asking_for_a_case_does_not_read_it():
    cases = CaseVolumes({"a": lambda: 1 / 0})
    assert "a" in cases
    assert "b" not in cases
