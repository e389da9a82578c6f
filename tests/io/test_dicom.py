"""DICOM as scanners and archives write it: read to the last value, or refused with the file's name."""

import shutil

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from dicom_files import edit, place, write_enhanced, write_series
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)
from scan_files import write_dicom

from samed_peft import io
from samed_peft.errors import InputError
from samed_peft.prediction.scans import list_scans, plan_masks

CT = np.random.default_rng(0).integers(-1000, 1000, (5, 32, 24)).astype(float)


def refused(folder, *words):
    with pytest.raises(InputError) as caught:
        io.read_volume(folder)
    for word in words:
        assert str(word) in str(caught.value)


# Values


@pytest.mark.parametrize(
    ("slopes", "intercepts", "signed"),
    [
        ((1, 50, 50, 50, 50), (0,) * 5, True),  # the first one's 16 bits hold a thirtieth of the others' range
        ((1, 0.0005, 0.25, 1, 3), (0,) * 5, True),  # PET: whole numbers first
        ((1,) * 5, (0, -1024, -1024, -1024, -1024), False),  # air at -1024
        ((-1, 1, 1, 1, 1), (0.5, 0, 0, 0, 0), True),
        ((1,) * 5, (-32768,) * 5, False),
    ],
)
def test_each_slice_is_rescaled_by_its_own_header(tmp_path, slopes, intercepts, signed):
    stored = np.random.default_rng(1).integers(0, 32767, CT.shape)
    write_series(tmp_path / "s", stored, slopes=slopes, intercepts=intercepts, signed=signed)
    expected = stored * np.array(slopes, float)[:, None, None] + np.array(intercepts, float)[:, None, None]
    np.testing.assert_array_equal(io.read_volume(tmp_path / "s").array, expected.astype(np.float32))


@pytest.mark.parametrize("stored_bits", [8, 12, 16])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (0.37, 1.5), (2, 0)])
def test_single_slices_equal_those_of_gdcm(tmp_path, stored_bits, signed, slope, intercept):
    low, high = (-(2 ** (stored_bits - 1)), 2 ** (stored_bits - 1)) if signed else (0, 2**stored_bits)
    stored = np.random.default_rng(2).integers(low, high, (3, 5, 4))
    folder = write_series(
        tmp_path / "s", stored, slopes=[slope] * 3, intercepts=[intercept] * 3, signed=signed, BitsStored=stored_bits
    )
    volume = io.read_volume(folder)
    for plane, path in zip(volume.array, sorted(folder.iterdir()), strict=True):
        np.testing.assert_array_equal(plane, sitk.GetArrayFromImage(sitk.ReadImage(path))[0].astype(np.float32))


@pytest.mark.parametrize("bits", [0x7000, 0xF000])
def test_bits_of_overlays_are_no_pixels(tmp_path, bits):
    stored = np.arange(CT.size).reshape(CT.shape) + bits
    write_series(tmp_path / "s", stored, signed=False, BitsStored=12)
    np.testing.assert_array_equal(io.read_volume(tmp_path / "s").array, stored - bits)


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless]
)
def test_transfer_syntaxes(tmp_path, syntax):
    folder = write_series(tmp_path / "s", CT, intercepts=[-1024] * 5, syntax=syntax)
    np.testing.assert_array_equal(io.read_volume(folder).array, CT - 1024)


@pytest.mark.parametrize("bits", [12, 16])
def test_slices_that_are_decoded_together(tmp_path, bits):
    """More slices than one batch has, each of its own size when compressed."""
    stored = np.arange(35 * 20 * 16).reshape(35, 20, 16) // 3 % 2**bits
    stored[::3] = 7
    folder = write_series(tmp_path / "s", stored, signed=False, syntax=JPEGLSLossless, BitsStored=bits)
    np.testing.assert_array_equal(io.read_volume(folder).array, stored)


