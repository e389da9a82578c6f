"""How a base is recorded, and what is said of one that cannot be fetched."""

import os

import pytest
from huggingface_hub import constants

from samed_peft.conversion import convert_sam
from samed_peft.errors import InputError
from samed_peft.models.bases import recorded_base, without_connection


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


def test_what_is_wrong_with_a_base_that_is_there_is_left_alone():
    with pytest.raises(InputError, match=r"^base x is no SAM$"), without_connection("someone/sam"):
        raise InputError("base x is no SAM")
    with pytest.raises(InputError, match=r"^base x\.pth is cut off$"), without_connection("x.pth"):
        raise InputError("base x.pth is cut off") from OSError()
