"""The original SAMed's side of fidelity.py, which runs it in separate processes: both have a segment_anything.

    python benchmarks/fidelity_original.py SAMED_DIR WORK GEOMETRY compute
    python benchmarks/fidelity_original.py SAMED_DIR WORK GEOMETRY reopen

`compute` reads WORK/inputs.npz, draws a SAM with random weights and adapters of it, and writes base.pth, samed.pth,
samed_s.pth and original.npz to WORK. `reopen` gives the checkpoints that samed_peft exported to SAMed's own loaders,
and one of them to its test.py, and writes reopened.npz. On a CPU; the original's calls of .cuda() do nothing.
"""

import copy
import random
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn

STEPS, PEAK, EPOCHS = 14, 0.005, 8
WARMUPS = (250, 4)  # SAMed's, with which steps are trained, and one whose decay begins within them
MODULES = {"samed": "sam_lora_image_encoder", "samed_s": "sam_lora_image_encoder_mask_decoder"}
NO_CHANGE = {"pixel_mean": [0, 0, 0], "pixel_std": [1, 1, 1]}


def base_weights(registry, geometry, path):
    """Write a SAM at 1024 pixels with three masks in Meta's format; its own constructors set positions to zero."""
    torch.manual_seed(0)
    sam, _ = registry[geometry](image_size=1024, num_classes=3, checkpoint=None, **NO_CHANGE)
    for name, weight in sam.named_parameters():
        if "pos" in name:
            nn.init.normal_(weight, std=0.02)
    torch.save(sam.state_dict(), path)


def fresh(registry, geometry, variant, work, image_size):
    """Add the original's LoRA to that SAM."""
    sam, _ = registry[geometry](image_size=image_size, num_classes=8, checkpoint=str(work / "base.pth"), **NO_CHANGE)
    return __import__(MODULES[variant]).LoRA_Sam(sam, 4)


def adapted(registry, geometry, variant, work, image_size):
    """Add LoRA with random B, which would be zero."""
    net = fresh(registry, geometry, variant, work, image_size)
    lists = ("w_Bs", "self_attn_Bs", "cross_attn_ti_Bs", "cross_attn_it_Bs")
    layers = [layer for name in lists for layer in vars(net).get(name, [])]
    layers += [net.get_submodule(n) for n in ("fa_ti_q_proj_B", "fa_ti_v_proj_B") if variant == "samed_s"]
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.02)
    net.save_lora_parameters(str(work / f"{variant}.pth"))
    return net


def in_float64(net):
    """Copy a net to double precision, to measure the error of float32."""
    exact = copy.deepcopy(net).double()
    exact.sam.prompt_encoder.pe_layer.float()  # its coordinates are float32
    exact.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(), *inputs[1:]))
    return exact


