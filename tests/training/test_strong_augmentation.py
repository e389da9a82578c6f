"""Slices and labels move together, intensities change alone, and all depends on the generator."""

import numpy as np
import pytest
import torch

from samed_peft.training import strong_augmentation
from samed_peft.training.strong_augmentation import augment_strongly


def disc(size=64, centre=(24, 40), radius=9):
    rows, columns = np.indices((size, size))
    return torch.from_numpy((np.hypot(rows - centre[0], columns - centre[1]) < radius).astype(np.uint8))


def augmented(seed, label=None, **options):
    label = disc() if label is None else label
    return augment_strongly(label[None].float(), label, rng=np.random.default_rng(seed), **options)


def test_shapes_types_and_range():
    for seed in range(20):
        pixels, label = augmented(seed, mirror=("rows", "columns"))
        assert pixels.shape == (1, 64, 64)
        assert pixels.dtype == torch.float32
        assert label.dtype == torch.uint8
        assert 0 <= pixels.min() <= pixels.max() <= 1


def test_labels_move_with_the_pixels(monkeypatch):
    monkeypatch.setattr(strong_augmentation, "_with_other_intensities", lambda pixels, **_: pixels)
    moved = 0
    for seed in range(30):
        pixels, label = augmented(seed, mirror=("rows", "columns"))
        centres = [torch.nonzero(inside).float().mean(0) for inside in (pixels[0] > 0.5, label)]
        assert torch.dist(*centres) < 0.3
        assert abs((pixels[0] > 0.5).sum() - label.sum()) < 0.1 * label.sum()
        moved += not label.equal(disc())
    assert moved > 20


def test_the_generator_decides_everything():
    one, two, other = augmented(5), augmented(5), augmented(6)
    assert one[0].equal(two[0])
    assert one[1].equal(two[1])
    assert not one[0].equal(other[0])


@pytest.mark.parametrize(("mirror", "dim"), [("rows", 0), ("columns", 1)])
def test_mirroring_is_along_the_named_axis_alone(mirror, dim, monkeypatch):
    monkeypatch.setattr(strong_augmentation, "_moved", lambda pixels, label, **_: (pixels, label))
    found = [augmented(seed, mirror=(mirror,))[1] for seed in range(40)]
    flipped = sum(label.equal(disc().flip(dim)) for label in found)
    assert flipped + sum(label.equal(disc()) for label in found) == 40
    assert 10 < flipped < 30


def test_turning_does_not_shear_a_slice_that_was_made_square(monkeypatch):
    """A slice of 32 x 64 was stretched to 64 x 64: a disc of it is an ellipse, and stays one of the same area."""
    monkeypatch.setattr(strong_augmentation, "_SCALES", (1.0, 1.0))
    monkeypatch.setattr(strong_augmentation, "_LARGEST_SHIFT", 0.0)
    rows, columns = np.indices((64, 64))
    ellipse = torch.from_numpy((np.hypot((rows - 31.5) / 2, columns - 31.5) < 10).astype(np.uint8))
    for seed in range(10):
        _, label = augmented(seed, ellipse, aspect=2.0)
        height, width = (np.ptp(np.flatnonzero(label.numpy().any(axis))) + 1 for axis in (1, 0))
        assert 1.6 < height / width < 2.5  # it is stretched by up to exp(0.2)
