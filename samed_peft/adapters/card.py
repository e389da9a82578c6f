"""Write the README of an adapter: contents, use, scores and limits."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from samed_peft.adapters.places import published_base, without_place
from samed_peft.config import METHODS, SYNAPSE_NAME, TINY_SAM, SamedConfig, is_hub_id, windows_text
from samed_peft.datasets.dataset_json import DECATHLON
from samed_peft.evaluation.report import Report
from samed_peft.evaluation.tables import (
    MAIN_COLUMNS,
    column_titles,
    markdown_code,
    markdown_table,
    markdown_text,
    plain_line,
    score_rows,
    with_counts,
)
from samed_peft.io import stored_names
from samed_peft.metrics import CONVENTIONS

_TEMPLATE = Path(__file__).with_name("card_template.md")
_TAGS = ["samed", "segment-anything", "medical", "image-segmentation"]


def model_card(config: SamedConfig, *, report: Report | None = None, training: Mapping[str, Any] | None = None) -> str:
    """The adapter's README.md, with the Hub's YAML front matter.

    Folders of this machine are named by their last part only, as the card may be published.
    """
    dataset = _dataset(report)
    number = len(config.class_names)
    card = ModelCard.from_template(
        _front_matter(config, report),
        template_path=str(_TEMPLATE),
        base=markdown_text(published_base(config.base)),
        base_code=markdown_code(published_base(config.base)),
        has_public_base=is_hub_id(config.base) or config.base == TINY_SAM,
        is_tiny=config.base == TINY_SAM,
        method=METHODS[config.method].summary,
        counted_classes="one class" if number == 1 else f"{number} classes",
        classes_table=_table(["Label", "Class"], stored_names(config.class_names, config.label_values)),
        label_values=config.label_values,
        regions_table=_table(["Region", "Classes"], _joined(config.classes_of_regions)) if config.regions else "",
        dataset=markdown_text(dataset),
        is_synapse=dataset.startswith(SYNAPSE_NAME),
        is_decathlon=dataset.startswith(DECATHLON),
        **_scores(report),
        window=windows_text(config.window),
        channels=markdown_text(config.channel_text),
        orientation=config.orientation,
        neighbour_mm=None if config.neighbour_mm is None else f"{config.neighbour_mm:g}",
        settings_table=_table(["Setting", "Value"], _settings(config)),
        training_table=_table(["Setting", "Value"], training) if training else "",
    )
    return f"{card}\n"


def _joined(lists: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {name: ", ".join(items) for name, items in lists.items()}


def _dataset(report: Report | None) -> str:
    return "" if report is None else str(without_place(report.settings.get("dataset", "")))


def _table(header: Sequence[str], values: Mapping[Any, Any]) -> str:
    rows = [(name, without_place(value)) for name, value in values.items()]
    return markdown_table(header, rows, text_columns=2)


def _scores(report: Report | None) -> dict[str, Any]:
    """Note, number of cases and table of the section with scores; an adapter without a report has none."""
    if report is None:
        return {"scores_table": ""}
    header = ["Class", *column_titles(MAIN_COLUMNS)]
    header.insert(3, "Cases")
    rows = _rows_with_counts(report)
    if report.regions is not None:
        *regions, mean = _rows_with_counts(report.regions)
        rows += [*([f"region {name}", *cells] for name, *cells in regions), ["mean of regions", *mean[1:]]]
    return {
        "note": markdown_text(without_place(report.settings.get("note", ""))),
        "n_cases": report.n_cases,
        "scores_table": markdown_table(header, rows),
    }


def _rows_with_counts(report: Report) -> list[list[str]]:
    counts = [[f"{scores['n_valid']}/{report.n_cases}"] for scores in report.summary["standard"]["classes"].values()]
    return with_counts(score_rows(report, MAIN_COLUMNS), counts, at=3)


def _front_matter(config: SamedConfig, report: Report | None) -> ModelCardData:
    tags = [*_TAGS, config.method]
    fields: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "image-segmentation", "tags": tags}
    if is_hub_id(config.base):
        fields["base_model"] = config.base
    results = [] if report is None else _eval_results(report)
    if results:
        fields |= {"model_name": f"SAMed adapter of {plain_line(published_base(config.base))}", "eval_results": results}
    return ModelCardData(**fields)


def _eval_results(report: Report) -> list[EvalResult]:
    """For the Hub's model-index: means, and Dice and HD95 of each class, both conventions; undefined ones left out."""
    found = []
    for convention in CONVENTIONS:
        summary = report.summary[convention]
        found += [(metric, f"{metric} ({convention})", value) for metric, value in summary["mean"].items()]
        found += [
            (metric, f"{metric} of {name} ({convention})", scores[metric])
            for name, scores in summary["classes"].items()
            for metric in ("dice", "hd95")
        ]
    return [
        EvalResult(
            task_type="image-segmentation",
            dataset_type="medical-scans",
            dataset_name=plain_line(_dataset(report)) or "held-out cases",
            metric_type=metric,
            metric_name=plain_line(name),
            metric_value=round(value, 4),
        )
        for metric, name, value in found
        if not math.isnan(value)
    ]


def _settings(config: SamedConfig) -> dict[str, Any]:
    values = config.to_dict() | {"base": published_base(config.base)}
    unused = {"rank", "targets"} - set(METHODS[config.method].options)
    for name in ("class_names", "label_values", "regions", *unused):  # classes and regions have tables of their own
        del values[name]
    listed = {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in values.items()}
    return {name: value for name, value in listed.items() if value is not None}
