"""SAM as a semantic segmentation model without prompts, as SAMed (arXiv 2304.13785) uses it."""

import copy
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, SamConfig, SamModel
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.sam.modeling_sam import (
    SamMaskDecoder,
    SamPositionalEmbedding,
    SamPromptEncoder,
    SamVisionEncoder,
)

from samed_peft.config import SamedConfig
from samed_peft.errors import InputError
from samed_peft.models.attention import SamEncoderLayer
from samed_peft.models.checkpoints import fuse_qkv, resize_positions, semantic_config, split_qkv
from samed_peft.models.losses import dice_ce_loss

FRESH_PARTS = ("mask_tokens", "output_hypernetworks_mlps", "iou_prediction_head")
"""Parts of the mask decoder that are initialised anew for K + 1 classes, as in SAMed."""


class SemanticMaskDecoder(SamMaskDecoder):
    """SAM's mask decoder with every mask token as an output: K + 1 class maps, background first.

    The IoU head is kept, so that a merged model is a whole SAM again, but it is not run.
    """

    def forward(self, image_embeddings: Tensor, positions: Tensor, dense_prompt: Tensor) -> Tensor:
        """Embeddings and positions (B, C, h, w), "no mask given" (1, C, 1, 1) -> logits (B, K + 1, 4 h, 4 w)."""
        batch, channels, height, width = image_embeddings.shape
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(batch, 1, -1, -1)
        tokens_out, image_out = self.transformer(
            point_embeddings=tokens,
            image_embeddings=image_embeddings + dense_prompt,
            image_positional_embeddings=positions,
            attention_similarity=None,
        )
        image_out = image_out.transpose(2, 3).reshape(batch, channels, height, width)
        features = self.activation(self.upscale_layer_norm(self.upscale_conv1(image_out)))
        features = self.activation(self.upscale_conv2(features))
        # One by one: a batched product would stack all weights and split their gradients again, which costs CPUs more
        # than it saves.
        class_tokens = tokens_out[:, 0, 1:].unbind(dim=1)
        pairs = zip(self.output_hypernetworks_mlps, class_tokens, strict=True)
        kernels = torch.stack([mlp(token) for mlp, token in pairs], dim=2)
        # Channels are last in memory from the encoder on. With the features on the left of the product, their gradient
        # has channels last too; otherwise GELU and convolution would take several times as long.
        maps = features.flatten(2).transpose(1, 2) @ kernels
        return maps.transpose(1, 2).unflatten(2, features.shape[2:]).contiguous()

    @torch.no_grad()
    def reset_fresh_parts(self) -> None:
        """Initialise mask tokens, hypernetworks and IoU head as PyTorch does by default, like SAMed."""
        for name in FRESH_PARTS:
            for module in self.get_submodule(name).to_empty(device="cpu").modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    module.reset_parameters()


