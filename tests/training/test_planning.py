"""Plans of a training: valid for any data, sensible for those that people have, and refused where none is possible."""

import dataclasses
import json
import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from conftest import write_balls
from scan_files import two_modalities

from samed_peft.config import CT_WINDOW_HU, SYNAPSE_CLASSES, SamedConfig, TrainingConfig
from samed_peft.config.options import given_options
from samed_peft.datasets import open_folder, take_fingerprint
from samed_peft.datasets.fingerprint import MODALITIES, Fingerprint
from samed_peft.errors import InputError
from samed_peft.models.bases import TINY_SAM_DIR
from samed_peft.models.geometry import PUBLISHED, BaseGeometry, base_geometry
from samed_peft.training import (
    Machine,
    Plan,
    make_plan,
    options_of,
    planned_options,
    planned_precision,
    read_plan,
    write_plan,
)
from samed_peft.training.decisions import RULES
from samed_peft.training.input_decisions import best_precision
from samed_peft.training.machine import this_device
from samed_peft.training.replanning import replanned

RECIPE = Path(__file__).parents[2] / "recipes" / "finetune.py"
PAGE = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
TINY = BaseGeometry("tiny-sam", 64, 8, 6, 128)
VIT_B = PUBLISHED["facebook/sam-vit-base"]
CPU = Machine("cpu", "x86_64", 20.0, 2)
GPU = Machine("cuda", "A100", 78.0, 16)


