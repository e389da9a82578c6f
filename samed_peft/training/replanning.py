"""Make decisions of a plan anew: those that hang on what users give with it, or on the number of steps."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from samed_peft.datasets.fingerprint import Fingerprint
from samed_peft.errors import InputError
from samed_peft.training.contradictions import LENGTHS, require_plannable
from samed_peft.training.decisions import RULES
from samed_peft.training.planning import Decision, Plan, decide, options_of_rules
from samed_peft.training.situation import Situation

OF_STEPS = ("warmup_steps", "weight_average", "validate_epochs", "patience")
"""Decisions that depend on the number of steps, in the order in which they are made."""

_REPLACES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(LENGTHS, (*LENGTHS, "stop_epoch")),
    "stop_epoch": ("max_steps", "max_minutes"),
    "test_cases": ("fold",),
    "input_size": ("resampling",),
    "decay_power": ("schedule",),
}
"""Option -> decisions that users made before and that it contradicts."""


def replanned(plan: Plan, given: Mapping[str, Any], *, fingerprint: Fingerprint | None = None) -> Plan:
    """A plan with what users give, and anew each decision whose rule now finds otherwise than it did for the plan.

    All other decisions stay to the letter, whoever made or edited them. Options that no decision is about, such as
    method, are those that are given now.

    Args:
        plan: as it was made or read.
        given: values by name of field or option.
        fingerprint: of the same data read otherwise, such as along another plane; None for that of the plan.

    Raises:
        InputError: see `make_plan`.
    """
    replaced = {name for option in given.keys() & _REPLACES for name in _REPLACES[option]} | given.keys()
    made = {decision.name for decision in plan.decisions if decision.is_given and decision.name in replaced}
    stays = {name: value for name, value in _given(plan).items() if name not in replaced} | dict(given)
    before, after = _situation(plan, {**plan.options, **_given(plan)}), _situation(plan, stays)
    after.data, after.timed_work = fingerprint or plan.fingerprint, _decided(plan).step_work
    require_plannable(after.data, plan.base, stays)
    kept = {decision.name: decision for decision in plan.decisions}
    decisions = []
    for name in RULES:
        is_new = name in given or name in made
        decision = decide(name, after) if is_new else _reconsidered(name, kept.get(name), before, after)
        if name in kept:
            before.chosen[name] = kept[name].value
        if decision is None:
            after.given = {option: value for option, value in after.given.items() if option != name}
        else:
            after.chosen[name] = decision.value
            decisions.append(decision)
    seconds = after.step_seconds if plan.seconds_per_step else None
    return Plan(tuple(decisions), after.data, plan.machine, plan.base, options_of_rules(given), seconds)


def _reconsidered(name: str, kept: Decision | None, before: Situation, after: Situation) -> Decision | None:
    """A decision that was kept, unless its rule finds otherwise after than before.

    What users decided stays as long as there is something to decide.
    """
    old, new = _found(name, before), _found(name, after)
    if _value(old) == _value(new):
        return new if kept in (None, old) and isinstance(new, Decision) else kept
    if name in after.given and new is not None:
        return kept
    if isinstance(new, InputError):
        raise new
    return new


def _found(name: str, situation: Situation) -> Decision | InputError | None:
    """What a rule decides, whatever users gave in its place."""
    try:
        decided = RULES[name](situation)
    except InputError as error:  # which an edited plan may have overruled, and which counts only where it is new
        return error
    return None if decided is None else Decision(name, *decided)


def _value(found: Decision | InputError | None) -> Any:
    return found.value if isinstance(found, Decision) else None if found is None else str(found)


def _given(plan: Plan) -> dict[str, Any]:
    return {decision.name: decision.value for decision in plan.decisions if decision.is_given}


def _situation(plan: Plan, given: Mapping[str, Any]) -> Situation:
    """What rules of a plan go by before anything is decided."""
    others = {name: value for name, value in given.items() if name != "max_minutes"}
    minutes, seconds = given.get("max_minutes"), plan.seconds_per_step
    return Situation(plan.fingerprint, plan.machine, plan.base, others, minutes, seconds)


def _decided(plan: Plan) -> Situation:
    """What rules of a plan go by once all is decided."""
    situation = _situation(plan, {**plan.options, **_given(plan)})
    situation.chosen.update(plan.values)
    return situation


def expected_steps(plan: Plan) -> int | None:
    """Optimizer steps that a plan was made for; None if minutes decide and the time of a step was unknown."""
    situation = _decided(plan)
    is_known = situation.max_minutes is None or situation.step_seconds is not None
    return situation.steps if is_known else None


def decisions_for_steps(plan: Plan, steps: int, *, validate_epochs: int | None = None) -> dict[str, Any]:
    """Values of the decisions that depend on the number of steps, for another number.

    Those that users gave or edited are left out.

    Args:
        plan: whose rules decide.
        steps: of the whole training.
        validate_epochs: if that is decided already.
    """
    given = {name: value for name, value in _given(plan).items() if name not in LENGTHS}
    before, situation = _decided(plan), _situation(plan, {**plan.options, **given})
    situation.chosen.update(plan.values, max_steps=steps)
    values: dict[str, Any] = {}
    for name in OF_STEPS:
        if name in given or _value(_found(name, before)) != plan.values.get(name):
            continue
        is_decided = name == "validate_epochs" and validate_epochs is not None
        values[name] = situation.chosen[name] = validate_epochs if is_decided else _value(_found(name, situation))
    return values


def settled(plan: Plan, values: Mapping[str, Any], *, steps: int) -> Plan:
    """A plan with the values that `decisions_for_steps` found for the steps that fitted into its minutes."""
    reason = f"for the {steps} steps that fitted into the minutes"
    changed = [
        Decision(decision.name, values[decision.name], reason) if decision.name in values else decision
        for decision in plan.decisions
    ]
    return dataclasses.replace(plan, decisions=tuple(changed))
