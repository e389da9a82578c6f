"""The table of file formats, and the texts for users that repeat it."""

import re
from pathlib import Path

import pytest

from samed_peft import io
from samed_peft.cli import main

ROOT = Path(__file__).parents[2]


def test_each_suffix_belongs_to_one_format():
    assert len(set(io.SUFFIXES)) == len(io.SUFFIXES)
    for file_format in io.FORMATS:
        for suffix in file_format.suffixes:
            assert io.format_of(Path(f"a.b{suffix.upper()}")) is file_format
    assert io.format_of(Path("a.txt")) is None
    assert io.suffix_of(Path("nii.gz")) is None


@pytest.mark.parametrize("file_format", [*io.FORMATS, io.DICOM_SERIES], ids=lambda file_format: file_format.name)
def test_masks_of_each_format_can_be_written_and_keep_the_grid(file_format):
    of_masks = io.format_of(Path(f"a{file_format.mask_suffix}"))
    assert of_masks.write_mask is not None
    assert of_masks.read_names is not None
    assert of_masks.is_picture == file_format.is_picture
    if file_format.read_affine is not None:
        assert of_masks.read_affine is not None


def test_help_lists_the_formats(capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    assert f"every scan in a folder: {' '.join(io.SUFFIXES)}, and" in " ".join(capsys.readouterr().out.split())


def test_the_readme_lists_the_formats_and_their_masks():
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| scan | mask |")[1].split("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines()[2:]]
    listed = {suffix: masks for scans, masks in rows for suffix in re.findall(r"`(\.[^`]+)`", scans)}
    assert listed.keys() == set(io.SUFFIXES)
    for suffix, masks in listed.items():
        expected = io.format_of(Path(f"a{suffix}")).mask_suffix
        assert f"`CASE{expected}`" in masks or (masks.strip() == "the same kind" and expected == suffix)