def fingerprint(*, cases=20, slices=50, modality="CT", classes=("liver", "left kidney"), **changes):
    """Of scans with equally many slices, each class in half of them."""
    volumes = modality != "picture"
    values = {
        "data": "0123456789abcdef",
        "cases": cases,
        "patients": cases,
        "patients_with_foreground": cases,
        "slices": cases * slices,
        "empty_slices": cases * slices // 4,
        "patient_slices": (slices, slices, slices),
        "slice_hw": (512, 512),
        "largest_hw": (512, 512),
        "spacing_mm": (3.0, 0.8, 0.8) if volumes else None,
        "plane": "axial" if volumes else None,
        "orientation": "LPS" if volumes else None,
        "orientations": {"LAS": cases} if volumes else {},
        "modality": modality,
        "colour": False,
        "normalized": False,
        "intensity_range": (-1024.0, 3071.0) if volumes else (0.0, 255.0),
        "foreground": (-20.0, 10.0, 60.0, 110.0, 150.0),
        "body": (-120.0, -100.0, 20.0, 150.0, 900.0),
        "class_voxels": dict.fromkeys(classes, 1000),
        "class_slices": dict.fromkeys(classes, max(1, cases * slices // 2)),
        "class_cases": dict.fromkeys(classes, cases),
        "empty_cases": (),
    }
    return Fingerprint(**values | changes)


def values_of(data, *, base=TINY, machine=CPU, **options):
    return make_plan(data, machine, base=base, **options).values


def test_each_decision_is_a_field_or_an_option_of_the_recipe():
    parser = runpy.run_path(str(RECIPE))["build_parser"]()
    options = set(vars(parser.parse_args(["--data_dir", "a", "--output_dir", "b"])))
    fields = {field.name for kind in (SamedConfig, TrainingConfig) for field in dataclasses.fields(kind)}
    # Options of validation, folds and length come with the code that uses them.
    to_come = {"max_steps", "max_minutes", "patience", "validation_share"}
    assert RULES.keys() - to_come <= fields | options


def test_the_documentation_has_each_decision():
    rows = [line.split(" | ")[0] for line in PAGE.splitlines() if line.startswith("| `")]
    listed = re.findall(r"`(\w+)`", " ".join(rows))
    assert sorted(listed) == sorted(RULES)


def test_scans_like_the_hippocampus():
    data = fingerprint(cases=160, slices=36, modality="MR", slice_hw=(50, 35), spacing_mm=(1.0, 1.0, 1.0))
    plan = values_of(data)
    assert plan["image_size"] == 96  # 2 * 50, in steps of 32
    assert (plan["window"], plan["neighbour_mm"], plan["resampling"], plan["mirror"]) == (None, 1.0, "aligned", ())
    assert (plan["folds"], plan["validation_share"], plan["batch_size"], plan["accumulation_steps"]) == (5, 0.2, 32, 1)
    # Of 160 patients 32 are tested and 26 of 128 validated; 102 * 36 slices are 115 steps of 32, 20 times.
    assert (plan["max_steps"], plan["warmup_steps"], plan["validate_epochs"], plan["patience"]) == (2300, 115, 2, 5)
    assert plan["learning_rate"] == 0.003
    assert plan["targets"] == ("q_proj", "k_proj", "v_proj", "lin1", "lin2")


def test_one_case_is_trained_on_and_not_scored():
    plan = values_of(fingerprint(cases=1, slices=30))
    assert plan["fold"] == "all"
    assert "folds" not in plan
    assert (plan["validation_share"], plan["validate_epochs"], plan["patience"]) == (0.0, 0, 0)
    assert plan["batch_size"] == 7  # a quarter of 30
    assert plan["max_steps"] == 1500


def test_five_cases_are_five_folds_with_one_to_validate_on():
    made = make_plan(fingerprint(cases=5, slices=10), CPU, base=TINY)
    assert (made.values["folds"], made.values["validation_share"]) == (5, 0.2)
    assert made.values["batch_size"] == 7  # a quarter of 3 * 10
    reasons = {decision.name: decision.reason for decision in made.decisions}
    assert reasons["folds"] == "one of 5 is held out and scored, 1 of 5 patients"
    assert reasons["validation_share"] == "1 of 4 patients to train on choose the best adapter"
    assert values_of(fingerprint(cases=4, slices=10))["validation_share"] == 0.0  # 3 are left to train on


def test_twenty_slices_are_not_spent_in_the_warm_up():
    plan = values_of(fingerprint(cases=2, slices=10))
    assert plan["batch_size"] == 2  # a quarter of 10
    assert plan["max_steps"] == 1500
    assert plan["warmup_steps"] == 75
    assert plan["learning_rate"] == 0.00075  # 0.003 * sqrt(2 / 32)


def test_pictures_are_mirrored_both_ways_and_have_no_neighbours():
    data = fingerprint(cases=59, slices=1, modality="picture", classes=("nucleus",), slice_hw=(256, 320), colour=True)
    plan = values_of(data)
    assert (plan["plane"], plan["window"], plan["neighbour_mm"]) == (None, (0.0, 255.0), None)
    assert plan["mirror"] == ("rows", "columns")
    assert plan["image_size"] == 128
    # 12 of 59 are tested and 9 of 47 validated: 38 are left.
    assert plan["batch_size"] == 9
    assert values_of(data, base=VIT_B, machine=GPU)["image_size"] == 512
    sixteen = dataclasses.replace(data, intensity_range=(0.0, 4000.0))
    assert values_of(sixteen)["window"] is None
    assert values_of(dataclasses.replace(data, class_voxels={"eye_left": 1}))["mirror"] == ()


def test_a_thousand_cases_take_at_most_as_many_steps_as_samed():
    plan = values_of(fingerprint(cases=1000, slices=100, classes=SYNAPSE_CLASSES), base=VIT_B, machine=GPU)
    assert (plan["image_size"], plan["batch_size"], plan["max_steps"], plan["warmup_steps"]) == (512, 32, 15_000, 250)
    assert (plan["window"], plan["neighbour_mm"]) == (CT_WINDOW_HU, 3.0)


def test_windows_follow_what_is_labelled():
    lung = fingerprint(foreground=(-950.0, -900.0, -800.0, -600.0, -150.0))
    # 99 % span 800 HU; a quarter of them on each side.
    assert values_of(lung)["window"] == (-1150.0, 50.0)
    tube = fingerprint(foreground=(900.0, 900.0, 901.0, 902.0, 902.0))
    low, high = values_of(tube)["window"]
    assert low < 900 < 902 < high
    assert high - low >= 400
    assert values_of(fingerprint(modality="unknown"))["window"] is None


def test_rare_classes_are_drawn_more_often():
    data = fingerprint(class_slices={"liver": 500, "left kidney": 99})
    assert values_of(data)["foreground_share"] == 0.33
    assert (
        values_of(dataclasses.replace(data, class_slices={"liver": 500, "left kidney": 100}))["foreground_share"] == 0
    )


def test_far_slices_are_no_neighbours():
    assert values_of(fingerprint(spacing_mm=(5.0, 1.0, 1.0)))["neighbour_mm"] is None
    assert values_of(fingerprint(spacing_mm=None))["neighbour_mm"] is None


def test_memory_decides_batch_checkpointing_and_size():
    data = fingerprint(cases=100)
    by_memory = [values_of(data, base=VIT_B, machine=Machine("cuda", "", gb, 8)) for gb in (40.0, 8.0, 2.4, 1.7)]
    assert [plan["batch_size"] for plan in by_memory] == sorted((p["batch_size"] for p in by_memory), reverse=True)
    assert [plan["image_size"] for plan in by_memory[:3]] == [512, 512, 512]
    assert [plan["gradient_checkpointing"] for plan in by_memory] == [False, False, True, True]
    assert by_memory[1]["batch_size"] * by_memory[1]["accumulation_steps"] in range(24, 33)
    assert by_memory[3]["image_size"] < 512
    message = r"memory for one slice of 256 pixels, about 1\.6 GB free .* found 0\.5 GB on cuda \(\); free memory"
    with pytest.raises(InputError, match=message):
        values_of(data, base=VIT_B, machine=Machine("cuda", "", 0.5, 8))
    with pytest.raises(InputError, match="memory for one slice of 512 pixels"):
        values_of(data, base=VIT_B, machine=Machine("cuda", "", 1.7, 8), given={"image_size": 512})


def test_estimates_of_memory_are_those_that_were_measured():
    """Peaks of training with LoRA in attention and MLPs, per slice, in GB: the tiny SAM at three sizes."""
    for size, measured in ((64, 0.012), (96, 0.0245), (128, 0.0425)):
        assert TINY.slice_gb(size, num_labels=3) == pytest.approx(measured, rel=0.25)
    assert base_geometry("tiny-sam") == TINY
    assert base_geometry(str(TINY_SAM_DIR)) == dataclasses.replace(TINY, base=str(TINY_SAM_DIR))
    assert VIT_B.slice_gb(512, num_labels=9, checkpointed=True) < VIT_B.slice_gb(512, num_labels=9) / 4


def test_minutes_decide_the_steps():
    data = fingerprint(cases=100)
    plan = values_of(data, max_minutes=10, seconds_per_step=0.5)
    assert "max_steps" not in plan
    assert plan["max_minutes"] == 10
    assert plan["warmup_steps"] == 54  # a twentieth of 0.9 * 600 / 0.5 steps
    assert values_of(data, given={"max_minutes": 10.0}, seconds_per_step=0.5) == plan
    # Estimated on CPUs, in proportion to cores; unknown on GPUs.
    two, four = (
        values_of(data, machine=dataclasses.replace(CPU, cores=n), max_minutes=10)["warmup_steps"] for n in (2, 4)
    )
    assert four == pytest.approx(2 * two, abs=1)
    assert values_of(data, machine=GPU, max_minutes=10)["warmup_steps"] == 100  # of 20 passes
    message = r"one step at least, found 0\.01 minutes \(0\.6 seconds\); one step of 32 slices at 128 pixels takes"
    with pytest.raises(InputError, match=message):
        values_of(data, max_minutes=0.01, seconds_per_step=2.0)
    with pytest.raises(InputError, match=r"takes by estimate .*give --max_minutes"):
        values_of(data, max_minutes=0.0001)
    for options in ({"max_minutes": math.nan}, {"max_minutes": -1.0}, {"max_minutes": 1, "seconds_per_step": 0.0}):
        with pytest.raises(InputError, match=r"(max_minutes|seconds_per_step) must be a positive number of"):
            values_of(data, **options)


def test_what_is_given_overrules_that_decision_and_later_ones_go_by_it():
    data = fingerprint(cases=100)
    usual, given = make_plan(data, CPU, base=TINY), make_plan(data, CPU, base=TINY, given={"batch_size": 4, "seed": 7})
    changed = {name for name, value in given.values.items() if usual.values[name] != value}
    assert changed == {"batch_size", "accumulation_steps"}  # still a step every 16 slices
    assert next(d.reason for d in given.decisions if d.name == "batch_size") == "as given, in place of the plan's"
    assert values_of(data, given={"epochs": 3})["stop_epoch"] == 3
    assert "max_steps" not in values_of(data, given={"epochs": 3})
    assert values_of(data, given={"input_size": 32})["resampling"] == "samed"
    assert values_of(data, given={"method": "adalora"})["weight_average"] == 0.0
    without_rank = values_of(data, given={"method": "bitfit"}).keys()
    assert not {"rank", "targets", "lora_plus_ratio"} & without_rank
    assert "folds" not in values_of(data, given={"test_cases": ["a", "b"]})
    assert "validation_share" not in values_of(data, given={"validation_cases": ["a"]})
    kept = values_of(fingerprint(cases=2, slices=40, empty_slices=40), given={"empty_share": 0.0})
    assert kept["batch_size"] == 1  # the 40 slices to train on might be the empty ones


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({"class_slices": {"liver": 0}}, {}, "found none in 1000 slices of 20 cases"),
        ({"patients_with_foreground": 1}, {}, r"found those of 1 of 20, .*train on all of them with --fold all"),
        ({"cases": 1}, {"folds": 2}, r"expected 2 patients at least, .*found 1 \(1 cases\); --folds cannot divide"),
        ({"cases": 1}, {"test_cases": ["a"], "fold": 0}, "--fold and --test_cases cannot divide that"),
        ({}, {"folds": 21}, "expected 2 to 20 folds, .* found 21; give --folds 20"),
        (
            {"modality": "picture", "slices": 1},
            {"window": (-125.0, 275.0)},
            "intensities, 0 to 255, found -125 to 275",
        ),
        ({}, {"window": (4000.0, 5000.0)}, "scans' intensities, -1024 to 3071, found 4000 to 5000; leave --window out"),
        ({"spacing_mm": None}, {"neighbour_mm": 2.0}, "neighbours at 2 mm, found scans without spacing; leave"),
        ({"modality": "picture", "slices": 1}, {"neighbour_mm": 2.0}, "found pictures, which have no neighbours"),
        ({"colour": True}, {"neighbour_mm": 2.0}, "found colour pictures, whose three channels are taken"),
        ({}, {"plane": "coronal"}, "a fingerprint of coronal slices, found one of axial"),
        ({}, {"image_size": 100}, "multiple of 8, the patch size of tiny-sam, found 100; give 96"),
        ({}, {"epochs": 3, "max_minutes": 2.0}, "epochs 3 and max_minutes 2.0 each decide how long"),
        ({}, {"batch_size": 0}, "batch_size must be at least 1; found 0"),
        ({}, {"rank": -1}, "rank must be at least 1"),
    ],
)
def test_what_cannot_be_met_is_refused_with_numbers_and_a_way_out(changes, given, message):
    with pytest.raises(InputError, match=message):
        make_plan(fingerprint(**changes), CPU, base=TINY, given=given)


