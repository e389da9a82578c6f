"""The plan of a run: made once, kept in its folder, and used again when the run is resumed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from samed_peft.datasets.fingerprint import take_fingerprint
from samed_peft.datasets.folder import LabelledFolder
from samed_peft.errors import InputError, printable
from samed_peft.models.geometry import base_geometry
from samed_peft.training.planning import PLAN_FILE, Plan, PlannedOptions, options_of, planned_options, read_plan


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
            plan = _plan(folder, output_dir, base=base, given=given, plan_file=plan_file)
            print(printable(plan.table()))
            shared = [plan.to_dict(), None]
        except InputError as error:
            shared = [None, str(error)]
    values, refusal = broadcast_object_list(shared)
    if refusal is not None:
        raise InputError(refusal)
    return options_of(Plan.from_dict(values), folder, given=given)


def _plan(
    folder: LabelledFolder, output_dir: Path, *, base: str, given: Mapping[str, Any], plan_file: Path | None
) -> Plan:
    if (output_dir / PLAN_FILE).is_file():  # whose data and base the record of the run checks
        return read_plan(output_dir / PLAN_FILE).with_given(given)
    if plan_file is None:
        return planned_options(folder, base=base, given=given).plan
    plan = read_plan(plan_file)
    reading = {name: given.get(name) for name in ("class_names", "plane", "patient_pattern")}
    plan.require_data(take_fingerprint(folder, **reading))
    plan.require_base(base_geometry(base))
    return plan.with_given(given)
