"""report.html: one page that needs no network, works from a file and keeps names from being read as markup."""

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path

from samed_peft.evaluation.charts import box_plots
from samed_peft.evaluation.page_tables import (
    METRIC_TITLES,
    name_cell,
    number_cell,
    score_cells,
    scrolling,
    sortable_table,
)
from samed_peft.evaluation.report import (
    CONVENTION_NOTES,
    METRIC_NOTE,
    Report,
    format_interval,
    remarks,
)
from samed_peft.io import read_text
from samed_peft.metrics import (
    CONVENTIONS,
    METRICS,
    Convention,
    Metric,
    Presence,
    format_metric,
    presence,
)

_ASSETS = Path(__file__).parent / "page_assets"

MOST_PICTURES = 12
"""Pictures inside the page, about a quarter of a megabyte each; further ones are linked."""

_UNITS: dict[Convention, str] = {"standard": "mm", "samed": "voxels"}
_PRESENCES: dict[Presence, str] = {
    "both": "both masks",
    "missed": "missed",
    "spurious": "spurious",
    "absent": "neither mask",
}


def html_page(report: Report, *, pictures: Mapping[str, bytes], links: Mapping[str, str]) -> str:
    """The report as a page of its own: tables that sort, distributions, the worst cases with their pictures.

    Args:
        report: the scores.
        pictures: case -> PNG; those of the worst cases become part of the page.
        links: case -> path of its picture from the page.
    """
    # Lines of checked-in files as they are on any system, since the policy below names their hashes.
    style, script = (read_text(_ASSETS / name) for name in ("report.css", "report.js"))
    sections = [
        _head(report),
        _class_section(report),
        _chart_section(report),
        _worst_section(report, pictures, links),
        _case_section(report),
        _settings_section(report),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(style, script)}">\n'
        f"<title>Evaluation of {len(report.cases)} cases</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _policy(style: str, script: str) -> str:
    """Nothing is loaded from anywhere; of styles and scripts only the page's own two run."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _head(report: Report) -> str:
    dataset = f" of {escape(str(report.settings['dataset']))}" if "dataset" in report.settings else ""
    parts = [
        "<h1>Evaluation</h1>",
        f'<p class="quiet">{_count(len(report.cases), "case")}{dataset}, '
        f"{_count(len(report.class_names), 'class')}</p>",
        *(f'<p class="note">{escape(remark)}</p>' for remark in remarks(report)),
        _failed(report.settings.get("failed_cases", {})),
        '<dl class="figures">',
    ]
    for convention in CONVENTIONS:
        mean, intervals = report.summary[convention]["mean"], report.intervals[convention]["mean"]
        metrics: tuple[Metric, ...] = ("dice", "hd95")
        for metric in metrics:
            unit = f" {_UNITS[convention]}" if metric == "hd95" and not math.isnan(mean[metric]) else ""
            parts.append(
                f"<div><dt>Mean {METRIC_TITLES[metric]}, {convention}</dt>"
                f'<dd><span class="value">{format_metric(metric, mean[metric])}{unit}</span><br>'
                f'<span class="quiet">95 % interval {format_interval(metric, intervals[metric])}</span></dd></div>'
            )
    return "\n".join([*parts, "</dl>"])


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number} {noun if number == 1 else plural}"


def _failed(failed: Mapping[str, str]) -> str:
    if not failed:
        return ""
    items = "".join(f"<li>{escape(case)}: {escape(str(reason))}</li>" for case, reason in failed.items())
    return f'<div class="note failed"><strong>{_count(len(failed), "case")} failed</strong><ul>{items}</ul></div>'


def _class_section(report: Report) -> str:
    rows = []
    for name in report.class_names:
        cells = [name_cell(name)]
        for c in CONVENTIONS:
            cells += score_cells(report.summary[c]["classes"][name], report.intervals[c]["classes"][name])
        counts = report.summary["standard"]["classes"][name]
        numbers = (counts["n_valid"], counts["n_absent"], counts["n_missed"], counts["n_spurious"])
        cells += [number_cell(str(number), number, first=index == 0) for index, number in enumerate(numbers)]
        rows.append(cells)
    mean = [name_cell("mean")]
    for convention in CONVENTIONS:
        mean += score_cells(report.summary[convention]["mean"], report.intervals[convention]["mean"])
    groups = [("", 1), *((_group(c), len(METRICS)) for c in CONVENTIONS), (f"cases, of {len(report.cases)}", 4)]
    header = ["Class", *(METRIC_TITLES[metric] for _ in CONVENTIONS for metric in METRICS)]
    header += ["scored", "in neither", "missed", "spurious"]
    notes = [f"<li><code>{c}</code>: {escape(CONVENTION_NOTES[c])}</li>" for c in CONVENTIONS]
    table = sortable_table(header, rows, groups=groups, foot=[*mean, *['<td class="start"></td>', *["<td></td>"] * 3]])
    tolerance = report.settings.get("surface_dice_tolerance_mm")
    known = "" if tolerance is None else f" Tolerance: {tolerance:g} mm in standard, {tolerance:g} voxels in samed."
    return (
        f'<h2>Classes</h2>\n{scrolling("Scores by class", table)}\n<ul class="quiet">{"".join(notes)}</ul>\n'
        f'<p class="quiet">{escape(METRIC_NOTE)}{known}</p>'
    )


def _group(convention: Convention) -> str:
    return f"{convention}, distances in {_UNITS[convention]}"


def _chart_section(report: Report) -> str:
    charts = []
    metrics: tuple[Metric, ...] = ("dice", "hd95")
    for metric in metrics:
        points = {
            name: [
                (case, scores["standard"][index][metric])
                for case, scores in report.cases.items()
                if not math.isnan(scores["standard"][index][metric])
            ]
            for index, name in enumerate(report.class_names)
        }
        label = "Dice" if metric == "dice" else "HD95, mm"
        charts.append(f"<figure>{box_plots(points, label=label, top=1.0 if metric == 'dice' else None)}</figure>")
    return (
        '<h2>Distributions</h2>\n<p class="quiet">Each dot is a case, in the standard convention; point at it for its '
        f'name.</p>\n<div class="charts">{"".join(charts)}</div>'
    )


def _worst_section(report: Report, pictures: Mapping[str, bytes], links: Mapping[str, str]) -> str:
    order = report.worst_first()
    items = []
    for case in order[:MOST_PICTURES]:
        image = ""
        if case in pictures:
            data = base64.b64encode(pictures[case]).decode()
            image = (
                f'<a href="{escape(links[case])}"><img alt="Slices of {escape(case)} with its masks" '
                f'src="data:image/png;base64,{data}"></a>'
            )
        items.append(
            f"<li><figure><figcaption><strong>{escape(case)}</strong>, {escape(_worst_classes(report, case))}"
            f"</figcaption>{image}</figure></li>"
        )
    further = [case for case in order[MOST_PICTURES:] if case in links]
    more = ""
    if further:
        rest = "".join(f'<li><a href="{escape(links[case])}">{escape(case)}</a></li>' for case in further)
        more = f"<details><summary>Pictures of {len(further)} more, worst first</summary><ul>{rest}</ul></details>"
    return f'<h2>Worst cases first</h2>\n<ol class="cases">{"".join(items)}</ol>{more}'


def _worst_classes(report: Report, case: str, *, most: int = 3) -> str:
    """Mean Dice of a case and its lowest classes."""
    scored = [
        (score["dice"], name)
        for score, name in zip(report.cases[case]["standard"], report.class_names, strict=True)
        if not math.isnan(score["dice"])
    ]
    if not scored:
        return "no class in either mask"
    lowest = ", ".join(f"{name} {dice:.2f}" for dice, name in sorted(scored)[:most])
    among = f"; {lowest}" if len(report.class_names) > 1 else ""
    return f"mean Dice {report.case_dice(case):.4f}{among}"


def _case_section(report: Report) -> str:
    rows = []
    for case, scores in report.cases.items():
        for index, name in enumerate(report.class_names):
            there = presence(scores, index)
            flag = ' class="flag"' if there in ("missed", "spurious") else ""
            cells = [name_cell(case), f"<td>{escape(name)}</td>", f"<td{flag}>{_PRESENCES[there]}</td>"]
            for convention in CONVENTIONS:
                cells += score_cells(scores[convention][index])
            rows.append(cells)
    header = ["Case", "Class", "Found in", *(METRIC_TITLES[metric] for _ in CONVENTIONS for metric in METRICS)]
    groups = [("", 3), *((_group(convention), len(METRICS)) for convention in CONVENTIONS)]
    return f"<h2>All cases</h2>\n{scrolling('Scores by case', sortable_table(header, rows, groups=groups, names=3))}"


def _settings_section(report: Report) -> str:
    shown = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in report.settings.items()
        if name != "failed_cases"  # they stand on top
    }
    if not shown:
        return ""
    rows = "".join(f"<tr>{name_cell(name)}<td>{escape(text)}</td></tr>" for name, text in shown.items())
    return f'<h2>Settings</h2>\n<div class="scroll"><table><tbody>{rows}</tbody></table></div>'
