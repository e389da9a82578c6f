"""JSON files with nonsense in them, as damage and strangers leave it: good output, or an error of the package."""

import copy
import json
import os
import random
import shutil

import nibabel
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import edit_adapter

from samed_peft.adapters.folder import find_report, read_config
from samed_peft.adapters.info import adapter_info, info_text
from samed_peft.adapters.save_load import add_lora, load_adapter, save_adapter, write_card
from samed_peft.config import SamedConfig
from samed_peft.datasets import choose_splits, describe_folder, open_folder, take_fingerprint
from samed_peft.datasets.dataset_json import scheme_of_dataset
from samed_peft.errors import InputError, printable
from samed_peft.evaluation import evaluate_cases, format_table, write_report
from samed_peft.hub.content import published_files
from samed_peft.io import tensor_shapes
from samed_peft.models.bases import TINY_SAM_DIR, load_sam, open_sam
from samed_peft.models.geometry import base_geometry
from samed_peft.training import Machine, make_plan, options_of, read_plan, write_plan
from samed_peft.training.claims import _claim
from samed_peft.training.replanning import decisions_for_steps, expected_steps, replanned
from samed_peft.training.state import Progress, load_checkpoint, save_checkpoint

NONSENSE = (
    None, True, False, 0, -1, 1, 3, 2.5, -0.0, 1e308, 10**30, -(10**30), "", " ", "x", "1", "0", "nan", "../x",
    "/etc/passwd", "a\0b", "\x1b[2J", "\ud800", "\u202e", "x" * 5000, "é", "(", "(.*)*!", [], {}, [None], [[[]]],
    [1, "a"], {"": 0}, {"a": {"b": []}}, {"0": "x"}, ["x"] * 300, {str(n): n for n in range(300)},
)  # fmt: skip


