"""The comparison of ranks and methods: its plan, its runs, resuming after a stop, and its statistics."""

import itertools
import json
import math
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import write_balls
from scipy.stats import wilcoxon

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import ablation  # noqa: E402
import lora_rank  # noqa: E402
import rank_table  # noqa: E402

from samed_peft.config.options import parse_run_options  # noqa: E402
from samed_peft.errors import InputError  # noqa: E402
from samed_peft.evaluation import Report  # noqa: E402
from samed_peft.metrics import METRICS  # noqa: E402
from samed_peft.models.bases import load_sam  # noqa: E402


@pytest.fixture(scope="module")
def options_of(tmp_path_factory):
    """Options of lora_rank.py for four small scans."""
    root = tmp_path_factory.mktemp("ranks")
    write_balls(root / "balls")

    def options_of(folder, *options, epochs=1):
        where = {"--data_dir": root / "balls", "--output_dir": folder, "--results_dir": folder / "r"}
        small = {"--image_size": 64, "--batch_size": 4, "--epochs": epochs, "--num_workers": 0, "--warmup_steps": 2}
        small |= {"--test_cases": "p3_a", "--checkpoint_steps": 1}
        own, recipes = (itertools.chain.from_iterable(options.items()) for options in (where, small))
        return [*map(str, ["--base", "tiny-sam", *own, *options, "--", *recipes])]

    return options_of


@pytest.fixture
def environment(tmp_path, monkeypatch):
    # One thread: two that wait for each other stand still on a busy machine.
    for name, value in (
        ("HF_DATASETS_CACHE", tmp_path / "cache"),
        ("ACCELERATE_USE_CPU", "true"),
        ("OMP_NUM_THREADS", 1),
    ):
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def call(environment, monkeypatch, capsys):
    """Call lora_rank.py's main; returns (exit code, stdout, stderr)."""

    def call(options):
        monkeypatch.setattr(sys, "argv", ["lora_rank.py", *options])
        code, before = 0, signal.getsignal(signal.SIGTERM)
        try:
            lora_rank.main()
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGTERM, before)
        return code, *capsys.readouterr()

    return call


@pytest.mark.slow
def test_runs_are_written_once_and_failed_ones_tried_again(call, options_of, tmp_path):
    options = ["--ranks", "1", "--placements", "--methods", "oft", "--rank", "1", "--seeds", "0"]
    code, printed, _ = call(options_of(tmp_path, *options, "--dry_run"))
    assert code == 0
    assert printed.startswith("2 runs, 0 finished; their time is known once one of them has finished\n")
    assert not (tmp_path / "r").exists()

    code, printed, _ = call(options_of(tmp_path, *options))  # oft has no blocks of 1
    assert code == 1
    assert "[1/2] balls-rank-rank_1-seed0: Dice " in printed
    assert "[2/2] balls-method-oft-seed0 failed with 1: error: rank must be at least 2 for oft, " in printed
    (path,) = (tmp_path / "r").iterdir()
    result = json.loads(path.read_text())
    assert (result["kind"], result["variant"], result["seed"]) == ("rank", "rank 1", 0)
    assert list(result["standard"]["classes"]) == list(result["samed"]["classes"]) == ["ball"]
    assert result["cases"][0]["classes"]["ball"]["samed"]["dice"] >= 0
    weights = tmp_path / path.stem / "adapter" / "adapter_model.safetensors"
    assert result["stored_bytes"] == weights.stat().st_size
    assert result["config"]["rank"] == 1
    assert 0.2 < result["peak_resident_gb"] < 4
    assert result["machine"]["versions"]["peft"]
    assert str(tmp_path) not in path.read_text()

    code, printed, _ = call(options_of(tmp_path, *options, "--dry_run"))
    assert printed.startswith("2 runs, 1 finished; about ")
    assert len(printed.splitlines()) == 2
    code, _, errors = call(options_of(tmp_path, *options, epochs=2))
    assert code == 2
    assert "is of a run with other options" in errors


