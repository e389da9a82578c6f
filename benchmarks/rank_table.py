"""Tabulate and plot the measurements of lora_rank.py.

    python benchmarks/rank_table.py benchmarks/results/lora_rank

prints Markdown and writes `lora_rank-DATA.md` and three plots beside the folder: Dice and HD95 against the rank, with
95 % intervals over seeds and cases; Dice against stored size; Dice against peak memory. Ranks are compared with each
other by Wilcoxon's signed-rank test on cases, each the mean over its seeds, p values after Holm.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import wilcoxon

from samed_peft.config import TINY_SAM, TINY_SAM_NOTE
from samed_peft.errors import InputError, exit_on_error
from samed_peft.evaluation import Report
from samed_peft.evaluation.tables import MAIN_METRICS, markdown_table
from samed_peft.io import read_json, write_text
from samed_peft.metrics import mean_defined

RESAMPLES = 5000
KINDS = ("rank", "placement", "method", "baseline", "whole", "added", "removed", "zero", "tuned")


@dataclass(frozen=True)
class Row:
    """One variant: its results, one a seed, and metric -> (seeds, cases), means over the classes that are defined."""

    kind: str
    name: str
    runs: Sequence[Mapping[str, Any]]
    reports: Sequence[Report]
    scores: Mapping[str, np.ndarray]

    @property
    def label(self) -> str:
        """Name in tables."""
        return self.name if self.kind != "placement" else f"on {self.name}"

    @property
    def memory(self) -> str:
        """Field of the peak memory that counts: the GPU's, if there was one."""
        return "peak_gpu_gb" if self.runs[0]["peak_gpu_gb"] is not None else "peak_resident_gb"

    def mean(self, metric: str) -> float:
        """Mean over seeds and cases."""
        return float(np.nanmean(self.scores[metric]))

    def of_class(self, name: str) -> float:
        """Mean over seeds of a class's mean Dice, `standard` convention."""
        return float(np.mean([report.summary["standard"]["classes"][name]["dice"] for report in self.reports]))

    def median(self, field: str) -> float:
        """Median over seeds of a measurement."""
        return float(np.median([run[field] for run in self.runs]))

    def seeds_deviation(self, metric: str) -> float:
        """Standard deviation between seeds of the mean over cases; NaN with one seed."""
        return float(np.std(np.nanmean(self.scores[metric], axis=1), ddof=1)) if len(self.runs) > 1 else np.nan


