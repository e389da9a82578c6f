"""Whole trainings of a few steps: validation, patience, minutes and steps, resumptions after a kill and for longer."""

import dataclasses
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator
from conftest import write_balls
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_planning import TINY, fingerprint

from samed_peft.config import SamedConfig, TrainingConfig
from samed_peft.datasets import Splits, describe_folder, load_slices, open_folder
from samed_peft.errors import InputError, NonFiniteLossError
from samed_peft.io import file_sha256, load_tensors
from samed_peft.training import Machine, Progress, Run, fit, make_plan
from samed_peft.training.claims import FolderBefore
from samed_peft.training.length import LengthRecord, Timing, fitted_steps, steps_that_fit
from samed_peft.training.progress import PARTING

FIT = sys.modules[fit.__module__]
SHORT = {"batch_size": 2, "warmup_steps": 1, "learning_rate": 0.003, "num_workers": 0, "epochs": 3, "stop_epoch": 3}
VALIDATED = {**SHORT, "validate_epochs": 1}


class KilledError(Exception):
    """Ends a training as a kill would: nothing is saved any more."""


class KilledRows:
    """Rows of a run that is killed in the step after one that has a checkpoint."""

    def __init__(self, rows, checkpoint):
        self.rows, self.checkpoint = rows, checkpoint

    def __len__(self):
        return len(self.rows)

    def __getattr__(self, name):
        return getattr(self.rows, name)

    def __getitem__(self, index):
        if self.checkpoint.is_dir():
            raise KilledError
        return self.rows[index]


@pytest.fixture(scope="module")
def balls(tmp_path_factory):
    """Function that makes a run on the six slices of a scan, and validates on another one."""
    root = tmp_path_factory.mktemp("data") / "balls"
    write_balls(root)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        folder = open_folder(root)
        config = SamedConfig("tiny-sam", **describe_folder(folder), image_size=32)
        cases = Splits(["p1_a"], ["p2_a"], ["p3_a"])
        classes = {"num_classes": 1, "orientation": config.orientation, "window": config.window}
        rows = load_slices(folder, cases.train, **classes, held_out=cases.held_out)

    def run(output_dir, *, killed_after=None, init=None, plan=None, **training):
        checkpoint = Path(output_dir) / "checkpoints" / f"step-{killed_after or 0:08d}"
        seen = rows if killed_after is None else KilledRows(rows, checkpoint)
        validated = cases if training.get("validate_epochs") else cases._replace(validation=[])
        return Run(config, TrainingConfig(**SHORT | training), seen, Path(output_dir), folder, validated, init, plan)

    return run


@pytest.fixture
def train(balls):
    """Function that trains such a run in a folder; returns the adapter that counts and the settings."""

    def train(output_dir, *, resume=False, killed_after=None, **options):
        run = balls(output_dir, killed_after=killed_after, **options)
        if killed_after is None:
            return fit(run, accelerator=Accelerator(cpu=True), resume=resume)
        with pytest.raises(KilledError):
            fit(run, accelerator=Accelerator(cpu=True), resume=resume)
        return None

    return train


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def progress_of(output_dir):
    (state,) = Path(output_dir).glob("checkpoints/*/state.json")
    return json.loads(state.read_text())["progress"]


def logged(output_dir):
    """Tag -> (step, value) in a run's log."""
    found = EventAccumulator(str(Path(output_dir) / "logs")).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_each_validation_is_logged_by_class_and_the_best_adapter_counts(train, tmp_path):
    adapter, _ = train(tmp_path / "run", **VALIDATED)
    found = logged(tmp_path / "run")
    assert found["validation/dice/ball"] == found["validation/dice"]
    assert [step for step, _ in found["validation/dice"]] == [3, 6, 9]
    best = max(range(3), key=lambda index: found["validation/dice"][index][1])
    assert progress_of(tmp_path / "run")["best_epoch"] == best + 1
    assert progress_of(tmp_path / "run")["since_best"] == 2 - best
    assert adapter == tmp_path / "run" / "adapter_best"


