"""recipes/finetune.py on scans of several channels, and what is made of its adapter afterwards."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import edit_adapter, recipes_in_process
from scan_files import two_modalities

from samed_peft.adapters.info import adapter_info, info_text
from samed_peft.cli import main
from samed_peft.io import load_tensors, read_labels, save_tensors

RECIPE = Path(__file__).parents[2] / "recipes" / "finetune.py"
QUICK = [
    "--base",
    "tiny-sam",
    "--folds",
    "3",
    "--max_steps",
    "30",
    "--image_size",
    "64",
    "--num_workers",
    "0",
    "--validation_share",
    "0",
]


@pytest.fixture(scope="module", params=[True, False], ids=["4-D", "files"])
def trained(request, tmp_path_factory):
    """Data of two channels, and the folder of a run on both; the ball to be found shows in the second channel alone."""
    root = tmp_path_factory.mktemp("channels")
    data = two_modalities(root / "data", in_4d=request.param, cases=6)
    with recipes_in_process(root / "cache") as run:
        assert run(RECIPE, "--data_dir", data, "--output_dir", root / "out", *QUICK, "--batch_size", 8) == 0
    return data, root / "out"


def samed(*arguments):
    """Exit code of a command."""
    try:
        main([*map(str, arguments)])
    except SystemExit as end:
        return end.code
    return 0


def dice(one, other):
    return 2 * np.sum(one & other) / max(np.sum(one) + np.sum(other), 1)


def test_the_second_channel_is_learned_and_recorded(trained):
    _, out = trained
    config = json.loads((out / "adapter" / "samed_config.json").read_text())
    assert (config["channel"], config["channels"], config["channel_names"]) == (None, [0, 1], ["T1", "FLAIR"])
    assert (config["window"], config["neighbour_mm"]) == (None, None)
    report = json.loads((out / "report.json").read_text())
    assert report["standard"]["mean"]["dice"] > 0.7  # of a ball that the first channel does not show
    assert "channels 0 (T1), 1 (FLAIR), in this order" in (out / "adapter" / "README.md").read_text()
    assert "of each channel, 0 (T1), 1 (FLAIR)" in info_text(adapter_info(out / "adapter"))


def test_predict_takes_the_same_channels(trained, tmp_path, capsys):
    data, out = trained
    shared = ["predict", "--adapter", out / "adapter", "--device", "cpu"]
    assert samed(*shared, "--input", data / "imagesTr", "--output", tmp_path / "masks", "--overlay") == 0
    assert "left out" not in capsys.readouterr().out
    masks = sorted(path.name for path in (tmp_path / "masks").glob("*.nii.gz"))
    assert masks == [f"c{number}.nii.gz" for number in range(6)]
    found = [
        dice(read_labels(tmp_path / "masks" / name).array > 0, read_labels(data / "labelsTr" / name).array > 0)
        for name in masks
    ]
    assert np.mean(found) > 0.7
    held_out = next((out / "predictions").iterdir())
    again = read_labels(tmp_path / "masks" / held_out.name).array
    np.testing.assert_array_equal(again, read_labels(held_out).array)
    # Turned, the other ball is found.
    one = min((data / "imagesTr").iterdir())
    turned = ["--input", one, "--output", tmp_path / "turned.nii.gz", "--channel", 1, 0]
    if (data / "imagesTr" / "c0.nii.gz").exists():
        assert samed(*shared, *turned) == 0
        right = read_labels(data / "labelsTr" / masks[0]).array > 0
        assert dice(read_labels(tmp_path / "turned.nii.gz").array > 0, right) < found[0] - 0.2
    assert samed(*shared, "--input", one, "--output", tmp_path / "x.nii.gz", "--channel", 1) == 2
    assert re.search(
        r"expected 2 channels for .*, which sees 0 \(T1\), 1 \(FLAIR\), found 1: 1", capsys.readouterr().err
    )


def test_adapters_of_other_channels_are_not_averaged(trained, tmp_path, capsys):
    data, out = trained
    shutil.copytree(out / "adapter", tmp_path / "other")
    edit_adapter(tmp_path / "other", channels=None, channel_names=None, channel=1)
    shared = ["predict", "--input", data / "imagesTr", "--output", tmp_path / "masks"]
    weights = tmp_path / "other" / "adapter_model.safetensors"
    save_tensors({name: 2 * tensor for name, tensor in load_tensors(weights).items()}, weights)
    assert samed(*shared, "--adapter", out / "adapter", tmp_path / "other") == 2
    message = r"expected adapters that see the same channels, found 0 \(T1\), 1 \(FLAIR\) in .*, 1 in .*other"
    assert re.search(message, capsys.readouterr().err)


def test_a_scan_that_lacks_a_channel_fails_with_one_message(trained, tmp_path, capsys):
    data, out = trained
    scans = tmp_path / "scans"
    shutil.copytree(data / "imagesTr", scans)
    if (scans / "c0.nii.gz").exists():
        shutil.copy(data / "labelsTr" / "c1.nii.gz", scans / "c1.nii.gz")
        message = r"failed: c1: expected a 4-D scan with channels 0, 1, found a single channel in .*c1\.nii\.gz"
    else:
        (scans / "c1_0001.nii.gz").unlink()
        message = r"failed: c1: expected a file for each of 2 channels of a scan, found no .*c1_0001\.nii\.gz; add it"
    code = samed("predict", "--adapter", out / "adapter", "--input", scans, "--output", tmp_path / "m")
    error = capsys.readouterr().err
    assert code == 1
    assert re.search(message, error)
    assert error.count("failed: ") == 1


def test_the_run_goes_on_with_the_same_channels_alone(trained, capsys):
    data, out = trained
    with recipes_in_process(out.parent / "cache") as run:
        shared = ("--data_dir", data, "--output_dir", out, *QUICK, "--batch_size", 8, "--resume")
        assert run(RECIPE, *shared) == 0
        assert run(RECIPE, *shared, "--channel", "T1") == 2
        assert "other settings" in capsys.readouterr().err
        assert run(RECIPE, *shared, "--preset", "samed") == 2
        assert "found none chosen" in capsys.readouterr().err


def test_windows_are_an_option_and_exclude_what_else_fills_the_channels(tmp_path, call_recipe):
    data = two_modalities(tmp_path / "data", in_4d=False, names={"0": "CT"})
    shared = ("--data_dir", data, "--output_dir", tmp_path / "out", *QUICK, "--batch_size", 2, "--max_steps", 1)
    for options, message in (
        (("--windows", "0", "2", "-1", "4", "--window", "0", "1"), "argument --window: not allowed with"),
        (("--windows", "0", "2", "-1", "4", "--neighbour_mm", "2"), "neighbour_mm 2 and 2 windows each fill"),
        (("--windows", "lungs"), "expected names of windows"),
    ):
        code, error = call_recipe(RECIPE, *shared, *options)
        assert code == 2
        assert message in error
    assert call_recipe(RECIPE, *shared, "--windows", "0", "2", "-1", "4")[0] == 0
    adapter = tmp_path / "out" / "adapter"
    assert json.loads((adapter / "samed_config.json").read_text())["window"] == [[0, 2], [-1, 4]]
    assert "windows 0 to 2 and -1 to 4" in info_text(adapter_info(adapter))
    assert "intensities of 0 to 2 and -1 to 4" in (adapter / "README.md").read_text()
    masks = tmp_path / "masks"
    assert samed("predict", "--adapter", adapter, "--input", data / "imagesTr", "--output", masks) == 0
    assert len(list(masks.glob("*.nii.gz"))) == 4
