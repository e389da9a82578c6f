"""From slice to pixels, and SAMed's augmentation, against the original's arrays."""

import numpy as np
import pytest
from conftest import npz
from scipy import ndimage

from samed_peft.datasets.preprocessing import (
    apply_window,
    normalized_array,
    resize_image,
    resize_label,
    slice_to_pixels,
    spline_matrix,
)
from samed_peft.errors import InputError
from samed_peft.io import Volume
from samed_peft.training.augmentation import augment, rot_flip, rotate


@pytest.fixture(scope="module")
def golden_slice():
    return npz("slice.npz")


def test_model_image_and_labels(golden_slice):
    image = slice_to_pixels(golden_slice["image"], image_size=128)
    np.testing.assert_array_equal(image, golden_slice["model_image"])
    label = resize_label(golden_slice["label"], (128, 128))
    np.testing.assert_array_equal(label, golden_slice["model_label"])
    np.testing.assert_array_equal(resize_label(label, (32, 32)), golden_slice["low_res_label"])

    via = resize_label(golden_slice["label"], (32, 32), via=(128, 128))
    np.testing.assert_array_equal(via, golden_slice["low_res_label"])


def scipys_zoom(array, size_hw, order):
    factors = [new / old for new, old in zip(size_hw, array.shape, strict=True)]
    return array if array.shape == size_hw else ndimage.zoom(array, factors, order=order)


SIZES = [(2, 3), (3, 8), (8, 2), (20, 24), (37, 99), (64, 64), (101, 122), (128, 57), (224, 224)]


@pytest.mark.parametrize("old", [*SIZES, (512, 512), (1, 5), (5, 1)])
@pytest.mark.parametrize("new", SIZES)
def test_sizes_change_as_in_scipy_to_the_bit(old, new):
    rng = np.random.default_rng(0)
    image, label = rng.random(old, dtype=np.float32), rng.integers(1, 9, old, dtype=np.uint8)
    image[: old[0] // 2] = 0  # next to nothing is left of it, all of it rounding
    expected = scipys_zoom(image, new, 3)
    np.testing.assert_array_equal(resize_image(image, new), expected)
    matrices = [spline_matrix(*sizes) for sizes in zip(old, new, strict=True)]
    if old != new:
        np.testing.assert_allclose(matrices[0] @ image @ matrices[1].T, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(resize_label(label, new), scipys_zoom(label, new, 0))
    via = scipys_zoom(scipys_zoom(label, (56, 49), 0), new, 0)
    np.testing.assert_array_equal(resize_label(label, new, via=(56, 49)), via)


def test_places_past_the_last_pixel_are_zero_as_in_scipy():
    # Rounding moves the last of them out.
    sizes = [(old, new) for old in range(2, 40) for new in range(2, 60) if (old - 1) / (new - 1) * (new - 1) > old - 1]
    assert sizes
    for old, new in sizes:
        label = np.ones((old, 3), np.uint8)
        assert not resize_label(label, (new, 3))[-1].any()
        np.testing.assert_array_equal(resize_label(label, (new, 3)), scipys_zoom(label, (new, 3), 0))
        image = label.astype(np.float32)
        np.testing.assert_array_equal(resize_image(image, (new, 3)), scipys_zoom(image, (new, 3), 3))


@pytest.mark.parametrize("shape", [(1, 1), (20, 24), (113, 64), (224, 224)])
def test_rotation_is_scipys_at_every_angle(shape):
    label = np.random.default_rng(0).integers(1, 9, shape, dtype=np.uint8)
    colours = np.stack([label, label + 1, label + 2], axis=-1)
    for degrees in range(-20, 20):
        expected = ndimage.rotate(label, degrees, order=0, reshape=False)
        np.testing.assert_array_equal(rotate(label, degrees=degrees), expected)
        np.testing.assert_array_equal(rotate(colours, degrees=degrees)[..., 0], expected)


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("axis", range(2))
def test_rot_flip(golden_slice, turns, axis):
    got = rot_flip(golden_slice["label"], quarter_turns=turns, axis=axis)
    np.testing.assert_array_equal(got, golden_slice[f"rotflip_k{turns}_axis{axis}_label"])


@pytest.mark.parametrize("degrees", [-20, -7, 13])
@pytest.mark.parametrize("kind", ["image", "label"])
def test_rotate(golden_slice, degrees, kind):
    got = rotate(golden_slice[kind], degrees=degrees)
    np.testing.assert_array_equal(got, golden_slice[f"rotate_{degrees}_{kind}"])


def test_augmentation_has_sameds_shares():
    image = np.arange(12.0).reshape(3, 4)
    kinds = {"turned or flipped": 0, "rotated": 0, "untouched": 0}
    for seed in range(2000):
        got, label = augment(image, image, rng=np.random.default_rng(seed))
        np.testing.assert_array_equal(got, label)
        if np.array_equal(got, image):
            kinds["untouched"] += 1
        elif np.array_equal(np.sort(got.ravel()), image.ravel()):
            kinds["turned or flipped"] += 1
        else:
            kinds["rotated"] += 1
    # A half turn with a flip, or a rotation by 0..2 degrees, can leave so small an image as it is.
    assert 0.44 < kinds["turned or flipped"] / 2000 < 0.56
    assert 0.22 < kinds["untouched"] / 2000 < 0.40


def test_augmentation_depends_on_its_generator_alone():
    image = np.random.default_rng(0).random((20, 30))
    for seed in range(10):
        np.random.seed(seed)  # noqa: NPY002 - the global state is what must not matter
        first = augment(image, image, rng=np.random.default_rng(5))
        np.testing.assert_array_equal(first[0], augment(image, image, rng=np.random.default_rng(5))[0])


def test_window_by_hand():
    np.testing.assert_allclose(apply_window(np.array([-1000, -125, 75, 275, 3000]), (-125, 275)), [0, 0, 0.5, 1, 1])


def test_percentiles_where_there_is_no_window():
    array = np.arange(2001, dtype=np.float32).reshape(1, 1, 2001)
    got = normalized_array(Volume(array), None).ravel()
    # The 0.5 percentile of 0..2000 is 10, the 99.5 percentile 1990.
    assert got[10] == 0
    assert got[1990] == 1
    assert got[1000] == pytest.approx(0.5)


def test_a_constant_scan_has_no_percentiles():
    with pytest.raises(InputError, match="constant"):
        normalized_array(Volume(np.ones((2, 3, 4))), None)


def test_normalised_scans_pass_through():
    array = np.random.default_rng(0).random((1, 4, 4), dtype=np.float32)
    assert normalized_array(Volume(array, normalized=True), (-125, 275)) is array
