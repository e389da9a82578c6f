"""Rare classes come as often as frequent ones, and neighbours lie at their distance."""

import numpy as np
import pytest
from datasets import Dataset

from samed_peft.errors import InputError
from samed_peft.training.batches import epoch_batches
from samed_peft.training.sampling import ClassBalance, neighbour_rows


def labelled(*labels):
    return [{"label": np.array([values], np.uint8)} for values in labels]


def test_a_rare_class_is_seen_as_often_as_a_frequent_one():
    rows = labelled([0, 1], *[[0, 0]] * 49, *[[2, 2]] * 50)
    balance = ClassBalance.of_rows(rows, share=1.0)
    order = balance.order(100, np.random.default_rng(0))
    assert 35 < (order == 0).sum() < 65
    assert (order >= 50).sum() == 100 - (order == 0).sum()


def test_the_rest_of_an_epoch_stays_a_permutation():
    balance = ClassBalance.of_rows(labelled(*[[0, 0]] * 30, [1, 1]), share=0.5)
    order = balance.order(31, np.random.default_rng(0))
    plain = order[order != 30]
    assert len(np.unique(plain)) == len(plain) >= 14


def test_processes_share_the_order():
    balance = ClassBalance.of_rows(labelled(*[[0, 1]] * 5, *[[2, 2]] * 6), share=0.5)
    options = {"seed": 1, "epoch": 3, "balance": balance}
    one = epoch_batches(11, batch_size=4, **options)
    two = [epoch_batches(11, batch_size=2, process=p, num_processes=2, **options) for p in range(2)]
    assert [sorted(batch) for batch in one] == [sorted(a + b) for a, b in zip(*two, strict=True)]


def test_ignored_pixels_are_no_class():
    with pytest.raises(InputError, match="none of the 2 training slices shows any class"):
        ClassBalance.of_rows(labelled([0, 255], [0, 0]), share=0.5)


def rows_of(cases):
    columns = [(case, number, spacing) for case, (numbers, spacing) in cases.items() for number in numbers]
    names = ("case", "slice", "slice_spacing_mm")
    return Dataset.from_dict(dict(zip(names, map(list, zip(*columns, strict=True)), strict=True)))


def test_neighbours_lie_at_their_distance_and_within_the_scan():
    rows = rows_of({"thin": (range(5), 1.0), "thick": (range(3), 5.0)})
    assert neighbour_rows(rows, 2.0).tolist() == [
        *([0, 2], [1, 3], [0, 4], [1, 3], [2, 4]),  # two slices away; at the ends the slice itself
        *([5, 6], [5, 7], [6, 7]),  # at least the next slice
    ]


def test_a_slice_that_was_left_out_is_replaced_by_the_slice_itself():
    assert neighbour_rows(rows_of({"a": ([0, 2, 3], 1.0)}), 1.0).tolist() == [[0, 0], [1, 2], [1, 2]]


def test_neighbours_need_a_spacing():
    with pytest.raises(InputError, match=r"neighbouring slices at 2 mm; a has none. Leave neighbour_mm out"):
        neighbour_rows(rows_of({"a": (range(2), None)}), 2.0)
