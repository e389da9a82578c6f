"""Names of the methods that adapt SAM, and which settings each of them has."""

from collections.abc import Mapping
from types import MappingProxyType

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "lora": "LoRA (arXiv 2106.09685), as in SAMed",
        "rslora": "LoRA scaled by alpha / sqrt(rank) (arXiv 2312.03732)",
        "dora": "LoRA of directions beside trained magnitudes (arXiv 2402.09353)",
        "pissa": "LoRA that starts from the largest singular values of the weights (arXiv 2404.02948)",
        "olora": "LoRA that starts from a QR decomposition of the weights (arXiv 2406.01775)",
        "adalora": "LoRA whose ranks are shared out between layers in training (arXiv 2303.10512)",
        "qlora": "LoRA on an encoder held in 4 bits (arXiv 2305.14314)",
        "vera": "fixed random matrices shared by all layers, trained vectors between them (arXiv 2310.11454)",
        "oft": "block-diagonal rotations of the inputs, the rank is the size of a block (arXiv 2306.07280)",
        "ia3": "a factor for each output (arXiv 2205.05638)",
        "bitfit": "biases of the encoder (arXiv 2106.10199)",
        "decoder": "a frozen encoder, mask decoder alone (a baseline)",
        "full": "all weights (a baseline; its adapter holds the whole encoder)",
    }
)
"""What `SamedConfig.method` can be; the mask decoder is trained with each of them."""

LOW_RANK = ("lora", "rslora", "dora", "pissa", "olora", "adalora", "qlora")
"""Methods that add a product of two matrices, with `alpha`."""

WITH_RANK_PATTERN = ("lora", "rslora", "dora", "pissa", "olora", "qlora")
WITH_DROPOUT = (*LOW_RANK, "vera", "oft")
WITHOUT_LAYERS = ("bitfit", "decoder", "full")
"""Methods that choose no linear layers, so that `targets` and `layers` mean nothing to them."""

DECODER_IN_FULL = ("oft", *WITHOUT_LAYERS)
"""Methods that leave the decoder's transformer no adapter: PEFT's OFT takes its inputs, of four axes, for images."""

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "proj")
MLP_TARGETS = ("lin1", "lin2")

METHOD_FIELDS = ("method", "rank", "alpha", "targets", "layers", "rank_pattern", "decoder", "dropout")
"""Fields of `SamedConfig` that say what is adapted, and how."""
