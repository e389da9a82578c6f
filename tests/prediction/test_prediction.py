"""`samed predict`: scans of every kind in, masks on their grids out, bad scans told."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pydicom
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from scan_files import AFFINE, write_dicom, write_itk
from scipy import ndimage

from samed_peft import io
from samed_peft.adapters.save_load import add_lora, load_adapter, save_adapter
from samed_peft.cli import main
from samed_peft.config import SamedConfig
from samed_peft.datasets.preprocessing import warn_of_window
from samed_peft.errors import InputError
from samed_peft.models.bases import load_sam
from samed_peft.prediction import PredictionOptions, list_scans, plan_masks, predict_files
from samed_peft.prediction.compiled import CompiledSegmenter
from samed_peft.prediction.inference import load_segmenter, predict_volume
from samed_peft.prediction.postprocessing import largest_parts

ROOT = Path(__file__).parents[2]
NAMES = {1: "liver", 2: 'left <kidney> & "co"'}
SHAPE = (4, 12, 10)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter with random weights that gives more than one label."""
    torch.manual_seed(5)
    config = SamedConfig(
        base="tiny-sam", class_names=tuple(NAMES.values()), image_size=64, window=(0.0, 100.0), orientation="LAS"
    )
    model = add_lora(load_sam(config.base, class_names=config.class_names, image_size=64), config)
    save_adapter(model, tmp_path_factory.mktemp("adapter") / "adapter", config=config)
    return tmp_path_factory.getbasetemp() / "adapter0" / "adapter"


@pytest.fixture(scope="module")
def model(adapter):
    return load_adapter(adapter)


@pytest.fixture(scope="module")
def loaded():
    """`load_segmenter` that loads each model once; no prediction changes it."""
    models = {}

    def load(source, *, accelerator, **options):
        key = (source, *options.items())
        if key not in models:
            models[key] = load_segmenter(source, accelerator=accelerator, **options)
        return models[key]

    return load


@pytest.fixture
def predict(adapter, loaded, tmp_path, monkeypatch):
    """Runs the command on paths below `tmp_path`; returns its exit code."""
    monkeypatch.setattr("samed_peft.prediction.inference.load_segmenter", loaded)

    def run(source, output, *options):
        arguments = ["--adapter", adapter, "--input", tmp_path / source, "--output", tmp_path / output, *options]
        try:
            main(["predict", *map(str, arguments)])
        except SystemExit as end:
            return end.code
        return 0

    return run


