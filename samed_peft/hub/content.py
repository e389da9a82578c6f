"""Select what to publish of an adapter: its files and scores, without paths of this machine and names of cases.

Everything is made in memory; the files on disk are only read.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import safe_open

from samed_peft.adapters.folder import (
    ADAPTER_FILES,
    CARD_FILE,
    CONFIG_FILE,
    PEFT_FILE,
    WEIGHTS_FILE,
    adapter_within,
    check_adapter_files,
    config_values,
    find_report,
    read_config,
)
from samed_peft.adapters.places import is_place, published_base, without_place, without_places
from samed_peft.config import TINY_SAM, TINY_SAM_NOTE, SamedConfig
from samed_peft.errors import InputError
from samed_peft.evaluation.artefacts import CaseTable, report_text
from samed_peft.evaluation.report import Report
from samed_peft.evaluation.stored import Means
from samed_peft.evaluation.tables import column_titles, markdown_text
from samed_peft.io import list_folder, naming_unreadable, read_json, read_text, read_whole, tensor_shapes
from samed_peft.metrics import CONVENTIONS, METRICS, format_metric

_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def published_files(directory: str | Path, *, pictures: bool = False, cases: bool = False) -> dict[str, bytes]:
    """Make the files that are published of an adapter: name in the repository -> content.

    A base on this machine is named by the last part of its path; its fingerprint identifies it. A report counts as
    the adapter's if it names the same classes and lies in its folder, or in the folder around it where the model card
    shows scores.

    Args:
        directory: a folder that `save_adapter` wrote, or that of the run that trained the adapter.
        pictures: also the report's pictures, under numbers unless `cases`, and without any text stored in them.
        cases: keep the names and scores of single cases; otherwise only means over cases are published.

    Raises:
        InputError: the directory is not a complete adapter, a file in it is damaged, or pictures are missing.
    """
    return read_whole(adapter_within(Path(directory)), functools.partial(_published, pictures=pictures, cases=cases))


def _published(directory: Path, *, pictures: bool, cases: bool) -> dict[str, bytes]:
    _require_complete(directory)
    config = read_config(directory)
    tensor_shapes(directory / WEIGHTS_FILE)
    weights, settings = _plain_weights(directory / WEIGHTS_FILE), _peft_settings(directory / PEFT_FILE)
    check_adapter_files(directory)
    folder, report = find_report(directory, config)
    names = [] if cases else _case_names(report)
    published = {
        WEIGHTS_FILE: weights,
        PEFT_FILE: settings,
        CONFIG_FILE: _settings(directory, config, {WEIGHTS_FILE: weights, PEFT_FILE: settings}),
        CARD_FILE: _card(directory, config, names),
    }
    if report is not None:
        published |= _report_files(folder, report, config, cases=cases)
    if pictures:
        published |= _pictures(folder / "pictures", named=cases)
    return published


def _refuse_links(paths: Iterable[Path]) -> None:
    """A link may lead to any file of this machine, under a harmless name."""
    if links := [path for path in paths if path.is_symlink()]:
        raise InputError(
            f"expected a file of its own, found a link at {links[0]}; nothing is sent from elsewhere: put a copy there"
        )


def _require_complete(directory: Path) -> None:
    files = [directory / name for name in ADAPTER_FILES]
    around = Path(os.path.abspath(directory)).parent
    _refuse_links([*files, *(folder / name for folder in (directory, around) for name in ("report.json", "report.md"))])
    if missing := [file.name for file in files if not file.is_file() or file.stat().st_size == 0]:
        raise InputError(
            f"expected the adapter files {', '.join(ADAPTER_FILES)} in {directory}; "
            f"missing or empty: {', '.join(missing)}. Give the folder that save_adapter wrote"
        )


def _read(path: Path) -> bytes:
    with naming_unreadable(path):
        return path.read_bytes()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _plain_weights(path: Path) -> bytes:
    """A safetensors file without notes that other programs may have left in its header."""
    data = _read(path)
    with safe_open(path, framework="np") as file:
        if not (file.metadata() or {}).keys() - {"format"}:
            return data
    from safetensors.torch import load, save  # imports PyTorch, which files without notes do not need

    return save(load(data), metadata={"format": "pt"})


def _settings(directory: Path, config: SamedConfig, others: Mapping[str, bytes]) -> bytes:
    """The adapter's config, with checksums of the files as they are published."""
    base = published_base(config.base)
    if base == config.base and all(_read(directory / name) == content for name, content in others.items()):
        return _read(directory / CONFIG_FILE)
    weights, settings = (hashlib.sha256(others[name]).hexdigest() for name in (WEIGHTS_FILE, PEFT_FILE))
    return _json(config_values(dataclasses.replace(config, base=base), weights=weights, settings=settings))


