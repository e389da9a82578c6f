r"""What does each ingredient of the recipe for one's own data give? Each is added to SAMed's, and left out of ours.

    python benchmarks/ablation.py --data_dir Task04_Hippocampus --base tiny-sam --output_dir runs/ablation \
        -- --plane sagittal --image_size 64 --batch_size 32 --epochs 3 --warmup_steps 40 --learning_rate 0.003

Each variant is one run of `accelerate launch recipes/finetune.py` for each seed, with equally many steps. Words after
`--` are options of all runs. Each run writes one JSON to --results_dir, and all of them a table, with 95 % intervals
over seeds and cases and Wilcoxon's signed-rank test on cases (each the mean over its seeds, p values after Holm).
Finished runs are skipped, stopped ones resumed; --dry_run lists the runs that are left. Exit codes as lora_rank.py's.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
from lora_rank import Planned, Variant, carry_out_all
from measure import options_parser
from rank_table import Row, holm, interval, rows_of
from scipy.stats import wilcoxon

from samed_peft.config import TINY_SAM, TINY_SAM_NOTE
from samed_peft.errors import exit_on_error
from samed_peft.evaluation.tables import markdown_table
from samed_peft.io import read_json, write_text

INGREDIENTS = {
    "one geometry": ("--resampling", "aligned"),
    "neighbouring slices": ("--neighbour_mm", "1"),
    "strong augmentation": ("--augmentation", "strong"),
    "more targets": ("--targets", "q_proj", "k_proj", "v_proj", "lin1", "lin2", "--rank", "8"),
    "LoRA+": ("--lora_plus_ratio", "8"),
    "weight average": ("--weight_average", "0.99"),
    "cosine decay": ("--schedule", "cosine"),
    "class balance": ("--foreground_share", "0.33"),
    "little weight decay": ("--weight_decay", "0.01"),
    "clipped gradients": ("--max_grad_norm", "1"),
    "shifts at prediction": ("--tta", "shifts"),
    "smoothing across slices": ("--smoothing_mm", "1"),
}
"""Options of recipes/finetune.py; without them, it has SAMed's."""

BARE, WHOLE = "SAMed's recipe", "all ingredients"


def variants() -> list[Variant]:
    """The bare recipe, each ingredient added to it, each left out of all, and all."""
    every = tuple(itertools.chain.from_iterable(INGREDIENTS.values()))
    rows = [Variant("whole", BARE, ()), Variant("whole", WHOLE, every)]
    rows += [Variant("added", f"with {name}", options) for name, options in INGREDIENTS.items()]
    for left_out in INGREDIENTS:
        others = itertools.chain.from_iterable(o for name, o in INGREDIENTS.items() if name != left_out)
        rows.append(Variant("removed", f"without {left_out}", tuple(others)))
    return rows


def table(rows: list[Row], *, rng: np.random.Generator) -> str:
    """Dice of each variant, and its difference from the recipe that it changes by one ingredient."""
    named = {row.name: row for row in rows}
    differences = {}
    for row in rows:
        start = named.get(BARE if row.kind == "added" else WHOLE)
        if row.kind in ("added", "removed") and start is not None:
            pair = row.scores["dice"], start.scores["dice"]
            paired = np.nanmean(pair[0], axis=0) - np.nanmean(pair[1], axis=0)
            differences[row.name] = paired[~np.isnan(paired)]
    p_values = holm([float(wilcoxon(d).pvalue) if np.any(d) else 1.0 for d in differences.values()])
    adjusted = dict(zip(differences, p_values, strict=True))
    lines = []
    for row in rows:
        low, high = interval(row.scores["dice"], rng=rng)
        found = differences.get(row.name)
        changed = ["", ""] if found is None else [f"{found.mean():+.4f}", f"{adjusted[row.name]:.2g}"]
        size = f"{row.median('stored_bytes') / 1e6:.2f} MB"
        dice = f"{row.mean('dice'):.4f} ({low:.3f}-{high:.3f})"
        lines.append([row.name, str(len(row.runs)), dice, *changed, size, f"{row.median('seconds_per_step'):.3f}"])
    return markdown_table(["", "seeds", "Dice (95 %)", "difference", "p", "stored", "s a step"], lines)


@exit_on_error
def main() -> None:
    parser = options_parser(__doc__, "results/ablation")
    add = parser.add_argument
    add("--data_dir", type=Path, required=True, help="as the recipe's")
    add("--output_dir", type=Path, required=True, help="folders and logs of the runs")
    add("--base", default="facebook/sam-vit-base", help="as the recipe's")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--launch", default="", help="options of accelerate launch in one string; default: its own configuration")
    add("--dry_run", action="store_true", help="print the plan and the expected time")
    words = sys.argv[1:]
    place = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:place])
    args.recipe = "finetune"
    args.options = words[place + 1 :]
    data = args.data_dir.resolve().name
    runs = [Planned.of(variant, seed, args) for seed, variant in itertools.product(args.seeds, variants())]
    carry_out_all(runs, args)
    results = [read_json(run.result) for run in runs if run.result.is_file()]
    if results:
        note = [TINY_SAM_NOTE, ""] if args.base == TINY_SAM else []
        text = "\n".join([*note, table(rows_of(results), rng=np.random.default_rng(0))]) + "\n"
        write_text(args.results_dir.parent / f"ablation-{data}.md", text)
        print(text, end="")


if __name__ == "__main__":
    main()
