"""Names of labels in mask files, as other programs read and write them."""

import gzip
import json
from xml.etree import ElementTree

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image, PngImagePlugin
from scan_files import AFFINE

from samed_peft import io
from samed_peft.errors import InputError

NAMES = {1: "spleen", 2: "Gallenblase ä <&]]> \"'", 255: "100 % a:=b \\ 肝"}
VOLUME = io.Volume(np.zeros((3, 4, 5), np.float32), AFFINE)
PICTURE = io.Volume(np.zeros((1, 4, 5, 3), np.float32))


def mask_of(like):
    mask = np.zeros(like.array.shape[:3], np.uint8)
    mask[0, 1:3, 2:5] = 1
    mask[-1, 0, 0] = 255
    return mask


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".seg.nrrd", ".mha", ".png"])
def test_names_come_back(tmp_path, suffix):
    like = PICTURE if suffix == ".png" else VOLUME
    path = tmp_path / f"mask{suffix}"
    io.write_mask(mask_of(like), like, path, label_names=NAMES)
    assert io.read_label_names(path) == NAMES
    np.testing.assert_array_equal(io.read_labels(path).array, mask_of(like))
    first = path.read_bytes()
    io.write_mask(mask_of(like), like, path, label_names=dict(reversed(NAMES.items())))
    assert path.read_bytes() == first
    io.write_mask(mask_of(like), like, path)
    assert io.read_label_names(path) is None
    np.testing.assert_array_equal(io.read_labels(path).array, mask_of(like))


@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha", ".png"])
def test_line_breaks_and_control_characters_become_blanks(tmp_path, suffix):
    like = PICTURE if suffix == ".png" else VOLUME
    io.write_mask(mask_of(like), like, tmp_path / f"mask{suffix}", label_names={1: " left\r\n\x00kidney\ud800\t"})
    assert io.read_label_names(tmp_path / f"mask{suffix}") == {1: "left kidney"}


def test_nifti_holds_a_label_table_of_workbench(tmp_path):
    io.write_mask(mask_of(VOLUME), VOLUME, tmp_path / "mask.nii.gz", label_names=NAMES)
    image = nibabel.load(tmp_path / "mask.nii.gz")
    (extension,) = image.header.extensions
    assert extension.get_code() == 30
    root = ElementTree.fromstring(extension.content.rstrip(b"\x00"))
    assert root.tag == "CaretExtension"
    labels = root.findall("VolumeInformation/LabelTable/Label")
    assert {int(entry.get("Key")): entry.text for entry in labels} == {0: "background", **NAMES}
    for entry in labels:
        assert all(0 <= float(entry.get(key)) <= 1 for key in ("Red", "Green", "Blue", "Alpha"))
    # Programs that know nothing of extensions find the voxels all the same.
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "mask.nii.gz"))), mask_of(VOLUME)
    )


def test_names_that_totalsegmentator_wrote(tmp_path):
    xml = (
        '<?xml version="1.0" encoding="UTF-8"?> <CaretExtension>  <Date><![CDATA[2013-07-14T05:45:09]]></Date>   '
        '<VolumeInformation Index="0">   <LabelTable>\n'
        '<Label Key="1" Red="1.0" Green="0.0" Blue="0.0" Alpha="1"><![CDATA[kidney_left]]></Label>\n'
        "  </LabelTable>  <StudyMetaDataLinkSet>  </StudyMetaDataLinkSet>  "
        "<VolumeType><![CDATA[Label]]></VolumeType>   </VolumeInformation></CaretExtension>\n              "
    )
    image = nibabel.Nifti1Image(mask_of(VOLUME).T, AFFINE)
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(6, b"a comment"))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(0, b"no xml"))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(0, xml.encode()))
    nibabel.save(image, tmp_path / "mask.nii.gz")
    assert io.read_label_names(tmp_path / "mask.nii.gz") == {1: "kidney_left"}


def test_entities_are_not_expanded(tmp_path):
    xml = b'<!DOCTYPE a [<!ENTITY b "bomb">]><a><Label Key="1">&b;</Label></a>'
    image = nibabel.Nifti1Image(mask_of(VOLUME).T, AFFINE)
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(30, xml))
    nibabel.save(image, tmp_path / "mask.nii")
    assert io.read_label_names(tmp_path / "mask.nii") is None


def test_nrrd_holds_segments_of_slicer(tmp_path):
    io.write_mask(mask_of(VOLUME), VOLUME, tmp_path / "mask.seg.nrrd", label_names=NAMES)
    header = (tmp_path / "mask.seg.nrrd").read_bytes().split(b"\n\n", 1)[0].decode()
    fields = dict(line.split(":=", 1) for line in header.splitlines() if ":=" in line)
    assert fields["Segment0_Name"] == "spleen"
    assert fields["Segment0_ID"] == "Segment_1"
    assert fields["Segment0_Extent"] == "2 4 1 2 0 0"  # x, y, z
    assert fields["Segment1_Extent"] == "0 -1 0 -1 0 -1"
    assert (fields["Segment2_LabelValue"], fields["Segment2_Layer"]) == ("255", "0")
    assert [float(value) for value in fields["Segment0_Color"].split()] == pytest.approx(io.label_colour(1), abs=1e-5)
    assert fields["Segmentation_ContainedRepresentationNames"] == "Binary labelmap|"


def test_colours_differ():
    assert len({io.label_colour(label) for label in range(1, 256)}) > 240
    assert all(0 <= value <= 1 for label in range(1, 256) for value in io.label_colour(label))


def test_wrong_names_are_refused(tmp_path):
    for names in ({0: "background"}, {256: "a"}, {1: " \n"}):
        with pytest.raises(InputError, match="label_names of labels 1 to 255"):
            io.write_mask(mask_of(VOLUME), VOLUME, tmp_path / "mask.nii.gz", label_names=names)
    assert not any(tmp_path.iterdir())


def test_pngs_are_for_pictures(tmp_path):
    one_slice = io.Volume(np.zeros((1, 4, 5), np.float32), AFFINE)
    for like in (VOLUME, one_slice):
        with pytest.raises(InputError, match="expected a picture"):
            io.write_mask(mask_of(like), like, tmp_path / "mask.png")


def test_files_without_names_and_damaged_ones(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("labels", "[1, 2]")
    Image.new("L", (2, 2)).save(tmp_path / "other.png", pnginfo=text)
    Image.new("L", (2, 2)).save(tmp_path / "plain.png")
    np.savez(tmp_path / "mask.npz", label=np.zeros((2, 2)))
    for name in ("other.png", "plain.png", "mask.npz"):
        assert io.read_label_names(tmp_path / name) is None
    text.add_text("labels", json.dumps({"1": 2}))
    for name in ("a.nii", "a.nrrd", "a.png"):
        (tmp_path / name).write_text("no mask")
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(b"no mask"))
    for name in ("a.nii", "a.nii.gz", "a.nrrd", "a.png"):
        with pytest.raises(InputError, match=name):
            io.read_label_names(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        io.read_label_names(tmp_path / "absent.nii")
