"""Users' own folders: both dialects of dataset.json, nnU-Net's channels, pictures, Synapse, and refusals."""

import json
import os
import sys

import nibabel
import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image

from samed_peft.config import SYNAPSE_CLASSES
from samed_peft.datasets import LAYOUTS
from samed_peft.datasets.cases import read_pair
from samed_peft.datasets.choices import describe_folder
from samed_peft.datasets.layouts import open_folder
from samed_peft.errors import InputError

DECATHLON = {
    "modality": {"0": "CT"},
    "labels": {"0": "background", "1": "liver", "2": "tumour"},
    "training": [{"image": f"./imagesTr/c{n}.nii.gz", "label": f"./labelsTr/c{n}.nii.gz"} for n in (1, 2)],
}
NNUNET = {
    "channel_names": {"0": "T1", "1": "FLAIR"},
    "labels": {"background": 0, "lesion": 1},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}


def scan(path, shape=(4, 5, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.zeros(shape, np.uint8), np.eye(4)), path)


def write(root, content, images=(), labels=()):
    root.mkdir(exist_ok=True)
    if content is not None:
        (root / "dataset.json").write_text(json.dumps(content))
    for name in images:
        scan(root / "imagesTr" / f"{name}.nii.gz")
    for name in labels:
        scan(root / "labelsTr" / f"{name}.nii.gz")
    return root


def test_decathlon(tmp_path):
    folder = open_folder(write(tmp_path / "d", DECATHLON, ("c1", "c2"), ("c1", "c2")))
    assert (folder.class_names, folder.modality, folder.channel) == (("liver", "tumour"), "CT", None)
    assert list(folder.images) == list(folder.labels) == ["c1", "c2"]
    assert folder.images["c1"].parent.name == "imagesTr"


@pytest.mark.parametrize("wanted", ["FLAIR", "flair", "1"])
def test_nnunet_channels_by_name_or_number(tmp_path, wanted):
    images = [f"c{case}_000{channel}" for case in (1, 2) for channel in (0, 1)]
    folder = open_folder(write(tmp_path / "n", NNUNET, images, ("c1", "c2")), channel=wanted)
    assert (folder.class_names, folder.modality, folder.channel) == (("lesion",), "FLAIR", 1)
    assert {case: path.name for case, path in folder.images.items()} == {
        "c1": "c1_0001.nii.gz",
        "c2": "c2_0001.nii.gz",
    }


def test_the_first_nnunet_lists_files_without_their_channel(tmp_path):
    folder = open_folder(write(tmp_path / "n", DECATHLON, ("c1_0000", "c2_0000"), ("c1", "c2")))
    assert folder.images["c2"].name == "c2_0000.nii.gz"
    assert folder.channel is None


def test_channels_within_a_file(tmp_path):
    content = DECATHLON | {"modality": {"0": "T2", "1": "ADC"}}
    folder = open_folder(write(tmp_path / "d", content, ("c1", "c2"), ("c1", "c2")), channel="adc")
    assert (folder.channel, folder.modality) == (1, "ADC")


def test_pictures(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / kind / "a.png")
    folder = open_folder(tmp_path)
    assert (folder.class_names, folder.modality, list(folder.images)) == ((), None, ["a"])


@pytest.mark.parametrize("layout", ["raw", "raw/Training", "processed"])
def test_synapse_is_a_layout_among_the_others(layout):
    folder = open_folder(GOLDEN / "btcv" / layout)
    assert (folder.layout, folder.class_names, folder.modality) == (layout.split("/")[0], SYNAPSE_CLASSES, "CT")
    assert sorted(folder.cases) == ["case0001", "case0005", "case0007", "case0038"]
    assert folder.splits == {"train": ("case0005", "case0007"), "test": ("case0001", "case0038")}
    raw_table = (0, 1, 2, 3, 4, 0, 5, 6, 7, 0, 0, 8, 0, 0)
    assert folder.label_table == (tuple(range(9)) if layout == "processed" else raw_table)
    with pytest.raises(InputError, match=r"expected no channel for the .*found CT; leave it out"):
        open_folder(GOLDEN / "btcv" / layout, channel="CT")


