"""What an adapter is (`SamedConfig`) and how it is trained (`TrainingConfig`)."""

import argparse
import dataclasses
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from samed_peft.errors import InputError

SYNAPSE_CLASSES = (
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "liver",
    "stomach",
    "aorta",
    "pancreas",
)
"""The eight organs of Synapse multi-organ CT in SAMed's order; label k is `SYNAPSE_CLASSES[k - 1]`."""

CT_WINDOW_HU = (-125.0, 275.0)
"""Hounsfield units that SAMed (arXiv 2304.13785) clips to before scaling to [0, 1]."""

TINY_SAM = "tiny-sam"
"""Name of the small SAM that ships with this package, wherever a base is asked for. It is no substitute for SAM."""

TINY_SAM_NOTE = (
    "The base is no SAM but the tiny stand-in that ships with samed_peft; these scores say nothing about SAM."
)
"""Stands wherever figures of the tiny SAM are shown."""


def is_hub_id(base: str) -> bool:
    """Whether `base` reads like `owner/name` on the Hub and not like a file or folder."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if base.count("/") != 1 or base.startswith((".", "~", "/")) or base.endswith(".pth"):
        return False
    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return not Path(base).exists()


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type: a plain one, a tuple of some, or a choice of these.

    Whole numbers pass for floats, truth values for no number.
    """
    if get_origin(kind) in (Union, UnionType):
        return any(_is_of(value, choice) for choice in get_args(kind))
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return isinstance(value, tuple | list) and all(_is_of(element, item) for element in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _is_orientation(codes: str) -> bool:
    axes = ("LR", "AP", "SI")
    return len(codes) == 3 and all(sum(code in axis for code in codes) == 1 for axis in axes)


class _Json:
    """Checked types, and to and from plain JSON values, shared by the two configurations."""

    def _check_types(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = vars(self)[name]
            shown = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
            _require(_is_of(value, kind), f"{name} must be {shown}; found {_short(value)}")

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values (tuples become lists)."""
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from `to_dict`.

        Raises:
            InputError: a field is unknown, missing or out of range.
        """
        _require(
            isinstance(values, Mapping), f"{cls.__name__} must be an object of fields; found {type(values).__name__}"
        )
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        _require(
            not unknown,
            f"{cls.__name__} has no field {', '.join(unknown)}; known are {', '.join(sorted(known))}. "
            "Was the file written by a newer samed_peft?",
        )
        try:
            return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
        except TypeError as error:  # a field is missing
            raise InputError(f"{cls.__name__} cannot be read: {error}") from error


@dataclass(frozen=True)
class SamedConfig(_Json):
    """What an adapter is: everything needed, besides its weights, to predict with it.

    Attributes:
        base: Hub id, local folder or Meta `.pth` of the SAM that is adapted.
        class_names: names of labels 1..K; background (0) is left out.
        base_revision: commit or tag of `base` on the Hub.
        base_sha256: fingerprint of the base weights, filled in when the adapter is saved.
        image_size: pixels per side that the encoder sees; a multiple of its patch size.
        input_size: pixels per side of SAMed's low-resolution bottleneck at prediction (224), or None.
        window: (low, high) intensities clipped to and scaled to [0, 1], or None for 0.5-99.5 percentiles per scan.
        orientation: axis codes of the (x, y, z) voxel axes of the training scans, "LAS" for example, or None.
        channel: number of the channel it was trained on, of 4-D scans or of files named as nnU-Net's, or None.
        preset: name of the published recipe these settings follow.
        rank: rank of the low-rank updates.
        alpha: numerator of LoRA's scaling alpha / rank; None means `rank`, that is no scaling, as in SAMed.
        targets: linear layers of attention that are adapted.
        decoder: "full" trains the whole mask decoder, as SAMed; "lora" adapts its frozen transformer, as SAMed_s.
        dropout: dropout in front of LoRA's A.

    Raises:
        InputError: a value is out of range.
    """

    base: str
    class_names: tuple[str, ...]
    base_revision: str | None = None
    base_sha256: str | None = None
    image_size: int = 512
    input_size: int | None = None
    window: tuple[float, float] | None = CT_WINDOW_HU
    orientation: str | None = None
    channel: int | None = None
    preset: str = "samed"
    rank: int = 4
    alpha: int | None = None
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    decoder: str = "full"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self._check_types()
        names = self.class_names
        _require(
            1 <= len(names) <= 255 and len(set(names)) == len(names) and all(names),
            f"class_names must be 1 to 255 different names, background left out; "
            f"found {len(names)}: {_short(list(names))}",
        )
        _require(self.image_size > 0, f"image_size must be positive; found {self.image_size}")
        _require(
            self.input_size is None or self.input_size > 0,
            f"input_size must be positive or None; found {self.input_size}",
        )
        if self.input_size is not None and self.input_size > self.image_size:
            warnings.warn(
                f"input_size ({self.input_size}) is larger than image_size ({self.image_size}), so that it is no "
                "bottleneck: slices are resized twice for nothing; leave input_size out",
                stacklevel=3,
            )
        _require(
            self.window is None or (len(self.window) == 2 and self.window[0] < self.window[1]),
            f"window must be (low, high) with low < high, or None; found {self.window}",
        )
        _require(self.channel is None or self.channel >= 0, f"channel must not be negative; found {self.channel}")
        _require(
            self.orientation is None or _is_orientation(self.orientation),
            f"orientation must be three letters, one each of L or R, A or P, S or I, LAS for example; "
            f"found {self.orientation!r}",
        )
        _require(self.alpha is None or self.alpha > 0, f"alpha must be at least 1 or None; found {self.alpha}")
        _require(self.rank > 0, f"rank must be at least 1; found {self.rank}")
        allowed = ("q_proj", "k_proj", "v_proj")
        _require(
            bool(self.targets) and set(self.targets) <= set(allowed),
            f"targets must be some of {', '.join(allowed)}; found {list(self.targets)}",
        )
        _require(self.decoder in ("full", "lora"), f"decoder must be full or lora; found {self.decoder!r}")
        _require(0 <= self.dropout < 1, f"dropout must be in [0, 1); found {self.dropout}")

    @property
    def num_labels(self) -> int:
        """Number of classes, background included: K + 1."""
        return len(self.class_names) + 1


@dataclass(frozen=True)
class TrainingConfig(_Json):
    """How an adapter is trained; the defaults are SAMed's published settings for ViT-B (arXiv 2304.13785).

    Attributes:
        learning_rate: peak rate of AdamW.
        weight_decay: decoupled weight decay.
        warmup_steps: optimizer steps of linear warm-up; 0 for none.
        decay_power: exponent of the polynomial decay.
        epochs: horizon of the decay.
        stop_epoch: epochs actually run; SAMed stops at 160 of 200.
        batch_size: slices per process and micro-batch (SAMed: 12 on each of 2 GPUs).
        accumulation_steps: micro-batches per optimizer step.
        dice_weight: share of the Dice loss; cross entropy has the rest.
        augment: whether slices are flipped and rotated.
        gradient_checkpointing: recompute encoder layers in the backward pass to save memory.
        num_workers: processes that load slices, at most one a core; 2 keep ahead of a GPU.
        checkpoint_steps: optimizer steps between two resumable checkpoints; one is written after each epoch too.
        validate_epochs: epochs between two validations; 0 for none.
        seed: seed of initialisation, order and augmentation.

    Raises:
        InputError: a value is out of range.
    """

    learning_rate: float = 0.005
    weight_decay: float = 0.1
    warmup_steps: int = 250
    decay_power: float = 0.9
    epochs: int = 200
    stop_epoch: int = 160
    batch_size: int = 24
    accumulation_steps: int = 1
    dice_weight: float = 0.8
    augment: bool = True
    gradient_checkpointing: bool = False
    num_workers: int = 2
    checkpoint_steps: int = 200
    validate_epochs: int = 0
    seed: int = 1234

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("epochs", "stop_epoch", "batch_size", "accumulation_steps", "checkpoint_steps"):
            value = dataclasses.asdict(self)[name]
            _require(value >= 1, f"{name} must be at least 1; found {value}")
        for name in ("warmup_steps", "num_workers", "validate_epochs", "seed", "weight_decay"):
            value = dataclasses.asdict(self)[name]
            _require(value >= 0, f"{name} must not be negative; found {value}")
        _require(
            self.learning_rate > 0 and math.isfinite(self.learning_rate),
            f"learning_rate must be positive; found {self.learning_rate}",
        )
        _require(
            self.stop_epoch <= self.epochs,
            f"stop_epoch ({self.stop_epoch}) must not exceed epochs ({self.epochs}); give stop_epoch, --stop_epoch on "
            "the command line, too",
        )
        _require(0 <= self.dice_weight <= 1, f"dice_weight must be in [0, 1]; found {self.dice_weight}")


ConfigT = TypeVar("ConfigT", bound=_Json)


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
