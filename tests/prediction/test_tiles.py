"""Tiles of the encoder's size that overlap and are blended."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from samed_peft.adapters.save_load import add_lora
from samed_peft.config import SamedConfig
from samed_peft.errors import InputError
from samed_peft.io import Volume
from samed_peft.models.bases import load_sam
from samed_peft.models.resizing import pad_to
from samed_peft.prediction import with_tiles
from samed_peft.prediction.inference import predict_probabilities, predict_volume
from samed_peft.prediction.tiles import importance_map, tile_starts, tiled_logits


@pytest.mark.parametrize(
    ("length", "starts"),
    [(5, [0]), (8, [0]), (9, [0, 1]), (12, [0, 4]), (13, [0, 2, 5]), (16, [0, 4, 8]), (17, [0, 3, 6, 9])],
)
def test_tiles_cover_an_axis(length, starts):
    """Of 8 pixels, at least 4 of which overlap: from 13 on, two steps of 4 are needed, from 17 on three."""
    assert tile_starts(length, 8) == starts


def test_the_importance_of_pixels():
    """A Gaussian of a standard deviation of an eighth of the tile, relative to the pixels nearest the centre."""
    weights = importance_map(16)
    assert weights.max() == weights[7, 7] == weights[8, 8] == 1
    assert weights[7, 10].item() == pytest.approx(math.exp(-(2.5**2 - 0.5**2) / (2 * 2**2)), rel=1e-6)
    assert weights.equal(weights.flip(0, 1))
    assert importance_map(1024).min() > 0


def test_where_tiles_overlap_their_logits_are_weighted():
    """Two tiles of 8 columns start at 0 and 4; the one's logits are 1, the other's 5."""
    numbers = iter([1.0, 5.0])

    def forward(tiles):
        return torch.stack([torch.full((1, 2, 2), next(numbers)) for _ in tiles])

    (got,) = tiled_logits(forward, torch.zeros(1, 3, 8, 12), size=8, batch_size=1)
    assert got.shape == (1, 1, 8, 12)
    one, other = ((math.exp(-0.5 * (column - 3.5) ** 2)) for column in (5, 1))
    expected = [1.0] * 4 + [5.0] * 4
    assert got[0, 0, 3, [0, 1, 2, 3, 8, 9, 10, 11]].tolist() == pytest.approx(expected)
    assert got[0, 0, 3, 5].item() == pytest.approx((one * 1 + other * 5) / (one + other), rel=1e-5)


@pytest.mark.parametrize("size_hw", [(8, 8), (5, 21), (30, 17), (3, 4)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_the_tiles_show_lies_where_it_was(size_hw, batch_size):
    slices = torch.rand(2, 3, *size_hw, generator=torch.Generator().manual_seed(0))
    seen = []

    def forward(tiles):
        seen.append(len(tiles))
        return tiles

    got = torch.cat(list(tiled_logits(forward, slices, size=8, batch_size=batch_size)))
    torch.testing.assert_close(got, slices, rtol=0, atol=1e-5)
    assert max(seen) <= batch_size


def test_small_slices_are_padded_on_both_sides():
    padded = pad_to(torch.ones(1, 1, 3, 8), 6)
    assert padded[0, 0, :, 0].tolist() == [0, 1, 1, 1, 0, 0]
    assert padded.shape == (1, 1, 6, 8)
    assert pad_to(padded, 6) is padded


@pytest.fixture(scope="module")
def model():
    """An adapter of tiles, with random weights that give several labels."""
    torch.manual_seed(5)
    config = SamedConfig("tiny-sam", ("a", "b"), image_size=32, window=(0.0, 100.0), resampling="aligned", tile=True)
    return add_lora(load_sam("tiny-sam", class_names=config.class_names, image_size=32), config).eval()


@pytest.fixture(scope="module")
def scan():
    return Volume(np.random.default_rng(0).uniform(0, 100, (2, 40, 50)).astype(np.float32))


def test_slices_are_segmented_in_tiles(model, scan):
    def forward(tiles):
        return model(pixel_values=tiles).logits

    with torch.inference_mode():
        pixels = torch.from_numpy(scan.array / 100)[:, None].expand(-1, 3, -1, -1)
        logits = torch.cat(list(tiled_logits(forward, pixels, size=32, batch_size=3)))
    mask, probabilities = predict_probabilities(model, scan, batch_size=3)
    assert len(np.unique(mask)) > 1
    assert (mask == logits.argmax(1).numpy()).mean() > 0.999
    np.testing.assert_allclose(probabilities / 65535, logits.softmax(1).numpy().swapaxes(0, 1), atol=1e-4)
    np.testing.assert_array_equal(predict_volume(model, scan, batch_size=3), mask)


def test_a_slice_of_the_tile_s_size_is_seen_once(model, scan):
    array = np.ascontiguousarray(scan.array[:, :32, :32])
    with torch.inference_mode():
        logits = model(pixel_values=torch.from_numpy(array / 100)[:, None].expand(-1, 3, -1, -1)).logits
    expected = F.interpolate(logits, (32, 32), mode="bilinear").argmax(1).numpy()
    assert (predict_volume(model, Volume(array)) == expected).mean() > 0.999


def test_flips_in_tiles(model, scan):
    flipped = Volume(np.ascontiguousarray(scan.array[:, :, ::-1]))
    one, other = (predict_volume(model, volume, flips=True) for volume in (scan, flipped))
    assert (one == other[:, :, ::-1]).mean() > 0.999


def test_an_adapter_of_whole_slices_segments_in_tiles_with_a_warning(model, scan):
    assert with_tiles(model) is model
    whole = dataclasses.replace(model.samed_config, tile=False, resampling="samed", input_size=16)
    model.base_model.model.samed_config, of_tiles = whole, model.samed_config
    try:
        with pytest.warns(UserWarning, match=r"whole slices resized to 32 pixels, .* at another scale"):
            tiled = with_tiles(model)
        expected = predict_volume(model, scan)
        assert tiled.samed_config == of_tiles
        assert model.samed_config == whole
    finally:
        model.base_model.model.samed_config = of_tiles
    np.testing.assert_array_equal(predict_volume(tiled, scan), predict_volume(model, scan))
    assert (predict_volume(tiled, scan) != expected).any()


def test_tiles_are_not_resized():
    with pytest.raises(InputError, match="tile needs resampling aligned, since tiles are not resized; found samed"):
        SamedConfig("b", ("a",), tile=True)
