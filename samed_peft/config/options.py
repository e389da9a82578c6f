"""Options of the command line: fields of a config, and those that every training recipe has."""

import argparse
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from samed_peft.config.adapter import TINY_SAM, SamedConfig
from samed_peft.config.fields import JsonFields
from samed_peft.config.methods import METHOD_FIELDS, METHODS
from samed_peft.config.training import TrainingConfig

_ADAPTER_FIELDS = (
    "image_size",
    "input_size",
    "resampling",
    "neighbour_mm",
    "tile",
    "tta",
    "smoothing_mm",
    *METHOD_FIELDS,
)
"""Fields of `SamedConfig` that the user chooses; others follow from the data."""


def add_options(parser: argparse.ArgumentParser, kind: type[JsonFields], names: Sequence[str] | None = None) -> None:
    """Add options `--field` for some or all fields of a config, with the text that `described` gave them."""
    types = get_type_hints(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        of_field = types[field.name]
        if names is not None and field.name not in names:
            continue
        flag, shown = f"--{field.name}", field.metadata["help"].replace("%", "%%") + " (default: %(default)s)"
        if of_field is bool:
            parser.add_argument(flag, default=field.default, action=argparse.BooleanOptionalAction, help=shown)
            continue
        plain = get_args(of_field)[0] if isinstance(of_field, UnionType) else of_field  # without `| None`
        several: dict[str, Any] = {}
        if container := get_origin(plain):
            several = {"nargs": "+", "action": _Several, "const": container}
            plain = _pair if container is dict else get_args(plain)[0]
        metavar = "NAME=NUMBER" if plain is _pair else None
        parser.add_argument(flag, default=field.default, type=plain, metavar=metavar, help=shown, **several)


class _Several(argparse.Action):
    """Store several values as the tuple or dict (`const`) that the field takes."""

    def __call__(self, _: object, namespace: argparse.Namespace, values: Any, *__: object) -> None:
        vars(namespace)[self.dest] = self.const(values)


def _pair(text: str) -> tuple[str, int]:
    name, _, number = text.rpartition("=")  # a name may hold further equals signs
    if not (name and number.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, found {text!r}")
    return name, int(number)


def add_run_options(parser: argparse.ArgumentParser, *, base: str | None = None) -> None:
    """Add the options of every training recipe: output folder, base, adapter, training, resuming and sharing.

    Args:
        parser: gets the options.
        base: the default base.
    """
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder, or a run to --resume")
    base_help = f"Hub id, folder, Meta .pth or {TINY_SAM} (default: {base or 'that of the preset'})"
    parser.add_argument("--base", default=base, help=base_help)
    precision_help = "by default Accelerate's setting" if base else "by default that of the preset"
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help=precision_help)
    add_options(parser, SamedConfig, _ADAPTER_FIELDS)
    add_options(parser, TrainingConfig)
    parser.add_argument("--resume", action="store_true", help="continue the run in --output_dir")
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload the adapter, as name/repository")


def given_options(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the options that a command line gives, without those that are left to their defaults.

    Args:
        parser: with all options.
        arguments: the command line; by default that of the program.
    """
    unset = object()
    names = vars(parser.parse_args(arguments))
    # The parser sets defaults only where the namespace has nothing yet.
    parsed = parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(names, unset)))
    return {name: value for name, value in vars(parsed).items() if value is not unset}


def parse_run_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> tuple[argparse.Namespace, dict[str, Any], TrainingConfig]:
    """Parse the command line of a training recipe, which has `--validation_cases` besides `add_run_options`.

    `--epochs` alone shortens a run: it limits `--stop_epoch` unless that is given. Recipes that have
    `--validation_share` validate by default: cases that are named overrule it, and 0, as well as `--validate_epochs 0`,
    switches validation off.

    Args:
        parser: with all options.
        arguments: the command line; by default that of the program.

    Returns:
        All options, those that are fields of `SamedConfig`, and the training's config.

    Raises:
        InputError: an option is out of range.
    """
    args = parser.parse_args(arguments)
    if args.stop_epoch == parser.get_default("stop_epoch"):
        args.stop_epoch = min(args.stop_epoch, args.epochs)
    _agree_on_length(parser, args)
    _agree_on_validation(parser, args)
    _refuse_ignored(parser, args)
    training = TrainingConfig(**{field.name: vars(args)[field.name] for field in dataclasses.fields(TrainingConfig)})
    adapter = {name: vars(args)[name] for name in _ADAPTER_FIELDS}
    # Refuse bad values now, not after scans were prepared; warnings come with the recipe's own config.
    # Plans resample tiles as they have to be.
    is_tiled = args.tile and args.input_size is None and args.resampling == parser.get_default("resampling")
    resampling = {"resampling": "aligned"} if is_tiled and vars(args).get("preset") == "plan" else {}
    with warnings.catch_warnings(action="ignore"):
        SamedConfig(args.base or TINY_SAM, class_names=("any",), **adapter | resampling)
    return args, adapter, training


def _agree_on_length(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse two lengths of one training."""
    given = [f"--{name} {vars(args)[name]}" for name in ("max_minutes", "max_steps") if vars(args)[name] is not None]
    if args.epochs != parser.get_default("epochs"):
        given.insert(0, f"--epochs {args.epochs}")
    if given and args.epochs == parser.get_default("epochs") and args.stop_epoch != parser.get_default("stop_epoch"):
        parser.error(f"--stop_epoch {args.stop_epoch} ends a training of --epochs, not one of {given[0]}; leave it out")
    if len(given) > 1:
        parser.error(f"{' and '.join(given)} each decide how long the training is; give one of them")


def _agree_on_validation(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Make share, named cases and epochs of validation fit each other, or refuse them."""
    if "validation_share" in vars(args):
        if args.validation_cases or not args.validate_epochs:
            args.validation_share = 0.0
        elif not args.validation_share and args.validate_epochs == parser.get_default("validate_epochs"):
            args.validate_epochs = 0
    share = vars(args).get("validation_share", 0.0)
    if bool(args.validate_epochs) != bool(args.validation_cases or share):
        parser.error("--validate_epochs and --validation_cases go together")
    if args.patience and not args.validate_epochs:
        parser.error(
            f"--patience {args.patience} counts validations, but this run makes none; leave it out, or choose "
            "--validation_cases"
        )
    # Trainings of a given number of steps or minutes are validated at their end at the latest, and so are planned ones.
    has_epochs = args.max_steps is None and args.max_minutes is None and not _is_planned(parser, args)
    if args.validate_epochs > args.stop_epoch and has_epochs:
        parser.error(
            f"--validate_epochs {args.validate_epochs} never validates in {args.stop_epoch} epochs; choose fewer"
        )


def _is_planned(parser: argparse.ArgumentParser, args: argparse.Namespace) -> bool:
    """Whether a plan decides on the number of steps."""
    return vars(args).get("preset") == "plan" and args.epochs == parser.get_default("epochs")


def _refuse_ignored(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options of the command line that the method does not use; in adapters that exist they do no harm."""
    if args.method not in METHODS:
        return  # refused by `SamedConfig`, which names those there are
    for name in (*METHOD_FIELDS[1:], "lora_plus_ratio"):
        if vars(args)[name] != parser.get_default(name) and name not in METHODS[args.method].options:
            users = ", ".join(other for other, record in METHODS.items() if name in record.options)
            parser.error(f"--{name} means nothing to --method {args.method}, only to {users}; leave it out")
