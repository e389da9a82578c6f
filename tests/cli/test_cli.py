"""The `samed` command: `evaluate`, help and exit codes; `convert` and `export` are tested with their functions."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samed_peft.cli import export, main
from samed_peft.conversion import EXPORTS
from samed_peft.io import Volume, write_mask, write_volume

ROOT = Path(__file__).parents[2]
AFFINE = np.diag([1.0, 1.0, 5.0, 1.0])


def _labels(*, up=0, shape=(6, 8, 8)):
    labels = np.zeros(shape, np.uint8)
    labels[1 + up : 5 + up, 1:5, 1:5] = 1
    labels[0:2, 6:8, 6:8] = 2
    return labels


def _mask(path, labels, affine=AFFINE):
    write_mask(labels, Volume(labels, affine), path)


@pytest.fixture
def folders(tmp_path):
    """Two cases that can be scored: `a` with its liver one slice up, in two formats, `b` right."""
    for case, up, suffix in (("a", 1, ".nrrd"), ("b", 0, ".nii.gz")):
        _mask(tmp_path / "preds" / f"{case}{suffix}", _labels(up=up))
        _mask(tmp_path / "refs" / f"{case}.nii.gz", _labels())
    return tmp_path


def _evaluate(folders, *options, predictions="preds", references="refs", output="report"):
    """Exit code of `samed evaluate`, and the report if there is one."""
    places = {"predictions": predictions, "references": references, "output": output}
    arguments = [text for name, place in places.items() for text in (f"--{name}", str(folders / place))]
    try:
        main(["evaluate", *arguments, *map(str, options)])
        code = 0
    except SystemExit as end:
        code = end.code
    path = folders / output / "report.json"
    return code, json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def test_a_folder_is_scored_and_reported(folders, capsys):
    code, report = _evaluate(folders, "--class_names", "liver, spleen", "--tolerance_mm", 5)
    assert code == 0
    assert report["standard"]["classes"]["liver"]["dice"] == 0.875
    assert report["standard"]["classes"]["liver"]["surface_dice"] == 1.0
    assert report["standard"]["classes"]["spleen"]["dice"] == 1.0
    assert [row["case"] for row in report["cases"]] == ["a", "b"]
    assert report["settings"]["surface_dice_tolerance_mm"] == 5.0
    written = {path.name for path in (folders / "report").iterdir()}
    assert written == {"report.json", "report.csv", "report.html", "report.md"}
    printed = capsys.readouterr()
    assert "0.8750" in printed.out
    assert "report.html" in printed.out
    assert "failed" not in printed.err


def test_classes_are_named_by_dataset_json_or_numbered(folders):
    (folders / "refs" / "dataset.json").write_text('{"labels": {"background": 0, "liver": 1, "spleen": 2, "aorta": 3}}')
    _, report = _evaluate(folders, "--dataset_json", folders / "refs" / "dataset.json")
    assert list(report["standard"]["classes"]) == ["liver", "spleen", "aorta"]
    assert report["standard"]["classes"]["aorta"]["n_absent"] == 2
    code, report = _evaluate(folders)
    assert code == 0
    assert list(report["standard"]["classes"]) == ["class 1", "class 2"]


def test_images_make_pictures(folders):
    image = np.random.default_rng(0).normal(size=(6, 8, 8)).astype(np.float32)
    write_volume(Volume(image, AFFINE), folders / "images" / "a_0000.nii.gz")  # as nnU-Net names it
    code, report = _evaluate(folders, "--images", folders / "images")
    assert code == 0
    assert report["settings"]["cases_without_image"] == ["b"]
    assert [path.name for path in (folders / "report" / "pictures").iterdir()] == ["a.png"]
    assert (folders / "report" / "report.html").read_text().count("data:image/png;base64,") == 1
    # Scores do not depend on the image: the case stays, the picture's failure is told.
    write_volume(Volume(image[:5], AFFINE), folders / "images" / "b.nii.gz")
    code, report = _evaluate(folders, "--images", folders / "images")
    assert code == 1
    assert len(report["cases"]) == 2
    reason = report["settings"]["failed_cases"]["b"]
    assert re.match(r"scored, but has no picture: [^/]*\(image .*b\.nii\.gz\)$", reason)
    (folders / "images" / "b.nii.gz").write_bytes(b"no gzip")
    _, report = _evaluate(folders, "--images", folders / "images")
    assert report["settings"]["failed_cases"]["b"].count("b.nii.gz") == 1


def test_bad_cases_are_left_out_and_told(folders, capsys):
    moved = AFFINE.copy()
    moved[0, 3] = 3.0
    unnamed = _labels()
    unnamed[0, 0, 0] = 7
    bad = {
        "damaged": "cannot be read",
        "doubled": "found doubled.nii.gz, doubled.nrrd",
        "lonely": "expected one file of this name",
        "moved": "3 mm apart",
        "short": r"(5, 8, 8) and (6, 8, 8)",
        "unnamed": "labels of the prediction hold 7, but only 0..2",
        "unpredicted": "found none",
    }
    for case in bad:
        if case != "lonely":
            _mask(folders / "refs" / f"{case}.nii.gz", _labels())
        if case != "unpredicted":
            labels = {"short": _labels(shape=(5, 8, 8)), "unnamed": unnamed}.get(case, _labels())
            _mask(folders / "preds" / f"{case}.nii.gz", labels, moved if case == "moved" else AFFINE)
    _mask(folders / "preds" / "doubled.nrrd", _labels())
    (folders / "preds" / "damaged.nii.gz").write_bytes(b"no gzip")
    (folders / "preds" / "._a.nii.gz").write_bytes(b"left by a Mac")
    (folders / "preds" / "notes.txt").write_text("no mask")
    code, report = _evaluate(folders)
    assert code == 1
    assert [row["case"] for row in report["cases"]] == ["a", "b"]
    assert report["settings"]["failed_cases"].keys() == bad.keys()
    errors = capsys.readouterr().err
    page = (folders / "report" / "report.html").read_text(encoding="utf-8")
    for case, reason in bad.items():
        assert reason in report["settings"]["failed_cases"][case]
        assert f"failed: {case}: " in errors
        assert f"<li>{case}: " in page
    assert "error: 7 of 9 cases failed" in errors
    assert "failed: unnamed: labels of the prediction hold 7, but " in errors
    assert re.search(r"more classes \(prediction .*unnamed\.nii\.gz, reference .*unnamed\.nii\.gz\)", errors)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, file names are Unicode")
def test_probabilities_and_previews_beside_masks_are_no_masks(folders):
    for case in "ab":
        np.savez_compressed(folders / "preds" / f"{case}.npz", probabilities=np.zeros((2, 2, 2, 2), np.float16))
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(folders / "preds" / f"{case}.png")
        (folders / "preds" / f"{case}.pkl").write_bytes(b"")
    code, report = _evaluate(folders)
    assert code == 0
    assert [row["case"] for row in report["cases"]] == ["a", "b"]


def test_file_names_need_not_be_utf_8(folders):
    odd = os.fsdecode(b"caf\xe9.nii.gz")
    for name in ("preds", "refs"):
        (folders / name / "b.nii.gz").rename(folders / name / odd)
    (folders / "preds" / os.fsdecode(b"lonely\xe9.nii.gz")).write_bytes(b"no gzip")
    code, report = _evaluate(folders)
    assert code == 1
    assert [row["case"] for row in report["cases"]] == ["a", "caf?"]
    assert list(report["settings"]["failed_cases"]) == ["lonely?"]


def test_wrong_input_ends_with_code_2_and_no_report(folders, capsys):
    (folders / "empty").mkdir()
    (folders / "list.json").write_text("[]")
    (folders / "none.json").write_text("{}")
    (folders / "unfit").mkdir()
    (folders / "unfit" / "other.nii.gz").write_bytes(b"no gzip")
    for options, message in (
        ({"predictions": "nowhere"}, "expected a folder at"),
        ({"references": "empty"}, "expected files ending in .nii.gz"),
        ({"predictions": "unfit"}, "found other.nii.gz in "),
        ({"output": "preds/a.nrrd"}, "found a file; choose another name"),
        ({"output": "preds/a.nrrd/report"}, "a.nrrd is a file; choose another name"),
    ):
        assert _evaluate(folders, **options) == (2, None)
        assert message in capsys.readouterr().err
    for options, message in (
        (("--tolerance_mm", "-1"), "tolerance_mm must be"),
        (("--class_names", "liver,liver"), "class_names must be different names"),
        (("--images", folders / "unfit"), "images named as the references"),
        (("--dataset_json", folders / "nowhere.json"), "does not exist"),
        (("--dataset_json", folders / "refs"), "expected the dataset.json of the Decathlon or of nnU-Net, found"),
        (("--dataset_json", folders / "refs" / "a.nii.gz"), "expected the dataset.json of the Decathlon or of nnU-Net"),
        (("--dataset_json", folders / "list.json"), "found list; give the dataset.json of the Decathlon or of nnU-Net"),
        (("--dataset_json", folders / "none.json"), "found None; give the dataset.json of the Decathlon or of nnU-Net"),
        (("--class_names", "a,b", "--dataset_json", "x"), "not allowed with"),
    ):
        assert _evaluate(folders, *options) == (2, None)
        assert message in capsys.readouterr().err


def test_names_of_raw_btcv_are_to_be_made_equal(folders, capsys):
    for folder, name in (("preds", "img"), ("refs", "label")):
        for path in (folders / folder).iterdir():
            path.rename(path.with_name(f"{name}000{'ab'.index(path.name[0])}{path.name[1:]}"))
    assert _evaluate(folders) == (2, None)
    error = capsys.readouterr().err
    assert "found img0000.nrrd in" in error
    assert "label0000.nii.gz in" in error
    assert "rename one folder's files" in error
    assert "failed" not in error


def test_background_alone_cannot_be_scored(folders, capsys):
    for path in (folders / "refs").iterdir():
        _mask(path, np.zeros((6, 8, 8), np.uint8))
    assert _evaluate(folders) == (2, None)
    assert "labels above 0, found none" in capsys.readouterr().err


def test_greys_of_reference_pictures_are_no_classes(tmp_path, capsys):
    for kind in ("preds", "refs"):
        (tmp_path / kind).mkdir()
        Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8)).save(tmp_path / kind / "a.png")
    assert _evaluate(tmp_path) == (2, None)
    assert "refs hold 1, 2, 255; greys in between" in capsys.readouterr().err
    assert _evaluate(tmp_path, "--class_names", "liver,spleen") == (2, None)
    assert "hold 255, but only 0..2 are named; map them" in capsys.readouterr().err


def test_a_report_is_replaced_but_nothing_else(folders, capsys):
    _evaluate(folders, "--class_names", "liver,spleen")
    (folders / "report" / "pictures").mkdir()
    (folders / "report" / "pictures" / "old.png").write_bytes(b"of an earlier report")
    code, report = _evaluate(folders)
    assert code == 0
    assert "class 1" in report["standard"]["classes"]
    assert not (folders / "report" / "pictures").exists()
    # A training run writes its report beside its adapter.
    (folders / "report" / "adapter").mkdir()
    assert _evaluate(folders)[0] == 2
    assert "found other files adapter, which must not be lost" in capsys.readouterr().err
    assert _evaluate(folders, output="refs")[0] == 2
    assert (folders / "refs" / "a.nii.gz").is_file()


def _run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    ).stdout


@pytest.mark.parametrize("command", [(), ("plan",), ("predict",), ("evaluate",), ("convert",), ("export",)])
def test_help_names_the_exit_codes(command):
    text = _run("-m", "samed_peft", *command, "--help")
    assert text.startswith(" ".join(("usage: samed", *command)))
    assert "exit codes: 0 done," in text


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from samed_peft.cli import main\n"
        "try: main(['predict', '--help'])\n"
        "except SystemExit: pass\n"
        "print(*sys.modules)"
    )
    loaded = set(_run("-c", code).split())
    assert not {"numpy", "torch", "scipy", "nibabel", "transformers", "samed_peft.evaluation"} & loaded


def test_each_export_has_its_line_of_help():
    assert list(export._FORMATS) == list(EXPORTS)
