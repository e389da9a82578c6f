"""Held-out cases and validation, scored by one process and by two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator

from samed_peft.datasets import CaseVolumes
from samed_peft.errors import InputError, SomeCasesFailedError
from samed_peft.evaluation import evaluate_cases
from samed_peft.io import Volume
from samed_peft.prediction.held_out import score_held_out

WORKER = Path(__file__).with_name("two_process_scores.py")
LAUNCHERS = {1: [], 2: ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]}


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Number of processes -> folder, and the lines that they print."""
    found = {}
    for count, launcher in LAUNCHERS.items():
        out = tmp_path_factory.mktemp(f"processes_{count}")
        temporary = tmp_path_factory.mktemp("temporary")
        # What the scores need is in the package: neither a cache in the home folder nor a network.
        offline = {"HF_HOME": str(temporary / "home"), "HF_HUB_OFFLINE": "1"}
        environment = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", **offline}
        command = [sys.executable, *launcher, str(WORKER), str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=200)
        assert done.returncode == 0, done.stderr
        assert not list(temporary.rglob("*samed_scores*"))
        assert not list(temporary.rglob("*segmentation_scores*"))
        found[count] = out, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return found


def _files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(scored):
    one, two = (_files(scored[count][0]) for count in (1, 2))
    assert one.keys() == two.keys()
    for name in one:
        if not name.endswith(".gz"):
            assert one[name] == two[name], name
    names = {name.split("/", 1)[1] for name in one if name.startswith("four/")}
    masks = {f"predictions/case {number}.nii.gz" for number in (9, 8, 7, 6)}
    pictures = {f"pictures/case_{number}.png" for number in (9, 8, 7, 6)}
    assert names == masks | pictures | {f"report.{kind}" for kind in ("json", "csv", "html", "md")}
    report = json.loads(two["four/report.json"])
    assert [case["case"] for case in report["cases"]] == ["case 9", "case 8", "case 7", "case 6"]
    assert report["settings"]["cases_without_spacing"] == ["case 8", "case 6"]
    assert [case["case"] for case in report["regions"]["cases"]] == [case["case"] for case in report["cases"]]
    assert two["apart/report.json"] == two["four/report.json"]


@pytest.mark.slow
def test_every_process_learns_the_validations_dice(scored):
    (_, one), (_, two) = scored[1], scored[2]
    expected = {line["scores"]: line["dice"] for line in one}
    assert expected.keys() == {"four", "one", "apart"}
    assert 0 < float.fromhex(expected["four"]) < 1
    assert len(two) == 2 * len(one)
    for line in two:
        assert line["dice"] == expected[line["scores"]]
        assert (line["cases"] is None) == (line["rank"] == 1)


def test_cases_without_a_partner_are_refused(golden_model, tmp_path):
    scan, labels = Volume(np.zeros((1, 8, 8), np.float32), normalized=True), Volume(np.zeros((1, 8, 8), np.uint8))
    for images, references in (({"a": scan}, {"a": labels, "b": labels}), ({"a": scan, "b": scan}, {"a": labels})):
        with pytest.raises(InputError, match=r"must be of the same cases; found no .* of b"):
            score_held_out(golden_model, images, references, tmp_path, accelerator=Accelerator(cpu=True), settings={})
    with pytest.raises(InputError, match="found no case to evaluate"):
        score_held_out(golden_model, {}, {}, tmp_path, accelerator=Accelerator(cpu=True), settings={})
    assert not (tmp_path / "report.json").exists()


def test_every_process_refuses_its_scans_without_reference(golden_model, tmp_path):
    class Second(Accelerator):
        """The second of two processes, which is refused before it waits for the other."""

        num_processes, process_index, is_main_process = 2, 1, False

    scan, labels = Volume(np.zeros((1, 8, 8), np.float32), normalized=True), Volume(np.zeros((1, 8, 8), np.uint8))
    with pytest.raises(InputError, match="no reference was given"):
        score_held_out(
            golden_model, {"a": scan, "b": scan}, {"a": labels}, tmp_path, accelerator=Second(cpu=True), settings={}
        )


