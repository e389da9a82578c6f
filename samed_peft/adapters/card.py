"""The README of an adapter: what it is, how to use it, what it scores."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from samed_peft.config import METHODS, SYNAPSE_NAME, TINY_SAM, SamedConfig, is_hub_id
from samed_peft.datasets.layouts import DECATHLON

_TAGS = ["samed", "segment-anything", "medical", "image-segmentation"]
_CONVENTIONS = {
    "standard": "`standard`: millimetres; undefined scores are left out of the means.",
    "samed": "`samed`: voxels, absent organs scored as in the code of SAMed.",
}
_CITATIONS = {
    "samed": """\
@article{zhang2023samed,
  title   = {Customized Segment Anything Model for Medical Image Segmentation},
  author  = {Zhang, Kaidong and Liu, Dong},
  journal = {arXiv preprint arXiv:2304.13785},
  year    = {2023}
}""",
    "sam": """\
@article{kirillov2023segment,
  title   = {Segment Anything},
  author  = {Kirillov, Alexander and others},
  journal = {arXiv preprint arXiv:2304.02643},
  year    = {2023}
}""",
    SYNAPSE_NAME: """\
@misc{landman2015btcv,
  title  = {Multi-Atlas Labeling Beyond the Cranial Vault: Workshop and Challenge},
  author = {Landman, Bennett and others},
  doi    = {10.7303/syn3193805},
  year   = {2015}
}""",
    DECATHLON: """\
@article{antonelli2022decathlon,
  title   = {The Medical Segmentation Decathlon},
  author  = {Antonelli, Michela and others},
  journal = {Nature Communications},
  volume  = {13},
  pages   = {4128},
  doi     = {10.1038/s41467-022-30695-9},
  year    = {2022}
}""",
}
"""BibTeX of what every adapter rests on, and of known data by the beginning of their names."""


def model_card(
    config: SamedConfig,
    *,
    report: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> str:
    """The adapter's README.md, with the Hub's YAML front matter.

    Folders of this machine are named by their last part only, as the card may be published.

    Args:
        config: what the adapter is.
        report: content of a `report.json`, whose scores are shown; None if the adapter was not evaluated.
        training: settings it was trained with, as JSON values.
    """
    base = _base_label(config)
    parts = [
        _front_matter(config, report),
        f"# SAMed adapter of {base}",
        f"An adapter that makes the Segment Anything Model `{base}` segment {_counted(config)} in medical scans, slice "
        "by slice and without prompts, as proposed by SAMed (arXiv 2304.13785). "
        f"Method: {METHODS[config.method].summary}.",
        *_warnings(config),
        "## How to use",
        _usage(config),
        "## Classes",
        _table(("Label", "Class"), list(enumerate(config.class_names, start=1))),
    ]
    if report is not None:
        parts += ["## Scores", *_scores(report)]
    parts += ["## Intended use and limits", _limits(config), "## Settings"]
    parts.append(_table(("Setting", "Value"), _settings(config)))
    if training:
        parts += ["## Training", *_trained_on(report), _table(("Setting", "Value"), list(training.items()))]
    parts += ["## Citation", _citations(report)]
    return "\n\n".join(parts) + "\n"


def _is_bundled(config: SamedConfig) -> bool:
    return config.base == TINY_SAM


def _base_label(config: SamedConfig) -> str:
    # Split on both separators: an adapter trained on Windows may be described elsewhere.
    return config.base if is_hub_id(config.base) else re.split(r"[/\\]", config.base.rstrip("/\\"))[-1]


def _counted(config: SamedConfig) -> str:
    number = len(config.class_names)
    return "one class" if number == 1 else f"{number} classes"


def _dataset(report: Mapping[str, Any] | None) -> str | None:
    found = None if report is None else report["settings"].get("dataset")
    return None if found is None else _text(found)


def _trained_on(report: Mapping[str, Any] | None) -> list[str]:
    dataset = _dataset(report)
    return [] if dataset is None else [f"Trained on other cases of {dataset} than those scored above."]


def _citations(report: Mapping[str, Any] | None) -> str:
    dataset = _dataset(report) or ""
    known = [text for name, text in _CITATIONS.items() if name in ("samed", "sam") or dataset.startswith(name)]
    return "\n".join(["```bibtex", *known, "```"])


def _limits(config: SamedConfig) -> str:
    seen = "pictures and scans" if config.window is None else f"scans with intensities in {list(config.window)}"
    lying = "" if config.orientation is None else f", whose slices lie as in {config.orientation} volumes"
    return (
        f"For research on {seen} like those it was trained on{lying}. Other scanners, protocols, people and "
        "diseases than those it was scored on can give masks that are wrong without any sign of it. Whatever is "
        "none of the classes above is background to it, and neighbouring slices know nothing of each other."
    )


def _front_matter(config: SamedConfig, report: Mapping[str, Any] | None) -> str:
    from huggingface_hub import ModelCardData

    tags = [*_TAGS, config.method]
    fields: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "image-segmentation", "tags": tags}
    if is_hub_id(config.base):
        fields["base_model"] = config.base
    results = [] if report is None else _eval_results(report)
    if results:
        fields |= {"model_name": f"SAMed adapter of {_base_label(config)}", "eval_results": results}
    return f"---\n{ModelCardData(**fields).to_yaml(line_break=chr(10))}\n---"


def _eval_results(report: Mapping[str, Any]) -> list[Any]:
    """For the Hub's model-index: means, and Dice and HD95 of each class, both conventions; undefined ones left out."""
    from huggingface_hub import EvalResult

    dataset = _dataset(report) or "held-out cases"
    found = []
    for convention in _CONVENTIONS:
        summary = report[convention]
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
            dataset_name=dataset,
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for metric, name, value in found
        if _is_defined(value)
    ]


