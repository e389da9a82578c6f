"""Scores phantoms with an untrained model; run alone or under torchrun by test_held_out.py."""

import dataclasses
import json
import os
import socket
import sys
from pathlib import Path

os.environ["ACCELERATE_USE_CPU"] = "true"

import numpy as np
import torch
from accelerate import Accelerator
from torch.distributed import destroy_process_group

from samed_peft.io import Volume
from samed_peft.metrics import gather
from samed_peft.models.bases import load_sam
from samed_peft.prediction.held_out import score_held_out
from samed_peft.training.validation import validation_dice

AFFINE = np.diag([0.8, 0.8, 3.0, 1.0])


def scans(cases):
    """Scans and references of noise and boxes; every second case has no voxel size."""
    images, references = {}, {}
    for case in range(cases):
        rng = np.random.default_rng(case)
        labels = np.zeros((3, 24, 20), np.uint8)
        labels[:, 4:14, 3 : 9 + case] = 1
        labels[1, 10:20, 12:18] = 2 * (case != 1)
        affine = None if case % 2 else AFFINE
        name = f"case {9 - case}"
        images[name] = Volume((rng.random(labels.shape) + labels).astype(np.float32) / 3, affine, normalized=True)
        references[name] = Volume(labels, affine)
    return images, references


def main(directory: Path) -> None:
    """Score four cases, one case, and four where the processes share no folder."""
    torch.set_num_threads(1)
    socket.socket.connect = None  # scores need no network; PyTorch's own connections are not Python's
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = load_sam("tiny-sam", class_names=("box", "other"), image_size=64)
    model.samed_config = dataclasses.replace(model.samed_config, regions={"any": (1, 2)})
    for name, cases in (("four", 4), ("one", 1), ("apart", 4)):
        if name == "apart":
            gather._sees = lambda _: accelerator.is_main_process
        pairs = scans(cases)
        dice, _ = validation_dice(model, *pairs, accelerator=accelerator)
        settings = {"note": "a test"}
        report = score_held_out(model, *pairs, directory / name, accelerator=accelerator, settings=settings)
        line = {"scores": name, "dice": dice.hex(), "cases": report and len(report.cases)}
        print(json.dumps(line | {"rank": accelerator.process_index}), flush=True)
    if accelerator.num_processes > 1:
        destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
