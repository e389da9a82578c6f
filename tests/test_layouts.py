"""Folders of one's own: both dialects of dataset.json, nnU-Net's channels, pictures, and what is refused."""

import json

import nibabel
import numpy as np
import pytest
from PIL import Image

from samed_peft.errors import InputError
from samed_peft.layouts import open_folder

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
        (DECATHLON | {"labels": {"0": "background", "2": "b"}}, ("c1",), ("c1",), None, "0..K without gaps"),
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
