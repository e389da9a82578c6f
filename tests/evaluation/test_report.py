"""Reports that are read back: round trips, older and published files, and malformed ones."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest

from samed_peft.errors import InputError
from samed_peft.evaluation import Report, evaluate_cases, write_report

NAMES = ("liver", "spleen", "left|lobe", "mean")


@pytest.fixture(scope="module")
def report():
    """Four cases; the liver in both masks, missed, spurious and in neither."""
    one, none = np.zeros((2, 3, 12, 12), np.uint8)
    one[:2, 1:5, 1:5], one[1:, 6:9, 6:9] = 1, 2
    references = {"both": one, "missed": one, "spurious": none, "neither": none}
    predictions = {"both": np.roll(one, 1, axis=1), "missed": none, "spurious": one, "neither": none}
    return evaluate_cases(predictions, references, class_names=NAMES, settings={"note": "a note", "seed": 3})


@pytest.fixture
def values(report):
    return copy.deepcopy(report.to_dict())


def test_a_report_comes_back_from_its_file(report, tmp_path):
    write_report(report, tmp_path)
    found = Report.from_dict(json.loads((tmp_path / "report.json").read_text(encoding="utf-8")))
    assert found.to_dict() == report.to_dict()
    assert found.class_names == NAMES
    np.testing.assert_equal(found.cases, report.cases)  # NaN where it was
    np.testing.assert_equal(found.summary, report.summary)
    np.testing.assert_equal(found.intervals, report.intervals)
    write_report(found, tmp_path / "again")
    for name in ("report.json", "report.csv", "report.html", "report.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_each_case_says_which_masks_contain_a_class(values):
    assert {row["case"]: row["presence"]["liver"] for row in values["cases"]} == {
        "both": "both",
        "missed": "missed",
        "spurious": "spurious",
        "neither": "absent",
    }
    assert {row["presence"]["mean"] for row in values["cases"]} == {"absent"}


def test_a_published_report_has_the_means_that_its_file_states(values, tmp_path):
    values["standard"]["mean"]["dice"] = 0.123  # of cases that nobody else has
    published = Report.from_dict({**values, "cases": [], "n_cases": 4})
    assert published.n_cases == 4
    assert published.cases == {}
    assert published.summary["standard"]["mean"]["dice"] == 0.123
    assert math.isnan(published.summary["standard"]["classes"]["mean"]["dice"])
    assert published.to_dict() == {**values, "cases": [], "n_cases": 4}
    write_report(published, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "4 cases. Scores of 4 classes" in text
    assert "| liver | 0.2500 | 1.00 | 3/4 | n/a |" in text  # means do not say how many cases have a distance


def test_reports_of_older_versions_are_completed_from_their_cases(report, values):
    kept = {"dice", "hd95", "n_valid", "n_cases"}

    def older(scores):
        return {key: value for key, value in scores.items() if key in kept}

    for convention in ("standard", "samed"):
        summary = values[convention]
        classes = {name: older(scores) for name, scores in summary["classes"].items()}
        values[convention] = {"mean": older(summary["mean"]), "classes": classes}
    for row in values["cases"]:
        del row["presence"]
        row["classes"] = {
            name: {convention: older(scores) for convention, scores in both.items()}
            for name, both in row["classes"].items()
        }
    found = Report.from_dict(values)
    assert [scores["presence"] for scores in found.cases.values()] == [
        scores["presence"] for scores in report.cases.values()
    ]
    assert found.summary["standard"]["classes"]["liver"]["n_missed"] == 1
    assert found.intervals["samed"]["mean"]["dice"] == report.intervals["samed"]["mean"]["dice"]
    assert math.isnan(found.cases["both"]["standard"][0]["iou"])
    assert found.to_dict()["standard"]["mean"]["iou"] is None


def test_unknown_fields_are_left_out(report, values):
    values["standard"]["classes"]["liver"]["volume"] = 3.5
    values["cases"][0]["scanner"] = "x"
    assert Report.from_dict({**values, "version": 9}).to_dict() == report.to_dict()


def _drop(*path):
    def change(values):
        for key in path[:-1]:
            values = values[key]
        del values[path[-1]]

    return change


def _put(value, *path):
    def change(values):
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("standard"), "expected an object with 'standard' as the report"),
        (_drop("samed", "mean"), "expected an object with 'mean' as the report: samed, found"),
        (_put(1, "samed", "mean"), "expected an object as the report: samed: mean, found 1"),
        (_put([], "standard", "classes"), "expected an object as the report: standard: classes"),
        (_put("0.5", "standard", "mean", "dice"), "a number or null as the report: standard: mean: dice, found '0.5'"),
        (_put(True, "standard", "mean", "dice"), "a number or null as the report: standard: mean: dice, found True"),
        (_put(math.inf, "standard", "mean", "hd95"), "a number or null as the report: standard: mean: hd95"),
        (_drop("samed", "mean", "hd95"), "an object with 'hd95' as the report: samed: mean"),
        (_put(2.0, "samed", "classes", "liver", "n_valid"), "a number of cases as .* liver: n_valid, found 2.0"),
        (_put(-1, "samed", "classes", "liver", "n_missed"), "a number of cases as .* liver: n_missed, found -1"),
        (_put(True, "samed", "classes", "liver", "n_cases"), "a number of cases as .* liver: n_cases, found True"),
        (_drop("samed", "classes", "spleen"), "an object with 'spleen' as the report: samed: classes"),
        (_put([0.1], "standard", "mean_ci95", "dice"), "two ends of an interval as .* mean_ci95: dice"),
        (_put([0.1, "x"], "standard", "mean_ci95", "dice"), "a number or null as .* mean_ci95: dice.1., found 'x'"),
        (_put({}, "cases"), "a list as the report: cases, found {}"),
        (_put(1, "cases", 0), r"an object as the report: cases\[0\], found 1"),
        (_put(7, "cases", 0, "case"), r"a name as the report: cases\[0\]: case, found 7"),
        (_put("missed", "cases", 0, "case"), r"a different name for each case as .* cases\[1\]: case, found 'missed'"),
        (_drop("cases", 0, "classes", "liver"), r"an object with liver, spleen, left\|lobe, mean alone as .* classes"),
        (_drop("cases", 0, "classes", "liver", "samed"), r"an object with 'samed' as .* cases\[0\]: classes: liver"),
        (_put("here", "cases", 0, "presence", "liver"), "one of both, missed, spurious, absent as .*: presence: liver"),
        (_put(["both"], "cases", 0, "presence", "liver"), "one of both, missed, spurious, absent as .* liver"),
        (_drop("cases", 0, "presence", "liver"), "an object with 'liver' as .*: presence"),
        (_put(3, "n_cases"), "a list of 3 cases as the report: cases"),
        (_put("4", "n_cases"), "a number of cases as the report: n_cases, found '4'"),
        (_put([], "settings"), "an object as the report: settings"),
        (_put(["a"], "settings", "failed_cases"), "an object as the report: settings: failed_cases"),
        (_put("a", "settings", "cases_without_spacing"), "a list as .* cases_without_spacing"),
        (_put("2", "settings", "surface_dice_tolerance_mm"), "a number or null as .* surface_dice_tolerance_mm"),
    ],
)
def test_malformed_reports_are_refused_by_their_field(values, change, message):
    change(values)
    with pytest.raises(InputError, match=message):
        Report.from_dict(values)


def test_means_alone_must_be_complete(values):
    del values["samed"]["mean_ci95"]
    with pytest.raises(InputError, match="an object with 'mean_ci95' as the report: samed"):
        Report.from_dict({**values, "cases": []})


@pytest.mark.parametrize("way", ["absent", "null"])
def test_published_reports_of_older_versions_state_means_alone(values, tmp_path, way):
    for convention in ("standard", "samed"):
        summary = values[convention]
        summary["mean_ci95"] = None
        if way == "absent":
            del summary["mean_ci95"]
        for scores in summary["classes"].values():
            for name in ("ci95", "n_absent", "n_missed", "n_spurious"):
                del scores[name]
    found = Report.from_dict({**values, "cases": [], "n_cases": 4})
    assert found.summary["standard"]["mean"]["dice"] == values["standard"]["mean"]["dice"]
    assert all(math.isnan(end) for end in found.intervals["samed"]["classes"]["liver"]["hd95"])
    assert math.isnan(found.summary["standard"]["classes"]["liver"]["n_missed"])
    write_report(found, tmp_path)
    again = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert "nan" not in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert again["standard"]["classes"]["liver"]["n_missed"] is None
    again["standard"]["mean_ci95"] = again["samed"]["mean_ci95"] = None
    assert Report.from_dict(again).n_cases == 4


def test_means_that_are_stored_are_not_computed_again(report):
    found = Report.from_dict(report.to_dict())
    assert found.means is not None
    computed = dataclasses.replace(found, means=None)
    assert computed.to_dict() == found.to_dict()