def places(value, path=()):
    """Paths to all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def damaged(value, generator):
    """A JSON value with up to three changes."""
    value = copy.deepcopy(value)
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        found = list(places(value))
        if not found or generator.random() < 0.03:
            return copy.deepcopy(generator.choice(NONSENSE))
        *parents, key = generator.choice(found)
        inside = value
        for parent in parents:
            inside = inside[parent]
        how = generator.choice(("replace", "replace", "replace", "remove", "rename", "double", "other"))
        nonsense = copy.deepcopy(generator.choice(NONSENSE))
        if how == "remove":
            del inside[key]
        elif how == "rename" and isinstance(inside, dict):
            name = nonsense if isinstance(nonsense, str) else str(nonsense)[:50]
            inside[name] = inside.pop(key)
        elif how == "double" and isinstance(inside, list):
            inside.append(copy.deepcopy(inside[key]))
        elif how == "other":
            *others, other = generator.choice(found)
            source = value
            try:
                for parent in others:
                    source = source[parent]
                inside[key] = copy.deepcopy(source[other])
            except (LookupError, TypeError):
                inside[key] = nonsense
        else:
            inside[key] = nonsense
    return value


def read_adapter(folder):
    info = adapter_info(folder)
    json.dumps(info, ensure_ascii=False)
    printable(info_text(info)).encode()
    published_files(folder)


def read_weights(folder):
    load_adapter(folder)


def read_report(folder):
    read_adapter(folder)
    _, report = find_report(folder, read_config(folder))
    if report is not None:
        printable(format_table(report)).encode()
        write_report(report, folder / "again")
        write_card(folder, report=report)


def read_checkpoint(folder, model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")  # as for float16 on a GPU
    load_checkpoint(folder / "checkpoints", model, optimizer, accelerator=accelerator)


def read_run(folder):
    _claim(folder, {"rank": 4, "data": ["a"], "window": [0.0, 1.0]}, resume=True)


def read_labelled(folder):
    scheme_of_dataset(folder / "dataset.json")
    opened = open_folder(folder, channel="T1")
    describe_folder(opened)
    opened.case(opened.cases[0])


def read_split(folder):
    choose_splits(["a", "b", "c"], split_file=folder / "splits.json", fold=1)


def read_base(folder):
    open_sam(str(folder))


def read_planned(folder):
    plan = read_plan(folder / "plan.json")
    printable(plan.table()).encode()
    options_of(replanned(plan, {"epochs": 2}), open_folder(folder, channel="T1"))
    replanned(plan, {"image_size": 128, "method": "ia3"})
    expected_steps(plan)
    decisions_for_steps(plan, 200)


KINDS = {
    "adapter/samed_config.json": read_adapter,
    "adapter/adapter_config.json": read_weights,
    "scored/report.json": read_report,
    "run/checkpoints/step-00000001/state.json": read_checkpoint,
    "run/run.json": read_run,
    "labelled/dataset.json": read_labelled,
    "decathlon/dataset.json": read_labelled,
    "labelled/plan.json": read_planned,
    "split/splits.json": read_split,
    "base/config.json": read_base,
    "base/model.safetensors.index.json": read_base,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a sound file of each kind."""
    root = tmp_path_factory.mktemp("json")
    config = SamedConfig("tiny-sam", ("box", "other"), image_size=64, rank_pattern={"layers.1.attn.q_proj": 2})
    model = add_lora(load_sam("tiny-sam", class_names=config.class_names, image_size=64), config)
    save_adapter(model, root / "adapter", config=config)
    edit_adapter(root / "adapter")  # without checksums, which would show each change
    shutil.copytree(root / "adapter", root / "scored")
    masks = {case: np.full((2, 8, 8), number, np.uint8) for number, case in enumerate("abc")}
    report = evaluate_cases(
        masks, dict.fromkeys("abc", masks["b"]), class_names=config.class_names, settings={"note": "x"}
    )
    write_report(report, root / "scored")
    (root / "run" / "checkpoints").mkdir(parents=True)
    accelerator, optimizer = Accelerator(cpu=True), torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    save_checkpoint(
        root / "run" / "checkpoints", model, optimizer, progress=Progress(1, 0.5, 1), accelerator=accelerator
    )
    state = root / "run" / "checkpoints" / "step-00000001" / "state.json"
    scaler = {
        "scale": 65536.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 3,
    }
    state.write_text(json.dumps({"progress": json.loads(state.read_text())["progress"], "scaler": scaler}))
    (root / "run" / "run.json").write_text(json.dumps({"rank": 4, "data": ["a"], "window": [0.0, 1.0]}))
    write_labelled(root / "labelled", root / "decathlon")
    found = take_fingerprint(open_folder(root / "labelled", channel="T1"))
    plan = make_plan(found, Machine("cpu", "any", 9.0, 2), base=base_geometry("tiny-sam"))
    write_plan(plan, root / "labelled" / "plan.json")
    (root / "split").mkdir()
    (root / "split" / "splits.json").write_text(json.dumps([{"train": ["a", "b"], "val": ["c"]}] * 2))
    (root / "base").mkdir()
    shutil.copy(TINY_SAM_DIR / "config.json", root / "base")
    shutil.copy(TINY_SAM_DIR / "model.safetensors", root / "base" / "part.safetensors")
    index = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(tensor_shapes(root / "base" / "part.safetensors"), "part.safetensors"),
    }
    (root / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    return root, model


def write_labelled(nnunet, decathlon):
    for root, scan in ((nnunet, "a_0001.nii"), (decathlon, "a.nii")):
        for name, file in (("imagesTr", scan), ("labelsTr", "a.nii")):
            (root / name).mkdir(parents=True)
            nibabel.save(nibabel.Nifti1Image(np.ones((3, 4, 5), np.uint8), np.eye(4)), root / name / file)
    shutil.copy(nnunet / "imagesTr" / "a_0001.nii", nnunet / "imagesTr" / "a_0000.nii")
    new = {"channel_names": {"0": "T1", "1": "CT"}, "labels": {"background": 0, "x": 1}, "numTraining": 1}
    pair = {"image": "./imagesTr/a.nii", "label": "./labelsTr/a.nii"}
    old = {
        "name": "n",
        "modality": {"0": "T1"},
        "labels": {"0": "background", "1": "x"},
        "training": [pair],
        "test": [],
    }
    for root, content in ((nnunet, new), (decathlon, old)):
        (root / "dataset.json").write_text(json.dumps(content | {"file_ending": ".nii"}))


TRIALS, SEED = (int(os.environ.get(f"SAMED_{name}", usual)) for name, usual in (("TRIALS", 20), ("SEED", 0)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_nonsense_gives_good_output_or_an_error_of_the_package(written, name, tmp_path):
    root, model = written
    folder = tmp_path / "folder"
    shutil.copytree(root / name.split("/")[0], folder)
    path = folder / name.partition("/")[2]
    sound, read = json.loads(path.read_text()), KINDS[name]
    options = (model,) if read is read_checkpoint else ()
    read(folder, *options)
    escaped = []
    for trial in range(TRIALS):
        value = damaged(sound, random.Random(f"{SEED}:{name}:{trial}"))
        path.write_text(json.dumps(value))
        try:
            read(folder, *options)
        except InputError as error:
            if len(printable(error)) > 2500 or "\n" in printable(error):
                escaped.append(f"trial {trial} of seed {SEED}: {len(str(error))} characters: {error!s:.300}")
        except Exception as error:
            escaped.append(f"trial {trial} of seed {SEED}: {type(error).__name__}: {str(error)[:300]}")
    assert not escaped, "\n".join(escaped)
