"""What an adapter is: `SamedConfig`."""

import warnings
from dataclasses import dataclass
from pathlib import Path

from samed_peft.config.fields import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    POSITIVE,
    JsonFields,
    Rule,
    described,
    documented,
    require,
    short,
)
from samed_peft.config.methods import ATTENTION_TARGETS, DECODER_TARGETS, METHODS, MLP_TARGETS
from samed_peft.config.patterns import LAYER_PATTERN, is_layer_pattern
from samed_peft.config.windows import CHANNELS_RULE, CT_WINDOW_HU, WINDOW_RULE, windows_of

SYNAPSE_CLASSES = ("spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas")
"""The eight organs of Synapse multi-organ CT in SAMed's order; label k is `SYNAPSE_CLASSES[k - 1]`."""

BTCV_ORIENTATION = "LAS"
"""Axis codes of raw BTCV's scans, whose slices SAMed and TransUNet stored as they are."""

SYNAPSE_NAME = "Synapse multi-organ CT (BTCV)"
"""What reports and model cards call that data."""

TINY_SAM = "tiny-sam"
"""Base name of the small SAM that ships with this package; it does not replace SAM."""

TINY_SAM_NOTE = (
    "The base is not SAM but the tiny stand-in that ships with samed_peft; these scores say nothing about SAM."
)
"""Shown with all figures of the tiny SAM."""


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


def _is_orientation(codes: str) -> bool:
    axes = ("LR", "AP", "SI")
    return len(codes) == 3 and all(sum(code in axis for code in codes) == 1 for axis in axes)


_TARGETS = (*ATTENTION_TARGETS, *MLP_TARGETS)

_MOST_PIXELS = 8192
"""Pixels per side; SAM's own are 1024, and memory grows with the fourth power."""

_ORIENTATION: Rule = ("be three letters, one each of L or R, A or P, S or I, such as LAS", _is_orientation)
_LABEL_VALUES: Rule = (
    "be different numbers from 1 to 255",
    lambda values: len(set(values)) == len(values) and all(1 <= value <= 255 for value in values),
)
_METHOD: Rule = (f"be one of {', '.join(METHODS)}", METHODS.__contains__)
_RESAMPLING: Rule = ("be samed or aligned", ("samed", "aligned").__contains__)
_TTA: Rule = ("be none, shifts or flips", ("none", "shifts", "flips").__contains__)
_LAYERS: Rule = ("be numbers from 0 on", lambda layers: bool(layers) and min(layers) >= 0)