@pytest.mark.slow
def test_patience_stops_at_the_same_step_after_a_kill_at_any(train, tmp_path):
    # A rate of 0 improves nothing: the first validation is the best, and two more use up the patience.
    still = {**VALIDATED, "learning_rate": 1e-30, "epochs": 9, "stop_epoch": 9, "patience": 2, "checkpoint_steps": 1}
    adapter, _ = train(tmp_path / "whole", **still)
    assert (progress_of(tmp_path / "whole")["step"], progress_of(tmp_path / "whole")["since_best"]) == (9, 2)
    for step in (4, 8):  # the second one goes on where the first one was killed
        train(tmp_path / "killed", killed_after=step, resume=step > 4, **still)
    resumed, _ = train(tmp_path / "killed", resume=True, **still)
    assert weights(resumed) == weights(adapter)
    time = {"seconds": 0.0}
    assert progress_of(tmp_path / "killed") | time == progress_of(tmp_path / "whole") | time
    train(tmp_path / "killed", resume=True, **still)  # ended by patience, it stays ended
    assert progress_of(tmp_path / "killed")["step"] == 9
    train(tmp_path / "killed", resume=True, **still | {"epochs": 10, "stop_epoch": 10})  # and is patient once more
    assert progress_of(tmp_path / "killed")["step"] == 15


def parted(count=PARTING):
    progress = Progress(best_dice=0.9, best_epoch=1)
    for number in range(count + 1):
        progress = progress.stepped(number, loss=1 / (number + 1), seconds=0.0).validated(0.8 - number / 10, epoch=2)
    return progress


def test_training_and_validation_that_part_ways_are_told_once_with_their_numbers():
    message = parted().parting()
    assert "training loss fell from 1.0000 to 0.2500 and the validation Dice from 0.8000 to 0.5000" in message
    assert "epoch 1 (Dice 0.9000)" in message
    assert parted(PARTING - 1).parting() is None
    assert dataclasses.replace(parted(), has_parted=True).parting() is None
    rising_loss = parted().stepped(9, loss=5.0, seconds=0.0).validated(0.1, epoch=9)
    better_dice = parted().stepped(9, loss=0.01, seconds=0.0).validated(0.7, epoch=9)
    undefined = parted().stepped(9, loss=0.01, seconds=0.0).validated(float("nan"), epoch=9)
    assert [progress.parting() for progress in (rising_loss, better_dice, undefined)] == [None] * 3


def test_a_position_survives_json():
    for progress in (Progress(), parted(), dataclasses.replace(parted(), seconds=1.5, loss_sum=-1e-9)):
        assert Progress.from_dict(json.loads(json.dumps(vars(progress)))) == progress


def test_steps_in_place_of_epochs_end_within_one_and_are_validated_there(train, tmp_path):
    train(tmp_path / "run", **VALIDATED, max_steps=5)
    assert progress_of(tmp_path / "run")["step"] == 5
    found = logged(tmp_path / "run")
    assert [step for step, _ in found["validation/dice"]] == [3, 5]
    rates = [value for _, value in found["train/learning_rate"]]
    # The decay counts from the end of the warm-up, one step late as SAMed's, and towards the fifth step.
    assert rates == pytest.approx([0.003, 0.003, 0.003, *(0.003 * (1 - past / 5) ** 0.9 for past in (1, 2))])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:training and validation part ways")  # as they may, in times that vary
def test_minutes_become_steps_that_are_recorded_and_more_minutes_more_steps(train, tmp_path):
    out, minutes = tmp_path / "run", {**VALIDATED, "max_minutes": 0.06}
    adapter, settings = train(out, **minutes)
    used, before = progress_of(out), weights(out / "adapter")
    decided = {name: settings[name] for name in ("max_steps", "stop_step")}
    assert used["step"] == (decided["stop_step"] or decided["max_steps"]) == logged(out)["validation/dice"][-1][0]
    record = json.loads((out / "length.json").read_text())
    assert {name: record[name] for name in decided} == decided
    # A run that has ended has nothing to do, and decides nothing anew.
    assert train(out, resume=True, **minutes) == (adapter, settings)
    assert (progress_of(out), weights(out / "adapter")) == (used, before)
    _, longer = train(out, resume=True, **minutes | {"max_minutes": 0.06 + (used["seconds"] + 1) / 60})
    assert longer["max_steps"] > used["step"]
    assert progress_of(out)["step"] > used["step"]


