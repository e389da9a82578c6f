"""Folds and listed splits keep a patient on one side."""

import json
import os
import subprocess
import sys

import pytest

from samed_peft.datasets.splits import (
    MIN_PATIENTS,
    Splits,
    choose_folds,
    choose_splits,
    fold_split,
    listed_split,
    named_split,
    patients_of,
    require_foreground,
)
from samed_peft.errors import InputError

CASES = [f"p{patient:02d}_v{visit}" for patient in range(10) for visit in (1, 2)]
PATTERN = r"(p\d+)_v\d"


def test_folds_hold_out_every_patient_once():
    patients = patients_of(CASES, PATTERN)
    held_out = []
    for fold in range(5):
        train, test = fold_split(patients, folds=5, fold=fold)
        assert sorted(train + test) == CASES
        assert not {patients[case] for case in train} & {patients[case] for case in test}
        held_out += test
    assert sorted(held_out) == CASES


def test_folds_depend_on_their_seed_alone():
    patients = patients_of(CASES)
    turned = dict(reversed(patients.items()))
    assert set(fold_split(patients, folds=3, fold=1)[1]) == set(fold_split(turned, folds=3, fold=1)[1])
    assert fold_split(patients, folds=3, fold=1)[1] != fold_split(patients, folds=3, fold=1, seed=1)[1]


def test_listed_and_named_splits(tmp_path):
    patients = patients_of(CASES, PATTERN)
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": CASES[2:], "val": CASES[:2]}]))
    assert listed_split(path, patients) == (CASES[2:], CASES[:2])
    assert named_split(patients, CASES[:2]) == (CASES[2:], CASES[:2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"train": CASES[1:], "val": CASES[:1]}], "patients p00 are both"),
        ([{"train": CASES[2:], "val": ["p99_v1"]}], "not there: p99_v1"),
        ([{"train": CASES[2:]}], 'lists of cases under "train" and "val"'),
        ([], "found 0 splits"),
        ({"train": []}, "found dict"),
    ],
)
def test_listed_splits_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        listed_split(tmp_path / "s.json", patients_of(CASES, PATTERN))


def test_too_few_cases_are_told_with_the_options_that_divide_them():
    with pytest.raises(InputError, match=r"2 patients at least, .* found a; neither --folds nor --test_cases .* add"):
        choose_splits(["a"])
    with pytest.raises(InputError, match=r"found p00 of 2 cases by --patient_pattern; neither --folds"):
        choose_splits(CASES[:2], patient_pattern=PATTERN)
    with pytest.raises(InputError, match=r"expected 2 to 3 folds, .* found 5; give --folds 3, or .* --test_cases"):
        choose_splits(["a", "b", "c"])
    with pytest.raises(InputError, match=r"no case is left to train on when all 1 are held out; .* --test_cases"):
        choose_splits(["a"], test_cases=["a"])


def test_what_else_is_refused():
    patients = patients_of(CASES, PATTERN)
    for folds in (1, 11):
        with pytest.raises(InputError, match=f"expected 2 to 10 folds, .* as there are patients, found {folds}"):
            fold_split(patients, folds=folds, fold=0)
    for fold in (5, -1):
        with pytest.raises(InputError, match=f"expected fold 0 to 4 of 5 folds, found {fold}"):
            fold_split(patients, folds=5, fold=fold)
    with pytest.raises(InputError, match=r"hold out, found p99_v1; there are p00_v1, p00_v2, .* \(20 in all\)"):
        named_split(patients, ["p99_v1", CASES[0]])
    for pattern, message in (
        ("(", "regular expression"),
        ("p.+", "a group"),
        (r"(x)?p\d+_v\d", "has no patient"),
        (r"(p\d)", "does not match"),
    ):
        with pytest.raises(InputError, match=message):
            patients_of(CASES, pattern)
    with pytest.raises(InputError, match="no case is left"):
        named_split(patients, CASES)
    with pytest.raises(InputError, match="patients p00 are both"):
        named_split(patients, CASES[:1])


def test_one_call_chooses_all_splits(tmp_path):
    (tmp_path / "splits.json").write_text(json.dumps([{}, {"train": CASES[2:], "val": CASES[:2]}]))
    options = {"patient_pattern": PATTERN, "validation_cases": CASES[2:4]}
    listed = choose_splits(CASES, split_file=tmp_path / "splits.json", fold=1, **options)
    named = choose_splits(CASES, test_cases=CASES[:2], **options)
    assert listed == named == (CASES[4:], CASES[:2], CASES[2:4])
    folded = choose_splits(CASES, patient_pattern=PATTERN, folds=10, fold=3)
    assert folded == (*fold_split(patients_of(CASES, PATTERN), folds=10, fold=3), [])
    with pytest.raises(InputError, match="patients p01 are both"):
        choose_splits(CASES, test_cases=CASES[:2], patient_pattern=PATTERN, validation_cases=CASES[2:3])
    with pytest.raises(InputError, match="hold out, found p00_v1"):
        choose_splits(CASES, test_cases=CASES[:2], patient_pattern=PATTERN, validation_cases=CASES[:1])


