"""recipes/finetune.py as users run it, on folders of their own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import recipes_in_process, write_balls
from PIL import Image

from samed_peft.config import SamedConfig, TrainingConfig
from samed_peft.datasets.dataset_json import scheme_of_dataset
from samed_peft.evaluation.folders import evaluate_folders
from samed_peft.io import read_labels

RECIPE = Path(__file__).parents[2] / "recipes" / "finetune.py"
SMALL = [
    *("--base", "tiny-sam", "--image_size", "64", "--batch_size", "4", "--epochs", "2"),
    *("--warmup_steps", "2", "--learning_rate", "0.003", "--num_workers", "0"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run the recipe; returns (exit code, stdout, stderr)."""
    cache = tmp_path_factory.mktemp("cache")
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "2"}

    def run(*options):
        command = [sys.executable, str(RECIPE), *map(str, options)]
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False, timeout=200)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Four MR scans with a bright ball, in two orientations, two of one patient."""
    root = tmp_path_factory.mktemp("data") / "nnunet"
    write_balls(root)
    return root


@pytest.mark.slow
def test_from_scans_to_a_report(run, scans, tmp_path):
    options = ("--data_dir", scans, "--output_dir", tmp_path / "out", *SMALL)
    patients = ("--patient_pattern", "(p.)_.", "--folds", 3, "--validation_cases", "p2_a", "--validate_epochs", 1)
    code, stdout, stderr = run(*options, *patients, "--fold", 1, "--resume")
    assert code == 0, stderr
    assert f"warning: nothing to resume in {tmp_path / 'out'}: " in stderr
    assert "ball" in stdout
    config = json.loads((tmp_path / "out" / "adapter" / "samed_config.json").read_text())
    assert (config["class_names"], config["orientation"], config["window"]) == (["ball"], "LPS", None)
    assert config["channel"] is None
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    held_out = {case["case"] for case in report["cases"]}
    assert held_out in ({"p1_a", "p1_b"}, {"p3_a"})
    for case in held_out:
        mask = read_labels(tmp_path / "out" / "predictions" / f"{case}.nii.gz")
        np.testing.assert_allclose(mask.affine, nibabel.load(scans / "labelsTr" / f"{case}.nii.gz").affine)
    code, _, stderr = run(*options, *patients, "--fold", 1)
    assert (code, "pass --resume" in stderr) == (2, True)
    # The validation chose the adapter: its case must not become the one that is reported.
    swapped = ("--test_cases", "p2_a", "--validation_cases", *held_out, "--validate_epochs", 1)
    for changed in ((*patients, "--fold", 1, "--empty_share", 0.5), swapped):
        code, _, stderr = run(*options, *changed, "--resume")
        assert (code, "with other settings (data" in stderr) == (2, True), stderr


@pytest.mark.slow
def test_gaps_regions_and_a_label_to_ignore(run, scans, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(scans, data)
    labels = {"background": 0, "ball": [2, 5], "half": 5, "ignore": 7}
    content = {"channel_names": {"0": "T1"}, "labels": labels, "regions_class_order": [2, 5]}
    (data / "dataset.json").write_text(json.dumps(content))
    for path in (data / "labelsTr").iterdir():
        stored = nibabel.load(path)
        array = np.asarray(stored.dataobj) * np.uint8(2)
        array[:, 12:][array[:, 12:] == 2] = 5
        array[:, :2] = 7
        nibabel.save(nibabel.Nifti1Image(array, stored.affine), path)
    options = ("--data_dir", data, "--output_dir", out, *SMALL, "--preset", "samed")
    code, stdout, stderr = run(*options, "--test_cases", "p1_b", "p3_a")
    assert code == 0, stderr
    assert "region ball" in stdout
    config = json.loads((out / "adapter" / "samed_config.json").read_text())
    assert (config["class_names"], config["label_values"]) == (["ball only", "half"], [2, 5])
    assert config["regions"] == {"ball": [1, 2], "half": [2]}
    values = {int(value) for path in (out / "predictions").iterdir() for value in np.unique(read_labels(path).array)}
    assert values == {0, 2, 5}
    report = json.loads((out / "report.json").read_text())
    assert list(report["regions"]["standard"]["classes"]) == ["ball", "half"]
    # The same scores from the files, as references are stored.
    again = evaluate_folders(
        out / "predictions",
        held_out_labels(data, tmp_path / "references", report),
        class_names=scheme_of_dataset(data / "dataset.json"),
        on_failure=lambda case, reason: pytest.fail(f"{case}: {reason}"),
    ).to_dict()
    assert (again["cases"], again["regions"]["cases"]) == (report["cases"], report["regions"]["cases"])


def held_out_labels(data, folder, report):
    """The label maps of a report's cases in a folder of their own."""
    folder.mkdir()
    for case in report["cases"]:
        shutil.copy(data / "labelsTr" / f"{case['case']}.nii.gz", folder)
    return folder


