"""The methods that adapt SAM: one record each, which options, checks, adapters, cards and exports read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samed_peft.config.adapter import SamedConfig

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "proj")
MLP_TARGETS = ("lin1", "lin2")
DECODER_TARGETS = ("q_proj", "k_proj", "v_proj")
"""Targets that the mask decoder's attention has too."""

_LAYERS = ("targets", "layers")
_OF_ADAPTER = ("rank", "alpha", *_LAYERS, "rank_pattern", "dropout", "decoder")
_LORA = (*_OF_ADAPTER, "lora_plus_ratio")

METHOD_FIELDS = ("method", *_OF_ADAPTER)
"""Fields of `SamedConfig` that define the adaptation."""


class Storage(StrEnum):
    """How an adapter's weights are written."""

    AS_TRAINED = "as trained"
    TWICE_THE_RANK = "LoRA of twice the rank, on the unchanged base"
    RANKS_LEFT = "LoRA of the ranks that are left"


@dataclass(frozen=True)
class Method:
    """A method that adapts SAM's encoder; the mask decoder is trained with each of them."""

    summary: str  # one line for users
    peft_values: "Callable[[SamedConfig], dict[str, Any]]"  # fields of PEFT's config, besides the modules, from ours
    peft_type: str = "LORA"  # PEFT's name of the kind of adapter
    options: tuple[str, ...] = _LORA  # fields of both configs that it uses; "decoder" if it can adapt the decoder too
    storage: Storage = Storage.AS_TRAINED
    plain_lora: bool = False  # whether its file holds LoRA as formats of other programs can
    min_rank: int = 1
    trained_in_full: tuple[str, ...] = ()  # modules of the encoder that are trained and saved whole
    quantized: bool = False  # whether the encoder's linear layers are packed into 4 bits
    extra: str | None = None  # extra of this package that it needs


def adapted_layers(config: "SamedConfig") -> str:
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
    names = "|".join(name for name in config.targets if name in DECODER_TARGETS)
    return rf"({encoder}|mask_decoder\.transformer\.(layers\.\d+\.({kinds})|final_attn_token_to_image)\.({names}))"


def _lora(config: "SamedConfig", **different: Any) -> dict[str, Any]:
    ranks = config.rank_pattern or {}
    common = {"r": config.rank, "lora_alpha": config.alpha or config.rank, "lora_dropout": config.dropout}
    return common | {"rank_pattern": ranks, "alpha_pattern": {} if config.alpha else ranks} | different


def _rslora(config: "SamedConfig") -> dict[str, Any]:
    # Its alpha must not depend on the rank; 2 scales nothing at SAMed's rank of 4.
    return _lora(config, use_rslora=True, lora_alpha=config.alpha or 2, alpha_pattern={})


def _adalora(config: "SamedConfig") -> dict[str, Any]:
    start = max(config.rank + 1, round(1.5 * config.rank))  # 1.5 times, as in its paper
    return {
        "init_r": start,
        "target_r": config.rank,
        "lora_alpha": start if config.alpha is None else config.alpha * start / config.rank,
        "lora_dropout": config.dropout,
        "total_step": 1,  # until training says how long it is
    }


def _ia3(config: "SamedConfig") -> dict[str, Any]:
    # In an MLP the factors scale the activations between its two layers: the inputs of the second.
    between = adapted_layers(replace(config, targets=("lin2",), decoder="full"))
    return {"feedforward_modules": between if "lin2" in config.targets else []}


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "lora": Method("LoRA (arXiv 2106.09685), as in SAMed", _lora, plain_lora=True),
        "rslora": Method("LoRA scaled by alpha / sqrt(rank) (arXiv 2312.03732)", _rslora, plain_lora=True),
        "dora": Method(
            "LoRA of directions beside trained magnitudes (arXiv 2402.09353)", partial(_lora, use_dora=True)
        ),
        "pissa": Method(
            "LoRA that starts from the largest singular values of the weights (arXiv 2404.02948)",
            partial(_lora, init_lora_weights="pissa"),
            storage=Storage.TWICE_THE_RANK,
            plain_lora=True,
        ),
        "olora": Method(
            "LoRA that starts from a QR decomposition of the weights (arXiv 2406.01775)",
            partial(_lora, init_lora_weights="olora"),
            storage=Storage.TWICE_THE_RANK,
            plain_lora=True,
        ),
        "adalora": Method(
            "LoRA whose ranks are pruned in training where they matter least; the rank is the mean left "
            "(arXiv 2303.10512)",
            _adalora,
            "ADALORA",
            options=tuple(name for name in _LORA if name != "rank_pattern"),
            storage=Storage.RANKS_LEFT,
            plain_lora=True,
        ),
        "qlora": Method("LoRA on an encoder in 4 bits (arXiv 2305.14314)", _lora, quantized=True, extra="qlora"),
        "vera": Method(
            "trained vectors between fixed random matrices that all layers share (arXiv 2310.11454)",
            lambda config: {"r": config.rank, "vera_dropout": config.dropout},
            "VERA",
            options=("rank", *_LAYERS, "dropout", "decoder"),
        ),
        "oft": Method(  # without "decoder": PEFT's OFT takes the decoder's inputs, of four axes, for images
            "block-diagonal rotations of the inputs; the rank is the size of a block (arXiv 2306.07280)",
            lambda config: {"r": 0, "oft_block_size": config.rank, "module_dropout": config.dropout},
            "OFT",
            options=("rank", *_LAYERS, "dropout"),
            min_rank=2,
        ),
        "ia3": Method("a factor for each output (arXiv 2205.05638)", _ia3, "IA3", options=(*_LAYERS, "decoder")),
        "bitfit": Method("biases of the encoder (arXiv 2106.10199)", partial(_lora, bias="all"), options=()),
        "decoder": Method("a frozen encoder, mask decoder alone (a baseline)", _lora, options=()),
        "full": Method(
            "all weights (a baseline; its adapter holds the whole encoder)",
            _lora,
            options=(),
            trained_in_full=("vision_encoder",),
        ),
    }
)
"""What `SamedConfig.method` can be, in the order that users see."""
