"""The comparison of zero flags with hand-tuned runs: its variants, its runs and its table."""

import argparse
import json
import math
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import wilcoxon
from zero_flags_sources import write_ct, write_hippocampi

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import lora_rank  # noqa: E402
import rank_table  # noqa: E402
import zero_flags  # noqa: E402
import zero_flags_data as data  # noqa: E402

from samed_peft.config.options import parse_run_options  # noqa: E402
from samed_peft.errors import InputError  # noqa: E402
from samed_peft.evaluation import Report  # noqa: E402
from samed_peft.metrics import METRICS  # noqa: E402


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return {"hippocampus": write_hippocampi(root / "Task04_Hippocampus"), "ct": write_ct(root / "btcv")}


def arguments(folder, **changes):
    values = {"base": "tiny-sam", "output_dir": folder, "results_dir": folder / "r", "candidates": None}
    values |= {"recipe": "finetune", "launch": "", "options": ["--max_minutes", "3"], "data_dir": folder / "set"}
    return argparse.Namespace(**values | changes)


def command(variant, folder, seed=3):
    args = arguments(folder)
    words = lora_rank.command(lora_rank.Planned.of(variant, seed, args), args)
    return words[words.index(str(BENCHMARKS.parent / "recipes" / "finetune.py")) + 1 :]


def test_zero_flags_are_none_but_those_of_every_run(tmp_path):
    words = command(zero_flags.ZERO, tmp_path)
    assert words[::2] == ["--data_dir", "--output_dir", "--base", "--seed", "--max_minutes"]
    assert words[-5:] == ["tiny-sam", "--seed", "3", "--max_minutes", "3"]


@pytest.mark.parametrize("base", ["tiny-sam", "facebook/sam-vit-base"])
@pytest.mark.parametrize("name", data.DATA_SETS)
def test_variants_are_options_of_the_recipe(name, base, tmp_path, monkeypatch):
    parser = runpy.run_path(str(BENCHMARKS.parent / "recipes" / "finetune.py"))["build_parser"]()
    rows = zero_flags.variants(name, 7, arguments(tmp_path, base=base))
    assert len({row.name for row in rows}) == len(rows) == 6
    assert len({row.options for row in rows}) == 6
    for row in rows:
        args, adapter, training = parse_run_options(parser, command(row, tmp_path))
        assert args.fold == (2 if name == "five" else 0)
        assert training.max_minutes == 3
        assert args.validation_share == (0 if row.kind == "tuned" else 0.2)
        assert args.preset == ("samed" if row.name == "by hand" else "plan")
        if row.name == "by hand":
            assert adapter["neighbour_mm"] is None
            assert args.mixed_precision in ("no", "bf16", "fp16")
    sizes = {parse_run_options(parser, command(row, tmp_path))[1]["image_size"] for row in rows}
    assert sizes <= ({64, 128, 256, 512} if base == "tiny-sam" else {256, 512, 1024})


def test_fewer_candidates(tmp_path):
    rows = zero_flags.variants("five", 0, arguments(tmp_path, candidates=1))
    assert [row.name for row in rows] == ["zero flags", "all cases"]


def results(means, *, seeds=(0, 1), cases=8, first_case=0):
    """Results of variants (name -> mean Dice); case and seed add a little."""
    found = []
    for name, mean in means.items():
        for seed in seeds:
            of_seed = range(first_case, first_case + cases)
            scores = [
                {**dict.fromkeys(METRICS, math.nan), "dice": mean + 0.01 * case + 0.002 * seed, "hd95": 3.0}
                for case in of_seed
            ]
            by_case = {
                f"c{case}": {"standard": [score], "samed": [score], "presence": ["both"]}
                for case, score in zip(of_seed, scores, strict=True)
            }
            kind = "zero" if name == "zero flags" else "tuned"
            found.append({**Report(("a",), by_case).to_dict(), "seed": seed, "kind": kind, "variant": name})
    return found


