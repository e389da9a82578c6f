"""Write small scans of every format, and pickles that must not run, for tests."""

import json
import locale
import math
from pathlib import Path
from types import MappingProxyType

import h5py
import nibabel
import numpy as np
import SimpleITK as sitk  # noqa: N813

AFFINE = np.array([[-1.5, 0, 0, 90], [0, 1.5, 0, -120], [0, 0, 3, -368], [0, 0, 0, 1.0]])


def scan_array(shape=(5, 4, 3), dtype=np.int16):
    """Every voxel differs, so that a mix-up of axes shows."""
    return np.arange(math.prod(shape)).reshape(shape).astype(dtype) - 20


def write_nifti(path, array=None, affine=AFFINE, *, kind=nibabel.Nifti1Image):
    array = scan_array() if array is None else array
    nibabel.save(kind(array.T, affine), path)
    return path


def write_itk(path, array=None):
    image = sitk.GetImageFromArray(scan_array() if array is None else array)
    image.SetSpacing((1.5, 1.5, 3.0))
    image.SetOrigin((-90.0, 120.0, -368.0))
    image.SetDirection((1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(path))
    return path


WRITERS = {
    ".nii": write_nifti,
    ".nii.gz": write_nifti,
    ".nrrd": write_itk,
    ".mha": write_itk,
    ".npz": lambda path: np.savez(path, image=np.random.default_rng(0).random((6, 50, 50))) or path,
    ".npy.h5": lambda path: [h5py.File(path, "w")][0].create_dataset("image", data=np.ones((3, 9, 9))).file.close(),
}


def write_dicom(folder, *, positions=(-368.0, -365.0, -362.0, -359.0, -356.0), series="1.2.3.4", first=0):
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for index, z in enumerate(positions):
        image = sitk.GetImageFromArray(scan_array()[index : index + 1])
        image.SetSpacing((1.5, 1.5, 3.0))
        tags = {"0008|0016": "1.2.840.10008.5.1.4.1.1.2", "0008|0060": "CT", "0020|000e": series}
        tags |= {"0008|0018": f"{series}.{index + 1}", "0020|0013": str(index), "0020|000d": "1.2.3"}
        tags |= {"0020|0032": f"-90\\-12\\{z}", "0020|0037": "1\\0\\0\\0\\1\\0"}
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{first + index}.dcm"))
        writer.Execute(image)
    # GDCM leaves the process in the C locale when it has written a file, and every later text file in ASCII.
    locale.setlocale(locale.LC_ALL, "")
    return folder


class Payload:
    """Makes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


TWO_MODALITIES_SHAPE = (5, 20, 24)  # (D, H, W)


def two_modalities(root, *, in_4d, names=MappingProxyType({"0": "T1", "1": "FLAIR"}), cases=4):
    """Scans whose first channel shows a ball at random and whose second one shows the labelled ball, 30 times brighter.

    Only the second channel tells where the label is. The first axis of the affine is flipped in every other case.
    """
    for kind in ("imagesTr", "labelsTr"):
        (root / kind).mkdir(parents=True)
    listed = [{"image": f"imagesTr/c{number}.nii.gz", "label": f"labelsTr/c{number}.nii.gz"} for number in range(cases)]
    labels = {"0": "background", "1": "ball"} if in_4d else {"background": 0, "ball": 1}
    of_channels = {"modality": dict(names), "training": listed} if in_4d else {"channel_names": dict(names)}
    (root / "dataset.json").write_text(json.dumps({"labels": labels} | of_channels))
    grid = np.stack(np.meshgrid(*map(np.arange, TWO_MODALITIES_SHAPE), indexing="ij"))
    for number in range(cases):
        rng = np.random.default_rng(number)
        shown = []
        for _ in names:
            centre = np.array([2, *rng.integers(6, 14, 2)])[:, None, None, None]
            shown.append((((grid - centre) / [[[[2]]], [[[5]]], [[[5]]]]) ** 2).sum(0) < 1)
        shown[0] = shown[0][:, ::-1]
        noise = rng.normal(0, 0.1, (len(names), *TWO_MODALITIES_SHAPE))
        arrays = [(30.0**place * (1 + ball + noise[place])).astype(np.float32) for place, ball in enumerate(shown)]
        affine = np.diag([-1.0 if number % 2 else 1.0, 1, 4, 1])
        if in_4d:
            image = nibabel.Nifti1Image(np.stack(arrays, axis=-1).swapaxes(0, 2), affine)
            nibabel.save(image, root / "imagesTr" / f"c{number}.nii.gz")
        else:
            for place, array in enumerate(arrays):
                write_nifti(root / "imagesTr" / f"c{number}_{place:04d}.nii.gz", array, affine)
        write_nifti(root / "labelsTr" / f"c{number}.nii.gz", shown[-1].astype(np.uint8), affine)
    return root
