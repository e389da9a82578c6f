"""Does this package compute the same as the original SAMed? Both run side by side, on the same weights and scans.

    git clone https://github.com/hitachinsk/SAMed && pip install einops icecream imageio tensorboardX
    python benchmarks/fidelity.py --samed_dir SAMed --data_dir DATA --case 1

DATA is a raw BTCV folder. Weights are random: this compares arithmetic, not skill. ViT-B at 512 pixels on twenty slices
takes about ten minutes on two cores. Prints a table and writes one JSON to benchmarks/results; exits with 1 if a
tolerance is exceeded.
"""

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import torch
from accelerate import Accelerator
from fidelity_original import EPOCHS, PEAK, STEPS, WARMUPS
from measure import facts, options_parser
from peft import PeftModel
from torch.nn import functional

from samed_peft import load_adapter, predict_volume, save_adapter
from samed_peft.conversion import convert_samed, export_samed
from samed_peft.datasets import load_synapse
from samed_peft.datasets.preprocessing import resize_image, resize_label, slice_to_pixels
from samed_peft.evaluation.tables import markdown_table
from samed_peft.io import Volume, load_torch_weights, write_json
from samed_peft.metrics import score_case, score_masks
from samed_peft.models.modeling import config_of
from samed_peft.training import build_optimizer, train_step
from samed_peft.training.augmentation import augment
from samed_peft.training.loop import learning_rate

Row = tuple[str, float, float]
VARIANTS = ("samed", "samed_s")
LOGIT_TOLERANCE = 1e-5


def write_inputs(work: Path, data_dir: Path, case: int, image_size: int) -> None:
    """Write slices as model input and as training rows, the whole volume, and pairs of masks."""
    row = load_synapse(data_dir, "test", cases=[case])[0]
    volume, reference = (np.asarray(row[name]) for name in ("image", "label"))
    order = np.argsort(np.count_nonzero(reference, axis=(1, 2)))
    pixels = np.stack([slice_to_pixels(volume[i], image_size=image_size, input_size=224) for i in order[-2:]])
    chosen = np.resize(order[::-1], 2 * STEPS)
    rng = np.random.default_rng(0)
    pairs = rng.random((36, 2, 6, 20, 20)) < rng.choice([0.0, 0.02, 0.3], (36, 2, 1, 1, 1))
    np.savez(
        work / "inputs.npz",
        image_size=image_size,
        case=row["case"],
        pixels=np.repeat(pixels[:, None], 3, axis=1),
        volume=volume,
        reference=reference,
        train_images=np.stack([resize_image(volume[i], (224, 224)) for i in chosen]),
        train_labels=np.stack([resize_label(reference[i], (224, 224)) for i in chosen]),
        mask_pairs=pairs.astype(np.uint8),
    )


def compare_preprocessing(work: Path, samed_dir: Path, data_dir: Path, case: int) -> Row:
    """Preprocess raw BTCV with the original's script and with this package."""
    script = samed_dir / "preprocess" / "preprocess_data.py"
    command = [sys.executable, script, "--src_path", data_dir, "--dst_path", work / "processed"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    raw, processed = (load_synapse(folder, "test", cases=[case])[0] for folder in (data_dir, work / "processed"))
    return "preprocessed scan and labels", max(_apart(raw[n], processed[n]) for n in ("image", "label")), 0.0


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)).max())


def replayed(draws: Iterator[float]) -> SimpleNamespace:
    """Stand in for a NumPy generator with the draws of the original's generators."""
    return SimpleNamespace(random=lambda: next(draws), integers=lambda *_: int(next(draws)))