def scan_array(seed=0, shape=SHAPE):
    coarse = np.random.default_rng(seed).uniform(0, 100, (2, 3, 2))
    steps = [np.arange(n) * size // n for n, size in zip(shape, coarse.shape, strict=True)]
    return coarse[np.ix_(*steps)].astype(np.float32)


def write_scan(path, array=None, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image((scan_array() if array is None else array).T, affine), path)
    return path


def expected_mask(model, path, **options):
    return predict_volume(model, io.read_volume(path), **options)


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_single_scan(predict, model, tmp_path, capsys):
    scan = write_scan(tmp_path / "scan.nii.gz")
    assert predict("scan.nii.gz", "out/mask.nii.gz", "--batch_size", 3) == 0
    mask = io.read_labels(tmp_path / "out" / "mask.nii.gz")
    np.testing.assert_array_equal(mask.array, expected_mask(model, scan))
    assert len(np.unique(mask.array)) > 1
    np.testing.assert_array_equal(mask.affine, io.read_volume(scan).affine)
    assert io.read_label_names(tmp_path / "out" / "mask.nii.gz") == NAMES
    assert capsys.readouterr().out == f"1 mask written to {tmp_path / 'out' / 'mask.nii.gz'}\n"
    assert predict("scan.nii.gz", "out2") == 0
    assert files_of(tmp_path / "out2") == ["scan.nii.gz"]


def test_every_kind_of_scan_in_one_folder(predict, model, tmp_path):
    folder = tmp_path / "scans"
    write_scan(folder / "a.nii.gz")
    write_scan(folder / "b.nii")
    write_itk(folder / "c.nrrd", scan_array())
    write_itk(folder / "d.mha", scan_array())
    write_dicom(folder / "e.series")
    Image.fromarray(scan_array()[0].astype(np.uint8)).save(folder / "f.png")
    Image.fromarray(np.stack([scan_array()[0].astype(np.uint8)] * 3, -1)).save(folder / "g.tif")
    Image.fromarray(scan_array()[0].astype(np.uint8)).save(folder / "h.jpg")
    np.savez(folder / "i.npz", image=scan_array() / 100)
    with h5py.File(folder / "j.npy.h5", "w") as file:
        file["image"] = scan_array() / 100
    (folder / "notes.txt").write_text("no scan")
    (folder / ".hidden.nii.gz").write_text("no scan")
    (folder / "empty").mkdir()
    assert predict("scans", "masks", "--overlay") == 0
    kinds = ["a.nii.gz", "b.nii.gz", "c.nrrd", "d.mha", "e.series.nii.gz", "f.png", "g.png", "h.png"]
    kinds += ["i.nii.gz", "j.nii.gz"]
    overlays = [f"overlays/{case}.png" for case in "abcd"] + ["overlays/e.series.png"]
    overlays += [f"overlays/{case}.png" for case in "fghij"]
    assert files_of(tmp_path / "masks") == sorted(kinds + overlays)
    for scan in list_scans(folder):
        name = next(kind for kind in kinds if kind[0] == scan.name[0])
        mask, image = io.read_labels(tmp_path / "masks" / name), io.read_volume(scan)
        np.testing.assert_array_equal(mask.array, predict_volume(model, image))
        if image.affine is not None:
            np.testing.assert_allclose(mask.affine, image.affine, atol=1e-6)
        assert io.read_label_names(tmp_path / "masks" / name) == NAMES


def test_finished_scans_are_skipped(predict, tmp_path, capsys):
    for case in "ab":
        write_scan(tmp_path / "scans" / f"{case}.nii.gz", scan_array(ord(case)))
    assert predict("scans", "masks") == 0
    finished = (tmp_path / "masks" / "a.nii.gz").read_bytes()
    (tmp_path / "masks" / "a.nii.gz").write_bytes(b"whatever is there")
    (tmp_path / "masks" / "b.nii.gz").unlink()
    capsys.readouterr()
    assert predict("scans", "masks") == 0
    assert "1 mask written" in (printed := capsys.readouterr().out)
    assert "1 finished earlier and skipped" in printed
    assert (tmp_path / "masks" / "a.nii.gz").read_bytes() == b"whatever is there"
    assert predict("scans", "masks", "--overwrite") == 0
    assert (tmp_path / "masks" / "a.nii.gz").read_bytes() == finished


def test_what_is_said_where_scans_fail_is_true(predict, tmp_path, capsys):
    for case in "ab":
        (tmp_path / "scans").mkdir(exist_ok=True)
        (tmp_path / "scans" / f"{case}.nii.gz").write_bytes(b"no gzip")
    assert predict("scans", "masks") == 1
    assert "error: all 2 scans failed; no mask was written" in capsys.readouterr().err
    write_scan(tmp_path / "scans" / "c.nii.gz")
    assert predict("scans", "masks") == 1
    assert "error: 2 of 3 scans failed; the other masks are written" in capsys.readouterr().err
    assert predict("scans", "masks") == 1
    assert "error: 2 of 3 scans failed; the other masks were written earlier" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["notes.txt/masks", "notes.txt/masks/a.nii.gz", "masks"])
def test_an_output_folder_that_cannot_be_written_is_noticed_first(predict, tmp_path, capsys, output):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "overlays").touch()
    write_scan(tmp_path / "scans" / "a.nii.gz")
    assert predict("scans", output, "--overlay", "--adapter", "nowhere") == 2
    error = capsys.readouterr().err
    assert "a file" in error
    assert "choose another name" in error
    assert error.count("\n") == 1


def test_channels_of_4d_files(predict, model, tmp_path, capsys):
    channels = np.stack([scan_array(1), scan_array(2)])
    image = nibabel.Nifti1Image(channels.T, AFFINE)
    image.set_sform(AFFINE, code=3)
    image.set_qform(AFFINE, code=4)
    nibabel.save(image, tmp_path / "four.nii.gz")
    assert predict("four.nii.gz", "none.nii.gz") == 2
    assert "choose one of 0 to 1 as channel, --channel on the command line" in capsys.readouterr().err
    assert predict("four.nii.gz", "none.nii.gz", "--channel", 2) == 2
    assert "expected a channel from 0 to 1, found 2 for " in capsys.readouterr().err
    with pytest.raises(InputError, match="expected a channel from 0 to 1, found -1 for "):
        io.read_volume(tmp_path / "four.nii.gz", channel=-1)
    assert predict("four.nii.gz", "none.nii.gz", "--channel", -1) == 2
    assert not (tmp_path / "none.nii.gz").exists()
    assert predict("four.nii.gz", "mask.nii.gz", "--channel", 1) == 0
    mask = nibabel.load(tmp_path / "mask.nii.gz")
    assert mask.shape == SHAPE[::-1]
    assert (int(mask.header["sform_code"]), int(mask.header["qform_code"])) == (3, 4)
    scan = io.read_volume(tmp_path / "four.nii.gz", channel=1)
    np.testing.assert_array_equal(io.read_labels(tmp_path / "mask.nii.gz").array, predict_volume(model, scan))