def _peft_settings(path: Path) -> bytes:
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"expected an adapter's settings in {path}, found {type(values).__name__}; save it again")
    clean, base = without_place(values), values.get("base_model_name_or_path")
    clean |= {"base_model_name_or_path": published_base(base)} if isinstance(base, str) else {}
    return _read(path) if clean == values else _json(clean)


def _card(directory: Path, config: SamedConfig, cases: Iterable[str]) -> bytes:
    known = [config.base, os.path.abspath(directory), str(Path.home())]
    text = read_text(directory / CARD_FILE)
    clean = without_places(text, [place for place in known if is_place(place)])
    clean = _without_words(clean, [*_telling(cases, config), *_host_names()])
    return _read(directory / CARD_FILE) if clean == text else clean.encode()


def _without_words(text: str, words: Iterable[str]) -> str:
    for word in words:
        for form in {word, markdown_text(word)}:
            text = re.sub(rf"(?<![\w.-]){re.escape(form)}(?![\w-])", "(left out)", text)
    return text


def _telling(cases: Iterable[str], config: SamedConfig) -> list[str]:
    """Names of cases that identify one, longest first; common words and numbers do not."""
    words = [case for case in cases if len(case) > 3 and re.search(r"\d", case) and case not in config.class_names]
    return sorted(words, key=len, reverse=True)


def _host_names() -> list[str]:
    host = platform.node()  # such as gpu03.example.org or DESKTOP-1A2B; a plain word may be meant otherwise
    names = {host, host.split(".")[0]}
    return [name for name in sorted(names, key=len, reverse=True) if len(name) > 3 and re.search(r"[\d.-]", name)]


def _case_names(report: Report | None) -> list[str]:
    if report is None:
        return []
    others = ("cases_without_spacing", "cases_without_image", "failed_cases")
    return [*report.cases, *(str(case) for key in others for case in report.settings.get(key, ()))]


def _report_files(folder: Path, report: Report, config: SamedConfig, *, cases: bool) -> dict[str, bytes]:
    chosen = _published_report(report, config, cases=cases)
    files = {"report.json": _json(chosen.to_dict() | {"n_cases": chosen.n_cases})}
    if (folder / "report.md").is_file():
        files["report.md"] = report_text(chosen, _case_tables(chosen), links={}).encode()
    return files


def _published_report(report: Report, config: SamedConfig, *, cases: bool) -> Report:
    """The means, and of the settings only those that are known to be harmless."""
    found = report.settings
    settings = {key: found[key] for key in ("surface_dice_tolerance_mm",) if key in found}
    if "dataset" in found:
        dataset = without_places(str(found["dataset"]))
        settings["dataset"] = _without_words(dataset, () if cases else _telling(_case_names(report), config))
    if config.base == TINY_SAM:
        settings["note"] = TINY_SAM_NOTE
    if cases and "failed_cases" in found:
        settings["failed_cases"] = dict.fromkeys(found["failed_cases"], "left out")
    return dataclasses.replace(_without_cases(report, kept=cases), settings=settings)


def _without_cases(report: Report, *, kept: bool) -> Report:
    """The means alone, or with the scores of cases, of classes and regions."""
    means = Means(report.n_cases, report.summary, report.intervals)
    regions = None if report.regions is None else _without_cases(report.regions, kept=kept)
    return Report(report.class_names, report.cases if kept else {}, means=means, regions=regions)


def _case_tables(report: Report) -> Iterator[CaseTable]:
    """All metrics by case and class, a table for each convention."""
    for convention in CONVENTIONS if report.cases else ():
        rows = [
            [case, name, *(format_metric(metric, score[metric]) for metric in METRICS)]
            for case, scores in report.cases.items()
            for name, score in zip(report.class_names, scores[convention], strict=True)
        ]
        titles = column_titles([(convention, metric) for metric in METRICS])
        yield convention, ["Case", "Class", *titles], rows


def _pictures(folder: Path, *, named: bool) -> dict[str, bytes]:
    files = [path for path in list_folder(folder) if path.suffix == ".png"] if folder.is_dir() else []
    _refuse_links([folder, *files])
    if not files:
        raise InputError(f"expected a report's pictures in {folder} or around it, found none; leave pictures out")
    return {
        f"pictures/{path.name if named else f'case-{number:03}.png'}": _plain_png(path)
        for number, path in enumerate(files, start=1)
    }


def _plain_png(path: Path) -> bytes:
    """A PNG of the same pixels, without texts, dates and other notes."""
    data, clean = _read(path), io.BytesIO()
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.verify()  # all checksums but the last; the picture must then be opened again
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.load()
            picture.info = {key: value for key, value in picture.info.items() if key == "transparency"}
            picture.save(clean, "PNG")
        if _PNG_END not in data:
            raise ValueError("the last part is incomplete")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"expected a PNG in {path}, found something else or a part of one; make the report again"
        ) from error
    return clean.getvalue()