def compare_augmentation(original: dict[str, np.ndarray], given: dict[str, np.ndarray]) -> Iterator[Row]:
    """Compare training slices that were augmented with the same random draws."""
    size, worst = int(given["image_size"]), [0.0, 0.0]
    for index, draws in enumerate(original["draws"]):
        image, label = augment(given["train_images"][index], given["train_labels"][index], rng=replayed(iter(draws)))
        label = resize_label(resize_label(label, (size, size)), (size // 4, size // 4))
        found = slice_to_pixels(image, image_size=size), label
        expected = original["train_pixels"][index], original["train_targets"][index]
        worst = [max(far, _apart(*pair)) for far, pair in zip(worst, zip(found, expected, strict=True), strict=True)]
    yield f"{2 * STEPS} augmented training slices", worst[0], 0.0
    yield "their labels", worst[1], 0.0


def rate_in_force(step: int, warmup: int) -> float:
    return learning_rate(step, peak=PEAK, warmup_steps=warmup, max_steps=EPOCHS * STEPS)


def compare_rules(original: dict[str, np.ndarray], given: dict[str, np.ndarray]) -> Iterator[Row]:
    """Compare SAMed's learning rates, and its scores of pairs of masks, absent ones included."""
    found = [[rate_in_force(step, warmup) for step in range(STEPS)] for warmup in WARMUPS]
    name = f"learning rates of {STEPS} steps of SAMed's trainer, in warm-up and decay"
    yield name, _apart(found, original["rates"]), 1e-15
    scores = [score_masks(*pair, convention="samed") for pair in given["mask_pairs"]]
    ours = [[score["dice"], score["hd95"]] for score in scores]
    yield f"Dice and HD95 of {len(ours)} pairs of masks", _apart(ours, original["pair_scores"]), 1e-9


def compare_forward(work: Path, variant: str, original: dict[str, np.ndarray], pixels: torch.Tensor) -> Iterator[Row]:
    """Compare the logits of a converted checkpoint, and the checkpoint converted back."""
    export_samed(work / variant, work / f"{variant}_back.pth")
    before, after = load_torch_weights(work / f"{variant}.pth"), load_torch_weights(work / f"{variant}_back.pth")
    same = list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    yield f"{variant}: checkpoint converted and exported again (0: equal bits)", float(not same), 0.0
    with torch.inference_mode():
        logits = load_adapter(work / variant)(pixel_values=pixels).logits.numpy()
    yield f"{variant}: logits", _apart(logits, original[f"logits_{variant}"]), LOGIT_TOLERANCE
    exact = original[f"exact_logits_{variant}"]
    yield f"{variant}: logits against SAMed's float64", _apart(logits, exact), LOGIT_TOLERANCE
    yield f"({variant}: SAMed's own logits against its float64)", _apart(original[f"logits_{variant}"], exact), math.inf


def compare_training(work: Path, variant: str, original: dict[str, np.ndarray]) -> Iterator[Row]:
    """Compare the same training steps from the same start."""
    model = load_adapter(work / variant, trainable=True)
    assert isinstance(model, PeftModel), "an adapter that is not merged"
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, weight_decay=0.1))
    pixels, labels = (torch.from_numpy(original[name]).split(2) for name in ("train_pixels", "train_targets"))
    losses = []
    for step, (images, targets) in enumerate(zip(pixels, labels, strict=True)):
        batch = {"pixel_values": images[:, None].expand(-1, 3, -1, -1), "labels": targets}
        rate = rate_in_force(step, WARMUPS[0])
        losses.append(train_step(prepared, [batch], optimizer, accelerator=accelerator, learning_rate=rate))
    apart = np.abs(np.array(losses) - original[f"losses_{variant}"]).max(axis=1)
    yield f"{variant}: loss of the first step, and its parts", float(apart[0]), 1e-5
    # AdamW's first steps use a gradient's sign: if it is zero up to rounding, weights move by the learning rate.
    yield f"{variant}: losses of the next {STEPS - 1}", float(apart[1:].max()), 1e-3
    save_adapter(model, work / f"{variant}_end", config=model.samed_config)
    export_samed(work / f"{variant}_end", work / f"{variant}_trained.pth")
    ours = load_torch_weights(work / f"{variant}_trained.pth")
    theirs = load_torch_weights(work / f"{variant}_end.pth")
    squares = torch.cat([(ours[key] - theirs[key]).detach().double().square().flatten() for key in theirs])
    yield f"{variant}: weights after them, root mean square", float(squares.mean().sqrt()), 1e-3


def compare_reopened(work: Path, original: dict[str, np.ndarray]) -> Iterator[Row]:
    """Compare exported checkpoints in SAMed's own loaders and test.py."""
    reopened = dict(np.load(work / "reopened.npz"))
    for variant in VARIANTS:
        apart = _apart(reopened[f"logits_{variant}"], original[f"logits_{variant}"])
        yield f"{variant}: logits of the exported checkpoint in SAMed's code", apart, 0.0
    yield "samed: scores of SAMed's test.py on it", _apart(reopened["scores"], original["scores"]), 0.0