@pytest.mark.slow
def test_a_stopped_run_goes_on_from_its_checkpoint(call, options_of, tmp_path):
    options = options_of(tmp_path, "--ranks", "1", "--placements", "--methods", "--seeds", "0", epochs=16)
    run, steps = tmp_path / "balls-rank-rank_1-seed0", 16 * 5

    def stop_after_a_checkpoint():
        while not list(run.glob("checkpoints/step-*")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_after_a_checkpoint, daemon=True).start()
    code, _, errors = call(options)
    assert code == 75, errors
    assert "the same command goes on with it" in errors
    (stopped,) = run.glob("checkpoints/step-*")
    assert not (tmp_path / "r").exists()
    done = int(stopped.name.removeprefix("step-"))
    assert 0 < done < steps
    assert call(options)[0] == 0
    assert json.loads((run / "resources.json").read_text())["steps"] == steps - done
    assert len(list((tmp_path / "r").iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("q,v", ["--targets", "q_proj", "v_proj"]),
        ("q,k,v,mlp", ["--targets", "q_proj", "k_proj", "v_proj", "lin1", "lin2"]),
        ("q,v+decoder", ["--targets", "q_proj", "v_proj", "--decoder", "lora"]),
        ("out@3-5", ["--targets", "proj", "--layers", "3", "4", "5"]),
    ],
)
def test_placements(text, options):
    assert list(lora_rank.placement_options(text)) == options


@pytest.mark.parametrize("text", ["qv", "q,v@5", "q,v-decoder", "", "q,,v"])
def test_other_texts_than_placements_are_refused(text):
    with pytest.raises(InputError, match="a placement is some of q, k, v, out, mlp"):
        lora_rank.placement_options(text)


def test_the_network_without_pretraining_is_the_same_network(tmp_path):
    lora_rank.write_untrained("tiny-sam", tmp_path / "untrained")
    pretrained, untrained = (
        load_sam(base, class_names=("a",), image_size=64).state_dict()
        for base in ("tiny-sam", str(tmp_path / "untrained"))
    )
    assert {name: tensor.shape for name, tensor in untrained.items()} == {n: t.shape for n, t in pretrained.items()}
    name = "vision_encoder.layers.0.mlp.lin1.weight"
    assert untrained[name].std() == pytest.approx(0.02, rel=0.1)
    assert not untrained[name].equal(pretrained[name])


def results(*means, seeds=2, cases=6):
    """Results of ranks 1, 2, ... whose Dice is a mean plus what case and seed add."""
    found = []
    for rank, mean in enumerate(means, start=1):
        for seed in range(seeds):
            dice = [mean + 0.01 * case + 0.002 * seed for case in range(cases)]
            scores = [
                {**dict.fromkeys(METRICS, math.nan), "dice": d, "hd95": math.nan if i else 3.0}
                for i, d in enumerate(dice)
            ]
            by_case = {f"c{i}": {"standard": [s], "samed": [s], "presence": ["both"]} for i, s in enumerate(scores)}
            found.append({
                **Report(("a",), by_case).to_dict(),
                "data": "d", "base": "tiny-sam", "seed": seed, "kind": "rank", "variant": f"rank {rank}",
                "config": {"rank": rank}, "trainable_parameters": 1000 * rank, "stored_bytes": 4e6,
                "seconds_per_step": 0.1, "peak_resident_gb": 1.0, "peak_gpu_gb": None,
            })  # fmt: skip
    return found


