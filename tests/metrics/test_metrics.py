import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from medpy.metric.binary import assd, dc, hd95, jc

from samed_peft.config import SYNAPSE_CLASSES
from samed_peft.datasets import phantom_case
from samed_peft.errors import InputError
from samed_peft.metrics import (
    CONVENTIONS,
    METRICS,
    confidence_intervals,
    format_metric,
    medpy_scores,
    presence,
    score_case,
    score_labels,
    score_masks,
    summarise,
    without_nan,
)
from samed_peft.metrics.surfaces import border_voxels, surface_distances

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics.npz"


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


def test_each_metric_has_one_record():
    assert list(METRICS)[:5] == ["dice", "iou", "hd95", "assd", "surface_dice"]
    distances = {name for name, record in METRICS.items() if record.unit_in("standard") == "mm"}
    assert distances == {name for name, record in METRICS.items() if not record.higher_is_better} == {"hd95", "assd"}
    assert {METRICS[name].unit_in("samed") for name in distances} == {"voxels"}
    assert METRICS["dice"].unit_in("samed") == METRICS["dice"].unit_in("standard") == ""
    for record in METRICS.values():
        assert record.absent.keys() == set(CONVENTIONS)
        assert all(scores.keys() == {"missed", "spurious", "absent"} for scores in record.absent.values())
    with pytest.raises(TypeError):
        METRICS["dice"] = METRICS["iou"]


def test_scores_print_with_the_digits_of_their_metric():
    assert [format_metric(name, 1 / 3) for name in ("dice", "hd95")] == ["0.3333", "0.33"]
    assert [format_metric("hd95", value) for value in (None, math.nan, 7)] == ["n/a", "n/a", "7.00"]


def test_samed_convention_equals_the_original_code():
    golden = np.load(GOLDEN)
    masks = golden["masks"]
    found = [
        list(score_masks(masks[p], masks[r], convention="samed", spacing_zyx_mm=(5.0, 0.7, 0.7)).values())
        for p, r in golden["pairs"]
    ]
    np.testing.assert_array_equal(found, golden["dice_hd95"])


def test_medpys_scores_are_those_of_the_original_code():
    golden = np.load(GOLDEN)
    for (predicted, referenced), expected in zip(golden["pairs"], golden["dice_hd95"], strict=True):
        pair = (golden["masks"][predicted] != 0).astype(np.uint8), (golden["masks"][referenced] != 0).astype(np.uint8)
        for crop in (True, False):
            (score,) = medpy_scores(*pair, num_classes=1, crop=crop)
            assert [score["dice"], score["hd95"]] == list(expected)


def test_medpy_confirms_the_scores_of_phantoms_with_absent_organs():
    spacing = (3.0, 0.75, 0.8)
    phantoms = [phantom_case(case, seed=0, shape_dhw=(12, 48, 48), spacing_zyx_mm=spacing)[1] for case in (0, 1)]
    prediction, reference = (np.minimum(labels, 13) for labels in phantoms)
    reference[reference == 2] = 0
    prediction[prediction == 3] = 0
    for labels in (prediction, reference):
        labels[labels == 5] = 0
    ours = score_case(prediction, reference, num_classes=13, spacing_zyx_mm=spacing)
    theirs = medpy_scores(prediction, reference, num_classes=13)
    assert [theirs[label - 1] for label in (2, 3, 5)] == [
        {"dice": 1.0, "hd95": 0.0},
        {"dice": 0.0, "hd95": 0.0},
        {"dice": 0.0, "hd95": 0.0},
    ]
    assert ours["presence"].count("both") >= 5
    for found, expected in zip(ours["samed"], theirs, strict=True):
        assert [found["dice"], found["hd95"]] == pytest.approx(list(expected.values()), abs=1e-9)
    in_mm = medpy_scores(prediction, reference, num_classes=13, spacing_zyx_mm=spacing)
    for found, expected, there in zip(ours["standard"], in_mm, ours["presence"], strict=True):
        if there == "both":
            assert found["hd95"] == pytest.approx(expected["hd95"], abs=1e-9)
    assert theirs == medpy_scores(prediction, reference, num_classes=13, crop=False)


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


def _random_mask(rng, shape):
    """A mask of one of the kinds that break shortcuts: noise, a box, one voxel, everything, or a box on the edge."""
    kind = rng.integers(6)
    if kind == 0:
        mask = rng.random(shape) < rng.uniform(0.02, 0.9)
    elif kind == 1:
        mask = np.ones(shape, bool)
    else:
        start = [int(rng.integers(size)) for size in shape]
        stop = [
            low + 1 if kind == 2 else int(rng.integers(low + 1, size + 1))
            for low, size in zip(start, shape, strict=True)
        ]
        mask = np.zeros(shape, bool)
        mask[tuple(slice(low, high) for low, high in zip(start, stop, strict=True))] = True
        if kind == 3:
            mask &= rng.random(shape) < 0.7
        elif kind == 4:
            mask[(0,) * len(shape)] = mask[(-1,) * len(shape)] = True
    if not mask.any():
        mask[tuple(int(rng.integers(size)) for size in shape)] = True
    return mask