def test_a_plan_of_one_patient_with_foreground_may_train_on_all():
    data = fingerprint(patients_with_foreground=1)
    assert values_of(data, given={"fold": "all"})["fold"] == "all"


def test_a_plan_is_kept_as_json_and_refused_for_other_data(tmp_path):
    data = fingerprint(cases=59, slices=1, modality="picture")
    plan = make_plan(data, CPU, base=TINY, given={"epochs": 30})
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    assert make_plan(data, CPU, base=TINY, given={"epochs": 30}) == plan
    plan.require_data(data)
    other = fingerprint(cases=60, slices=1, modality="picture", data="f" * 16)
    with pytest.raises(InputError, match=r"other data \(cases 59 there, 60 now; .*expected files 0123.*, found ffff"):
        plan.require_data(other)
    with pytest.raises(InputError, match=r"\(data '0123456789abcdef' there, 'ffff"):
        plan.require_data(dataclasses.replace(data, data="f" * 16))
    plan.require_base(dataclasses.replace(TINY, base="copy of it"))
    with pytest.raises(InputError, match=r"another base \(.*tiny-sam.*\), found .*sam-vit-base.*; plan again"):
        plan.require_base(VIT_B)
    for damage in ({"decisions": [{"name": "mood", "value": 1, "reason": ""}]}, {"machine": None}, {"more": 1}):
        (tmp_path / "bad.json").write_text(json.dumps(plan.to_dict() | damage))
        with pytest.raises(InputError, match=r"bad\.json: .*"):
            read_plan(tmp_path / "bad.json")