def test_statistics_of_known_scores():
    rows = rank_table.rows_of(results(0.5, 0.6))
    assert [row.name for row in rows] == ["rank 1", "rank 2"]
    assert rows[0].mean("dice") == pytest.approx(0.5 + 0.025 + 0.001)
    assert rows[0].mean("hd95") == 3.0  # where it is defined
    assert rows[0].seeds_deviation("dice") == pytest.approx(0.002 / 2**0.5)
    low, high = rank_table.interval(rows[0].scores["dice"], rng=np.random.default_rng(0))
    assert 0.5 < low < rows[0].mean("dice") < high < 0.552
    ((one, other, difference, p),) = rank_table.paired_tests(rows, "dice")
    assert (one.name, other.name, difference) == ("rank 1", "rank 2", pytest.approx(0.1))
    assert p == wilcoxon(np.full(6, 0.1)).pvalue


def test_holm():
    # 0.01 x 3, then 0.02 x 2, then 0.03, which must not be smaller than the one before.
    assert rank_table.holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])


def test_table_and_plots(tmp_path, capsys, monkeypatch):
    (tmp_path / "r").mkdir()
    for number, result in enumerate(results(0.5, 0.6, 0.7)):
        (tmp_path / "r" / f"{number}.json").write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["rank_table.py", str(tmp_path / "r")])
    rank_table.main()
    printed = capsys.readouterr().out
    assert (tmp_path / "lora_rank-d.md").read_text() == printed
    assert "2 seeds, 6 cases" in printed
    assert "The base is not SAM" in printed
    assert "| rank 3 | 0.726 (" in printed
    assert "| rank 3 | +0.200 (p " in printed
    assert {path.name for path in tmp_path.glob("*.png")} == {"lora_rank-d-ranks.png", "lora_rank-d-costs.png"}


def test_results_on_different_cases_are_not_compared(tmp_path, capsys, monkeypatch):
    (tmp_path / "r").mkdir()
    for number, result in enumerate([*results(0.5), *results(0.5, 0.6, cases=5)[2:]]):
        (tmp_path / "r" / f"{number}.json").write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["rank_table.py", str(tmp_path / "r")])
    with pytest.raises(SystemExit, match="2"):
        rank_table.main()
    assert "scored on other cases" in capsys.readouterr().err


def test_each_ingredient_is_added_once_and_left_out_once():
    found = {variant.name: variant for variant in ablation.variants()}
    whole = found[ablation.WHOLE].options
    for name, options in ablation.INGREDIENTS.items():
        assert found[f"with {name}"].options == options
        without = found[f"without {name}"].options
        assert len(without) + len(options) == len(whole)
        assert options[0] not in without
    assert found[ablation.BARE].options == ()


def test_all_ingredients_are_options_of_the_recipe():
    path = BENCHMARKS.parent / "recipes" / "finetune.py"
    parser = runpy.run_path(str(path))["build_parser"]()
    (whole,) = (variant.options for variant in ablation.variants() if variant.name == ablation.WHOLE)
    required = ["--data_dir", "d", "--output_dir", "o", "--base", "tiny-sam"]
    _, adapter, training = parse_run_options(parser, [*required, *whole])
    assert (adapter["resampling"], adapter["neighbour_mm"], adapter["rank"]) == ("aligned", 1.0, 8)
    assert (training.augmentation, training.schedule, training.weight_average) == ("strong", "cosine", 0.99)


def test_differences_of_ingredients_are_paired_with_the_recipe_that_they_change():
    found = results(0.5, 0.9, 0.6, 0.8)
    names = [("whole", ablation.BARE), ("whole", ablation.WHOLE), ("added", "with a"), ("removed", "without a")]
    for result in found:
        result["kind"], result["variant"] = names[result["config"]["rank"] - 1]
    lines = ablation.table(rank_table.rows_of(found), rng=np.random.default_rng(0)).splitlines()
    assert [line.split("|")[4].strip() for line in lines[2:]] == ["", "", "+0.1000", "-0.1000"]
    p = min(2 * wilcoxon(np.full(6, 0.1)).pvalue, 1.0)  # Holm's smallest of two equal ones
    assert lines[4].split("|")[5].strip() == f"{p:.2g}"
