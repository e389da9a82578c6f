"""How much the tiny SAM's pretraining is worth: rank-4 LoRA on the hippocampus from it and from random weights.

    python recipes/pretrain_tiny.py --steps 0 --output_dir runs/random_tiny
    python recipes/pretrain_tiny.py --steps 0 --stock_weights --output_dir runs/stock_random_tiny
    python benchmarks/tiny_base.py --data_dir Task04_Hippocampus --bases tiny-sam runs/random_tiny --steps 110 2000

Task04 is of the Medical Segmentation Decathlon (CC-BY-SA 4.0, arXiv:1902.09063). The first 130 labelled cases adapt,
the last 30 are scored whole, in 3-D; intensities are scaled by each scan's percentiles. With --development the last 30
of the 130 are scored instead and adapt nothing: settings are chosen there. Writes one JSON a run to benchmarks/results.
"""

import argparse
import itertools
import platform
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from samed_peft import SamedConfig, TrainingConfig, add_lora, load_sam, predict_volume, read_volume
from samed_peft.datasets.preprocessing import normalized_array
from samed_peft.io import Volume, read_json, read_labels, write_json
from samed_peft.metrics import score_case, summarise, without_nan
from samed_peft.training.batches import TrainingSlices
from samed_peft.training.loop import build_optimizer, training_steps

CLASSES = ("anterior", "posterior")
NUM_ADAPTED, NUM_SCORED = 130, 30


def load_cases(data_dir: Path) -> list[tuple[Volume, np.ndarray]]:
    """Scans in [0, 1] and labels, (D, H, W) with sagittal slices, which show the organ's long axis."""
    pairs = read_json(data_dir / "dataset.json")["training"]
    cases = []
    for pair in sorted(pairs, key=lambda pair: pair["image"])[: NUM_ADAPTED + NUM_SCORED]:
        scan, labels = read_volume(data_dir / pair["image"]), read_labels(data_dir / pair["label"]).array
        image = normalized_array(scan, None)
        cases.append((Volume(image.transpose(2, 0, 1).copy(), normalized=True), labels.transpose(2, 0, 1).copy()))
    return cases


def drawn_slices(cases: list[tuple[Volume, np.ndarray]], *, number: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Slices without replacement, those without foreground included."""
    places = [(case, index) for case, (scan, _) in enumerate(cases) for index in range(len(scan.array))]
    drawn = np.random.default_rng(seed).permutation(len(places))[:number]
    chosen = [(cases[places[k][0]], places[k][1]) for k in drawn]
    return [{"image": scan.array[index], "label": labels[index]} for (scan, labels), index in chosen]


def adapt(rows: list[dict[str, np.ndarray]], base: str, training: TrainingConfig, rank: int) -> torch.nn.Module:
    """LoRA on slices."""
    config = SamedConfig(base, CLASSES, image_size=64, window=None, rank=rank)
    set_seed(training.seed)
    sam = load_sam(base, class_names=CLASSES, image_size=config.image_size)
    model = add_lora(sam, config)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, weight_decay=training.weight_decay))
    seed = training.seed if training.augment else None
    slices = TrainingSlices(rows, image_size=config.image_size, label_size=sam.logits_size, seed=seed)
    steps = training_steps(prepared, optimizer, slices, training=training, accelerator=accelerator)
    progress = tqdm(steps, total=training.epochs * len(rows) // training.batch_size, desc=base, mininterval=10)
    for step in progress:
        progress.set_postfix(loss=f"{step.loss:.3f}", refresh=False)
    return model


def main() -> None:
    """Adapt and score each base with each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--bases", nargs="+", default=["tiny-sam"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", nargs="+", type=int, default=[300], help="optimizer steps; each budget is a run")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=0.004)
    parser.add_argument("--warmup_steps", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--development", action="store_true", help="do not touch the 30 held-out cases")
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)  # the random weights of Transformers are so small that they would take hours
    cases = load_cases(args.data_dir)
    adapted, scored = cases[:NUM_ADAPTED], cases[NUM_ADAPTED:]
    if args.development:
        adapted, scored = adapted[:-NUM_SCORED], adapted[-NUM_SCORED:]
    available = sum(len(scan.array) for scan, _ in adapted)
    for steps, seed, base in itertools.product(args.steps, args.seeds, args.bases):
        epochs = -(-steps * args.batch_size // available)
        rows = drawn_slices(adapted, number=steps * args.batch_size // epochs, seed=seed)
        training = TrainingConfig(
            learning_rate=args.learning_rate, warmup_steps=args.warmup_steps, epochs=epochs, stop_epoch=epochs,
            batch_size=args.batch_size, num_workers=0, augment=args.augment, seed=seed,
        )  # fmt: skip
        started = time.monotonic()
        model = adapt(rows, base, training, args.rank)
        seconds = time.monotonic() - started
        scores = [
            score_case(predict_volume(model, scan, batch_size=32), labels, num_classes=len(CLASSES))
            for scan, labels in scored
        ]
        summary = summarise(scores, CLASSES)["standard"]
        by_class = {name: round(summary["classes"][name]["dice"], 3) for name in CLASSES}
        dice = f"{summary['mean']['dice']:.3f} {by_class}"
        print(f"{base} seed {seed}, {steps} steps: {dice}, {seconds:.0f} s", flush=True)
        kind = "development" if args.development else "held_out"
        name = f"tiny_base-{Path(base).name}-rate{args.learning_rate:g}-steps{steps}-seed{seed}-{kind}.json"
        write_json(args.results_dir / name, {
            "base": Path(base).name, "seed": seed, "rank": args.rank, "steps": steps, "dice": without_nan(summary),
            "adapted_cases": len(adapted), "scored_cases": len(scored), "scored": kind, "slices": len(rows),
            "training_seconds": round(seconds), "training": training.to_dict(), "date": str(date.today()),
            "machine": platform.machine(), "threads": 2, "torch": torch.__version__,
        })  # fmt: skip


if __name__ == "__main__":
    main()
