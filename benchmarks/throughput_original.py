"""The original SAMed as a subject of throughput.py, in a process that imports nothing of this package."""

import argparse
import json
import sys
from functools import partial
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import torch
from measure import DEVICE
from torch import nn


def meta_sam(modeling: ModuleType, config: dict[str, Any]) -> nn.Module:
    """Build Meta's `Sam` for the values of a `SamConfig`; SAMed's own builders only know ViT-B, -L and -H."""
    vision, prompts, decoder = (config[f"{part}_config"] for part in ("vision", "prompt_encoder", "mask_decoder"))
    image_size, channels = vision["image_size"], vision["output_channels"]
    encoder = modeling.ImageEncoderViT(
        img_size=image_size, patch_size=vision["patch_size"], embed_dim=vision["hidden_size"], out_chans=channels,
        depth=vision["num_hidden_layers"], num_heads=vision["num_attention_heads"], use_rel_pos=True,
        mlp_ratio=vision["mlp_dim"] / vision["hidden_size"], norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **{name: vision[name] for name in ("qkv_bias", "window_size", "global_attn_indexes")},
    )  # fmt: skip
    sizes = {"image_embedding_size": (image_size // vision["patch_size"],) * 2, "input_image_size": (image_size,) * 2}
    prompt_encoder = modeling.PromptEncoder(embed_dim=channels, mask_in_chans=prompts["mask_input_channels"], **sizes)
    transformer = modeling.TwoWayTransformer(
        embedding_dim=decoder["hidden_size"], depth=decoder["num_hidden_layers"],
        num_heads=decoder["num_attention_heads"],
        **{name: decoder[name] for name in ("mlp_dim", "attention_downsample_rate")},
    )  # fmt: skip
    heads = {name: decoder[name] for name in ("num_multimask_outputs", "iou_head_depth", "iou_head_hidden_dim")}
    masks = modeling.MaskDecoder(transformer_dim=decoder["hidden_size"], transformer=transformer, **heads)
    return modeling.Sam(encoder, prompt_encoder, masks, pixel_mean=[0, 0, 0], pixel_std=[1, 1, 1])


class Original:
    """SAMed's net, trained as by its trainer.py and tested with its `test_single_volume`."""

    def __init__(self, args: argparse.Namespace) -> None:
        sys.path.insert(0, str(args.samed_dir))
        if DEVICE.type == "cpu":
            torch.Tensor.cuda = nn.Module.cuda = lambda this, *_, **__: this
        import trainer
        import utils
        from sam_lora_image_encoder import LoRA_Sam
        from segment_anything import modeling

        self.args, self.utils, self.trainer = args, utils, trainer
        sam = meta_sam(modeling, json.loads((args.work / "geometry.json").read_text()))
        sam.load_state_dict(torch.load(args.work / "sam.pth", weights_only=True))
        self.classes = sam.mask_decoder.num_multimask_outputs
        self.net = LoRA_Sam(sam, args.rank).cuda().train()
        weights = filter(lambda weight: weight.requires_grad, self.net.parameters())
        self.optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, betas=(0.9, 0.999), weight_decay=0.1)
        batch = torch.load(args.work / "batch.pth", weights_only=True)
        self.images, self.labels = batch["pixel_values"].contiguous(), batch["labels"]
        self.losses = nn.CrossEntropyLoss(), utils.DiceLoss(self.classes + 1)
        # Left out: scoring, and the copies of scan and reference that it writes beside the mask.
        utils.calculate_metric_percase = lambda *_: (0, 0)
        write = utils.sitk.WriteImage
        utils.sitk = argparse.Namespace(
            GetImageFromArray=utils.sitk.GetImageFromArray,
            WriteImage=lambda image, path: write(image, path) if path.endswith("_pred.nii.gz") else None,
        )

    def train_step(self) -> float:
        """Run the body of trainer.py's loop."""
        images, labels = self.images.cuda(), self.labels.cuda()
        outputs = self.net(images, True, self.args.image_size)
        loss, *_ = self.trainer.calc_loss(outputs, labels, *self.losses)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def start_prediction(self) -> None:
        """Do nothing: it needs no preparation."""

    def _predict(self, image: np.ndarray, label: np.ndarray, **where: str) -> None:
        sizes = {"patch_size": [self.args.image_size] * 2, "input_size": [self.args.input_size] * 2}
        volumes = torch.from_numpy(image)[None], torch.from_numpy(label)[None]
        self.utils.test_single_volume(*volumes, self.net, self.classes, True, **sizes, **where)

    def predict_slices(self) -> None:
        """Predict the slices in memory."""
        slices = np.load(self.args.work / "slices.npy")
        self._predict(slices, np.zeros(slices.shape, np.uint8))

    def predict_file(self) -> None:
        """Predict from its own .npy.h5, with intensities scaled beforehand, to NIfTI."""
        with h5py.File(self.args.work / "scan.npy.h5") as data:
            image, label = data["image"][:], data["label"][:]
        self._predict(image, label, test_save_path=str(self.args.work), case="samed")
