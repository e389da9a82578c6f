"""Check the files of a base before Transformers opens them: they may come from anyone."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from samed_peft.errors import InputError
from samed_peft.io import list_folder, read_json

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_ATTENTIONS = (None, "eager", "sdpa")
_FOREIGN = re.compile("auto_map|custom_pipelines|quantization|compression_config|transformers_weights|kernel_config")
"""Fields by which Transformers imports code, reads other files or needs further libraries."""

_MOST_LAYERS, _MOST_SIZE, _MOST_WEIGHTS = 256, 1 << 20, 2e9
"""SAM's largest, ViT-H, has 32 layers and 0.64e9 weights."""


def check_base_folder(path: Path) -> None:
    """Refuse a folder whose weights are pickles, or whose index names files elsewhere.

    Raises:
        InputError: naming the file.
    """
    names = [file.name for file in list_folder(path)]
    if _CONFIG not in names:
        return  # Transformers names the missing file
    values = read_json(path / _CONFIG)
    if not isinstance(values, dict):
        raise InputError(
            f"expected a SAM's settings in {path / _CONFIG}, found {type(values).__name__}; fetch it again"
        )
    check_base_config(values, str(path / _CONFIG))
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    if pickles and _WEIGHTS not in names and _INDEX not in names:
        raise InputError(
            f"expected {_WEIGHTS} in base {path}, found {pickles[0]}: a pickle, which can run any code; if you trust "
            f'its source, save it anew by SamModel.from_pretrained("{path}").save_pretrained(folder)'
        )
    if _INDEX in names and _WEIGHTS not in names:
        _check_index(path / _INDEX)


def check_shards(source: str, revision: str | None) -> None:
    """Refuse a base whose index names other files than weights beside it.

    Args:
        source: folder, checked as a whole before by `check_base_folder`, or Hub id.
        revision: branch, tag or commit of the Hub's repository.

    Raises:
        InputError: naming the index.
    """
    if Path(source).is_dir():
        return
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if cached_file(source, _WEIGHTS, revision=revision, **quietly) is None:
        index = cached_file(source, _INDEX, revision=revision, **quietly)
        if index is not None:
            _shards(Path(index))


def _check_index(path: Path) -> None:
    folder = path.parent.resolve()
    # The Hub's cache keeps the files of a folder as links to their content.
    homes = [folder, *([folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [])]
    for name in _shards(path):
        file = path.with_name(name)
        if not file.is_file():
            raise InputError(f"{path} names {name}, which is not there; fetch the base again")
        if file.resolve().parent not in homes:
            raise InputError(
                f"expected files of weights in {folder}, as {path.name} names them, found {name}, a link to "
                f"{file.resolve()}; copy that file in place of the link, if you trust where the base is from"
            )


def _shards(path: Path) -> list[str]:
    """The names of files in an index, which must be those of weights beside it."""
    values = read_json(path)
    found = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(found, dict) or not found or not isinstance(values.get("metadata"), dict):
        raise InputError(
            f"expected an object with metadata and a weight_map in {path}, found another; the file is damaged, fetch "
            "the base again"
        )
    for name in found.values():
        if not isinstance(name, str) or re.fullmatch(r"[\w-][\w.-]{0,200}\.safetensors", name, re.ASCII) is None:
            raise InputError(
                f"expected names of .safetensors files beside {path}, found {name!r:.80}; do not trust its source"
            )
    return list(dict.fromkeys(found.values()))


def check_no_adapter(source: str, revision: str | None) -> None:
    """Refuse a base that is an adapter, whose own base Transformers would open instead.

    Raises:
        InputError: it has an `adapter_config.json`.
    """
    if find_adapter_config_file(source, revision=revision) is not None:
        raise InputError(f"base {source} is an adapter (it has adapter_config.json), not a SAM; give the SAM it adapts")


def check_base_config(values: Mapping[str, Any], place: str) -> None:
    """Refuse values of a `config.json` that run code, read other files, or that no SAM has.

    Raises:
        InputError: naming the field.
    """
    for name, value in _fields(values):
        key = name.rpartition(".")[2]
        if _FOREIGN.search(key) and value:
            raise InputError(
                f"{place} cannot be opened as a SAM: found {name}: {value!r:.80}, which makes Transformers run or read "
                "something else; do not trust its source, or save it anew by save_pretrained"
            )
        if "_implementation" in key and not (value in _ATTENTIONS or isinstance(value, bool)):
            raise InputError(
                f"expected eager or sdpa as {name} in {place}, found {value!r:.80}: code that is not part of "
                "Transformers; do not trust its source, or remove the field"
            )
        least = 1 if key == "num_hidden_layers" else -_MOST_SIZE
        most = _MOST_LAYERS if key.endswith("layers") else _MOST_SIZE
        if isinstance(value, int) and not isinstance(value, bool) and not least <= value <= most:
            raise InputError(
                f"expected a number from {least} to {most} as {name} in {place}, found {value!r:.40}; fetch it again"
            )
    if (number := _number_of_weights(values.get("vision_config"))) > _MOST_WEIGHTS:
        raise InputError(
            f"expected the sizes of a SAM, of {_MOST_WEIGHTS:g} weights at most, in {place}, found sizes of "
            f"{number:.1g}; fetch it again"
        )


def _fields(values: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    """All fields at any depth, by their names with those around them."""
    for key, value in values.items():
        yield f"{parent}{key}", value
        if isinstance(value, dict):
            yield from _fields(value, f"{parent}{key}.")


def _number_of_weights(vision: Any) -> float:
    """About as many as an encoder of these sizes has; 0 if they are not given as numbers."""
    names = ("hidden_size", "num_hidden_layers", "image_size", "patch_size", "mlp_dim", "output_channels")
    found = dict.fromkeys(names, 1) | (vision if isinstance(vision, dict) else {})
    if not all(type(found[name]) is int for name in names):
        return 0
    width, layers, image, patch, mlp, channels = (max(1, found[name]) for name in names)
    return layers * (4.0 * width**2 + 2 * width * mlp) + (image / patch) ** 2 * width + 9 * channels**2
