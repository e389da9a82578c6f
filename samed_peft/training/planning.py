"""Plan a training from the data, the machine and the base: every decision with its reason."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, Self

from samed_peft.config.fields import short
from samed_peft.datasets.fingerprint import Fingerprint
from samed_peft.errors import InputError
from samed_peft.io import read_json, write_json
from samed_peft.models.geometry import BaseGeometry
from samed_peft.training.contradictions import LENGTHS, require_plannable, require_time
from samed_peft.training.decisions import RULES
from samed_peft.training.machine import Machine
from samed_peft.training.situation import OPTIONS, Situation

PLAN_FILE = "plan.json"
"""Name of a plan kept with a run or an adapter."""

_GIVEN = "as given, in place of the plan's"


class Decision(NamedTuple):
    """One decision of a plan."""

    name: str  # of a field of a config, or of an option of recipes/finetune.py
    value: Any
    reason: str  # one line

    @property
    def is_given(self) -> bool:
        """Whether users made it."""
        return self.reason == _GIVEN or self.name == "max_minutes"


@dataclass(frozen=True)
class Plan:
    """All decisions, and what they were made from.

    Attributes:
        decisions: in the order in which they were made.
        fingerprint: of the data.
        machine: that will train.
        base: measures of the SAM that is adapted.
        options: that rules went by although no decision is about them, such as method; paths as text.
        seconds_per_step: as measured, for the step that is planned; None if it was estimated or unknown.
    """

    decisions: tuple[Decision, ...]
    fingerprint: Fingerprint
    machine: Machine
    base: BaseGeometry
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds_per_step: float | None = None

    @property
    def values(self) -> dict[str, Any]:
        """Name -> value of each decision."""
        return {decision.name: decision.value for decision in self.decisions}

    def is_given(self, name: str) -> bool:
        """Whether users made a decision."""
        return any(decision.name == name and decision.reason == _GIVEN for decision in self.decisions)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        parts = {name: vars(self)[name].to_dict() for name in _PARTS}
        decisions = [decision._asdict() | {"value": _listed(decision.value)} for decision in self.decisions]
        options = {name: _listed(value) for name, value in self.options.items()}
        return {"decisions": decisions, **parts, "options": options, "seconds_per_step": self.seconds_per_step}

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Rebuild from `to_dict`.

        Raises:
            InputError: a part is missing, unknown or out of range.
        """
        if not isinstance(values, dict) or values.keys() - _LATER != {"decisions", *_PARTS}:
            found = ", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__
            raise InputError(f"expected decisions, {', '.join(_PARTS)} of a plan, found {found:.200}; plan again")
        listed = values["decisions"]
        if not isinstance(listed, list) or not all(map(_is_decision, listed)):
            raise InputError(
                f"expected name, value and reason of each decision of a plan, found {short(listed)}; plan again. Was "
                "it written by a newer samed_peft?"
            )
        decisions = [Decision(d["name"], _tuple(d["value"]), d["reason"]) for d in listed]
        if "mixed_precision" not in [decision.name for decision in decisions]:
            decisions.append(Decision("mixed_precision", "no", "as runs were trained before plans decided it"))
        options, seconds = _read_options(values.get("options", {})), values.get("seconds_per_step")
        require_time("seconds_per_step of a plan", seconds, "seconds")
        parts = {name: kind.from_dict(values[name]) for name, kind in _PARTS.items()}
        plan = cls(tuple(decisions), **parts, options=options, seconds_per_step=seconds)
        _require_decided(plan.values)
        require_plannable(plan.fingerprint, plan.base, {**options, **plan.values})
        return plan

    def prolonged(self, given: Mapping[str, Any]) -> "Plan":
        """This plan for a run that goes on: what users give replaces decisions, and no other is made anew.

        Of the options that decide the length, one that is given replaces the other.
        """
        lengths = set(LENGTHS) if given.keys() & set(LENGTHS) else set()
        kept = {decision.name: decision for decision in self.decisions if decision.name not in lengths}
        for name in given.keys() & {*kept, *lengths}:
            if name not in kept or kept[name].value != _tuple(given[name]):
                kept[name] = Decision(name, _tuple(given[name]), _GIVEN)
        return dataclasses.replace(self, decisions=tuple(kept[name] for name in RULES if name in kept))

    def require_data(self, fingerprint: Fingerprint, *, reading: Collection[str] = ()) -> None:
        """Refuse a plan of other data.

        Args:
            fingerprint: of the data to train on.
            reading: options that users give and that say how the data are read, such as plane; the fingerprint may
                differ by what they change.

        Raises:
            InputError: naming what differs.
        """
        there, now = self.fingerprint.to_dict(), fingerprint.to_dict()
        differing = [name for name in there if there[name] != now[name] and name != "empty_cases"]  # not in older ones
        is_same_data = "data" not in differing
        if not differing or (is_same_data and reading):
            return
        # The hash always differs between other data; it is shown only where nothing else does.
        shown = [name for name in differing if name != "data"][:4] or differing
        texts = "; ".join(f"{name} {short(there[name])} there, {short(now[name])} now" for name in shown)
        if is_same_data:
            remedy = "give --class_names, --channel, --plane and --patient_pattern as for the plan, or plan again"
            raise InputError(f"the plan was made from the same files, read otherwise ({texts}): {remedy}")
        raise InputError(
            f"the plan was made from other data ({texts}): expected files {self.fingerprint.data}, found "
            f"{fingerprint.data}; plan again with samed plan, or give the data that it was made from"
        )

    def require_base(self, base: BaseGeometry) -> None:
        """Refuse a plan for a base of other measures, wherever it lies.

        Raises:
            InputError: naming both.
        """
        if dataclasses.replace(base, base="") != dataclasses.replace(self.base, base=""):
            raise InputError(
                f"the plan is for another base ({self.base}), found {base}; plan again, or give its --base"
            )

    def table(self) -> str:
        """Decisions, values and reasons in three columns, to be printed."""
        data, machine = self.fingerprint, self.machine
        rows = [(decision.name, _text(decision.value), decision.reason) for decision in self.decisions]
        first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
        height, width = data.slice_hw
        labelled = data.slices - data.empty_slices
        header = [
            f"data: {data.cases} cases of {data.patients} patients, {data.modality}; {data.slices} slices, {labelled} "
            f"of them labelled, typically {height} x {width}; {_classes(data)}",
            f"base: {self.base.base}, trained at {self.base.image_size} pixels; machine: {machine.device} "
            f"({machine.name}), {machine.memory_gb:g} GB free, {machine.cores} cores",
        ]
        lines = [f"{name:<{first}}  {value:<{second}}  {reason}" for name, value, reason in rows]
        return "\n".join([*header, "", *lines])


