"""Time of everything around the network, beside the original SAMed: training slices, and resizing when predicting.

    python benchmarks/loader.py --samed_dir SAMed --threads 2

SAMED_DIR is a checkout of https://github.com/hitachinsk/SAMed; its loader imports icecream and einops. Both sides load
the same artificial slices from files of their own, batch by batch in turn, in one process without workers. The
augmentation is random on both sides, so each figure is a mean over its mix. About two minutes on two cores. Writes one
JSON to benchmarks/results and prints Markdown tables.
"""

import importlib.util
import os
import random
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Action, facts, options_parser, seconds_of
from scipy import ndimage
from torch.nn import functional as F
from torch.utils.data import default_collate

from samed_peft.datasets import load_synapse
from samed_peft.evaluation.tables import markdown_table
from samed_peft.io import write_json
from samed_peft.prediction.slices import resize_on_device, upsampled_argmax
from samed_peft.training.batches import SlicePreparation, TrainingSlices, batch_loader

IMAGE_SIZE, LABEL_SIZE, BOTTLENECK, CLASSES = 512, 128, 224, 9


def original_loader(samed_dir: Path) -> Any:
    """The module of SAMed's loader, under a name that does not hide Hugging Face's `datasets`."""
    spec = importlib.util.spec_from_file_location("samed_loader", samed_dir / "datasets" / "dataset_synapse.py")
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # SciPy has moved what it imports
        spec.loader.exec_module(module)
    return module


def smooth_slices(count: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Slices with black surroundings and nine labels, as SAMed's preprocessing stores them: all float32."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        coarse = ndimage.zoom(rng.normal(size=(8, 8)), size / 8, order=1) + rng.normal(0, 0.05, (size, size))
        image = np.clip(coarse, 0, 1).astype(np.float32)
        yield image, np.clip(np.floor(8 * coarse), 0, 8).astype(np.float32)


def alternating(theirs: Action, ours: Action, *, slices: int, rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median milliseconds a slice of each side, one call of each in turn.

    Loading warms up for longer: the weights for an angle of rotation are computed once a process.
    """
    sides = {"original": theirs, "samed_peft": ours}
    for call in sides.values():
        for _ in range(warmup):
            call()
    turns = [{name: seconds_of(call)[0] for name, call in sides.items()} for _ in range(rounds)]
    return {name: round(1e3 * statistics.median(turn[name] for turn in turns) / slices, 3) for name in sides}


def training_slices(original: Any, size: int, *, batch_size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds a slice: loaded, augmented and resized; and put together as a batch as well."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "train_npz").mkdir()
        names = [f"case0005_slice{index:03d}" for index in range(batch_size)]
        for file, (image, label) in zip(names, smooth_slices(batch_size, size), strict=True):
            np.savez(folder / "train_npz" / file, label=label, image=image)
        (folder / "train.txt").write_text("".join(f"{file}\n" for file in names))
        transform = original.RandomGenerator([IMAGE_SIZE, IMAGE_SIZE], [LABEL_SIZE, LABEL_SIZE])
        theirs = original.Synapse_dataset(str(folder / "train_npz"), name, "train", transform)
        rows = load_synapse(folder, "train", cases=[5], cache_dir=folder / "cache")
        ours = TrainingSlices(rows, SlicePreparation(IMAGE_SIZE, LABEL_SIZE, augmentation="samed", seed=0))
        epochs = iter(range(1_000_000))  # another one, another augmentation

        def their_slices() -> list[dict[str, Any]]:
            return [theirs[index] for index in range(batch_size)]

        def our_slices() -> list[dict[str, torch.Tensor]]:
            epoch = next(epochs)
            return [ours[epoch, index] for index in range(batch_size)]

        def our_batch() -> object:
            epoch = next(epochs)
            return next(batch_loader(ours, [[(epoch, index) for index in range(batch_size)]], num_workers=0))

        step, numbers = f"training slice of {size} x {size}", {"slices": batch_size, "rounds": rounds}
        return {
            step: alternating(their_slices, our_slices, **numbers, warmup=8),
            f"{step}, in a batch": alternating(lambda: default_collate(their_slices()), our_batch, **numbers),
        }


def volume_steps(*, slices: int, batch_size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds a slice of 512 x 512 before and after the network, as SAMed's test does it and as we do."""
    volume = np.stack([image for image, _ in smooth_slices(slices, IMAGE_SIZE)])
    logits = torch.randn(slices, CLASSES, LABEL_SIZE, LABEL_SIZE, generator=torch.Generator().manual_seed(0))
    down = BOTTLENECK / IMAGE_SIZE

    def their_pixels() -> list[np.ndarray]:
        return [ndimage.zoom(ndimage.zoom(one, down, order=3), 1 / down, order=3) for one in volume]

    def our_pixels() -> list[torch.Tensor]:
        batches = torch.from_numpy(volume)[:, None].split(batch_size)
        return [resize_on_device(batch, (BOTTLENECK, IMAGE_SIZE)) for batch in batches]

    def their_labels() -> list[torch.Tensor]:
        resized = (F.interpolate(one, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear") for one in logits.split(1))
        return [torch.argmax(torch.softmax(one, dim=1), dim=1) for one in resized]

    def our_labels() -> list[torch.Tensor]:
        return [upsampled_argmax(batch, IMAGE_SIZE) for batch in logits.split(batch_size)]

    apart = np.abs(np.stack(their_pixels()) - torch.cat(our_pixels())[:, 0].numpy()).max()
    pixels = alternating(their_pixels, our_pixels, slices=slices, rounds=rounds)
    labels = alternating(their_labels, our_labels, slices=slices, rounds=rounds)
    return {"slice to pixels": pixels | {"largest_difference": float(apart)}, "logits to labels": labels}


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--samed_dir", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    random.seed(0), np.random.seed(0)  # noqa: NPY002 - the original draws from the global state
    settings = {"threads": args.threads, "batch_size": args.batch_size, "rounds": args.rounds}
    result = facts() | {"settings": settings}
    original = original_loader(args.samed_dir)
    figures: dict[str, dict[str, float]] = {}
    for size in (512, 224):
        figures |= training_slices(original, size, batch_size=args.batch_size, rounds=args.rounds)
    figures |= volume_steps(slices=20, batch_size=8, rounds=max(args.rounds // 3, 3))
    for row in figures.values():
        row["times_as_fast"] = round(row["original"] / row["samed_peft"], 1)
    result["machine"]["load_after"] = round(os.getloadavg()[0], 2)
    write_json(args.results_dir / f"loader-{result['date']}.json", result | {"steps": figures})
    head = ("step", "original, ms a slice", "samed_peft, ms a slice", "times as fast")
    lines = [
        (name, f"{row['original']:.2f}", f"{row['samed_peft']:.2f}", str(row["times_as_fast"]))
        for name, row in figures.items()
    ]
    print(markdown_table(head, lines))


if __name__ == "__main__":
    main()
