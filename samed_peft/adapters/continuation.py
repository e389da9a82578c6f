"""Go on from the weights of a saved adapter: on new data, or with other classes."""

import re
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import set_peft_model_state_dict
from torch import Tensor

from samed_peft.adapters.checks import check_tensors
from samed_peft.adapters.folder import WEIGHTS_FILE, adapter_folder
from samed_peft.adapters.methods import adapter_tensors
from samed_peft.adapters.save_load import read_adapter
from samed_peft.config import METHODS, SamedConfig, Storage
from samed_peft.errors import InputError
from samed_peft.io import file_sha256, read_whole
from samed_peft.models.modeling import config_of

_SAME = ("method", "rank", "alpha", "targets", "layers", "rank_pattern", "decoder", "image_size")
"""Fields of `SamedConfig` that decide the shapes and the meaning of an adapter's weights."""

_TOKENS = "mask_tokens.weight"
_HYPERNETWORK = re.compile(r"(.*output_hypernetworks_mlps\.)(\d+)(\..*)")
_IOU_HEAD = "iou_prediction_head."
"""Parts of the decoder that have one row or module for each class; the IoU head, which is not run, has too."""


def go_on_from(model: PeftModel, source: str | Path) -> str:
    """Put the weights of a saved adapter into a new one, in place of fresh ones.

    Background and classes that both name keep their mask tokens and hypernetworks, whatever their labels; new classes
    start fresh.

    Args:
        model: from `add_lora`; it is changed in place.
        source: folder or Hub id of the adapter.

    Returns:
        SHA-256 of the adapter's file of weights.

    Raises:
        InputError: `source` is not an adapter or is damaged; it has another base, method, rank or image size; or its
            method is not stored as it was trained.
    """
    folder = adapter_folder(source)
    config, _, tensors = read_whole(folder, read_adapter)
    own = config_of(model)
    _require_alike(config, own, folder)
    expected = adapter_tensors(model)
    chosen = _for_classes(tensors, expected, kept=_shared_classes(config, own))
    check_tensors(chosen, expected, folder / WEIGHTS_FILE)
    set_peft_model_state_dict(model, chosen)
    return file_sha256(folder / WEIGHTS_FILE)


def _require_alike(config: SamedConfig, own: SamedConfig, folder: Path) -> None:
    """Refuse an adapter whose weights mean something else in the new one."""
    if METHODS[config.method].storage is not Storage.AS_TRAINED:
        raise InputError(
            f"the adapter in {folder} cannot be trained further: {config.method} is stored as "
            f"{METHODS[config.method].storage}; go on from one of another method, or resume its own run"
        )
    expected: dict[str, Any] = {name: vars(own)[name] for name in _SAME}
    found = {name: vars(config)[name] for name in _SAME}
    if config.base_sha256 != own.base_sha256:
        expected["base"], found["base"] = (f"{c.base} ({str(c.base_sha256)[:12]})" for c in (own, config))
    if differing := [name for name in expected if expected[name] != found[name]]:
        listed = "; ".join(f"{name}: {expected[name]} expected, {found[name]} found" for name in differing)
        raise InputError(
            f"training cannot go on from the adapter in {folder}, which differs in what its weights mean ({listed}); "
            "give its values as options, or another adapter"
        )


def _shared_classes(config: SamedConfig, own: SamedConfig) -> dict[int, int]:
    """Label in the new adapter -> label in the saved one, background and classes of one name."""
    labels = {name: label for label, name in enumerate(config.class_names, start=1)}
    return {0: 0} | {new: labels[name] for new, name in enumerate(own.class_names, start=1) if name in labels}


def _for_classes(saved: dict[str, Tensor], expected: dict[str, Tensor], *, kept: dict[int, int]) -> dict[str, Tensor]:
    """The saved tensors for the new classes: those of kept classes at their new labels, fresh ones else."""
    chosen = {}
    for name, fresh in expected.items():
        hypernetwork = _HYPERNETWORK.fullmatch(name)
        if hypernetwork is not None:
            start, label, end = hypernetwork.groups()
            old = f"{start}{kept[int(label)]}{end}" if int(label) in kept else None
            chosen[name] = saved.get(old, fresh) if old is not None else fresh
        elif name.endswith(_TOKENS) and name in saved:
            tokens = fresh.clone()
            for new, old_label in kept.items():
                tokens[new] = saved[name][old_label].to(tokens)
            chosen[name] = tokens
        elif _IOU_HEAD in name and name in saved and saved[name].shape != fresh.shape:
            chosen[name] = fresh
        elif name in saved:
            chosen[name] = saved[name]
    unknown = {name for name in saved.keys() - expected.keys() if not _HYPERNETWORK.fullmatch(name)}
    return chosen | {name: saved[name] for name in unknown}
