"""Plans that are read and given other options: what hangs on them is decided anew, and nothing else."""

import dataclasses
import json
import math
from collections.abc import Mapping

import numpy as np
import pytest
from conftest import write_balls
from test_planning import CPU, GPU, TINY, VIT_B, _random_situation, fingerprint

from samed_peft.config import METHODS, SamedConfig, TrainingConfig
from samed_peft.datasets import open_folder
from samed_peft.errors import InputError
from samed_peft.training import Machine, Plan, make_plan, planned_options, write_plan
from samed_peft.training.contradictions import LENGTHS
from samed_peft.training.decisions import RULES
from samed_peft.training.planned_runs import options_of, plan_of_run
from samed_peft.training.replanning import decisions_for_steps, expected_steps, replanned
from samed_peft.training.situation import OPTIONS, Situation

DATA = fingerprint(cases=100)
GIVEN = [
    {"method": "ia3"},
    {"method": "adalora"},
    {"input_size": 32},
    {"image_size": 64},
    {"batch_size": 4},
    {"batch_size": 1, "accumulation_steps": 2},
    {"neighbour_mm": 5.0},
    {"empty_share": 0.0},
    {"decay_power": 0.5},
    {"test_cases": ["a", "b"]},
    {"split_file": "splits.json"},
    {"validation_cases": ["a"]},
    {"validate_epochs": 0},
    {"validation_share": 0.0},
    {"fold": "all"},
    {"folds": 3},
    {"epochs": 2},
    {"max_steps": 70},
    {"max_minutes": 3.0},
    {"seed": 3, "alpha": 2},
]


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: "-".join(given))
@pytest.mark.parametrize("minutes", [None, 10.0])
def test_a_plan_with_options_is_that_which_they_would_have_made(given, minutes):
    plan = make_plan(DATA, CPU, base=TINY, max_minutes=minutes)
    minutes = None if given.keys() & set(LENGTHS) else minutes
    read = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert replanned(read, given) == make_plan(DATA, CPU, base=TINY, given=given, max_minutes=minutes)


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: "-".join(given))
def test_a_plan_made_with_options_and_read_without_them_keeps_those_that_it_decided_on(given):
    plan = make_plan(DATA, CPU, base=TINY, given=given)
    stays = {name: value for name, value in given.items() if name in RULES}
    assert replanned(plan, {}) == make_plan(DATA, CPU, base=TINY, given=stays)


def test_random_plans_take_random_options_as_if_they_had_been_given_before():
    rng, taken = np.random.default_rng(1), 0
    while taken < 150:
        data, machine, options = _random_situation(rng)
        given = dict(GIVEN[rng.integers(len(GIVEN))])
        lengths = {} if given.keys() & set(LENGTHS) else {"max_minutes": options["max_minutes"]}
        try:
            plan = make_plan(data, machine, **options | {"seconds_per_step": None})
            wanted = make_plan(data, machine, base=options["base"], given=options["given"] | given, **lengths)
        except InputError:
            continue
        assert replanned(plan, options["given"] | given) == wanted
        taken += 1


def edited(plan, **values):
    """A plan whose file someone has edited."""
    stored = plan.to_dict()
    for decision in stored["decisions"]:
        decision["value"] = values.get(decision["name"], decision["value"])
    return Plan.from_dict(stored)


def test_what_does_not_hang_on_the_options_stays_to_the_letter():
    plan = edited(make_plan(DATA, CPU, base=TINY), learning_rate=1e-4, max_steps=3000, mirror=["rows"], rank=32)
    assert replanned(plan, {"seed": 3, "alpha": 3}) == plan
    found = replanned(plan, {"fold": 1, "neighbour_mm": 5.0}).values
    assert found == plan.values | {"fold": 1, "neighbour_mm": 5.0}
    smaller = replanned(plan, {"batch_size": 1, "accumulation_steps": 1}).values
    assert (smaller["mirror"], smaller["rank"]) == (("rows",), 32)
    assert smaller["learning_rate"] == 0.00053  # 0.003 * sqrt(1 / 32): it hangs on the batch
    assert smaller["max_steps"] == 15_000
    no_ranks = replanned(plan, {"method": "ia3"}).values
    assert no_ranks == {n: v for n, v in plan.values.items() if n not in ("rank", "lora_plus_ratio")}
    # Later decisions go by what was edited: a twentieth of 3000 steps, and no more than before.
    assert replanned(edited(plan, warmup_steps=7), {"epochs": 1}).values["warmup_steps"] == 5


def test_what_users_decided_before_stays_as_long_as_it_means_anything():
    plan = make_plan(
        DATA, CPU, base=TINY, given={"learning_rate": 1e-4, "rank": 2, "epochs": 9, "resampling": "aligned"}
    )
    changed = replanned(plan, {"batch_size": 1}).values
    assert (changed["learning_rate"], changed["rank"], changed["epochs"]) == (1e-4, 2, 9)
    assert "rank" not in replanned(plan, {"method": "ia3"}).values
    timed = replanned(plan, {"max_minutes": 2.0}).values
    assert timed.keys() & {*LENGTHS, "stop_epoch"} == {"max_minutes"}
    assert replanned(plan, {"stop_epoch": 3}).values["epochs"] == 9
    assert replanned(plan, {"input_size": 32}).values["resampling"] == "samed"
    every_case = make_plan(DATA, CPU, base=TINY, given={"fold": "all"})
    assert "fold" not in replanned(every_case, {"test_cases": ["a"]}).values


