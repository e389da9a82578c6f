import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from medpy.metric.binary import dc, hd95

from samed_peft.errors import InputError
from samed_peft.metrics import score_case, score_labels, score_masks, summarise, without_nan

GOLDEN = Path(__file__).parent / "golden" / "metrics.npz"


def _cube(start, stop, shape=(8, 8, 8)):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
    return mask


def _blobs(seed, *, shape=(14, 40, 36), classes=4):
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, dtype=np.uint8)
    for label in range(1, classes + 1):
        corner = [int(rng.integers(0, size - 4)) for size in shape]
        labels[tuple(slice(c, c + int(rng.integers(2, 9))) for c in corner)] = label
    return labels


def test_samed_convention_equals_the_original_code():
    golden = np.load(GOLDEN)
    masks = golden["masks"]
    found = [
        list(score_masks(masks[p], masks[r], convention="samed", spacing_zyx_mm=(5.0, 0.7, 0.7)).values())
        for p, r in golden["pairs"]
    ]
    np.testing.assert_array_equal(found, golden["dice_hd95"])


@pytest.mark.parametrize("seed", range(6))
def test_distances_equal_medpy_on_the_full_arrays(seed):
    prediction, reference = _blobs(seed), _blobs(seed + 100)
    spacing = (3.0, 0.75, 0.8)
    scores = score_labels(prediction, reference, num_classes=4, spacing_zyx_mm=spacing)
    voxels = score_labels(prediction, reference, num_classes=4, convention="samed")
    for label in range(1, 5):
        masks = prediction == label, reference == label
        if masks[0].any() and masks[1].any():
            assert scores[label - 1]["dice"] == dc(*masks)
            assert scores[label - 1]["hd95"] == pytest.approx(hd95(*masks, voxelspacing=spacing), abs=1e-9)
            assert voxels[label - 1]["hd95"] == pytest.approx(hd95(*masks), abs=1e-9)


def test_a_cube_shifted_along_z_is_off_by_the_slice_spacing():
    # 4 slices against the same, shifted by one: 3 of 4 overlap; more than 5 % of the surface is a slice off.
    scores = score_masks(_cube((2, 1, 1), (6, 7, 7)), _cube((1, 1, 1), (5, 7, 7)), spacing_zyx_mm=(5.0, 1.0, 1.0))
    assert scores == {"dice": 0.75, "hd95": 5.0}


def test_a_flat_mask_takes_the_last_two_spacings():
    one, other = np.zeros((5, 5), bool), np.zeros((5, 5), bool)
    one[2, 1], other[2, 3] = True, True
    assert score_masks(one, other, spacing_zyx_mm=(9.0, 1.0, 0.5)) == {"dice": 0.0, "hd95": 1.0}
    assert score_masks(one, other, spacing_zyx_mm=(1.0, 0.5))["hd95"] == 1.0


def test_absent_organs():
    organ, nothing = _cube((1, 1, 1), (3, 3, 3)), np.zeros((8, 8, 8), bool)
    assert score_masks(organ, nothing, convention="samed") == {"dice": 1.0, "hd95": 0.0}
    assert score_masks(nothing, organ, convention="samed") == {"dice": 0.0, "hd95": 0.0}
    assert score_masks(nothing, nothing, convention="samed") == {"dice": 0.0, "hd95": 0.0}
    for pair in ((organ, nothing), (nothing, organ)):
        scores = score_masks(*pair)
        assert scores["dice"] == 0.0
        assert math.isnan(scores["hd95"])
    assert all(math.isnan(score) for score in score_masks(nothing, nothing).values())


def test_both_conventions_at_once_equal_one_by_one():
    prediction, reference = _blobs(1), _blobs(2)
    reference[reference == 3] = 0
    both = score_case(prediction, reference, num_classes=5, spacing_zyx_mm=(2.0, 1.0, 1.0))
    for convention, scores in both.items():
        alone = score_labels(
            prediction, reference, num_classes=5, convention=convention, spacing_zyx_mm=(2.0, 1.0, 1.0)
        )
        np.testing.assert_equal(scores, alone)
    assert both["samed"][2] == {"dice": 1.0, "hd95": 0.0}
    assert both["samed"][4] == {"dice": 0.0, "hd95": 0.0}