@torch.inference_mode()
def margins(model: torch.nn.Module, volume: np.ndarray, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the gap between the logits of the two likeliest classes, voxel by voxel, in some slices."""
    size = config_of(model).image_size
    for index in indices:
        pixels = torch.from_numpy(slice_to_pixels(volume[index], image_size=size, input_size=224))
        logits = model(pixel_values=pixels.expand(1, 3, -1, -1)).logits
        top = functional.interpolate(logits, size=(size, size), mode="bilinear").topk(2, dim=1).values[0]
        yield int(index), resize_label((top[0] - top[1]).numpy(), volume.shape[1:])


def compare_volume(work: Path, original: dict[str, np.ndarray], given: dict[str, np.ndarray]) -> Iterator[Row]:
    """Compare a whole scan through the 224 pixel bottleneck, and its scores."""
    model = load_adapter(work / "samed")
    mask = predict_volume(model, Volume(given["volume"], normalized=True), batch_size=2)
    saved = (nibabel.load(work / f"{name}_pred.nii.gz") for name in ("case", "exact"))
    theirs, exact = (np.asarray(one.dataobj).T.astype(np.uint8) for one in saved)
    differ = mask != theirs
    own = float((theirs != exact).mean())
    yield "(SAMed's own float32 mask against its float64: share of voxels that differ)", own, math.inf
    # One in ten thousand, unless rounding alone moves more than that in the original too.
    yield "samed: share of voxels of a scan's mask that differ", float(differ.mean()), max(1e-4, own)
    yield "samed: share that differ from SAMed's float64", float((mask != exact).mean()), max(1e-4, own)
    gaps = margins(model, given["volume"], np.flatnonzero(differ.any(axis=(1, 2))))
    untied = sum(int((margin[differ[index]] >= LOGIT_TOLERANCE).sum()) for index, margin in gaps)
    yield f"samed: share that differ where two classes are not within {LOGIT_TOLERANCE:g}", untied / differ.size, 0.0
    scores = score_case(theirs, given["reference"], num_classes=8)["samed"]
    ours = np.array([[score["dice"], score["hd95"]] for score in scores])
    yield "Dice and HD95 of one mask", _apart(ours, original["scores"]), 1e-9


def run_original(samed_dir: Path, work: Path, geometry: str, part: str) -> None:
    """Run one part of fidelity_original.py without this package on its path."""
    command = [sys.executable, Path(__file__).with_name("fidelity_original.py"), samed_dir, work, geometry, part]
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([str(part) for part in command], check=True, env=alone)


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--samed_dir", type=Path, required=True, help="checkout of hitachinsk/SAMed")
    parser.add_argument("--data_dir", type=Path, required=True, help="raw BTCV folder")
    parser.add_argument("--case", type=int, default=1, help="one of SAMed's test cases")
    parser.add_argument("--geometry", choices=("vit_b", "vit_l", "vit_h"), default="vit_b")
    parser.add_argument("--image_size", type=int, default=512)
    args = parser.parse_args()
    samed_dir, data_dir = args.samed_dir.resolve(), args.data_dir.resolve()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_inputs(work, data_dir, args.case, args.image_size)
        run_original(samed_dir, work, args.geometry, "compute")
        original, given = dict(np.load(work / "original.npz")), dict(np.load(work / "inputs.npz"))
        rows = [compare_preprocessing(work, samed_dir, data_dir, args.case)]
        rows += [*compare_augmentation(original, given), *compare_rules(original, given)]
        for variant in VARIANTS:
            sizes = {"image_size": args.image_size, "input_size": 224}
            convert_samed(work / f"{variant}.pth", str(work / "base.pth"), work / variant, **sizes)
            rows += compare_forward(work, variant, original, torch.from_numpy(given["pixels"]))
            rows += compare_training(work, variant, original)
        rows += compare_volume(work, original, given)
        run_original(samed_dir, work, args.geometry, "reopen")
        rows += compare_reopened(work, original)
    cells = [(name, f"{found:.2g}", f"{allowed:.2g}" if allowed < math.inf else "") for name, found, allowed in rows]
    print(markdown_table(["Quantity", "Largest difference", "Allowed"], cells))
    result = {"geometry": args.geometry, "image_size": args.image_size, **facts()}
    result["rows"] = [
        {"quantity": name, "difference": found, "allowed": allowed if allowed < math.inf else None}
        for name, found, allowed in rows
    ]
    write_json(args.results_dir / f"fidelity-{args.geometry}-{args.image_size}.json", result)
    if any(found > allowed for _, found, allowed in rows):
        sys.exit("a difference is larger than allowed")


if __name__ == "__main__":
    main()