def test_minutes_that_are_used_up_end_a_run_which_its_recorded_steps_repeat_to_the_bit(train, tmp_path):
    train(tmp_path / "run", killed_after=1, **SHORT, max_minutes=0.2, checkpoint_steps=1)
    planned = json.loads((tmp_path / "run" / "length.json").read_text())["max_steps"]
    (state,) = (tmp_path / "run").glob("checkpoints/*/state.json")
    values = json.loads(state.read_text())
    assert values["progress"]["step"] == 1 < planned
    values.pop("checksums")
    values["progress"]["seconds"] = 11.9999999  # the steps were slower than planned
    state.write_text(json.dumps(values))
    adapter, settings = train(tmp_path / "run", resume=True, **SHORT, max_minutes=0.2, checkpoint_steps=1)
    assert (settings["max_steps"], settings["stop_step"]) == (planned, 2)
    repeated, _ = train(tmp_path / "steps", **SHORT, max_steps=planned, stop_step=2)
    assert weights(repeated) == weights(adapter)


@pytest.mark.parametrize(
    ("minutes", "steps"),
    # Epochs of ten steps of 1 s, whose end takes 2 s; 3 s are used, and a margin of 3 % is left.
    [(0.11, 1), (0.2, 6), (0.25, 9), (0.27, 10), (0.31, 11), (1.0, 45)],
)
def test_steps_are_fitted_to_minutes_with_the_ends_of_their_epochs(minutes, steps):
    timing, training = Timing(step_s=1.0, epoch_end_s=2.0, spent_s=3.0), TrainingConfig(max_minutes=minutes)
    assert steps_that_fit(training, timing, used_s=3.0, per_epoch=10) == steps
    # One more would take longer than the minutes, less the margin.
    left_s = 0.97 * (60 * minutes - 3)
    takes = [count + 2 * -(-count // 10) for count in (steps, steps + 1)]
    assert takes[0] <= left_s < takes[1]


def test_minutes_for_less_than_a_step_are_refused_with_numbers(train, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new" / "run", tmp_path / "empty"):
        with pytest.raises(
            InputError,
            match=r"max_minutes 0\.0001 \(0\.006 s\): here a step takes .*; give --max_minutes [\d.]+ or more$",
        ):
            train(folder, max_minutes=0.0001)
    # Folders are as they were, so that the same command with other minutes begins a run.
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.filterwarnings("ignore:nothing to resume")  # as is true before the first step
def test_a_run_that_ends_before_its_first_step_leaves_its_folder_as_it_was(balls, train, tmp_path, monkeypatch):
    out, broken = tmp_path / "run", {"learning_rate": 1e30, "warmup_steps": 0}
    with monkeypatch.context() as patch:
        patch.setattr(FIT, "step_counts", _killed)
        with pytest.raises(KilledError):
            train(out, resume=True)
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr("samed_peft.training.loop._accumulate", lambda *_, **__: (float("nan"),) * 3)
        with pytest.raises(NonFiniteLossError):
            train(out, **broken)
    assert not out.exists()
    train(out, killed_after=1, checkpoint_steps=1)
    before = files_of(out)
    # A run that has taken steps stays, whatever comes.
    with monkeypatch.context() as patch:
        patch.setattr(FIT, "step_counts", _killed)
        with pytest.raises(KilledError):
            train(out, resume=True, checkpoint_steps=1)
    assert files_of(out) == before
    train(out, resume=True, checkpoint_steps=1)
    assert progress_of(out)["step"] == 9


def _killed(*_):
    raise KilledError


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_more_minutes_that_are_refused_change_nothing(balls, train, tmp_path):
    out = tmp_path / "run"
    train(out, killed_after=1, max_minutes=0.2, checkpoint_steps=1)
    (state,) = out.glob("checkpoints/*/state.json")
    values = json.loads(state.read_text())
    values.pop("checksums")
    values["progress"]["seconds"] = 12.0
    state.write_text(json.dumps(values))
    kept = {name: (out / name).read_bytes() for name in ("run.json", "length.json")}
    with pytest.raises(InputError, match="give --max_minutes"):
        train(out, resume=True, max_minutes=0.2001, checkpoint_steps=1)
    assert {name: (out / name).read_bytes() for name in kept} == kept
    assert not (out / "plan.json").exists()


def planned_minutes(*, seconds_per_step, device="cpu", **given):
    """A plan of a minute on any machine, and the settings that follow from it on the rows of `balls`."""
    machine, options = Machine(device, "", 20.0, 2), {"max_minutes": 1, "seconds_per_step": seconds_per_step}
    plan = make_plan(fingerprint(), machine, base=TINY, given=given, **options)
    names = ("warmup_steps", "validate_epochs", "patience", "weight_average", "max_minutes", "learning_rate")
    return plan, SHORT | {name: plan.values[name] for name in names}


@pytest.mark.parametrize(
    ("device", "seconds"), [("cpu", 0.01), ("cuda", None), ("cpu", 3.0)], ids=["too fast", "unknown", "too slow"]
)
def test_decisions_of_a_plan_are_made_anew_for_the_steps_that_fit(
    train, tmp_path, monkeypatch, capsys, device, seconds
):
    plan, planned = planned_minutes(seconds_per_step=seconds, device=device)
    # As if a step took half a second: 1 min is 116 of them, and about 3 epochs of 40.
    monkeypatch.setattr(FIT, "seconds_per_step", lambda *_, **__: 0.5)
    monkeypatch.setattr(FIT, "seconds_to_validate", lambda *_, **__: 0.0)
    train(tmp_path / "killed", plan=plan, killed_after=4, checkpoint_steps=2, **planned)
    record = json.loads((tmp_path / "killed" / "length.json").read_text())
    steps, decided = record["max_steps"], planned | record["decisions"]
    assert 90 < steps < 120
    assert decided["warmup_steps"] == steps // 20
    # An average over a twentieth of the steps if these are 10 at least; about three epochs, each validated.
    assert (decided["weight_average"], decided["validate_epochs"], decided["patience"]) == (0.0, 1, 0)
    line = next(line for line in capsys.readouterr().out.splitlines() if "by the plan's rules" in line)
    assert line.startswith(f"{steps} steps of 0.5 s fit into 1 minutes, other than planned")
    assert f"warmup_steps {steps // 20} in place of {planned['warmup_steps']}" in line
    assert json.loads((tmp_path / "killed" / "plan.json").read_text()) == plan.to_dict()
    # The rest takes the same steps with or without the kill, as if these settings had been given.
    end = {"max_steps": steps, "stop_step": 9}
    shorten(tmp_path / "killed", stop_step=9)
    resumed, settings = train(tmp_path / "killed", plan=plan, resume=True, checkpoint_steps=2, **planned)
    assert {name: settings[name] for name in record["decisions"]} == record["decisions"]
    repeated, _ = train(tmp_path / "given", **decided | {"max_minutes": None} | end)
    assert weights(resumed) == weights(repeated)
    assert "by the plan's rules" not in capsys.readouterr().out


def shorten(folder, *, stop_step):
    """Let a run end early, as if its minutes had been used up."""
    record = json.loads((folder / "length.json").read_text())
    (folder / "length.json").write_text(json.dumps(record | {"stop_step": stop_step}))


def test_a_plan_that_expected_about_as_many_steps_is_followed(train, tmp_path, monkeypatch, capsys):
    plan, planned = planned_minutes(seconds_per_step=0.6)
    monkeypatch.setattr(FIT, "seconds_per_step", lambda *_, **__: 0.5)
    train(tmp_path / "run", plan=plan, killed_after=2, checkpoint_steps=2, **planned)
    assert json.loads((tmp_path / "run" / "length.json").read_text())["decisions"] == {}
    assert "by the plan's rules" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:nothing to resume")  # as is true before the first step
def test_an_average_that_is_decided_on_with_the_steps_survives_a_kill_at_any_time(train, tmp_path, monkeypatch):
    plan, planned = planned_minutes(seconds_per_step=20.0, warmup_steps=0)
    assert plan.values["weight_average"] == 0.0
    monkeypatch.setattr(FIT, "seconds_per_step", lambda *_, **__: 0.05)
    monkeypatch.setattr(FIT, "seconds_to_validate", lambda *_, **__: 0.0)
    options = {"plan": plan, "checkpoint_steps": 2, **planned}
    with monkeypatch.context() as patch:
        patch.setattr(FolderBefore, "_restore", lambda _: None)  # as a kill does not
        train(tmp_path / "one", killed_after=0, **options)  # with a checkpoint from before it was decided
    record = json.loads((tmp_path / "one" / "length.json").read_text())
    assert 0.9 < record["decisions"]["weight_average"] < 1
    assert "warmup_steps" not in record["decisions"]  # it was given
    assert not list((tmp_path / "one").glob("checkpoints/*/average.safetensors"))
    shorten(tmp_path / "one", stop_step=7)
    train(tmp_path / "one", resume=True, killed_after=4, **options)
    resumed, _ = train(tmp_path / "one", resume=True, **options)
    given = planned | record["decisions"] | {"max_minutes": None, "max_steps": record["max_steps"], "stop_step": 7}
    repeated, _ = train(tmp_path / "given", **given)
    assert weights(resumed) == weights(repeated)


def test_validations_count_in_the_steps_that_fit():
    """More steps than expected are validated less often, and the time of that is what counts."""
    timing = Timing(step_s=0.01, epoch_end_s=0.0, spent_s=0.0, validation_s=4.0)
    plan, planned = planned_minutes(seconds_per_step=20.0)
    training = TrainingConfig(
        **{name: value for name, value in planned.items() if name not in ("epochs", "stop_epoch")}
    )
    assert training.validate_epochs == 1
    fit = partial(steps_that_fit, timing=timing, used_s=0.0, per_epoch=40)
    often = fit(training)
    steps, decided = fitted_steps(training, plan, Progress(), fit=fit)
    assert steps >= often
    assert steps == fit(dataclasses.replace(training, validate_epochs=decided.get("validate_epochs", 1)))
    assert fitted_steps(training, plan, Progress(step=3), fit=fit) == (often, None)
    assert fitted_steps(training, None, Progress(), fit=fit) == (often, None)


@pytest.mark.slow
def test_a_killed_run_goes_on_for_longer_and_to_the_bit(train, tmp_path, capsys):
    longer = SHORT | {"epochs": 5, "stop_epoch": 5, "checkpoint_steps": 2}
    train(tmp_path / "one", killed_after=4, **SHORT, checkpoint_steps=2)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    with pytest.raises(InputError, match="fewer epochs, steps or minutes; pass --resume"):
        train(tmp_path / "one", **longer)
    adapter, settings = train(tmp_path / "one", resume=True, **longer)
    line = "from step 4 on with epochs 5 in place of 3, stop_epoch 5 in place of 3: the learning rate follows a horizon"
    assert f"{line} of 15 steps" in capsys.readouterr().out
    assert (progress_of(tmp_path / "one")["step"], settings["epochs"]) == (15, 5)
    train(tmp_path / "two", resume=True, killed_after=6, **longer)
    resumed, _ = train(tmp_path / "two", resume=True, **longer)
    assert weights(resumed) == weights(adapter)
    record = json.loads((tmp_path / "two" / "length.json").read_text())
    lengths = {"before": {"epochs": 3, "stop_epoch": 3}, "after": {"epochs": 5, "stop_epoch": 5}}
    assert record["extended"] == [{"step": 4, **lengths}]
    rates = [value for _, value in logged(tmp_path / "two")["train/learning_rate"]]
    decayed = [(1 - 1 / 9) ** 0.9, (1 - 2 / 15) ** 0.9, (1 - 3 / 15) ** 0.9]  # from the fourth step on, as SAMed's
    assert rates[3:6] == pytest.approx([0.003 * factor for factor in decayed])
    for fewer in ({"epochs": 3, "stop_epoch": 3}, {"epochs": 6, "stop_epoch": 5}, {"epochs": 5, "stop_epoch": 4}):
        with pytest.raises(InputError, match=r"other settings .* only epochs, steps or minutes may be more"):
            train(tmp_path / "two", resume=True, **longer | fewer)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}x",
        '{"decisions": {"rank": 1}}',
        '{"decisions": [1]}',
        '{"colour": 1}',
        '{"max_steps": 0}',
        '{"extended": 5}',
        '{"extended": [{"step": 1}]}',
    ],
)
def test_a_damaged_record_of_the_length_is_named(tmp_path, content):
    (tmp_path / "length.json").write_text(content)
    with pytest.raises(InputError, match=r"length\.json"):
        LengthRecord.read(tmp_path)


def test_a_training_goes_on_from_an_adapter_that_its_resumption_must_name_again(train, tmp_path):
    still = {"max_steps": 1, "learning_rate": 1e-30, "weight_decay": 0.0, "warmup_steps": 0}
    first, settings = train(tmp_path / "first", max_steps=2)
    second, continued = train(tmp_path / "second", init=first, **still)
    assert "init" not in settings
    assert continued["init"] == file_sha256(first / "adapter_model.safetensors")
    ours, theirs = (load_tensors(folder / "adapter_model.safetensors") for folder in (second, first))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match=rf"other settings \(init: {continued['init']} there, None now"):
        train(tmp_path / "second", resume=True, **still)
