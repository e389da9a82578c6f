"""`samed evaluate` on references stored in every way that training reads."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from scan_files import AFFINE, write_nifti

from samed_peft.cli import main
from samed_peft.datasets import open_folder
from samed_peft.datasets.cases import read_reference
from samed_peft.errors import InputError
from samed_peft.evaluation.folders import evaluate_folders
from samed_peft.io import Volume, write_mask

SHAPE = (4, 8, 9)
NAMES = ("spleen", "liver")  # not in the order of the alphabet


def labels_of(number):
    """Spleen and liver, both in every slice."""
    array = np.zeros(SHAPE, np.uint8)
    array[:, 1:4, 1 + number : 4] = 1
    array[:, 5:7, 2:8] = 2
    return array


def write_predictions(folder, *, names=NAMES, values=(1, 2), suffix=".nii.gz", shape=slice(None)):
    """Masks of cases a and b that are right but for half of the liver."""
    for number, case in enumerate("ab"):
        array = labels_of(number)[shape].copy()
        array[:, 5:6] = 0
        stored = np.array([0, *values], np.uint8)[array]
        like = Volume(stored, None if suffix == ".png" else AFFINE, folder / f"scan{suffix}")
        label_names = dict(zip(values, names, strict=True)) if names else None
        write_mask(stored, like, folder / f"{case}{suffix}", label_names=label_names)
    return folder


def write_class_files(folder, place, *, extra=("kidney",)):
    """A file for each class of both cases, whose name `place` makes of case and class; kidneys are empty."""
    for number, case in enumerate("ab"):
        for label, name in enumerate((*NAMES, *extra), start=1):
            path = folder / place.format(case=case, name=name)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_nifti(path, (labels_of(number) == label).astype(np.uint8))
    return folder


def dice_of(predictions, references, **options):
    failed = {}
    report = evaluate_folders(predictions, references, on_failure=failed.__setitem__, **options)
    classes = report.to_dict()["standard"]["classes"]
    return {name: scores["dice"] for name, scores in classes.items()}, failed


EXPECTED = {"spleen": 1.0, "liver": pytest.approx(2 / 3)}
LAYOUTS = ("{case}/{name}.nii.gz", "{name}/{case}.nii.gz", "{case}/segmentations/{name}.nii.gz")


@pytest.mark.parametrize("place", LAYOUTS)
def test_a_file_for_each_class_is_matched_by_the_names_in_the_masks(tmp_path, place):
    predictions = write_predictions(tmp_path / "masks_out")
    references = write_class_files(tmp_path / "references", place)
    assert dice_of(predictions, references) == (EXPECTED, {})
    # Numbers of masks may have gaps.
    gaps = write_predictions(tmp_path / "gaps", values=(3, 7))
    assert dice_of(gaps, references) == (EXPECTED, {})
    # Without names in the masks, users name the numbers, or all classes count in the order of the alphabet.
    silent = write_predictions(tmp_path / "silent", names=None)
    assert dice_of(silent, references, class_names=NAMES) == (EXPECTED, {})
    found, _ = dice_of(silent, references)
    assert list(found) == ["kidney", "liver", "spleen"]
    # Names that contradict those in the masks would compare one class with another.
    with pytest.raises(InputError, match="none of the 2 cases"):
        dice_of(predictions, references, class_names=("liver", "spleen"))
    with pytest.raises(InputError, match=r"classes with files in .*found livre; did you mean liver"):
        dice_of(predictions, references, class_names=("livre",))


def test_names_of_masks_that_contradict_are_told(tmp_path):
    predictions = write_predictions(tmp_path / "masks_out")
    write_predictions(tmp_path / "other", names=NAMES[::-1])
    shutil.copy(tmp_path / "other" / "b.nii.gz", predictions / "b.nii.gz")
    references = write_class_files(tmp_path / "references", LAYOUTS[0])
    found, failed = dice_of(predictions, references)
    assert found == EXPECTED
    message = r"expected label 1 of .*b\.nii\.gz to be spleen, as the references have it, found liver by the names in"
    assert re.match(message, failed["b"])


def test_totalsegmentators_cases_need_each_class_and_others_do_not(tmp_path):
    predictions = write_predictions(tmp_path / "masks_out")
    for place, failing in ((LAYOUTS[2], True), (LAYOUTS[0], False)):
        references = write_class_files(tmp_path / place[7:10], place)
        (references / place.format(case="b", name="spleen")).unlink()
        found, failed = dice_of(predictions, references)
        assert found["spleen"] == (1.0 if failing else 0.5)
        assert list(failed) == (["b"] if failing else [])
        if failing:
            assert "expected a file of each class of b in" in failed["b"]
            assert "found none of spleen" in failed["b"]


def test_cases_without_partner_fail_alone(tmp_path):
    predictions = write_predictions(tmp_path / "masks_out")
    references = write_class_files(tmp_path / "references", LAYOUTS[0])
    shutil.rmtree(references / "b")
    shutil.copytree(references / "a", references / "c")
    found, failed = dice_of(predictions, references)
    assert found == EXPECTED
    assert failed["b"].startswith("expected a reference of b in ")
    assert failed["c"].startswith("expected one file of this name in ")


def write_coloured(folder, table, *, stray=False):
    folder.mkdir()
    colours = np.array([[0, 0, 0], *table.values()], np.uint8)
    for number, case in enumerate("ab"):
        pixels = colours[labels_of(number)[0]]
        if stray and case == "b":
            pixels[0, 0] = 7
        Image.fromarray(pixels).save(folder / f"{case}.png")
    (folder / "colours.json").write_text(json.dumps(table))
    return folder


def test_pictures_in_colours(tmp_path):
    table = dict(zip(NAMES, ([255, 0, 0], [0, 255, 128]), strict=True))
    predictions = write_predictions(tmp_path / "masks_out", suffix=".png", shape=slice(1))
    assert dice_of(predictions, write_coloured(tmp_path / "references", table)) == (EXPECTED, {})
    found, failed = dice_of(predictions, write_coloured(tmp_path / "stray", table, stray=True))
    assert found == EXPECTED
    assert re.match(
        r"expected only colours of the colour table in .*b\.png, found 1 pixels of \[7, 7, 7\]", failed["b"]
    )
    # Beside a folder called masks, as in training.
    around = tmp_path / "data"
    around.mkdir()
    masks = write_coloured(around / "masks", table)
    shutil.move(masks / "colours.json", around)
    assert dice_of(predictions, masks) == (EXPECTED, {})
    # The order numbers the labels, which the masks' own names contradict here.
    turned = write_coloured(tmp_path / "turned", dict(reversed(table.items())))
    with pytest.raises(InputError, match="none of the 2 cases"):
        dice_of(predictions, turned)
    with pytest.raises(InputError, match=r"expected 2 class names, as many as .*colours\.json has .*found 1: liver"):
        dice_of(predictions, masks, class_names=("liver",))


def test_names_in_a_list_and_pixels_to_ignore(tmp_path):
    predictions = write_predictions(tmp_path / "masks_out", suffix=".png", shape=slice(1), names=None)
    references = tmp_path / "references"
    references.mkdir()
    for number, case in enumerate("ab"):
        array = labels_of(number)[0]
        array[5] = 255  # the half of the liver that the masks lack
        Image.fromarray(array).save(references / f"{case}.png")
    (references / "labels.txt").write_text("__ignore__\n_background_\nspleen\nliver\n")
    assert dice_of(predictions, references) == ({"spleen": 1.0, "liver": 1.0}, {})


def test_the_same_label_maps_as_in_training(tmp_path):
    write_class_files(tmp_path / "data" / "masks", LAYOUTS[1], extra=())
    for case in "ab":
        (tmp_path / "data" / "images").mkdir(exist_ok=True)
        write_nifti(tmp_path / "data" / "images" / f"{case}.nii.gz", np.zeros(SHAPE, np.int16))
    folder = open_folder(tmp_path / "data", class_names=NAMES)
    predictions = tmp_path / "same"
    for case in "ab":
        reference = read_reference(folder.case(case))
        write_mask(reference.array, reference, predictions / f"{case}.nii.gz")
    assert dice_of(predictions, tmp_path / "data" / "masks", class_names=NAMES) == (dict.fromkeys(NAMES, 1.0), {})


def test_a_dataset_json_chooses_classes_and_numbers(tmp_path):
    predictions = write_predictions(tmp_path / "masks_out", values=(3, 7), names=None)
    references = write_class_files(tmp_path / "references", LAYOUTS[2])
    dataset = tmp_path / "dataset.json"
    dataset.write_text(json.dumps({"labels": {"background": 0, "spleen": 3, "liver": 7}}))
    options = ["--references", references, "--dataset_json", dataset, "--output", tmp_path / "report"]
    main(["evaluate", "--predictions", str(predictions), *map(str, options)])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {name: scores["dice"] for name, scores in report["standard"]["classes"].items()} == EXPECTED


def test_folders_that_fit_neither_cases_nor_classes(tmp_path, capsys):
    predictions = write_predictions(tmp_path / "masks_out")
    for name, place in (("neither", "x{case}/{name}.nii.gz"), ("both", "{case}/{case}.nii.gz")):
        references = write_class_files(tmp_path / name, place)
        with pytest.raises(SystemExit) as end:
            main(
                [
                    *("evaluate", "--predictions", str(predictions), "--references", str(references)),
                    *("--output", str(tmp_path / "report")),
                ]
            )
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(r"/CASE/CLASS\.nii\.gz or .*/CLASS/CASE\.nii\.gz for each CASE of the 2 predictions", line)
        assert ("found both" in line) == (name == "both")
    table = dict(zip(NAMES, ([255, 0, 0], [0, 255, 128]), strict=True))
    coloured = write_coloured(tmp_path / "coloured", table)
    (coloured / "labels.txt").write_text("liver")
    with pytest.raises(InputError, match=r"in one file, found .*colours\.json and .*labels\.txt"):
        dice_of(predictions, coloured)
