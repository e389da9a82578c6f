r"""How good is the planned recipe without any flag, beside the best hand-tuned run of equal minutes?

    python benchmarks/zero_flags.py --hippocampus Task04_Hippocampus --ct btcv --base tiny-sam --output_dir runs/zero

Five data sets, written to OUTPUT_DIR/data where they are absent: hippocampi, phantoms, slices of one CT, pictures, and
five hippocampi. On each, `recipes/finetune.py` runs without flags (but the base, the folders, the minutes and the
seed), and with the options of candidates that an expert might choose. All are scored on fold 0, but "five", where a
fold is one case: there each seed holds out the fold of its number, and the cases of all seeds are put together.

Each run writes one JSON to --results_dir, and all of them a table: zero flags beside the candidate with the best mean
Dice over seeds and cases, their ratio, 95 % intervals over seeds and cases, and Wilcoxon's signed-rank test on cases
(each the mean over its seeds, p values after Holm for the candidates of a data set). The best candidate is chosen by
the scores that it is then compared with, which favours it. Finished runs are skipped, stopped ones resumed; --dry_run
lists the runs that are left. Exit codes as lora_rank.py's.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from lora_rank import Planned, Variant, carry_out_all
from measure import options_parser
from rank_table import RESAMPLES, Row, holm, interval, rows_of
from scipy.stats import wilcoxon
from zero_flags_data import DATA_SETS, folder_of, write_absent

from samed_peft.config import TINY_SAM, TINY_SAM_NOTE
from samed_peft.errors import SomeCasesFailedError, exit_on_error
from samed_peft.evaluation import Report
from samed_peft.evaluation.tables import markdown_table
from samed_peft.io import read_json, write_text
from samed_peft.metrics import mean_defined
from samed_peft.models.geometry import base_geometry
from samed_peft.training import planned_precision

ZERO = Variant("zero", "zero flags", (), planned=True)
FOLDS = 5  # as the recipe's default
MOST_PIXELS = 256  # of the smallest slices, for bases that were trained at more

ALL_CASES = ("--validation_share", "0")
BY_HAND = (
    *("--resampling", "aligned", "--schedule", "cosine", "--warmup_steps", "20", "--weight_decay", "0.01"),
    *("--max_grad_norm", "1", "--lora_plus_ratio", "8", "--rank", "8"),
    *("--targets", "q_proj", "k_proj", "v_proj", "lin1", "lin2"),
)
"""SAMed's settings, which have no neighbouring slices, with what LoRA learns fast with."""


def _batch(size: int, learning_rate: float) -> tuple[str, ...]:
    return "--batch_size", str(size), "--learning_rate", str(learning_rate)


def tuned(name: str, *, side: int, precision: str | None) -> list[Variant]:
    """The hand-tuned candidates of a data set.

    Args:
        name: one of `DATA_SETS`.
        side: pixels of the smallest slices that suit the base.
        precision: Accelerate's name of that of a planned run, which those by hand get too; None: Accelerate's setting.
    """
    faster, plain, smaller = ("--learning_rate", "0.006"), ("--no-augment",), ("--image_size", str(side))
    neighbours, wider = ("--neighbour_mm", "5"), ("--image_size", str(4 * side))
    changes: dict[str, dict[str, tuple[str, ...]]] = {
        "hippocampus": {"no augmentation": plain, "smaller slices": smaller, "faster": faster},
        "phantom": {"no augmentation": plain, "neighbours": neighbours, "faster": faster},
        "slices": {
            "no augmentation": plain,
            "larger slices": wider,
            "larger batch": _batch(8, 0.003),
        },
        "pictures": {
            "SAMed's augmentation": ("--augmentation", "samed"),
            "mirrored sideways": ("--mirror", "columns"),
            "faster": faster,
        },
        "five": {"no augmentation": plain, "smaller slices": smaller, "faster": faster},
    }
    by_hand = {
        "hippocampus": ("--plane", "sagittal", *smaller, *plain, *_batch(32, 0.003)),
        "phantom": ("--image_size", str(2 * side), *plain, *_batch(16, 0.003)),
        "slices": ("--window", "-125", "275", *wider, *plain, *_batch(4, 0.002)),
        "pictures": ("--window", "0", "255", *smaller, "--augmentation", "strong", *_batch(16, 0.004)),
        "five": ("--plane", "sagittal", *smaller, "--augmentation", "strong", *_batch(16, 0.003)),
    }
    rows = [Variant("tuned", "all cases", ALL_CASES, planned=True)]
    rows += [
        Variant("tuned", f"all cases, {change}", (*ALL_CASES, *options), planned=True)
        for change, options in changes[name].items()
    ]
    same = () if precision is None else ("--mixed_precision", precision)
    return [*rows, Variant("tuned", "by hand", (*BY_HAND, *by_hand[name], *same))]