MEANS = {"zero flags": 0.57, "all cases": 0.45, "by hand": 0.6}


def test_zero_flags_beside_the_best_candidate():
    found = zero_flags.Comparison.of("phantom", results(MEANS))
    assert found.candidates[found.best].name == "by hand"
    # Each case differs by the same sign, and two candidates are compared.
    assert found.p_values == pytest.approx([2 * wilcoxon(np.full(8, 0.1)).pvalue] * 2)
    text = zero_flags.text_of([found], base="tiny-sam", minutes=3)
    assert "The base is not SAM" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| phantom"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1:3] == ["2", "8"]
    assert cells[3].startswith(f"{0.57 + 0.035 + 0.001:.4f} (0.5")
    assert cells[4] == "by hand"
    assert cells[5].startswith(f"{0.6 + 0.036:.4f} (0.6")
    assert cells[6].startswith(f"{0.606 / 0.636:.3f} (0.9")
    assert cells[7] == "0.016"
    rows = {line.split("|")[1].strip(): line.split("|")[3].strip() for line in text.splitlines() if "| 3.00 |" in line}
    assert rows == {"zero flags": "", "all cases": "-0.1200", "by hand": "+0.0300"}


def test_ratios_draw_the_same_cases_for_both():
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.2, 0.9, (1, 30))
    assert zero_flags.ratio(0.9 * scores, scores, rng=rng) == pytest.approx((0.9, 0.9, 0.9))
    value, low, high = zero_flags.ratio(scores, rng.uniform(0.2, 0.9, (3, 30)), rng=rng)
    assert low < value < high
    assert np.isnan(zero_flags.ratio(scores, 0 * scores, rng=rng)).all()


def test_only_seeds_that_all_variants_have_are_compared():
    found = results(MEANS, seeds=(0, 1, 2))
    stopped = [run for run in found if not (run["variant"] == "by hand" and run["seed"] == 2)]
    comparison = zero_flags.Comparison.of("phantom", stopped)
    assert comparison.n_runs == 2
    assert [len(row.runs) for row in (comparison.zero, *comparison.candidates)] == [2, 2, 2]


@pytest.mark.parametrize("means", [{}, {"zero flags": 0.5}, {"all cases": 0.5}])
def test_nothing_is_compared_without_both(means):
    assert zero_flags.Comparison.of("phantom", results(means)) is None


def test_five_joins_the_cases_of_its_folds():
    found = [run for fold in range(3) for run in results(MEANS, seeds=(fold,), cases=1, first_case=fold)]
    comparison = zero_flags.Comparison.of("five", found)
    assert (comparison.n_runs, comparison.n_cases) == (3, 3)
    np.testing.assert_allclose(comparison.zero.scores["dice"], [[0.57, 0.582, 0.594]])
    assert comparison.zero.mean("hd95") == 3
    with pytest.raises(InputError, match="scored on other cases"):  # other data sets hold out the same cases
        zero_flags.Comparison.of("phantom", found)


def test_scores_of_trainings_too_short_to_learn():
    found = results({"zero flags": 0.0, "all cases": 0.0}, seeds=(0,), cases=1)
    for run in found:
        run["cases"][0]["classes"]["a"]["standard"]["hd95"] = None
    text = zero_flags.text_of([zero_flags.Comparison.of("five", found)], base="other", minutes=0.1)
    assert "| undefined | 1 |" in text
    assert "| all cases | 0.0000 (0.000-0.000) | +0.0000 | 1 | n/a |" in text


def test_a_class_without_a_score_leaves_its_case_out():
    found = results(MEANS, seeds=(0,))
    for run in found:
        run["cases"][0]["classes"]["a"]["standard"]["dice"] = None
    comparison = zero_flags.Comparison.of("slices", found)
    assert comparison.p_values == pytest.approx([2 * wilcoxon(np.full(7, 0.1)).pvalue] * 2)
    assert "undefined" not in zero_flags.text_of([comparison], base="other", minutes=3)