def _warnings(config: SamedConfig) -> list[str]:
    notes = [
        "**Not a medical device.** This adapter is for research. It has no approval for diagnosis or "
        "treatment, and its masks must be checked by someone qualified before anything depends on them."
    ]
    if _is_bundled(config):
        notes.append(
            "**The base is no SAM.** It is the tiny stand-in that ships with samed_peft for demonstrations "
            "and tests; scores on it say nothing about the Segment Anything Model."
        )
    return notes


def _usage(config: SamedConfig) -> str:
    base = "" if is_hub_id(config.base) or _is_bundled(config) else ', base="path/to/the/base"'
    lines = [
        "```python",
        "from samed_peft import load_adapter, predict_volume, read_volume, write_mask",
        "",
        f'model = load_adapter("path/or/hub-id"{base})',
        'scan = read_volume("scan.nii.gz")',
        "mask = predict_volume(model, scan)  # (D, H, W) uint8, 0 is background",
        'write_mask(mask, scan, "mask.nii.gz")',
        "```",
    ]
    return "\n".join(lines)


def _settings(config: SamedConfig) -> list[tuple[str, Any]]:
    values = config.to_dict()
    values["base"] = _base_label(config)
    unused = {"rank", "targets"} - set(METHODS[config.method].options)
    for name in ("class_names", *unused):  # classes have a table of their own
        del values[name]
    listed = {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in values.items()}
    return [(name, value) for name, value in listed.items() if value is not None]


def _scores(report: Mapping[str, Any]) -> list[str]:
    settings = report["settings"]
    header = ["Class", "Dice", "HD95 (mm)", "Cases", "Dice (samed)", "HD95 (samed, voxels)"]
    rows: list[list[Any]] = []
    for name, standard in report["standard"]["classes"].items():
        samed = report["samed"]["classes"][name]
        counts = f"{standard['n_valid']}/{standard['n_cases']}"
        rows.append([name, *_pair(standard), counts, *_pair(samed)])
    rows.append(["mean", *_pair(report["standard"]["mean"]), "", *_pair(report["samed"]["mean"])])
    cases = len(report["cases"])
    intro = f"{cases} cases of {_text(settings['dataset'])}." if "dataset" in settings else f"{cases} cases."
    note = [_text(settings["note"])] if "note" in settings else []
    return [*note, f"{intro} {' '.join(_CONVENTIONS.values())}", _table(header, rows)]


def _pair(score: Mapping[str, float | None]) -> tuple[str, str]:
    dice, hd95 = score["dice"], score["hd95"]
    return (
        f"{dice:.4f}" if _is_defined(dice) else "n/a",
        f"{hd95:.2f}" if _is_defined(hd95) else "n/a",
    )


def _is_defined(value: float | None) -> bool:
    return value is not None and value == value  # NaN, which a report in memory may hold, differs from itself


def _text(value: Any) -> str:
    """A value for the card; of an absolute path only its last part, which gives away nothing."""
    text = str(value)
    parts = re.split(r"[/\\]", text.rstrip("/\\"))
    is_path = text.startswith(("/", "~")) or re.match(r"[A-Za-z]:[/\\]", text)
    return parts[-1] if is_path and parts[-1] else text


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[_text(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [list(header), ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