def test_names_of_nnunet(predict, model, tmp_path, capsys):
    for case in ("liver_1", "liver_2"):
        for channel in range(2):
            write_scan(tmp_path / "imagesTs" / f"{case}_{channel:04d}.nii.gz", scan_array(channel))
    assert predict("imagesTs", "masks", "--channel", 1) == 0
    assert files_of(tmp_path / "masks") == ["liver_1.nii.gz", "liver_2.nii.gz"]
    assert "2 of 4 files are other channels" in capsys.readouterr().out
    expected = expected_mask(model, tmp_path / "imagesTs" / "liver_2_0001.nii.gz")
    np.testing.assert_array_equal(io.read_labels(tmp_path / "masks" / "liver_2.nii.gz").array, expected)
    assert predict("imagesTs", "other", "--channel", 2) == 2
    assert "expected files ending in _0002" in capsys.readouterr().err
    (tmp_path / "imagesTs" / "liver_2_0001.nii.gz").unlink()
    assert predict("imagesTs", "masks", "--channel", 1, "--overwrite") == 1
    assert "failed: liver_2: " in (errors := capsys.readouterr().err)
    assert "liver_2_0001.nii.gz does not exist" in errors


def test_numbers_of_cases_are_no_channels(tmp_path):
    sources = [tmp_path / f"case_{number:04d}.nii.gz" for number in (1, 2)]
    assert [scan.case for scan in plan_masks(sources, tmp_path / "out", channel=0)] == ["case_0001", "case_0002"]
    (one,) = plan_masks([tmp_path / "case_0000.nii.gz"], tmp_path / "out")
    assert one.mask == tmp_path / "out" / "case_0000.nii.gz"


def test_pictures_numbered_from_0000_are_cases(predict, tmp_path, capsys):
    (tmp_path / "scans").mkdir()
    for number in range(3):
        Image.fromarray(np.full((12, 10), 40 * number, np.uint8)).save(tmp_path / "scans" / f"frame_{number:04d}.png")
    assert predict("scans", "masks") == 0
    assert files_of(tmp_path / "masks") == [f"frame_{number:04d}.png" for number in range(3)]
    sources = list_scans(tmp_path / "scans")
    assert [scan.case for scan in plan_masks(sources, tmp_path / "one", channel=1)] == ["frame"]


def test_files_left_out_for_channels_nobody_named_are_told(predict, tmp_path, capsys):
    for number in range(2):
        write_scan(tmp_path / "scans" / f"visit_{number:04d}.nii.gz", scan_array(number))
    assert predict("scans", "masks") == 1
    assert "1 of 2 files are other channels" in (errors := capsys.readouterr().err)
    assert "give --channel 0 if that is right" in errors
    assert predict("scans", "other", "--channel", 0) == 0


def test_flips_and_largest_parts(predict, model, tmp_path):
    scan = write_scan(tmp_path / "scan.nii.gz")
    plain = expected_mask(model, scan)
    for options in (("flips",), ("keep_largest",), ("flips", "keep_largest")):
        assert predict("scan.nii.gz", "mask.nii", *(f"--{option}" for option in options), "--overwrite") == 0
        mask = io.read_labels(tmp_path / "mask.nii").array
        np.testing.assert_array_equal(mask, expected_mask(model, scan, **dict.fromkeys(options, True)))
        assert (mask != plain).any() == ("flips" in options or (largest_parts(plain) != plain).any())


def test_flips_make_the_mask_of_a_flipped_slice_the_flipped_mask(model):
    image = io.Volume(scan_array()[:1] / 100, normalized=True)
    for axis in (1, 2):
        flipped = io.Volume(np.flip(image.array, axis), normalized=True)
        mask, other = (predict_volume(model, volume, flips=True) for volume in (image, flipped))
        assert (np.flip(other, axis) == mask).mean() > 0.97  # the resizing of labels rounds to one side


def test_the_largest_part_of_each_class_is_kept():
    mask = np.zeros((3, 6, 8), np.uint8)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[2, 2, 2] = 1  # touch at corners
    mask[0, 5, 6:8] = 1
    mask[0, 3, 0:3] = 4
    mask[2, 5, 5:8] = 4  # as large, but later
    kept = largest_parts(mask)
    expected = mask.copy()
    expected[0, 5, 6:8] = expected[2, 5, 5:8] = 0
    np.testing.assert_array_equal(kept, expected)
    assert not largest_parts(np.zeros((1, 2, 2), np.uint8)).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_precision(predict, model, tmp_path, dtype):
    scan = write_scan(tmp_path / "scan.nii.gz")
    assert predict("scan.nii.gz", "mask.nii", "--dtype", dtype, "--device", "cpu") == 0
    agreement = (io.read_labels(tmp_path / "mask.nii").array == expected_mask(model, scan)).mean()
    assert agreement == 1 if dtype == "float32" else agreement > 0.9


