"""Fields of a configuration as options of the command line."""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from typing import TypeVar, get_args, get_type_hints

from samed_peft.config.fields import JsonFields

ConfigT = TypeVar("ConfigT", bound=JsonFields)


def add_options(parser: argparse.ArgumentParser, kind: type[ConfigT], names: Sequence[str] | None = None) -> None:
    """Add options `--field` for fields of a configuration; their help is its docstring.

    Args:
        parser: gets the options.
        kind: configuration.
        names: fields; by default all, which must have plain defaults then.
    """
    described = dict(re.findall(r"^ +(\w+): (.+)\.$", kind.__doc__ or "", flags=re.MULTILINE))
    types = get_type_hints(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if names is not None and field.name not in names:
            continue
        flag, shown = f"--{field.name}", described[field.name].replace("%", "%%") + " (default: %(default)s)"
        if types[field.name] is bool:
            parser.add_argument(flag, default=field.default, action=argparse.BooleanOptionalAction, help=shown)
        else:
            plain = next(t for t in (*get_args(types[field.name]), types[field.name]) if t is not type(None))
            parser.add_argument(flag, default=field.default, type=plain, help=shown)


def lower_stop_epoch(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Let `--epochs` alone shorten a run: where `--stop_epoch` is left at its default, `epochs` is its limit."""
    if args.stop_epoch == parser.get_default("stop_epoch"):
        args.stop_epoch = min(args.stop_epoch, args.epochs)


def from_options(args: argparse.Namespace, kind: type[ConfigT]) -> ConfigT:
    """The configuration that options of `add_options` give."""
    return kind(**{field.name: vars(args)[field.name] for field in dataclasses.fields(kind)})  # type: ignore[arg-type]
