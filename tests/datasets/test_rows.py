"""Arrays as a feature of Datasets: formats, `map`, `filter`, saving and pickling give arrays, as users expect."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, concatenate_datasets, load_from_disk

from samed_peft.datasets import ArrayFeature
from samed_peft.datasets.rows import SLICE_FEATURES, VOLUME_FEATURES
from samed_peft.training.batches import SlicePreparation, TrainingSlices, batch_loader


def slices(*shapes):
    rng = np.random.default_rng(0)
    images = [rng.random(shape, np.float32) for shape in shapes]
    labels = [rng.integers(0, 9, shape[:2], np.uint8) for shape in shapes]
    names = {"case": ["case0005"] * len(shapes), "slice": range(len(shapes)), "orientation": ["LAS"] * len(shapes)}
    names["slice_spacing_mm"] = [2.0] * len(shapes)
    columns = {"image": images, "label": labels, **names}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return Dataset.from_list(rows, features=SLICE_FEATURES), images


@pytest.fixture
def equal():
    return slices(*[(4, 6)] * 4)


def test_plain_rows_are_writable_arrays_of_the_dtype(equal):
    rows, images = equal
    for row, image in zip(rows, images, strict=True):
        assert (row["image"].dtype, row["label"].dtype) == (np.float32, np.uint8)
        np.testing.assert_array_equal(row["image"], image)
        row["image"][:] = 0
    assert rows[0]["image"].any()
    assert [image.shape for image in rows[1:3]["image"]] == [(4, 6)] * 2
    assert rows["label"][3].shape == (4, 6)
    assert set(rows.select_columns("label")[0]) == {"label"}


@pytest.mark.parametrize(
    ("name", "kind", "dtype"), [("numpy", np.ndarray, np.float32), ("torch", torch.Tensor, torch.float32)]
)
def test_formats_give_arrays_and_tensors(equal, name, kind, dtype):
    rows, images = equal
    formatted = rows.with_format(name)
    batches = next(formatted.iter(2))["image"], formatted[:2]["image"], formatted.select_columns("image")[:2]["image"]
    for image in (formatted[1]["image"], formatted["image"][1], *(batch[1] for batch in batches)):
        assert isinstance(image, kind)
        assert image.dtype == dtype
        np.testing.assert_array_equal(image, images[1])
    assert all(isinstance(batch, kind) and batch.shape == (2, 4, 6) for batch in batches)  # equal shapes are stacked


def test_map_keeps_the_column(equal):
    rows, images = equal
    singly = rows.map(lambda row: {"image": 2 * row["image"]})
    batched = rows.map(lambda batch: {"image": [2 * image for image in batch["image"]]}, batched=True, batch_size=3)
    as_tensors = rows.with_format("torch").map(lambda row: {"image": 2 * row["image"]}).with_format(None)
    coloured = rows.map(lambda row: {"image": np.stack([row["image"]] * 3, axis=-1)})
    for mapped in (singly, batched, as_tensors):
        assert mapped.features == rows.features
        np.testing.assert_array_equal(mapped[3]["image"], 2 * images[3])
        assert (mapped[3]["image"].dtype, mapped[3]["label"].dtype) == (np.float32, np.uint8)
    assert coloured.features == rows.features
    np.testing.assert_array_equal(coloured[2]["image"][..., 1], images[2])
    assert rows.map(lambda row: {"slice": row["slice"] + 1}, num_proc=2).features == rows.features


def test_map_never_cuts_numbers_to_fit(equal):
    rows, _ = equal
    halves = rows.map(lambda row: {"label": row["label"] + 0.5})
    assert not isinstance(halves.features["label"], ArrayFeature)  # as any column of Datasets whose type does not fit
    np.testing.assert_array_equal(halves[0]["label"], rows[0]["label"] + 0.5)
    with pytest.raises(Exception, match=r"truncated|expected an array"):
        rows.map(lambda row: {"label": row["label"] + 0.5}, features=SLICE_FEATURES)
    with pytest.raises(Exception, match="300 not in range"):
        Dataset.from_list([{"label": [[300]]}], features=Features({"label": ArrayFeature("uint8")}))
    listed = Dataset.from_list([{"label": [[3]]}], features=Features({"label": ArrayFeature("uint8")}))
    assert listed[0]["label"].dtype == np.uint8
    with pytest.raises(Exception, match="expected an array, found lists"):
        rows.map(lambda row: {"label": [[1, 2], [3]]}, features=SLICE_FEATURES)


def test_rows_of_different_sizes():
    rows, images = slices((4, 6), (3, 2), (5, 1))
    mapped = rows.map(lambda row: {"image": 2 * row["image"]})
    assert mapped.features == rows.features
    for found in (mapped, mapped.with_format("numpy"), mapped.with_format("torch")):
        for row, image in zip(found[:]["image"], images, strict=True):
            np.testing.assert_array_equal(row, 2 * image)


def test_filter_select_sort_and_concatenate(equal):
    rows, images = equal
    kept = rows.filter(lambda row: row["slice"] > 1 and row["image"].shape == (4, 6))
    assert list(kept["slice"]) == [2, 3]
    np.testing.assert_array_equal(rows.select([3, 0])[0]["image"], images[3])
    np.testing.assert_array_equal(kept.shuffle(seed=0).flatten_indices()[0]["image"].shape, (4, 6))
    both = concatenate_datasets([rows, kept])
    assert both.features == rows.features
    np.testing.assert_array_equal(both[5]["image"], images[3])


def test_saved_rows_are_read_in_another_process(equal, tmp_path):
    rows, images = equal
    rows.save_to_disk(tmp_path / "rows")
    np.testing.assert_array_equal(load_from_disk(tmp_path / "rows")[2]["image"], images[2])
    code = (
        "import sys; from datasets import load_from_disk; from samed_peft.datasets import ArrayFeature;"
        "rows = load_from_disk(sys.argv[1]); print(rows[2]['image'].shape, rows.with_format('numpy')[0]['image'].dtype)"
    )
    output = subprocess.check_output([sys.executable, "-c", code, tmp_path / "rows"], text=True)
    assert output.split("\n")[0] == "(4, 6) float32"


def test_rows_are_pickled_to_workers(equal):
    rows, images = equal
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(rows))[1]["image"], images[1])
    examples = TrainingSlices(rows, SlicePreparation(8, 2, augmentation="samed", seed=0))
    batch = [[(0, 0), (0, 3)]]
    (alone,) = batch_loader(examples, batch, num_workers=0)
    (by_workers,) = batch_loader(examples, batch, num_workers=1)
    assert all(torch.equal(alone[name], by_workers[name]) for name in alone)


@pytest.mark.parametrize("name", [None, "numpy", "torch"])
def test_affines_may_be_missing(name):
    array = np.zeros((2, 3, 4))
    rows = [
        {"image": array, "label": array.astype(np.uint8), "case": "a", "affine": affine, "path": "a.nii"}
        for affine in (np.diag([2.0, 2.0, 3.0, 1.0]), None)
    ]
    rows = Dataset.from_list(rows, features=VOLUME_FEATURES)
    formatted = rows.with_format(name)
    assert formatted[0]["affine"].shape == (4, 4)
    assert formatted[1]["affine"] is None
    assert rows[0]["affine"].dtype == np.float64
    assert rows.map(lambda row: {"affine": row["affine"]}).features == rows.features


def test_preprocessing_does_not_load_datasets():
    code = "import sys, samed_peft.datasets.preprocessing; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