@documented
@dataclass(frozen=True)
class SamedConfig(JsonFields):
    """What an adapter is: everything needed, besides its weights, to predict with it.

    Raises:
        InputError: a value is out of range.
    """

    base: str = described("Hub id, local folder or Meta `.pth` of the SAM that is adapted")
    class_names: tuple[str, ...] = described("names of labels 1..K; background (0) is left out")
    base_revision: str | None = described("commit or tag of `base` on the Hub", None)
    base_sha256: str | None = described("fingerprint of the base weights, filled in by `load_sam`", None)
    image_size: int = described("pixels per side that the encoder sees; a multiple of its patch size", 512, POSITIVE)
    input_size: int | None = described(
        "pixels per side of SAMed's low-resolution bottleneck at prediction (224), or None", None, POSITIVE
    )
    resampling: str = described(
        "how slices, logits and masks are resized: samed, from corner to corner, with labels chosen at the encoder's "
        "size; or aligned, by areas of pixels, with labels chosen on the scan's own grid",
        "samed",
        _RESAMPLING,
    )
    tile: bool = described(
        "whether slices are cut into overlapping tiles of image_size pixels, as in training, and not resized", False
    )
    window: tuple[float, float] | tuple[tuple[float, float], ...] | None = described(
        "(low, high) clipped to and scaled to [0, 1], or two or three such windows, through each of which the slice "
        "fills one of the encoder's channels; None for each scan's 0.5-99.5 percentiles",
        CT_WINDOW_HU,
        WINDOW_RULE,
    )
    neighbour_mm: float | None = described(
        "distance of the slices before and after that fill the first and third channel, at least the next ones; None "
        "for the slice itself in all three",
        None,
        POSITIVE,
    )
    orientation: str | None = described(
        "axis codes of the (x, y, z) voxel axes of the training scans, such as LAS, or None", None, _ORIENTATION
    )
    channel: int | None = described(
        "number of the channel to train on, of 4-D scans or of files named as nnU-Net's, or None", None, NOT_NEGATIVE
    )
    channels: tuple[int, ...] | None = described(
        "numbers of two or three channels of scans, each scaled by itself, that fill the encoder's channels, the last "
        "one all that are left; None for scans with a single one",
        None,
        CHANNELS_RULE,
    )
    channel_names: tuple[str, ...] | None = described("names of these channels, such as T1 and FLAIR", None)
    channel_files: bool | None = described(
        "whether each channel of training scans was a file, named CASE_0000 and so on as nnU-Net's; None if unknown",
        None,
    )
    tta: str = described(
        "test-time augmentation: none, or logits averaged in four times the time over shifts of each slice by a "
        "quarter of a patch, or over its flips",
        "none",
        _TTA,
    )
    smoothing_mm: float = described(
        "standard deviation of the Gaussian that smooths logits across slices in prediction; 0 for none",
        0.0,
        NOT_NEGATIVE,
    )
    keep_largest: tuple[str, ...] = described(
        "classes of which only the largest connected part is kept, as found on validation", ()
    )
    preset: str = described("name of the published recipe that this config follows", "samed")
    method: str = described(f"how to adapt the encoder: {', '.join(METHODS)}", "lora", _METHOD)
    rank: int = described("rank of the low-rank updates", 4)
    alpha: int | None = described(
        "LoRA is scaled by alpha / rank; None for no scaling, as in SAMed (2 / sqrt(rank) for rslora)", None, AT_LEAST_1
    )
    targets: tuple[str, ...] = described(
        "adapted linear layers, of q_proj, k_proj, v_proj and proj of attention, lin1 and lin2 of MLPs",
        ("q_proj", "v_proj"),
        (f"be some of {', '.join(_TARGETS)}", lambda names: 0 < len(names) == len(set(names) & set(_TARGETS))),
    )
    layers: tuple[int, ...] | None = described(
        "numbers of the adapted layers of the encoder, counted from 0; None for all", None, _LAYERS
    )
    rank_pattern: dict[str, int] | None = described(  # noqa: RUF009
        "ranks of layers whose names end in a regular expression, such as 'layers.11.attn.q_proj=8'", None
    )
    decoder: str = described(
        '"full" trains the whole mask decoder, as SAMed; "lora" adapts its frozen transformer, as SAMed_s',
        "full",
        ("be full or lora", ("full", "lora").__contains__),
    )
    label_values: tuple[int, ...] | None = described(
        "number that label maps and masks have for each class, such as 1 and 3; None for 1..K", None, _LABEL_VALUES
    )
    regions: dict[str, tuple[int, ...]] | None = described(  # noqa: RUF009
        "regions that are scored beside the classes, and the labels 1..K that each is made of", None
    )
    dropout: float = described("dropout in front of LoRA's A", 0.0, ("be in [0, 1)", lambda share: 0 <= share < 1))

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.class_names
        require(
            1 <= len(names) <= 255 and len(set(names)) == len(names) and all(names),
            f"class_names must be 1 to 255 different names, background left out; "
            f"found {len(names)}: {short(list(names))}",
        )
        unknown = [name for name in self.keep_largest if name not in names]
        require(
            not unknown and len(set(self.keep_largest)) == len(self.keep_largest),
            f"keep_largest must name some of class_names, {short(list(names))}, once each; "
            f"found {short(list(self.keep_largest))}",
        )
        for name in ("image_size", "input_size"):
            pixels = vars(self)[name] or 0
            require(pixels <= _MOST_PIXELS, f"{name} must be {_MOST_PIXELS} pixels at most; found {pixels}")
        require(
            self.resampling == "aligned" or not self.tile,
            f"tile needs resampling aligned, since tiles are not resized; found {self.resampling}",
        )
        require(
            self.resampling == "samed" or self.input_size is None,
            f"input_size is a part of SAMed's resampling and must be None with {self.resampling}; found "
            f"{self.input_size}: leave input_size out, or choose resampling samed",
        )
        if self.input_size is not None and self.input_size > self.image_size:
            warnings.warn(
                f"input_size ({self.input_size}) is larger than image_size ({self.image_size}), so slices are resized "
                "twice for nothing; leave input_size out",
                stacklevel=3,
            )
        self._check_channels()
        self._check_labels()
        self._check_rank_pattern()
        self._check_method()

    def _check_channels(self) -> None:
        """One thing alone can fill the encoder's channels."""
        windows = windows_of(self.window)
        if len(windows) > 1:  # lists, as JSON has them
            object.__setattr__(self, "window", windows)
        found = self.fillings
        require(len(found) <= 1, f"{' and '.join(found)} each fill the encoder's three channels; choose one of them")
        require(
            self.channels is None or self.channel is None,
            f"channel is for adapters of a single one; found {self.channel} beside channels {self.channels}",
        )
        require(
            self.channel_names is None or len(self.channel_names) == len(self.channels or ()),
            f"channel_names must be one for each of channels; found {short(self.channel_names)} for {self.channels}",
        )

    @property
    def fillings(self) -> list[str]:
        """What fills the encoder's three channels in place of a slice or a colour picture; one thing at most."""
        return [
            *([] if self.neighbour_mm is None else [f"neighbour_mm {self.neighbour_mm:g}"]),
            *([] if self.channels is None else [f"channels {short(list(self.channels))}"]),
            *([f"{len(windows_of(self.window))} windows"] if len(windows_of(self.window)) > 1 else []),
        ]

    @property
    def channel_text(self) -> str:
        """Numbers and names of the channels that fill the encoder's, for readers; empty without."""
        names = self.channel_names or ("",) * len(self.channels or ())
        pairs = zip(self.channels or (), names, strict=True)
        return ", ".join(f"{number} ({name})" if name else str(number) for number, name in pairs)

    def _check_labels(self) -> None:
        number = len(self.class_names)
        if self.label_values is not None:
            require(
                len(self.label_values) == number,
                f"label_values must be one for each of {number} classes; found {short(list(self.label_values))}",
            )
        for name, labels in (self.regions or {}).items():
            require(
                bool(name and labels) and len(set(labels)) == len(labels) and set(labels) <= {*range(1, number + 1)},
                f"regions must have a name and different labels from 1 to {number}; found {short({name: labels})}",
            )
        if self.regions is not None:  # lists, as JSON has them
            object.__setattr__(self, "regions", {name: tuple(labels) for name, labels in self.regions.items()})

    def _check_method(self) -> None:
        method = METHODS[self.method]
        require(
            self.rank >= method.min_rank,
            f"rank must be at least {method.min_rank} for {self.method}, {method.summary}; found {self.rank}",
        )
        for name in ("alpha", "rank_pattern", "dropout", "layers"):
            users = ", ".join(other for other, record in METHODS.items() if name in record.options)
            require(
                not vars(self)[name] or name in method.options,
                f"{name} means nothing to {self.method}, only to {users}; leave it out",
            )
        if self.decoder == "lora":
            require("decoder" in method.options, f"decoder must be full with {self.method}; found 'lora'")
            require(
                bool(set(self.targets) & set(DECODER_TARGETS)),
                f"decoder lora adapts {', '.join(DECODER_TARGETS)}, of which targets must have one; "
                f"found {list(self.targets)}",
            )

    def _check_rank_pattern(self) -> None:
        for pattern, rank in (self.rank_pattern or {}).items():
            require(rank > 0, f"rank_pattern must give ranks of at least 1; found {rank} for {pattern!r}")
            require(
                is_layer_pattern(pattern),
                f"rank_pattern must have regular expressions; found {short(pattern)}: use {LAYER_PATTERN}",
            )

    @property
    def classes_of_regions(self) -> dict[str, list[str]]:
        """Name -> names of the classes of each region; empty without regions."""
        return {name: [self.class_names[n - 1] for n in labels] for name, labels in (self.regions or {}).items()}

    @property
    def num_labels(self) -> int:
        """Number of classes, background included: K + 1."""
        return len(self.class_names) + 1
