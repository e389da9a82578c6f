"""The plan of a run and the settings that follow: made once, kept in its folder, used again when it is resumed."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from samed_peft.config import SamedConfig, TrainingConfig
from samed_peft.datasets.choices import class_names_for
from samed_peft.datasets.fingerprint import take_fingerprint
from samed_peft.datasets.folder import LabelledFolder
from samed_peft.errors import InputError, printable
from samed_peft.models.geometry import base_geometry
from samed_peft.training.decisions import RULES
from samed_peft.training.input_decisions import best_precision
from samed_peft.training.machine import Machine, this_device, this_machine
from samed_peft.training.planning import PLAN_FILE, Plan, make_plan, read_plan
from samed_peft.training.replanning import replanned


class PlannedOptions(NamedTuple):
    """What a recipe needs of a plan."""

    adapter: dict[str, Any]  # fields of `SamedConfig`, without the base
    training: TrainingConfig
    options: dict[str, Any]  # decisions that are options of the recipe alone: folds, fold, validation_share, plane
    plan: Plan


def planned_options(
    folder: LabelledFolder,
    cases: Sequence[str] | None = None,
    *,
    base: str,
    given: Mapping[str, Any] = {},
    machine: Machine | None = None,
    seconds_per_step: float | None = None,
) -> PlannedOptions:
    """Take the fingerprint of a folder and plan a training on it.

    Args:
        folder: from `open_folder`.
        cases: names of its cases; by default all.
        base: Hub id, local folder, Meta `.pth` or tiny-sam.
        given: the options that users gave, which overrule the plan's; `given_options` finds them. `class_names`,
            `plane`, `patient_pattern` and `max_minutes` count too.
        machine: by default the one that this process runs on.
        seconds_per_step: see `make_plan`.

    Raises:
        InputError: see `take_fingerprint` and `make_plan`.
    """
    given = {name: value for name, value in given.items() if value is not None}
    reading = {name: given.get(name) for name in ("class_names", "plane", "patient_pattern")}
    fingerprint = take_fingerprint(folder, cases, **reading)
    plan = make_plan(
        fingerprint,
        machine or this_machine(),
        base=base_geometry(base),
        given=given,
        seconds_per_step=seconds_per_step,
    )
    return options_of(plan, folder, given=given)


def options_of(plan: Plan, folder: LabelledFolder, *, given: Mapping[str, Any] = {}) -> PlannedOptions:
    """The configs of a plan, made now or read from a file, with what users gave in place of its decisions.

    Raises:
        InputError: a value is out of range.
    """
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in {**plan.values, **given}.items()
    }
    adapter_names, training_names = (
        {field.name for field in dataclasses.fields(kind)} for kind in (SamedConfig, TrainingConfig)
    )
    of_data = {
        "class_names": class_names_for(folder, given.get("class_names")),
        "orientation": plan.fingerprint.orientation,
        "channel": folder.channel,
        "channels": folder.channels or None,
        "channel_names": folder.channel_names or None,
        "channel_files": folder.channel_files,
    }
    adapter = {name: value for name, value in values.items() if name in adapter_names - {"base"}} | of_data
    training = TrainingConfig(**{name: value for name, value in values.items() if name in training_names})
    known = adapter_names | training_names
    return PlannedOptions(
        adapter, training, {name: value for name, value in values.items() if name in RULES and name not in known}, plan
    )


def planned_precision(output_dir: Path, *, plan_file: Path | None = None) -> str | None:
    """The mixed precision of a planned run, which its processes need before anything is planned.

    That of the plan of the folder, or else of the file, or else the machine's best; None for Accelerate's setting, if
    that is another than none.

    Args:
        output_dir: of the run.
        plan_file: of `samed plan --output`, or None.

    Raises:
        InputError: a plan cannot be read.
    """
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        return None
    file = output_dir / PLAN_FILE if (output_dir / PLAN_FILE).is_file() else plan_file
    if file is not None:
        return str(read_plan(file).values.get("mixed_precision", "no"))
    return best_precision(*this_device())[0]


def plan_of_run(
    folder: LabelledFolder,
    output_dir: Path,
    *,
    base: str,
    given: Mapping[str, Any],
    accelerator: Accelerator,
    plan_file: Path | None = None,
) -> PlannedOptions:
    """Plan a run and print the plan; the main process does so, and all get the same.

    Args:
        folder: from `open_folder`.
        output_dir: of the run; the plan that it holds already goes before a new one.
        base: as for `load_sam`.
        given: options of the command line, from `given_options`, which overrule the plan.
        accelerator: from `start_run`.
        plan_file: of `samed plan --output`, or None.

    Raises:
        InputError: see `planned_options`; the plan of `plan_file` is one of other data or of another base.
    """
    given = {name: value for name, value in given.items() if value is not None}
    shared: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            machine = this_machine(processes=accelerator.num_processes)
            if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
                given = {"mixed_precision": accelerator.mixed_precision} | given
            plan = _plan(folder, output_dir, base=base, given=given, plan_file=plan_file, machine=machine)
            print(printable(plan.table()))
            shared = [plan.to_dict(), None]
        except InputError as error:
            shared = [None, str(error)]
    values, refusal = broadcast_object_list(shared)
    if refusal is not None:
        raise InputError(refusal)
    return options_of(Plan.from_dict(values), folder, given=given)


def _plan(
    folder: LabelledFolder,
    output_dir: Path,
    *,
    base: str,
    given: Mapping[str, Any],
    plan_file: Path | None,
    machine: Machine,
) -> Plan:
    if (output_dir / PLAN_FILE).is_file():  # whose data and base the record of the run checks
        return read_plan(output_dir / PLAN_FILE).prolonged(given)
    if plan_file is None:
        return planned_options(folder, base=base, given=given, machine=machine).plan
    plan = read_plan(plan_file)
    reading = {name: given[name] for name in ("class_names", "plane", "patient_pattern") if name in given}
    fingerprint = take_fingerprint(folder, **{"plane": plan.fingerprint.plane} | reading)
    plan.require_data(fingerprint, reading=reading)
    plan.require_base(base_geometry(base))
    return replanned(plan, given, fingerprint=fingerprint)