def test_scans_of_odd_shapes(predict, tmp_path):
    for shape in ((1, 12, 10), (4, 1, 10), (4, 12, 1), (1, 1, 1)):
        write_scan(tmp_path / "scans" / f"{'x'.join(map(str, shape))}.nii.gz", scan_array(shape=shape))
    write_scan(tmp_path / "scans" / "constant.nii.gz", np.zeros(SHAPE, np.float32))
    turned = AFFINE.copy()
    turned[:2, :2] = [[-1.2, -0.9], [-0.9, 1.2]]
    write_scan(tmp_path / "scans" / "oblique.nii.gz", affine=turned)
    assert predict("scans", "masks", "--overlay", "--flips", "--keep_largest") == 0
    for path in (tmp_path / "scans").iterdir():
        mask, scan = io.read_labels(tmp_path / "masks" / path.name), io.read_volume(path)
        assert mask.array.shape == scan.array.shape
        np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-6)


def test_a_constant_scan_without_window_is_told(model):
    sam = load_sam("tiny-sam", class_names=("a",), image_size=64)
    sam.samed_config = SamedConfig(base="tiny-sam", class_names=("a",), image_size=64, window=None)
    with pytest.raises(InputError, match="is constant"):
        predict_volume(sam, io.Volume(np.zeros(SHAPE, np.float32)))
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        predict_volume(model, io.Volume(np.zeros(SHAPE, np.float32)), batch_size=0)


def _bad_scans(folder):
    folder.mkdir(exist_ok=True)
    (folder / "text.nii.gz").write_text("no scan")
    nan = scan_array()
    nan[0, 0, 0] = np.nan
    write_scan(folder / "nan.nii.gz", nan)
    colour = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    write_scan(folder / "colour.nii.gz", colour)
    header = nibabel.Nifti1Image(scan_array().T, AFFINE).header
    header.set_sform(np.diag([0, 1, 1, 1]), code=1)
    header.set_qform(None, code=0)
    nibabel.Nifti1Image(scan_array().T, None, header).to_filename(folder / "singular.nii.gz")
    write_scan(folder / "four.nii.gz", np.stack([scan_array()] * 2))
    return {
        "text": "cannot be read",
        "nan": "NaN or infinity in 1 of",
        "colour": "one number a voxel",
        "singular": "invertible affine",
        "four": "found 4-D with 2 channels",
    }


def test_bad_scans_fail_alone(predict, tmp_path, capsys):
    for case in ("good1", "good2"):
        write_scan(tmp_path / "scans" / f"{case}.nii.gz")
    bad = _bad_scans(tmp_path / "scans")
    assert predict("scans", "masks") == 1
    assert files_of(tmp_path / "masks") == ["good1.nii.gz", "good2.nii.gz"]
    printed = capsys.readouterr()
    assert "2 masks written" in printed.out
    for case, reason in bad.items():
        (line,) = [line for line in printed.err.splitlines() if line.startswith(f"failed: {case}: ")]
        assert reason in line
    assert "error: 5 of 7 scans failed" in printed.err
    for case, reason in bad.items():
        assert predict(f"scans/{case}.nii.gz", "single") == 2
        *loading, line = capsys.readouterr().err.splitlines()
        assert all("Loading weights" in other or not other for other in loading), loading
        assert line.startswith("error: ")
        assert reason in line
    assert not (tmp_path / "single").exists()


def test_wrong_places_and_options(predict, tmp_path, capsys):
    scan = write_scan(tmp_path / "scans" / "a.nii.gz")
    write_scan(tmp_path / "twice" / "a.nii")
    write_scan(tmp_path / "twice" / "a.nii.gz")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("no folder")
    (tmp_path / "link.nii.gz").symlink_to(scan)
    write_scan(tmp_path / "pair" / "c.nii.gz")
    write_itk(tmp_path / "pair" / "b.nrrd")
    before = scan.read_bytes()
    for source, output, options, message in (
        ("nowhere", "out", (), "found nothing"),
        ("empty", "out", (), "expected scans ending in"),
        ("file.txt", "out", (), "convert it to one of these"),
        ("twice", "out", (), "one scan named a, found a.nii and a.nii.gz"),
        ("scans/a.nii.gz", "scans/a.nii.gz", (), "would replace the scan"),
        ("scans/a.nii.gz", "scans", (), "would replace the scan"),
        ("scans/a.nii.gz", "link.nii.gz", (), "would replace the scan"),
        ("scans", "scans", ("--overwrite",), "would replace the scan"),
        ("pair", "pair", (), "would replace the scan"),
        ("pair", "out.nii.gz", (), "a folder for the masks of 2 scans"),
        ("scans", "file.txt", (), "expected a folder or a mask name"),
        ("scans", "mask.jpg", (), "expected a folder or a mask name"),
        ("scans", "mask.dcm", (), "expected a folder or a mask name"),
        ("scans", "mask.png", (), "whose grid a .png cannot hold"),
        ("scans", "out", ("--dicom_seg",), "expected DICOM series for DICOM SEG"),
        ("scans", "out", ("--batch_size", 0), "batch_size must be at least 1"),
        ("scans", "out", ("--device", "abacus"), "expected cpu, cuda, cuda:1 or mps"),
        ("scans", "out", ("--device", "cuda:99"), "device cuda:99 is not there"),
        ("scans", "out", ("--dtype", "float8"), "invalid choice"),
    ):
        assert predict(source, output, *options) == 2, (source, output)
        assert message in capsys.readouterr().err
    assert scan.read_bytes() == before
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="dtype must be one of float32"):
        PredictionOptions(dtype="int8")


