"""Meta's checkpoints, against segment-anything itself."""

from functools import partial

import pytest
import torch
from conftest import GOLDEN
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from samed_peft.errors import InputError
from samed_peft.models.checkpoints import load_meta_checkpoint


def small_sam():
    """A SAM by segment-anything with window, depth and decoder unlike the golden one."""
    encoder = ImageEncoderViT(
        depth=3, embed_dim=24, img_size=64, mlp_ratio=2, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), num_heads=2,
        patch_size=8, qkv_bias=True, use_rel_pos=True, global_attn_indexes=[1], window_size=3, out_chans=16,
    )  # fmt: skip
    prompts = PromptEncoder(embed_dim=16, image_embedding_size=(8, 8), input_image_size=(64, 64), mask_in_chans=8)
    transformer = TwoWayTransformer(depth=2, embedding_dim=16, mlp_dim=32, num_heads=8)
    decoder = MaskDecoder(transformer_dim=16, transformer=transformer, iou_head_hidden_dim=20)
    return Sam(encoder, prompts, decoder, pixel_mean=[0, 0, 0], pixel_std=[1, 1, 1]).eval()


def test_geometry_and_outputs_equal_segment_anything(tmp_path):
    torch.manual_seed(0)
    theirs = small_sam()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(theirs.state_dict(), tmp_path / "sam.pth")
    ours = load_meta_checkpoint(tmp_path / "sam.pth")
    vision = ours.config.vision_config
    assert (vision.window_size, vision.global_attn_indexes, vision.mlp_dim) == (3, [1], 48)
    pixels = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        embeddings = theirs.image_encoder(pixels)
        torch.testing.assert_close(ours.get_image_embeddings(pixels), embeddings, atol=1e-5, rtol=0)
        sparse, dense = theirs.prompt_encoder(points=None, boxes=None, masks=None)
        masks, _ = theirs.mask_decoder(embeddings[:1], theirs.prompt_encoder.get_dense_pe(), sparse, dense, True)
        got = ours(pixel_values=pixels[:1], multimask_output=True).pred_masks[:, 0]
        torch.testing.assert_close(got, masks, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("mask_decoder.iou_token.weight", "lacks weights"),
        ("image_encoder.pos_embed", "geometry cannot be read"),
    ],
)
def test_missing_weights_are_named(tmp_path, key, found):
    state = torch.load(GOLDEN / "sam_base.pth", weights_only=True)
    del state[key]
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(InputError, match=found):
        load_meta_checkpoint(tmp_path / "sam.pth")


def test_unknown_weights_are_named(tmp_path):
    state = torch.load(GOLDEN / "sam_base.pth", weights_only=True) | {"adapter.weight": torch.ones(2)}
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(InputError, match=r"unknown weights: adapter\.weight"):
        load_meta_checkpoint(tmp_path / "sam.pth")


@pytest.mark.parametrize(
    "name",
    [
        "image_encoder.blocks.9999999.attn.rel_pos_h",
        "mask_decoder.transformer.layers.9999999.norm1.weight",
        "image_encoder.blocks.x.attn.rel_pos_h",
        "image_encoder.blocks.-3.attn.rel_pos_h",
    ],
)
def test_a_name_does_not_ask_for_layers_that_are_not_there(tmp_path, name):
    state = torch.load(GOLDEN / "sam_base.pth", weights_only=True) | {name: torch.ones(2)}
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(InputError, match="geometry cannot be read"):
        load_meta_checkpoint(tmp_path / "sam.pth")


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3, 4, 5), (0, 3, 16, 16)])
@pytest.mark.parametrize(
    "key",
    [
        "image_encoder.patch_embed.proj.weight",
        "image_encoder.pos_embed",
        "image_encoder.blocks.0.attn.rel_pos_h",
        "image_encoder.blocks.0.mlp.lin1.weight",
        "image_encoder.neck.0.weight",
        "mask_decoder.mask_tokens.weight",
        "mask_decoder.transformer.layers.0.cross_attn_token_to_image.q_proj.weight",
        "mask_decoder.transformer.layers.0.mlp.lin1.weight",
        "mask_decoder.iou_prediction_head.layers.0.weight",
        "prompt_encoder.mask_downscaling.3.weight",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ],
)
def test_weights_of_any_other_shape_are_refused(tmp_path, key, shape):
    state = torch.load(GOLDEN / "sam_base.pth", weights_only=True) | {key: torch.zeros(shape)}
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(InputError, match=r"geometry cannot be read|misshapen|lacks|unknown"):
        load_meta_checkpoint(tmp_path / "sam.pth")