class Stub(nn.Module):
    """A model without cost, for the trainer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 9, 1, 1))

    def forward(self, images, *_):
        """Return the same logits for any image."""
        logits = self.weight.expand(len(images), -1, 8, 8)
        return {"low_res_logits": logits, "masks": logits}

    def save_lora_parameters(self, path):
        """Do nothing; the trainer calls it at the end."""


def rates(work, warmup):
    """Record the learning rate at each step of SAMed's own `trainer_synapse`."""
    import trainer

    found, folder = [], work / f"rates_{warmup}"
    folder.mkdir()
    for step in range(STEPS):
        np.savez(folder / f"{step}.npz", image=np.zeros((8, 8)), label=np.zeros((8, 8)))
    (folder / "train.txt").write_text("".join(f"{step}\n" for step in range(STEPS)))

    class Recording(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            found.append(self.param_groups[0]["lr"])
            return super().step(*args, **kwargs)

    trainer.optim = types.SimpleNamespace(AdamW=Recording)
    args = {"base_lr": PEAK, "num_classes": 8, "batch_size": 1, "n_gpu": 1, "root_path": str(folder), "AdamW": True}
    args |= {"list_dir": str(folder), "img_size": 8, "warmup": True, "warmup_period": warmup, "max_epochs": EPOCHS}
    args |= {"stop_epoch": 1, "dice_param": 0.8, "seed": 0}
    trainer.trainer_synapse(types.SimpleNamespace(**args), Stub(), str(folder), True, 8)
    return found


def augmented(images, labels, image_size):
    """Augment slices with SAMed's `RandomGenerator`: pixels, low-resolution labels, and the random draws used."""
    from datasets.dataset_synapse import RandomGenerator

    draws, made = [], []
    uniform, integer = random.random, np.random.randint

    def note(value):
        draws[-1].append(float(value))
        return value

    random.seed(0), np.random.seed(0)  # noqa: NPY002 - the original draws from the global state
    random.random, np.random.randint = lambda: note(uniform()), lambda *ends: note(integer(*ends))
    transform = RandomGenerator([image_size, image_size], [image_size // 4, image_size // 4])
    for image, label in zip(images, labels, strict=True):
        draws.append([])
        made.append(transform({"image": image, "label": label}))
    random.random, np.random.randint = uniform, integer
    padded = np.array([drawn + [np.nan] * (4 - len(drawn)) for drawn in draws])
    pixels, targets = (torch.stack([sample[name] for sample in made]) for name in ("image", "low_res_label"))
    return pixels, targets, padded


def trajectory(net, pixels, labels, image_size, rates):
    """Train a net in place, two slices a step, with the original's loss and optimizer; returns the losses."""
    from trainer import calc_loss
    from utils import DiceLoss

    weights = [weight for weight in net.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rates[0], betas=(0.9, 0.999), weight_decay=0.1)
    losses = []
    for images, targets, rate in zip(pixels.split(2), labels.split(2), rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        parts = calc_loss(net(images, True, image_size), targets, nn.CrossEntropyLoss(), DiceLoss(9))
        optimizer.zero_grad()
        parts[0].backward()
        optimizer.step()
        losses.append([float(part) for part in parts])
    return losses


def compute(work, geometry, given):
    """Compute everything that needs no adapter from this package."""
    from segment_anything import sam_model_registry
    from utils import calculate_metric_percase, test_single_volume

    size, images = int(given["image_size"]), torch.from_numpy(given["pixels"])
    base_weights(sam_model_registry, geometry, work / "base.pth")
    results = {"rates": np.array([rates(work, warmup) for warmup in WARMUPS])}
    pixels, labels, results["draws"] = augmented(given["train_images"], given["train_labels"], size)
    results |= {"train_pixels": pixels[:, 0].numpy(), "train_targets": labels.numpy()}
    pairs = zip(given["mask_pairs"][:, 0], given["mask_pairs"][:, 1], strict=True)
    results["pair_scores"] = np.array([calculate_metric_percase(p.copy(), r.copy()) for p, r in pairs], dtype=float)
    for variant in MODULES:
        net = adapted(sam_model_registry, geometry, variant, work, size).eval()
        with torch.no_grad():
            results[f"logits_{variant}"] = net(images, True, size)["low_res_logits"].numpy()
        if variant == "samed":
            volume, reference = (torch.from_numpy(given[name])[None] for name in ("volume", "reference"))
            sizes = {"patch_size": [size, size], "input_size": [224, 224]}
            scores = test_single_volume(volume, reference, net, 8, True, **sizes, test_save_path=str(work), case="case")
            results["scores"] = np.array(scores, dtype=float)
        exact = in_float64(net)
        with torch.no_grad():
            results[f"exact_logits_{variant}"] = exact(images, True, size)["low_res_logits"].numpy()
        if variant == "samed":
            test_single_volume(volume, reference, exact, 8, True, **sizes, test_save_path=str(work), case="exact")
        del exact
        results[f"losses_{variant}"] = np.array(trajectory(net.train(), pixels, labels, size, results["rates"][0]))
        net.save_lora_parameters(str(work / f"{variant}_end.pth"))
    np.savez(work / "original.npz", **results)


def reopen(work, geometry, given):
    """Open checkpoints with the original that were converted and exported again."""
    import utils
    from segment_anything import sam_model_registry

    size, results, scores = int(given["image_size"]), {}, []
    for variant in MODULES:
        net = fresh(sam_model_registry, geometry, variant, work, size).eval()
        net.load_lora_parameters(str(work / f"{variant}_back.pth"))
        with torch.no_grad():
            images = torch.from_numpy(given["pixels"])
            results[f"logits_{variant}"] = net(images, True, size)["low_res_logits"].numpy()
    single = utils.test_single_volume
    utils.test_single_volume = lambda *args, **kwargs: scores.append(single(*args, **kwargs)) or scores[-1]
    (work / "test_vol.txt").write_text(f"{given['case']}\n")
    options = {"volume_path": work / "processed" / "test_vol_h5", "list_dir": work, "output_dir": work / "test_py"}
    options |= {"img_size": size, "ckpt": work / "base.pth", "lora_ckpt": work / "samed_back.pth", "vit_name": geometry}
    sys.argv = ["test.py", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
    runpy.run_path(str(Path(sys.path[0]) / "test.py"), run_name="__main__")
    np.savez(work / "reopened.npz", scores=np.array(scores[0], dtype=float), **results)


def main():
    """Run one of the two parts."""
    samed_dir, work, geometry, part = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    sys.path.insert(0, samed_dir)
    torch.Tensor.cuda = nn.Module.cuda = lambda this, *_, **__: this
    {"compute": compute, "reopen": reopen}[part](work, geometry, dict(np.load(work / "inputs.npz")))


if __name__ == "__main__":
    main()