def test_a_bad_slice_among_those_decoded_together_is_named(tmp_path):
    folder = write_series(tmp_path / "s", CT, signed=False, syntax=JPEGLSLossless)
    path = folder / "IM0002"
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xf7") + 5  # the height in the frame's own header
    data[at : at + 2] = (999).to_bytes(2, "big")
    path.write_bytes(data)
    refused(folder, path)


def test_an_unknown_compression_is_named_with_the_remedy(tmp_path):
    folder = write_series(tmp_path / "s", CT, syntax=RLELossless)
    path = folder / "IM0003"
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.5", b"1.2.840.10008.1.2.9"))
    refused(folder, path, "1.2.840.10008.1.2.9", "decompress")


@pytest.mark.parametrize("cut", [1, 9, 60, 200])
def test_cut_compressed_slices(tmp_path, cut):
    folder = write_series(tmp_path / "s", CT, syntax=RLELossless)
    path = folder / "IM0004"
    path.write_bytes(path.read_bytes()[:-cut])
    refused(folder, path)


# Multi-frame


@pytest.mark.parametrize("syntax", [None, RLELossless])
def test_enhanced_multi_frame(tmp_path, syntax):
    order = [3, 0, 4, 1, 2]
    path = write_enhanced(tmp_path / "s", CT, order=order, slopes=[1, 2, 3, 0.5, 1], syntax=syntax)
    for source in (path, path.parent):
        volume = io.read_volume(source)
        expected = CT.copy()
        for frame, z in enumerate(order):
            expected[z] *= [1, 2, 3, 0.5, 1][frame]
        np.testing.assert_array_equal(volume.array, expected)
        np.testing.assert_allclose(
            volume.affine, [[-1.1, 0, 0, 20], [0, -0.8, 0, 30], [0, 0, 2, 100], [0, 0, 0, 1]], atol=1e-9
        )


def test_frames_that_are_no_stack(tmp_path):
    refused(write_enhanced(tmp_path / "twice", CT, order=[0, 1, 2, 2, 3]), "2 at one place", "frame 3 of")
    refused(write_enhanced(tmp_path / "gap", CT, order=[0, 1, 2, 3, 7]), "evenly spaced", "frame 5 of")
    path = write_enhanced(tmp_path / "cine", CT)
    edit(path, lambda header: header.__delattr__("PerFrameFunctionalGroupsSequence"))
    refused(path, "functional groups", path)
    path = write_enhanced(tmp_path / "few", CT)
    edit(path, lambda header: setattr(header, "NumberOfFrames", 4))
    refused(path, "functional groups of 4 frames, found 5", path)


# Geometry


def test_slices_without_position_are_named(tmp_path):
    folder = write_series(tmp_path / "s", CT)
    edit(folder / "IM0002", lambda header: header.__delattr__("ImagePositionPatient"))
    refused(folder, folder / "IM0002", "ImagePositionPatient")
    for path in folder.iterdir():
        edit(path, lambda header: header.pop("ImagePositionPatient", None))
    refused(folder, folder / "IM0000", "ImagePositionPatient")


def test_slices_are_numbered_where_the_file_says_their_distance(tmp_path):
    folder = write_series(tmp_path / "s", CT)
    for path in folder.iterdir():
        edit(path, lambda header: (header.pop("ImagePositionPatient"), setattr(header, "SpacingBetweenSlices", 2.5)))
    with pytest.warns(UserWarning, match=r"ImagePositionPatient in .*IM0000 .* 2\.5 mm apart"):
        volume = io.read_volume(folder)
    np.testing.assert_array_equal(volume.array, CT)
    assert volume.spacing_zyx_mm == (2.5, 0.8, 1.1)


@pytest.mark.parametrize("keyword", ["PixelSpacing", "ImageOrientationPatient"])
@pytest.mark.parametrize("which", ["one", "all"])
def test_slices_without_spacing_or_orientation_are_named(tmp_path, keyword, which):
    folder = write_series(tmp_path / "s", CT)
    paths = sorted(folder.iterdir())[:1] if which == "one" else folder.iterdir()
    for path in paths:
        edit(path, lambda header: header.pop(keyword))
    refused(folder, folder / "IM0000", keyword)


