"""`samed info`: what it says, that it needs no PyTorch, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from samed_peft.adapters.info import adapter_info, info_text
from samed_peft.adapters.save_load import add_lora, load_adapter, save_adapter, write_card
from samed_peft.cli import main
from samed_peft.config import SamedConfig
from samed_peft.errors import InputError
from samed_peft.evaluation import Report
from samed_peft.hub.content import published_files
from samed_peft.models.bases import load_sam

CLASSES = ("left|lobe", "right lobe")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "adapter"
    config = SamedConfig("tiny-sam", CLASSES, image_size=64, input_size=32, rank=2, layers=(0, 5), orientation="LAS")
    save_adapter(add_lora(load_sam("tiny-sam", class_names=CLASSES, image_size=64), config), folder, config=config)
    return folder


@pytest.fixture
def adapter(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


def report(**settings):
    scores, ends = {"dice": 0.81884, "hd95": None}, {"dice": [0.8, 0.9], "hd95": [None, None]}
    counts = {"n_valid": 3, "n_cases": 4, "n_absent": 1, "n_missed": 0, "n_spurious": 0}
    classes = {name: {**scores, **counts, "ci95": ends} for name in CLASSES}
    summary = {"mean": scores, "mean_ci95": ends, "classes": classes}
    return {"standard": summary, "samed": summary, "cases": [], "n_cases": 4, "settings": settings}


def test_what_an_adapter_is(adapter):
    info = adapter_info(adapter)
    assert info["classes"] == {"1": "left|lobe", "2": "right lobe"}
    assert info["config"]["rank"] == 2
    assert info["peft_type"] == "LORA"
    assert info["parameters"]["encoder"] == 2 * 2 * 2 * 2 * 128  # layers, q and v, A and B, rank, width
    assert info["files"]["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").stat().st_size
    assert info["scores"] is None
    text = info_text(info)
    assert "adapts    rank 2, q_proj, v_proj of layers 0, 5; mask decoder in full" in text
    assert "input     64 pixels through 32, window -125 to 275, slices as in LAS" in text
    info["config"] |= {"input_size": None, "resampling": "aligned"}
    assert "input     64 pixels aligned, window -125 to 275" in info_text(info)
    info["config"] |= {"tile": True, "keep_largest": list(CLASSES)}
    text_of_tiles = info_text(info)
    assert "input     tiles of 64 pixels aligned, window" in text_of_tiles
    assert ", slices as in LAS, largest part alone of 2 classes\n" in text_of_tiles
    assert "    1 left|lobe\n    2 right lobe" in text
    assert text.endswith("not evaluated")


@pytest.mark.parametrize("place", ["within", "around"])
def test_scores(adapter, place):
    found = report(dataset="abdomens", epochs=3, seed=1)
    write_card(adapter, report=Report.from_dict(found))
    folder = adapter if place == "within" else adapter.parent
    (folder / "report.json").write_text(json.dumps(found))
    info = adapter_info(adapter)
    assert (info["cases"], info["dataset"], info["training"]) == (4, "abdomens", {"epochs": 3, "seed": 1})
    text = info_text(info)
    assert "(4 cases of abdomens)" in text
    assert "training  epochs 3, seed 1" in text
    assert "    1 left|lobe    0.8188      n/a      0.8188          n/a\n" in text
    assert len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines())) <= 120


def test_many_classes_do_not_fill_the_screen(adapter):
    info = adapter_info(adapter)
    info["classes"] = {str(label): f"class {label}" for label in range(1, 101)}
    text = info_text(info)
    assert "  and 86 more, which --json lists" in text
    assert len(text.splitlines()) <= 26


def test_the_command_needs_no_pytorch(adapter):
    code = (
        "import sys; from samed_peft.cli import main; main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'peft', 'accelerate'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "info", str(adapter), "--json"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert json.loads(done.stdout)["classes"]["2"] == "right lobe"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a: shutil.rmtree(a), "neither an adapter directory nor a Hub id"),
        (lambda a: (a / "samed_config.json").unlink(), "is not an adapter directory: it lacks samed_config.json"),
        (lambda a: (a / "adapter_model.safetensors").unlink(), "it lacks adapter_model.safetensors"),
        (lambda a: (a / "adapter_model.safetensors").write_bytes(b"\0" * 40), "expected a safetensors file"),
        (lambda a: (a / "adapter_config.json").write_text("[]"), "expected an adapter's settings"),
        (lambda a: (a / "adapter_config.json").write_text("{"), "adapter_config.json"),
        (lambda a: (a / "samed_config.json").write_text('{"base": 3}'), "samed_config.json"),
    ],
)
def test_bad_adapters_are_refused(adapter, damage, message, capsys):
    damage(adapter)
    with pytest.raises(InputError, match=message):
        adapter_info(adapter)
    with pytest.raises(SystemExit, match="2"):
        main(["info", str(adapter)])
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_folder_of_a_run_stands_for_its_adapter(adapter, tmp_path):
    info = adapter_info(tmp_path)
    assert info | {"source": str(adapter)} == adapter_info(adapter)
    assert load_adapter(tmp_path).samed_config == load_adapter(adapter).samed_config
    assert published_files(tmp_path) == published_files(adapter)
    shutil.copytree(adapter, tmp_path / "adapter_best")
    for read in (adapter_info, load_adapter, published_files):
        with pytest.raises(InputError, match=r"two adapters, adapter_best of .*validation and adapter of the last"):
            read(tmp_path)
    assert adapter_info(tmp_path / "adapter_best")["config"] == info["config"]


def test_checkpoints_are_not_taken_for_adapters(adapter, tmp_path):
    run = tmp_path / "run"
    step = run / "checkpoints" / "step-00000003"
    step.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (step / "state.json").write_text("{}")
    for folder, found in ((run, "a training run"), (step.parent, "checkpoints"), (step, "checkpoints")):
        with pytest.raises(InputError, match=rf"found {found}.* in {re.escape(str(folder))}; .* with --resume"):
            adapter_info(folder)
    adapter.rename(run / "adapter")
    with pytest.raises(InputError, match=rf"found checkpoints .*: give {re.escape(str(run / 'adapter'))}"):
        adapter_info(step)
    assert adapter_info(run)["classes"]


def test_json_into_a_pipe_that_closes_is_quiet(adapter):
    command = f"{sys.executable} -m samed_peft info {adapter} --json | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, encoding="utf-8", check=True)
    assert (done.stdout, done.stderr) == ("{\n", "")
