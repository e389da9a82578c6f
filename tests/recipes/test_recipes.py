"""The recipe as users run it: from files to report, killed and resumed, and stopped by bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, edit_adapter, recipes_in_process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import SamModel

from samed_peft import load_adapter, metrics, predict_volume
from samed_peft.config import SYNAPSE_CLASSES
from samed_peft.conversion import convert_samed
from samed_peft.datasets import write_phantom
from samed_peft.io import load_tensors, read_labels, read_volume, write_mask

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = [
    *("--base", "tiny-sam", "--image_size", "64", "--batch_size", "4", "--epochs", "2", "--stop_epoch", "2"),
    *("--warmup_steps", "2", "--learning_rate", "0.003", "--checkpoint_steps", "3"),
    *("--train_cases", "5", "6", "--test_cases", "1"),
]


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Three small phantoms in the raw BTCV layout."""
    return write_phantom(tmp_path_factory.mktemp("data") / "btcv", cases=(5, 6, 1), seed=0, shape_dhw=(12, 48, 48))


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return os.environ | {
        "HF_DATASETS_CACHE": str(cache),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "2",
    }


@pytest.fixture(scope="module")
def start(environment):
    """Start the recipe; returns the process."""

    def start(*options, recipe="synapse.py"):
        command = [sys.executable, str(RECIPES / recipe), *map(str, options)]
        return subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )

    return start


@pytest.fixture(scope="module")
def run(start):
    """Run the recipe to its end; returns (exit code, stdout, stderr)."""

    def run(*options, **names):
        process = start(*options, **names)
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err

    return run


