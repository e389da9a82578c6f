"""Attach, store and merge adapters of any method in `METHODS`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn

from samed_peft.adapters.folder import WEIGHTS_FILE
from samed_peft.config import METHODS, SamedConfig, Storage
from samed_peft.config.methods import adapted_layers
from samed_peft.errors import InputError
from samed_peft.io import save_tensors
from samed_peft.models.modeling import config_of
from samed_peft.models.precision import dequantize_layers

PEFT_PREFIX = "base_model.model."
"""Start of all names within a `PeftModel`."""


def new_peft_config(config: SamedConfig, *, trained_in_full: Sequence[str], num_layers: int) -> PeftConfig:
    """PEFT's config of a new adapter, with modules trained and saved whole; layers that do not exist are refused."""
    absent = [layer for layer in config.layers or () if layer >= num_layers]
    if absent:
        raise InputError(f"layers must be numbers from 0 to {num_layers - 1} for this base; found {absent[0]}")
    method = METHODS[config.method]
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.peft_type)](
        target_modules=adapted_layers(config) if "targets" in method.options else DUMMY_TARGET_MODULES,
        modules_to_save=[*method.trained_in_full, *trained_in_full],
        **method.peft_values(config),
    )


def initial_updates(model: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer of a new adapter that its method took out of the base's weights; else empty."""
    if METHODS[config_of(model).method].storage is not Storage.TWICE_THE_RANK:
        return {}
    return {name: lora_pair(layer) for name, layer in lora_layers(model).items()}


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Layers with LoRA, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def lora_pair(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """A copy of A (r, in) and B (out, r), scaled so that their product is all that is added to the layer's weight."""
    if isinstance(layer, AdaLoraLayer):
        a, b, e = (matrices["default"].detach() for matrices in (layer.lora_A, layer.lora_B, layer.lora_E))
        kept = e[:, 0] != 0
        kept[0] |= not kept.any()  # LoRA needs rank >= 1; keep one all-zero row
        # PEFT avoids a division by zero like this.
        scaling = layer.scaling["default"] / (layer.ranknum["default"] + 1e-5)
        return (a * e)[kept].clone(), b[:, kept] * scaling
    a, b = (matrices["default"].weight.detach() for matrices in (layer.lora_A, layer.lora_B))
    return a.clone(), b * layer.scaling["default"]


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Tensors of an adapter's file, by name."""
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    # With "all" biases PEFT would also keep those of modules that trained copies replace.
    return {name: tensor for name, tensor in tensors.items() if ".original_module." not in name}


def merged(model: PeftModel) -> nn.Module:
    """The base with an adapter added to its weights and PEFT's layers removed; 4-bit weights are unpacked.

    Raises:
        NotImplementedError: the method does not change weights.
    """
    dequantize_layers(model)
    base = model.get_base_model()
    # PEFT 0.21 removes modules trained in full for LoRA's kinds only; with VeRA, OFT and IA3 it fails for the lack of
    # a `weight` in the whole mask decoder.
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, last = name.rpartition(".")
            base.get_submodule(parent).register_module(last, module.modules_to_save["default"])
    return model.merge_and_unload()


def save_as_lora(model: PeftModel, folder: Path) -> None:
    """Write an adapter as plain LoRA on the base's own weights, which any program can take.

    PiSSA and OLoRA train W - B0 A0 + B A, W being the base's weights: LoRA of twice the rank, [B, -B0] and [A; A0].
    AdaLoRA trains B E A with a diagonal E, partly zero: LoRA of the ranks that are left, E multiplied into A.
    """
    pairs = {name: lora_pair(layer) for name, layer in lora_layers(model).items()}
    for name, (a0, b0) in model.initial_updates.items():
        a, b = pairs[name]
        pairs[name] = torch.cat([a, a0.to(a.device)]), torch.cat([b, -b0.to(b.device)], dim=1)
    trained = model.peft_config["default"]
    copied = ("lora_dropout", "target_modules", "modules_to_save", "base_model_name_or_path")
    write_lora(pairs, adapter_tensors(model), folder, **{name: vars(trained)[name] for name in copied})


def write_lora(
    pairs: Mapping[str, tuple[Tensor, Tensor]], others: Mapping[str, Tensor], folder: Path, **options: Any
) -> None:
    """Write PEFT's two files of LoRA whose products are added as they are, each layer with a rank of its own.

    `pairs` are A (r, in) and B (out, r) by layer, `others` further tensors of which LoRA is left out, `options` fields
    of `LoraConfig`.
    """
    tensors = {name: tensor for name, tensor in others.items() if ".lora_" not in name}
    for name, (a, b) in pairs.items():
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    save_tensors(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    ranks = {re.escape(name.removeprefix(PEFT_PREFIX)): len(a) for name, (a, _) in pairs.items()}
    most = max(ranks.values())
    different = {name: rank for name, rank in ranks.items() if rank != most}
    scaling = {"lora_alpha": most, "rank_pattern": different, "alpha_pattern": different}
    LoraConfig(r=most, inference_mode=True, **scaling, **options).save_pretrained(str(folder))
