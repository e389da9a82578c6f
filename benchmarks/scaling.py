"""How time and memory of training, prediction and data preparation grow with size, batch, slices and cases.

    python benchmarks/scaling.py                        # the tiny SAM, five minutes on two cores
    python benchmarks/scaling.py --geometry vit_b       # a real SAM, far longer

Every point is measured in its own process, which gives clean peaks of memory, counted once model and input are ready. A
line is fitted to each curve: R² near 1 means a fixed part plus a part for each unit. "Unit cost" is the cost of a unit
at the largest point over that at the smallest: 1 is proportional, less has a fixed part that larger inputs share, more
grows faster than its input. Prints Markdown; writes one JSON and one plot to benchmarks/results. Memory is read from
/proc, so this runs on Linux.
"""

import argparse
import copy
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from accelerate import Accelerator
from measure import DEVICE, DTYPES, Action
from peft import PeftModel
from scipy.stats import linregress
from throughput_inputs import NUM_LABELS, random_model

from samed_peft import SamedConfig, Volume, add_lora, predict_volume
from samed_peft.config import SYNAPSE_CLASSES
from samed_peft.datasets import load_synapse, write_phantom
from samed_peft.datasets.phantom import phantom_case
from samed_peft.evaluation.tables import markdown_table
from samed_peft.io import write_json
from samed_peft.models.precision import cast_frozen_weights
from samed_peft.prediction import PredictionOptions, Scan, predict_files
from samed_peft.training import build_optimizer, train_step


def adapted(args: argparse.Namespace) -> tuple[PeftModel, Accelerator]:
    """Add LoRA to a SAM with random weights, its frozen ones cast for the accelerator's precision."""
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=DEVICE.type == "cpu")
    sam = random_model(args.geometry, args.image_size)
    model = add_lora(sam, SamedConfig("random", SYNAPSE_CLASSES, image_size=args.image_size))
    cast_frozen_weights(model, DTYPES[args.mixed_precision])
    return model.to(DEVICE), accelerator


def step(args: argparse.Namespace) -> Action:
    """Prepare a training step of `batch_size` images at `image_size`."""
    model, accelerator = adapted(args)
    side = model.logits_size
    model, optimizer = accelerator.prepare(model, build_optimizer(model, weight_decay=0.1))
    batch = {
        "pixel_values": torch.rand(args.batch_size, 1, args.image_size, args.image_size).expand(-1, 3, -1, -1),
        "labels": torch.randint(NUM_LABELS, (args.batch_size, side, side)),
    }

    def run() -> object:
        moved = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
        return train_step(model, [moved], optimizer, accelerator=accelerator, learning_rate=1e-4)

    return run


def slices(args: argparse.Namespace) -> Action:
    """Prepare the prediction of a volume of `slices` slices in memory."""
    model, accelerator = adapted(args)
    image, _ = phantom_case(1, seed=0, shape_dhw=(5, *args.plane))
    volume = Volume(np.resize(image, (args.slices, *args.plane)))

    def predict() -> None:
        with accelerator.autocast():
            predict_volume(model, volume)

    return predict


def preparation(args: argparse.Namespace) -> Action:
    """Prepare the reading of training rows of `cases` scan files by one process."""
    numbers = range(1, args.cases + 1)
    folder = write_phantom(args.work / "training", cases=numbers, seed=0, shape_dhw=(args.slices, *args.plane))
    caches = (args.work / "rows" / f"{args.cases}-{number}" for number in range(100))
    options = {"cases": list(numbers), "num_proc": 1}
    return lambda: sum(row["label"].size for row in load_synapse(folder, "train", cache_dir=next(caches), **options))


def scans(args: argparse.Namespace) -> Action:
    """Prepare the prediction of `cases` scans, file to file."""
    model, accelerator = adapted(args)
    numbers = range(1, args.cases + 1)
    folder = write_phantom(args.work / "scans", cases=numbers, seed=0, shape_dhw=(args.slices, *args.plane))
    images = sorted((folder / "Training" / "img").iterdir())
    listed = [Scan(image.name[:7], image, args.work / "masks" / image.name) for image in images]

    def predict() -> None:
        outcome = predict_files(model, listed, options=PredictionOptions(overwrite=True), accelerator=accelerator)
        assert len(outcome.written) == len(listed), outcome.failed

    return predict


