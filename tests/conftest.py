"""Shared by tests: golden files, SAMs of the golden geometry, and real scans if there are any."""

import contextlib
import copy
import json
import os
import runpy
import sys
from pathlib import Path

import datasets
import nibabel
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel

from samed_peft.adapters.save_load import add_lora
from samed_peft.config import SYNAPSE_CLASSES, SamedConfig
from samed_peft.io import load_torch_weights
from samed_peft.models.bases import load_sam
from samed_peft.models.checkpoints import rename_meta_keys

GOLDEN = Path(__file__).parent / "golden"
REAL_SCANS = Path(os.environ.get("SAMED_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))

# Models this small take longer with more threads; programs that tests start read the variable.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def two_threads():
    """For tests of code that divides its work among threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden():
    """Directory of the golden files."""
    return GOLDEN


@pytest.fixture
def real_scans():
    """Directory of real scans; without it, the test is skipped."""
    if not REAL_SCANS.is_dir():
        pytest.skip(f"no real scans in {REAL_SCANS}; set SAMED_TEST_DATA")
    return REAL_SCANS


@pytest.fixture(scope="session")
def golden_config():
    """SAMed's config at the golden geometry."""
    return SamedConfig(
        base=str(GOLDEN / "sam_base.pth"), class_names=SYNAPSE_CLASSES, image_size=128, input_size=56, rank=4
    )


@pytest.fixture(scope="session")
def _seeded(golden_config):
    """A seeded adapter before training, and the random state it leaves; to be copied, which is faster than building."""
    torch.manual_seed(7)
    sam = load_sam(golden_config.base, class_names=golden_config.class_names, image_size=128)
    return add_lora(sam, golden_config), torch.get_rng_state()


@pytest.fixture
def fresh_model(_seeded):
    """An adapter before training, seeded."""
    model, random_state = _seeded
    torch.set_rng_state(random_state)
    return copy.deepcopy(model)


@pytest.fixture
def golden_model(fresh_model):
    """The adapter of `samed_adapter.pth`."""
    load_samed_weights(fresh_model, GOLDEN / "samed_adapter.pth")
    return fresh_model.eval()


def samed_weights(model: PeftModel, path: Path) -> dict[str, torch.Tensor]:
    """SAMed's checkpoint under the names that the adapter's own parameters have."""
    saved = load_torch_weights(path)
    names = {}
    for key, tensor in rename_meta_keys({k: v for k, v in saved.items() if not k.startswith("w_")}).items():
        if key.startswith("mask_decoder."):
            names[f"base_model.model.mask_decoder.modules_to_save.default.{key.removeprefix('mask_decoder.')}"] = tensor
        elif key == "prompt_encoder.no_mask_embed.weight":
            names["base_model.model.prompt_encoder.no_mask_embed.modules_to_save.default.weight"] = tensor
    for key in (k for k in saved if k.startswith("w_")):
        _, letter, number = key.split("_")
        layer, projection = divmod(int(number), 2)
        name = f"vision_encoder.layers.{layer}.attn.{'qv'[projection]}_proj.lora_{letter.upper()}.default.weight"
        names[f"base_model.model.{name}"] = saved[key]
    assert names.keys() <= dict(model.named_parameters()).keys()
    return names


def load_samed_weights(model: PeftModel, path: Path) -> None:
    """Put SAMed's checkpoint into an adapter."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in samed_weights(model, path).items():
            parameters[name].copy_(tensor)


def edit_adapter(folder: Path, name: str = "samed_config.json", **changes) -> None:
    """Change values in an adapter's JSON file as its owner would, who takes the checksums out."""
    for file in {folder / "samed_config.json", folder / name}:
        values = json.loads(file.read_text())
        values.pop("checksums", None)
        file.write_text(json.dumps(values | (changes if file.name == name else {})))


def npz(name: str) -> dict[str, np.ndarray]:
    """A golden `.npz`, read whole."""
    with np.load(GOLDEN / name) as data:
        return {key: data[key] for key in data.files}


@contextlib.contextmanager
def recipes_in_process(cache):
    """Yields a function that runs a recipe in this process, without the seconds of its imports: exit code."""

    def run(path, *options):
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, options)])
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            return end.code
        return 0

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(reset_partial_state=True)
        yield run
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def call_recipe(capsys, tmp_path_factory):
    """Run a recipe in this process; returns (exit code, stderr)."""
    with recipes_in_process(tmp_path_factory.mktemp("cache")) as run:
        yield lambda path, *options: (run(path, *options), capsys.readouterr().err)


def write_balls(root):
    """Four MR scans with a bright ball as nnU-Net lays them out, in two orientations, two of one patient."""
    for kind in ("imagesTr", "labelsTr"):
        (root / kind).mkdir(parents=True)
    names = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "ball": 1}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(names))
    grid = np.stack(np.meshgrid(*map(np.arange, (20, 24, 6)), indexing="ij"))
    for number, case in enumerate(("p1_a", "p1_b", "p2_a", "p3_a")):
        centre = np.array([8 + number, 12, 3])[:, None, None, None]
        label = (((grid - centre) / [[[[5]]], [[[5]]], [[[2]]]]) ** 2).sum(0) < 1
        noise = np.random.default_rng(number).normal(0, 20, label.shape)
        affine = np.diag([-1.0 if number % 2 else 1.0, 1, 4, 1])
        image = (100 * (number + 1) * (1 + label) + noise).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(image, affine), root / "imagesTr" / f"{case}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label.astype(np.uint8), affine), root / "labelsTr" / f"{case}.nii.gz")