@pytest.mark.parametrize(
    "shape", [(9, 12, 11), (1, 20, 16), (14, 1, 9), (8, 10, 1), (1, 1, 1), (1, 1, 7), (24, 19), (1, 9), (30, 2, 3)]
)
def test_all_metrics_equal_medpy_on_random_masks(shape):
    rng = np.random.default_rng(sum(shape))
    for _ in range(25):
        masks = _random_mask(rng, shape), _random_mask(rng, shape)
        spacing = tuple(rng.uniform(0.3, 6.0, len(shape)))
        both = score_case(*(mask.view(np.uint8) for mask in masks), num_classes=1, spacing_zyx_mm=spacing)
        for convention, unit in (("standard", spacing), ("samed", (1.0,) * len(shape))):
            expected = {
                "dice": dc(*masks),
                "iou": jc(*masks),
                "hd95": hd95(*masks, voxelspacing=unit),
                "assd": assd(*masks, voxelspacing=unit),
            }
            for name, value in expected.items():
                assert both[convention][0][name] == pytest.approx(value, abs=1e-9, rel=1e-9), (name, convention)
            assert score_masks(*masks, convention=convention, spacing_zyx_mm=spacing) == {
                name: both[convention][0][name] for name in ("dice", "hd95")
            }


def test_sparse_and_dense_borders_have_equal_distances():
    # The same pair once by a tree of points and once, with clutter between them, by a distance transform.
    one, other = _cube((2, 2, 2), (3, 3, 3)), _cube((6, 2, 2), (7, 3, 3))
    sparse = surface_distances(border_voxels(one), border_voxels(other), spacing=(2.5, 1.0, 1.0))
    np.testing.assert_array_equal(sparse.all, [10.0, 10.0])
    rng = np.random.default_rng(0)
    masks = [rng.random((30, 30, 30)) < share for share in (0.5, 0.01)]
    found = surface_distances(*(border_voxels(mask) for mask in masks), spacing=(2.0, 0.7, 0.9))
    assert found.hd95 == pytest.approx(hd95(*masks, voxelspacing=(2.0, 0.7, 0.9)), abs=1e-9)


def test_surface_dice_by_hand():
    # Two 1 x 4 bars, two rows of 3 mm apart, overlapping in three columns: all voxels are border.
    one, other = np.zeros((5, 6), np.uint8), np.zeros((5, 6), np.uint8)
    one[1, 0:4] = other[3, 1:5] = 1
    # Distances: 6 mm where a column is shared (3 voxels each way), hypot(6, 1) at the two ends.
    for tolerance, share in ((0.0, 0.0), (5.9, 0.0), (6.0, 6 / 8), (6.05, 6 / 8), (6.1, 1.0)):
        scores = score_case(one, other, num_classes=1, spacing_zyx_mm=(3.0, 1.0), tolerance_mm=tolerance)
        assert scores["standard"][0]["surface_dice"] == share
    # In voxels the rows are 2 apart, the ends hypot(2, 1) = 2.24.
    for tolerance, share in ((1.9, 0.0), (2.0, 6 / 8), (2.25, 1.0)):
        scores = score_case(one, other, num_classes=1, spacing_zyx_mm=(3.0, 1.0), tolerance_mm=tolerance)
        assert scores["samed"][0]["surface_dice"] == share


def test_the_tolerance_forgives_rounding():
    one, other = np.zeros((1, 30), np.uint8), np.zeros((1, 30), np.uint8)
    one[0, 2] = other[0, 5] = 1
    assert 3 * 0.1 > 0.3
    (score,) = score_labels(one, other, num_classes=1, spacing_zyx_mm=(1.0, 0.1), tolerance_mm=0.3)
    assert score["surface_dice"] == 1.0


@pytest.mark.parametrize("tolerance", [-1.0, math.nan, math.inf])
def test_an_unusable_tolerance_is_refused(tolerance):
    with pytest.raises(InputError, match="tolerance_mm must be"):
        score_case(np.ones((2, 2)), np.ones((2, 2)), num_classes=1, tolerance_mm=tolerance)


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
    for convention in CONVENTIONS:
        scores = both[convention]
        alone = score_labels(
            prediction, reference, num_classes=5, convention=convention, spacing_zyx_mm=(2.0, 1.0, 1.0)
        )
        np.testing.assert_equal(scores, alone)
    # Class 3 is in the prediction only, class 5 in neither: further metrics follow SAMed's two.
    assert both["samed"][2] == {"dice": 1.0, "iou": 1.0, "hd95": 0.0, "assd": 0.0, "surface_dice": 1.0}
    assert both["samed"][4] == _zero()
    assert {name for name, value in both["standard"][2].items() if math.isnan(value)} == {"hd95", "assd"}
    assert both["standard"][2]["surface_dice"] == both["standard"][2]["iou"] == 0.0
    assert all(math.isnan(value) for value in both["standard"][4].values())
    assert [presence(both, index) for index in range(5)] == ["both", "both", "spurious", "both", "absent"]
    assert both["presence"] == ["both", "both", "spurious", "both", "absent"]
    turned = score_case(reference, prediction, num_classes=5)
    assert presence(turned, 2) == "missed"


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


