"""One SAM, one batch and one scan for all subjects of throughput.py, and the FLOP of a training step."""

import argparse
from typing import Any

import h5py
import numpy as np
import torch
from segment_anything import modeling
from throughput_original import meta_sam
from throughput_peers import PlainSam
from torch.utils.flop_counter import FlopCounterMode
from transformers import SamConfig, SamModel

from samed_peft import Volume, load_sam, read_volume
from samed_peft.config import CT_WINDOW_HU, SYNAPSE_CLASSES
from samed_peft.datasets import load_synapse, write_phantom
from samed_peft.datasets.preprocessing import normalized_array
from samed_peft.io import write_json, write_volume
from samed_peft.models.bases import TINY_SAM_DIR, randomize_weights
from samed_peft.models.checkpoints import rename_meta_keys
from samed_peft.models.modeling import SamForSemanticSegmentation
from samed_peft.training.batches import SlicePreparation, TrainingSlices, batch_loader

GEOMETRIES = {
    "vit_b": {},
    "vit_l": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
              "global_attn_indexes": [5, 11, 17, 23]},
    "vit_h": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16,
              "global_attn_indexes": [7, 15, 23, 31]},
}  # fmt: skip
NUM_LABELS = len(SYNAPSE_CLASSES) + 1


def random_model(geometry: str, image_size: int) -> SamForSemanticSegmentation:
    """Build a SAM with random weights at a size, for all of Synapse's classes."""
    tiny = geometry == "tiny"
    config = SamConfig.from_pretrained(TINY_SAM_DIR) if tiny else SamConfig(vision_config=GEOMETRIES[geometry])
    sam = SamModel(config)
    randomize_weights(sam)
    return SamForSemanticSegmentation.from_sam(sam, num_labels=NUM_LABELS, image_size=image_size)


def write_sam(args: argparse.Namespace) -> None:
    """Write the base for K + 1 classes at the run's size: WORK/sam for Transformers, WORK/sam.pth for Meta's code."""
    if args.base:
        model = load_sam(args.base, class_names=SYNAPSE_CLASSES, image_size=args.image_size)
    else:
        model = random_model(args.geometry, args.image_size)
    model.save_pretrained(args.work / "sam")
    weights = SamModel.from_pretrained(args.work / "sam").state_dict()
    geometry = model.config.to_dict()
    write_json(args.work / "geometry.json", geometry)
    with torch.device("meta"):
        meta_keys = meta_sam(modeling, geometry).state_dict()
    names = {key: name for name, key in rename_meta_keys({key: key for key in meta_keys}).items()}
    torch.save({key: weights[names[key]] for key in meta_keys}, args.work / "sam.pth")


def write_data(args: argparse.Namespace) -> int:
    """Write phantom training slices, a batch of them, and a scan as NIfTI and as SAMed's .npy.h5 (already scaled)."""
    size = (16, 224, 224) if args.image_size > 64 else (8, 48, 48)
    phantom = write_phantom(args.work / "phantom", cases=(5, 6), seed=0, shape_dhw=size)
    rows = load_synapse(phantom, "train", cache_dir=args.work / "rows", num_proc=1)
    patch = SamConfig.from_pretrained(args.work / "sam").vision_config.patch_size
    slices = TrainingSlices(
        rows, SlicePreparation(args.image_size, 4 * args.image_size // patch, augmentation="samed", seed=0)
    )
    middle = len(rows) // 4
    keys = [(0, middle + i) for i in range(args.batch_size)]
    torch.save(next(batch_loader(slices, [keys], num_workers=0)), args.work / "batch.pth")
    scan = args.scan
    if scan is None:
        shape = {"shape_dhw": tuple(args.scan_shape), "spacing_zyx_mm": (5.0, 0.75, 0.75)}
        folder = write_phantom(args.work / "scans", cases=(1,), seed=0, **shape)
        scan = folder / "Training" / "img" / "img0001.nii.gz"
    volume = read_volume(scan)
    write_volume(Volume(volume.array, volume.affine), args.work / "scan.nii.gz")
    scaled = normalized_array(volume, CT_WINDOW_HU)
    with h5py.File(args.work / "scan.npy.h5", "w") as file:
        file["image"], file["label"] = scaled, np.zeros(scaled.shape, np.uint8)
    first = max(0, (len(scaled) - args.slices) // 2)
    np.save(args.work / "slices.npy", scaled[first : first + args.slices])
    return len(scaled)


def step_gflop(args: argparse.Namespace) -> float:
    """GFLOP of a training step for one image as the plain model computes it, however a subject does.

    Counted on Transformers' `SamModel` with its eager attention and PEFT's LoRA, with the padding of its windows and
    without recomputed layers: products and convolutions of the forward pass, of the gradients that flow through frozen
    layers, and of those of trainable weights. A multiplication and an addition are two.
    """
    with torch.device("meta"):
        model = PlainSam(SamModel(SamConfig.from_pretrained(args.work / "sam", attn_implementation="eager")), args)
        pixels = torch.empty(1, 3, args.image_size, args.image_size)
        with FlopCounterMode(display=False) as counter:
            model(pixels).sum().backward()
    return counter.get_total_flops() / 1e9


def write_inputs(args: argparse.Namespace) -> dict[str, Any]:
    """Write everything that subjects read from WORK; returns an image's FLOP and the number of the scan's slices."""
    torch.manual_seed(0)
    write_sam(args)
    number = write_data(args)
    return {"step_gflop_per_image": round(step_gflop(args), 3), "scan_slices": number}
