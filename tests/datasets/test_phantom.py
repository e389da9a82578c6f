"""Analytic abdominal CT."""

import numpy as np
import pytest

from samed_peft.datasets import list_cases, load_synapse, phantom_case, write_phantom
from samed_peft.errors import InputError
from samed_peft.io import read_labels, read_volume

RAW_LABELS = (1, 2, 3, 4, 6, 7, 8, 11)
SMALL = {"shape_dhw": (12, 48, 48), "spacing_zyx_mm": (10.0, 8.0, 8.0)}


@pytest.mark.parametrize("case", [1, 2, 5, 6, 7, 40])
def test_organs_are_large_and_plausible(case):
    image, label = phantom_case(case, seed=1234)
    assert (image.dtype, label.dtype, image.shape, label.shape) == (
        np.int16,
        np.uint8,
        (24, 96, 96),
        (24, 96, 96),
    )
    counts = np.bincount(label.ravel(), minlength=12)
    assert set(np.flatnonzero(counts)) == {0, *RAW_LABELS}
    assert counts[list(RAW_LABELS)].min() >= 150
    assert counts[6] == counts[1:].max(), "the liver is the largest organ"
    medians = {raw: float(np.median(image[label == raw])) for raw in RAW_LABELS}
    ranges = {
        1: (90, 150),
        2: (120, 200),
        4: (-20, 60),
        6: (80, 140),
        7: (-40, 70),
        8: (100, 270),
        11: (20, 120),
    }
    for raw, (low, high) in ranges.items():
        assert low < medians[raw] < high
    assert image[:, :4, :4].max() < -800, "air outside the body"


def test_sides_follow_the_affine(tmp_path):
    write_phantom(tmp_path / "p", cases=[3], seed=0)
    labels = read_labels(tmp_path / "p" / "Training" / "label" / "label0003.nii.gz")
    assert labels.orientation == "LAS"
    assert labels.spacing_zyx_mm == (5.0, 4.0, 4.0)

    def centre_ras_mm(raw):
        zyx = np.argwhere(labels.array == raw).mean(axis=0)
        return (labels.affine @ [*zyx[::-1], 1])[:3]

    right = 0
    assert centre_ras_mm(6)[right] > 20, "the liver lies on the patient's right"
    assert centre_ras_mm(1)[right] < -20, "the spleen on the left"
    assert centre_ras_mm(2)[right] > 0 > centre_ras_mm(3)[right]
    assert centre_ras_mm(7)[1] > centre_ras_mm(8)[1], "the stomach lies in front of the aorta"


def test_cases_and_seeds_differ_and_repeat():
    first = phantom_case(5, seed=0, **SMALL)
    again = phantom_case(5, seed=0, **SMALL)
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    for other in (phantom_case(6, seed=0, **SMALL), phantom_case(5, seed=1, **SMALL)):
        overlap = 2 * ((first[1] == 6) & (other[1] == 6)).sum() / ((first[1] == 6).sum() + (other[1] == 6).sum())
        assert 0.5 < overlap < 0.98


def test_folder_is_raw_btcv(tmp_path):
    folder = write_phantom(tmp_path / "phantom", cases=(5, 6, 1), seed=0, **SMALL)
    assert folder == tmp_path / "phantom"
    assert list_cases(folder) == ["case0001", "case0005", "case0006"]
    image, label = phantom_case(5, seed=0, **SMALL)
    np.testing.assert_array_equal(read_volume(folder / "Training" / "img" / "img0005.nii.gz").array, image)
    np.testing.assert_array_equal(read_labels(folder / "Training" / "label" / "label0005.nii.gz").array, label)
    train = load_synapse(folder, "train", cache_dir=tmp_path / "cache", num_proc=1)
    test = load_synapse(folder, "test", cache_dir=tmp_path / "cache")
    assert (len(train), len(test)) == (24, 1)
    assert set(np.unique(test[0]["label"])) == set(range(9))


def test_equal_bytes_and_replacement(tmp_path):
    for name in ("one", "two", "one"):
        write_phantom(tmp_path / name, cases=[5], seed=0, **SMALL)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").glob("**/*.*")]
    assert len(files) == 3
    assert all((tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes() for path in files)


def test_other_peoples_files_are_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="must not be lost"):
        write_phantom(tmp_path, cases=[5], seed=0, **SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("wrong", [{"cases": []}, {"cases": [5, 5]}, {"cases": [-1]}, {"cases": [10000]}, {"seed": -1}])
def test_bad_arguments(tmp_path, wrong):
    with pytest.raises(InputError, match="expected"):
        write_phantom(tmp_path / "phantom", **{"cases": [5], "seed": 0, **wrong})
    assert not (tmp_path / "phantom").exists()