def variants(name: str, seed: int, args: argparse.Namespace) -> list[Variant]:
    """Zero flags and the candidates, with the fold of a seed where it is not the same for all."""
    side = min(base_geometry(args.base).image_size, MOST_PIXELS)
    rows = [ZERO, *tuned(name, side=side, precision=planned_precision(args.output_dir))[: args.candidates]]
    if not DATA_SETS[name].folds_by_seed:
        return rows
    return [replace(row, options=(*row.options, "--fold", str(seed % FOLDS))) for row in rows]


def of_equal_seeds(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The results of the seeds that every variant with results has finished."""
    seeds: dict[str, set[int]] = {}
    for run in results:
        seeds.setdefault(run["variant"], set()).add(run["seed"])
    common = set.intersection(*seeds.values()) if seeds else set()
    return [run for run in results if run["seed"] in common]


def folds_joined(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One result a variant, with the cases of the folds that its seeds held out."""
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for run in results:
        runs.setdefault(run["variant"], []).append(run)
    joined: list[Mapping[str, Any]] = []
    for first, *others in runs.values():
        reports = [Report.from_dict({"settings": {}, **run}) for run in (first, *others)]
        cases = {case: scores for report in reports for case, scores in report.cases.items()}
        joined.append({**first, **Report(reports[0].class_names, cases).to_dict(), "seed": 0})
    return joined


@dataclass(frozen=True)
class Comparison:
    """A data set's results: zero flags, all candidates in their order with p values, and the number of runs of each."""

    name: str
    zero: Row
    candidates: Sequence[Row]
    p_values: Sequence[float]
    n_runs: int

    @classmethod
    def of(cls, name: str, results: Sequence[Mapping[str, Any]]) -> "Comparison | None":
        """Compare what has been finished; None before zero flags and a candidate have a seed in common."""
        equal = of_equal_seeds(results)
        rows = rows_of(folds_joined(equal) if DATA_SETS[name].folds_by_seed else equal) if equal else []
        zero = next((row for row in rows if row.kind == "zero"), None)
        candidates = [row for row in rows if row.kind == "tuned"]
        if zero is None or not candidates:
            return None
        differences = [_by_case(row) - _by_case(zero) for row in candidates]
        found = [difference[~np.isnan(difference)] for difference in differences]
        p_values = holm([float(wilcoxon(d).pvalue) if np.any(d) else 1.0 for d in found])
        return cls(name, zero, candidates, p_values, len({run["seed"] for run in equal}))

    @property
    def best(self) -> int:
        """Place of the candidate with the best mean Dice."""
        return int(np.argmax([row.mean("dice") for row in self.candidates]))

    @property
    def n_cases(self) -> int:
        """Number of held-out cases."""
        return int(self.zero.scores["dice"].shape[1])


def _by_case(row: Row) -> np.ndarray:
    """Dice of each case, mean over seeds; NaN where no class is defined."""
    return np.array([mean_defined(of_case.tolist()) for of_case in row.scores["dice"].T])


def ratio(one: np.ndarray, other: np.ndarray, *, rng: np.random.Generator) -> tuple[float, float, float]:
    """Ratio of two means of (seeds, cases), and its 95 % interval; NaN if the second mean is 0.

    Percentile bootstrap: both draw the same cases, and each its own seeds. NaN is left out.
    """
    if not np.nansum(other):
        return np.nan, np.nan, np.nan
    draws = []
    for _ in range(RESAMPLES):
        cases = rng.integers(one.shape[1], size=one.shape[1])
        means = [
            mean_defined(scores[np.ix_(rng.integers(len(scores), size=len(scores)), cases)].ravel().tolist())
            for scores in (one, other)
        ]
        if means[1] > 0:
            draws.append(means[0] / means[1])
    low, high = np.nanquantile(draws, (0.025, 0.975))
    return float(np.nanmean(one) / np.nanmean(other)), float(low), float(high)


def _dice(row: Row, *, rng: np.random.Generator) -> str:
    low, high = interval(row.scores["dice"], rng=rng)
    return f"{row.mean('dice'):.4f} ({low:.3f}-{high:.3f})"


def _hd95(row: Row) -> str:
    mean = mean_defined(row.scores["hd95"].ravel().tolist())
    return "n/a" if np.isnan(mean) else f"{mean:.2f}"


def summary_table(found: Sequence[Comparison], *, rng: np.random.Generator) -> str:
    """One row a data set: zero flags beside its best candidate."""
    lines = []
    for one in found:
        best = one.candidates[one.best]
        value, low, high = ratio(one.zero.scores["dice"], best.scores["dice"], rng=rng)
        shown = "undefined" if np.isnan(value) else f"{value:.3f} ({low:.3f}-{high:.3f})"
        cells = [
            f"{one.name}: {DATA_SETS[one.name].about}",
            str(one.n_runs),
            str(one.n_cases),
            _dice(one.zero, rng=rng),
        ]
        lines.append([*cells, best.name, _dice(best, rng=rng), shown, f"{one.p_values[one.best]:.2g}"])
    head = ["", "runs", "cases", "zero flags, Dice (95 %)", "best hand-tuned", "Dice (95 %)", "ratio (95 %)", "p"]
    return markdown_table(head, lines)


def variants_table(one: Comparison, *, rng: np.random.Generator) -> str:
    """All variants of a data set, and their differences from zero flags."""
    lines = [[one.zero.name, _dice(one.zero, rng=rng), "", "", _hd95(one.zero)]]
    for row, p in zip(one.candidates, one.p_values, strict=True):
        difference = f"{row.mean('dice') - one.zero.mean('dice'):+.4f}"
        lines.append([row.name, _dice(row, rng=rng), difference, f"{p:.2g}", _hd95(row)])
    return markdown_table(["", "Dice (95 %)", "difference", "p", "HD95, mm"], lines)


def text_of(found: Sequence[Comparison], *, base: str, minutes: float) -> str:
    """The tables as Markdown."""
    rng = np.random.default_rng(0)
    lines = [f"Base {base}, {minutes:g} minutes of training a run. Runs are those of each variant; cases are held out."]
    lines += [TINY_SAM_NOTE] if base == TINY_SAM else []
    lines += ["", summary_table(found, rng=rng)]
    for one in found:
        lines += ["", f"## {one.name}", "", variants_table(one, rng=rng)]
    return "\n".join(lines) + "\n"


def parse_args() -> argparse.Namespace:
    parser = options_parser(__doc__, "results/zero_flags")
    add = parser.add_argument
    add("--hippocampus", type=Path, required=True, help="Task04_Hippocampus of the Decathlon")
    add("--ct", type=Path, required=True, help="raw BTCV with img0001: Training/img and Training/label")
    add("--output_dir", type=Path, required=True, help="data sets, folders and logs of the runs")
    add("--base", default="facebook/sam-vit-base", help="as the recipe's")
    add("--max_minutes", type=float, default=3.0, help="of training, of each run; default: 3")
    add("--sets", nargs="+", choices=DATA_SETS, default=[*DATA_SETS], help="by default all")
    add("--candidates", type=int, help="of each data set, the first ones; default: all")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--launch", default="", help="options of accelerate launch in one string; default: its own configuration")
    add("--dry_run", action="store_true", help="print the plan and the expected time; no data set is written")
    args = parser.parse_args()
    if "five" in args.sets and len({seed % FOLDS for seed in args.seeds}) < len(args.seeds):
        parser.error(f"five holds out fold SEED modulo {FOLDS}: give up to {FOLDS} --seeds that differ in it")
    if args.candidates is not None and args.candidates < 1:
        parser.error(f"zero flags are compared with one candidate at least; found --candidates {args.candidates}")
    args.recipe, args.options = "finetune", ["--max_minutes", f"{args.max_minutes:g}"]
    return args


@exit_on_error
def main() -> None:
    args = parse_args()
    sources = {"hippocampus": args.hippocampus.resolve()}
    planned: dict[str, list[Planned]] = {name: [] for name in args.sets}
    failures: list[str] = []
    # Seed by seed, so that an early stop leaves whole tables of fewer seeds.
    for seed in args.seeds:
        for name in args.sets:
            args.data_dir = folder_of(name, data=args.output_dir / "data", **sources)
            runs = [Planned.of(variant, seed, args) for variant in variants(name, seed, args)]
            planned[name] += runs
            if not args.dry_run:
                write_absent(name, args.data_dir, ct=args.ct.resolve(), **sources)
            try:
                carry_out_all(runs, args)
            except SomeCasesFailedError as error:
                failures.append(f"{name}, seed {seed}: {error}")
    results = {name: [read_json(run.result) for run in runs if run.result.is_file()] for name, runs in planned.items()}
    found = [one for name in args.sets if (one := Comparison.of(name, results[name])) is not None]
    if found:
        text = text_of(found, base=args.base, minutes=args.max_minutes)
        write_text(args.results_dir.parent / "zero_flags.md", text)
        print(text, end="")
    if failures:
        raise SomeCasesFailedError("; ".join(failures))


if __name__ == "__main__":
    main()
