"""Order and augmentation depend on (seed, epoch, index) and on nothing else."""

import numpy as np
import pytest
import torch

from samed_peft.errors import InputError
from samed_peft.models.losses import IGNORED_LABEL
from samed_peft.training.batches import FILLER, SlicePreparation, TrainingSlices, batch_loader, epoch_batches


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.random((20, 24), dtype=np.float32),
            "label": rng.integers(0, 9, (20, 24), dtype=np.uint8),
        }
        for _ in range(7)
    ]


def load(rows, *, workers, epoch=0, seed=3):
    slices = TrainingSlices(rows, SlicePreparation(32, 8, augmentation="samed", seed=seed))
    batches = epoch_batches(len(rows), batch_size=2, seed=5, epoch=epoch)
    return list(batch_loader(slices, batches, num_workers=workers))


def test_shapes(rows):
    batches = load(rows, workers=0)
    assert [len(b["labels"]) for b in batches] == [2, 2, 2, 1]
    assert batches[0]["pixel_values"].shape == (2, 3, 32, 32)
    assert batches[0]["pixel_values"].dtype == torch.float32
    assert batches[0]["labels"].shape == (2, 8, 8)
    assert batches[0]["labels"].dtype == torch.int64


def test_one_geometry_for_image_and_labels():
    """Corner to corner, SAMed's low labels would lie up to half of a low pixel beside the image."""
    rows, columns = np.indices((30, 50))
    label = ((rows >= 10) & (rows < 20) & (columns >= 30) & (columns < 45)).astype(np.uint8)
    preparation = SlicePreparation(120, 30, aligned=True)
    pixels, labels = preparation.example(label.astype(np.float32), label, draw=(0, 0))
    assert labels.shape == (120, 120)
    expected = np.zeros((120, 120))
    expected[40:80, 72:108] = 1  # the same shares of the height and the width
    np.testing.assert_array_equal(labels, expected)
    for line in ((0, 60), (0, slice(None), 90)):  # away from the corners, which are rounded
        np.testing.assert_array_equal(pixels[line] > 0.5, expected[line[1:]])


def test_tiles_are_cut_at_the_scale_of_the_slice():
    label = np.arange(48 * 20, dtype=np.int64).reshape(48, 20) % 251
    options = SlicePreparation(32, 8, aligned=True, tile=True, seed=4)
    starts = set()
    for index in range(20):
        pixels, labels = options.example((label / 251).astype(np.float32), label.astype(np.uint8), draw=(0, index))
        assert labels.shape == pixels.shape[1:] == (32, 32)
        np.testing.assert_allclose(pixels[0], labels / 251, atol=1e-6)
        columns = np.flatnonzero(labels.any(0))
        assert np.ptp(columns) == 19  # all of it, in the middle of what was padded
        starts.add(int(labels[0, columns[0]]))
    assert len(starts) > 5
    middle = options.example((label / 251).astype(np.float32), label.astype(np.uint8), draw=None)[1]
    np.testing.assert_array_equal(middle[:, columns], label[8:40])


@pytest.mark.parametrize("aligned", [False, True])
def test_strong_augmentation_in_both_geometries(rows, aligned):
    size = 32 if aligned else 8
    options = SlicePreparation(32, 8, aligned=aligned, augmentation="strong", mirror=("columns",), seed=2)
    slices = TrainingSlices(rows, options)
    one, two, other_epoch = slices[0, 3], slices[0, 3], slices[1, 3]
    assert one["labels"].shape == (size, size)
    assert one["pixel_values"].equal(two["pixel_values"])
    assert not one["pixel_values"].equal(other_epoch["pixel_values"])


def test_neighbours_fill_the_outer_channels(rows):
    neighbours = np.array([[0, 1], *([n - 1, n + 1] for n in range(1, 6)), [5, 6]])
    pixels = TrainingSlices(rows, SlicePreparation(32, 8), neighbours=neighbours)[0, 3]["pixel_values"]
    alone = TrainingSlices(rows, SlicePreparation(32, 8))
    for channel, row in enumerate((2, 3, 4)):
        assert pixels[channel].equal(alone[0, row]["pixel_values"][0])


def test_colours_leave_no_room_for_neighbours(rows):
    coloured = [{**row, "image": np.stack([row["image"]] * 3, axis=-1), "case": "a"} for row in rows]
    slices = TrainingSlices(coloured, SlicePreparation(32, 8), neighbours=np.zeros((7, 2), int))
    with pytest.raises(InputError, match="a is in colour, so its channels have no room for neighbours"):
        slices[0, 0]


def test_any_number_of_workers_gives_the_same_batches(rows):
    for one, two in zip(load(rows, workers=0), load(rows, workers=2), strict=True):
        assert one["pixel_values"].equal(two["pixel_values"])
        assert one["labels"].equal(two["labels"])


def test_a_grey_slice_is_one_channel_in_memory(rows):
    for workers in (0, 1):
        pixels = load(rows, workers=workers)[0]["pixel_values"]
        assert pixels.stride(1) == 0
        assert pixels[:, 0].equal(pixels[:, 2])


def test_colours_stay_three(rows):
    coloured = [{**row, "image": np.stack([row["image"], row["image"] / 2, row["image"] * 0], axis=-1)} for row in rows]
    grey, colour = load(rows, workers=0)[0]["pixel_values"], load(coloured, workers=0)[0]["pixel_values"]
    assert colour.shape == grey.shape
    assert torch.allclose(colour[:, 0], grey[:, 0])
    assert torch.allclose(colour[:, 1], grey[:, 0] / 2)


def test_a_batch_may_mix_grey_and_colour(rows):
    coloured = [{**row, "image": np.stack([row["image"]] * 3, axis=-1)} for row in rows]
    grey, mixed = load(rows, workers=0), load([*coloured[:3], *rows[3:]], workers=0)
    for one, two in zip(grey, mixed, strict=True):
        assert one["pixel_values"].equal(two["pixel_values"])


def test_more_workers_than_cores_are_not_started(rows, monkeypatch):
    monkeypatch.setattr("samed_peft.training.batches.available_cores", lambda: 1)
    assert len(load(rows, workers=50)) == 4  # PyTorch would warn, and warnings are errors


def test_epochs_differ(rows):
    assert not load(rows, workers=0)[0]["pixel_values"].equal(load(rows, workers=0, epoch=1)[0]["pixel_values"])


def test_loading_leaves_the_global_random_state_alone(rows):
    state = torch.get_rng_state()
    load(rows, workers=0)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_share_out_the_batches_of_one(processes):
    whole = epoch_batches(25, batch_size=2 * processes, seed=1, epoch=4)
    parts = [
        epoch_batches(25, batch_size=2, seed=1, epoch=4, process=p, num_processes=processes) for p in range(processes)
    ]
    assert {len(part) for part in parts} == {len(whole)}
    for number, batch in enumerate(whole):
        together = [key for part in parts for key in part[number] if key[1] != FILLER]
        assert sorted(together) == sorted(batch)
    assert sorted(index for batch in whole for _, index in batch) == list(range(25))


def test_a_filler_counts_nowhere(rows):
    slices = TrainingSlices(rows, SlicePreparation(32, 8, augmentation="samed", seed=3))
    assert (slices[0, FILLER]["labels"] == IGNORED_LABEL).all()
