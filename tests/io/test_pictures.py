"""Pictures, channels of 4-D scans, and affines from headers."""

import nibabel
import numpy as np
import pytest
from PIL import Image

from samed_peft import io
from samed_peft.errors import InputError


def picture(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, bool])
def test_grey_pictures(tmp_path, suffix, dtype):
    array = (np.arange(12).reshape(3, 4) * 300).astype(dtype)
    volume = io.read_volume(picture(tmp_path / f"p{suffix}", array))
    np.testing.assert_array_equal(volume.array, array[None].astype(np.float32))
    assert (volume.affine, volume.normalized) == (None, False)


def test_colour_pictures(tmp_path):
    array = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    np.testing.assert_array_equal(io.read_volume(picture(tmp_path / "p.png", array)).array, array[None])
    opaque = np.concatenate([array, np.full((3, 4, 1), 255, np.uint8)], axis=-1)
    np.testing.assert_array_equal(io.read_volume(picture(tmp_path / "q.png", opaque)).array, array[None])


@pytest.mark.parametrize("grey", [True, False])
def test_pictures_with_a_palette_are_what_they_show(tmp_path, grey):
    shown = np.array([[(10, 20, 30), (200, 100, 50)], [(0, 0, 0), (255, 255, 255)]], np.uint8)
    if grey:
        shown[:] = shown[..., :1]
    indexed = Image.fromarray(shown).quantize(4)
    indexed.save(tmp_path / "p.png")
    expected = shown[..., 0] if grey else shown
    np.testing.assert_array_equal(io.read_volume(tmp_path / "p.png").array, expected[None])


def test_palettes_with_transparency_are_refused_as_scans(tmp_path):
    indexed = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    indexed.save(tmp_path / "p.png", transparency=0)
    with pytest.raises(InputError, match="transparency"):
        io.read_volume(tmp_path / "p.png")
    np.testing.assert_array_equal(io.read_labels(tmp_path / "p.png").array, [[[0, 1], [1, 0]]])


def test_picture_masks(tmp_path):
    label = np.array([[0, 1], [2, 1]], np.uint8)
    np.testing.assert_array_equal(io.read_labels(picture(tmp_path / "l.png", label)).array, label[None])
    np.testing.assert_array_equal(
        io.read_labels(picture(tmp_path / "b.png", np.array([[0, 255]], np.uint8))).array, [[[0, 1]]]
    )
    indexed = Image.fromarray(label).convert("P")
    indexed.save(tmp_path / "i.png")
    np.testing.assert_array_equal(io.read_labels(tmp_path / "i.png").array, label[None])
    same = np.repeat(label[..., None], 3, axis=-1)
    np.testing.assert_array_equal(io.read_labels(picture(tmp_path / "c.png", same)).array, label[None])


def test_pictures_that_cannot_be_used(tmp_path):
    grey = np.zeros((4, 4), np.uint8)
    pages = [Image.fromarray(grey), Image.fromarray(grey)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    Image.fromarray(np.zeros((4, 4, 4), np.uint8)).save(tmp_path / "clear.png")
    picture(tmp_path / "lossy.jpg", grey)
    picture(tmp_path / "colours.png", np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    whole = picture(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8))
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no picture")
    for read, name, message in (
        (io.read_volume, "pages.tif", "several pages"),
        (io.read_volume, "clear.png", "transparency"),
        (io.read_labels, "lossy.jpg", "found JPEG"),
        (io.read_labels, "colours.png", "found colours"),
        (io.read_volume, "cut.png", "damaged"),
        (io.read_volume, "text.png", "damaged"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            read(tmp_path / name)
        assert name in str(caught.value)


def test_one_channel_of_a_4d_scan(tmp_path):
    array = np.arange(48, dtype=np.float32).reshape(2, 3, 4, 2)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "four.nii.gz")
    np.testing.assert_array_equal(io.read_volume(tmp_path / "four.nii.gz", channel=1).array, array[..., 1].T)
    with pytest.raises(InputError, match=r"expected a channel from 0 to 1, found 2 .* has 2 channels"):
        io.read_volume(tmp_path / "four.nii.gz", channel=2)
    nibabel.save(nibabel.Nifti1Image(array[..., :1], np.eye(4)), tmp_path / "one.nii.gz")
    np.testing.assert_array_equal(io.read_volume(tmp_path / "one.nii.gz").array, array[..., 0].T)


@pytest.mark.parametrize("name", ["s.nii.gz", "s.nrrd", "s.mha"])
def test_affine_from_the_header_alone(tmp_path, name):
    affine = np.array([[-2, 0, 0, 5], [0, 0, 3, 6], [0, 4, 0, 7], [0, 0, 0, 1.0]])
    io.write_mask(np.zeros((2, 3, 4), np.uint8), io.Volume(np.zeros((2, 3, 4)), affine), tmp_path / name)
    np.testing.assert_allclose(io.read_affine(tmp_path / name), affine, atol=1e-5)
    assert io.read_affine(picture(tmp_path / "p.png", np.zeros((2, 2), np.uint8))) is None
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="damaged"):
        io.read_affine(tmp_path / name)
