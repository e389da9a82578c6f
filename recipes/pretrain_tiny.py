"""Pretrain the tiny SAM that ships with samed_peft, from synthetic images only.

    python recipes/pretrain_tiny.py --output_dir samed_peft/assets/tiny_sam

Hardware and time: see the `pretraining.json` it writes beside the weights. No scan of any person is used: every image
is a warped arrangement of ellipses on a warped mosaic, painted with contrasts drawn anew for each image, so that the
encoder must learn shapes and boundaries instead of grey values. Expect a validation Dice of about 0.8 over 13 shapes.

The result is a SAM by architecture and file format only. It is there for the demo, the tests and quick comparisons.
"""

import argparse
import math
import shlex
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import SamConfig, SamModel

from samed_peft.io import atomic_dir, write_json
from samed_peft.losses import dice_ce_loss
from samed_peft.modeling import SamForSemanticSegmentation

SIZE = 64
CONFIG = SamConfig(
    vision_config={
        "hidden_size": 128, "output_channels": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
        "image_size": SIZE, "patch_size": 4, "window_size": 8, "global_attn_indexes": [2, 5], "num_pos_feats": 32,
        "mlp_dim": 512,
    },
    prompt_encoder_config={"hidden_size": 64, "image_size": SIZE, "patch_size": 4},
    mask_decoder_config={"hidden_size": 64, "mlp_dim": 256, "num_attention_heads": 4, "iou_head_hidden_dim": 64},
)  # fmt: skip

# Ellipses as (x, y, radius along, radius across, angle in degrees); the viewer's left is the patient's right.
ABDOMEN = torch.tensor([
    (-0.42, -0.10, 0.42, 0.28, 60), (0.55, -0.02, 0.24, 0.13, 100), (-0.42, 0.42, 0.19, 0.12, 70),
    (0.42, 0.42, 0.19, 0.12, 110), (-0.22, -0.38, 0.13, 0.08, 70), (0.28, -0.32, 0.30, 0.17, 30),
    (0.06, 0.26, 0.08, 0.08, 0), (0.10, -0.02, 0.30, 0.07, 160), (-0.02, 0.52, 0.15, 0.12, 0),
])  # fmt: skip
# A long organ of a head, a body and a tail in the middle of the view, beside two hollow neighbours.
TUBE = torch.tensor([
    (-0.30, 0.05, 0.24, 0.19, 20), (0.15, 0.08, 0.34, 0.14, 170), (0.05, -0.35, 0.40, 0.09, 10), (0.45, 0.45, 0.2, 0.1, 40),
])  # fmt: skip
NUM_LABELS = 1 + len(ABDOMEN) + len(TUBE)


def smooth_noise(shape: tuple[int, int], cells: int, rng: torch.Generator) -> Tensor:
    """Smooth random fields (B, C, SIZE, SIZE) with about `cells` bumps a side."""
    coarse = torch.randn(*shape, cells, cells, generator=rng)
    return F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic", align_corners=True)


