"""What label numbers mean: gaps, a label to ignore and regions, from dataset.json to training, masks and scores."""

import dataclasses
import json

import nibabel
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from samed_peft.adapters.card import model_card
from samed_peft.adapters.info import adapter_info, info_text
from samed_peft.adapters.save_load import save_adapter
from samed_peft.config import SamedConfig
from samed_peft.datasets import CaseVolumes, check_cases, class_names_for, describe_folder, load_slices, open_folder
from samed_peft.datasets.cases import read_pair, read_reference
from samed_peft.datasets.dataset_json import scheme_of_dataset
from samed_peft.datasets.label_scheme import LabelScheme, label_table, labels_of_table, scheme_of
from samed_peft.datasets.rows import warn_of_absent_classes
from samed_peft.errors import InputError
from samed_peft.evaluation import Report, case_picture, evaluate_cases, format_table, write_report
from samed_peft.evaluation.artefacts import csv_text
from samed_peft.evaluation.folders import evaluate_folders
from samed_peft.hub.content import _published_report
from samed_peft.io import (
    IGNORED,
    Volume,
    read_json,
    read_label_names,
    read_labels,
    stored_mask,
    stored_names,
    write_mask,
)
from samed_peft.metrics import score_case
from samed_peft.models.losses import IGNORED_LABEL, dice_ce_loss
from samed_peft.models.modeling import config_of
from samed_peft.prediction.files import PredictionOptions, predict_files
from samed_peft.prediction.held_out import score_held_out
from samed_peft.prediction.scans import plan_masks
from samed_peft.training.batches import SlicePreparation, TrainingSlices
from samed_peft.training.validation import validation_dice