def test_a_machine_that_an_edited_plan_overrules_is_asked_only_where_something_changes():
    small = dataclasses.replace(make_plan(DATA, GPU, base=VIT_B), machine=Machine("cuda", "", 1.7, 8))
    assert replanned(small, {"rank": 2}).values == small.values | {"rank": 2}
    with pytest.raises(InputError, match="memory for one slice of 768 pixels"):
        replanned(small, {"image_size": 768})


def test_a_measured_time_follows_the_size_of_a_step():
    plan = make_plan(DATA, CPU, base=TINY, max_minutes=10, seconds_per_step=0.5, given={"image_size": 128})
    assert expected_steps(plan) == 1080  # 0.9 * 600 / 0.5
    assert Plan.from_dict(plan.to_dict()) == plan
    smaller = replanned(plan, {"image_size": 64})
    assert smaller.seconds_per_step == pytest.approx(0.5 / 4)
    assert expected_steps(smaller) == 4320
    assert smaller.values["warmup_steps"] == 216  # a twentieth


class Read(dict):
    """Options that note which of them are asked for."""

    def __init__(self, options, names):
        super().__init__(options)
        self.names = names

    def get(self, name, default=None):
        self.names.add(name)
        return super().get(name, default)

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)

    def __contains__(self, name):
        self.names.add(name)
        return super().__contains__(name)

    def keys(self):
        keys = super().keys()
        return ReadKeys(keys, self.names)


class ReadKeys:
    def __init__(self, keys, names):
        self.keys, self.names = keys, names

    def __rand__(self, others):
        self.names.update(others)
        return self.keys & others


def test_every_option_that_a_rule_reads_is_kept_with_the_plan():
    names: set[str] = set()
    for machine in (CPU, GPU):
        for given in GIVEN:
            others = {name: value for name, value in given.items() if name != "max_minutes"}
            situation = Situation(DATA, machine, TINY, Read(others, names), given.get("max_minutes"), None)
            for name, rule in RULES.items():
                decided = (given[name],) if name in given else rule(situation)
                if decided is not None:
                    situation.chosen[name] = decided[0]
    assert isinstance(situation.given, Mapping)
    assert {"method", "max_steps"} < names  # they are noted
    assert names - {*RULES} == {*OPTIONS}


def test_decisions_for_another_number_of_steps():
    plan = make_plan(DATA, GPU, base=TINY, max_minutes=10)
    assert expected_steps(plan) is None
    assert plan.values["patience"] == 0
    found = decisions_for_steps(plan, 2000)
    as_given = make_plan(DATA, GPU, base=TINY, given={"max_steps": 2000}).values
    assert found == {name: as_given[name] for name in ("warmup_steps", "weight_average", "validate_epochs", "patience")}
    assert found["patience"] > 0
    fewer = decisions_for_steps(plan, 2000, validate_epochs=3)
    epochs = math.ceil(2000 / math.ceil(64 * 50 / 16))
    assert (fewer["validate_epochs"], fewer["patience"]) == (3, 0 if math.ceil(epochs / 3) < 10 else epochs // 6)
    given = make_plan(DATA, GPU, base=TINY, max_minutes=10, given={"patience": 4, "warmup_steps": 9})
    assert decisions_for_steps(given, 2000).keys() == {"weight_average", "validate_epochs"}


@pytest.mark.parametrize(
    "damage",
    [{"options": {"mood": 1}}, {"options": 3}, {"seconds_per_step": 0}, {"seconds_per_step": "1"}, {"decisions": []}],
)
def test_a_damaged_plan_is_refused(damage):
    with pytest.raises(InputError, match=r"plan again|seconds_per_step of a plan must be a positive number"):
        Plan.from_dict(make_plan(DATA, CPU, base=TINY).to_dict() | damage)


class _Alone:
    is_main_process, num_processes = True, 1


def test_a_plan_file_of_the_same_data_read_otherwise(tmp_path, capsys):
    write_balls(tmp_path / "data")
    folder, file = open_folder(tmp_path / "data"), tmp_path / "plan.json"
    write_plan(planned_options(folder, base="tiny-sam", given={"patient_pattern": "(p.)_."}, machine=CPU).plan, file)

    def follow(**given):
        options = {"base": "tiny-sam", "accelerator": _Alone, "plan_file": file}
        return plan_of_run(folder, tmp_path / "out", given=given, **options)

    with pytest.raises(InputError, match=r"same files, read otherwise \(patients 3 there, 4 now.*--patient_pattern as"):
        follow()
    pattern = {"patient_pattern": "(p.)_."}
    assert follow(**pattern).options["plane"] == "axial"
    across = follow(plane="coronal", **pattern)
    assert (across.adapter["orientation"], across.options["plane"]) == ("LIP", "coronal")
    assert (
        across.plan == planned_options(folder, base="tiny-sam", given=pattern | {"plane": "coronal"}, machine=CPU).plan
    )
    follow(class_names=["sphere"], **pattern)
    assert "classes: sphere" in capsys.readouterr().out


def test_each_method_and_size_of_a_plan_file_gives_configs_that_are_accepted(tmp_path):
    write_balls(tmp_path / "data")
    folder = open_folder(tmp_path / "data")
    plan = planned_options(folder, base="tiny-sam", machine=CPU).plan
    for given in [*({"method": name} for name in METHODS), {"input_size": 32}, {"neighbour_mm": 9.0}, {"tile": True}]:
        adapter, training, _, _ = options_of(replanned(plan, given), folder, given=given)
        config = SamedConfig("tiny-sam", **adapter)
        assert all(vars(config)[name] == value for name, value in given.items())
        if "lora_plus_ratio" not in METHODS[config.method].options:
            assert training.lora_plus_ratio == TrainingConfig().lora_plus_ratio
