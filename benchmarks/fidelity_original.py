"""What the original SAMed computes; fidelity.py runs this in a process of its own, as both have a segment_anything.

    python benchmarks/fidelity_original.py SAMED_DIR WORK GEOMETRY

Reads WORK/inputs.npz, draws a SAM with random weights and adapters of it, and writes base.pth, samed.pth, samed_s.pth
and original.npz to WORK. On a CPU; the original's calls of .cuda() do nothing.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

STEPS, WARMUP, PEAK, HORIZON = 3, 2, 0.005, 100
MODULES = {"samed": "sam_lora_image_encoder", "samed_s": "sam_lora_image_encoder_mask_decoder"}
NO_CHANGE = {"pixel_mean": [0, 0, 0], "pixel_std": [1, 1, 1]}


def base_weights(registry, geometry, path):
    """A SAM at 1024 pixels with three masks, in Meta's format."""
    torch.manual_seed(0)
    sam, _ = registry[geometry](image_size=1024, num_classes=3, checkpoint=None, **NO_CHANGE)
    for name, weight in sam.named_parameters():
        if "pos" in name:
            nn.init.normal_(weight, std=0.02)
    torch.save(sam.state_dict(), path)


def adapted(registry, geometry, variant, work, image_size):
    """The original's LoRA on that SAM, B drawn at random so that it counts."""
    sam, _ = registry[geometry](image_size=image_size, num_classes=8, checkpoint=str(work / "base.pth"), **NO_CHANGE)
    net = __import__(MODULES[variant]).LoRA_Sam(sam, 4)
    lists = ("w_Bs", "self_attn_Bs", "cross_attn_ti_Bs", "cross_attn_it_Bs")
    layers = [layer for name in lists for layer in vars(net).get(name, [])]
    layers += [net.get_submodule(n) for n in ("fa_ti_q_proj_B", "fa_ti_v_proj_B") if variant == "samed_s"]
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.02)
    net.save_lora_parameters(str(work / f"{variant}.pth"))
    return net


def rate(done):
    """The trainer's rule: set after each step from the number of the step just done."""
    if done < 0:
        return PEAK / WARMUP
    if done < WARMUP:
        return PEAK * (done + 1) / WARMUP
    return PEAK * (1 - (done - WARMUP) / HORIZON) ** 0.9


def trajectory(net, images, labels, image_size):
    """Losses of a few steps with the original's loss and optimizer; the net is trained in place."""
    from trainer import calc_loss
    from utils import DiceLoss

    weights = [weight for weight in net.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate(-1), betas=(0.9, 0.999), weight_decay=0.1)
    losses = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate(step - 1)
        parts = calc_loss(net(images, True, image_size), labels, nn.CrossEntropyLoss(), DiceLoss(9))
        optimizer.zero_grad()
        parts[0].backward()
        optimizer.step()
        losses.append([float(part) for part in parts])
    return losses


def main():
    """Compute and save."""
    samed_dir, work, geometry = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    sys.path.insert(0, samed_dir)
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    from segment_anything import sam_model_registry
    from utils import test_single_volume

    given = dict(np.load(work / "inputs.npz"))
    size, images = int(given["image_size"]), torch.from_numpy(given["pixels"])
    labels = torch.from_numpy(given["low_res_labels"])
    base_weights(sam_model_registry, geometry, work / "base.pth")
    results = {}
    for variant in MODULES:
        net = adapted(sam_model_registry, geometry, variant, work, size).eval()
        with torch.no_grad():
            results[f"logits_{variant}"] = net(images, True, size)["low_res_logits"].numpy()
        if variant == "samed":
            volume, reference = (torch.from_numpy(given[name])[None] for name in ("volume", "reference"))
            sizes = {"patch_size": [size, size], "input_size": [224, 224]}
            scores = test_single_volume(volume, reference, net, 8, True, **sizes, test_save_path=str(work), case="case")
            results["scores"] = np.array(scores, dtype=float)
        results[f"losses_{variant}"] = np.array(trajectory(net.train(), images, labels, size))
        net.save_lora_parameters(str(work / f"{variant}_end.pth"))
    np.savez(work / "original.npz", **results)


if __name__ == "__main__":
    main()