_NEEDED = {"image_size", "gradient_checkpointing", "batch_size", "accumulation_steps", "validate_epochs"}
"""Decisions that others go by."""

_Types = Mapping[str, type | UnionType]
_OF_RECIPE: _Types = {"plane": str | None, "fold": str | int, "folds": int, "validation_share": float | int}
"""Decisions that are fields of no config, and what their values are."""

_LATER = {"options", "seconds_per_step"}
"""Parts that earlier versions did not write."""

_PARTS: Mapping[str, Any] = {"fingerprint": Fingerprint, "machine": Machine, "base": BaseGeometry}


def _is_decision(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {*Decision._fields}
        and isinstance(value["name"], str)
        and value["name"] in RULES
        and isinstance(value["reason"], str)
    )


def _require_decided(values: Mapping[str, Any]) -> None:
    """Refuse a plan that lacks a decision that others go by, or has one of another type."""
    if missing := _NEEDED - values.keys():
        raise InputError(f"expected a plan to decide on {', '.join(sorted(missing))}, found nothing; plan again")
    for name in values.keys() & _OF_RECIPE:
        if not isinstance(values[name], _OF_RECIPE[name]) or isinstance(values[name], bool):
            raise InputError(f"expected another {name} in a plan, found {short(values[name])}; plan again")


def _read_options(found: object) -> dict[str, Any]:
    options = {name: _tuple(value) for name, value in found.items()} if isinstance(found, dict) else None
    if options is None or not all(map(_is_option, options.items())):
        raise InputError(
            f"expected options of a plan, some of {', '.join(OPTIONS)}, found {short(found)}; plan again. Was it "
            "written by a newer samed_peft?"
        )
    return options


def _is_option(item: tuple[str, Any]) -> bool:
    name, value = item
    return name in OPTIONS and isinstance(value, OPTIONS[name]) and not isinstance(value, bool)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _classes(data: Fingerprint) -> str:
    names = list(data.class_voxels)
    return f"classes: {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_text, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def make_plan(
    fingerprint: Fingerprint,
    machine: Machine,
    *,
    base: BaseGeometry,
    given: Mapping[str, Any] = {},
    max_minutes: float | None = None,
    seconds_per_step: float | None = None,
) -> Plan:
    """Decide how to train. Equal arguments give equal plans; nothing is read or measured.

    Args:
        fingerprint: of the data.
        machine: that will train.
        base: the SAM to adapt.
        given: values by name of field or option. Each overrules that decision alone, and those that follow from it go
            by it; options that no decision is about are passed over.
        max_minutes: time for the training, or None for as many steps as the data ask for.
        seconds_per_step: time of an optimizer step with this plan, if it was measured; by default estimated for CPUs,
            and unknown for other devices.

    Raises:
        InputError: a value is out of range, the data cannot be used, an option contradicts them, one slice does not fit
            in memory, or the time is shorter than a step.
    """
    require_time("seconds_per_step", seconds_per_step, "seconds")
    minutes = given.get("max_minutes") if max_minutes is None else max_minutes
    given = {name: value for name, value in given.items() if name != "max_minutes"}
    require_plannable(fingerprint, base, given | {"max_minutes": minutes})
    situation = Situation(fingerprint, machine, base, given, minutes, seconds_per_step)
    decisions = []
    for name in RULES:
        if (decision := decide(name, situation)) is not None:
            situation.chosen[name] = decision.value
            decisions.append(decision)
    return Plan(tuple(decisions), fingerprint, machine, base, options_of_rules(given), seconds_per_step)


def decide(name: str, situation: Situation) -> Decision | None:
    """A decision as users gave it, or as its rule makes it."""
    given = situation.given
    decided = (_tuple(given[name]), _GIVEN) if name in given else RULES[name](situation)
    return None if decided is None else Decision(name, *decided)


def options_of_rules(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the given options that a plan keeps: rules go by them although no decision is about them."""
    plain = {name: str(value) if isinstance(value, Path) else _tuple(value) for name, value in given.items()}
    return {name: value for name, value in plain.items() if name in OPTIONS}


def read_plan(path: str | Path) -> Plan:
    """Read a plan that `write_plan` wrote.

    Raises:
        InputError: the file is missing or no plan.
    """
    try:
        return Plan.from_dict(read_json(path))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def write_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan as JSON, atomically."""
    write_json(path, plan.to_dict())
