"""Synapse as a dataset: golden values, splits, cache, bad input."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
from datasets import Dataset

from samed_peft.datasets import common_orientation, list_cases, load_synapse
from samed_peft.errors import InputError
from samed_peft.io import Volume, read_labels, write_mask, write_volume

BTCV = Path(__file__).parents[1] / "golden" / "btcv"
AFFINE = np.diag([-2.0, 2.0, 3.0, 1.0])


@pytest.fixture
def load(tmp_path):
    """`load_synapse` with a cache of the test's own, in this process unless told otherwise."""

    def call(folder, split="train", **options):
        return load_synapse(folder, split, cache_dir=tmp_path / "cache", **{"num_proc": 1, **options})

    return call


def write_raw(folder, cases, *, shape=(3, 8, 10), labels=None, affine=AFFINE, label_affine=AFFINE):
    rng = np.random.default_rng(0)
    for case in cases:
        image = rng.integers(-300, 500, shape).astype(np.int16)
        label = rng.integers(0, 14, shape).astype(np.uint8) if labels is None else labels
        write_volume(Volume(image, affine), folder / "Training" / "img" / f"img{case:04d}.nii.gz")
        write_mask(label, Volume(label, label_affine), folder / "Training" / "label" / f"label{case:04d}.nii.gz")
    return folder


def write_processed(folder, train=(), test=(), *, shape=(3, 8, 10), highest=8):
    rng = np.random.default_rng(0)
    (folder / "train_npz").mkdir(parents=True)
    (folder / "test_vol_h5").mkdir()
    for case in train:
        for index in range(shape[0]):
            image = rng.random(shape[1:], np.float32)
            label = np.full(shape[1:], highest, np.float32)
            np.savez(folder / "train_npz" / f"case{case:04d}_slice{index:03d}.npz", image=image, label=label)
    for case in test:
        with h5py.File(folder / "test_vol_h5" / f"case{case:04d}.npy.h5", "w") as file:
            file["image"] = rng.random(shape, np.float32)
            file["label"] = np.full(shape, highest, np.float32)
    return folder


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("layout", ["raw", "processed", "raw/Training"])
def test_train_equals_sameds_preprocessing(load, layout, num_proc):
    rows = load(BTCV / layout, num_proc=num_proc)
    files = sorted((BTCV / "processed" / "train_npz").iterdir())
    assert [f"{row['case']}_slice{row['slice']:03d}.npz" for row in rows] == [path.name for path in files]
    for row, path in zip(rows, files, strict=True):
        with np.load(path) as golden:
            assert (row["image"].dtype, row["label"].dtype) == (np.float32, np.uint8)
            np.testing.assert_array_equal(row["image"], golden["image"])
            np.testing.assert_array_equal(row["label"], golden["label"])


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("layout", ["raw", "processed"])
def test_test_equals_sameds_preprocessing(load, layout, num_proc):
    rows = load(BTCV / layout, "test", num_proc=num_proc)
    assert list(rows["case"]) == ["case0001", "case0038"]
    for row in rows:
        with h5py.File(BTCV / "processed" / "test_vol_h5" / f"{row['case']}.npy.h5") as golden:
            np.testing.assert_array_equal(row["image"], golden["image"][()])
            np.testing.assert_array_equal(row["label"], golden["label"][()])
        if layout == "raw":
            np.testing.assert_array_equal(row["affine"], nibabel.load(row["path"]).affine)
        else:
            assert row["affine"] is None
            assert row["path"].endswith(f"{row['case']}.npy.h5")


def test_rows_can_be_written_to_and_columns_picked(load):
    rows = load(BTCV / "raw")
    row = rows[0]
    row["image"][:] = 0
    assert rows[0]["image"].any()
    assert rows["image"][1].shape == row["image"].shape
    assert [image.ndim for image in rows[:3]["image"]] == [2, 2, 2]
    assert load(BTCV / "raw", "test").select_columns(["affine"])[0]["affine"].shape == (4, 4)


def test_cases_can_be_chosen(load):
    assert list_cases(BTCV / "raw") == ["case0001", "case0005", "case0007", "case0038"]
    assert list_cases(BTCV / "processed") == list_cases(BTCV / "raw")
    for cases in ([7], ["7"], ["0007"], ["case0007"]):
        assert set(load(BTCV / "raw", "test", cases=cases)["case"]) == {"case0007"}
    assert set(load(BTCV / "raw", cases=[38, 1])["case"]) == {"case0001", "case0038"}
    assert list(load(BTCV / "raw", "test", cases=[38, 1])["case"]) == ["case0038", "case0001"]


def test_processed_cases_cross_over(load):
    volume = load(BTCV / "processed", "test", cases=[5])[0]
    expected = load(BTCV / "raw", "test", cases=[5])[0]
    np.testing.assert_array_equal(volume["image"], expected["image"])
    np.testing.assert_array_equal(volume["label"], expected["label"])
    slices = load(BTCV / "processed", cases=[38])
    expected = load(BTCV / "raw", cases=[38])
    assert list(slices["slice"]) == list(expected["slice"])
    assert all(np.array_equal(one["image"], two["image"]) for one, two in zip(slices, expected, strict=True))


