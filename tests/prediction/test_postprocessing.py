"""Largest parts of recorded classes, and the choice of these classes on validation cases."""

import dataclasses

import numpy as np
import pytest

from samed_peft.config import SamedConfig
from samed_peft.errors import InputError
from samed_peft.io import Volume
from samed_peft.prediction import choose_postprocessing
from samed_peft.prediction.postprocessing import largest_parts


def rows(*lines):
    """A volume of one slice, one character a voxel."""
    return Volume(np.array([[[int(c) for c in line] for line in lines]], np.uint8))


def test_only_the_classes_that_are_asked_for_lose_parts():
    mask = rows("110100", "000000", "220002").array
    kept = rows("110000", "000000", "220002").array
    np.testing.assert_array_equal(largest_parts(mask, [1]), kept)
    np.testing.assert_array_equal(largest_parts(mask, []), mask)
    np.testing.assert_array_equal(largest_parts(mask), rows("110000", "000000", "220000").array)


def test_classes_whose_mean_dice_rises_are_chosen():
    """In a, the stray 1 is wrong (4/5 before, 1 after); the part of 2 is right (1 before, 2/3 after)."""
    masks = {"a": rows("110100", "000000", "200002")}
    references = {"a": rows("110000", "000000", "200002")}
    assert choose_postprocessing(masks, references, ("one", "two")) == ("one",)


@pytest.mark.parametrize(
    ("stray_is_right_in_b", "chosen"),
    [
        # a: 4/5 -> 1, which is 1/5 more. b, stray right: 1 -> 4/5, which is 1/5 less: a tie.
        (True, ()),
        (False, ("one",)),
    ],
)
def test_ties_are_no_reason(stray_is_right_in_b, chosen):
    masks = {"a": rows("110100"), "b": rows("110100"), "c": rows("111000")}
    right = rows("110100") if stray_is_right_in_b else rows("110000")
    references = {"a": rows("110000"), "b": right, "c": rows("110001")}
    assert choose_postprocessing(masks, references, ("one",)) == chosen


def test_a_class_that_no_reference_has_gains_nothing():
    assert choose_postprocessing({"a": rows("110100")}, {"a": rows("000000")}, ("one",)) == ()


def test_ignored_voxels_do_not_count():
    masks = {"a": rows("110100")}
    assert choose_postprocessing(masks, {"a": rows("110900")}, ("one",)) == ("one",)
    sparse = dataclasses.replace(rows("110900"), ignored_label=9)
    assert choose_postprocessing(masks, {"a": sparse}, ("one",)) == ()


def test_labels_beyond_the_classes_are_no_one_s():
    assert choose_postprocessing({"a": rows("220200")}, {"a": rows("110000")}, ("one",)) == ()


@pytest.mark.parametrize(
    ("masks", "references", "message"),
    [
        ({"a": rows("1")}, {"b": rows("1")}, "no prediction of b, no reference of a"),
        ({}, {}, "found no case to evaluate"),
        ({"a": rows("11")}, {"a": rows("1")}, r"of a on one grid, found \(1, 1, 2\) .* and \(1, 1, 1\)"),
        (
            {"a": Volume(np.ones((2, 2, 2), np.uint8), np.eye(4))},
            {"a": Volume(np.ones((2, 2, 2), np.uint8), np.diag([2.0, 1, 1, 1]))},
            "of a on one grid",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(masks, references, message):
    with pytest.raises(InputError, match=message):
        choose_postprocessing(masks, references, ("one",))


def test_a_config_records_classes_of_its_own():
    config = SamedConfig("b", ("one", "two"), keep_largest=("two",))
    assert SamedConfig.from_dict(config.to_dict()) == config
    for names in (("three",), ("one", "one"), ("",)):
        with pytest.raises(InputError, match=r"keep_largest must name some of class_names, \['one', 'two'\], once"):
            dataclasses.replace(config, keep_largest=names)
