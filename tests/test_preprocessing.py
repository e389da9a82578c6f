"""From slice to pixels, and SAMed's augmentation, against the original's arrays."""

import numpy as np
import pytest
from conftest import npz

from samed_peft.augmentation import augment, rot_flip, rotate
from samed_peft.errors import InputError
from samed_peft.io import Volume
from samed_peft.preprocessing import apply_window, normalized_array, resize_label, slice_to_pixels


@pytest.fixture(scope="module")
def golden_slice():
    return npz("slice.npz")


def test_model_image_and_labels(golden_slice):
    image = slice_to_pixels(golden_slice["image"], image_size=128)
    np.testing.assert_array_equal(image, golden_slice["model_image"])
    label = resize_label(golden_slice["label"], (128, 128))
    np.testing.assert_array_equal(label, golden_slice["model_label"])
    np.testing.assert_array_equal(resize_label(label, (32, 32)), golden_slice["low_res_label"])


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
