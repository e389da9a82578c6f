"""Plan a training from the data, the machine and the base: every decision with its reason."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from samed_peft.config.fields import short
from samed_peft.datasets.fingerprint import Fingerprint
from samed_peft.errors import InputError
from samed_peft.io import read_json, write_json
from samed_peft.models.geometry import BaseGeometry
from samed_peft.training.contradictions import LENGTHS, require_plannable, require_time
from samed_peft.training.decisions import RULES
from samed_peft.training.machine import Machine
from samed_peft.training.situation import Situation

PLAN_FILE = "plan.json"
"""Name of a plan kept with a run or an adapter."""

_GIVEN = "as given, in place of the plan's"


class Decision(NamedTuple):
    """One decision of a plan."""

    name: str  # of a field of a config, or of an option of recipes/finetune.py
    value: Any
    reason: str  # one line


@dataclass(frozen=True)
class Plan:
    """All decisions, and what they were made from.

    Attributes:
        decisions: in the order in which they were made.
        fingerprint: of the data.
        machine: that will train.
        base: measures of the SAM that is adapted.
    """

    decisions: tuple[Decision, ...]
    fingerprint: Fingerprint
    machine: Machine
    base: BaseGeometry

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
        return {"decisions": [_jsonable(decision) for decision in self.decisions], **parts}

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Rebuild from `to_dict`.

        Raises:
            InputError: a part is missing, unknown or out of range.
        """
        if not isinstance(values, dict) or values.keys() != {"decisions", *_PARTS}:
            found = ", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__
            raise InputError(f"expected decisions, {', '.join(_PARTS)} of a plan, found {found:.200}; plan again")
        listed = values["decisions"]
        if not isinstance(listed, list) or not all(map(_is_decision, listed)):
            raise InputError(
                f"expected name, value and reason of each decision of a plan, found {short(listed)}; plan again. Was "
                "it written by a newer samed_peft?"
            )
        decisions = [Decision(d["name"], _tuple(d["value"]), d["reason"]) for d in listed]
        return cls(tuple(decisions), **{name: kind.from_dict(values[name]) for name, kind in _PARTS.items()})

    def with_given(self, given: Mapping[str, Any]) -> "Plan":
        """This plan with what users give in place of its decisions; those that follow from the length are made anew.

        Raises:
            InputError: see `make_plan`.
        """
        if not given.keys() & {*RULES, *LENGTHS}:
            return self
        kept = self.values
        if given.keys() & set(LENGTHS):
            kept = {name: value for name, value in kept.items() if name not in _OF_LENGTH}
        made = make_plan(self.fingerprint, self.machine, base=self.base, given=kept | dict(given))
        before = {decision.name: decision for decision in self.decisions if decision.name in kept.keys() - given.keys()}
        return dataclasses.replace(self, decisions=tuple(before.get(new.name, new) for new in made.decisions))

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

    def require_data(self, fingerprint: Fingerprint) -> None:
        """Refuse a plan of other data.

        Raises:
            InputError: naming what differs.
        """
        there, now = self.fingerprint.to_dict(), fingerprint.to_dict()
        if differing := [name for name in there if there[name] != now[name]]:
            # The hash always differs; it is shown only where nothing else does.
            shown = [name for name in differing if name != "data"][:4] or differing
            texts = [f"{name} {short(there[name])} there, {short(now[name])} now" for name in shown]
            raise InputError(
                f"the plan was made from other data ({'; '.join(texts)}): expected files {self.fingerprint.data}, "
                f"found {fingerprint.data}; plan again with samed plan, or give the data that it was made from"
            )

    def require_base(self, base: BaseGeometry) -> None:
        """Refuse a plan for a base of other measures, wherever it lies.

        Raises:
            InputError: naming both.
        """
        if dataclasses.replace(base, base="") != dataclasses.replace(self.base, base=""):
            raise InputError(
                f"the plan was made for another base ({self.base}), found {base}; plan again, or give its --base"
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


_OF_LENGTH = (*LENGTHS, "stop_epoch", "warmup_steps", "weight_average", "validate_epochs", "patience")
"""Decisions that depend on the number of steps."""

_PARTS: Mapping[str, Any] = {"fingerprint": Fingerprint, "machine": Machine, "base": BaseGeometry}


def _is_decision(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {*Decision._fields}
        and isinstance(value["name"], str)
        and value["name"] in RULES
        and isinstance(value["reason"], str)
    )


def _jsonable(decision: Decision) -> dict[str, Any]:
    value = list(decision.value) if isinstance(decision.value, tuple) else decision.value
    return decision._asdict() | {"value": value}


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
    for name, rule in RULES.items():
        decided = (_tuple(given[name]), _GIVEN) if name in given else rule(situation)
        if decided is not None:
            situation.chosen[name] = decided[0]
            decisions.append(Decision(name, *decided))
    return Plan(tuple(decisions), fingerprint, machine, base)


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
