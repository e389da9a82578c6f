"""Resizing by areas of pixels."""

import pytest
import torch

from samed_peft.models.resizing import resize_aligned


@pytest.mark.parametrize("size", [3, (3, 3)])
def test_a_ramp_keeps_its_place(size):
    """Centres of 12 columns shrunk to 3 lie at 1.5, 5.5 and 9.5, where a triangle of radius 4 leaves a ramp.

    At the ends it is cut off: of columns 0 to 5 with weights 5, 7, 7, 5, 3, 1 the mean is 53 / 28.
    """
    ramp = torch.arange(12.0).expand(2, 3, 12, 12)
    got = resize_aligned(ramp, size)
    assert (got.shape, got.dtype) == ((2, 3, 3, 3), torch.float32)
    assert got[1, 2, 0].tolist() == pytest.approx([53 / 28, 5.5, 11 - 53 / 28], abs=1e-5)


def test_what_shrinks_does_not_alias():
    """Columns that are 0 and 1 in turn become grey."""
    stripes = (torch.arange(64) % 2).float().expand(1, 1, 64, 64)
    assert (resize_aligned(stripes, 16) - 0.5).abs().max() < 0.05


def test_mirrored_slices_give_mirrored_slices():
    slices = torch.rand(1, 2, 9, 14, generator=torch.Generator().manual_seed(0))
    for size in ((5, 30), (9, 14)):
        got = resize_aligned(slices.flip(-1), size).flip(-1)
        torch.testing.assert_close(got, resize_aligned(slices, size), rtol=0, atol=1e-6)
    assert resize_aligned(slices, (9, 14)) is slices
