"""Recording a base, and the message for one that cannot be fetched."""

import os

import pytest
from huggingface_hub import constants

from samed_peft.conversion import convert_sam
from samed_peft.errors import InputError
from samed_peft.models.bases import open_sam, recorded_base


def test_places_on_disk_are_recorded_absolute_and_names_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sam.pth", "facebook", "tiny-sam"):
        (tmp_path / name).mkdir()
    assert recorded_base("sam.pth") == os.path.join(tmp_path, "sam.pth")
    assert recorded_base("../sam.pth") == "../sam.pth"  # not there
    assert recorded_base(f"facebook/../{tmp_path.name}") == f"facebook/../{tmp_path.name}"
    assert recorded_base("facebook/..") == str(tmp_path)
    assert recorded_base("facebook/sam-vit-base") == "facebook/sam-vit-base"
    assert recorded_base("tiny-sam") == "tiny-sam"  # the one that ships with the package goes first
    assert recorded_base("a" * 300) == "a" * 300


def test_without_a_connection_a_base_on_disk_is_suggested(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"(?s)base someone/sam cannot .* without a connection, .*\.pth files"):
        convert_sam("someone/sam", tmp_path / "out")


def test_a_damaged_base_on_disk_gets_no_advice_about_connections(tmp_path):
    (tmp_path / "sam").mkdir()
    with pytest.raises(InputError, match=r"^base .*sam cannot be opened as a SAM") as raised:
        open_sam(str(tmp_path / "sam"))
    assert "connection" not in str(raised.value)
