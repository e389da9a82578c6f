"""Trains on golden slices and prints the losses; run alone or under torchrun by test_training.py."""

import os

os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
from accelerate import Accelerator
from conftest import GOLDEN, load_samed_weights, npz
from torch.distributed import destroy_process_group

from samed_peft.adapters.save_load import add_lora
from samed_peft.config import SYNAPSE_CLASSES, SamedConfig, TrainingConfig
from samed_peft.models.bases import load_sam
from samed_peft.training import build_optimizer, training_steps
from samed_peft.training.batches import SlicePreparation, TrainingSlices


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    config = SamedConfig(base=str(GOLDEN / "sam_base.pth"), class_names=SYNAPSE_CLASSES, image_size=128)
    model = add_lora(load_sam(config.base, class_names=config.class_names, image_size=128), config)
    load_samed_weights(model, GOLDEN / "train_start.pth")
    optimizer = build_optimizer(model, weight_decay=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    data = npz("train.npz")
    images = data["images"].astype("float32").reshape(-1, 128, 128)[:25]
    labels = data["low_res_labels"].reshape(-1, 32, 32)[:25].repeat(4, 1).repeat(4, 2)
    rows = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    slices = TrainingSlices(rows, SlicePreparation(128, 32, augmentation="samed", seed=1))
    training = TrainingConfig(
        batch_size=4 // accelerator.num_processes,
        learning_rate=0.002,
        warmup_steps=0,
        epochs=2,
        stop_epoch=2,
        num_workers=0,
    )
    steps = training_steps(model, optimizer, slices, training=training, accelerator=accelerator)
    losses = [step.loss for step in steps]
    if accelerator.is_main_process:
        print(*losses)
    if accelerator.num_processes > 1:
        destroy_process_group()


if __name__ == "__main__":
    main()