def test_spacing_at_the_detector(tmp_path):
    def to_radiograph(header):
        header.ImagerPixelSpacing, header.Modality = header.PixelSpacing, "DX"
        header.EstimatedRadiographicMagnificationFactor = 2.0
        del header.PixelSpacing, header.ImagePositionPatient, header.ImageOrientationPatient

    folder = write_series(tmp_path / "s", CT[:1])
    edit(folder / "IM0000", to_radiograph)
    with (
        pytest.warns(UserWarning, match=r"IM0000; ImagerPixelSpacing is taken"),
        pytest.warns(UserWarning, match=r"no ImagePositionPatient in .*IM0000"),
    ):
        volume = io.read_volume(folder)
    np.testing.assert_allclose(volume.spacing_zyx_mm[1:], (0.4, 0.55))
    edit(folder / "IM0000", lambda header: setattr(header, "Modality", "CT"))
    refused(folder, folder / "IM0000", "ImagerPixelSpacing")


def test_a_tilted_mask_is_warned_of(tmp_path):
    tilt = np.deg2rad(20)
    folder = write_series(tmp_path / "s", CT, orientation=[1, 0, 0, 0, np.cos(tilt), -np.sin(tilt)])
    volume, mask = io.read_volume(folder), np.zeros(CT.shape, np.uint8)
    with pytest.warns(UserWarning, match=r"mask.nii.gz has voxel axes 20\.0 degrees off .* \.nrrd or \.mha"):
        io.write_mask(mask, volume, tmp_path / "mask.nii.gz")
    for name in ("mask.nrrd", "mask.mha"):
        io.write_mask(mask, volume, tmp_path / name)
        image = sitk.ReadImage(tmp_path / name)
        np.testing.assert_allclose(image.TransformIndexToPhysicalPoint((0, 0, 4)), place(4), atol=1e-6)


# What lies in folders


def test_files_without_preamble_or_suffix(tmp_path):
    folder = write_series(tmp_path / "s", CT)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[132:])
    np.testing.assert_array_equal(io.read_volume(folder).array, CT)
    assert io.holds_dicom(folder)


def test_other_files_are_left_out(tmp_path):
    folder = write_series(tmp_path / "s", CT)
    header = pydicom.dcmread(folder / "IM0000")
    del header.PixelData, header.Rows
    for kind in ("481.3", "88.11", "104.1", "11.1"):  # structures, report, PDF, presentation state
        header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = f"1.2.840.10008.5.1.4.1.1.{kind}"
        header.save_as(folder / f"other{kind}.dcm")
    (folder / "README").write_text("about these images")
    (folder / "notes.txt").write_text("x")
    (folder / "Thumbs.db").write_bytes(bytes(range(200)))
    (folder / ".DS_Store").write_bytes(b"\0" * 200)
    np.testing.assert_array_equal(io.read_volume(folder).array, CT)