def _score(dice=math.nan, hd95=math.nan):
    scores = {"dice": dice, "iou": dice / (2 - dice), "hd95": hd95, "assd": hd95 / 2, "surface_dice": dice}
    return dict.fromkeys(METRICS, math.nan) | scores


def _zero():
    return dict.fromkeys(METRICS, 0.0)


def _in_both(scores):
    return dict.fromkeys(CONVENTIONS, scores)


def test_means_leave_undefined_scores_out_and_count_them():
    # Liver: half right in the first case, missed in the second. Spleen: in neither, then where it should not be.
    first = {"standard": [_score(0.5, 4.0), _score()], "samed": [_score(0.5, 2.0), _zero()]}
    second = {"standard": [_score(0.0), _score(0.0)], "samed": [_zero(), {**_zero(), "dice": 1.0}]}
    cases = [{**first, "presence": ["both", "absent"]}, {**second, "presence": ["missed", "spurious"]}]
    summary = summarise(cases, ["liver", "spleen"])
    counts = {"n_cases": 2, "n_absent": 0, "n_missed": 1, "n_spurious": 0}
    undefined = dict.fromkeys(METRICS, math.nan)
    means = undefined | {"dice": 0.25, "iou": 1 / 6, "hd95": 4.0, "assd": 2.0, "surface_dice": 0.25}
    assert summary["standard"]["classes"]["liver"] == {**means, "n_valid": 2, **counts}
    assert summary["standard"]["mean"] == {
        **means,
        "dice": 0.125,
        "iou": 1 / 12,
        "surface_dice": 0.125,
    }
    assert without_nan(summary)["standard"]["classes"]["spleen"] == {
        **without_nan(undefined | {"dice": 0.0, "iou": 0.0, "surface_dice": 0.0}),
        **{"n_valid": 1, "n_cases": 2, "n_absent": 1, "n_missed": 0, "n_spurious": 1},
    }
    assert summary["samed"]["classes"]["spleen"]["n_valid"] == 2


def _intervals(cases, names, *, seed=0, **options):
    return confidence_intervals(cases, names, rng=np.random.default_rng(seed), **options)


def test_confidence_intervals_equal_a_plain_bootstrap():
    rng = np.random.default_rng(3)
    dices = rng.uniform(0.4, 1.0, (12, 2))
    dices[4, 1] = dices[7, 1] = np.nan
    scores = [[_score(*pair) for pair in zip(row, 10 * row, strict=True)] for row in dices]
    cases = [_in_both(row) for row in scores]
    found = _intervals(cases, ["a", "b"])
    weights = np.random.default_rng(0).multinomial(12, [1 / 12] * 12, size=2000)
    samples = [np.repeat(dices, counts, axis=0) for counts in weights]
    means = np.array([np.nanmean(sample, axis=0) for sample in samples])
    for index, name in enumerate("ab"):
        expected = np.percentile(means[:, index], [2.5, 97.5])
        np.testing.assert_allclose(found["standard"]["classes"][name]["dice"], expected, atol=1e-12)
        np.testing.assert_allclose(found["samed"]["classes"][name]["hd95"], 10 * expected, atol=1e-11)
    np.testing.assert_allclose(found["standard"]["mean"]["dice"], np.percentile(means.mean(axis=1), [2.5, 97.5]))


def test_confidence_intervals_follow_from_the_generator_alone():
    cases = [_in_both([_score(dice, 1.0)]) for dice in (0.1, 0.5, 0.63, 0.9)]
    found, again, other = (_intervals(cases, ["a"], seed=seed, resamples=99)["standard"]["mean"] for seed in (0, 0, 1))
    assert found == again
    assert found["dice"] != other["dice"]
    assert found["hd95"] == (1.0, 1.0)  # equal scores have no spread


def test_fewer_than_two_scored_cases_have_no_interval():
    one, none = [_in_both([_score(0.5, 1.0), _score()])], _in_both([_score(), _score()])
    for cases in (one, [*one, none, none]):
        found = _intervals(cases, ["a", "b"])["standard"]
        for interval in (found["classes"]["a"]["dice"], found["classes"]["b"]["dice"], found["mean"]["dice"]):
            assert all(math.isnan(end) for end in interval)


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


def test_the_benchmark_finds_equal_scores(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "metrics.py"
    options = ("--shape", "12", "48", "48", "--repeats", "1", "--results_dir", str(tmp_path))
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (result,) = tmp_path.glob("metrics-*-12x48x48.json")
    for pair in json.loads(result.read_text(encoding="utf-8"))["pairs"].values():
        assert pair["largest_difference"] <= 1e-9
        assert pair["scores"].keys() == set(SYNAPSE_CLASSES)
