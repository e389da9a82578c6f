"""What fills the encoder's three channels: several channels of a scan, or several windows."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from scan_files import TWO_MODALITIES_SHAPE as SHAPE
from scan_files import two_modalities, write_nifti

from samed_peft.adapters.save_load import add_lora
from samed_peft.config import CT_WINDOWS, SamedConfig, TrainingConfig
from samed_peft.config.windows import parse_windows
from samed_peft.datasets import CaseVolumes, check_cases, describe_folder, load_slices, open_folder, take_fingerprint
from samed_peft.datasets.channels import scaled_slices
from samed_peft.errors import InputError
from samed_peft.io import Volume, read_channels, read_volume
from samed_peft.models.bases import load_sam
from samed_peft.prediction import predict_volume
from samed_peft.training.batches import training_slices


def by_percentiles(array):
    low, high = np.percentile(array, (0.5, 99.5))
    return (np.clip(array, np.float32(low), np.float32(high)) - np.float32(low)) / np.float32(high - low)


@pytest.fixture(scope="module", params=[True, False], ids=["4-D", "files"])
def folder(request, tmp_path_factory):
    """Two channels in a 4-D file, or in a file each."""
    root = two_modalities(tmp_path_factory.mktemp("data") / "two", in_4d=request.param)
    return open_folder(root, take_all=True)


def test_all_channels_are_taken_if_there_are_at_most_three_and_none_is_chosen(folder, tmp_path):
    assert (folder.channel, folder.channels, folder.channel_names) == (None, (0, 1), ("T1", "FLAIR"))
    turned = open_folder(folder.root, channel=["FLAIR", "0"])
    assert (turned.channels, turned.channel_names) == ((1, 0), ("FLAIR", "T1"))
    assert open_folder(folder.root, channel=["FLAIR"]).channel == 1
    with pytest.raises(InputError, match=r"channels 0 \(T1\), 1 \(FLAIR\) of .*, found none chosen; .*--channel"):
        open_folder(folder.root)
    for wanted in (["T1", "T1"], ["T1", "T2"], ["T1", "T2", "FLAIR", "0"]):
        with pytest.raises(InputError, match="two or three different ones"):
            open_folder(folder.root, channel=wanted)
    four = two_modalities(tmp_path / "four", in_4d=False, names={str(n): f"M{n}" for n in range(4)}, cases=1)
    with pytest.raises(InputError, match=r"3 \(M3\) of .*, found none chosen"):
        open_folder(four, take_all=True)
    assert open_folder(four, channel=["M3", "M0", "M2"]).channels == (3, 0, 2)


def test_rows_batches_and_predictions_see_each_channel_scaled_by_itself(folder):
    described = describe_folder(folder)
    assert (described["window"], described["channels"], described["channel_names"]) == (None, (0, 1), ("T1", "FLAIR"))
    config = SamedConfig("tiny-sam", image_size=64, resampling="aligned", **described)
    shared = {"num_classes": 1, "orientation": config.orientation, "window": config.window}
    check_cases(folder, ["c3"], num_classes=1, window=None)
    rows = load_slices(folder, ["c0", "c1"], **shared)
    volume = CaseVolumes.of_folder(folder, ["c1"])[0]["c1"]
    assert volume.array.shape == (*SHAPE, 2)
    expected = np.stack([by_percentiles(volume.array[..., place]) for place in (0, 1, 1)], axis=-1)
    # Slices go from head to foot and rows from right to left in LPS; this case is stored as LAS.
    found = np.stack([row["image"] for row in rows.with_format("numpy") if row["case"] == "c1"])
    np.testing.assert_allclose(found, expected[:, ::-1], atol=1e-6)
    slices = training_slices(rows, config, TrainingConfig(augment=False), label_size=32)
    pixels = slices[0, 0]["pixel_values"]
    assert pixels.shape == (3, 64, 64)
    assert torch.equal(pixels[1], pixels[2])
    assert not torch.equal(pixels[0], pixels[1])
    model = add_lora(load_sam("tiny-sam", class_names=("ball",), image_size=64), config).eval()
    seen = []
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given["pixel_values"]), with_kwargs=True)
    predict_volume(model, CaseVolumes.of_folder(folder, ["c0"])[0]["c0"])
    first = next(index for index, case in enumerate(rows["case"]) if case == "c0")
    torch.testing.assert_close(seen[0][2], slices[0, first + 2]["pixel_values"], atol=1e-6, rtol=0)


def test_the_fingerprint_and_the_names_of_data_count_all_channels(folder):
    found, of_one = take_fingerprint(folder), take_fingerprint(open_folder(folder.root, channel="T1"))
    assert (found.channels, found.channel_names, found.modality, found.colour) == ((0, 1), ("T1", "FLAIR"), "MR", False)
    assert found.intensity_range[1] > 20 * of_one.intensity_range[1]
    files = len(folder.case("c0").further)
    assert files == (1 if folder.channel_files else 0)
    if files:
        assert found.data != of_one.data


def test_scans_that_lack_a_channel_are_refused_with_one_message(tmp_path):
    root = two_modalities(tmp_path / "files", in_4d=False)
    (root / "imagesTr" / "c2_0001.nii.gz").unlink()
    with pytest.raises(InputError, match=r"ending in _0001 \(FLAIR\) of every case .*found none of c2"):
        open_folder(root, take_all=True)
    assert open_folder(root, channel="T1").cases == ("c0", "c1", "c2", "c3")
    with pytest.raises(InputError, match=r"a file for each of 2 channels .*found no .*c2_0001.*add it"):
        read_channels([root / "imagesTr" / f"c2_000{number}.nii.gz" for number in range(2)])
    with pytest.raises(
        InputError, match=r"expected a 4-D scan with channels 0, 1, found a single channel in .*c0_0000"
    ):
        read_volume(root / "imagesTr" / "c0_0000.nii.gz", channel=(0, 1))
    grey = read_volume(root / "imagesTr" / "c0_0000.nii.gz")
    with pytest.raises(InputError, match=r"expected 2 channels \(0, 1\) of .*c0_0000.*, found 1; read them together"):
        scaled_slices(grey, None, channels=(0, 1))
    flat = Volume(np.stack([grey.array, np.ones(SHAPE, np.float32)], axis=-1))
    with pytest.raises(InputError, match="channel 4: the scan is constant"):
        scaled_slices(flat, None, channels=(2, 4))
    with pytest.raises(InputError, match="single channel, or a colour picture, found 2 channels"):
        scaled_slices(flat, None)
    four = two_modalities(tmp_path / "4d", in_4d=True)
    with pytest.raises(InputError, match="a channel from 0 to 1, found 2"):
        read_volume(four / "imagesTr" / "c0.nii.gz", channel=(0, 2))
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "colour.png")
    with pytest.raises(InputError, match=r"found a single channel in .*colour.png"):
        read_volume(tmp_path / "colour.png", channel=(0, 1))


def test_channels_lie_on_one_grid(tmp_path):
    root = two_modalities(tmp_path / "files", in_4d=False)
    paths = [root / "imagesTr" / f"c0_000{number}.nii.gz" for number in range(2)]
    array = np.zeros(SHAPE, np.float32)
    write_nifti(paths[1], array, np.diag([1.0, 1, 5, 1]))
    with pytest.raises(InputError, match=r"one grid, found corners of .*c0_0000.* and .*c0_0001.* 4 mm apart"):
        read_channels(paths)
    write_nifti(paths[1], array[..., :-1], np.diag([1.0, 1, 4, 1]))
    with pytest.raises(InputError, match=r"one grid, found \(5, 20, 24\) in .*c0_0000.* and \(5, 20, 23\) in"):
        read_channels(paths)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a_0001.png")
    with pytest.raises(InputError, match=r"one channel a file, found colours in .*a_0001"):
        read_channels([tmp_path / "a_0001.png"] * 2)


def test_a_modality_of_all_channels_is_theirs_and_of_some_unknown(tmp_path):
    found = {}
    for names in (("CT", "CT"), ("CT", "PET"), ("T1", "ADC"), ("CT", "T1")):
        listed = dict(zip("01", names, strict=True))
        root = two_modalities(tmp_path / "-".join(names), in_4d=False, names=listed, cases=2)
        folder = open_folder(root, take_all=True)
        found[names] = take_fingerprint(folder).modality, describe_folder(folder)["window"] is None
    assert found == {
        ("CT", "CT"): ("CT", False),
        ("CT", "PET"): ("unknown", True),
        ("T1", "ADC"): ("MR", True),
        ("CT", "T1"): ("unknown", True),
    }


def test_the_same_slice_through_three_windows(tmp_path):
    hu = np.linspace(-1400, 1400, 2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    windows = (CT_WINDOWS["soft_tissue"], CT_WINDOWS["lung"], (0.0, 100.0))
    found = scaled_slices(Volume(hu), windows)
    for place, (low, high) in enumerate(windows):
        expected = (np.clip(hu, low, high) - low) / (high - low)
        np.testing.assert_allclose(found[..., place], expected, atol=1e-6)
    two = scaled_slices(Volume(hu), windows[:2])
    np.testing.assert_array_equal(two[..., 1], two[..., 2])
    np.testing.assert_array_equal(two[..., :2], found[..., :2])
    with pytest.raises(InputError, match=r"intensities for 3 windows, .*found intensities in \[0, 1\]"):
        scaled_slices(Volume(hu / 2000, normalized=True), windows)
    with pytest.raises(InputError, match="found colours in"):
        scaled_slices(Volume(np.zeros((1, 4, 4, 3), np.float32)), windows)
    root = two_modalities(tmp_path / "ct", in_4d=False, names={"0": "CT"}, cases=1)
    folder = open_folder(root)
    rows = load_slices(folder, ["c0"], num_classes=1, orientation=None, window=((0, 1), (0.0, 2.0)))
    image = rows[0]["image"]
    assert image.shape == (*SHAPE[1:], 3)
    np.testing.assert_allclose(image[..., 1], np.clip(read_volume(folder.images["c0"]).array[0], 0, 2) / 2, atol=1e-6)


def test_windows_are_names_or_pairs():
    assert parse_windows(["soft_tissue", "-500", "1300", "brain"]) == ((-160, 240), (-500, 1300), (0, 80))
    for texts, found in ((["lungs", "3"], "'lungs 3'"), (["lung", "-500"], "'-500'"), (["lung"], "found 1")):
        with pytest.raises(InputError, match=found):
            parse_windows(texts)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": ((0, 1), (0, 2)), "neighbour_mm": 2.0}, "neighbour_mm 2 and 2 windows each fill"),
        ({"channels": (0, 1), "neighbour_mm": 2.0}, r"neighbour_mm 2 and channels \[0, 1\] each fill"),
        ({"channels": (0, 1), "window": ((0, 1), (0, 2))}, "channels .* and 2 windows each fill"),
        ({"channels": (0, 1), "channel": 1}, "found 1 beside channels"),
        ({"channels": (0,)}, "channels must be two or three different numbers from 0 on, or None; found"),
        ({"channels": (0, 1), "channel_names": ("T1",)}, "channel_names must be one for each of channels"),
        ({"window": ((0, 1),)}, "window must be"),
        ({"window": ((0, 1), (2, 1))}, "window must be"),
        ({"window": ((0, 1), 2.0)}, "window must be"),
    ],
)
def test_what_fills_the_channels_twice_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        SamedConfig("tiny-sam", ("a",), **values)


def test_the_adapter_records_windows_and_channels():
    windows = SamedConfig("tiny-sam", ("a",), window=((0, 1), (0.5, 2)))
    assert json.loads(json.dumps(windows.to_dict()))["window"] == [[0, 1], [0.5, 2]]
    channels = SamedConfig("tiny-sam", ("a",), window=None, channels=(2, 0), channel_names=("FLAIR", "T1"))
    for config in (windows, channels):
        assert SamedConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert channels.channel_text == "2 (FLAIR), 0 (T1)"
    assert re.fullmatch(r"2, 0", SamedConfig("tiny-sam", ("a",), channels=(2, 0)).channel_text)
