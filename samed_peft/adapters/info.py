"""Describe an adapter from its files alone, without its base and without PyTorch."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samed_peft.adapters.folder import (
    ADAPTER_FILES,
    PEFT_FILE,
    WEIGHTS_FILE,
    adapter_folder,
    check_adapter_files,
    find_report,
    read_config,
    require_complete,
)
from samed_peft.config import METHODS, TINY_SAM, TINY_SAM_NOTE, SamedConfig, windows_of, windows_text
from samed_peft.errors import InputError
from samed_peft.io import read_json, read_whole, stored_names, tensor_shapes

_MOST_CLASSES = 14
"""Rows of the table of classes, so that all of it fits a screen of 24 lines."""

_TRAINING = ("epochs", "stop_epoch", "learning_rate", "batch_size", "num_processes", "mixed_precision", "seed")


def adapter_info(source: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """Describe an adapter in a directory, or one on the Hub at a branch, tag or commit.

    Returns:
        JSON values: `classes` (label -> name), `config` (that of `samed_config.json`), `method`, `peft_type`, `files`
        (name -> bytes), `parameters` (stored in all, and of these the `encoder`'s), `scores` (`standard` and `samed`,
        as in `report.json`), `cases` scored, `dataset`, `training` (settings of the run); None if unknown.

    Raises:
        InputError: `source` is not an adapter, or a file is missing or damaged.
    """
    return {"source": str(source)} | read_whole(adapter_folder(source, revision=revision), _described)


def _described(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    require_complete(folder)
    peft = read_json(folder / PEFT_FILE)
    if not isinstance(peft, dict):
        raise InputError(f"expected an adapter's settings in {folder / PEFT_FILE}, found {type(peft).__name__}")
    sizes = {name: math.prod(shape) for name, shape in tensor_shapes(folder / WEIGHTS_FILE).items()}
    check_adapter_files(folder)
    _, report = find_report(folder, config)
    settings = {} if report is None else report.settings
    scores = {} if report is None else report.to_dict()
    return {
        "classes": {str(label): name for label, name in stored_names(config.class_names, config.label_values).items()},
        "config": config.to_dict(),
        "method": METHODS[config.method].summary,
        "peft_type": peft.get("peft_type"),
        "files": {name: (folder / name).stat().st_size for name in ADAPTER_FILES if (folder / name).is_file()},
        "parameters": {
            "stored": sum(sizes.values()),
            "encoder": sum(size for name, size in sizes.items() if ".vision_encoder." in name or ".vera_" in name),
        },
        "scores": {c: {key: scores[c][key] for key in ("mean", "classes")} for c in ("standard", "samed") if scores}
        or None,
        "cases": None if report is None else report.n_cases,
        "dataset": settings.get("dataset"),
        "training": {name: settings[name] for name in _TRAINING if name in settings} or None,
    }


def info_text(info: Mapping[str, Any]) -> str:
    """Format the description for a terminal, on one screen."""
    config = SamedConfig.from_dict(info["config"])
    stored, encoder = (info["parameters"][name] for name in ("stored", "encoder"))
    lines = [
        ("adapter", info["source"]),
        ("base", _base(config)),
        ("method", f"{config.method}: {info['method']}"),
        ("adapts", _adapted(config)),
        ("input", _input(config)),
        *(("region", f"{name}: {', '.join(classes)}") for name, classes in config.classes_of_regions.items()),
        ("size", f"{sum(info['files'].values()) / 1e6:.2f} MB, {stored:,} parameters, {encoder:,} of the encoder"),
    ]
    if info["training"] is not None:
        lines.append(("training", ", ".join(f"{name} {value}" for name, value in info["training"].items())))
    lines += [("note", TINY_SAM_NOTE)] if config.base == TINY_SAM else []
    head = [f"{name:<9} {value}" for name, value in lines]
    return "\n".join([*head, "", *_classes(info)])


def _base(config: SamedConfig) -> str:
    revision = f" at {config.base_revision}" if config.base_revision else ""
    digest = f", weights {config.base_sha256[:12]}" if config.base_sha256 else ""
    return f"{config.base}{revision}{digest}"


def _adapted(config: SamedConfig) -> str:
    decoder = {"full": "mask decoder in full", "lora": "mask decoder with LoRA"}[config.decoder]
    options = METHODS[config.method].options
    if "targets" not in options:
        return decoder
    layers = "all layers" if config.layers is None else f"layers {', '.join(map(str, config.layers))}"
    rank = f"rank {config.rank}, " if "rank" in options else ""
    return f"{rank}{', '.join(config.targets)} of {layers}; {decoder}"


def _input(config: SamedConfig) -> str:
    bottleneck = "" if config.input_size is None else f" through {config.input_size}"
    kind = "windows" if len(windows_of(config.window)) > 1 else "window"
    window = "0.5-99.5 percentiles" if config.window is None else f"{kind} {windows_text(config.window)}"
    window += "" if config.channels is None else f" of each channel, {config.channel_text}"
    orientation = "" if config.orientation is None else f", slices as in {config.orientation}"
    resampling = "" if config.resampling == "samed" else f" {config.resampling}"
    number = len(config.keep_largest)
    largest = f", largest part alone of {number} class{'es' * (number > 1)}" if number else ""
    tiles = "tiles of " if config.tile else ""
    averaged = "" if config.tta == "none" else f", averaged over {config.tta}"
    smoothed = f", smoothed over {config.smoothing_mm:g} mm" if config.smoothing_mm else ""
    refined = f"{averaged}{smoothed}{largest}"
    return f"{tiles}{config.image_size} pixels{bottleneck}{resampling}, {window}{orientation}{refined}"


def _classes(info: Mapping[str, Any]) -> list[str]:
    """Classes, with their scores if there are any."""
    names = list(info["classes"].items())
    shown, left = names[:_MOST_CLASSES], len(names) - _MOST_CLASSES
    more = [f"  and {left} more, which --json lists"] if left > 0 else []
    if info["scores"] is None:
        return ["label class", *(f"{label:>5} {name}" for label, name in shown), *more, "", "not evaluated"]
    of = "" if info["dataset"] is None else f" of {info['dataset']}"
    width = max(12, *(len(name) for _, name in shown))
    head = f"label {'class':<{width}}   Dice  HD95 mm  samed Dice  HD95 voxels   ({info['cases']} cases{of})"
    standard, samed = (info["scores"][name] for name in ("standard", "samed"))
    rows = [(label, name, standard["classes"][name], samed["classes"][name]) for label, name in shown]
    rows.append(("", "mean", standard["mean"], samed["mean"]))
    return [head, *(_row(label, f"{name:<{width}}", one, other) for label, name, one, other in rows), *more]


def _row(label: str, name: str, standard: Mapping[str, Any], samed: Mapping[str, Any]) -> str:
    from samed_peft.metrics import format_metric  # imports SciPy, which adapters without scores do not need

    scores = [format_metric(metric, score[metric]) for score in (standard, samed) for metric in ("dice", "hd95")]
    return "{:>5} {} {:>6} {:>8} {:>11} {:>12}".format(label, name, *scores)