@pytest.mark.parametrize("index", [0, 2, 4])
@pytest.mark.parametrize(
    "damage", ["no bytes", "cut header", "cut pixels", "other bytes", "cut before the class", "cut in the class"]
)
def test_damaged_slices_are_named(tmp_path, index, damage):
    folder = write_series(tmp_path / "s", CT)
    path = folder / f"IM{index:04d}"
    data = path.read_bytes()
    cut = {"no bytes": 0, "cut header": len(data) // 2, "cut pixels": -2, "cut before the class": 150}
    cut |= {"cut in the class": data.index(b"1.2.840.10008.5") + 10, "other bytes": 0}
    path.write_bytes(bytes(range(128, 256)) * 4 if damage == "other bytes" else data[: cut[damage]])
    refused(folder, path)


def test_localizers(tmp_path):
    folder = write_series(tmp_path / "s", CT)
    scout = write_series(tmp_path / "scout", CT[:1], uid="1.2.3.4", SOPInstanceUID="9.9") / "IM0000"
    shutil.copy(scout, folder / "scout")
    edit(folder / "scout", lambda header: setattr(header, "ImageOrientationPatient", [1, 0, 0, 0, 0, -1]))
    refused(folder, folder / "scout", "ImageOrientationPatient")
    edit(folder / "scout", lambda header: setattr(header, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    with pytest.warns(UserWarning, match="localizers: .*scout"):
        np.testing.assert_array_equal(io.read_volume(folder).array, CT)


def test_phases_and_copies(tmp_path):
    folder = write_series(tmp_path / "s", CT)
    for path in list(folder.iterdir()):
        shutil.copy(path, path.with_name(path.name + "b"))
    refused(folder, "one image", "IM0000b")
    for path in folder.glob("*b"):
        edit(
            path, lambda header: header.update({"SOPInstanceUID": header.SOPInstanceUID + ".1", "AcquisitionNumber": 2})
        )
    for path in folder.glob("*[0-9]"):
        edit(path, lambda header: setattr(header, "AcquisitionNumber", 1))
    refused(folder, "2 at each of 5 places", "AcquisitionNumber (1, 2)", "folder of its own")


def test_several_series_are_listed_and_one_is_chosen(tmp_path):
    folder = write_dicom(tmp_path / "both")
    write_dicom(folder, series="1.2.3.5", first=10, positions=(-368.0, -365.0))
    with pytest.raises(
        InputError, match=r"found 2 series .*1\.2\.3\.4 \(5 files, CT\); 1\.2\.3\.5 \(2 files, CT\).*--series"
    ):
        list_scans(folder)
    with pytest.raises(InputError, match=r"the DICOM series 1\.9, found 2 series"):
        list_scans(folder, series="1.9")
    for source in (folder, tmp_path):
        (scan,) = plan_masks(list_scans(source, series="1.2.3.5"), tmp_path / "out", series="1.2.3.5")
        assert (scan.source, scan.series, scan.mask.name) == (folder, "1.2.3.5", "both_1.2.3.5.nii.gz")
    volume = io.read_series(folder, "1.2.3.5")
    assert volume.array.shape == (2, 4, 3)
    assert volume.array.dtype == np.float32


def test_series_further_down_are_pointed_at(tmp_path):
    write_series(tmp_path / "patient/study/series", CT)
    refused(tmp_path / "patient", tmp_path / "patient/study/series")
    for call in (list_scans, lambda path: list_scans(path, series="1.2.3.4")):
        with pytest.raises(InputError, match=r"patient.study.series"):
            call(tmp_path)


def test_single_files(tmp_path):
    folder = write_series(tmp_path / "s", CT)
    path = (folder / "IM0002").rename(folder / "IM0002.dcm")
    refused(path, "one of 5 slices", folder)
    with pytest.raises(InputError, match="give the folder"):
        list_scans(folder / "IM0001")
    alone = write_series(tmp_path / "alone", CT[:1]) / "IM0000"
    np.testing.assert_array_equal(io.read_volume(alone.rename(tmp_path / "one.dcm")).array, CT[:1])
    (tmp_path / "x.dcm").write_text("no DICOM")
    refused(tmp_path / "x.dcm", "x.dcm")


def test_tables_of_values_are_named(tmp_path):
    folder = write_series(tmp_path / "s", CT)
    table = pydicom.Dataset()
    table.ModalityLUTType = "HU"
    edit(folder / "IM0003", lambda header: setattr(header, "ModalityLUTSequence", [table]))
    refused(folder, "Modality LUT", "IM0003")


def test_colour_and_inverse_pictures(tmp_path):
    folder = write_series(tmp_path / "s", CT, PhotometricInterpretation="MONOCHROME1")
    with pytest.warns(UserWarning, match=r"IM0000 is MONOCHROME1"):
        np.testing.assert_array_equal(io.read_volume(folder).array, CT)
    write_series(tmp_path / "c", CT, PhotometricInterpretation="PALETTE COLOR")
    refused(tmp_path / "c", "PALETTE COLOR", "IM0000")