@pytest.mark.parametrize("name", ["scan.txt", "scan", "scan.dcm", "scan.nii.zip"])
def test_no_mask_is_planned_for_a_file_of_unknown_format(tmp_path, name):
    with pytest.raises(InputError, match=rf"expected \.nii\.gz, .* or a folder, found .*{name}; convert it"):
        plan_masks([tmp_path / "a.nii.gz", tmp_path / name], tmp_path / "masks")
    with pytest.raises(InputError, match=rf"expected \.nii\.gz, .* or a folder, found .*{name}; convert it"):
        plan_masks([tmp_path / name], tmp_path / "mask.nii.gz")


@pytest.mark.parametrize("suffix", io.SUFFIXES)
def test_every_format_has_a_mask_that_can_be_written(tmp_path, suffix):
    (scan,) = plan_masks([tmp_path / f"a{suffix.upper()}"], tmp_path / "masks")
    assert scan.mask.name.removeprefix("a") in io.MASK_SUFFIXES
    expected = {".nii": ".nii.gz", ".npz": ".nii.gz", ".npy.h5": ".nii.gz", ".tif": ".png", ".jpg": ".png"}
    expected |= {suffix: suffix for suffix in io.MASK_SUFFIXES if suffix != ".nii"}
    assert scan.mask.name == f"a{expected.get(suffix, scan.mask.name[1:])}"


def test_overlays_may_not_replace_scans(tmp_path):
    (tmp_path / "overlays").mkdir()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "overlays" / "a.png")
    with pytest.raises(InputError, match=r"the overlay of .*a\.png would replace the scan"):
        plan_masks(list_scans(tmp_path / "overlays"), tmp_path)


def test_masks_may_not_lie_among_several_scans(predict, tmp_path, capsys):
    for name in ("a", "b"):
        np.savez((tmp_path / f"{name}.npz"), image=scan_array() / 100)
    sources = [tmp_path / "a.npz", tmp_path / "b.npz"]
    with pytest.raises(InputError, match="an output folder outside of that of the scans"):
        plan_masks(sources, tmp_path)
    assert plan_masks(sources[:1], tmp_path)[0].mask == tmp_path / "a.nii.gz"


def test_predict_files_says_what_became_of_each_scan(model, tmp_path):
    write_scan(tmp_path / "scans" / "a.nii.gz")
    write_scan(tmp_path / "scans" / "b.nii.gz")
    (tmp_path / "scans" / "c.nii.gz").write_text("no scan")
    scans = plan_masks(list_scans(tmp_path / "scans"), tmp_path / "masks")
    scans[0].mask.parent.mkdir()
    scans[0].mask.write_bytes(b"done")
    outcome = predict_files(model, scans, options=PredictionOptions(), accelerator=Accelerator(cpu=True))
    assert outcome.written == ("b",)
    assert outcome.skipped == ("a",)
    assert outcome.failed.keys() == {"c"}


