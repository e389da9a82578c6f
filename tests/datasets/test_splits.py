"""Folds and listed splits keep a patient on one side."""

import json

import pytest

from samed_peft.datasets.splits import choose_splits, fold_split, listed_split, named_split, patients_of
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
