"""Attach, store and merge adapters of any method in `METHODS`."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn

from samed_peft.config import METHODS, SamedConfig, Storage
from samed_peft.config.methods import adapted_layers
from samed_peft.errors import InputError
from samed_peft.io import save_tensors
from samed_peft.models.modeling import config_of
from samed_peft.models.precision import dequantize_layers


def new_peft_config(config: SamedConfig, *, trained_in_full: Sequence[str], num_layers: int) -> PeftConfig:
    """PEFT's config of a new adapter.

    Args:
        config: method, rank, alpha, targets, layers and so on.
        trained_in_full: modules that are trained and saved whole.
        num_layers: layers of the encoder.

    Raises:
        InputError: `layers` names one that the encoder does not have.
    """
    absent = [layer for layer in config.layers or () if layer >= num_layers]
    if absent:
        raise InputError(f"layers must be numbers from 0 to {num_layers - 1} for this base; found {absent[0]}")
    method = METHODS[config.method]
    targets = adapted_layers(config) if "targets" in method.options else DUMMY_TARGET_MODULES
    return method.build(config, {"target_modules": targets, "modules_to_save": list(trained_in_full)})


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


def save_as_lora(model: PeftModel, weights: Path) -> None:
    """Write an adapter as plain LoRA on the base's own weights, which any program can take.

    PiSSA and OLoRA train W - B0 A0 + B A, W being the base's weights: LoRA of twice the rank, [B, -B0] and [A; A0].
    AdaLoRA trains B E A with a diagonal E, partly zero: LoRA of the ranks that are left, E multiplied into A.

    Args:
        model: with LoRA of any kind.
        weights: the file; `adapter_config.json` goes beside it.
    """
    trained = model.peft_config["default"]
    tensors = {name: tensor for name, tensor in adapter_tensors(model).items() if ".lora_" not in name}
    ranks = {}
    for name, layer in lora_layers(model).items():
        a, b = lora_pair(layer)
        if name in model.initial_updates:
            a0, b0 = (start.to(a.device) for start in model.initial_updates[name])
            a, b = torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
        ranks[re.escape(name.removeprefix("base_model.model."))] = len(a)
    save_tensors(tensors, weights, metadata={"format": "pt"})
    most = max(ranks.values())
    different = {name: rank for name, rank in ranks.items() if rank != most}
    LoraConfig(
        r=most,
        lora_alpha=most,
        lora_dropout=trained.lora_dropout,
        target_modules=trained.target_modules,
        modules_to_save=trained.modules_to_save,
        rank_pattern=different,
        alpha_pattern=different,
        base_model_name_or_path=trained.base_model_name_or_path,
        inference_mode=True,
    ).save_pretrained(str(weights.parent))