@pytest.fixture(scope="module")
def finished(run, scans, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    code, stdout, stderr = run("--data_dir", scans, "--output_dir", out, *SMALL, "--num_workers", 0)
    assert code == 0, stderr
    assert "pancreas" in stdout
    return out


@pytest.fixture(scope="module")
def trained(scans, tmp_path_factory):
    """An uninterrupted run in this process, for tests that compare no bits."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    with recipes_in_process(tmp_path_factory.mktemp("cache")) as run:
        assert run(RECIPES / "synapse.py", "--data_dir", scans, "--output_dir", out, *SMALL, "--num_workers", 0) == 0
    return out


def steps_of(run_folder):
    return int(next(run_folder.glob("checkpoints/step-*")).name.removeprefix("step-"))


@pytest.mark.slow
def test_everything_promised_is_there(finished, scans):
    names = {path.name for path in finished.iterdir()}
    assert {"adapter", "checkpoints", "logs", "predictions", "report.json", "report.md", "run.json"} <= names
    report = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    assert set(report) == {"standard", "samed", "cases", "settings"}
    assert report["standard"]["classes"]["liver"]["n_cases"] == 1
    assert list(finished.rglob("case0001*.png"))
    mask = read_labels(finished / "predictions" / "case0001.nii.gz")
    scan = read_volume(scans / "Training" / "img" / "img0001.nii.gz")
    assert mask.array.shape == scan.array.shape
    assert (mask.affine == scan.affine).all()
    checkpoint = sum(path.stat().st_size for path in (finished / "checkpoints").rglob("*") if path.is_file())
    adapter = (finished / "adapter" / "adapter_model.safetensors").stat().st_size
    assert checkpoint < 3.2 * adapter


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "workers"), [("SIGKILL", 0), ("SIGKILL", 2), ("SIGTERM", 0), ("SIGINT", 2)])
def test_a_stopped_run_resumes_to_the_same_bits(finished, start, run, scans, tmp_path, sent, workers):
    options = ("--data_dir", scans, "--output_dir", tmp_path / "run", *SMALL, "--num_workers", workers)
    process = start(*options)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "run").glob("checkpoints/step-*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if sent == "SIGINT":  # as a terminal sends Ctrl-C: to the whole group, workers included
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(getattr(signal, sent))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == {"SIGKILL": -9, "SIGTERM": 75, "SIGINT": 75}[sent], stderr
    assert not (tmp_path / "run" / "report.json").exists()
    code, _, stderr = run(*options)
    assert code == 2
    assert "--resume" in stderr
    code, _, stderr = run(*options, "--resume")
    assert code == 0, stderr
    one, two = (folder / "adapter" / "adapter_model.safetensors" for folder in (finished, tmp_path / "run"))
    assert one.read_bytes() == two.read_bytes()
    one, two = (
        json.loads((folder / "report.json").read_text(encoding="utf-8")) for folder in (finished, tmp_path / "run")
    )
    assert one["cases"] == two["cases"]
    log = EventAccumulator(str(tmp_path / "run" / "logs")).Reload()
    assert [event.step for event in log.Scalars("train/loss")] == list(range(1, 1 + steps_of(finished)))


@pytest.mark.slow
def test_two_processes_train_what_one_trains(finished, environment, scans, tmp_path):
    options = ["--data_dir", scans, "--output_dir", tmp_path / "run", *SMALL, "--num_workers", "0"]
    options[options.index("--batch_size") + 1] = "2"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, RECIPES / "synapse.py", *options]
    one_thread = environment | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=one_thread, capture_output=True, encoding="utf-8", check=False, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "predictions" / "case0001.nii.gz").is_file()
    one, two = (
        load_tensors(folder / "adapter" / "adapter_model.safetensors") for folder in (finished, tmp_path / "run")
    )
    # AdamW turns differences in the last bit of a tiny gradient into differences of a share of the rate.
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 0.01


@pytest.mark.slow
def test_two_processes_end_alike_where_one_finds_the_folder_taken(finished, environment, scans):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, RECIPES / "synapse.py", "--data_dir", scans, "--output_dir", finished, *SMALL]
    one_thread = environment | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=one_thread, capture_output=True, encoding="utf-8", check=False, timeout=100)
    assert ended.returncode != 0
    assert ended.stderr.count("error: ") == 2
    assert "num_processes: 1 there, 2 now" in ended.stderr


@pytest.mark.slow
def test_a_loss_that_diverges_keeps_what_was_saved(run, scans, tmp_path):
    out = tmp_path / "run"
    # Four steps an epoch of harmless warm-up, then a rate that throws the weights out of float32.
    wild = ("--learning_rate", 1e30, "--warmup_steps", 6, "--epochs", 9, "--stop_epoch", 9)
    code, _, stderr = run("--data_dir", scans, "--output_dir", out, *SMALL, "--num_workers", 0, *wild)
    assert code == 3, stderr
    assert re.search("error: the loss is (nan|inf) at learning rate", stderr)
    assert "Traceback" not in stderr
    assert not (out / "report.json").exists()
    for file in out.rglob("*.safetensors"):
        load_tensors(file)  # refuses values that are not finite


@pytest.mark.slow
def test_validation_keeps_the_best_adapter_beside_the_last(run, scans, tmp_path):
    out = tmp_path / "run"
    options = ["--data_dir", scans, "--output_dir", out, *SMALL, "--num_workers", 0]
    code, _, stderr = run(*options, "--validate_epochs", 1, "--validation_cases", "0006")
    assert code == 0, stderr
    assert (out / "adapter" / "samed_config.json").is_file()
    assert (out / "adapter_best" / "samed_config.json").is_file()
    state = json.loads(next(out.glob("checkpoints/*/state.json")).read_text(encoding="utf-8"))
    assert 0 <= state["progress"]["best_dice"] <= 1
    assert state["progress"]["best_epoch"] in (1, 2)


@pytest.mark.slow
def test_the_small_preset_trains_and_its_adapter_is_scored(run, scans, tmp_path):
    out = tmp_path / "run"
    options = ["--data_dir", scans, "--output_dir", out, *SMALL, "--num_workers", 0, "--preset", "samed_s"]
    code, _, stderr = run(*options)
    assert code == 0, stderr
    names = load_tensors(out / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in names if "transformer" in name} == {"lora_A", "lora_B"}
    scored = tmp_path / "scored"
    again = ("--adapter", out / "adapter", "--data_dir", scans, "--test_cases", 1, "--output_dir", scored)
    code, stdout, stderr = run(*again, recipe="score_synapse.py")
    assert code == 0, stderr
    assert "pancreas" in stdout
    one, two = (json.loads((folder / "report.json").read_text(encoding="utf-8")) for folder in (out, scored))
    assert one["cases"] == two["cases"]
    code, _, stderr = run(*again[:-1], scans, recipe="score_synapse.py")
    assert code == 2
    assert "must not be lost" in stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data_dir", "no/such/folder"], r"expected a folder at .*no/such/folder, found nothing"),
        (["--data_dir", "{scans}", "--base", "{scans}"], "cannot be opened as a SAM"),
        (["--data_dir", "{scans}", "--train_cases", "7"], r"\[7\]"),
        (["--data_dir", "nowhere", "--output_dir", "{golden}/README.md/run"], "README.md is a file; choose another"),
        (["--data_dir", "{scans}", "--push_to_hub", "a/b/c"], "expected owner/name as repository, found 'a/b/c'"),
        (["--data_dir", "{scans}", "--rank", "0"], "rank must be at least 1"),
        (["--data_dir", "{golden}"], "expected raw BTCV"),
        (["--data_dir", "{scans}", "--preset", "samed_h"], "expected a GPU for fp16, found none"),
        (["--data_dir", "{scans}", "--test_cases", "5"], r"cases \[5\] are in both the train and the test split"),
    ],
)
def test_bad_input_ends_with_one_message_and_writes_nothing(call_recipe, scans, tmp_path, options, message):
    given = [option.format(scans=scans, golden=GOLDEN) for option in options]
    code, stderr = call_recipe(RECIPES / "synapse.py", *SMALL, "--output_dir", tmp_path / "run", *given)
    assert code == 2, stderr
    assert re.search(message, stderr), stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "run").exists()


def test_another_runs_folder_is_left_alone(trained, call_recipe, scans):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    code, stderr = call_recipe(
        RECIPES / "synapse.py",
        "--data_dir",
        scans,
        "--output_dir",
        trained,
        *SMALL,
        "--num_workers",
        0,
        "--rank",
        8,
        "--resume",
    )
    assert code == 2
    assert "rank: 4 there, 8 now" in stderr
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_edited_scans_do_not_resume(trained, call_recipe, scans, tmp_path):
    edited = tmp_path / "btcv"
    shutil.copytree(scans, edited)
    path = edited / "Training" / "label" / "label0006.nii.gz"
    labels = read_labels(path)
    write_mask(np.where(labels.array == 1, 2, labels.array), labels, path)
    code, stderr = call_recipe(
        RECIPES / "synapse.py", "--data_dir", edited, "--output_dir", trained, *SMALL, "--num_workers", 0, "--resume"
    )
    assert code == 2
    assert "holds a run with other settings (data:" in stderr


@pytest.mark.slow
def test_a_damaged_scan_among_others_is_named(run, scans, tmp_path):
    damaged = tmp_path / "btcv"
    shutil.copytree(scans, damaged)
    path = damaged / "Training" / "img" / "img0006.nii.gz"
    path.write_bytes(path.read_bytes()[:2000])
    code, _, stderr = run("--data_dir", damaged, "--output_dir", tmp_path / "run", *SMALL)
    assert code == 2, stderr
    assert "img0006.nii.gz" in stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """An adapter of Synapse's organs that sees scans through a window of its own."""
    folder = tmp_path_factory.mktemp("converted") / "adapter"
    convert_samed(GOLDEN / "samed_adapter.pth", str(GOLDEN / "sam_base.pth"), folder, image_size=128)
    edit_adapter(folder, window=[0.0, 60.0])
    return folder


@pytest.mark.slow
def test_scores_are_those_of_the_adapters_own_window_and_can_be_repeated(run, scans, converted, tmp_path):
    out = tmp_path / "scored"
    (out / "predictions").mkdir(parents=True)  # what a killed run leaves
    (out / "predictions" / "stale.nii.gz").touch()
    (out / "scores.json").write_text("{}")
    options = ("--adapter", converted, "--data_dir", scans, "--test_cases", 1, "--output_dir", out)
    code, stdout, stderr = run(*options, recipe="score_synapse.py")
    assert code == 0, stderr
    assert [path.name for path in (out / "predictions").iterdir()] == ["case0001.nii.gz"]
    note = "scored 1 of SAMed's 12 test cases; missing case0002, case0003, "
    assert note in " ".join(stdout.split())
    assert json.loads((out / "report.json").read_text(encoding="utf-8"))["settings"]["note"].startswith(note)
    scan = read_volume(scans / "Training" / "img" / "img0001.nii.gz")
    expected = predict_volume(load_adapter(converted), scan)
    assert (read_labels(out / "predictions" / "case0001.nii.gz").array == expected).all()


def test_medpy_confirms_the_samed_columns_or_the_recipe_fails(call_recipe, scans, converted, tmp_path, monkeypatch):
    out = tmp_path / "scored"
    options = ("--adapter", converted, "--data_dir", scans, "--test_cases", 1, "--output_dir", out)
    code, stderr = call_recipe(RECIPES / "score_synapse.py", *options)
    assert code == 0, stderr
    by_medpy = json.loads((out / "scores.json").read_text(encoding="utf-8"))["medpy"]
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert by_medpy["mean"] == pytest.approx({name: report["samed"]["mean"][name] for name in ("dice", "hd95")})
    assert by_medpy["largest_difference"] <= by_medpy["allowed_difference"] == 1e-9
    assert by_medpy["cases"]["case0001"].keys() == set(SYNAPSE_CLASSES)
    off = [{"dice": 0.5, "hd95": 1e6}] * len(SYNAPSE_CLASSES)
    monkeypatch.setattr(metrics, "medpy_scores", lambda *_, **__: off)
    code, _ = call_recipe(RECIPES / "score_synapse.py", *options)
    assert "error: scores differ from medpy's by 1.0e+06, more than 1e-09" in code  # a text is exit code 1
    assert (out / "report.json").is_file()


def test_scoring_leaves_a_training_runs_folder_alone(call_recipe, scans, converted, tmp_path):
    for name in ("run.json", "report.json"):
        (tmp_path / name).write_text("{}")
    options = ("--adapter", converted, "--data_dir", scans, "--test_cases", 1, "--output_dir", tmp_path)
    code, stderr = call_recipe(RECIPES / "score_synapse.py", *options)
    assert code == 2
    assert "found other files run.json, which must not be lost" in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "run.json"]


