"""Settings of PEFT for each method of adapting SAM, and adapters that are written as plain LoRA."""

import dataclasses
import re
from pathlib import Path

import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, OFTConfig, PeftConfig, PeftModel, VeraConfig
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn

from samed_peft.config import SamedConfig
from samed_peft.config.methods import ATTENTION_TARGETS, MLP_TARGETS, WITHOUT_LAYERS
from samed_peft.errors import InputError
from samed_peft.io import save_tensors
from samed_peft.models.precision import dequantize_layers

STARTS_FROM_WEIGHTS = ("pissa", "olora")
"""Methods that take their start out of the base's weights, and are written as LoRA of twice the rank."""

_ADALORA_START = 1.5
"""Ranks that AdaLoRA begins with, over those that it ends with: as in its paper."""


def peft_settings(config: SamedConfig, *, trained_in_full: list[str], num_layers: int) -> PeftConfig:
    """PEFT's configuration of a method.

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
    targets = DUMMY_TARGET_MODULES if config.method in WITHOUT_LAYERS else adapted_layers(config)
    shared = {"target_modules": targets, "modules_to_save": trained_in_full}
    match config.method:
        case "ia3":
            # Factors belong to what an MLP holds between its two layers: to the input of the second.
            between = adapted_layers(dataclasses.replace(config, targets=("lin2",), decoder="full"))
            return IA3Config(feedforward_modules=between if "lin2" in config.targets else [], **shared)
        case "oft":
            return OFTConfig(r=0, oft_block_size=config.rank, module_dropout=config.dropout, **shared)
        case "vera":
            return VeraConfig(r=config.rank, vera_dropout=config.dropout, **shared)
        case "adalora":
            start = max(config.rank + 1, round(_ADALORA_START * config.rank))
            return AdaLoraConfig(
                init_r=start,
                target_r=config.rank,
                lora_alpha=start if config.alpha is None else config.alpha * start / config.rank,
                lora_dropout=config.dropout,
                total_step=1,  # until training says how long it is
                **shared,
            )
        case "bitfit":
            return LoraConfig(r=config.rank, bias="all", **shared)
        case "full":
            whole = ["vision_encoder", *trained_in_full]
            return LoraConfig(r=config.rank, target_modules=targets, modules_to_save=whole)
    ranks = config.rank_pattern or {}
    return LoraConfig(
        r=config.rank,
        lora_alpha=_alpha(config),
        lora_dropout=config.dropout,
        rank_pattern=ranks,
        alpha_pattern=ranks if config.alpha is None and config.method != "rslora" else {},
        use_rslora=config.method == "rslora",
        use_dora=config.method == "dora",
        init_lora_weights=config.method if config.method in STARTS_FROM_WEIGHTS else True,
        **shared,
    )


def _alpha(config: SamedConfig) -> int:
    if config.alpha is not None:
        return config.alpha
    # For rsLoRA it must not depend on the rank; with this one, nothing is scaled at SAMed's rank of 4.
    return 2 if config.method == "rslora" else config.rank


def adapted_layers(config: SamedConfig) -> str:
    """Regular expression of the linear layers that are adapted."""
    numbers = r"\d+" if config.layers is None else f"({'|'.join(map(str, config.layers))})"
    blocks = {"attn": ATTENTION_TARGETS, "mlp": MLP_TARGETS}
    found = {block: [name for name in config.targets if name in names] for block, names in blocks.items()}
    parts = [rf"{block}\.({'|'.join(names)})" for block, names in found.items() if names]
    either = parts[0] if len(parts) == 1 else f"({'|'.join(parts)})"
    encoder = rf"vision_encoder\.layers\.{numbers}\.{either}"
    if config.decoder == "full":
        return encoder
    kinds = "self_attn|cross_attn_token_to_image|cross_attn_image_to_token"
    names = "|".join(name for name in config.targets if name in ("q_proj", "k_proj", "v_proj"))
    return rf"({encoder}|mask_decoder\.transformer\.(layers\.\d+\.({kinds})|final_attn_token_to_image)\.({names}))"


def initial_updates(model: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer that a method took out of the base's weights; none for other methods."""
    settings = model.peft_config["default"]
    if not isinstance(settings, LoraConfig) or settings.init_lora_weights not in STARTS_FROM_WEIGHTS:
        return {}
    return {name: _pair(layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def _pair(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), as they are now, whose product is all that is added to the layer's weight."""
    if isinstance(layer, AdaLoraLayer):
        a, b, e = (matrices["default"].detach() for matrices in (layer.lora_A, layer.lora_B, layer.lora_E))
        kept = e[:, 0] != 0
        kept[0] |= not kept.any()  # a rank of none is no LoRA; this row adds nothing
        # PEFT keeps away from a division by zero.
        scaling = layer.scaling["default"] / (layer.ranknum["default"] + 1e-5)
        return (a * e)[kept].clone(), b[:, kept] * scaling
    a, b = (matrices["default"].weight.detach() for matrices in (layer.lora_A, layer.lora_B))
    return a.clone(), b * layer.scaling["default"]


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """What an adapter's file holds, by name."""
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    # With "all" biases PEFT would also keep those of modules that trained copies stand in for.
    return {name: tensor for name, tensor in tensors.items() if ".original_module." not in name}


def merged(model: PeftModel) -> nn.Module:
    """The base with an adapter added to its weights, and nothing of PEFT left; 4-bit weights are unpacked.

    PEFT's own `merge_and_unload` does not get past modules trained in full with most methods but LoRA.

    Raises:
        NotImplementedError: the method is no change of weights.
    """
    dequantize_layers(model)
    model.base_model.merge_adapter()
    base = model.get_base_model()
    for name, module in list(base.named_modules()):
        parent, _, last = name.rpartition(".")
        if isinstance(module, BaseTunerLayer):
            base.get_submodule(parent).register_module(last, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            base.get_submodule(parent).register_module(last, module.modules_to_save["default"])
    del base.peft_config  # PEFT's mark of an adapted model, by which it would warn of a second adapter
    return base


def is_kept_as_lora(model: PeftModel) -> bool:
    """Whether an adapter is written as plain LoRA, on the base's own weights, which every program can take."""
    return bool(model.initial_updates) or isinstance(model.peft_config["default"], AdaLoraConfig)


def save_as_lora(model: PeftModel, weights: Path) -> None:
    """Write an adapter as LoRA: the same sums, on the base's own weights.

    PiSSA and OLoRA train W - B0 A0 + B A, W being the base's weights: LoRA of twice the rank, [B, -B0] and [A; A0].
    AdaLoRA trains B E A with a diagonal E, some of which is zero: LoRA of the rest, E in A.

    Args:
        model: one that `is_kept_as_lora`.
        weights: the file; `adapter_config.json` goes beside it.
    """
    settings = model.peft_config["default"]
    tensors = {name: tensor for name, tensor in adapter_tensors(model).items() if ".lora_" not in name}
    ranks = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        a, b = _pair(layer)
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
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
        modules_to_save=settings.modules_to_save,
        rank_pattern=different,
        alpha_pattern=different,
        base_model_name_or_path=settings.base_model_name_or_path,
        inference_mode=True,
    ).save_pretrained(str(weights.parent))
