"""Test-time augmentation and smoothing across slices, and their choice on validation cases."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from samed_peft.adapters.info import adapter_info, info_text
from samed_peft.adapters.save_load import add_lora, load_adapter, save_adapter
from samed_peft.config import SamedConfig
from samed_peft.errors import InputError
from samed_peft.io import Volume
from samed_peft.models.bases import load_sam
from samed_peft.prediction import PredictionOptions, choose_refinement, predict_volume, unrefined
from samed_peft.prediction.slices import _mean_over_shifts, smoothed_logits

NAMES = ("liver", "spleen")
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])
"""Slices 2 mm apart."""


def scan(seed=0, *, slices=7, affine=AFFINE):
    coarse = np.random.default_rng(seed).uniform(0, 100, (slices, 4, 5)).astype(np.float32)
    return Volume(coarse.repeat(6, axis=1).repeat(4, axis=2), affine)


@pytest.fixture(scope="module")
def model():
    """Untrained, so its masks are ragged, and averages change them."""
    config = SamedConfig("tiny-sam", NAMES, image_size=64, window=(0.0, 100.0), resampling="aligned")
    torch.manual_seed(1)
    return add_lora(load_sam("tiny-sam", class_names=NAMES, image_size=64), config)


def refined(model, **values):
    copy = unrefined(model)
    copy.samed_config = dataclasses.replace(copy.samed_config, **values)
    return copy


@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("sizes", [(1,), (3, 2), (1, 1, 5), (8, 8, 1)])
def test_smoothing_is_a_gaussian_over_slices_whatever_the_batches(sigma, sizes):
    logits = torch.randn(sum(sizes), 3, 4, 5, generator=torch.Generator().manual_seed(1))
    smooth = torch.cat(list(smoothed_logits(iter(logits.split(sizes)), sigma)))
    radius = int(np.ceil(3 * sigma))
    expected = ndimage.gaussian_filter1d(logits.double().numpy(), sigma, axis=0, mode="nearest", radius=radius)
    np.testing.assert_allclose(smooth, expected, atol=1e-6)


def test_nothing_to_smooth_gives_nothing():
    assert list(smoothed_logits(iter(()), 1.0)) == []


def test_shifts_are_moved_back():
    """A model that averages over blocks of 2 x 2 pixels, a quarter of a patch of 8, moves with its input."""
    seen = []

    def blocks(pixels):
        seen.append(pixels)
        return F.avg_pool2d(pixels, 2)

    pixels = torch.zeros(1, 3, 32, 32)
    pixels[..., 10:20, 12:16] = 1
    logits = _mean_over_shifts(blocks, pixels, patch=8)
    torch.testing.assert_close(logits, F.avg_pool2d(pixels, 2))
    rows, columns = (sorted(int(one.any(dim).nonzero()[0, -1]) for one in (s[0, 0] for s in seen)) for dim in (1, 0))
    assert rows == [8, 8, 12, 12]
    assert columns == [10, 10, 14, 14]


def test_prediction_averages_and_smooths_as_the_adapter_records(model):
    volume = scan()
    plain = predict_volume(model, volume)
    masks = {
        (tta, mm): predict_volume(refined(model, tta=tta, smoothing_mm=mm), volume, batch_size=3)
        for tta in ("none", "shifts", "flips")
        for mm in (0.0, 2.0)
    }
    np.testing.assert_array_equal(masks["none", 0.0], plain)
    others = [mask for key, mask in masks.items() if key != ("none", 0.0)]
    assert len({mask.tobytes() for mask in (plain, *others)}) == 6
    np.testing.assert_array_equal(masks["flips", 0.0], predict_volume(model, volume, flips=True))
    # One slice distance: the same Gaussian, whatever the millimetres are.
    near = scan(affine=np.diag([1.0, 1.0, 0.5, 1.0]))
    np.testing.assert_array_equal(predict_volume(refined(model, smoothing_mm=0.5), near), masks["none", 2.0])


def test_smoothing_is_across_the_adapters_slices(model):
    """The scan is stored with its slices along x; the adapter's slices are along z of LAS."""
    volume = scan()
    las = refined(model, orientation="RAS", smoothing_mm=2.0)
    turned = Volume(volume.array.transpose(2, 1, 0).copy(), AFFINE[:, [2, 1, 0, 3]])
    np.testing.assert_array_equal(predict_volume(las, turned), predict_volume(las, volume).transpose(2, 1, 0))


