"""The data sets of zero_flags.py: sizes, numbers of cases, and labels equal to the source's."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import wilcoxon
from zero_flags_sources import write_ct, write_hippocampi

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import zero_flags_data as data

from samed_peft.config import SYNAPSE_CLASSES
from samed_peft.datasets import choose_splits, open_folder, take_fingerprint
from samed_peft.datasets.cases import read_reference, read_scan
from samed_peft.errors import InputError


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return {"hippocampus": write_hippocampi(root / "Task04_Hippocampus"), "ct": write_ct(root / "btcv")}


def written(name, sources, root):
    folder = data.folder_of(name, data=root, hippocampus=sources["hippocampus"])
    data.write_absent(name, folder, **sources)
    return open_folder(folder)


def test_hippocampi_are_used_as_they_are(sources, tmp_path):
    folder = written("hippocampus", sources, tmp_path)
    assert folder.root == sources["hippocampus"]
    assert len(folder.cases) == 60
    assert list(tmp_path.iterdir()) == []


def test_phantom_has_cases_for_folds(sources, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "write_phantom", lambda folder, **options: asked.append((folder, options)))
    data.write_absent("phantom", tmp_path / "phantom", **sources)
    assert asked == [(tmp_path / "phantom", {"cases": range(40), "seed": 0})]
    # Fewer than six held-out cases could not differ significantly by Wilcoxon's test.
    assert len(choose_splits([str(case) for case in range(data.PHANTOM_CASES)]).test) == 8
    assert wilcoxon(np.full(8, 0.1)).pvalue < 0.05


def check_slices(folder, ct):
    """Slices put together are the scan and its labels, by name."""
    source = open_folder(ct).case("case0001")
    scan, labels = read_scan(source), read_reference(source).array
    pairs = [(read_scan(folder.case(name)), read_reference(folder.case(name)).array) for name in folder.cases]
    assert len(pairs) == 20
    for number, (one, _) in enumerate(pairs):
        assert one.array.shape == (1, *scan.array.shape[1:])
        np.testing.assert_allclose(one.affine @ [3, 2, 0, 1], scan.affine @ [3, 2, number, 1], atol=1e-4)
    np.testing.assert_array_equal(np.concatenate([one.array for one, _ in pairs]), scan.array)
    stacked = np.concatenate([of_one for _, of_one in pairs])
    of_source, of_slices = (np.array(["", *names]) for names in (SYNAPSE_CLASSES, folder.class_names))
    np.testing.assert_array_equal(of_slices[stacked], of_source[labels])
    assert set(np.unique(stacked)) == {*range(len(folder.class_names) + 1)}  # no class without a voxel


def test_slices_of_a_ct(sources, tmp_path):
    folder = written("slices", sources, tmp_path)
    assert folder.class_names == ("spleen", "liver", "aorta")
    check_slices(folder, sources["ct"])
    assert take_fingerprint(folder).modality == "CT"


def test_slices_of_a_real_ct(real_scans, tmp_path):
    ct = real_scans / "btcv_like"
    data.write_absent("slices", tmp_path / "slices", hippocampus=tmp_path, ct=ct)
    folder = open_folder(tmp_path / "slices")
    assert folder.class_names == ("spleen", "liver", "stomach", "aorta", "pancreas")
    check_slices(folder, ct)


def test_pictures_of_hippocampi(sources, tmp_path):
    folder = written("pictures", sources, tmp_path)
    assert folder.cases == tuple(f"hippocampus_{case:03d}" for case in range(59))
    source = open_folder(sources["hippocampus"])
    for case in folder.cases[:4]:
        scan, labels = read_scan(source.case(case)).array, read_reference(source.case(case)).array
        number = int(case[-3:])
        if number % 2 == 0:
            of_slice, of_scan = (array[::-1, :, 1 + number % 3] for array in (labels, scan))
        else:
            of_slice, of_scan = (array[::-1, 2, :] for array in (labels, scan))  # the first of equal ones
        stored = np.array(Image.open(tmp_path / "pictures" / "masks" / f"{case}.png"))
        picture = np.array(Image.open(tmp_path / "pictures" / "images" / f"{case}.png"))
        assert picture.dtype == stored.dtype == np.uint8
        assert picture.shape == stored.shape == tuple(6 * size for size in of_slice.shape)
        for row, column in ((0, 0), (5, 5), (2, 3)):
            np.testing.assert_array_equal(stored[row::6, column::6], 255 * (of_slice > 0))
        # Middles of voxels, between two pixels of the picture, have the scan's intensities.
        low, high = np.percentile(scan, (0.5, 99.5))
        middles = (picture[2::6, 2::6].astype(float) + picture[3::6, 3::6]) / 2
        expected = 255 * np.clip((of_scan - low) / (high - low), 0, 1)
        assert np.abs(middles - expected)[1:-1, 1:-1].mean() < 8
    assert set(np.unique(read_reference(folder.case("hippocampus_000")).array)) == {0, 1}


def test_real_pictures_have_a_few_hundred_pixels(real_scans, tmp_path):
    data.write_absent("pictures", tmp_path / "p", hippocampus=real_scans / "Task04_Hippocampus", ct=tmp_path)
    folder = open_folder(tmp_path / "p")
    assert len(folder.cases) == 59
    for case in folder.cases:
        size = read_scan(folder.case(case)).array.shape[1:]
        assert 140 <= min(size) <= max(size) <= 400
        assert read_reference(folder.case(case)).array.any()


def test_five_hippocampi(sources, tmp_path):
    folder = written("five", sources, tmp_path)
    source = open_folder(sources["hippocampus"])
    assert folder.cases == source.cases[:5]
    assert (folder.class_names, folder.modality) == (source.class_names, source.modality)
    for case in folder.cases:
        assert folder.images[case].read_bytes() == source.images[case].read_bytes()
        assert folder.labels[case].read_bytes() == source.labels[case].read_bytes()


def test_a_data_set_that_exists_is_left_alone(sources, tmp_path):
    written("five", sources, tmp_path)
    before = (tmp_path / "five" / "dataset.json").stat().st_mtime_ns
    written("five", sources, tmp_path)
    assert (tmp_path / "five" / "dataset.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("name", "message"), [("pictures", "expected 59 cases at least in .*, found 3"), ("slices", "20 slices at least")]
)
def test_small_sources_are_refused(name, message, tmp_path):
    small = {"hippocampus": write_hippocampi(tmp_path / "h", 3), "ct": write_ct(tmp_path / "ct", 19)}
    with pytest.raises(InputError, match=message):
        data.write_absent(name, tmp_path / name, **small)
    assert not (tmp_path / name).exists()