def test_a_share_of_the_patients_to_train_on_validates():
    for share, patients in ((0.2, 2), (0.01, 1), (0.5, 4), (0.99, 7)):
        split = choose_splits(CASES, patient_pattern=PATTERN, validation_share=share)
        assert len(split.validation) == 2 * patients  # two visits of each, of eight patients left to train on
        named = choose_splits(CASES, patient_pattern=PATTERN, validation_cases=split.validation)
        assert (named.train, named.test) == (split.train, split.test)
    turned = choose_splits(CASES[::-1], patient_pattern=PATTERN, validation_share=0.5)
    chosen = choose_splits(CASES, patient_pattern=PATTERN, validation_share=0.5)
    assert set(turned.validation) == set(chosen.validation)
    overruled = choose_splits(CASES, test_cases=CASES[:2], validation_cases=CASES[2:4], validation_share=0.5)
    assert overruled.validation == CASES[2:4]
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match=r"validation_share must be in \[0, 1\)"):
            choose_splits(CASES, validation_share=share)


@pytest.mark.parametrize("hashing", ["0", "1", "17"])
def test_the_choice_does_not_depend_on_hashes(hashing):
    program = f"from samed_peft.datasets.splits import choose_splits as c; print(*c({CASES}, validation_share=0.2)[2])"
    options = {"env": os.environ | {"PYTHONHASHSEED": hashing}, "capture_output": True, "text": True, "check": True}
    found = subprocess.run([sys.executable, "-c", program], **options).stdout.split()
    assert found == choose_splits(CASES, validation_share=0.2).validation


def test_few_patients_are_all_trained_on_and_that_is_said():
    few, enough = (
        choose_splits(CASES[: n + 1], test_cases=["p00_v1"], validation_share=0.2) for n in (3, MIN_PATIENTS)
    )
    assert (len(few.train), few.validation, len(enough.train), len(enough.validation)) == (3, [], 3, 1)
    line = "cases: 3 to train on, 0 to validate on, 1 to test on"
    assert few.summary() == line
    assert few.summary(validation_share=0.2).startswith(f"{line}; fewer than 4 patients are left to train on")
    assert enough.summary(validation_share=0.2) == "cases: 3 to train on, 1 to validate on, 1 to test on"


def test_all_cases_are_trained_on_and_all_folds_test_on_each_once(tmp_path):
    whole = choose_splits(CASES, fold="all", patient_pattern=PATTERN, validation_share=0.2)
    assert (sorted(whole.train), whole.test, whole.validation) == (CASES, [], [])
    splits = choose_folds(CASES, folds=3, patient_pattern=PATTERN, validation_share=0.2)
    assert sorted(case for split in splits for case in split.test) == CASES
    assert splits[1] == choose_splits(CASES, folds=3, fold=1, patient_pattern=PATTERN, validation_share=0.2)
    file = tmp_path / "splits.json"
    listed = [{"train": CASES[4:8], "val": CASES[:4]}, {"train": CASES[:4], "val": CASES[4:8]}]
    file.write_text(json.dumps(listed))
    assert [split.test for split in choose_folds(CASES, split_file=file)] == [CASES[:4], CASES[4:8]]
    assert choose_splits(CASES, split_file=file, fold="all").train == CASES[:8]
    file.write_text(json.dumps([listed[0], {"train": CASES[8:], "val": CASES[2:6]}]))
    with pytest.raises(InputError, match=r"test on each case once in .*splits.json, found p01_v1, p01_v2 in several"):
        choose_folds(CASES, split_file=file)
    with pytest.raises(InputError, match="no cases to test on where every case is trained on, found p00_v1"):
        choose_splits(CASES, fold="all", test_cases=CASES[:1])
    for named in ({"test_cases": CASES[:1]}, {"validation_cases": CASES[:1]}):
        with pytest.raises(InputError, match="no cases by name where each is tested on once, found p00_v1"):
            choose_folds(CASES, **named)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (
            [Splits(["c", "a"], ["a", "b"], [])],
            r"none in the 2 cases to test on \(a, b\); 1 of 4 cases have some \(c\): choose another --fold or fewer",
        ),
        ([Splits(["a"], ["c"], [])], r"none in the 1 case to train on \(a\); .*\(c\): choose another --fold, or fewer"),
        ([Splits(["c"], ["c"], ["b"])], r"none in the 1 case to validate on \(b\); .*: name .* --validation_cases"),
        ([Splits(["c"], ["c"], []), Splits(["c"], ["b"], [])], r"none in the 1 case to test on of fold 1 \(b\)"),
        ([Splits(["b", "a"], [], [])], r"0 of 2 cases have some \(none\)"),
    ],
)
def test_a_side_of_a_split_without_a_labelled_voxel_is_refused(splits, message):
    with pytest.raises(InputError, match=message):
        require_foreground(splits, empty=("a", "b"))
    require_foreground([Splits(["c"], ["c", "a"], [])], empty=("a", "b"))
