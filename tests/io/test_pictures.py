"""Pictures, channels of 4-D scans, and affines from headers."""

import struct
import warnings
import zlib

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


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_pictures_are_turned_as_viewers_show_them(tmp_path, suffix, orientation):
    array = np.zeros((16, 24), np.uint8)
    array[:8, :8] = 200
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"tiffinfo": {0x0112: orientation}} if suffix == ".tif" else {"exif": exif}
    path = picture(tmp_path / f"p{suffix}", array, **options)
    turned = {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.T,
        6: array.T[:, ::-1],
        7: array[::-1, ::-1].T,
        8: array.T[::-1],
    }[orientation]
    np.testing.assert_array_equal(io.read_volume(path).array[0] > 100, turned > 100)
    if suffix != ".jpg":
        np.testing.assert_array_equal(io.read_labels(path).array[0] > 0, turned > 0)


def test_a_mask_lies_over_the_turned_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    scan = io.read_volume(picture(tmp_path / "p.jpg", np.zeros((16, 24), np.uint8), exif=exif))
    io.write_mask(np.ones((1, 24, 16), np.uint8), scan, tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as mask:
        assert mask.size == (16, 24)
    assert io.read_labels(tmp_path / "m.png").array.shape == scan.array.shape


def test_pictures_of_cameras_with_previews(tmp_path):
    shown = Image.fromarray(np.full((40, 60, 3), 90, np.uint8))
    shown.save(tmp_path / "p.jpg", format="MPO", save_all=True, append_images=[shown.resize((30, 20))])
    assert io.read_volume(tmp_path / "p.jpg").array.shape == (1, 40, 60, 3)


def test_grey_with_alpha(tmp_path):
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    opaque = picture(tmp_path / "p.png", np.dstack([grey, np.full_like(grey, 255)]))
    np.testing.assert_array_equal(io.read_volume(opaque).array, grey[None])
    np.testing.assert_array_equal(io.read_labels(opaque).array, grey[None])
    with pytest.raises(InputError, match="transparency"):
        io.read_volume(picture(tmp_path / "q.png", np.dstack([grey, grey])))


def png_chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def write_png16(path, colour_type):
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    rows = b"".join(b"\0" + bytes([1, 7] * 4 * channels) for _ in range(4))
    header = (4).to_bytes(4, "big") * 2 + bytes([16, colour_type, 0, 0, 0])
    parts = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("transparent", [None, 1])
def test_label_numbers_of_few_bits(tmp_path, bits, transparent):
    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    labels = np.arange(2 * 2**bits).reshape(2, -1) % 2**bits
    rows = ["".join(f"{label:0{bits}b}" for label in row) for row in labels]
    rows = [row + "0" * (-len(row) % 8) for row in rows]
    packed = b"".join(b"\0" + int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    hint = [] if transparent is None else [part(b"tRNS", struct.pack(">H", transparent))]
    head = part(b"IHDR", struct.pack(">IIBBBBB", labels.shape[1], 2, bits, 0, 0, 0, 0))
    data = [head, *hint, part(b"IDAT", zlib.compress(packed)), part(b"IEND", b"")]
    (tmp_path / "m.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(data))
    np.testing.assert_array_equal(io.read_labels(tmp_path / "m.png").array[0], labels)


def test_sixteen_bits(tmp_path):
    np.testing.assert_array_equal(io.read_volume(write_png16(tmp_path / "grey.png", 0)).array, np.full((1, 4, 4), 263))
    path = write_png16(tmp_path / "colour.png", 2)
    with pytest.warns(UserWarning, match=r"colour\.png has 16 bits a colour, of which the upper 8"):
        assert io.read_volume(path).array.max() == 1
    with pytest.raises(InputError, match="16 bits in mode RGB"):  # label 7 would be lost
        io.read_labels(path)
    with pytest.raises(InputError, match="without alpha"):
        io.read_labels(write_png16(tmp_path / "alpha.png", 4))


def test_cmyk_and_many_pixels_are_told_with_the_remedy(tmp_path, monkeypatch):
    Image.new("CMYK", (8, 8)).save(tmp_path / "c.jpg")
    with pytest.raises(InputError, match=r"mode CMYK .* convert it to RGB"):
        io.read_volume(tmp_path / "c.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    large = picture(tmp_path / "p.png", np.zeros((20, 20), np.uint8))
    with pytest.raises(InputError, match=r"at most 200 pixels, found more in .*p\.png .* scale it down") as caught:
        io.read_volume(large)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("end", [-1, -5, -13, -20])
def test_png_that_shows_its_damage(tmp_path, end):
    path = picture(tmp_path / "p.png", np.random.default_rng(0).integers(0, 255, (16, 16), np.uint8))
    data = path.read_bytes()
    path.write_bytes(data[:end])
    with pytest.raises(InputError, match=r"p\.png cannot be read"):
        io.read_volume(path)
    flipped = bytearray(data)
    flipped[end] ^= 4
    path.write_bytes(flipped)
    with pytest.raises(InputError, match=r"p\.png cannot be read"):
        io.read_volume(path)


@pytest.mark.parametrize("compression", ["raw", "tiff_adobe_deflate", "tiff_lzw", "packbits"])
@pytest.mark.parametrize("mode", ["L", "RGB", "I;16", "1"])
def test_tiffs_that_claim_more_pixels_than_they_hold(tmp_path, compression, mode):
    path = tmp_path / "p.tif"
    Image.new(mode, (300, 2000)).save(path, compression=compression)  # all black, which is packed best
    expected = io.read_volume(path).array
    with Image.open(path) as opened:
        entry = path.read_bytes().index((257).to_bytes(2, "little"))  # ImageLength, in rows
        assert opened.tag_v2[257] == 2000
    assert not expected.any()
    data = bytearray(path.read_bytes())
    data[entry + 2 : entry + 12] = bytes([4, 0, 1, 0, 0, 0]) + (400_000).to_bytes(4, "little")
    path.write_bytes(data)
    with warnings.catch_warnings(action="ignore"), pytest.raises(InputError, match=r"p\.tif cannot be read"):
        io.read_volume(path)


def test_deflated_tiff_that_shows_its_damage(tmp_path):
    path = tmp_path / "p.tif"
    Image.fromarray(np.random.default_rng(0).integers(0, 3, (64, 64), np.uint8)).save(
        path, compression="tiff_adobe_deflate"
    )
    whole, refused = path.read_bytes(), 0
    expected = io.read_volume(path).array
    with Image.open(path) as opened:
        (start,), (length,) = opened.tag_v2[273], opened.tag_v2[279]
    for at in range(start, start + length, 7):
        flipped = bytearray(whole)
        flipped[at] ^= 16
        path.write_bytes(flipped)
        try:
            np.testing.assert_array_equal(io.read_volume(path).array, expected)
        except InputError:
            refused += 1
    assert refused > length // 8
    path.write_bytes(whole[: start + length // 2])
    with pytest.warns(UserWarning, match="Corrupt EXIF"), pytest.raises(InputError, match=r"p\.tif cannot be read"):
        io.read_volume(path)


def test_names_of_labels_behind_the_pixels(tmp_path):
    path = tmp_path / "m.png"
    scan = io.Volume(np.zeros((1, 4, 4)), path=tmp_path / "p.png")
    io.write_mask(np.ones((1, 4, 4), np.uint8), scan, path)
    data = path.read_bytes()
    path.write_bytes(data[:-12] + png_chunk(b"tEXt", b'labels\0{"1": "liver"}') + data[-12:])
    assert io.read_label_names(path) == {1: "liver"}