def test_an_adapter_of_other_classes_is_not_scored(call_recipe, tmp_path):
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    names = [f"organ {label}" for label in range(8)]
    sizes = {"image_size": 128, "class_names": names}
    convert_samed(GOLDEN / "samed_adapter.pth", str(GOLDEN / "sam_base.pth"), adapter, **sizes)
    options = ("--adapter", adapter, "--data_dir", "nowhere", "--output_dir", out)
    code, stderr = call_recipe(RECIPES / "score_synapse.py", *options)
    assert code == 2
    assert re.search("expected an adapter of Synapse's organs .*found .* of organ 0, organ 1", stderr), stderr
    assert not out.exists()


@pytest.mark.slow
def test_pretraining_ends_with_a_sam_and_its_record(run, tmp_path):
    code, stdout, stderr = run("--steps", 2, "--output_dir", tmp_path / "tiny", recipe="pretrain_tiny.py")
    assert code == 0, stderr
    assert "validation Dice" in stdout
    record = json.loads((tmp_path / "tiny" / "pretraining.json").read_text(encoding="utf-8"))
    assert (record["steps"], record["seed"]) == (2, 0)
    assert SamModel.from_pretrained(tmp_path / "tiny").config.vision_config.image_size == 64


@pytest.mark.parametrize(
    "name", sorted(path.name for path in RECIPES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
)
def test_recipes_stay_short_and_explain_themselves(name):
    text = (RECIPES / name).read_text(encoding="utf-8")
    assert text.count("\n") <= 180
    assert re.match(r'"""[^"]*(python|accelerate launch) recipes/' + re.escape(name), text)


@pytest.mark.parametrize("name", ["synapse.py", "finetune.py", "score_synapse.py"])
def test_signals_are_heeded_before_anything_heavy_is_imported(name):
    load = f"import runpy, sys; runpy.run_path({str(RECIPES / name)!r}, run_name='recipe')"
    heavy = "print(*{'torch', 'numpy', 'accelerate', 'datasets'} & set(sys.modules))"
    command = [sys.executable, "-c", f"{load}; {heavy}"]
    assert subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60).stdout == b"\n"