def test_pictures_of_normalized_scans_take_no_window(monkeypatch):
    shown = []
    monkeypatch.setattr("samed_peft.evaluation.cases.case_picture", lambda *_, window, **__: shown.append(window))
    array, colour = np.zeros((1, 8, 8), np.float32), np.zeros((1, 8, 8, 3), np.uint8)
    images = {"a": Volume(array, normalized=True), "b": Volume(array), "c": Volume(colour)}
    labels = dict.fromkeys(images, Volume(np.zeros((1, 8, 8), np.uint8)))
    evaluate_cases(labels, labels, class_names=["a"], images=images, window=(-125.0, 275.0))
    assert shown == [None, (-125.0, 275.0), None]


def failing(error):
    def read():
        raise error

    return read


def test_a_case_that_fails_leaves_the_others(golden_model, tmp_path):
    scan = Volume(np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8), normalized=True)
    labels = Volume(np.eye(8, dtype=np.uint8)[None])
    images = CaseVolumes({"a": lambda: scan, "b": failing(KeyError("x")), "c": lambda: scan, "d": lambda: scan})
    odd = {"c": failing(InputError("c.nii is cut off")), "d": lambda: Volume(labels.array * 99)}
    references = CaseVolumes(dict.fromkeys("ab", lambda: labels) | odd)
    with pytest.warns(UserWarning, match="left out") as warned:
        report = score_held_out(
            golden_model, images, references, tmp_path, accelerator=Accelerator(cpu=True), settings={"seed": 3}
        )
    reasons = {"b": "KeyError: 'x'", "c": "c.nii is cut off", "d": report.settings["failed_cases"]["d"]}
    assert "99" in reasons["d"]
    assert report.settings["failed_cases"] == reasons
    assert [str(w.message) for w in warned] == [f"{c} failed and is left out: {r}" for c, r in reasons.items()]
    assert list(report.cases) == list(report.pictures) == ["a"]
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["failed_cases"] == reasons
    with pytest.raises(SomeCasesFailedError, match="3 of 4 cases failed; the report names them"):
        report.require_all_cases()


def test_cases_that_all_fail_are_an_error(golden_model, tmp_path):
    bad = CaseVolumes(dict.fromkeys("ab", failing(RuntimeError("no\nluck"))))
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(InputError, match=r"none of 2 cases could be scored; the first, a: RuntimeError: no$"),
    ):
        score_held_out(golden_model, bad, bad, tmp_path, accelerator=Accelerator(cpu=True), settings={})


def test_a_picture_that_cannot_be_made_is_named():
    labels = Volume(np.zeros((1, 8, 8), np.uint8))
    images = CaseVolumes(
        {"a": failing(TypeError("odd")), "b": lambda: labels, "c": lambda: Volume(np.zeros((2, 8, 8)))}
    )
    pairs = dict.fromkeys(images, labels)
    with pytest.warns(UserWarning, match="has no picture") as warned:
        report = evaluate_cases(pairs, pairs, class_names=["x"], images=images)
    assert list(report.cases) == ["a", "b", "c"]
    assert list(report.pictures) == ["b"]
    one, other = (str(w.message) for w in warned)
    assert one == "a is scored, but has no picture: TypeError: odd"
    assert other.startswith("c is scored, but has no picture: expected an image of shape")


def test_an_unexpected_error_is_one_cases_failure():
    labels = Volume(np.zeros((1, 8, 8), np.uint8))
    pairs = CaseVolumes({"a": failing(LookupError("no such tag")), "b": lambda: labels})
    with pytest.warns(UserWarning, match="^a failed and is left out: LookupError: no such tag$"):
        report = evaluate_cases(pairs, dict.fromkeys("ab", labels), class_names=["x"])
    assert list(report.cases) == ["b"]
    assert report.settings["failed_cases"] == {"a": "LookupError: no such tag"}
