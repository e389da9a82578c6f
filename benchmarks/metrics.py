"""Dice and HD95 of eight organs in a CT: medpy on the full arrays and this package, side by side in one run.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/metrics.py

Two pairs of synthetic abdomens (`datasets.phantom`): a prediction that is close, organs moved by a voxel or two with
their outlines worn, and one that is far off, another phantom altogether. The scores must agree to 1e-9, else it ends
with exit code 1. Seven minutes on one core at 512 x 512 x 150, nearly all of it medpy's; `--shape 30 128 128` takes
seconds. Writes one JSON to benchmarks/results.
"""

import statistics
import sys
from datetime import date
from typing import Any

import numpy as np
from measure import facts, options_parser, seconds_of

from samed_peft.config import SYNAPSE_CLASSES
from samed_peft.datasets.phantom import phantom_case
from samed_peft.datasets.synapse_files import BTCV_TO_SYNAPSE
from samed_peft.evaluation.tables import markdown_table
from samed_peft.io import write_json
from samed_peft.metrics import medpy_scores, score_case, score_labels
from samed_peft.training.batches import available_cores

ALLOWED = 1e-9
SHAPE_DHW = (150, 512, 512)
SPACING_ZYX_MM = (3.0, 0.75, 0.75)
LABELS = range(1, len(SYNAPSE_CLASSES) + 1)


def phantom_labels(case: int, shape_dhw: tuple[int, int, int]) -> np.ndarray:
    """Labels 0..8 of a phantom, (D, H, W) uint8."""
    _, raw = phantom_case(case, seed=0, shape_dhw=shape_dhw, spacing_zyx_mm=SPACING_ZYX_MM)
    table = np.zeros(raw.max() + 1, np.uint8)
    table[list(BTCV_TO_SYNAPSE)] = list(BTCV_TO_SYNAPSE.values())
    return table[raw]


def close_prediction(reference: np.ndarray, *, rng: np.random.Generator) -> np.ndarray:
    """Each organ moved by up to two voxels, and a tenth of its outline's voxels lost."""
    prediction = np.zeros_like(reference)
    for label in LABELS:
        organ = np.roll(reference == label, rng.integers(-2, 3, size=3), axis=(0, 1, 2))
        inside = organ & np.roll(organ, 1, axis=1) & np.roll(organ, -1, axis=2)
        prediction[inside | (organ & (rng.random(organ.shape, dtype=np.float32) > 0.1))] = label
    return prediction


def measure(prediction: np.ndarray, reference: np.ndarray, *, repeats: int) -> dict[str, Any]:
    """Times of both and the largest difference between their scores."""
    pair, options = (prediction, reference), {"num_classes": len(LABELS), "spacing_zyx_mm": SPACING_ZYX_MM}
    found = score_labels(*pair, **options)  # untimed: the first call imports and allocates
    ours = [seconds_of(lambda: score_labels(*pair, **options))[0] for _ in range(repeats)]
    both = [seconds_of(lambda: score_case(*pair, **options))[0] for _ in range(repeats)]
    medpy, expected = seconds_of(lambda: medpy_scores(*pair, crop=False, **options))
    differences = [abs(a[name] - b[name]) for a, b in zip(found, expected, strict=True) for name in ("dice", "hd95")]
    return {
        "medpy_seconds": round(medpy, 3),
        "ours_seconds": round(statistics.median(ours), 4),
        "ours_fastest_seconds": round(min(ours), 4),
        "ours_both_conventions_seconds": round(statistics.median(both), 4),
        "times_faster": round(medpy / statistics.median(ours), 1),
        "largest_difference": float(np.max(differences)),
        "scores": {
            organ: {name: round(score[name], 6) for name in ("dice", "hd95")}
            for organ, score in zip(SYNAPSE_CLASSES, found, strict=True)
        },
    }


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--shape", type=int, nargs=3, metavar=("D", "H", "W"), default=SHAPE_DHW)
    parser.add_argument("--repeats", type=int, default=5, help="calls of ours, of which the median counts")
    parser.add_argument("--name", help="end of the result's file name; the shape if not given")
    args = parser.parse_args()
    result = facts() | {"cores_used": available_cores(), "allowed_difference": ALLOWED}
    result["settings"] = {"shape_dhw": args.shape, "spacing_zyx_mm": SPACING_ZYX_MM, "repeats": args.repeats}
    shape_dhw = tuple(args.shape)
    reference = phantom_labels(0, shape_dhw)
    predictions = {
        "close": close_prediction(reference, rng=np.random.default_rng(0)),
        "far off": phantom_labels(1, shape_dhw),
    }
    pairs = {name: measure(prediction, reference, repeats=args.repeats) for name, prediction in predictions.items()}
    header = ["prediction", "medpy, s", "ours, s", "times faster", "ours, both conventions, s", "difference"]
    keys = ["medpy_seconds", "ours_seconds", "times_faster", "ours_both_conventions_seconds", "largest_difference"]
    print(markdown_table(header, [[name, *(f"{pair[key]:.3g}" for key in keys)] for name, pair in pairs.items()]))
    name = args.name or "x".join(map(str, args.shape))
    write_json(args.results_dir / f"metrics-{date.today()}-{name}.json", result | {"pairs": pairs})
    if any(not pair["largest_difference"] <= ALLOWED for pair in pairs.values()):
        sys.exit(f"scores differ from medpy's by more than {ALLOWED}")


if __name__ == "__main__":
    main()