@pytest.fixture
def call(sources, tmp_path, monkeypatch, capsys):
    """Call zero_flags.py's main; returns (exit code, stdout, stderr)."""
    for name, value in (
        ("HF_DATASETS_CACHE", tmp_path / "cache"),
        ("ACCELERATE_USE_CPU", "true"),
        ("OMP_NUM_THREADS", 1),
    ):
        monkeypatch.setenv(name, str(value))

    def call(*options, **paths):
        where = {**sources, "output_dir": tmp_path / "runs", "results_dir": tmp_path / "r" / "zero_flags", **paths}
        words = [str(word) for name, path in where.items() for word in (f"--{name}", path)]
        monkeypatch.setattr(sys, "argv", ["zero_flags.py", "--base", "tiny-sam", *words, *options])
        code, before = 0, signal.getsignal(signal.SIGTERM)
        try:
            zero_flags.main()
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGTERM, before)
        return code, *capsys.readouterr()

    return call


def test_dry_run_lists_all_runs_and_writes_nothing(call, tmp_path):
    code, printed, _ = call("--dry_run", "--seeds", "0", "1")
    assert code == 0
    runs = [line.partition(":")[0] for line in printed.splitlines() if "finetune.py" in line]
    assert len(runs) == len(set(runs)) == 5 * 6 * 2
    assert runs[0] == "Task04_Hippocampus-zero-zero_flags-seed0"
    assert runs[-1] == "five-tuned-by_hand-seed1"
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--seeds", "1", "6"), "five holds out fold"), (("--candidates", "0"), "one candidate at least")],
)
def test_refused_options(options, message, call):
    code, _, errors = call(*options)
    assert code == 2
    assert message in errors


def test_finished_runs_make_the_table_and_failed_ones_the_exit_code(call, tmp_path, monkeypatch):
    def carry_out(run, args):
        if args.data_dir.name == "slices":
            run.output.with_suffix(".log").parent.mkdir(parents=True, exist_ok=True)
            run.output.with_suffix(".log").write_text("error: no\n")
            return 2
        (content,) = results({run.variant.name: MEANS[run.variant.name]}, seeds=(run.seed,))
        run.result.parent.mkdir(parents=True, exist_ok=True)
        run.result.write_text(json.dumps({**lora_rank.settings(run, args), **content, "seconds": 60.0}))
        return 0

    monkeypatch.setattr(lora_rank, "carry_out", carry_out)
    options = "--sets", "slices", "hippocampus", "--candidates", "1", "--seeds", "0", "1"
    code, printed, errors = call(*options)
    assert code == 1
    assert "slices, seed 0: 2 of 2 runs failed" in errors
    table = (tmp_path / "r" / "zero_flags.md").read_text()
    assert printed.endswith(table)
    assert "| hippocampus: MR" in table
    assert "| slices" not in table
    assert "Task04_Hippocampus-zero-zero_flags-seed1: Dice 0.607" in printed
    code, printed, _ = call(*options[:1], "hippocampus", *options[3:])
    assert code == 0
    assert printed.count("2 runs, 2 finished; nothing is left to do") == 2
    assert printed.endswith(table)


@pytest.mark.slow
def test_runs_of_a_tenth_of_a_minute(call, real_scans, tmp_path):
    real = {"hippocampus": real_scans / "Task04_Hippocampus", "ct": real_scans / "btcv_like"}
    code, printed, errors = call("--sets", "five", "--candidates", "1", "--seeds", "0", "--max_minutes", "0.1", **real)
    assert code == 0, errors
    assert "| five: 5 of the hippocampi | 1 | 1 |" in printed
    found = [json.loads(path.read_text()) for path in sorted((tmp_path / "r" / "zero_flags").iterdir())]
    assert [run["variant"] for run in found] == ["all cases", "zero flags"]
    assert found[0]["cases"][0]["case"] == found[1]["cases"][0]["case"]
    assert "--validation_share" not in found[1]["options"]
    assert len(rank_table.rows_of(found)) == 2
