"""report.html: one page that needs no network, works from a file and shows names as they are, never as markup."""

import base64
import hashlib
import json
import math
from collections.abc import Mapping

from markupsafe import Markup

from samed_peft.evaluation.charts import box_plots
from samed_peft.evaluation.render import asset, render
from samed_peft.evaluation.report import Report
from samed_peft.evaluation.tables import MAIN_METRICS, metric_title
from samed_peft.metrics import CONVENTIONS, METRICS, Interval, Metric

MOST_PICTURES = 12
"""Pictures inside the page, about a quarter of a megabyte each; further ones are linked."""


def html_page(report: Report, *, pictures: Mapping[str, bytes], links: Mapping[str, str]) -> str:
    """The report as one page: tables that sort, distributions, and the worst cases with their pictures.

    Pictures (case -> PNG) of these cases become part of the page; links (case -> path) lead to all of them.
    """
    style, script = asset("report.css"), asset("report.js")
    worst = report.worst_first()
    return render(
        "report.html.jinja",
        report=report,
        style=style,
        script=script,
        hashes=[base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)],
        score_groups=[
            (f"{convention}, distances in {METRICS['hd95'].unit_in(convention)}", list(map(metric_title, METRICS)))
            for convention in CONVENTIONS
        ],
        short_interval=_short_interval,
        charts=[_chart(report, metric) for metric in MAIN_METRICS],
        worst={case: _worst_classes(report, case) for case in worst[:MOST_PICTURES]},
        pictures={
            case: base64.b64encode(pictures[case]).decode() for case in worst[:MOST_PICTURES] if case in pictures
        },
        further=[case for case in worst[MOST_PICTURES:] if case in links],
        links=links,
        settings={
            name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for name, value in report.settings.items()
            if name != "failed_cases"  # they stand on top
        },
    )


def _chart(report: Report, metric: Metric) -> Markup:
    """Distribution of a metric over the cases, in the standard convention."""
    points = {
        name: [
            (case, scores["standard"][index][metric])
            for case, scores in report.cases.items()
            if not math.isnan(scores["standard"][index][metric])
        ]
        for index, name in enumerate(report.class_names)
    }
    record = METRICS[metric]
    label = ", ".join(filter(None, (record.title, record.unit_in("standard"))))
    return box_plots(points, label=label, top=None if record.unit else 1.0)


def _short_interval(metric: Metric, interval: Interval) -> str:
    """With one digit less than the score if that is enough, so that both conventions fit side by side."""
    if math.isnan(interval[0]):
        return "no interval"
    digits = METRICS[metric].digits
    digits -= digits > 2 or interval[1] >= 10
    return f"{interval[0]:.{digits}f}\u2013{interval[1]:.{digits}f}"


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
    return f"mean Dice {report.case_mean(case):.4f}{among}"
