"""Names of scans as nnU-Net's or as they are, by what the adapter recorded; what is left out is told."""

import re

import pytest
from scan_files import scan_array, write_nifti

from samed_peft.adapters.save_load import add_lora, save_adapter
from samed_peft.cli import main
from samed_peft.config import SamedConfig
from samed_peft.errors import InputError
from samed_peft.models.bases import load_sam
from samed_peft.prediction import plan_masks
from samed_peft.prediction.scans import skipped_files


def masks_of(tmp_path, names, **options):
    """Masks planned for files, by the names of these files."""
    scans = plan_masks([tmp_path / name for name in names], tmp_path / "out", **options)
    return {scan.source.name: scan.mask.name for scan in scans}


@pytest.mark.parametrize(
    ("channel_files", "mask"), [(True, "case0.nii.gz"), (False, "case0_0000.nii.gz"), (None, "case0_0000.nii.gz")]
)
def test_a_single_file_is_named_as_the_adapter_knows(tmp_path, channel_files, mask):
    (found,) = masks_of(tmp_path, ["case0_0000.nii.gz"], channel_files=channel_files).values()
    assert found == mask


def test_names_of_frames_are_those_of_cases_if_the_adapter_knows_no_suffixes(tmp_path):
    names = [f"{video}_{number:04d}.png" for video in "ab" for number in range(3)]
    assert masks_of(tmp_path, names, channel_files=False) == {name: name for name in names}
    assert list(masks_of(tmp_path, names, channel_files=True)) == ["a_0000.png", "b_0000.png"]


def test_a_channel_chosen_by_number_is_found_by_name_whatever_the_adapter_knows(tmp_path):
    names = [f"{case}_{number:04d}.nii.gz" for case in "ab" for number in range(2)]
    for channel_files in (True, False, None):
        found = masks_of(tmp_path, names, channel=1, channel_files=channel_files)
        assert found == {"a_0001.nii.gz": "a.nii.gz", "b_0001.nii.gz": "b.nii.gz"}


def test_names_without_suffix_among_others(tmp_path):
    names = ["a_0000.nii.gz", "b.nii.gz"]
    assert masks_of(tmp_path, names, channel_files=True) == {"a_0000.nii.gz": "a.nii.gz", "b.nii.gz": "b.nii.gz"}
    assert masks_of(tmp_path, names) == {name: name for name in names}


def files_of(tmp_path, names, **options):
    """Case -> names of its files, and the channels to read of each."""
    scans = plan_masks([tmp_path / name for name in names], tmp_path / "out", **options)
    return {scan.mask.name: [path.name for path in (scan.source, *scan.further)] for scan in scans}, {
        scan.channel for scan in scans
    }


def test_several_channels_are_files_of_one_case(tmp_path):
    names = [f"{case}_{number:04d}.nii.gz" for case in "ab" for number in range(3)]
    wanted = {f"{case}.nii.gz": [f"{case}_0002.nii.gz", f"{case}_0000.nii.gz"] for case in "ab"}
    for channel_files in (True, False, None):
        assert files_of(tmp_path, names, channel=(2, 0), channel_files=channel_files) == (wanted, {None})
    # One that lacks is expected all the same, so that this case fails alone.
    lacking = [name for name in names if name != "b_0000.nii.gz"]
    for channel_files in (True, False):
        assert files_of(tmp_path, lacking, channel=(2, 0), channel_files=channel_files) == (wanted, {None})
    # Any of its files stands for a case.
    for name in ("a_0000.nii.gz", "a_0002.nii.gz"):
        found = files_of(tmp_path, [name], channel=(2, 0), channel_files=True)
        assert found == ({"a.nii.gz": wanted["a.nii.gz"]}, {None})