BRATS = {
    "labels": {"background": 0, "whole tumour": [1, 2, 3], "core": [2, 3], "enhancing": 3},
    "regions_class_order": [1, 2, 3],
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_folder(root, labels, content):
    """Cases -> label map (D, H, W), as nnU-Net's folder; scans hold noise."""
    for kind in ("imagesTr", "labelsTr"):
        (root / kind).mkdir(parents=True)
    (root / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MRI"}} | content))
    for case, array in labels.items():
        image = np.random.default_rng(0).normal(size=array.shape).astype(np.float32)
        for kind, stored, name in (("imagesTr", image, f"{case}_0000"), ("labelsTr", array, case)):
            nibabel.save(nibabel.Nifti1Image(stored.T, np.diag([1, 1, 3, 1])), root / kind / f"{name}.nii.gz")
    return open_folder(root)


@pytest.mark.parametrize(
    ("content", "scheme", "table"),
    [
        ({"labels": {"liver": 1, "tumour": 3}}, LabelScheme(("liver", "tumour"), (1, 3)), (0, 1, -1, 2)),
        (
            {"labels": {"background": 0, "b": 4, "ignore": 2, "a": 1}},
            LabelScheme(("a", "b"), (1, 4), 2),
            (0, 1, 255, -1, 2),
        ),
        ({"labels": {"0": "background", "1": "a", "2": "ignore"}}, LabelScheme(("a",), None, 2), (0, 1, 255)),
        (
            BRATS,
            LabelScheme(
                ("whole tumour only", "core only", "enhancing"),
                regions={"whole tumour": (1, 2, 3), "core": (2, 3), "enhancing": (3,)},
            ),
            None,
        ),
        (  # KiTS: tumours and cysts are masses in a kidney; here with another gap
            {
                "labels": {"background": 0, "kidney": [1, 2, 5], "masses": [2, 5], "tumour": 2, "ignore": 9},
                "regions_class_order": [1, 5, 2],
            },
            LabelScheme(
                ("kidney only", "tumour", "masses only"),
                (1, 2, 5),
                9,
                {"kidney": (1, 2, 3), "masses": (2, 3), "tumour": (2,)},
            ),
            (0, 1, 2, -1, -1, 3, -1, -1, -1, 255),
        ),
        (
            {"labels": {"background": 0, "all": [1, 2]}},
            LabelScheme(("label 1", "label 2"), regions={"all": (1, 2)}),
            None,
        ),
    ],
)
def test_labels_of_a_dataset_json(content, scheme, table):
    assert scheme_of(content, "dataset.json") == scheme
    assert scheme.table == table


MANY = {f"class {number}": number for number in range(1, 256)}


@pytest.mark.parametrize(
    ("labels", "order", "message"),
    [
        ({"background": 0, "a": 1, "ignore": 0}, None, "beside another name of that number"),
        ({"background": 0, "a": 1, "ignore": 1}, None, "'ignore': 1 beside another name"),
        ({"a": [1, 2], "ignore": 2}, None, r"without 'ignore' \(2\)"),
        ({"a": [1, 2], "ignore": [3, 4]}, None, r"one number above 0 for 'ignore' .* found \[3, 4\]"),
        ({"a": [0, 2]}, None, r"regions without background \(0\)"),
        ({"a": []}, None, r"different names, each with one number.*found 'a': \[\]"),
        ({"a": [1, 1]}, None, r"found 'a': \[1, 1\]"),
        ({"a": True}, None, "found 'a': True"),
        ({"a": [1, 2], "b": -3}, None, "found 'b': -3"),
        ({"a": 256}, None, "labels up to 255, as masks have 8 bits.*found 256"),
        ({"9" * 5000: "a"}, None, "each with one number"),
        (BRATS["labels"], [1, 2], r"one of the numbers of each region.*whole tumour, core, enhancing.*found \[1, 2\]"),
        (BRATS["labels"], [1, 2, 2], r"found \[1, 2, 2\]"),
        (BRATS["labels"], "123", "found '123'"),
        ({"a": [1, 2], "a only": 2}, [1, 2], "different names.*found a only, a only"),
        ({"ignore": 1}, None, "expected labels beside background"),
        (MANY | {"ignore": 256}, None, "labels up to 255.*found 256"),
        ({name: number for name, number in MANY.items() if number < 255} | {"more": 300}, None, "found 300"),
    ],
)
def test_labels_that_mean_nothing(labels, order, message):
    content = {"labels": labels} | ({} if order is None else {"regions_class_order": order})
    with pytest.raises(InputError, match=message):
        scheme_of(content, "dataset.json")


def test_there_is_room_for_254_classes_and_one_to_ignore():
    few = {name: number for name, number in MANY.items() if number < 255}
    scheme = scheme_of({"labels": few | {"ignore": 255}}, "dataset.json")
    assert (len(scheme.class_names), scheme.table) == (254, tuple(range(256)))
    assert scheme_of({"labels": MANY}, "dataset.json").table is None


def test_stored_values_return_from_labels():
    rng = np.random.default_rng(0)
    for number in (1, 2, 17, 254, 255):
        values = np.sort(rng.choice(np.arange(1, 256), number, replace=False)).tolist()
        labels = rng.integers(0, number + 1, (2, 3, 50)).astype(np.uint8)
        stored = stored_mask(labels, values)
        assert stored.dtype == np.uint8
        assert labels_of_table(Volume(stored), label_table(values)).array.tolist() == labels.tolist()
        assert stored_names(("x",), None) == {1: "x"}


def test_gaps_are_closed_for_training_and_values_without_a_name_are_refused(tmp_path):
    labels = np.zeros((3, 6, 6), np.uint8)
    labels[1, 1:3], labels[2, 2:5] = 1, 4
    content = {"labels": {"background": 0, "liver": 1, "tumour": 4}}
    folder = write_folder(tmp_path / "d", {"a": labels, "b": np.where(labels == 4, 2, labels)}, content)
    described = describe_folder(folder)
    assert (described["class_names"], described["label_values"]) == (("liver", "tumour"), (1, 4))
    reference = read_reference(folder.case("a"))
    np.testing.assert_array_equal(reference.array, np.where(labels == 4, 2, labels))
    assert reference.ignored_label is None
    check_cases(folder, ["a"], num_classes=2, window=None)
    with pytest.raises(InputError, match=r"b\.nii\.gz hold 2, but only 0, 1, 4 are expected there"):
        check_cases(folder, ["b"], num_classes=2, window=None)
    rows = load_slices(folder, ["a"], num_classes=2, orientation=None, window=None)
    assert sorted({int(label) for row in rows for label in np.unique(row["label"])}) == [0, 1, 2]
    assert class_names_for(folder, ("x", "y")) == ("x", "y")
    with pytest.raises(InputError, match=r"expected 2 class names, .*\(liver, tumour\), found 3: x, y, z"):
        class_names_for(open_folder(tmp_path / "d", class_names=("x", "y", "z")), ("x", "y", "z"))
    every = open_folder(tmp_path / "d", class_names=("liver", "x", "y", "tumour"))
    assert (every.label_table, every.class_names[3]) == (None, "tumour")


@pytest.fixture
def sparse(tmp_path):
    """Slices 0 and 1 with a blob, half annotated; slice 2 without foreground; slice 3 nowhere annotated."""
    labels = np.full((4, 8, 8), 3, np.uint8)
    labels[:2, :, :4] = 0
    labels[:2, 2:5, 1:3] = [[[1]], [[2]]]
    labels[2, :, 4:] = 0
    content = {"labels": {"background": 0, "liver": 1, "tumour": 2, "ignore": 3}}
    return write_folder(tmp_path / "d", {"a": labels, "b": np.full_like(labels, 3)}, content), labels


def test_what_is_not_annotated_counts_in_no_loss(sparse):
    folder, labels = sparse
    options = {"num_classes": 2, "orientation": None, "window": None}
    rows = load_slices(folder, ["a", "b"], **options)
    assert (list(rows["case"]), list(rows["slice"])) == (["a"] * 3, [0, 1, 2])
    for row in rows:
        np.testing.assert_array_equal(row["label"], np.where(labels == 3, IGNORED, labels)[row["slice"]])
    assert list(load_slices(folder, ["a"], **options, empty_share=0)["slice"]) == [0, 1]
    warn_of_absent_classes(rows, ("liver", "tumour"))
    with pytest.warns(UserWarning, match="labelled pixel of other"):
        warn_of_absent_classes(rows, ("liver", "tumour", "other"))
    with pytest.raises(InputError, match=r"no slice is left of 1 cases; .*annotate some"):
        load_slices(folder, ["b"], **options)
    examples = TrainingSlices(rows, SlicePreparation(8, 8))
    expected = np.where(labels == 3, IGNORED_LABEL, labels.astype(int))
    np.testing.assert_array_equal(examples[0, 1]["labels"], expected[1])
    batch = torch.stack([examples[0, index]["labels"] for index in range(3)])
    logits = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    others = torch.where((batch == IGNORED_LABEL)[:, None], torch.randn_like(logits), logits)
    assert dice_ce_loss(logits, batch) == dice_ce_loss(others, batch)
    # A corner that a rotation fills is background, as in SAMed.
    for aligned, augmentation in ((False, "samed"), (True, "strong")):
        turned = TrainingSlices(rows, SlicePreparation(8, 8, aligned=aligned, augmentation=augmentation, seed=1))
        found = {int(label) for epoch in range(20) for label in turned[epoch, 0]["labels"].unique()}
        assert found == {IGNORED_LABEL, 0, 1}


def test_rows_are_prepared_anew_if_numbers_change_their_meaning(tmp_path):
    labels = np.arange(12, dtype=np.uint8).reshape(1, 3, 4) % 4
    found = []
    for number, names in enumerate((("a", "b", "ignore"), ("a", "ignore", "b"))):
        content = {"labels": {"background": 0} | {name: value for value, name in enumerate(names, start=1)}}
        if number == 0:
            write_folder(tmp_path / "d", {"a": labels}, content)
        (tmp_path / "d" / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MRI"}} | content))
        rows = load_slices(open_folder(tmp_path / "d"), ["a"], num_classes=2, orientation=None, window=None)
        found.append(np.unique(rows[0]["label"][labels[0] == 3]).tolist())
    assert found == [[IGNORED], [2]]


def test_255_is_a_class_among_255():
    rows = [{"image": np.zeros((2, 2), np.float32), "label": np.full((2, 2), 255, np.uint8)}]
    for ignored, expected in ((IGNORED, IGNORED_LABEL), (None, 255)):
        examples = TrainingSlices(rows, SlicePreparation(2, 2, ignored=ignored))
        assert (examples[0, 0]["labels"] == expected).all()


def test_what_is_not_annotated_counts_in_no_score(sparse, tmp_path):
    folder, labels = sparse
    with pytest.raises(InputError, match=r"not to be ignored in .*b\.nii\.gz, found none of 256"):
        check_cases(folder, ["a", "b"], num_classes=2, window=None)
    scan, reference = read_pair(folder.case("a"), num_classes=2)
    assert reference.ignored_label == IGNORED
    prediction = np.where(labels == 3, 1, labels)  # wrong wherever nobody knows
    prediction[0, 2, 1] = 0
    report = evaluate_cases({"a": Volume(prediction, reference.affine)}, {"a": reference}, class_names=("l", "t"))
    dices = [score["dice"] for score in report.cases["a"]["standard"]]
    assert dices == [2 * 5 / (5 + 6), 1.0]
    outside = np.where(labels == 3, 0, prediction)
    counted = np.where(labels == 3, 0, labels)
    assert report.cases["a"] == score_case(outside, counted, num_classes=2, spacing_zyx_mm=(3, 1, 1))
    with pytest.raises(InputError, match=r"all 256 voxels of the reference are to be ignored \(label 255\)"):
        score_case(prediction, np.full_like(labels, IGNORED), num_classes=2, ignored_label=IGNORED)
    with pytest.raises(InputError, match=r"hold 255, but only 0\.\.2 are named"):
        score_case(prediction, reference.array, num_classes=2)
    assert case_picture(scan, reference, prediction, class_names=("l", "t")).startswith(b"\x89PNG")


def test_the_same_scores_from_folders(sparse, tmp_path):
    folder, labels = sparse
    prediction = np.where(labels == 3, 1, labels)
    prediction[0, 2, 1] = 0
    scan, reference = read_pair(folder.case("a"), num_classes=2)
    write_mask(prediction, scan, tmp_path / "masks" / "a.nii.gz")
    write_mask(labels, scan, tmp_path / "masks" / "b.nii.gz")
    failed = {}
    scheme = scheme_of_dataset(folder.root / "dataset.json")
    report = evaluate_folders(
        tmp_path / "masks", folder.root / "labelsTr", class_names=scheme, on_failure=failed.__setitem__
    )
    expected = evaluate_cases({"a": Volume(prediction)}, {"a": reference}, class_names=("liver", "tumour"))
    assert dict(report.cases) == dict(expected.cases)
    assert "hold 3, but only 0..2 are expected" in failed["b"]


def test_greys_of_pictures_count_as_stored_if_a_table_names_them(tmp_path):
    for kind in ("imagesTr", "labelsTr"):
        (tmp_path / kind).mkdir()
    labels = {"background": 0, "polyp": 1, "ignore": 255}
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "grey"}, "labels": labels}))
    mask = np.full((4, 4), 255, np.uint8)
    mask[0] = 0
    Image.fromarray(mask // 2).save(tmp_path / "imagesTr" / "a_0000.png")
    Image.fromarray(mask).save(tmp_path / "labelsTr" / "a.png")
    reference = read_reference(open_folder(tmp_path).case("a"))
    assert (reference.array[0] == mask).all()
    assert (read_labels(tmp_path / "labelsTr" / "a.png").array[0] == mask // 255).all()


@pytest.fixture
def gapped(golden_model, golden_config):
    """An adapter of eight classes whose stored values are 3, 6, ..., 24, with two regions."""
    values = tuple(range(3, 27, 3))
    regions = {"kidneys": (2, 3), "all": tuple(range(1, 9))}
    config = dataclasses.replace(golden_config, window=None, label_values=values, regions=regions)
    golden_model.get_base_model().samed_config = config
    assert config_of(golden_model) == config
    return golden_model, config


def test_masks_hold_the_values_of_the_labels_they_were_trained_on(gapped, tmp_path):
    model, config = gapped
    values = np.array([0, *config.label_values])
    rng = np.random.default_rng(0)
    scan = Volume(rng.random((2, 40, 40), np.float32), np.diag([1.0, 1, 3, 1]), normalized=True)
    accelerator = Accelerator(cpu=True)
    labels = rng.integers(0, 9, scan.array.shape).astype(np.uint8)
    report = score_held_out(
        model, {"a": scan}, {"a": Volume(labels, scan.affine)}, tmp_path, accelerator=accelerator, settings={}
    )
    stored = read_labels(tmp_path / "predictions" / "a.nii.gz").array
    assert len(np.unique(stored)) > 2
    assert set(np.unique(stored).tolist()) <= set(values.tolist())
    names = dict(zip(config.label_values, config.class_names, strict=True))
    assert read_label_names(tmp_path / "predictions" / "a.nii.gz") == names
    mask = np.searchsorted(values, stored)
    assert report.cases["a"] == score_case(mask, labels, num_classes=8, spacing_zyx_mm=(3, 1, 1))
    for index, region in enumerate(config.regions.values()):
        one, other = (np.isin(array, region) for array in (mask, labels))
        expected = score_case(one, other, num_classes=1, spacing_zyx_mm=(3, 1, 1))
        assert report.regions.cases["a"]["standard"][index] == expected["standard"][0]
    found = CaseVolumes.of_masks({"a": tmp_path / "predictions" / "a.nii.gz"}, label_values=config.label_values)
    np.testing.assert_array_equal(found["a"].array, mask)
    # `samed predict` writes the same.
    nibabel.save(nibabel.Nifti1Image(scan.array.T, scan.affine), tmp_path / "a.nii.gz")
    scans = plan_masks([tmp_path / "a.nii.gz"], tmp_path / "out")
    outcome = predict_files(model, scans, options=PredictionOptions(overlay=True), accelerator=accelerator)
    assert (outcome.written, outcome.failed) == (("a",), {})
    again = read_labels(tmp_path / "out" / "a.nii.gz").array
    assert set(np.unique(again).tolist()) <= set(values.tolist())
    assert again.any()
    assert read_label_names(tmp_path / "out" / "a.nii.gz") == names


def test_validation_leaves_out_what_is_not_annotated(golden_model):
    scan = Volume(np.random.default_rng(0).random((1, 40, 40), np.float32), normalized=True)
    labels = np.random.default_rng(1).integers(0, 9, scan.array.shape).astype(np.uint8)
    half = labels.copy()
    half[:, :20] = IGNORED
    accelerator = Accelerator(cpu=True)
    dices = {
        name: validation_dice(golden_model, {"a": scan}, {"a": reference}, accelerator=accelerator)[0]
        for name, reference in {"all": Volume(labels), "half": Volume(half, ignored_label=IGNORED)}.items()
    }
    assert dices["all"] != dices["half"]


def test_an_adapter_tells_its_values_and_regions(gapped, tmp_path):
    model, config = gapped
    save_adapter(model, tmp_path / "adapter", config=config)
    assert SamedConfig.from_dict(config.to_dict()) == config
    info = adapter_info(tmp_path / "adapter")
    assert list(info["classes"]) == [str(value) for value in config.label_values]
    text = info_text(info)
    assert "kidneys: right kidney, left kidney" in text
    assert "\n   24 pancreas" in text
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "| 24 | pancreas |" in card
    assert "| kidneys | right kidney, left kidney |" in card
    assert "stored_mask(mask, [3, 6, 9, 12, 15, 18, 21, 24])" in card
    assert "stored_mask" not in model_card(dataclasses.replace(config, label_values=None, regions=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_values": (1,)}, r"label_values must be one for each of 2 classes; found \[1\]"),
        ({"label_values": (1, 1)}, "label_values must be different numbers from 1 to 255"),
        ({"label_values": (0, 1)}, "from 1 to 255"),
        ({"regions": {"a": (1, 3)}}, r"labels from 1 to 2; found \{'a': \(1, 3\)\}"),
        ({"regions": {"a": ()}}, "regions must have a name and different labels"),
        ({"regions": {"": (1,)}}, "regions must have a name"),
    ],
)
def test_values_and_regions_that_mean_nothing(changes, message):
    with pytest.raises(InputError, match=message):
        SamedConfig("tiny-sam", ("a", "b"), **changes)


def test_regions_are_scored_beside_the_classes(tmp_path):
    regions = scheme_of(BRATS, "dataset.json").regions
    reference = np.zeros((1, 8, 8), np.uint8)
    reference[0, 1:7, 1:7], reference[0, 2:6, 2:6], reference[0, 3:5, 3:5] = 1, 2, 3
    prediction = np.where(reference == 3, 2, reference)  # all of the core, but nothing of what enhances
    names = scheme_of(BRATS, "dataset.json").class_names
    report = evaluate_cases({"a": prediction}, {"a": reference}, class_names=names, regions=regions)
    plain = evaluate_cases({"a": prediction}, {"a": reference}, class_names=names)
    assert report.summary == plain.summary
    assert plain.regions is None
    found = report.regions.summary["standard"]["classes"]
    assert {name: found[name]["dice"] for name in found} == {"whole tumour": 1.0, "core": 1.0, "enhancing": 0.0}
    assert report.regions.summary["standard"]["mean"]["dice"] == pytest.approx(2 / 3)
    write_report(report, tmp_path)
    values = read_json(tmp_path / "report.json")
    assert values["regions"]["standard"]["classes"]["core"]["dice"] == 1.0
    assert values["standard"] == json.loads(json.dumps(plain.to_dict()["standard"]))
    again = Report.from_dict(values)
    assert again.to_dict() == report.to_dict()
    assert again.regions.class_names == ("whole tumour", "core", "enhancing")
    text = format_table(report, width=100)
    assert "region core" in text
    assert "mean of regions" in text
    assert "a,region enhancing,standard,missed,0.0" in csv_text(report)
    for name in ("report.md", "report.html"):
        page = (tmp_path / name).read_text()
        assert "Regions" in page
        assert "whole tumour only" in page
    assert "region core" in (tmp_path / "report.html").read_text()
    assert "region" not in csv_text(plain)
    published = _published_report(report, SamedConfig("tiny-sam", names, regions=regions), cases=False)
    assert not published.regions.cases
    assert published.regions.summary == report.regions.summary
    assert Report.from_dict(published.to_dict()).regions.n_cases == 1
