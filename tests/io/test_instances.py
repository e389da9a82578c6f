"""Masks of single objects are told from masks of classes, and get the remedies that fit."""

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from samed_peft.datasets.cases import read_pair
from samed_peft.datasets.folder import Case
from samed_peft.errors import InputError
from samed_peft.io import Volume, has_whole_objects, numbered_names, read_labels, write_mask

REMEDIES = r"make the masks semantic.* or name the classes"
SIDE = 12
PER_ROW = 12


def discs(numbers, *, size=8):
    """(1, H, W): a square of the given size for each number, on a grid of places."""
    array = np.zeros((1, SIDE * PER_ROW, SIDE * PER_ROW), np.int16)
    for place, number in enumerate(numbers):
        y, x = (SIDE * index for index in divmod(place, PER_ROW))
        array[0, y : y + size, x : x + size] = number
    return array


def names_of(arrays, *, suffix=".png"):
    return numbered_names((Volume(array, path=Path(f"m{suffix}")) for array in arrays), folder=Path("masks"))


@pytest.mark.parametrize("suffix", [".png", ".nii.gz"])
@pytest.mark.parametrize(
    "counts", [(135, 60, 98), (21, 30), (12, 10, 9), (40, 3, 1, 0)], ids=["nuclei", "two maps", "few", "one large"]
)
def test_instances_are_refused_with_both_remedies(counts, suffix):
    with pytest.raises(InputError, match=rf"found numbers up to {max(counts)} in masks; .*{REMEDIES}") as error:
        names_of([discs(range(1, count + 1)) for count in counts], suffix=suffix)
    assert "smooth" not in str(error.value)


def test_instances_with_gaps_and_parts_are_refused():
    numbers = [number for number in range(1, 81) if number % 20]  # four of eighty were cut away
    array = discs(numbers)
    array[0, 0:8, 3] = 0  # one of 76 is in two parts
    with pytest.raises(InputError, match=REMEDIES):
        names_of([array, discs(range(1, 41))])
    far = [discs(range(3, 250, 9)), discs(range(2, 255, 13))]  # taken for greys
    with pytest.raises(InputError, match=REMEDIES):
        names_of(far)
    with pytest.raises(InputError, match=REMEDIES):  # more than masks can hold
        names_of([discs(range(200, 340, 2))], suffix=".nii.gz")


@pytest.mark.parametrize(
    "maps",
    [
        [range(1, 9)] * 4,
        [range(1, count + 1) for count in (8, 3, 5, 1)],
        [range(1, 14)] * 5 + [range(1, 13)],  # BTCV's organs, one scan without the last
        [range(1, 14), [n for n in range(1, 14) if n not in (4, 9)], range(1, 13)],  # gaps show classes
        [range(1, 14), range(1, 13)],
        [range(1, 105)] * 3,  # TotalSegmentator's, all in view
        [range(1, 105), range(40, 90)],
    ],
    ids=["8", "8 not all in each", "13", "13 with gaps", "13 in two scans", "104", "104 in part"],
)
def test_classes_are_not_taken_for_instances(maps):
    highest = max(max(numbers) for numbers in maps)
    assert len(names_of([discs(numbers) for numbers in maps])) == highest


def test_classes_in_many_parts_are_no_instances():
    arrays = [discs([*range(1, 31), *range(1, 31)]), discs([*range(1, 26), *range(1, 26)])]
    assert len(names_of(arrays)) == 30


def test_smooth_edges_are_called_so():
    disc = np.zeros((64, 64))
    disc[16:48, 16:48] = 255
    smooth = ndimage.gaussian_filter(disc, 2).round().astype(np.uint8)[None]
    assert len(np.unique(smooth)) > 20
    with pytest.raises(InputError, match="smooth edges"):
        names_of([smooth, smooth])


def test_a_scan_given_as_labels_has_no_objects():
    noise = np.random.default_rng(0).integers(0, 3000, (40, 128, 128)).astype(np.int16)
    assert not has_whole_objects(noise)  # at once, though it has 3,000 values


@pytest.mark.parametrize("offset", [0, 2**31 - 100])
def test_large_numbers_take_no_more_memory(offset):
    objects = discs(range(1, 41)).astype(np.int64)
    assert has_whole_objects(np.where(objects > 0, objects + offset, 0))


def test_real_organs_are_classes(real_scans):
    folder = real_scans / "btcv_like" / "Training" / "label"
    assert len(numbered_names(map(read_labels, sorted(folder.iterdir())), folder=folder)) == 11


@pytest.mark.parametrize("suffix", [".png", ".nii.gz"])
def test_instances_are_called_so_if_the_classes_are_named(tmp_path, suffix):
    like = Volume(np.zeros((1, 144, 144), np.float32), None if suffix == ".png" else np.eye(4))
    for kind, array in (("scan", like.array.astype(np.uint8)), ("mask", discs(range(1, 41)))):
        write_mask(array, like, tmp_path / f"{kind}{suffix}")
    case = Case("a", (tmp_path / f"scan{suffix}",), (tmp_path / f"mask{suffix}",))
    with pytest.raises(InputError, match=rf"hold 2, 3, .* only 0\.\.1 are expected there; .*{REMEDIES}") as error:
        read_pair(case, num_classes=1)
    assert "smooth" not in str(error.value)