def test_4d_files_are_no_channels_by_their_numbers(tmp_path):
    frames = [f"case_{number:04d}.nii.gz" for number in range(4)]
    assert files_of(tmp_path, frames, channel=(0, 1), channel_files=False) == ({n: [n] for n in frames}, {(0, 1)})
    assert files_of(tmp_path, frames[:1], channel=(0, 1), channel_files=False) == ({frames[0]: frames[:1]}, {(0, 1)})
    for name in frames[:2]:
        (tmp_path / name).touch()
    both = ({"case.nii.gz": frames[:2]}, {None})
    assert files_of(tmp_path, frames[:1], channel=(0, 1), channel_files=False) == both
    assert files_of(tmp_path, frames[:2], channel=(0, 1), channel_files=False) == both
    mixed = ["a_0000.nii.gz", "a_0001.nii.gz", "b.nii.gz"]
    found = plan_masks([tmp_path / name for name in mixed], tmp_path / "out", channel=(0, 1), channel_files=True)
    assert [(scan.case, scan.channel) for scan in found] == [("a", None), ("b", (0, 1))]


def test_a_single_file_of_another_channel_is_refused(tmp_path):
    message = r"channel 1, .* found .*a_0000\.nii\.gz of channel 0 by its name; give a_0001\.nii\.gz, or --channel 0 "
    with pytest.raises(InputError, match=message):
        masks_of(tmp_path, ["a_0000.nii.gz"], channel=1, channel_files=True)
    # The number of a case, or of a year, unless the right channel's file is there.
    assert masks_of(tmp_path, ["a_2021.nii.gz"], channel_files=True) == {"a_2021.nii.gz": "a_2021.nii.gz"}
    (tmp_path / "a_0000.nii.gz").touch()
    with pytest.raises(InputError, match=r"found .*a_2021.* give a_0000\.nii\.gz"):
        masks_of(tmp_path, ["a_2021.nii.gz"], channel_files=True)


def test_skipped_files_are_listed(tmp_path):
    for name in ("a.nii.gz", "b.mhd", "c.bmp", ".d.bmp", "notes.txt", "patient/e.nrrd", "out/masks/a.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "overlays").mkdir()
    (tmp_path / "overlays" / "a.png").touch()
    (tmp_path / "loop").symlink_to("loop")
    maybe, others = skipped_files(
        tmp_path, [tmp_path / "a.nii.gz"], [tmp_path / "out" / "masks", tmp_path / "overlays"]
    )
    assert [path.name for path in maybe] == ["b.mhd", "c.bmp", "patient"]
    assert [path.name for path in others] == ["empty", "loop", "notes.txt"]
    assert skipped_files(tmp_path / "a.nii.gz", [tmp_path / "a.nii.gz"], [tmp_path / "out"]) == ([], [])


def test_the_command_reads_what_the_adapter_recorded(tmp_path, capsys):
    config = SamedConfig(base="tiny-sam", class_names=("a",), image_size=64, orientation="LAS", channel_files=True)
    save_adapter(add_lora(load_sam("tiny-sam", class_names=("a",), image_size=64), config), tmp_path / "adapter")
    (tmp_path / "scans").mkdir()
    for name in ("a_0000", "a_0001", "b_0000"):
        write_nifti(tmp_path / "scans" / f"{name}.nii.gz", scan_array() * 10)
    command = ["predict", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "masks"), "--input"]
    main([*command, str(tmp_path / "scans" / "b_0000.nii.gz")])
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["b.nii.gz"]
    with pytest.raises(SystemExit, match="1"):
        main([*command, str(tmp_path / "scans")])
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["a.nii.gz", "b.nii.gz"]
    assert re.search("1 of 3 files are other channels.*knows a single channel", capsys.readouterr().err)
    (tmp_path / "scans" / "a_0001.nii.gz").rename(tmp_path / "scans" / "a_0001.mhd")
    (tmp_path / "scans" / "notes.txt").touch()
    with pytest.raises(SystemExit, match="1"):
        main([*command, str(tmp_path / "scans")])
    printed = capsys.readouterr()
    assert "skipped, not scans: notes.txt" in printed.out
    assert "error: a_0001.mhd may hold scans, but were skipped" in printed.err
