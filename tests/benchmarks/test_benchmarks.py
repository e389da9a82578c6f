"""The benchmarks run at their smallest, and what they compare computes the same."""

import ast
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import measure  # noqa: E402
import scaling  # noqa: E402
import throughput  # noqa: E402

SUBJECTS = ["samed_peft float32", "peft-sdpa float32", "peft-eager float32"]


def run(script, *options, folder):
    command = [sys.executable, str(BENCHMARKS / script), "--results_dir", str(folder), "--threads", "1", *options]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    (result,) = folder.glob("*.json")
    return done.stdout, json.loads(result.read_text())


@pytest.mark.slow
def test_throughput(tmp_path):
    smallest = ["--geometry", "tiny", "--rounds", "1", "--steps", "1", "--mixed_precision", "no", "--num_workers", "0"]
    printed, result = run("throughput.py", *smallest, "--profile", folder=tmp_path)
    assert "times as fast as" in printed
    for part in ("training", "slices", "file"):
        assert list(result[part]["subjects"]) == SUBJECTS
        assert list(result[part]["times_as_fast"]) == SUBJECTS[:1]
        assert list(result[part]["times_as_fast"][SUBJECTS[0]]) == SUBJECTS[1:]
    training = result["training"]["subjects"]
    # The same weights, batch and loss: a peer that computed something else would not be one.
    ours = training[SUBJECTS[0]]["first_loss"]
    assert [training[name]["first_loss"] for name in SUBJECTS] == pytest.approx([ours] * 3, abs=2e-5)
    assert 0 < training[SUBJECTS[0]]["share_of_gemm_peak"]["median"] < 1
    assert 0 <= training[SUBJECTS[0]]["share_waiting_for_data"] < 1
    assert 0.2 < training[SUBJECTS[0]]["peak_resident_gb"] < 5
    for kind in ("profile_step float32", "profile_prediction float32"):
        assert sum(result["profile"][kind]["groups"].values()) == pytest.approx(1, abs=1e-3)
    assert result["profile"]["profile_step float32"]["groups"]["GEMM"] > 0.1


@pytest.mark.slow
def test_scaling(tmp_path):
    printed, result = run("scaling.py", "--quick", folder=tmp_path)
    assert "| explanation |" in printed
    assert [len(curve["points"]) for curve in result["curves"].values()] == [2] * 6
    assert [point["tokens"] for point in result["curves"]["training step, by image size"]["points"]] == [64, 256]
    assert len(list(tmp_path.glob("*.png"))) == 1


@pytest.mark.slow
def test_attention(tmp_path):
    printed, result = run("attention.py", "--quick", folder=tmp_path)
    assert "| pixels, type, pass, layers |" in printed
    assert "times as fast as fused" in printed
    assert [(one["image_size"], one["dtype"]) for one in result["results"]] == [(128, "float32"), (128, "bfloat16")]
    for one, allowed in zip(result["results"], (1e-5, 0.05), strict=True):
        for layers in one["layers"].values():
            # The same inputs give the same numbers: a subject that computed something else would not be one.
            assert all(apart < allowed for found in layers.values() for apart in found["largest_difference"].values())
        for step in one["steps"].values():
            assert list(step) == ["windowed", "global", "encoder"]
            windowed, whole, encoder = (part["seconds"]["fused"]["median"] for part in step.values())
            assert encoder == pytest.approx(8 * windowed + 4 * whole, rel=1e-2)
            assert list(step["encoder"]["times_as_fast"]) == ["fused", "transformers"]
    assert result["overall"].keys() == {"fused", "transformers"}
    assert result["machine"]["load_before"] >= 0


def test_ratios_are_taken_within_a_round():
    def rounds(*seconds):
        return [{"seconds": [value]} for value in seconds]

    # The machine is twice as slow in the second round, for all.
    found = {"samed_peft float32": rounds(1, 2), "peft-sdpa float32": rounds(3, 6), "samed float32": rounds(2, 4)}
    found["samed_peft bfloat16"] = rounds(0.5, 1)
    ratios = throughput.times_as_fast(found)
    assert ratios["samed_peft float32"]["peft-sdpa float32"] == {"median": 3, "min": 3, "max": 3}
    # The original has no bfloat16, and is compared with both; PEFT is compared in the same precision.
    assert list(ratios["samed_peft bfloat16"]) == ["samed float32"]
    assert ratios["samed_peft bfloat16"]["samed float32"]["median"] == 4


def test_fit_of_a_line():
    line = scaling.fit([1, 2, 4], [5, 7, 11])
    assert line == {"fixed": 3, "per_unit": 2, "r_squared": 1, "unit_cost": 0.55}
    assert scaling.verdict(line) == "less than proportional"
    assert scaling.verdict(scaling.fit([1, 2, 4], [1, 4, 16])) == "more than proportional"
    assert scaling.verdict(scaling.fit([1, 2, 4], [2, 4, 8])) == "proportional"


def test_peak_memory_counts_what_is_freed_again():
    measure.reset_peak()
    before = measure.peak_resident_gb()
    np.ones(50_000_000)
    assert 0.3 < measure.peak_resident_gb() - before < 0.6
    measure.reset_peak()
    assert measure.peak_resident_gb() - before < 0.2


SCRIPTS = [*BENCHMARKS.glob("*.py"), *BENCHMARKS.with_name("recipes").glob("*.py")]
OWN_MODULES = {"samed_peft", *(script.stem for script in SCRIPTS)}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_names_that_scripts_import_are_there(script, monkeypatch):
    monkeypatch.syspath_prepend(script.parent)
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in OWN_MODULES:
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}")