def test_options_for_a_recipe(tmp_path):
    write_balls(tmp_path / "data")
    folder = open_folder(tmp_path / "data")
    parser = runpy.run_path(str(RECIPE))["build_parser"]()
    line = ["--data_dir", "d", "--output_dir", "o", "--patient_pattern", "(p.)_.", "--batch_size", "3", "--rank", "2"]
    given = given_options(parser, [*line, "--alpha", "4"])
    assert given.keys() == {"data_dir", "output_dir", "patient_pattern", "batch_size", "rank", "alpha"}
    adapter, training, options, plan = planned_options(folder, base="tiny-sam", given=given, machine=CPU)
    config = SamedConfig("tiny-sam", **adapter)
    assert (config.class_names, config.orientation, config.rank, config.alpha) == (("ball",), "LPS", 2, 4)
    assert (training.batch_size, training.learning_rate) == (3, plan.values["learning_rate"])
    assert (options["folds"], options["plane"]) == (3, "axial")
    assert planned_options(folder, base="tiny-sam", given=given, machine=CPU).plan == plan
    assert options_of(Plan.from_dict(plan.to_dict()), folder, given=given)[:3] == (adapter, training, options)


def _random_situation(rng):
    """Data, a machine and options of a random kind, consistent in themselves."""
    modality, patients = str(rng.choice(MODALITIES)), int(10 ** rng.uniform(0, 3.3))
    most = 1 if modality == "picture" else int(10 ** rng.uniform(0, 3))
    slices = np.sort(rng.integers(1, most + 1, patients))
    total = int(slices.sum())
    names = [f"class {number}" for number in range(rng.integers(1, 21))] + ["left lung"] * int(rng.random() < 0.3)
    known = modality != "picture" and rng.random() < 0.8
    height, width = (int(10 ** rng.uniform(0.5, 3.6)) for _ in "hw")
    data = fingerprint(
        cases=patients * int(rng.integers(1, 4)),
        patients=patients,
        patients_with_foreground=int(rng.integers(min(2, patients), patients + 1)),
        slices=total,
        empty_slices=int(rng.integers(0, total)),
        patient_slices=(int(slices[0]), int(slices[(patients - 1) // 2]), int(slices[-1])),
        slice_hw=(height, width),
        largest_hw=(2 * height, width),
        spacing_mm=tuple(float(x) for x in 10 ** rng.uniform(-1, 1, 3)) if known else None,
        plane="axial" if known else None,
        modality=modality,
        colour=modality == "picture" and rng.random() < 0.5,
        foreground=tuple(sorted(rng.uniform(-1000, 2000, 5).tolist())) if rng.random() < 0.8 else None,
        class_voxels=dict.fromkeys(names, 9),
        class_slices=dict(zip(names, rng.integers(1, total + 1, len(names)).tolist(), strict=False)),
    )
    machine = Machine(
        str(rng.choice(["cpu", "cuda", "mps"])), "any", float(10 ** rng.uniform(0.1, 2)), int(rng.integers(1, 65))
    )
    base = [TINY, *PUBLISHED.values(), BaseGeometry("golden", 128, 16, 2, 32)][rng.integers(5)]
    given = {"empty_share": float(rng.random())} if rng.random() < 0.3 else {}
    minutes = float(10 ** rng.uniform(-1, 4)) if rng.random() < 0.5 else None
    seconds = float(10 ** rng.uniform(-2, 1)) if rng.random() < 0.5 else None
    return data, machine, {"base": base, "given": given, "max_minutes": minutes, "seconds_per_step": seconds}


def test_two_thousand_random_plans_are_valid():
    rng = np.random.default_rng(0)
    fields = [{field.name for field in dataclasses.fields(kind)} for kind in (SamedConfig, TrainingConfig)]
    refused = []
    for number in range(2000):
        data, machine, options = _random_situation(rng)
        try:
            plan = make_plan(data, machine, **options)
        except InputError as error:
            refused.append(str(error))
            continue
        values = plan.values
        adapter, training = ({name: values[name] for name in values.keys() & names} for names in fields)
        config = SamedConfig("any", tuple(data.class_voxels), **adapter)
        trained = TrainingConfig(**training)
        assert config.image_size % options["base"].patch_size == 0
        assert trained.warmup_steps * 10 <= _steps(values, options, data)
        per_step = trained.batch_size * trained.accumulation_steps
        assert per_step == 1 or 4 * per_step <= data.slices
        assert values.get("folds", 2) in range(2, data.patients + 1) or values["fold"] == "all"
        assert all(len(decision.reason.splitlines()) == 1 for decision in plan.decisions)
        if number % 20 == 0:
            assert Plan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False))) == plan
    assert len(refused) < 400
    assert all("memory for one slice" in text or "time for one step" in text for text in refused)