def test_stacking_slices_with_gaps(tmp_path, load):
    folder = write_processed(tmp_path / "data", train=[5])
    (folder / "train_npz" / "case0005_slice001.npz").unlink()
    assert len(load(folder)) == 2
    with pytest.raises(InputError, match=r"every slice of case0005.*\[1\] are missing"):
        load(folder, "test", cases=[5])


def test_windows(load):
    narrow = load(BTCV / "raw", window=(0.0, 100.0))
    default = load(BTCV / "raw")
    assert not np.array_equal(narrow[0]["image"], default[0]["image"])
    expected = np.clip((default[0]["image"] * 400 - 125) / 100, 0, 1)
    np.testing.assert_allclose(narrow[0]["image"], expected, atol=1e-5)
    percentiles = load(BTCV / "raw", window=None)[0]["image"]
    assert (percentiles.min(), percentiles.max()) == (0, 1)
    with pytest.raises(InputError, match="low < high"):
        load(BTCV / "raw", window=(5.0, 5.0))


def test_progress_bar_is_shown(load, capfd):
    load(BTCV / "raw")
    assert "Generating train split" in capfd.readouterr().err


def cache_file(dataset):
    return dataset.cache_files[0]["filename"]


def test_cache_is_used_until_a_file_changes(tmp_path, load):
    folder = write_raw(tmp_path / "data", [5, 6])
    first = load(folder)
    stamp = os.stat(cache_file(first)).st_mtime_ns
    assert cache_file(load(folder)) == cache_file(first)
    assert os.stat(cache_file(first)).st_mtime_ns == stamp

    label_path = folder / "Training" / "label" / "label0006.nii.gz"
    label = read_labels(label_path)
    before = label_path.stat()
    write_mask(np.full_like(label.array, 6), label, label_path)
    os.utime(label_path, ns=(before.st_atime_ns, before.st_mtime_ns))  # content counts, not the clock
    edited = load(folder)
    assert cache_file(edited) != cache_file(first)
    assert set(np.unique(edited[-1]["label"])) == {5}

    write_raw(folder, [7])
    assert len(load(folder)) == 9
    for name in ("img/img0005", "label/label0005"):
        (folder / "Training" / f"{name}.nii.gz").unlink()
    assert set(load(folder)["case"]) == {"case0006", "case0007"}


def test_cache_holds_in_another_process(tmp_path, load):
    first = load(BTCV / "raw")
    code = (
        "import sys; from samed_peft.datasets import load_synapse;"
        "print(load_synapse(sys.argv[1], 'train', cache_dir=sys.argv[2]).cache_files[0]['filename'])"
    )
    output = subprocess.check_output([sys.executable, "-c", code, BTCV / "raw", tmp_path / "cache"], text=True)
    assert output.strip() == cache_file(first)


KILLED = """
import sys, time
from samed_peft.datasets import builder, load_synapse
read = builder.read_pair
def read_slowly(case, **options):
    if case.name == "case0007":
        print("half-way", flush=True)
        time.sleep(60)
    return read(case, **options)
builder.read_pair = read_slowly
load_synapse(sys.argv[1], "train", cache_dir=sys.argv[2], num_proc=1)
"""


