"""Files and folders that may not be read, or whose names cannot be, end with a message that names them."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from samed_peft import io
from samed_peft.datasets.layouts import open_folder
from samed_peft.errors import InputError
from samed_peft.evaluation.folders import list_files
from samed_peft.prediction.scans import list_scans


def _denied(path, *_, **__):
    raise PermissionError(13, "Permission denied", str(path))


READERS = (io.read_volume, io.read_labels, io.read_affine, io.read_label_names)
LISTERS = (open_folder, list_files, list_scans)


def test_a_scan_that_may_not_be_read(tmp_path, monkeypatch):
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 3, 4), np.uint8), np.eye(4)), tmp_path / "a.nii.gz")
    monkeypatch.setattr(Path, "open", _denied)  # root may read whatever chmod says
    for read in READERS:
        with pytest.raises(InputError, match=r"a\.nii\.gz cannot be read: Permission denied; check"):
            read(tmp_path / "a.nii.gz")


def test_a_dataset_json_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "dataset.json").write_text(json.dumps({}))
    monkeypatch.setattr(Path, "open", _denied)
    with pytest.raises(InputError, match=r"dataset\.json cannot be read: Permission denied"):
        open_folder(tmp_path)


@pytest.mark.parametrize("method", ["iterdir", "is_dir"])
def test_a_folder_that_may_not_be_listed(tmp_path, monkeypatch, method):
    with monkeypatch.context() as patch:
        patch.setattr(Path, method, _denied)
        for listing in LISTERS:
            with pytest.raises(InputError, match=f"{tmp_path.name} cannot be read: Permission denied"):
                listing(tmp_path)


def test_names_that_are_too_long(tmp_path):
    for function in (*READERS, *LISTERS):
        with pytest.raises(InputError, match="cannot be read: File name too long"):
            function(tmp_path / ("a" * 300 + ".nii.gz"))


def test_a_case_whose_files_may_not_be_examined(tmp_path, monkeypatch):
    for kind in ("img", "label"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"{kind}0005.nii.gz").write_bytes(b"0")
    folder = open_folder(tmp_path)
    monkeypatch.setattr(Path, "is_file", _denied)  # the folders may be listed and not searched
    with pytest.raises(InputError, match=r"label0005\.nii\.gz cannot be read: Permission denied"):
        folder.case("case0005")