def _steps(values, options, data):
    """Optimizer steps of a plan, as many as are certain: those of the time where it is measured."""
    if "max_steps" in values:
        return values["max_steps"]
    if options["seconds_per_step"] is None:
        return math.inf
    return options["max_minutes"] * 60 / options["seconds_per_step"]


def test_several_processes_share_a_step():
    one, four = (values_of(fingerprint(), machine=Machine("cuda", "A100", 78.0, 16, n)) for n in (1, 4))
    assert (one["batch_size"], four["batch_size"]) == (32, 8)
    for name in ("accumulation_steps", "learning_rate", "max_steps", "validate_epochs", "patience"):
        assert one[name] == four[name]


@pytest.mark.parametrize(
    ("machine", "precision"),
    [
        (Machine("cuda", "A100", 78.0, 16, bf16=True), "bf16"),
        (Machine("cuda", "T4", 15.0, 4), "fp16"),
        (Machine("cpu", "x86_64", 20.0, 2, bf16=True), "bf16"),
        (CPU, "no"),
        (Machine("mps", "arm64", 20.0, 8), "no"),
    ],
)
def test_precision_is_what_the_machine_multiplies_fast(machine, precision):
    assert values_of(fingerprint(), machine=machine)["mixed_precision"] == precision
    assert values_of(fingerprint(), machine=machine, given={"mixed_precision": "no"})["mixed_precision"] == "no"


