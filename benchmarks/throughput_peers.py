"""Subjects of throughput.py built on Transformers: this package, and plain `SamModel` with stock PEFT."""

import argparse
import itertools
import time
import warnings
from collections.abc import Iterator
from typing import Any

import nibabel
import numpy as np
import torch
from accelerate import Accelerator
from measure import DEVICE
from peft import LoraConfig, get_peft_model
from scipy.ndimage import zoom
from throughput_profile import profiled
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SamModel

from samed_peft import SamedConfig, Volume, add_lora, dice_ce_loss, load_sam, predict_volume, save_adapter
from samed_peft.config import CT_WINDOW_HU, SYNAPSE_CLASSES
from samed_peft.datasets import load_synapse
from samed_peft.models.modeling import SamForSemanticSegmentation
from samed_peft.models.precision import cast_frozen_weights, product_dtype
from samed_peft.prediction import PredictionOptions, Scan, predict_files
from samed_peft.prediction.inference import load_segmenter
from samed_peft.training import build_optimizer, train_step
from samed_peft.training.batches import SlicePreparation, TrainingSlices, batch_loader, epoch_batches


class SamedPeft:
    """This package, as `training.fit` and `samed predict` use it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, base = args, args.work / "sam"
        self.accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=DEVICE.type == "cpu")
        sam = load_sam(base, class_names=SYNAPSE_CLASSES, image_size=args.image_size)
        # `load_sam` initialises mask tokens and hypernetworks anew; all subjects must start from the same.
        sam.mask_decoder.load_state_dict(SamForSemanticSegmentation.from_pretrained(base).mask_decoder.state_dict())
        if args.gradient_checkpointing:
            sam.activation_checkpointing_enable()
        sizes = {"image_size": args.image_size, "input_size": args.input_size, "rank": args.rank}
        config = SamedConfig(str(base), SYNAPSE_CLASSES, **sizes)
        model = add_lora(sam, config)
        self.adapter = args.work / f"adapter-{args.mixed_precision}"
        save_adapter(model, self.adapter, config=config)
        cast_frozen_weights(model, product_dtype(self.accelerator))
        self.label_size, self.batches = sam.logits_size, None
        self.batch = torch.load(args.work / "batch.pth", weights_only=True)
        self.model, self.optimizer = self.accelerator.prepare(model, build_optimizer(model, weight_decay=0.1))

    def _step(self, batch: dict[str, Tensor]) -> float:
        options = {"accelerator": self.accelerator, "learning_rate": self.args.learning_rate}
        batch = {name: tensor.to(DEVICE, non_blocking=True) for name, tensor in batch.items()}
        return train_step(self.model, [batch], self.optimizer, **options)[0]

    def train_step(self) -> float:
        """Take one optimizer step; returns the loss."""
        return self._step(self.batch)

    def _endless_batches(self) -> Iterator[dict[str, Tensor]]:
        rows = load_synapse(self.args.work / "phantom", "train", cache_dir=self.args.work / "rows", num_proc=1)
        slices = TrainingSlices(
            rows, SlicePreparation(self.args.image_size, self.label_size, augmentation="samed", seed=0)
        )
        # All epochs in one loader, as restarted workers would have to be waited for.
        size = len(self.batch["labels"])
        epochs = (epoch_batches(len(rows), batch_size=size, seed=0, epoch=epoch) for epoch in range(100))
        return batch_loader(slices, itertools.chain.from_iterable(epochs), num_workers=self.args.num_workers)

    def fed_step(self) -> float:
        """Take one step on slices that workers load and augment; returns the seconds spent waiting for them."""
        self.batches = self.batches or self._endless_batches()
        started = time.perf_counter()
        batch = next(self.batches)
        waited = time.perf_counter() - started
        self._step(batch)
        return waited

    def start_prediction(self) -> None:
        """Free the trained model and load the adapter as `samed predict` does."""
        self.model = self.optimizer = self.batches = None
        self.accelerator.free_memory()
        self.model = load_segmenter(self.adapter, accelerator=self.accelerator)

    def predict_slices(self) -> None:
        """Predict the slices in memory."""
        with self.accelerator.autocast():
            predict_volume(self.model, Volume(np.load(self.args.work / "slices.npy"), normalized=True))

    def predict_file(self) -> None:
        """Predict from NIfTI to NIfTI."""
        scan = Scan("ours", self.args.work / "scan.nii.gz", self.args.work / f"ours-{self.args.mixed_precision}.nii.gz")
        options = PredictionOptions(overwrite=True)
        outcome = predict_files(self.model, [scan], options=options, accelerator=self.accelerator)
        assert not outcome.failed, outcome.failed

    def profile_step(self) -> Any:
        """Profile a training step."""
        loss_shape = (len(self.batch["labels"]), len(SYNAPSE_CLASSES) + 1, self.label_size)
        return profiled(self.train_step, loss_shape=loss_shape)

    def profile_prediction(self) -> Any:
        """Profile a prediction."""
        return profiled(self.predict_slices)


class PlainSam(nn.Module):
    """Transformers' `SamModel` with stock PEFT as users write it: LoRA on the fused `qkv`, all K + 1 maps."""

    def __init__(self, sam: SamModel, args: argparse.Namespace) -> None:
        super().__init__()
        sam.requires_grad_(False)
        if args.gradient_checkpointing:
            sam.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        config = LoraConfig(
            r=args.rank,
            lora_alpha=args.rank,
            target_modules=r"vision_encoder\.layers\.\d+\.attn\.qkv",
            modules_to_save=["mask_decoder", "no_mask_embed"],
        )
        with warnings.catch_warnings():
            # PEFT 0.21 uses a name that Transformers 5.23 deprecates.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            self.peft = get_peft_model(sam, config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return (B, K + 1, h, w) logits; the decoder's own forward returns the first map or the others, not both."""
        sam = self.peft.base_model.model
        decoder = sam.mask_decoder
        embeddings = sam.vision_encoder(pixel_values).last_hidden_state
        batch, channels, height, width = embeddings.shape
        tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(batch, 1, -1, -1)
        tokens, image = decoder.transformer(
            point_embeddings=tokens,
            image_embeddings=embeddings + sam.prompt_encoder(None, None, None, None)[1],
            image_positional_embeddings=sam.get_image_wide_positional_embeddings().expand(batch, -1, -1, -1),
            attention_similarity=None,
        )
        image = decoder.upscale_conv1(image.transpose(2, 3).reshape(batch, channels, height, width))
        image = decoder.activation(decoder.upscale_layer_norm(image))
        image = decoder.activation(decoder.upscale_conv2(image))
        kernels = [mlp(tokens[:, 0, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
        return (torch.stack(kernels, dim=1) @ image.flatten(2)).unflatten(2, image.shape[2:])


class PlainPeft:
    """`PlainSam` in a training loop and a prediction as short as users write them."""

    def __init__(self, args: argparse.Namespace, attention: str) -> None:
        self.args = args
        self.accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=DEVICE.type == "cpu")
        model = PlainSam(SamModel.from_pretrained(args.work / "sam", attn_implementation=attention), args)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, weight_decay=0.1)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.batch = torch.load(args.work / "batch.pth", weights_only=True)
        self.mask = args.work / f"peft-{attention}-{args.mixed_precision}.nii.gz"

    def train_step(self) -> float:
        """Take one optimizer step; returns the loss."""
        self.model.train()
        pixels, labels = (self.batch[name].to(DEVICE) for name in ("pixel_values", "labels"))
        loss = dice_ce_loss(self.model(pixels), labels)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.optimizer.step()
        return loss.item()

    def start_prediction(self) -> None:
        """Switch to evaluation."""
        self.model.eval()
        self.optimizer = None

    @torch.inference_mode()
    def _predict(self, volume: np.ndarray) -> np.ndarray:
        size, small, masks = self.args.image_size, self.args.input_size, []
        for start in range(0, len(volume), 8):
            part = volume[start : start + 8]
            pixels = np.stack([resized(resized(s, small, small), size, size) for s in part])
            logits = self.model(torch.from_numpy(pixels).to(DEVICE)[:, None].expand(-1, 3, -1, -1)).float()
            labels = F.interpolate(logits, (size, size), mode="bilinear", align_corners=False).argmax(1)
            masks += [resized(label, *part.shape[1:], order=0) for label in labels.to(torch.uint8).cpu().numpy()]
        return np.stack(masks)

    def predict_slices(self) -> None:
        """Predict the slices in memory."""
        self._predict(np.load(self.args.work / "slices.npy"))

    def predict_file(self) -> None:
        """Predict from NIfTI to NIfTI."""
        low, high = CT_WINDOW_HU
        image = nibabel.load(self.args.work / "scan.nii.gz")
        scaled = (np.clip(image.get_fdata(dtype=np.float32), low, high) - low) / (high - low)
        mask = self._predict(scaled.transpose(2, 1, 0)).transpose(2, 1, 0)
        nibabel.save(nibabel.Nifti1Image(mask, image.affine), self.mask)


def resized(image: np.ndarray, height: int, width: int, *, order: int = 3) -> np.ndarray:
    """Resize as SAMed does."""
    if image.shape == (height, width):
        return image
    return zoom(image, (height / image.shape[0], width / image.shape[1]), order=order)