def test_a_scan_too_large_for_the_memory_fails_alone(model, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("samed_peft.prediction.files.predict_volume", fail)
    write_scan(tmp_path / "scans" / "a.nii.gz")
    scans = plan_masks(list_scans(tmp_path / "scans"), tmp_path / "masks")
    outcome = predict_files(model, scans, options=PredictionOptions(), accelerator=Accelerator(cpu=True))
    assert "choose a smaller batch_size than 8" in outcome.failed["a"]


def planned(tmp_path, count):
    for number in range(count):
        write_scan(tmp_path / "scans" / f"{number}.nii.gz", scan_array(number))
    return plan_masks(list_scans(tmp_path / "scans"), tmp_path / "masks")


def test_a_mask_that_cannot_be_written_fails_its_own_scan(model, tmp_path):
    scans = planned(tmp_path, 4)
    scans[1].mask.mkdir(parents=True)  # in the way
    outcome = predict_files(model, scans, options=PredictionOptions(overwrite=True), accelerator=Accelerator(cpu=True))
    assert outcome.failed.keys() == {"1"}
    assert outcome.written == ("0", "2", "3")
    for scan in (scans[0], scans[2], scans[3]):
        np.testing.assert_array_equal(io.read_labels(scan.mask).array, expected_mask(model, scan.source))


def test_one_scan_is_read_ahead_and_no_more(model, tmp_path, monkeypatch):
    read, ahead = [], []

    def reading(path, **options):
        read.append(path)
        return io.read_volume(path, **options)

    def predicting(model, image, **options):
        mask = predict_volume(model, image, **options)
        ahead.append(len(read) - read.index(image.path) - 1)
        return mask

    monkeypatch.setattr("samed_peft.prediction.files.read_volume", reading)
    monkeypatch.setattr("samed_peft.prediction.files.predict_volume", predicting)
    scans = planned(tmp_path, 5)
    predict_files(model, scans, options=PredictionOptions(), accelerator=Accelerator(cpu=True))
    assert read == [scan.source for scan in scans]
    assert max(ahead) <= 1


def test_a_stop_leaves_whole_masks(model, tmp_path, monkeypatch):
    def predicting(model, image, **options):
        if image.path.name.startswith("2"):
            raise KeyboardInterrupt
        return predict_volume(model, image, **options)

    monkeypatch.setattr("samed_peft.prediction.files.predict_volume", predicting)
    scans = planned(tmp_path, 5)
    with pytest.raises(KeyboardInterrupt):
        predict_files(model, scans, options=PredictionOptions(), accelerator=Accelerator(cpu=True))
    assert files_of(tmp_path / "masks") == ["0.nii.gz", "1.nii.gz"]
    np.testing.assert_array_equal(io.read_labels(scans[1].mask).array, expected_mask(model, scans[1].source))


@pytest.mark.slow
def test_two_processes_share_a_folder(adapter, model, tmp_path):
    for case in "abc":
        write_scan(tmp_path / "scans" / f"{case}.nii.gz", scan_array(ord(case)))
    (tmp_path / "scans" / "d.nii.gz").write_text("no scan")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["-m", "samed_peft", "predict", "--adapter", adapter, "--input", tmp_path / "scans", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ended = subprocess.run(
        [*launch, *command, "--output", tmp_path / "masks"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
    )
    assert ended.returncode == 1, ended.stderr
    assert ended.stdout.count("3 masks written") == 1
    assert ended.stderr.count("failed: d: ") == 1
    for case in "abc":
        mask = io.read_labels(tmp_path / "masks" / f"{case}.nii.gz").array
        np.testing.assert_array_equal(mask, expected_mask(model, tmp_path / "scans" / f"{case}.nii.gz"))


@pytest.mark.slow
def test_a_machine_without_compiler_is_told(adapter, tmp_path):
    write_scan(tmp_path / "scan.nii.gz")
    command = ["predict", "--adapter", adapter, "--input", tmp_path / "scan.nii.gz", "--output", tmp_path / "masks"]
    ended = subprocess.run(
        [sys.executable, "-m", "samed_peft", *command, "--compile", "--device", "cpu"],
        cwd=ROOT,
        env=os.environ | {"CXX": "no-such-compiler"},
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
    )
    assert ended.returncode == 2, ended.stderr
    error = ended.stderr.splitlines()[-1]
    assert error.startswith("error: torch.compile cannot compile for cpu here: ")
    assert "no-such-compiler" in error
    assert error.endswith("or leave compile out, --compile on the command line")
    assert not list((tmp_path / "masks").glob("*"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler; g++ is not installed")
def test_a_compiled_model_gives_the_same_masks(model, tmp_path):
    planned(tmp_path, 2)
    write_scan(tmp_path / "scans" / "2.nii.gz", scan_array(2, shape=(5, 12, 10)))
    scans = plan_masks(list_scans(tmp_path / "scans"), tmp_path / "masks")
    outcome = predict_files(
        model, scans, options=PredictionOptions(batch_size=3, compile=True), accelerator=Accelerator(cpu=True)
    )
    assert outcome.written == ("0", "1", "2")
    for scan in scans:
        mask = io.read_labels(scan.mask).array
        assert (mask != expected_mask(model, scan.source)).mean() < 1e-3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler; g++ is not installed")
def test_a_compiled_model_keeps_its_mode_and_its_size_of_batch(model):
    model.eval()
    compiled = CompiledSegmenter(model, batch_size=2)
    assert not compiled.training
    with pytest.raises(InputError, match="compiled for batches of 2, found one of 3"):
        compiled(pixel_values=torch.zeros(3, 3, 64, 64))


def test_json_of_a_png_is_plain(predict, tmp_path):
    Image.fromarray(scan_array()[0].astype(np.uint8)).save(tmp_path / "scan.png")
    assert predict("scan.png", "mask.png") == 0
    with Image.open(tmp_path / "mask.png") as mask:
        assert mask.mode == "L"
        assert json.loads(mask.info["labels"]) == {str(label): name for label, name in NAMES.items()}


def test_one_of_several_dicom_series(predict, model, tmp_path, capsys):
    write_dicom(tmp_path / "both")
    write_dicom(tmp_path / "both", series="1.2.3.5", first=10, positions=(-368.0, -365.0))
    assert predict("both", "masks") == 2
    assert "1.2.3.4 (5 files, CT); 1.2.3.5 (2 files, CT)" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="hardly fit"):
        assert predict("both", "masks", "--series", "1.2.3.5") == 0
    assert files_of(tmp_path / "masks") == ["both_1.2.3.5.nii.gz"]
    assert io.read_volume(tmp_path / "masks" / "both_1.2.3.5.nii.gz").array.shape == (2, 4, 3)
    assert predict("both/0.dcm", "mask.nii.gz") == 2
    assert "one of 5 slices" in capsys.readouterr().err


def test_dicom_seg(predict, model, tmp_path, capsys):
    pytest.importorskip("highdicom")
    for name in ("one", "two"):
        (tmp_path / "studies" / name).mkdir(parents=True)
        write_dicom(tmp_path / "studies" / name)
        for path in (tmp_path / "studies" / name).iterdir():
            header = pydicom.dcmread(path)
            header.FrameOfReferenceUID = "1.2.3.9"
            header.save_as(path)
    assert predict("studies", "masks", "--dicom_seg") == 0
    assert files_of(tmp_path / "masks") == ["one.dcm", "two.dcm"]
    seg = pydicom.dcmread(tmp_path / "masks" / "one.dcm")
    assert seg.Modality == "SEG"
    assert [item.SegmentLabel for item in seg.SegmentSequence] == list(NAMES.values())
    mask = expected_mask(model, tmp_path / "studies" / "one")
    assert np.count_nonzero(seg.pixel_array) == np.count_nonzero(mask) > 0
    assert predict("studies/one", "mask.dcm", "--dicom_seg") == 0
    assert predict("studies/one", "mask.nii.gz", "--dicom_seg") == 2
    assert predict("studies/one", "studies/one", "--dicom_seg") == 2
    assert "outside of that folder" in capsys.readouterr().err
    assert predict("studies", "studies/masks", "--dicom_seg") == 2
    assert "an output folder outside of that of the scans" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(tmp_path / "studies" / "one")
    assert plan_masks([tmp_path / "link"], tmp_path / "masks")[0].case == "link"
    assert len(list((tmp_path / "studies" / "one").iterdir())) == 5


def test_scans_of_another_kind_are_told_with_figures(predict, tmp_path):
    write_scan(tmp_path / "unit.nii.gz", scan_array() / 100)  # the window is 0 to 100
    write_scan(tmp_path / "bright.nii.gz", scan_array() + 100)
    write_scan(tmp_path / "dark.nii.gz", scan_array() - 2000)
    for name, message in (
        ("unit", r"unit\.nii\.gz holds 0\.\d+ to 0\.9\d+ .* window, 0 to 100: 0 % lie below, 0 % above, .* 1 % of it"),
        ("bright", r"bright\.nii\.gz holds 10\d.* window, 0 to 100: 0 % lie below, 100 % above"),
        ("dark", r"dark\.nii\.gz holds -19.* window, 0 to 100: 100 % lie below, 0 % above"),
    ):
        with pytest.warns(UserWarning, match=message):
            assert predict(f"{name}.nii.gz", f"{name}-mask.nii.gz") == 0


CT = (-125.0, 275.0)


@pytest.mark.parametrize("kind", ["MR", "8 bit", "scaled", "shifted CT"])
def test_scans_of_other_kinds_are_told_in_a_window_of_ct(kind):
    noise = np.random.default_rng(0)
    ct = np.concatenate([noise.normal(mean, 15, 4000) for mean in (-1000, -100, 50, 300)]).reshape(4, 40, 100)
    array = {
        "MR": np.clip(noise.gamma(2, 130, ct.shape) - 47, -47, 833),
        "8 bit": noise.integers(0, 256, ct.shape),
        "scaled": noise.uniform(0, 1, ct.shape),
        "shifted CT": ct + 1100,
    }[kind]
    with pytest.warns(UserWarning, match=r"without the air and fat of a CT; is it of the kind, and in the units"):
        warn_of_window(io.Volume(array.astype(np.float32)), CT)
    warn_of_window(io.Volume(ct.astype(np.float32)), CT)
    warn_of_window(io.Volume(ct[1:3].astype(np.float32)), CT)  # fat and soft tissue
    warn_of_window(io.Volume(ct[2:3].astype(np.float32) - 30), CT)  # the inside of an organ


def test_crops_around_organs_of_a_ct_are_not_told(real_scans):
    for path in sorted((real_scans / "btcv_like" / "Training" / "img").iterdir()):
        scan = io.read_volume(path).array
        labels = io.read_labels(path.parent.parent / "label" / path.name.replace("img", "label")).array
        for box in filter(None, ndimage.find_objects(labels)):
            warn_of_window(io.Volume(scan[box]), CT)


def test_every_mr_is_told_in_a_window_of_ct(real_scans):
    for path in sorted((real_scans / "Task04_Hippocampus" / "imagesTr").glob("*.nii.gz"))[::8]:
        with pytest.warns(UserWarning, match="without the air and fat of a CT"):
            warn_of_window(io.read_volume(path), CT)


def test_scans_that_fit_the_window_are_not_told(real_scans):
    for path in sorted((real_scans / "btcv_like" / "Training" / "img").iterdir()):
        warn_of_window(io.read_volume(path), (-125.0, 275.0))
    mr = io.read_volume(real_scans / "Task04_Hippocampus" / "imagesTr" / "hippocampus_003.nii.gz")
    warn_of_window(mr, None)
    with pytest.warns(UserWarning, match=r"hippocampus_003.*8\d % above"):
        warn_of_window(mr, (-125.0, 275.0))
    warn_of_window(io.Volume(mr.array / mr.array.max(), normalized=True), (-125.0, 275.0))


@pytest.mark.slow
def test_prediction_does_not_load_the_datasets_library(adapter, tmp_path):
    write_scan(tmp_path / "scan.nii.gz")
    options = ["--adapter", adapter, "--input", tmp_path / "scan.nii.gz", "--output", tmp_path / "mask.nii.gz"]
    code = "import sys; from samed_peft.cli import main; main(sys.argv[1:]); print('datasets' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code, "predict", "--overlay", *options],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        encoding="utf-8",
        check=True,
        timeout=120,
    )
    assert ended.stdout.splitlines()[-1] == "False", ended.stdout


@pytest.mark.parametrize("error", [ValueError("odd\nmore"), KeyError("x"), RuntimeError(""), MemoryError()])
def test_any_error_of_a_scan_is_its_own(model, tmp_path, monkeypatch, error):
    def reading(path, **options):
        if path.name.startswith("1"):
            raise error
        return io.read_volume(path, **options)

    monkeypatch.setattr("samed_peft.prediction.files.read_volume", reading)
    scans = planned(tmp_path, 3)
    outcome = predict_files(model, scans, options=PredictionOptions(), accelerator=Accelerator(cpu=True))
    assert outcome.written == ("0", "2")
    assert outcome.failed.keys() == {"1"}
    assert str(scans[1].source) in outcome.failed["1"]
    assert "\n" not in outcome.failed["1"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_scan_at_hand_finish(adapter, tmp_path, number):
    for case in range(60):
        write_scan(tmp_path / "scans" / f"{case:02d}.nii.gz", scan_array(case))
    options = ("--adapter", adapter, "--input", tmp_path / "scans", "--output", tmp_path / "masks", "--device", "cpu")
    command = [sys.executable, "-m", "samed_peft", "predict", *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    ) as program:
        while program.poll() is None and not list((tmp_path / "masks").glob("0*.nii.gz")):
            time.sleep(0.01)
        program.send_signal(number)
        _, errors = program.communicate(timeout=60)
    done = files_of(tmp_path / "masks")
    assert program.returncode == 128 + number, errors
    assert f"{len(done)} mask" in errors
    assert f"{60 - len(done)} scan" in errors
    assert "Traceback" not in errors
    assert all(io.read_labels(tmp_path / "masks" / name).array.shape == SHAPE for name in done)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(adapter, tmp_path):
    for case in range(60):
        write_scan(tmp_path / "scans" / f"{case:02d}.nii.gz", scan_array(case))
    options = ("--adapter", adapter, "--input", tmp_path / "scans", "--output", tmp_path / "masks", "--device", "cpu")
    command = [sys.executable, "-m", "samed_peft", "predict", *map(str, options)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    programs = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | launch | {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for rank in "01"
    ]
    while programs[1].poll() is None and not (tmp_path / "masks" / "01.nii.gz").exists():
        time.sleep(0.01)
    programs[1].send_signal(signal.SIGINT)
    errors = [program.communicate(timeout=60)[1] for program in programs]
    assert [program.returncode for program in programs] == [130, 130], errors
    done = [path.name for path in (tmp_path / "masks").iterdir()]
    assert not [name for name in done if name.startswith(".")]
    assert 2 <= len(done) < 30
    assert f"error: stopped by a signal: {len(done)} masks written" in errors[0]
    assert "error" not in errors[1]
