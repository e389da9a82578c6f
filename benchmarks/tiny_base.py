"""How much the tiny SAM's pretraining is worth: rank-4 LoRA on the hippocampus from it and from random weights.

    python recipes/pretrain_tiny.py --steps 0 --output_dir runs/random_tiny
    python recipes/pretrain_tiny.py --steps 0 --stock_weights --output_dir runs/stock_random_tiny
    python benchmarks/tiny_base.py --data_dir Task04_Hippocampus --bases tiny-sam runs/random_tiny --steps 110 2000

Task04 is from the Medical Segmentation Decathlon (CC-BY-SA 4.0, arXiv:1902.09063). The first 130 labelled cases adapt,
the last 30 are scored whole, in 3-D; intensities are scaled by each scan's percentiles. With --development the last 30
of the 130 are scored instead and do not adapt, to choose options by. Writes one JSON a run to benchmarks/results.
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from measure import facts, options_parser
from tqdm import tqdm

from samed_peft import SamedConfig, TrainingConfig, add_lora, load_sam, predict_volume, read_volume
from samed_peft.datasets.preprocessing import normalized_array
from samed_peft.errors import printable
from samed_peft.io import Volume, read_json, read_labels, write_json
from samed_peft.metrics import score_case, summarise, without_nan
from samed_peft.training.batches import training_slices
from samed_peft.training.loop import build_optimizer, training_steps

Case = tuple[Volume, np.ndarray]
Rows = list[dict[str, np.ndarray]]
CLASSES = ("anterior", "posterior")
NUM_ADAPTED, NUM_SCORED = 130, 30


def load_cases(data_dir: Path) -> list[Case]:
    """Read scans in [0, 1] and labels, (D, H, W) with sagittal slices, which show the organ's long axis."""
    pairs = read_json(data_dir / "dataset.json")["training"]
    cases = []
    for pair in sorted(pairs, key=lambda pair: pair["image"])[: NUM_ADAPTED + NUM_SCORED]:
        scan, labels = read_volume(data_dir / pair["image"]), read_labels(data_dir / pair["label"]).array
        image = normalized_array(scan, None)
        cases.append((Volume(image.transpose(2, 0, 1).copy(), normalized=True), labels.transpose(2, 0, 1).copy()))
    return cases


def drawn_slices(cases: list[Case], *, number: int, seed: int) -> Rows:
    """Draw slices without replacement, including those without foreground."""
    slices = [pair for scan, labels in cases for pair in zip(scan.array, labels, strict=True)]
    drawn = np.random.default_rng(seed).permutation(len(slices))[:number]
    return [dict(zip(("image", "label"), slices[k], strict=True)) for k in drawn]


def adapt(rows: Rows, base: str, training: TrainingConfig, rank: int) -> torch.nn.Module:
    """Train LoRA on slices."""
    config = SamedConfig(base, CLASSES, image_size=64, window=None, rank=rank)
    set_seed(training.seed)
    sam = load_sam(base, class_names=CLASSES, image_size=config.image_size)
    model = add_lora(sam, config)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, weight_decay=training.weight_decay))
    slices = training_slices(rows, config, training, label_size=sam.logits_size)
    steps = training_steps(prepared, optimizer, slices, training=training, accelerator=accelerator)
    progress = tqdm(
        steps, total=training.epochs * len(rows) // training.batch_size, desc=printable(base), mininterval=10
    )
    for step in progress:
        progress.set_postfix(loss=f"{step.loss:.3f}", refresh=False)
    return model


def run(cases: tuple[list[Case], list[Case]], args: argparse.Namespace, steps: int, seed: int, base: str) -> None:
    """Adapt a base to the first cases with a budget and a seed, score the second ones, write the result."""
    adapted, scored = cases
    epochs = -(-steps * args.batch_size // sum(len(scan.array) for scan, _ in adapted))
    rows = drawn_slices(adapted, number=steps * args.batch_size // epochs, seed=seed)
    training = TrainingConfig(
        learning_rate=args.learning_rate, warmup_steps=args.warmup_steps, epochs=epochs, stop_epoch=epochs,
        batch_size=args.batch_size, num_workers=0, augment=args.augment, seed=seed,
    )  # fmt: skip
    started = time.monotonic()
    model = adapt(rows, base, training, args.rank)
    seconds = round(time.monotonic() - started)
    masks = (predict_volume(model, scan, batch_size=32) for scan, _ in scored)
    scores = [
        score_case(mask, labels, num_classes=len(CLASSES)) for mask, (_, labels) in zip(masks, scored, strict=True)
    ]
    summary = summarise(scores, CLASSES)["standard"]
    by_class = {name: round(summary["classes"][name]["dice"], 3) for name in CLASSES}
    print(
        f"{printable(base)} seed {seed}, {steps} steps: {summary['mean']['dice']:.3f} {by_class}, {seconds} s",
        flush=True,
    )
    kind = "development" if args.development else "held_out"
    name = f"tiny_base-{Path(base).name}-rate{args.learning_rate:g}-steps{steps}-seed{seed}-{kind}.json"
    write_json(args.results_dir / name, {
        "base": Path(base).name, "seed": seed, "rank": args.rank, "steps": steps, "dice": without_nan(summary),
        "adapted_cases": len(adapted), "scored_cases": len(scored), "scored": kind, "slices": len(rows),
        "training_seconds": seconds, "training": training.to_dict(), "threads": 2, **facts(),
    })  # fmt: skip


def main() -> None:
    parser = options_parser(__doc__)
    add = parser.add_argument
    add("--data_dir", type=Path, required=True)
    add("--bases", nargs="+", default=["tiny-sam"])
    add("--seeds", nargs="+", type=int, default=[0])
    add("--steps", nargs="+", type=int, default=[300], help="optimizer steps; each budget is a run")
    add("--rank", type=int, default=4)
    add("--learning_rate", type=float, default=0.004)
    add("--warmup_steps", type=int, default=50)
    add("--batch_size", type=int, default=32)
    add("--augment", action=argparse.BooleanOptionalAction, default=False)
    add("--development", action="store_true", help="do not touch the 30 held-out cases")
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)  # Transformers' initial weights are so small that they would take hours
    cases = load_cases(args.data_dir)
    adapted, scored = cases[:NUM_ADAPTED], cases[NUM_ADAPTED:]
    if args.development:
        adapted, scored = adapted[:-NUM_SCORED], adapted[-NUM_SCORED:]
    for steps, seed, base in itertools.product(args.steps, args.seeds, args.bases):
        run((adapted, scored), args, steps, seed, base)


if __name__ == "__main__":
    main()