def uniform(shape: tuple[int, ...], low: float, high: float, rng: torch.Generator) -> Tensor:
    """Uniform numbers in [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=rng)


def draw_shapes(batch: int, layout: Tensor, rng: torch.Generator) -> Tensor:
    """Label maps (B, SIZE, SIZE) of jittered, warped ellipses: 0 is background, k the k-th row of `layout`."""
    axis = torch.linspace(-1, 1, SIZE)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy")).expand(batch, -1, -1, -1)
    turn = uniform((batch,), -0.5, 0.5, rng)
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], -1).reshape(batch, 2, 2)
    grid = torch.einsum("bij,bjyx->biyx", rotation, grid) / uniform((batch, 1, 1, 1), 0.65, 1.35, rng)
    grid = grid + 0.06 * smooth_noise((batch, 2), 5, rng) + uniform((batch, 2, 1, 1), -0.2, 0.2, rng)
    jitter = torch.randn(batch, len(layout), 5, generator=rng) * torch.tensor([0.05, 0.05, 0.0, 0.0, 15.0])
    x, y, along, across, angle = (layout + jitter).unbind(-1)
    along, across = (r * uniform((batch, len(layout)), 0.7, 1.35, rng) for r in (along, across))
    angle = (angle * math.pi / 180)[..., None, None]
    dx, dy = grid[:, :1] - x[..., None, None], grid[:, 1:] - y[..., None, None]
    u = (dx * angle.cos() + dy * angle.sin()) / along[..., None, None]
    v = (dy * angle.cos() - dx * angle.sin()) / across[..., None, None]
    absent = torch.rand(batch, len(layout), 1, 1, generator=rng) < 0.15
    distance = (u.square() + v.square()).masked_fill(absent, math.inf)
    nearest, label = distance.min(dim=1)
    return (label + 1) * (nearest < 1)


def paint(labels: Tensor, rng: torch.Generator) -> Tensor:
    """Images (B, 3, SIZE, SIZE) in [0, 1]: random contrast per label over a mosaic, with texture, blur and noise."""
    batch = len(labels)
    mosaic = smooth_noise((batch, 5), 6, rng).argmax(dim=1)
    regions = torch.where(labels > 0, labels + 5, mosaic)
    means = torch.rand(batch, NUM_LABELS + 5, generator=rng)
    spread = uniform((batch, NUM_LABELS + 5), 0.0, 0.08, rng)
    image = means.gather(1, regions.flatten(1)) + spread.gather(1, regions.flatten(1)) * torch.randn(
        batch, SIZE * SIZE, generator=rng
    )
    image = image.reshape(batch, 1, SIZE, SIZE)
    blurred = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    image = torch.lerp(image, blurred, uniform((batch, 1, 1, 1), 0.3, 1.0, rng))
    image = image * (1 + 0.15 * smooth_noise((batch, 1), 3, rng))
    image = image + uniform((batch, 1, 1, 1), 0, 0.06, rng) * torch.randn(image.shape, generator=rng)
    image = image - image.amin((2, 3), keepdim=True)
    image = (image / image.amax((2, 3), keepdim=True)) ** uniform((batch, 1, 1, 1), 0.6, 1.6, rng)
    return image.expand(-1, 3, -1, -1)


def synthetic_batch(batch: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half abdomens, half tubes: images (B, 3, SIZE, SIZE) and labels (B, SIZE, SIZE)."""
    abdomens = draw_shapes(batch // 2, ABDOMEN, rng)
    tubes = draw_shapes(batch - batch // 2, TUBE, rng)
    labels = torch.cat([abdomens, torch.where(tubes > 0, tubes + len(ABDOMEN), 0)])
    return paint(labels, rng), labels


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Random weights at a scale that trains: Transformers leaves SAM's encoder near 1e-10."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "positional_embedding" not in name:
            nn.init.trunc_normal_(parameter, std=0.02 if "encoder" in name else parameter[0].numel() ** -0.5)


def random_tiny_sam(seed: int) -> SamModel:
    """The tiny geometry with random weights, for comparison with the pretrained one."""
    torch.manual_seed(seed)
    sam = SamModel(CONFIG)
    initialise(sam)
    return sam


def validation_dice(model: nn.Module, seed: int) -> float:
    """Mean Dice over the shapes of 512 unseen images."""
    images, labels = synthetic_batch(512, torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        predicted = torch.cat([model(part).logits.argmax(1) for part in images.split(64)])
    one, two = (F.one_hot(m, NUM_LABELS).flatten(0, 2).double() for m in (predicted, labels))
    return float((2 * (one * two).sum(0) / (one.sum(0) + two.sum(0)))[1:].mean())


def main() -> None:
    """Pretrain, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = SamForSemanticSegmentation.from_sam(random_tiny_sam(args.seed), num_labels=NUM_LABELS).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.learning_rate, total_steps=args.steps, pct_start=0.05
    )
    rng, started = torch.Generator().manual_seed(args.seed + 1), time.monotonic()
    progress = tqdm(range(args.steps), desc="pretraining", mininterval=5)
    for _ in progress:
        images, labels = synthetic_batch(args.batch_size, rng)
        loss = dice_ce_loss(model(images).logits, labels, dice_weight=0.5)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    seconds, dice = time.monotonic() - started, validation_dice(model.eval(), args.seed + 2)
    with atomic_dir(args.output_dir) as directory:
        model.save_pretrained(directory)
        write_json(directory / "pretraining.json", {
            "command": shlex.join(["python", *sys.argv]), "seed": args.seed, "steps": args.steps,
            "seconds": round(seconds), "threads": torch.get_num_threads(), "validation_dice": round(dice, 4),
            "images": "synthetic only", "torch": torch.__version__,
        })  # fmt: skip
    print(f"validation Dice {dice:.3f} after {seconds:.0f} s; saved to {args.output_dir}")


if __name__ == "__main__":
    main()