class SamForSemanticSegmentation(PreTrainedModel):
    """SAM's encoder and mask decoder with one output map per class and no prompts.

    `model(pixel_values=(B, 3, S, S), labels=None)` returns a `SemanticSegmenterOutput` whose `logits` are
    (B, K + 1, 4 S / P, 4 S / P) for patch size P, background first; with labels (B, h, w) int64 it has `.loss` too.
    Pixels are in [0, 1]: SAMed applies no mean or deviation.
    """

    config_class = SamConfig
    main_input_name = "pixel_values"
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["SamEncoderLayer"]

    def __init__(self, config: SamConfig) -> None:
        super().__init__(config)
        vision = config.vision_config
        self.shared_image_embedding = SamPositionalEmbedding(vision)
        self.vision_encoder = SamVisionEncoder(vision)
        self.vision_encoder.layers = nn.ModuleList(SamEncoderLayer(vision, i) for i in range(vision.num_hidden_layers))
        self.prompt_encoder = SamPromptEncoder(config)
        config.mask_decoder_config._attn_implementation = config._attn_implementation
        self.mask_decoder = SemanticMaskDecoder(config.mask_decoder_config)
        self.samed_config: SamedConfig | None = None  # everything that prediction needs; read it with `config_of`
        self.base_sha256: str | None = None  # fingerprint of the base's frozen weights
        self.base_revision: str | None = None  # commit of a base from the Hub
        # What a new PiSSA or OLoRA adapter subtracted from the base's weights.
        self.initial_updates: dict[str, tuple[Tensor, Tensor]] = {}
        self.post_init()

    @classmethod
    def from_sam(cls, sam: SamModel, *, num_labels: int | None = None, image_size: int | None = None) -> Self:
        """Build the model from a SAM's weights, which are shared, not copied.

        For K + 1 labels, background included, mask tokens, hypernetworks and IoU head are initialised anew; None keeps
        the SAM's own outputs, for example those of a merged model. For another image size, a multiple of the patch's,
        positions are resized bilinearly as SAMed does.
        """
        config = semantic_config(sam.config, num_labels=num_labels, image_size=image_size)
        state = split_qkv(resize_positions(sam.state_dict(), config))
        if num_labels is not None:
            state = {key: value for key, value in state.items() if not any(part in key for part in FRESH_PARTS)}
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(state, strict=False, assign=True)
        if num_labels is not None:
            model.mask_decoder.reset_fresh_parts()
        assert not any(p.is_meta for p in model.parameters()), "every weight comes from the SAM or starts fresh"
        return model.eval()

    def to_sam(self) -> SamModel:
        """Return the weights as a plain `SamModel` with fused `qkv`, whose outputs 0..K are the class maps.

        `multimask_output=False` of the result gives map 0 (background), `multimask_output=True` maps 1..K.
        """
        with torch.device("meta"):
            sam = SamModel(copy.deepcopy(self.config))
        sam.load_state_dict(fuse_qkv(self.state_dict()), assign=True)
        sam.tie_weights()
        return sam.eval()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save as a plain SAM for `SamModel.from_pretrained`; merge an adapter first."""
        self.to_sam().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Open a folder of `save_pretrained` with its class maps (to adapt a base, see `load_sam`)."""
        return cls.from_sam(SamModel.from_pretrained(pretrained_model_name_or_path, **kwargs))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SemanticSegmenterOutput:
        """Segment (B, 3, S, S) pixels in [0, 1]; `labels` (B, h, w) int64 add SAMed's loss."""
        embeddings = self.vision_encoder(pixel_values).last_hidden_state
        no_mask = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        logits = self.mask_decoder(embeddings, self._positions(embeddings), no_mask)
        loss = None if labels is None else dice_ce_loss(logits, labels)
        return SemanticSegmenterOutput(loss=loss, logits=logits)

    @property
    def logits_size(self) -> int:
        """Pixels per side of the logits: four times the tokens per side."""
        return 4 * (self.config.vision_config.image_size // self.config.vision_config.patch_size)

    def _positions(self, embeddings: Tensor) -> Tensor:
        # Not cached: it takes under a thousandth of ViT-B's time, and a cache could outlive the weights it depends on.
        batch, _, height, width = embeddings.shape
        centre_y = (torch.arange(height, device=embeddings.device) + 0.5) / height
        centre_x = (torch.arange(width, device=embeddings.device) + 0.5) / width
        grid = torch.stack(torch.meshgrid(centre_x, centre_y, indexing="xy"), dim=-1)
        encoding = self.shared_image_embedding(grid).permute(2, 0, 1)
        return encoding.to(embeddings.dtype).expand(batch, -1, -1, -1)


class Configured(Protocol):
    """A model that carries its config: a `SamForSemanticSegmentation`, with an adapter, merged or compiled."""

    samed_config: SamedConfig | None


def config_of(model: Configured) -> SamedConfig:
    """The config that a model carries, with its base's fingerprint and revision; one built by hand is refused."""
    if model.samed_config is None:
        raise InputError("the model has no samed_config; get it from load_sam, add_lora or load_adapter")
    return model.samed_config
