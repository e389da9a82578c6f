"""DICOM SEG: read back slice by slice, with names and references to the series."""

import sys
import warnings

import numpy as np
import pydicom
import pytest
from scan_files import scan_array, write_dicom

from samed_peft import io
from samed_peft.errors import InputError

highdicom = pytest.importorskip("highdicom")

NAMES = {1: "liver", 3: "kidney\\left " + "x" * 80}


def labels():
    """Differs in every slice; one of them is empty, and so is label 2."""
    mask = np.zeros(scan_array().shape, np.uint8)
    for z in (0, 1, 3, 4):
        mask[z, : 1 + z % 4, 0] = 1
        mask[z, 3 - z % 4 :, 2] = 3
    return mask


@pytest.fixture
def series(tmp_path):
    """A series whose file names run against its positions."""
    folder = write_dicom(tmp_path / "series", positions=(-356.0, -359.0, -362.0, -365.0, -368.0))
    for path in folder.iterdir():
        header = pydicom.dcmread(path)
        header.FrameOfReferenceUID = "1.2.3.9"
        header.PatientID = "p1"
        header.save_as(path)
    return folder


def read_back(path):
    """Label map (D, H, W) by the positions of the source slices, through highdicom."""
    seg = highdicom.seg.segread(path)
    return seg, {
        uid: seg.get_pixels_by_source_instance([uid], combine_segments=True, ignore_spatial_locations=True)[0]
        for _, _, uid in seg.get_source_image_uids()
    }


def test_masks_come_back_on_their_slices(series, tmp_path):
    scan = io.read_volume(series)
    io.write_dicom_seg(labels(), scan, tmp_path / "out" / "seg.dcm", label_names=NAMES)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["seg.dcm"]
    seg, frames = read_back(tmp_path / "out" / "seg.dcm")
    headers = [pydicom.dcmread(file) for file in series.iterdir()]
    seen = 0
    for header in headers:
        # From the file's own position, not from our order of slices.
        z = round((float(header.ImagePositionPatient[2]) + 368) / 3)
        np.testing.assert_array_equal(header.pixel_array, scan.array[z])
        if labels()[z].any():
            np.testing.assert_array_equal(frames[header.SOPInstanceUID], labels()[z])
            seen += 1
    assert seen == 4
    assert seg.SegmentationType == "BINARY"
    assert seg.StudyInstanceUID == headers[0].StudyInstanceUID
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == headers[0].SeriesInstanceUID
    assert seg.SeriesInstanceUID != headers[0].SeriesInstanceUID
    assert seg.PatientID == "p1"
    names = [item.SegmentLabel for item in seg.SegmentSequence]
    assert names == ["liver", "label 2", ("kidney/left " + "x" * 80)[:64]]
    assert {item.SegmentAlgorithmType for item in seg.SegmentSequence} == {"AUTOMATIC"}


def test_an_empty_mask(series, tmp_path):
    scan = io.read_volume(series)
    io.write_dicom_seg(np.zeros(scan.array.shape, np.uint8), scan, tmp_path / "seg.dcm", label_names={1: "liver"})
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert not seg.pixel_array.any()


def test_wrong_input_is_refused(series, tmp_path):
    scan = io.read_volume(series)
    mask = labels()
    other = io.Volume(scan.array, scan.affine, tmp_path / "scan.nii.gz")
    moved = np.array(scan.affine)
    moved[2, 3] += 3
    for arguments, message in (
        ((mask, other, tmp_path / "seg.dcm"), "expected a DICOM series"),
        ((mask, scan, tmp_path / "seg.nii.gz"), "ending in .dcm"),
        ((mask[:2], scan, tmp_path / "seg.dcm"), "the scan's shape"),
        ((mask[:4], io.Volume(scan.array[:4], scan.affine, series), tmp_path / "seg.dcm"), "5 files for 4 slices"),
        ((mask, io.Volume(scan.array, moved, series), tmp_path / "seg.dcm"), r"found it 3\.00 mm away"),
    ):
        with pytest.raises(InputError, match=message):
            io.write_dicom_seg(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["series"]


def test_a_series_without_frame_of_reference_is_told(tmp_path):
    folder = write_dicom(tmp_path / "series")
    for path in folder.iterdir():
        header = pydicom.dcmread(path)
        del header.StudyInstanceUID
        header.save_as(path)
    with pytest.raises(InputError, match="that a DICOM SEG can refer to"):
        io.write_dicom_seg(labels(), io.read_volume(folder), tmp_path / "seg.dcm")


def test_other_threads_are_heard_while_a_seg_is_written(series, tmp_path, monkeypatch):
    build = highdicom.seg.Segmentation

    def while_building(*args, **kwargs):
        warnings.warn("of another thread", UserWarning, stacklevel=1)  # filters are shared by all threads
        return build(*args, **kwargs)

    monkeypatch.setattr(highdicom.seg, "Segmentation", while_building)
    with pytest.warns(UserWarning, match="of another thread"):
        io.write_dicom_seg(labels(), io.read_volume(series), tmp_path / "seg.dcm")


def test_without_highdicom_the_command_is_named(series, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(InputError, match=r'pip install "samed_peft\[dicom\]"'):
        io.write_dicom_seg(labels(), io.read_volume(series), tmp_path / "seg.dcm")


@pytest.mark.parametrize("keyword", ["SOPClassUID", "FrameOfReferenceUID"])
def test_blank_headers_are_named(series, tmp_path, keyword):
    for path in series.iterdir():
        header = pydicom.dcmread(path)
        setattr(header, keyword, "")
        header.save_as(path)
    with pytest.raises(InputError, match=rf"found no {keyword} in .*\.dcm; write \.nii\.gz"):
        io.write_dicom_seg(labels(), io.read_volume(series), tmp_path / "seg.dcm")
