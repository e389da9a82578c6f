"""What the two configs share: described and checked fields, and plain JSON values."""

import dataclasses
import inspect
import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from types import UnionType
from typing import Any, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from samed_peft.errors import InputError

T = TypeVar("T")
Rule = tuple[str, Callable[[Any], bool]]
"""What a value must do, as its error says it, and whether it does."""

AT_LEAST_1: Rule = ("be at least 1", lambda value: value >= 1)
NOT_NEGATIVE: Rule = ("be 0 or more", lambda value: value >= 0)
POSITIVE: Rule = ("be positive", lambda value: 0 < value < math.inf)


def described(help: str, default: Any = dataclasses.MISSING, must: Rule | None = None) -> Any:
    """A field of a config with the text that its option and its documentation show, and a rule for values."""
    return dataclasses.field(default=default, metadata={"help": help, "must": must})


def documented(kind: type[T]) -> type[T]:
    """Add each field's text to a config's docstring."""
    texts = [f"    {field.name}: {field.metadata['help']}." for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    kind.__doc__ = "\n".join([inspect.cleandoc(kind.__doc__ or ""), "", "Attributes:", *texts])
    return kind


def short(value: Any) -> str:
    """`repr` of a value, cut off where it would fill the screen."""
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def require(condition: bool, message: str) -> None:
    """Raise `InputError` with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type: a plain one, a tuple or dict of some, or a choice of these.

    Whole numbers pass for floats, truth values for no number. `huggingface_hub.dataclasses.strict` checks assignments
    only, which a frozen dataclass's `__init__` goes around, and would refuse 1 for a float and a list for a tuple.
    """
    if get_origin(kind) in (Union, UnionType):
        return any(_is_of(value, choice) for choice in get_args(kind))
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return isinstance(value, tuple | list) and all(_is_of(element, item) for element in value)
    if get_origin(kind) is dict:
        key, item = get_args(kind)
        return isinstance(value, dict) and all(_is_of(k, key) and _is_of(v, item) for k, v in value.items())
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, kind)


_types_of = cache(get_type_hints)
"""Types of a config's fields by name."""


class JsonFields:
    """Checked fields, and conversion to and from plain JSON values."""

    def __post_init__(self) -> None:
        types = _types_of(type(self))  # type: ignore[arg-type] # mypy takes the instances' __hash__
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            name, value, kind = field.name, vars(self)[field.name], types[field.name]
            shown = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
            if not _is_of(value, kind):
                raise InputError(f"{name} must be {shown}; found {short(value)}")
            if field.metadata["must"] is not None and value is not None:
                text, is_met = field.metadata["must"]
                or_none = ", or None" if type(None) in get_args(kind) else ""
                if not is_met(value):
                    raise InputError(f"{name} must {text}{or_none}; found {short(value)}")

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values (tuples become lists)."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[call-overload]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from `to_dict`.

        Raises:
            InputError: a field is unknown, missing or out of range.
        """
        require(
            isinstance(values, Mapping), f"{cls.__name__} must be an object of fields; found {type(values).__name__}"
        )
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        require(
            not unknown,
            f"{cls.__name__} has no field {', '.join(unknown):.200}; known are {', '.join(sorted(known))}. "
            "Was the file written by a newer samed_peft?",
        )
        try:
            return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
        except TypeError as error:  # a field is missing
            raise InputError(f"{cls.__name__} cannot be read: {error}") from error