def test_killed_preparation_starts_anew(tmp_path, load):
    command = [sys.executable, "-c", KILLED, BTCV / "raw", tmp_path / "cache"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "half-way\n"
        process.send_signal(signal.SIGKILL)
    assert list((tmp_path / "cache").glob("**/*.incomplete/*.arrow")), "killed with rows written"
    rows = load(BTCV / "raw")
    assert len(rows) == 11
    np.testing.assert_array_equal(rows[-1]["label"], load(BTCV / "processed")[-1]["label"])
    assert not list((tmp_path / "cache").glob("**/*.incomplete"))


@pytest.mark.parametrize("num_proc", [1, 2])
def test_failed_preparation_is_repeated(tmp_path, load, num_proc):
    folder = write_raw(tmp_path / "data", [5, 6, 7])
    path = folder / "Training" / "img" / "img0007.nii.gz"
    good = path.read_bytes()
    path.write_bytes(good[:-9])
    with pytest.raises(InputError, match=r"img0007\.nii\.gz cannot be read"):
        load(folder, num_proc=num_proc)
    path.write_bytes(good)
    assert len(load(folder, num_proc=num_proc)) == 9


def test_row_decodes_in_under_a_millisecond(tmp_path, load):
    rows = load(write_processed(tmp_path / "data", train=[5], shape=(8, 512, 512)))
    times = []
    for _ in range(10):
        for index in range(len(rows)):
            start = time.perf_counter()
            assert rows[index]["image"].shape == (512, 512)
            times.append(time.perf_counter() - start)
    assert np.median(times) < 1e-3


def test_folders_that_are_no_data(tmp_path, load):
    with pytest.raises(InputError, match="found nothing"):
        load(tmp_path / "absent")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(InputError, match=r"Training/img/imgNNNN.*train_npz.*found cache|found pictures"):
        load(tmp_path)
    with pytest.raises(InputError, match="found nothing"):
        list_cases(tmp_path / "pictures")
    with pytest.raises(InputError, match="both raw BTCV and preprocessed"):
        list_cases(write_processed(write_raw(tmp_path / "both", [5]), train=[5]))


def test_splits_that_are_wrong(tmp_path, load):
    folder = write_raw(tmp_path / "data", [5, 11])
    with pytest.raises(InputError, match=r"split 'test' is empty.*found \[5, 11\]"):
        load(folder, "test")
    for options, message in (
        ({"split": "val"}, "'train' or 'test', found 'val'"),
        ({"cases": []}, "is empty"),
        ({"cases": [6]}, r"missing \[6\]"),
        ({"cases": [5, "case0005"]}, r"doubled \[5\]"),
        ({"cases": ["liver"]}, "found 'liver'"),
        ({"num_proc": 0}, "num_proc of at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            load(folder, **options)
    assert not (tmp_path / "cache").exists(), "refused before anything is prepared"


@pytest.mark.parametrize(("gone", "kept"), [("img", "label"), ("label", "img")])
def test_pairs_that_are_broken(tmp_path, load, gone, kept):
    folder = write_raw(tmp_path / "data", [5, 6])
    (folder / "Training" / gone / f"{gone}0006.nii.gz").unlink()
    with pytest.raises(InputError, match=rf"{kept}0006\.nii\.gz has no partner.*{gone}0006\.nii\.gz"):
        load(folder)
    assert not (tmp_path / "cache").exists()
    assert len(load(folder, cases=[5])) == 3


def test_doubled_file(tmp_path, load):
    folder = write_raw(tmp_path / "data", [5])
    shutil.copy(folder / "Training" / "img" / "img0005.nii.gz", folder / "Training" / "img" / "img0005.nii")
    with pytest.raises(InputError, match="one file a case"):
        load(folder)


def spoil_label(folder, **options):
    write_raw(folder / "spoiled", [6], **options)
    name = Path("Training", "label", "label0006.nii.gz")
    shutil.copy(folder / "spoiled" / name, folder / name)


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (3, 8, 9)}, r"shape \(3, 8, 10\) .*img0006.*found \(3, 8, 9\) in .*label0006"),
        ({"label_affine": np.diag([-2.0, 2.0, 3.5, 1.0])}, r"label0006.*corners lie 1 mm apart"),
        ({"labels": np.full((3, 8, 10), 14, np.uint8)}, r"label0006\.nii\.gz hold 14, but only 0\.\.13"),
    ],
)
def test_label_maps_that_do_not_fit(tmp_path, load, options, message, num_proc):
    folder = write_raw(tmp_path / "data", [5, 6])
    spoil_label(folder, **options)
    with pytest.raises(InputError, match=message):
        load(folder, num_proc=num_proc)


def test_scans_that_lie_differently_are_no_training_set():
    rows = Dataset.from_dict({"orientation": ["LAS", "LAS", "RAS"], "case": ["case0005", "case0005", "case0006"]})
    assert common_orientation(rows.select(range(2))) == "LAS"
    with pytest.raises(InputError, match=r"found LAS \(case0005\), RAS \(case0006\)"):
        common_orientation(rows)


def test_tiny_differences_of_affines_pass(tmp_path, load):
    affine = AFFINE + 5e-4 * np.eye(4, k=1)
    assert len(load(write_raw(tmp_path / "data", [5], label_affine=affine))) == 3


def test_files_that_are_damaged(tmp_path, load):
    folder = write_raw(tmp_path / "data", [5])
    path = folder / "Training" / "img" / "img0005.nii.gz"
    image = np.full((3, 8, 10), np.nan, np.float32)
    write_volume(Volume(image, AFFINE), path)
    with pytest.raises(InputError, match=r"NaN or infinity in 240 of 240 voxels of .*img0005"):
        load(folder)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"img0005\.nii\.gz has zero bytes"):
        load(folder)


def test_files_of_one_slice_hold_no_more(tmp_path, load):
    folder = write_processed(tmp_path / "data", train=[5])
    np.savez(folder / "train_npz" / "case0005_slice001.npz", image=np.zeros((2, 8, 10)), label=np.zeros((2, 8, 10)))
    with pytest.raises(InputError, match=r"expected one slice, found 2 in .*case0005_slice001\.npz"):
        load(folder)


def test_preprocessed_files_that_are_wrong(tmp_path, load):
    folder = write_processed(tmp_path / "data", train=[5], test=[1], highest=9)
    for split, name in (("train", "case0005_slice000.npz"), ("test", "case0001.npy.h5")):
        with pytest.raises(InputError, match=rf"{name} hold 9, but only 0\.\.8"):
            load(folder, split)
    np.savez(folder / "train_npz" / "case0005_slice000.npz", image=np.zeros((8, 10)))
    with pytest.raises(InputError, match="array 'label'"):
        load(folder)
