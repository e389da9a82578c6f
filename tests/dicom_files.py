"""Write DICOM series with headers of any kind, for tests."""

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian


def place(z):
    return [-20.0, -30.0, 100.0 + 2 * z]


def _header(uid, syntax, kind):
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = syntax
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = kind
    header.StudyInstanceUID, header.SeriesInstanceUID, header.FrameOfReferenceUID = "1.2.3", uid, "1.2.3.9"
    header.PatientID, header.PatientName, header.Modality = "p1", "X^Y", "CT"
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated = 16
    return header


def _save(header, planes, path, syntax):
    if syntax.is_compressed and not syntax.is_deflated:
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.PixelData = planes.astype("<i2" if header.PixelRepresentation else "<u2").tobytes()
        header.compress(syntax, generate_instance_uid=False)
    else:
        order = "<" if syntax.is_little_endian else ">"
        header.PixelData = planes.astype(f"{order}i2" if header.PixelRepresentation else f"{order}u2").tobytes()
        header["PixelData"].VR = "OW"
    path.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(path, enforce_file_format=True)


def write_series(
    folder,
    stored,
    *,
    slopes=None,
    intercepts=None,
    signed=True,
    uid="1.2.3.4",
    orientation=(1, 0, 0, 0, 1, 0),
    syntax=ExplicitVRLittleEndian,
    **elements,
):
    """Slices of (D, H, W) whole numbers in files IM0000, IM0001 and so on."""
    for z, plane in enumerate(stored):
        header = _header(uid, syntax, CTImageStorage)
        header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = f"{uid}.{z + 1}"
        header.InstanceNumber, header.ImagePositionPatient = z + 1, place(z)
        header.ImageOrientationPatient = [f"{value:.10f}" for value in orientation]
        header.PixelSpacing, header.SliceThickness = [0.8, 1.1], 2.0
        header.Rows, header.Columns = plane.shape
        header.BitsStored, header.PixelRepresentation = 16, int(signed)
        if slopes is not None:
            header.RescaleSlope = slopes[z]
        if intercepts is not None:
            header.RescaleIntercept = intercepts[z]
        for keyword, value in elements.items():
            setattr(header, keyword, value)
        header.HighBit = header.BitsStored - 1
        _save(header, plane, folder / f"IM{z:04d}", syntax)
    return folder


def write_enhanced(folder, stored, *, order=None, slopes=None, syntax=None):
    """One multi-frame file, `s.dcm`, with its geometry in functional groups; frame k is slice `order[k]`."""
    header = _header("1.2.3.4", ExplicitVRLittleEndian, EnhancedCTImageStorage)
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4.1"
    header.NumberOfFrames, header.Rows, header.Columns = stored.shape
    header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 15, 1
    shared, measures, axes = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [0.8, 1.1], 2.0
    axes.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [axes]
    header.SharedFunctionalGroupsSequence, groups = [shared], []
    order = list(range(len(stored))) if order is None else order
    for frame, z in enumerate(order):
        group, position, values = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = place(z)
        values.RescaleSlope, values.RescaleIntercept = slopes[frame] if slopes else 1, 0
        group.PlanePositionSequence, group.PixelValueTransformationSequence = [position], [values]
        groups.append(group)
    header.PerFrameFunctionalGroupsSequence = groups
    planes = np.stack([stored[z % len(stored)] for z in order])
    _save(header, planes, folder / "s.dcm", syntax or ExplicitVRLittleEndian)
    return folder / "s.dcm"


def edit(path, change):
    header = pydicom.dcmread(path)
    change(header)
    header.save_as(path)
