"""Time and memory of a training step, with this package's attention and with the two of Transformers.

    python benchmarks/throughput.py --geometry vit_b --threads 2

Random weights: they cost the same as trained ones and need no download. Each attention runs in a process of its own, so
that peak memory, which counts creating the model too, is its own. About three minutes for ViT-B on two cores. Writes
one JSON to benchmarks/results. Memory is read from /proc, so this runs on Linux.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import SamConfig, SamModel
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionSdpaAttention

from samed_peft import SamedConfig, add_lora
from samed_peft.config import SYNAPSE_CLASSES
from samed_peft.io import write_json
from samed_peft.modeling import TINY_SAM_DIR, SamForSemanticSegmentation
from samed_peft.training import build_optimizer, train_step

GEOMETRIES = {
    "vit_b": {},
    "vit_l": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
              "global_attn_indexes": [5, 11, 17, 23]},
    "vit_h": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16,
              "global_attn_indexes": [7, 15, 23, 31]},
}  # fmt: skip
ATTENTIONS = {
    "samed_peft": None,
    "transformers-sdpa": SamVisionSdpaAttention,  # the bias of N x N numbers a head is a mask of the fused kernel
    "transformers-eager": SamVisionAttention,  # bias and attention weights of N x N numbers a head
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def split_attention(kind: type[SamVisionAttention], config: Any, window_size: int) -> SamVisionAttention:
    """An attention of Transformers with the three projections that LoRA adapts in this package."""
    attention = kind(config, window_size)
    del attention.qkv
    for name in PROJECTIONS:
        attention.add_module(name, nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias))
    attention.qkv = lambda hidden: torch.cat([attention.get_submodule(name)(hidden) for name in PROJECTIONS], dim=-1)
    return attention


def random_sam(geometry: str, image_size: int, attention: str) -> SamForSemanticSegmentation:
    """A SAM whose weights have an ordinary scale: those of Transformers, near 1e-10, underflow."""
    config = (
        SamConfig.from_pretrained(TINY_SAM_DIR) if geometry == "tiny" else SamConfig(vision_config=GEOMETRIES[geometry])
    )
    num_labels = len(SYNAPSE_CLASSES) + 1
    model = SamForSemanticSegmentation.from_sam(SamModel(config), num_labels=num_labels, image_size=image_size)
    vision = model.config.vision_config
    if kind := ATTENTIONS[attention]:
        for index, layer in enumerate(model.vision_encoder.layers):
            window_size = 0 if index in vision.global_attn_indexes else vision.window_size
            layer.attn = split_attention(kind, vision, window_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "encoder" in name:
                nn.init.trunc_normal_(parameter, std=0.02)
    return model


def measure(attention: str, args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step and peak memory of the process."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    sam = random_sam(args.geometry, args.image_size, attention)
    if args.gradient_checkpointing:
        sam.activation_checkpointing_enable()
    model = add_lora(sam, SamedConfig("random", SYNAPSE_CLASSES, image_size=args.image_size))
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, weight_decay=0.1))
    batch = {
        "pixel_values": torch.rand(args.batch_size, 1, args.image_size, args.image_size).expand(-1, 3, -1, -1),
        "labels": torch.randint(len(SYNAPSE_CLASSES) + 1, (args.batch_size, sam.logits_size, sam.logits_size)),
    }
    seconds = []
    for _ in range(args.warmup + args.steps):
        started = time.perf_counter()
        train_step(prepared, [batch], optimizer, accelerator=accelerator, learning_rate=1e-4)
        seconds.append(time.perf_counter() - started)
    peak_kib = next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    )
    on_gpu = accelerator.device.type == "cuda"
    return {
        "seconds": round(statistics.median(seconds[args.warmup :]), 4),
        "fastest_seconds": round(min(seconds[args.warmup :]), 4),
        "peak_resident_gb": round(peak_kib * 1024 / 1e9, 3),
        "peak_gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if on_gpu else None,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    cpu = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": cpu[0] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    """Measure each attention and write the figures side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=[*GEOMETRIES, "tiny"], default="vit_b")
    parser.add_argument("--attention", nargs="+", choices=list(ATTENTIONS), default=list(ATTENTIONS))
    parser.add_argument("--image_size", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--name", help="end of the result's file name; the geometry if not given")
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    result = {"date": str(date.today()), "machine": machine(), "attention": {}}
    result["settings"] = {k: v for k, v in vars(args).items() if k not in ("attention", "name", "results_dir")}
    fresh_processes = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}
    with ProcessPoolExecutor(max_workers=1, **fresh_processes) as pool:
        for attention in args.attention:
            figures = result["attention"][attention] = pool.submit(measure, attention, args).result()
            print(f"{attention}: {figures['seconds']} s a step, at most {figures['peak_resident_gb']} GB resident")
    write_json(args.results_dir / f"throughput-{date.today()}-{args.name or args.geometry}.json", result)


if __name__ == "__main__":
    main()