def test_a_dataset_json_decides_and_other_layouts_exclude_each_other(tmp_path):
    root = write(tmp_path / "d", DECATHLON, ("c1", "c2"), ("c1", "c2"))
    for name in ("images", "masks", "train_npz"):
        (root / name).mkdir()
    for name in ("images", "masks"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(root / name / "a.png")
    assert open_folder(root).layout == "dataset_json"
    (root / "dataset.json").unlink()
    with pytest.raises(
        InputError, match=r"found both images and masks and preprocessed files in .*; give each its own folder"
    ):
        open_folder(root)
    with pytest.raises(InputError, match=r"expected raw BTCV .* or SAMed's preprocessed folders .*found "):
        open_folder(root / "images", layouts=("raw", "processed"))


def test_every_layout_says_what_users_have_to_provide(tmp_path):
    (tmp_path / "scan").mkdir()
    with pytest.raises(InputError, match=r"found scan; point data_dir at the folder") as error:
        open_folder(tmp_path)
    assert all(layout.holds in str(error.value) for layout in LAYOUTS)


@pytest.mark.parametrize(
    ("content", "images", "labels", "channel", "message"),
    [
        (None, ("c1",), ("c1",), None, "expected dataset.json with imagesTr"),
        (DECATHLON, ("c1",), ("c1", "c2"), None, "lists .*c2.nii.gz, which is missing"),
        (DECATHLON | {"training": [{"image": "a"}]}, ("c1",), ("c1",), None, '"image" and "label"'),
        (
            DECATHLON | {"training": [{"image": "../../x.nii.gz", "label": "./labelsTr/c1.nii.gz"}]},
            ("c1",),
            ("c1",),
            None,
            "expected files below",
        ),
        (DECATHLON | {"training": DECATHLON["training"] * 2}, ("c1", "c2"), ("c1", "c2"), None, "lists c1 twice"),
        (
            DECATHLON | {"labels": {"0": "background", "300": "b"}},
            ("c1",),
            ("c1",),
            None,
            "labels up to 255.*found 300",
        ),
        (DECATHLON, ("c1", "c2"), ("c1", "c2"), "PET", r"channels 0 \(CT\).*found 'PET'"),
        (NNUNET, ("c1_0000", "c1_0001"), ("c1",), None, r"0 \(T1\), 1 \(FLAIR\).*none chosen"),
        (NNUNET, ("c1_0000", "c1_0001", "c2_0000"), ("c1", "c2"), "1", r"ending in _0001 \(FLAIR\).*c2"),
        (NNUNET, ("c1",), ("c1",), "0", "a file for each channel"),
        (NNUNET, ("c1_0000", "c1_0001"), ("c1", "c2"), "0", "no scan of c2"),
        (NNUNET, (), ("c1",), "0", "expected a folder at .*imagesTr"),
        ([], (), (), None, "expected an object with labels"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, content, images, labels, channel, message):
    root = write(tmp_path / "d", content, images, labels)
    with pytest.raises(InputError, match=message):
        open_folder(root, channel=channel)


@pytest.mark.parametrize("linked", ["imagesTr", "imagesTr/c1.nii.gz"])
def test_linked_files_may_lie_elsewhere(tmp_path, linked):
    root = write(tmp_path / "d", DECATHLON, ("c1", "c2"), ("c1", "c2"))
    (root / linked).rename(tmp_path / "stored")
    (root / linked).symlink_to(tmp_path / "stored")
    assert open_folder(root).images["c1"] == root / "imagesTr" / "c1.nii.gz"


def test_a_scan_must_not_be_two_cases(tmp_path):
    training = [{"image": "imagesTr/c1.nii.gz", "label": f"labelsTr/c{n}.nii.gz"} for n in (1, 2)]
    root = write(tmp_path / "d", DECATHLON | {"training": training}, ("c1",), ("c1", "c2"))
    with pytest.raises(InputError, match=r"lists .*c1.nii.gz with c1 and with c2"):
        open_folder(root)


def test_label_maps_of_one_name_in_several_folders(tmp_path):
    training = [{"image": f"imagesTr/c{n}.nii.gz", "label": f"labelsTr/p{n}/seg.nii.gz"} for n in (1, 2)]
    root = write(tmp_path / "d", DECATHLON | {"training": training}, ("c1", "c2"), ("p1/seg", "p2/seg"))
    with pytest.raises(InputError, match=r"named after their label maps.*p1/seg.nii.gz and .*p2/seg.nii.gz"):
        open_folder(root)


@pytest.mark.parametrize("name", ["a\0b", "a" * 300])
def test_names_no_file_can_have(tmp_path, name):
    training = [{"image": f"imagesTr/{name}.nii.gz", "label": "labelsTr/c1.nii.gz"}]
    root = write(tmp_path / "d", DECATHLON | {"training": training}, ("c1",), ("c1",))
    with pytest.raises(InputError, match="missing or no scan"):
        open_folder(root)


@pytest.mark.parametrize(
    ("labels", "own", "values", "table"),
    [
        ({"background": 0, "whole": [1, 2], "core": 2}, ("label 1", "core"), None, None),
        ({"0": "background", "2": "b"}, ("b",), (2,), (0, -1, 1)),
        ({"a": 0, "ignore": 1}, None, None, None),
    ],
)
def test_given_names_stand_in_for_labels_of_other_kinds(tmp_path, labels, own, values, table):
    root = write(tmp_path / "d", DECATHLON | {"labels": labels}, ("c1", "c2"), ("c1", "c2"))
    folder = open_folder(root, class_names=("edema", "core"))
    assert (folder.class_names, folder.label_values, folder.label_table) == (("edema", "core"), None, None)
    if own is None:
        with pytest.raises(InputError, match="class_names"):
            open_folder(root)
    else:
        folder = open_folder(root)
        assert (folder.class_names, folder.label_values, folder.label_table) == (own, values, table)


def test_a_byte_order_mark(tmp_path):
    root = write(tmp_path / "d", DECATHLON, ("c1", "c2"), ("c1", "c2"))
    (root / "dataset.json").write_bytes(b"\xef\xbb\xbf" + (root / "dataset.json").read_bytes())
    assert open_folder(root).class_names == ("liver", "tumour")


@pytest.mark.skipif(sys.platform != "linux", reason="names of other bytes are Linux's")
def test_names_that_are_not_utf8(tmp_path):
    root = write(tmp_path / "d", NNUNET | {"channel_names": {"0": "T1"}}, ("c1_0000",), ("c1",))
    odd = os.fsdecode(b"c\xff_0000.nii.gz")
    (root / "imagesTr" / "c1_0000.nii.gz").rename(root / "imagesTr" / odd)
    with pytest.raises(InputError, match=r"UTF-8.*c\?_0000.nii.gz"):
        open_folder(root)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="found nothing"):
        open_folder(tmp_path / "absent")


def test_two_files_of_one_case(tmp_path):
    root = write(tmp_path / "n", NNUNET | {"channel_names": {"0": "T1"}}, ("c1_0000",), ("c1",))
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), root / "labelsTr" / "c1.nii")
    with pytest.raises(InputError, match="one file a case"):
        open_folder(root)