@dataclass(frozen=True)
class Curve:
    """One quantity that is varied."""

    make: Callable[[argparse.Namespace], Action]  # prepares the action that is timed
    varied: str  # name of the option that has one of `values`
    unit: str  # unit that time and memory are divided by
    values: Sequence[int]
    why: str  # expected growth, and its cause

    def units(self, value: int, args: argparse.Namespace) -> int:
        """Number of units at a value of the option."""
        if self.varied == "image_size":
            return (value // args.patch_size) ** 2
        return value * args.slices if self.make is preparation else value


def curves(args: argparse.Namespace) -> dict[str, Curve]:
    """All curves by their names in the results."""
    sizes = ("image_size", "tokens", args.image_sizes)
    per_token = "windows, layers and decoder take the same for each token; global attention grows with their square"
    shared = "the optimizer and Python's part are shared by the batch"
    batches = "slices pass in batches of 8; only scan and mask stay in memory"
    rows = "one scan at a time; rows go to disk and are memory-mapped"
    files = "one scan at a time; the model is loaded once"
    return {
        "training step, by image size": Curve(step, *sizes, per_token),
        f"prediction of {args.slices} slices, by image size": Curve(slices, *sizes, per_token),
        "training step, by batch": Curve(step, "batch_size", "images", args.batch_sizes, shared),
        "prediction, by slices": Curve(slices, "slices", "slices", args.volumes, batches),
        "data preparation, by training slices": Curve(preparation, "cases", "slices", args.case_numbers, rows),
        "prediction, by scans": Curve(scans, "cases", "scans", args.case_numbers, files),
    }


def point(task: tuple[Callable[[argparse.Namespace], Action], argparse.Namespace]) -> dict[str, float]:
    """Measure an action's median seconds, and the peak memory of its process while it runs."""
    make, args = task
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as work:
        args.work = Path(work)
        action = make(args)
        measure.reset_peak()
        for _ in range(args.warmup):
            action()
        seconds = [measure.seconds_of(action)[0] for _ in range(args.repeats)]
    gpu = measure.peak_gpu_gb()
    return {"seconds": statistics.median(seconds), "gb": measure.peak_resident_gb() if gpu is None else gpu}


def fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Least-squares line, its R², and unit cost at the last point over that at the first."""
    line, cost = linregress(x, y), (y[-1] / x[-1]) / (y[0] / x[0])
    r_squared = line.rvalue**2 if np.ptp(y) else 1.0
    found = {"fixed": line.intercept, "per_unit": line.slope, "r_squared": r_squared, "unit_cost": cost}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def run(curve: Curve, args: argparse.Namespace) -> dict[str, Any]:
    """Measure all points of a curve and fit its lines."""
    points = []
    for value in curve.values:
        options = copy.copy(args)
        vars(options)[curve.varied] = value
        found = measure.in_own_process(point, (curve.make, options), forked=args.quick)
        points.append({curve.varied: value, curve.unit: curve.units(value, args)} | found)
        name = f"{curve.make.__name__}, {curve.varied} {value}"
        print(f"{name}: {found['seconds']:.3f} s, {found['gb']:.2f} GB", flush=True)
    x = [one[curve.unit] for one in points]
    lines = {name: fit(x, [one[name] for one in points]) for name in ("seconds", "gb")}
    return {"unit": curve.unit, "points": points, "lines": lines}


def verdict(line: dict[str, float]) -> str:
    """Put the unit cost into words."""
    cost = line["unit_cost"]
    if abs(cost - 1) <= 0.1:
        return "proportional"
    return "less than proportional" if cost < 1 else "more than proportional"


def table(found: dict[str, Any], why: dict[str, str]) -> str:
    """Format all curves as Markdown."""
    rows = []
    for name, one in found.items():
        for quantity, unit, end in (("seconds", "s", f"; expected: {why[name]}"), ("gb", "GB", "")):
            line, ends = one["lines"][quantity], (one["points"][0], one["points"][-1])
            points = ", ".join(f"{at[quantity]:.3g} {unit} at {at[one['unit']]}" for at in ends)
            fitted = f"{line['fixed']:.2g} + {line['per_unit']:.2g} {unit} each"
            numbers = [points, fitted, f"{line['r_squared']:.3f}", f"{line['unit_cost']:.2f}"]
            rows.append([name if end else "", one["unit"], *numbers, verdict(line) + end])
    head = ["curve", "unit", "first and last point", "line", "R²", "unit cost", "explanation"]
    return markdown_table(head, rows)


def plot(found: dict[str, Any], title: str, path: str) -> None:
    """Plot measured points and fitted lines, time above, memory below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(found), 7), layout="constrained")
    axes = figure.subplots(2, len(found), squeeze=False)
    for column, (name, one) in enumerate(found.items()):
        x = np.array([point[one["unit"]] for point in one["points"]])
        for row, (quantity, label) in enumerate((("seconds", "seconds"), ("gb", "peak memory, GB"))):
            line, axis = one["lines"][quantity], axes[row, column]
            axis.plot(x, line["fixed"] + line["per_unit"] * x, color="0.6", zorder=1)
            axis.scatter(x, [point[quantity] for point in one["points"]], zorder=2)
            highest = max(point[quantity] for point in one["points"])
            axis.set(xlabel=one["unit"], ylabel=label, xlim=(0, 1.05 * x[-1]), ylim=(0, 1.2 * highest))
            axis.text(0.05, 0.93, f"R² {line['r_squared']:.3f}", transform=axis.transAxes, va="top")
        axes[0, column].set_title(name, fontsize=10)
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def parse() -> argparse.Namespace:
    """Options, with those that were left out filled in for the geometry."""
    parser = measure.options_parser(__doc__)
    add = parser.add_argument
    add("--geometry", choices=["vit_b", "vit_l", "vit_h", "tiny"], default="tiny", help="weights are random")
    add("--image_sizes", type=int, nargs="+", help="default: 256 512 1024, or for tiny 128 256 512: as many tokens")
    add("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    add("--volumes", type=int, nargs="+", default=[5, 10, 20, 40, 80], help="numbers of slices")
    add("--case_numbers", type=int, nargs="+", default=[1, 2, 4, 8])
    add("--image_size", type=int, help="of the other curves; default: 512, or 256 for tiny")
    add("--slices", type=int, default=8, help="of a scan in the other curves")
    add("--plane", type=int, nargs=2, default=[512, 512], help="rows and columns of a slice")
    add("--mixed_precision", choices=list(DTYPES), default="no")
    add("--threads", type=int, default=2)
    add("--warmup", type=int, default=1)
    add("--repeats", type=int, default=3)
    add("--quick", action="store_true", help="the smallest sizes, in forked processes: to see that it works")
    add("--name", help="end of the results' file names; the geometry if not given")
    args = parser.parse_args()
    tiny = args.geometry == "tiny"
    args.patch_size, args.batch_size, args.cases = 8 if tiny else 16, 1, 1
    if args.quick:
        small = {"image_sizes": [64, 128], "batch_sizes": [1, 2], "volumes": [2, 4], "case_numbers": [1, 2]}
        vars(args).update(small, image_size=64, slices=2, plane=[48, 48], repeats=1)
    args.image_sizes = args.image_sizes or ([128, 256, 512] if tiny else [256, 512, 1024])
    args.image_size = args.image_size or (256 if tiny else 512)
    return args


def main() -> None:
    args = parse()
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    measure.processes(args.quick, preload=["throughput_inputs", "torch._dynamo"])
    hidden = ("name", "results_dir", "batch_size", "cases")
    settings = {name: value for name, value in vars(args).items() if name not in hidden}
    result = measure.facts()
    measured = curves(args)
    found = {name: run(curve, args) for name, curve in measured.items()}
    print("\n" + table(found, {name: curve.why for name, curve in measured.items()}))
    path = args.results_dir / f"scaling-{result['date']}-{args.name or args.geometry}"
    write_json(f"{path}.json", result | {"settings": settings, "curves": found})
    plot(found, f"{args.geometry}, {args.mixed_precision} mixed precision", f"{path}.png")


if __name__ == "__main__":
    main()
