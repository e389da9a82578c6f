"""Fields of a config as options of the command line."""

import argparse
import dataclasses
from collections.abc import Sequence
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from samed_peft.config.fields import JsonFields

ConfigT = TypeVar("ConfigT", bound=JsonFields)


def add_options(parser: argparse.ArgumentParser, kind: type[ConfigT], names: Sequence[str] | None = None) -> None:
    """Add options `--field` for fields of a config, with the text that `described` gave them.

    Args:
        parser: gets the options.
        kind: class of the config.
        names: fields; by default all, each of which needs a default then.
    """
    types = get_type_hints(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if names is not None and field.name not in names:
            continue
        flag, shown = f"--{field.name}", field.metadata["help"].replace("%", "%%") + " (default: %(default)s)"
        if types[field.name] is bool:
            parser.add_argument(flag, default=field.default, action=argparse.BooleanOptionalAction, help=shown)
            continue
        plain = _plain(types[field.name])
        several: dict[str, Any] = {"nargs": "+"} if get_origin(plain) else {}
        if get_origin(plain) is dict:
            plain, several["metavar"] = _pair, "NAME=NUMBER"
        elif several:
            plain = get_args(plain)[0]
        parser.add_argument(flag, default=field.default, type=plain, help=shown, **several)


def _plain(kind: Any) -> Any:
    """A field's type without `| None`."""
    choices = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return next(choice for choice in choices if choice is not type(None))


def _pair(text: str) -> tuple[str, int]:
    name, _, number = text.rpartition("=")  # a name may hold further equals signs
    if not (name and number.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, found {text!r}")
    return name, int(number)


def option_values(args: argparse.Namespace, kind: type[ConfigT], names: Sequence[str]) -> dict[str, Any]:
    """Values of options of `add_options` as the fields of a config take them."""
    types, values = get_type_hints(kind), {}
    for name in names:
        value, several = vars(args)[name], get_origin(_plain(types[name]))
        values[name] = several(value) if several and value is not None else value
    return values


def lower_stop_epoch(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Let `--epochs` alone shorten a run: it limits `--stop_epoch` unless that was given."""
    if args.stop_epoch == parser.get_default("stop_epoch"):
        args.stop_epoch = min(args.stop_epoch, args.epochs)


def from_options(args: argparse.Namespace, kind: type[ConfigT]) -> ConfigT:
    """The config that options of `add_options` give."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**option_values(args, kind, names))