def test_the_hippocampus(real_scans):
    folder = open_folder(real_scans / "Task04_Hippocampus")
    assert (folder.class_names, folder.modality, len(folder.images)) == (("Anterior", "Posterior"), "MRI", 160)


def pictures(root, names, *, labels, channel_names=("R", "G", "B"), colour=True):
    """A folder of nnU-Net's with pictures, whose red, green and blue differ."""
    root.mkdir()
    content = NNUNET | {"channel_names": dict(zip("012", channel_names, strict=False)), "file_ending": ".png"}
    (root / "dataset.json").write_text(json.dumps(content))
    picture = np.dstack([np.full((4, 5), value, np.uint8) for value in (10, 20, 30)])
    for folder, files in (("imagesTr", names), ("labelsTr", labels)):
        (root / folder).mkdir()
        for name in files:
            array = picture if colour and folder == "imagesTr" else np.eye(4, 5, dtype=np.uint8)
            Image.fromarray(array).save(root / folder / f"{name}.png")
    return root


@pytest.mark.parametrize("channels", [("R", "G", "B"), ("red", "green", "blue"), ("rgb_to_0_1",) * 3])
@pytest.mark.parametrize("suffix", ["_0000", ""])
def test_colours_of_nnunet_are_read_together(tmp_path, channels, suffix):
    root = pictures(tmp_path / "n", (f"a{suffix}", f"b{suffix}"), labels=("a", "b"), channel_names=channels)
    folder = open_folder(root)
    assert (folder.cases, folder.channel, folder.channel_files) == (("a", "b"), None, bool(suffix))
    assert describe_folder(folder)["window"] is not None
    scan, _ = read_pair(folder.case("b"), num_classes=1)
    assert scan.array[0, 0, 0].tolist() == [10, 20, 30]
    with pytest.raises(InputError, match=rf"each picture .* holds all three, {channels[0]}.*leave it out"):
        open_folder(root, channel="0")


def test_colours_in_a_file_each_are_channels(tmp_path):
    names = [f"{case}_{number:04d}" for case in "ab" for number in range(3)]
    root = pictures(tmp_path / "n", names, labels=("a", "b"), colour=False)
    assert open_folder(root, channel="G").images["a"].name == "a_0001.png"
    with pytest.raises(InputError, match=r"0 \(R\), 1 \(G\), 2 \(B\).*none chosen"):
        open_folder(root)


@pytest.mark.parametrize("channels", [{"0": "T1"}, {"0": "T1", "1": "FLAIR"}])
def test_label_maps_with_the_suffix_of_their_scans(tmp_path, channels):
    images = [f"c{case}_000{channel}" for case in (1, 2) for channel in range(len(channels))]
    root = write(tmp_path / "n", NNUNET | {"channel_names": channels}, images, ("c1_0000", "c2_0000"))
    folder = open_folder(root, channel="T1")
    assert {case: path.name for case, path in folder.labels.items()} == {
        "c1": "c1_0000.nii.gz",
        "c2": "c2_0000.nii.gz",
    }
    assert folder.channel_files
    scan(root / "labelsTr" / "c2.nii.gz")
    with pytest.raises(InputError, match=r"expected one file a case, found .*c2.*remove one"):
        open_folder(root, channel="T1")


def test_frames_are_cases_if_their_label_maps_are_numbered_alike(tmp_path):
    frames = [f"f_{number:04d}" for number in range(3)]
    folder = open_folder(write(tmp_path / "n", NNUNET | {"channel_names": {"0": "T1"}}, frames, frames))
    assert (folder.cases, folder.channel_files) == (tuple(frames), False)


def test_files_of_channels_that_nobody_listed_are_told(tmp_path):
    images = ("c1_0000", "c1_0001", "c2_0000")
    root = write(tmp_path / "n", NNUNET | {"channel_names": {"0": "T1"}}, images, ("c1", "c2"))
    with pytest.warns(UserWarning, match="lists 1 channel, so 1 files of others are left out: c1_0001"):
        assert open_folder(root).cases == ("c1", "c2")
