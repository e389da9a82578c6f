"""Choose held-out cases: k folds, a listed split or named cases, patients never on both sides."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from samed_peft.errors import InputError
from samed_peft.io import read_json

Split = tuple[list[str], list[str]]
"""Cases to train on, and cases held out."""


MIN_PATIENTS = 4
"""Patients to train on from which a share of them is taken for validation."""


class Splits(NamedTuple):
    """Names of the cases to train on, to test on and to validate on."""

    train: list[str]
    test: list[str]
    validation: list[str]

    @property
    def held_out(self) -> list[str]:
        """The cases that are not trained on."""
        return [*self.test, *self.validation]

    def summary(self, *, validation_share: float = 0.0) -> str:
        """One line with the number of cases on each side, and why none validates where a share of them should."""
        parts = [
            f"{len(cases)} to {use}" for cases, use in ((self.train, "train on"), (self.validation, "validate on"))
        ]
        line = f"cases: {', '.join([*parts, f'{len(self.test)} to test on'])}"
        if self.validation or not validation_share:
            return line
        return (
            f"{line}; fewer than {MIN_PATIENTS} patients are left to train on, too few to validate on one of them, so "
            "the last adapter counts"
        )


def choose_splits(
    cases: Sequence[str],
    *,
    patient_pattern: str | None = None,
    split_file: str | Path | None = None,
    test_cases: Sequence[str] | None = None,
    validation_cases: Sequence[str] = (),
    validation_share: float = 0.0,
    folds: int = 5,
    fold: int | str = 0,
) -> Splits:
    """Split cases by a file, by the names of the test cases, or by folds; patients never on two sides.

    Args:
        cases: all names.
        patient_pattern: regular expression that matches a whole name and whose first group is the patient, such as
            `(.+)_visit[0-9]+`; None if each case is another patient.
        split_file: in the form of nnU-Net's `splits_final.json`: `[{"train": [...], "val": [...]}, ...]`.
        test_cases: the cases to hold out; all others are trained on.
        validation_cases: taken from those to train on.
        validation_share: share, below 1, of the patients to train on that is taken for validation unless cases are
            named: one at least, and none of fewer than `MIN_PATIENTS`. The names decide which, not their order.
        folds: number of folds, at least 2; used without `split_file` and `test_cases`.
        fold: number of the fold to hold out, or of the split in the file, counted from 0; "all" tests on none and
            trains on every case, those of the file if there is one.

    Raises:
        InputError: the expression is broken, has no group, or does not match a case; there are fewer patients than
            folds; `fold` or `validation_share` is out of range; the file has no such split; a named case does not
            exist; no case is left; or a patient would be on two sides.
    """
    patients = patients_of(cases, patient_pattern)
    if fold == "all" and test_cases:
        raise InputError(
            f"expected no cases to test on where every case is trained on, found {', '.join(test_cases[:5])}; leave "
            "out --test_cases or --fold all"
        )
    if not isinstance(fold, int):
        listed = patients if split_file is None else set().union(*listed_split(split_file, patients))
        train, test = [case for case in patients if case in listed], list[str]()
    elif split_file is not None:
        train, test = listed_split(split_file, patients, fold=fold)
    elif test_cases:
        train, test = named_split(patients, test_cases)
    else:
        train, test = fold_split(patients, folds=folds, fold=fold)
    if validation_cases:
        train, _ = named_split({case: patients[case] for case in train}, validation_cases)
        return Splits(train, test, list(validation_cases))
    share = 0.0 if fold == "all" else validation_share
    train, validation = share_split({case: patients[case] for case in train}, share=share)
    return Splits(train, test, validation)


def choose_folds(
    cases: Sequence[str],
    *,
    split_file: str | Path | None = None,
    folds: int = 5,
    test_cases: Sequence[str] | None = None,
    validation_cases: Sequence[str] = (),
    **options: Any,
) -> list[Splits]:
    """All folds, or all splits of a file, one after another; each case is tested on once.

    Args:
        cases: all names.
        split_file: see `choose_splits`.
        folds: see `choose_splits`.
        test_cases: refused, since folds decide which cases are tested on.
        validation_cases: refused, since each is tested on in one of the folds.
        options: further ones of `choose_splits`.

    Raises:
        InputError: as `choose_splits`; cases are named; or splits of the file test on a case twice.
    """
    if named := [*(test_cases or ()), *validation_cases]:
        raise InputError(
            f"expected no cases by name where each is tested on once, found {', '.join(named[:5])}; leave out "
            "--test_cases and --validation_cases, --validation_share takes other ones in each fold"
        )
    number = folds
    if split_file is not None:
        content = read_json(split_file)
        number = len(content) if isinstance(content, list) else 1  # refused below
    splits = [
        choose_splits(cases, split_file=split_file, folds=folds, fold=fold, **options) for fold in range(max(number, 1))
    ]
    tested = [case for split in splits for case in split.test]
    if twice := sorted({case for case in tested if tested.count(case) > 1}):
        raise InputError(
            f"expected splits that test on each case once in {split_file}, found {', '.join(twice[:5])} in several "
            f"({len(twice)} cases in all); score one split at a time with --fold 0 and so on"
        )
    return splits


_WAYS_OUT = {
    "train": "choose another --fold, or fewer --test_cases and --validation_cases",
    "test": "choose another --fold or fewer --folds, name the cases with --test_cases, or train on all with --fold all",
    "validate": "name the cases with --validation_cases, or do without validation with --validation_share 0",
}
"""Side of a split -> what to do if no voxel is labelled there."""


def require_foreground(splits: Sequence[Splits], *, empty: Collection[str]) -> None:
    """Refuse splits with a side on which no voxel is labelled: it can teach or test nothing.

    Args:
        splits: one, or several folds.
        empty: names of the cases without a labelled voxel.

    Raises:
        InputError: naming fold and side, and how many cases it has.
    """
    for number, cases in enumerate(splits):
        for side, names in zip(_WAYS_OUT, cases, strict=True):
            if not names or not {*names} <= {*empty}:
                continue
            count = f"{len(names)} case{'s' * (len(names) != 1)}"
            everywhere = [name for group in cases for name in group]
            labelled = [name for name in everywhere if name not in empty]
            of_fold = f" of fold {number}" if len(splits) > 1 else ""
            raise InputError(
                f"expected labelled voxels on each side of the split, found none in the {count} to {side} on"
                f"{of_fold} ({', '.join(names[:5])}); {len(labelled)} of {len(everywhere)} cases have some "
                f"({', '.join(labelled[:5]) or 'none'}): {_WAYS_OUT[side]}"
            )


def patients_of(cases: Sequence[str], pattern: str | None = None) -> dict[str, str]:
    """Case -> patient, by a regular expression; see `choose_splits`."""
    if pattern is None:
        return {case: case for case in cases}
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"expected a regular expression for patients, found {pattern!r}: {error}") from error
    if compiled.groups < 1:
        raise InputError(f"expected a group for the patient, as in '(.+)_visit[0-9]+', found {pattern!r}")
    patients = {}
    for case in cases:
        match = compiled.fullmatch(case)
        if match is None:
            raise InputError(f"the patient of case {case} cannot be told: {pattern!r} does not match its whole name")
        if not match[1]:
            raise InputError(
                f"case {case} has no patient by {pattern!r}: the group matches nothing; correct the expression"
            )
        patients[case] = match[1]
    return patients


def fold_split(patients: Mapping[str, str], *, folds: int, fold: int, seed: int = 0) -> Split:
    """Hold out one of k folds of patients, whose order the seed decides; equal arguments give equal folds."""
    distinct = sorted(set(patients.values()))
    if len(distinct) < 2:
        of = "" if len(patients) == len(distinct) else f" of {len(patients)} cases by --patient_pattern"
        raise InputError(
            f"expected 2 patients at least, one to train on and one to hold out, found {', '.join(distinct) or 'none'}"
            f"{of}; neither --folds nor --test_cases can divide that, add labelled cases"
        )
    if not 2 <= folds <= len(distinct):
        raise InputError(
            f"expected 2 to {len(distinct)} folds, at most as many as there are patients, found {folds}; give --folds "
            f"{min(max(folds, 2), len(distinct))}, or name the cases to hold out with --test_cases"
        )
    if not 0 <= fold < folds:
        raise InputError(f"expected fold 0 to {folds - 1} of {folds} folds, found {fold}; they are counted from 0")
    order = np.random.default_rng(seed).permutation(len(distinct))
    held_out = {distinct[index] for index in order[fold::folds]}
    test = [case for case, patient in patients.items() if patient in held_out]
    return [case for case, patient in patients.items() if patient not in held_out], test


def share_split(patients: Mapping[str, str], *, share: float, seed: int = 0) -> Split:
    """Hold out a share of the patients, at least one and not all; none of fewer than `MIN_PATIENTS`."""
    if not 0 <= share < 1:  # written so that NaN fails too
        raise InputError(f"validation_share must be in [0, 1), 0 for no validation; found {share}")
    distinct = sorted(set(patients.values()))
    if not share or len(distinct) < MIN_PATIENTS:
        return list(patients), []
    number = min(max(round(share * len(distinct)), 1), len(distinct) - 1)
    order = np.random.default_rng(seed).permutation(len(distinct))
    held_out = {distinct[index] for index in order[:number]}
    validation = [case for case, patient in patients.items() if patient in held_out]
    return [case for case, patient in patients.items() if patient not in held_out], validation


def listed_split(path: str | Path, patients: Mapping[str, str], *, fold: int = 0) -> Split:
    """Hold out the cases that a file in the form of nnU-Net's `splits_final.json` lists under "val"."""
    content = read_json(path)
    if not isinstance(content, list) or not 0 <= fold < len(content) or not isinstance(content[fold], dict):
        found = f"{len(content)} splits" if isinstance(content, list) else type(content).__name__
        raise InputError(f'expected split {fold} with "train" and "val" in {path}, found {found}')
    train, held_out = (content[fold].get(side) for side in ("train", "val"))
    for side in (train, held_out):
        if not isinstance(side, list) or not side or not all(isinstance(case, str) for case in side):
            raise InputError(f'expected lists of cases under "train" and "val" in split {fold} of {path}')
    unknown = sorted({*train, *held_out} - patients.keys())
    if unknown:
        raise InputError(
            f"{path} names cases that are not there: {', '.join(unknown[:5]):.500} ({len(unknown)} in all)"
        )
    _require_apart(train, held_out, patients)
    return list(train), list(held_out)


def named_split(patients: Mapping[str, str], held_out: Sequence[str]) -> Split:
    """Hold out the named cases and train on all others."""
    unknown = sorted(set(held_out) - patients.keys())
    if unknown or not held_out:
        raise InputError(
            f"expected cases of the folder to hold out, found {', '.join(unknown[:5]) or 'none'}; there are "
            f"{', '.join(sorted(patients)[:20])} ({len(patients)} in all)"
        )
    train = [case for case in patients if case not in held_out]
    if not train:
        raise InputError(
            f"no case is left to train on when all {len(held_out)} are held out; name fewer with --test_cases and "
            "--validation_cases, or add labelled cases"
        )
    _require_apart(train, held_out, patients)
    return train, list(held_out)


def _require_apart(train: Sequence[str], held_out: Sequence[str], patients: Mapping[str, str]) -> None:
    """Refuse sides that share a patient, whose scores would say nothing."""
    shared = sorted({patients[case] for case in train} & {patients[case] for case in held_out})
    if shared:
        raise InputError(f"patients {', '.join(shared[:5])} are both trained on and held out ({len(shared)} in all)")