def test_labels_may_be_stored_as_floats_but_not_be_fractions():
    labels = _blobs(3)
    scores = score_labels(labels.astype(np.float32), labels, num_classes=4)
    assert [score["dice"] for score in scores] == [1.0] * 4
    with pytest.raises(InputError, match="probabilities"):
        score_labels(labels * 0.5, labels, num_classes=4)


@pytest.mark.parametrize("bad", [14, -1, np.nan])
def test_labels_without_a_name_are_refused(bad):
    labels = np.zeros((2, 4, 4), np.float32)
    labels[0, 0, 0] = bad
    with pytest.raises(InputError, match=rf"prediction hold {bad:g}, but only 0..8"):
        score_labels(labels, np.zeros((2, 4, 4)), num_classes=8)


def test_unusable_arguments_are_refused():
    mask = np.ones((2, 3, 4), bool)
    with pytest.raises(InputError, match=r"\(2, 3, 4\) and \(2, 3, 5\)"):
        score_masks(mask, np.ones((2, 3, 5), bool))
    with pytest.raises(InputError, match=r"\(2,\)"):
        score_masks(mask[:, 0, 0], mask[:, 0, 0])
    with pytest.raises(InputError, match="standard, samed; found 'paper'"):
        score_masks(mask, mask, convention="paper")
    for spacing in ((0.0, 1.0, 1.0), (1.0, math.nan, 1.0), (1.0, 1.0)):
        with pytest.raises(InputError, match="spacing_zyx_mm"):
            score_masks(mask, mask, spacing_zyx_mm=spacing)


def test_means_leave_undefined_scores_out_and_count_them():
    nan = math.nan
    cases = [
        {"standard": [{"dice": 0.5, "hd95": 4.0}, {"dice": nan, "hd95": nan}], "samed": [_zero(), _zero()]},
        {"standard": [{"dice": 0.0, "hd95": nan}, {"dice": nan, "hd95": nan}], "samed": [_zero(), _zero()]},
    ]
    summary = summarise(cases, ["liver", "spleen"])
    assert summary["standard"]["classes"]["liver"] == {"dice": 0.25, "hd95": 4.0, "n_valid": 2, "n_cases": 2}
    assert summary["standard"]["mean"] == {"dice": 0.25, "hd95": 4.0}
    assert without_nan(summary)["standard"]["classes"]["spleen"] == {
        "dice": None,
        "hd95": None,
        "n_valid": 0,
        "n_cases": 2,
    }
    assert summary["samed"]["classes"]["spleen"]["n_valid"] == 2


def _zero():
    return {"dice": 0.0, "hd95": 0.0}


def _gathered(process_id, *, cases, cache_dir, num_process):
    from samed_peft.metrics.gather import SegmentationScores

    metric = SegmentationScores(
        ["a", "b", "c", "d", "absent"],
        num_process=num_process,
        process_id=process_id,
        cache_dir=str(cache_dir),
        timeout=20,
    )
    for case, seed in cases[process_id]:
        metric.add(prediction=_blobs(seed), reference=_blobs(seed + 50), case=case)
    return metric.compute()


def _expected(seeds):
    cases = [score_case(_blobs(seed), _blobs(seed + 50), num_classes=5) for seed in seeds]
    return without_nan(summarise(cases, ["a", "b", "c", "d", "absent"]))


def test_the_evaluate_metric_agrees_with_the_functions(tmp_path):
    found = _gathered(0, cases=[[("x", 1), ("y", 2)]], cache_dir=tmp_path, num_process=1)
    assert found == _expected([1, 2])


@pytest.mark.parametrize(
    "cases",
    [
        [[("x", 1), ("y", 2)], [("z", 3), ("x", 1)]],  # the padding sampler repeats x
        [[("x", 1), ("y", 2), ("z", 3)], []],
    ],
)
def test_the_evaluate_metric_gathers_across_processes(tmp_path, cases):
    def run(process_id):
        return _gathered(process_id, cases=cases, cache_dir=tmp_path, num_process=2)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    assert first == _expected([1, 2, 3])
    assert second is None


def test_the_evaluate_metric_names_the_case_it_refuses(tmp_path):
    from samed_peft.metrics.gather import SegmentationScores

    metric = SegmentationScores(["a"], cache_dir=str(tmp_path))
    with pytest.raises(InputError, match="case7: prediction and reference"):
        metric.add(prediction=np.ones((1, 2, 2)), reference=np.ones((1, 2, 3)), case="case7")