@pytest.mark.slow
def test_from_colour_pictures_to_a_report(run, tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    for number in range(5):
        mask = np.zeros((30, 40), np.uint8)
        mask[5 + number : 20, 10:30] = 255
        picture = rng.integers(0, 100, (30, 40, 3)).astype(np.uint8)
        picture[mask > 0, 0] += 120
        Image.fromarray(picture).save(tmp_path / "data" / "images" / f"{number}.png")
        Image.fromarray(mask).save(tmp_path / "data" / "masks" / f"{number}.png")
    options = ("--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out", "--class_names", "polyp,tool")
    code, stdout, stderr = run(*options, *SMALL, "--test_cases", 3, 4)
    assert code == 0, stderr
    assert "polyp" in stdout
    assert "warning: no training slice has a labelled pixel of tool: " in stderr
    config = json.loads((tmp_path / "out" / "adapter" / "samed_config.json").read_text())
    assert (config["window"], config["orientation"]) == ([0.0, 255.0], None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fold", "9"), "expected fold 0 to 2 of 3 folds, found 9"),
        (("--fold", "all", "--test_cases", "p1_a"), "no cases to test on where every case is trained on, found p1_a"),
        (("--fold", "each", "--test_cases", "p1_a"), "no cases by name where each is tested on once, found p1_a"),
        (("--validation_share", "1"), r"validation_share must be in \[0, 1\), 0 for no validation; found 1.0"),
        (("--test_cases", "p9"), "hold out, found p9; there are p1_a, p1_b, p2_a, p3_a"),
        (("--class_names", "a,b"), r"expected 1 class name, as many as dataset.json has \(ball\), found 2: a, b"),
        (("--channel", "FLAIR"), r"channels 0 \(T1\)"),
        (("--test_cases", "p1_a", "--patient_pattern", "(p.)_."), "patients p1 are both"),
        (("--output_dir", RECIPE / "run", "--data_dir", "nowhere"), "finetune.py is a file; choose another name"),
        (("--output_dir", RECIPE, "--data_dir", "nowhere"), "found a file; choose another name"),
    ],
)
def test_bad_input_ends_with_one_message(call_recipe, scans, tmp_path, options, message):
    given = ("--data_dir", scans, "--output_dir", tmp_path / "out", *SMALL, "--folds", 3, *options)
    code, stderr = call_recipe(RECIPE, *given)
    assert code == 2, stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert re.search(message, line)
    assert not (tmp_path / "out").exists()


def test_an_unknown_fold_is_refused_with_those_there_are(call_recipe, tmp_path):
    code, stderr = call_recipe(RECIPE, "--data_dir", tmp_path, "--output_dir", tmp_path / "out", "--fold", "every")
    assert (code, "argument --fold: expected a number, all or each, found 'every'" in stderr) == (2, True), stderr


def test_held_out_cases_are_read_before_the_training(call_recipe, scans, tmp_path):
    shutil.copytree(scans, tmp_path / "data")
    path = tmp_path / "data" / "labelsTr" / "p3_a.nii.gz"
    label = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(label.dataobj) * 2, label.affine), path)
    options = ("--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out", *SMALL)
    for held_out in (("--test_cases", "p3_a"), ("--test_cases", "p2_a", "--validation_cases", "p3_a")):
        epochs = ("--validate_epochs", "1") if len(held_out) > 2 else ()
        code, stderr = call_recipe(RECIPE, *options, *held_out, *epochs)
        assert (code, "p3_a.nii.gz hold 2, but only 0..1" in stderr) == (2, True), stderr
        assert not (tmp_path / "out").exists()