def rows_of(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Results by variant, in the order of kinds and ranks; variants scored on different cases are refused."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in sorted(results, key=lambda run: run["seed"]):
        groups.setdefault((run["kind"], run["variant"]), []).append(run)
    rows = []
    for (kind, name), runs in groups.items():
        reports = [Report.from_dict({"settings": {}, **run}) for run in runs]
        cases = sorted(rows[0].reports[0].cases if rows else reports[0].cases)
        if any(sorted(report.cases) != cases for report in reports):
            raise InputError(f"{name} was scored on other cases than the first result; tabulate one data set at a time")
        scores = {
            metric: np.array([[report.case_mean(case, metric) for case in cases] for report in reports])
            for metric in MAIN_METRICS
        }
        rows.append(Row(kind, name, runs, reports, scores))
    return sorted(
        rows, key=lambda row: (KINDS.index(row.kind), row.runs[0]["config"]["rank"] if row.kind == "rank" else 0)
    )


def interval(scores: np.ndarray, *, rng: np.random.Generator) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean of (seeds, cases), both drawn anew; NaN is left out."""
    seeds, cases = scores.shape
    drawn = ((rng.integers(seeds, size=seeds), rng.integers(cases, size=cases)) for _ in range(RESAMPLES))
    draws = [mean_defined(scores[np.ix_(*places)].ravel().tolist()) for places in drawn]
    low, high = np.nanquantile(draws, (0.025, 0.975))
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for their number (Holm 1979)."""
    order = np.argsort(p_values)
    adjusted = np.minimum(np.maximum.accumulate(np.sort(p_values) * np.arange(len(p_values), 0, -1)), 1.0)
    return adjusted[np.argsort(order)].tolist()


def paired_tests(rows: Sequence[Row], metric: str) -> list[tuple[Row, Row, float, float]]:
    """(one, other, mean difference other - one, adjusted p) of every pair, on cases."""
    pairs = list(itertools.combinations(rows, 2))
    means, p_values = [], []
    for one, other in pairs:
        differences = np.nanmean(other.scores[metric], axis=0) - np.nanmean(one.scores[metric], axis=0)
        differences = differences[~np.isnan(differences)]
        means.append(float(differences.mean()))
        p_values.append(float(wilcoxon(differences).pvalue) if np.any(differences) else 1.0)
    return [(*pair, mean, p) for pair, mean, p in zip(pairs, means, holm(p_values), strict=True)]


def table(rows: Sequence[Row], *, rng: np.random.Generator) -> str:
    classes = rows[0].reports[0].class_names
    head = ["", "Dice (95 %)", "between seeds", *classes, "HD95 mm (95 %)", "trainable", "stored", "s a step", "peak"]
    lines = []
    for row in rows:
        dice, hd95 = (interval(row.scores[metric], rng=rng) for metric in MAIN_METRICS)
        lines.append(
            [
                row.label,
                f"{row.mean('dice'):.3f} ({dice[0]:.3f}-{dice[1]:.3f})",
                f"{row.seeds_deviation('dice'):.3f}" if len(row.runs) > 1 else "",
                *(f"{row.of_class(name):.3f}" for name in classes),
                f"{row.mean('hd95'):.2f} ({hd95[0]:.2f}-{hd95[1]:.2f})",
                f"{row.median('trainable_parameters') / 1e3:,.0f} k",
                f"{row.median('stored_bytes') / 1e6:.2f} MB",
                f"{row.median('seconds_per_step'):.3f}",
                f"{row.median(row.memory):.2f} GB",
            ]
        )
    return markdown_table(head, lines)


def tests_table(rows: Sequence[Row]) -> str:
    """Differences between ranks, the row's less the column's, and whether chance explains them."""
    tests = paired_tests(rows, "dice")
    texts = {(one.name, other.name): f"{difference:+.3f} (p {p:.2g})" for one, other, difference, p in tests}
    lines = [[other.name, *(texts.get((one.name, other.name), "") for one in rows[:-1])] for other in rows[1:]]
    return markdown_table(["", *(row.name for row in rows[:-1])], lines)


def plot_ranks(rows: Sequence[Row], baselines: Sequence[Row], path: Path, *, rng: np.random.Generator) -> None:
    """Dice and HD95 against the rank."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    ranks = [row.runs[0]["config"]["rank"] for row in rows]
    for axis, metric, label in zip(axes, MAIN_METRICS, ("Dice", "HD95, mm"), strict=True):
        means = np.array([row.mean(metric) for row in rows])
        bounds = np.array([interval(row.scores[metric], rng=rng) for row in rows]).T
        axis.errorbar(
            ranks, means, yerr=np.abs(bounds - means), marker="o", capsize=4, label="mean, 95 % over seeds and cases"
        )
        seeds = [np.nanmean(row.scores[metric], axis=1) for row in rows]
        places = np.repeat(ranks, [len(row) for row in seeds])
        axis.plot(places, np.concatenate(seeds), "k.", markersize=4, alpha=0.5, label="each seed")
        for color, row in enumerate(baselines, start=1):
            axis.axhline(row.mean(metric), color=f"C{color}", linestyle="--", label=row.label)
        axis.set(xscale="log", xlabel="rank of LoRA on q and v", ylabel=label)
        axis.set_xticks(ranks, [str(rank) for rank in ranks])
        axis.minorticks_off()
    axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)


def plot_costs(rows: Sequence[Row], path: Path) -> None:
    """Dice against stored size and peak memory."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, field, label, unit in (
        (axes[0], "stored_bytes", "adapter on disk, MB", 1e6),
        (axes[1], rows[0].memory, "peak memory of training, GB", 1),
    ):
        for color, kind in enumerate(KINDS):
            if places := [(row.median(field) / unit, row.mean("dice")) for row in rows if row.kind == kind]:
                axis.scatter(*zip(*places, strict=True), color=f"C{color}", label=kind)
        # Left and right in turn, from the worst up, so that names of neighbours lie apart.
        for number, row in enumerate(sorted(rows, key=lambda row: row.mean("dice"))):
            place, side = (row.median(field) / unit, row.mean("dice")), 1 if number % 2 else -1
            style = {"ha": "left" if side > 0 else "right", "va": "center", "fontsize": 7}
            axis.annotate(row.label, place, xytext=(6 * side, 0), textcoords="offset points", **style)
        axis.margins(x=0.15)
        axis.set(xlabel=label, ylabel="Dice")
        if field == "stored_bytes":
            axis.set_xscale("log")
            for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
                ticks(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)


@exit_on_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of lora_rank.py's JSONs, of one data set")
    parser.add_argument("--output_dir", type=Path, help="default: beside that folder")
    args = parser.parse_args()
    results = [read_json(file) for file in sorted(args.results.glob("*.json"))]
    if not results:
        raise InputError(f"expected results of lora_rank.py in {args.results}, found none")
    data = sorted({run["data"] for run in results})
    if len(data) > 1:
        raise InputError(
            f"expected results of one data set in {args.results}, found {', '.join(data)}; sort them apart"
        )
    rows = rows_of(results)
    ranks = [row for row in rows if row.kind == "rank"]
    out = args.output_dir or args.results.parent
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    seeds, cases = sorted({run["seed"] for run in results}), rows[0].scores["dice"].shape[1]
    lines = [f"{data[0]}, base {results[0]['base']}, {len(seeds)} seeds, {cases} cases held out."]
    lines += [TINY_SAM_NOTE] if any(run["base"] == TINY_SAM for run in results) else []
    lines += ["", table(rows, rng=rng)]
    stem = f"lora_rank-{data[0]}"
    if ranks:
        plot_ranks(ranks, [row for row in rows if row.kind == "baseline"], out / f"{stem}-ranks.png", rng=rng)
    if len(ranks) > 1:
        lines += ["", "Dice of a row's rank less that of a column's:", "", tests_table(ranks)]
    plot_costs(rows, out / f"{stem}-costs.png")
    text = "\n".join(lines) + "\n"
    write_text(out / f"{stem}.md", text)
    print(text, end="")


if __name__ == "__main__":
    main()
