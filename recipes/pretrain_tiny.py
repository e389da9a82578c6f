"""Pretrain the tiny SAM that ships with samed_peft, from synthetic images only.

    python recipes/pretrain_tiny.py --output_dir samed_peft/models/tiny_sam

A quarter of an hour on two cores; `pretraining.json` beside the weights records command, seed and time. No real scan
is used: every image is a warped abdomen of ellipses, or a long organ with head and body, in contrasts drawn anew for
each image, so that the encoder must learn shapes and boundaries instead of grey values. Expect a validation Dice of
about 0.71 over 13 shapes.

With --steps 0 it saves the random weights that training would start from, for comparison; with --stock_weights those of
Transformers, which are near zero in the encoder.
The result is a SAM by architecture and file format only, for the demo, the tests and quick comparisons.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

import torch
from pretrain_shapes import NUM_LABELS, SIZE, synthetic_batch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import SamConfig, SamModel

from samed_peft.errors import exit_on_error, printable
from samed_peft.io import FolderKind, atomic_dir, require_replaceable, write_json
from samed_peft.models.bases import randomize_weights
from samed_peft.models.losses import dice_ce_loss
from samed_peft.models.modeling import SamForSemanticSegmentation
from samed_peft.prediction.slices import upsampled_argmax

CONFIG = SamConfig(
    vision_config={
        "hidden_size": 128, "output_channels": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
        "image_size": SIZE, "patch_size": 8, "window_size": 4, "global_attn_indexes": [2, 5], "num_pos_feats": 32,
        "mlp_dim": 512,
    },
    prompt_encoder_config={"hidden_size": 64, "image_size": SIZE, "patch_size": 8},
    mask_decoder_config={"hidden_size": 64, "mlp_dim": 256, "num_attention_heads": 4, "iou_head_hidden_dim": 64},
)  # fmt: skip


def random_tiny_sam(seed: int, *, stock: bool = False) -> SamModel:
    """Build the tiny geometry with random weights, at a scale that trains or as Transformers draws them."""
    torch.manual_seed(seed)
    sam = SamModel(CONFIG)
    if not stock:
        randomize_weights(sam)
    return sam


def validation_dice(model: nn.Module, seed: int) -> float:
    """Mean Dice over the shapes of 512 unseen images."""
    images, labels = synthetic_batch(512, torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        predicted = torch.cat([upsampled_argmax(model(part).logits, SIZE).long() for part in images.split(64)])
    one, two = (F.one_hot(m, NUM_LABELS).flatten(0, 2).double() for m in (predicted, labels))
    return float((2 * (one * two).sum(0) / (one.sum(0) + two.sum(0)))[1:].mean())


@exit_on_error
def main() -> None:
    """Pretrain, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True)
    add("--steps", type=int, default=5000)
    add("--batch_size", type=int, default=32)
    add("--learning_rate", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--stock_weights", action="store_true", help="start from Transformers' own initial weights")
    args = parser.parse_args()
    start = random_tiny_sam(args.seed, stock=args.stock_weights)
    model = SamForSemanticSegmentation.from_sam(start, num_labels=NUM_LABELS).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.learning_rate, total_steps=max(args.steps, 1), pct_start=0.05
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
    require_replaceable(args.output_dir, FolderKind(markers=("config.json",)))
    seconds, dice = time.monotonic() - started, validation_dice(model.eval(), args.seed + 2)
    with atomic_dir(args.output_dir) as directory:
        model.save_pretrained(directory)
        write_json(directory / "pretraining.json", {
            "command": shlex.join(["python", *sys.argv]), "seed": args.seed, "steps": args.steps,
            "seconds": round(seconds), "threads": torch.get_num_threads(), "validation_dice": round(dice, 4),
            "images": "synthetic only", "torch": torch.__version__,
        })  # fmt: skip
    print(printable(f"validation Dice {dice:.3f} after {seconds:.0f} s; saved to {args.output_dir}"))


if __name__ == "__main__":
    main()