def test_bfloat16_is_expected_to_take_less_time():
    steps = [
        values_of(fingerprint(), machine=machine, max_minutes=100)["warmup_steps"]
        for machine in (CPU, dataclasses.replace(CPU, bf16=True))
    ]
    assert steps[0] < steps[1]


def test_a_run_takes_the_precision_of_its_plan_or_of_the_file_or_of_the_machine(tmp_path, monkeypatch):
    """Its processes start in it before they plan; a setting of Accelerate goes before the machine."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    fp16 = make_plan(fingerprint(), Machine("cuda", "T4", 15.0, 4), base=TINY)
    bf16 = make_plan(fingerprint(), CPU, base=TINY, given={"mixed_precision": "bf16"})
    file, run = tmp_path / "plan.json", tmp_path / "run"
    run.mkdir()
    assert planned_precision(run) == best_precision(*this_device())[0]
    write_plan(fp16, file)
    assert planned_precision(run, plan_file=file) == "fp16"
    write_plan(bf16, run / "plan.json")
    assert planned_precision(run, plan_file=file) == "bf16"
    older = bf16.to_dict()
    older["decisions"] = [decision for decision in older["decisions"] if decision["name"] != "mixed_precision"]
    (run / "plan.json").write_text(json.dumps(older))
    assert planned_precision(run) == "no", "as runs of that time were trained"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert planned_precision(run) is None


def test_channels_fill_the_encoder_and_leave_no_room_for_neighbours():
    data = fingerprint(modality="MR", channels=(0, 2), channel_names=("T1", "FLAIR"))
    plan = make_plan(data, CPU, base=TINY)
    assert (plan.values["channels"], plan.values["window"], plan.values["neighbour_mm"]) == ((0, 2), None, None)
    reasons = {decision.name: decision.reason for decision in plan.decisions}
    assert reasons["channels"] == "T1 and FLAIR in the encoder's three channels, FLAIR in the third too"
    assert "each channel of each scan" in reasons["window"]
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert "channels" not in values_of(fingerprint())
    windows = values_of(fingerprint(), given={"window": ((-160.0, 240.0), (-500.0, 1300.0))})
    assert windows["neighbour_mm"] is None


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({}, {"neighbour_mm": 2.0}, r"found channels T1, FLAIR, .*--channel chooses one; leave --neighbour_mm out"),
        ({}, {"window": ((0.0, 1.0), (0.0, 2.0))}, "2 windows, .* found channels T1, FLAIR, of which --channel"),
        ({"channels": (), "channel_names": (), "normalized": True}, {"window": ((0.0, 1.0), (0.0, 2.0))}, r"\[0, 1\]"),
        ({"channels": (), "channel_names": (), "colour": True}, {"window": ((0.0, 1.0), (0.0, 2.0))}, "found colour"),
        ({"channels": (), "channel_names": ()}, {"window": ((0.0, 1.0), (4000.0, 5000.0))}, "found 4000 to 5000"),
    ],
)
def test_one_thing_alone_fills_the_channels(changes, given, message):
    with pytest.raises(InputError, match=message):
        make_plan(
            fingerprint(**{"channels": (0, 2), "channel_names": ("T1", "FLAIR")} | changes), CPU, base=TINY, given=given
        )


def test_a_single_channel_is_planned_as_scans_of_one_are(tmp_path):
    for in_4d in (True, False):
        root = two_modalities(tmp_path / str(in_4d), in_4d=in_4d)
        given = {"channel": ["FLAIR"]}
        folder = open_folder(root, channel=given["channel"], take_all=True)
        adapter, _, _, plan = planned_options(folder, base="tiny-sam", given=given, machine=CPU)
        assert (adapter["channel"], adapter["channels"], "channels" in plan.values) == (1, None, False)
        assert plan.values["neighbour_mm"] == 4
        assert replanned(plan, {"rank": 2}).values["neighbour_mm"] == 4
        both, _, _, plan = planned_options(open_folder(root, take_all=True), base="tiny-sam", machine=CPU)
        assert (both["channel"], both["channels"], both["channel_names"]) == (None, (0, 1), ("T1", "FLAIR"))
        assert both["neighbour_mm"] is None
        plan.require_data(take_fingerprint(open_folder(root, take_all=True)))
        with pytest.raises(InputError, match="read otherwise"):
            plan.require_data(take_fingerprint(open_folder(root, channel=["FLAIR", "T1"])))


def test_plans_of_older_versions_can_be_followed_and_changed():
    """They decide no precision, and their fingerprints list no unlabelled cases."""
    made = make_plan(fingerprint(empty_cases=("a",)), CPU, base=TINY)
    stored = made.to_dict()
    stored["decisions"] = [decision for decision in stored["decisions"] if decision["name"] != "mixed_precision"]
    del stored["fingerprint"]["empty_cases"], stored["machine"]["bf16"]
    older = Plan.from_dict(stored)
    assert older.values == made.values | {"mixed_precision": "no"}
    older.require_data(made.fingerprint)
    bf16 = replanned(older, {"mixed_precision": "bf16"})
    assert bf16.values["mixed_precision"] == "bf16"
    assert replanned(older, {"rank": 2}).values["mixed_precision"] == "no"


def test_only_what_is_given_of_prediction_is_planned():
    assert not {"tta", "smoothing_mm"} & values_of(fingerprint()).keys()
    assert values_of(fingerprint(), given={"tta": "none"})["tta"] == "none"