@pytest.mark.parametrize("affine", [None, AFFINE])
def test_unknown_distances_and_single_slices_are_not_smoothed(model, affine):
    volume = scan(slices=7 if affine is None else 1, affine=affine)
    smoothed = predict_volume(refined(model, smoothing_mm=2.0), volume)
    np.testing.assert_array_equal(smoothed, predict_volume(model, volume))


def test_shifts_and_smoothing_work_in_tiles_and_with_several_adapters(model):
    tiled = refined(model, tile=True, image_size=32, tta="shifts", smoothing_mm=2.0)
    tiled.samed_config = dataclasses.replace(tiled.samed_config, image_size=64)
    volume = Volume(np.random.default_rng(2).uniform(0, 100, (3, 70, 90)).astype(np.float32), AFFINE)
    mask = predict_volume(tiled, volume)
    assert mask.shape == volume.array.shape
    assert (mask != predict_volume(unrefined(tiled), volume)).any()
    several = [refined(model, tta="shifts"), refined(model, smoothing_mm=2.0)]
    assert (predict_volume(several, scan()) != predict_volume([model, model], scan())).any()


def test_postprocess_off_is_plain(model):
    volume, both = scan(), refined(model, tta="shifts", smoothing_mm=2.0, keep_largest=NAMES)
    mask, _ = PredictionOptions(postprocess=False).segment(both, volume)
    np.testing.assert_array_equal(mask, predict_volume(model, volume))
    assert both.samed_config.tta == "shifts", "the model itself stays as it is"


@pytest.mark.parametrize(
    ("tta", "slices"), [("none", 0.0), ("none", 1.0), ("shifts", 0.0), ("shifts", 1.5), ("flips", 0.75)]
)
def test_what_predicts_the_references_is_chosen(model, tta, slices):
    """References are masks made with one choice, which alone has a Dice of 1."""
    predict = partial(predict_volume, refined(model, tta=tta, smoothing_mm=2 * slices))
    images = {name: scan(seed) for seed, name in enumerate("ab")}
    references = {name: Volume(predict(image), AFFINE) for name, image in images.items()}
    found = choose_refinement(model, images, references, tried=("shifts", "flips"), batch_size=3)
    assert (found.tta, found.smoothing_mm, found.dice) == (tta, 2 * slices, 1.0)
    assert found.dice_before == 1.0 if (tta, slices) == ("none", 0.0) else found.dice_before < 1


def test_ignored_voxels_and_absent_classes_do_not_decide(model):
    images = {"a": scan()}
    mask = predict_volume(refined(model, smoothing_mm=2.0), images["a"])
    mask[:, :12] = 9
    found = choose_refinement(model, images, {"a": Volume(mask, AFFINE, ignored_label=9)})
    assert (found.smoothing_mm, found.dice) == (2.0, 1.0)
    nothing = choose_refinement(model, images, {"a": Volume(np.full_like(mask, 9), AFFINE, ignored_label=9)})
    assert (nothing.tta, nothing.smoothing_mm) == ("none", 0.0)


def test_a_small_gain_is_not_worth_four_times_the_time(model, monkeypatch):
    images = {"a": scan()}
    references = {"a": Volume(predict_volume(refined(model, tta="shifts"), images["a"]), AFFINE)}
    monkeypatch.setattr("samed_peft.prediction.refinement.LEAST_GAIN_OF_TTA", 1.0)
    assert choose_refinement(model, images, references).tta == "none"


def test_pictures_are_refined_without_smoothing(model):
    colour = Volume(np.random.default_rng(3).uniform(0, 100, (1, 24, 20, 3)).astype(np.float32))
    shifted = refined(model, tta="shifts")
    found = choose_refinement(model, {"a": colour}, {"a": Volume(predict_volume(shifted, colour))})
    assert (found.tta, found.smoothing_mm) == ("shifts", 0.0)


def test_the_choice_is_saved_and_shown(model, tmp_path):
    config = dataclasses.replace(model.samed_config, tta="shifts", smoothing_mm=1.5)
    save_adapter(model, tmp_path / "adapter", config=config)
    assert load_adapter(tmp_path / "adapter").samed_config.tta == "shifts"
    assert "averaged over shifts, smoothed over 1.5 mm" in info_text(adapter_info(tmp_path / "adapter"))


@pytest.mark.parametrize("values", [{"tta": "rotations"}, {"smoothing_mm": -1.0}])
def test_other_values_are_refused(model, values):
    with pytest.raises(InputError, match=next(iter(values))):
        dataclasses.replace(model.samed_config, **values)