def test_a_split_with_a_side_without_labelled_voxels_is_refused_before_rows_are_prepared(
    call_recipe, scans, tmp_path, monkeypatch
):
    shutil.copytree(scans, tmp_path / "data")
    for case in ("p1_a", "p1_b", "p2_a"):
        path = tmp_path / "data" / "labelsTr" / f"{case}.nii.gz"
        label = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.zeros_like(np.asarray(label.dataobj)), label.affine), path)
    path = tmp_path / "data" / "labelsTr" / "p1_a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ones((20, 24, 6), np.uint8), nibabel.load(path).affine), path)
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps([{"train": ["p1_a", "p3_a"], "val": ["p1_b", "p2_a"]}]))
    monkeypatch.setattr("samed_peft.datasets.load_slices", lambda *_, **__: pytest.fail("rows were prepared"))
    options = ("--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out", *SMALL)
    some = r"2 of 4 cases have some \(p1_a, p3_a\)|\(p3_a, p1_a\)"
    for given, message in (
        (("--test_cases", "p2_a"), rf"found none in the 1 case to test on \(p2_a\); {some}"),
        (("--split_file", splits), rf"found none in the 2 cases to test on \(p1_b, p2_a\); {some}"),
        (("--test_cases", "p1_a", "p3_a"), rf"found none in the 2 cases to train on \(p1_b, p2_a\); {some}"),
        (("--test_cases", "p1_a", "--validation_cases", "p2_a"), r"to validate on \(p2_a\); .* --validation_cases"),
        (("--folds", "4", "--fold", "each"), r"found none in the 1 case to test on of fold \d \(p"),
    ):
        for preset in ("plan", "samed"):
            code, stderr = call_recipe(RECIPE, *options, *given, "--preset", preset)
            assert code == 2, stderr
            (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
            assert re.search(message, line), line
            assert not (tmp_path / "out").exists()


def test_options_that_a_plan_completes_are_not_refused_for_settings_that_nobody_gave(call_recipe, scans, tmp_path):
    options = ("--data_dir", scans, "--output_dir", tmp_path / "out", "--base", "tiny-sam", "--fold", "9")
    for given in (("--tile",), ("--validate_epochs", "170", "--patience", "2")):
        code, stderr = call_recipe(RECIPE, *options, *given)
        assert (code, "expected fold 0 to 3 of 4 folds, found 9" in stderr) == (2, True), stderr
    for given, message in (
        (("--tile", "--preset", "samed"), "tile needs resampling aligned"),
        (("--tile", "--resampling", "samed"), "tile needs resampling aligned"),
        (("--validate_epochs", "170", "--preset", "samed"), "170 never validates in 160 epochs"),
        (("--validate_epochs", "9", "--epochs", "3"), "9 never validates in 3 epochs"),
    ):
        code, stderr = call_recipe(RECIPE, *options, *given)
        assert (code, message in stderr) == (2, True), stderr


QUICK = [
    *("--base", "tiny-sam", "--image_size", "32", "--batch_size", "8", "--max_steps", "1", "--warmup_steps", "0"),
    *("--num_workers", "0", "--patient_pattern", "(p.)_."),
]


def cases_of(folder):
    return {case["case"] for case in json.loads((folder / "report.json").read_text())["cases"]}


@pytest.mark.slow
def test_all_folds_are_scored_out_of_fold_and_the_final_adapter_is_trained_on_every_case(call_recipe, scans, tmp_path):
    out = tmp_path / "out"
    options = ("--data_dir", scans, "--output_dir", out, *QUICK, "--folds", 2)
    code, stderr = call_recipe(RECIPE, *options, "--fold", "each")
    assert code == 0, stderr
    folds = [out / "fold_0", out / "fold_1"]
    parts = [json.loads((fold / "report.json").read_text()) for fold in folds]
    report = json.loads((out / "report.json").read_text())
    assert sorted(case["case"] for case in report["cases"]) == ["p1_a", "p1_b", "p2_a", "p3_a"]
    assert report["cases"] == [case for part in parts for case in part["cases"]]
    assert report["settings"]["note"].endswith("the final adapter was trained on all cases.")
    assert report["settings"]["folds"] == 2
    card = (out / "adapter" / "README.md").read_text()
    assert "Out-of-fold scores: each case was segmented by one of 2 adapters" in card
    assert f"value: {report['standard']['mean']['dice']:.4f}".rstrip("0") in card
    assert {path.name for path in (out / "pictures").iterdir()} == {
        path.name for fold in folds for path in (fold / "pictures").iterdir()
    }
    # As if killed in the second fold: only that is made again.
    before = {fold: (fold / "report.json").stat().st_mtime_ns for fold in folds}
    shutil.rmtree(folds[1])
    (out / "report.json").unlink()
    code, stderr = call_recipe(RECIPE, *options, "--fold", "each", "--resume")
    assert code == 0, stderr
    assert "nothing to resume" not in stderr
    again = json.loads((out / "report.json").read_text())
    assert again == report
    after = {fold: (fold / "report.json").stat().st_mtime_ns for fold in folds}
    assert after[folds[0]] == before[folds[0]]
    assert after[folds[1]] > before[folds[1]]
    assert len(list((out / "pictures").iterdir())) == 4
    # One fold alone is the same training.
    code, stderr = call_recipe(RECIPE, *options[:2], "--output_dir", tmp_path / "one", *options[4:], "--fold", 1)
    assert code == 0, stderr
    one, two = (folder / "adapter" / "adapter_model.safetensors" for folder in (tmp_path / "one", folds[1]))
    assert one.read_bytes() == two.read_bytes()


def test_an_adapter_of_every_case_has_no_scores_and_says_so(scans, tmp_path, capsys):
    out = tmp_path / "out"
    with recipes_in_process(tmp_path / "cache") as run:
        code = run(RECIPE, "--data_dir", scans, "--output_dir", out, *QUICK, "--fold", "all")
    stdout, stderr = capsys.readouterr()
    assert code == 0, stderr
    *lines, last = stdout.splitlines()
    assert "out: cases: 4 to train on, 0 to validate on, 0 to test on" in lines
    assert any(
        re.match(r"validation_share +0 +no validation, .*: 3 to train on, fewer than 4", line) for line in lines
    ), stdout
    assert last == f"the adapter is in {out / 'adapter'}; it has no scores, since no case was held out"
    assert not (out / "report.json").exists()
    assert "model-index" not in (out / "adapter" / "README.md").read_text()


@pytest.mark.slow
def test_a_run_without_options_is_planned_and_goes_on_by_its_plan(scans, tmp_path, capsys):
    out, options = tmp_path / "out", ("--data_dir", scans, "--base", "tiny-sam", "--num_workers", "0")
    short = ("--max_steps", "2", "--image_size", "64", "--validation_cases", "p3_a")
    with recipes_in_process(tmp_path / "cache") as run:
        assert run(RECIPE, *options, "--output_dir", out, *short) == 0
        stdout, _ = capsys.readouterr()
        assert re.search(r"image_size +64 +as given", stdout)
        plan = json.loads((out / "plan.json").read_text())
        assert plan == json.loads((out / "adapter_best" / "plan.json").read_text())
        decided = {decision["name"]: decision["value"] for decision in plan["decisions"]}
        config = json.loads((out / "adapter_best" / "samed_config.json").read_text())
        record = json.loads((out / "run.json").read_text())
        for name in ("resampling", "neighbour_mm", "rank", "image_size", "targets", "augmentation", "schedule"):
            assert decided[name] == (config | record)[name]
        assert (record["max_steps"], record["rank"], record["resampling"]) == (2, 8, "aligned")
        assert [path.name for path in (out / "validation").iterdir()] == ["p3_a.nii.gz"]
        # Another machine would plan otherwise; the run's own plan counts.
        plan["machine"]["memory_gb"] = 1.0
        (out / "plan.json").write_text(json.dumps(plan))
        assert run(RECIPE, *options, "--output_dir", out, *short, "--resume") == 0
        assert "1 GB free" in capsys.readouterr().out
        # For longer, too, by the plan that is there: a new one would have another warm-up.
        longer = ("--max_steps", "40", *short[2:])
        assert run(RECIPE, *options, "--output_dir", out, *longer, "--resume") == 0
        assert "with max_steps 40 in place of 2" in capsys.readouterr().out

        other = shutil.copytree(scans, tmp_path / "other")
        (other / "imagesTr" / "p3_a_0000.nii.gz").unlink()
        (other / "labelsTr" / "p3_a.nii.gz").unlink()
        given = ("--data_dir", other, "--base", "tiny-sam", "--output_dir", tmp_path / "new")
        assert run(RECIPE, *given, "--plan", out / "plan.json") == 2
        assert "the plan was made from other data (cases 4 there, 3 now" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


def test_samed_s_settings_are_one_option_away(scans, tmp_path):
    with recipes_in_process(tmp_path / "cache") as run:
        assert (
            run(
                RECIPE,
                "--data_dir",
                scans,
                "--output_dir",
                tmp_path / "out",
                *QUICK,
                "--preset",
                "samed",
                "--folds",
                "3",
            )
            == 0
        )
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    samed = SamedConfig("tiny-sam", ("ball",)).to_dict() | TrainingConfig().to_dict()
    for name in ("resampling", "neighbour_mm", "rank", "targets", "augmentation", "schedule", "weight_decay"):
        assert record[name] == samed[name]
    assert not (tmp_path / "out" / "plan.json").exists()
    assert not (tmp_path / "out" / "validation").exists()
