"""What of an adapter is published: its own files and its scores, without places on this machine and names of cases.

Everything is made in memory; the files on disk are only read.
"""

import json
import os
import platform
import re
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from samed_peft.adapters.folder import (
    ADAPTER_FILES,
    CARD_FILE,
    CONFIG_FILE,
    PEFT_FILE,
    WEIGHTS_FILE,
    find_report,
    read_config,
)
from samed_peft.config import TINY_SAM, TINY_SAM_NOTE, SamedConfig, is_hub_id
from samed_peft.errors import InputError
from samed_peft.io import list_folder, naming_unreadable, read_json, read_text, tensor_shapes

_WORD = r"""[^\s|`"'<>()\[\]{},;]"""
_REST = rf"{_WORD}*(?:(?: (?![/\\~])(?:(?![:=/\\]){_WORD})+){{1,3}}[/\\]{_WORD}*)*"
"""To the end of a path: up to three words before a separator are taken for a part of it, to be safe."""
_PLACE = re.compile(
    rf"(?:file|smb|nfs|ssh|sftp|s3|gs)://{_REST}|[\w.+-]+@[\w.-]+:(?=[/~]){_REST}|"
    rf"(?<![\w./<~\\-])(?:~[\w.-]*/|\$\w+/|/(?=[\w.@$%+-])|(?<!:)//(?=[\w.-]+/)|[A-Za-z]:[\\/]|"
    rf"\\\\(?=[\w.-]+\\)){_REST}"
)
"""Absolute paths of any system in running text; fractions, units, web addresses and closing tags are none."""

_SAFE_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
"""Of a PNG, what its pixels need; the others may say who made it from what, and when."""


def published_files(directory: str | Path, *, pictures: bool = False, cases: bool = False) -> dict[str, bytes]:
    """Name in the repository -> content, of all that is published of an adapter.

    A base on this machine is named by the last part of its path; its fingerprint identifies it. A report counts as
    the adapter's if it names the same classes and lies in its folder, or in the folder around it where the model card
    shows scores.

    Args:
        directory: what `save_adapter` wrote.
        pictures: also the report's pictures, under numbers unless `cases`, and without any text stored in them.
        cases: keep the cases' names and their own scores; otherwise only means over cases are published.

    Raises:
        InputError: the directory is no complete adapter, a file in it is damaged, or there are no pictures.
    """
    directory = Path(directory)
    _require_complete(directory)
    config = read_config(directory)
    tensor_shapes(directory / WEIGHTS_FILE)
    folder, report = find_report(directory, config)
    names = [] if cases else _case_names(report)
    published = {
        WEIGHTS_FILE: _plain_weights(_read(directory / WEIGHTS_FILE)),
        PEFT_FILE: _peft_settings(directory / PEFT_FILE),
        CONFIG_FILE: _settings(directory / CONFIG_FILE, config),
        CARD_FILE: _card(directory, config, names),
    }
    if report:
        published |= _report_files(folder, report, config, cases=cases)
    if pictures:
        published |= _pictures(folder / "pictures", named=cases)
    return published


def _require_complete(directory: Path) -> None:
    missing = [
        name for name in ADAPTER_FILES if not (directory / name).is_file() or (directory / name).stat().st_size == 0
    ]
    if missing:
        raise InputError(
            f"expected the adapter files {', '.join(ADAPTER_FILES)} in {directory}; "
            f"missing or empty: {', '.join(missing)}. Give the folder that save_adapter wrote"
        )


def _read(path: Path) -> bytes:
    with naming_unreadable(path):
        return path.read_bytes()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _plain_weights(data: bytes) -> bytes:
    """A safetensors file without what others may have noted in its header."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if not header.get("__metadata__", {}).keys() - {"format"}:
        return data
    header["__metadata__"] = {"format": "pt"}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _is_place(text: str) -> bool:
    return re.match(r"~[\w.-]*/|/|\\\\|[A-Za-z]:[\\/]|file:", text) is not None


def _last_part(place: str) -> str:
    # Both separators: an adapter made on Windows may be published elsewhere.
    return re.split(r"[/\\]", place.rstrip("/\\"))[-1] or "base"


def published_base(base: str) -> str:
    """A base as others may know it: the name of a Hub repository, or the last part of a path."""
    return base if base == TINY_SAM or is_hub_id(base) else _last_part(base)


def _settings(path: Path, config: SamedConfig) -> bytes:
    base = published_base(config.base)
    return _read(path) if base == config.base else _json(config.to_dict() | {"base": base})


def _peft_settings(path: Path) -> bytes:
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"expected an adapter's settings in {path}, found {type(values).__name__}; save it again")
    clean = _without_places_in(values)
    base = values.get("base_model_name_or_path")
    if isinstance(base, str):
        clean["base_model_name_or_path"] = published_base(base)
    return _read(path) if clean == values else _json(clean)


def _without_places_in(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places_in(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_places_in(entry) for entry in value]
    return _last_part(value) if isinstance(value, str) and _is_place(value) else value


def _card(directory: Path, config: SamedConfig, cases: Iterable[str]) -> bytes:
    known = [config.base, os.path.abspath(directory), str(Path.home())]
    text = read_text(directory / CARD_FILE)
    clean = without_places(text, [place for place in known if _is_place(place)])
    clean = _without_words(clean, [*_telling(cases, config), *_host_names()])
    return _read(directory / CARD_FILE) if clean == text else clean.encode()


def without_places(text: str, known: Iterable[str] = ()) -> str:
    """`text` with absolute paths reduced to their last part; those in `known` may have spaces in them."""
    for place in sorted(known, key=len, reverse=True):
        if len(place) > 3:  # not / and C:\
            text = re.sub(re.escape(place) + _REST, lambda found: _last_part(found[0]), text)
    return _PLACE.sub(lambda found: _last_part(found[0]), text)


def _without_words(text: str, words: Iterable[str]) -> str:
    for word in words:
        text = re.sub(rf"(?<![\w.-]){re.escape(word)}(?![\w-])", "(left out)", text)
    return text


def _telling(cases: Iterable[str], config: SamedConfig) -> list[str]:
    """Names of cases that are no common words or numbers, longest first."""
    words = [case for case in cases if len(case) > 3 and re.search(r"\d", case) and case not in config.class_names]
    return sorted(words, key=len, reverse=True)


def _host_names() -> list[str]:
    host = platform.node()  # such as gpu03.example.org or DESKTOP-1A2B; a plain word may be meant otherwise
    names = {host, host.split(".")[0]}
    return [name for name in sorted(names, key=len, reverse=True) if len(name) > 3 and re.search(r"[\d.-]", name)]


def _report_files(folder: Path, report: Mapping[str, Any], config: SamedConfig, *, cases: bool) -> dict[str, bytes]:
    try:
        chosen = _published_report(report, config, cases=cases)
        texts = {"report.json": _json(chosen), "report.md": _markdown(chosen).encode()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"expected a report of this package in {folder / 'report.json'}, found another ({error!r}); make it again, "
            "or move it elsewhere"
        ) from error
    return {name: text for name, text in texts.items() if (folder / name).is_file()}


def _case_names(report: Mapping[str, Any]) -> list[str]:
    if not report:
        return []
    settings = report["settings"]
    others = [settings.get(key, ()) for key in ("cases_without_spacing", "cases_without_image", "failed_cases")]
    rows = [str(row.get("case")) for row in report["cases"] if isinstance(row, dict)]
    return rows + [str(case) for names in others for case in names]


def _published_report(report: Mapping[str, Any], config: SamedConfig, *, cases: bool) -> dict[str, Any]:
    """What is said of a report: a choice of what is known to be harmless, not what is left of it."""
    found = report["settings"]
    settings = {key: found[key] for key in ("surface_dice_tolerance_mm",) if key in found}
    if "dataset" in found:
        dataset = without_places(str(found["dataset"]))
        settings["dataset"] = _without_words(dataset, () if cases else _telling(_case_names(report), config))
    if config.base == TINY_SAM:
        settings["note"] = TINY_SAM_NOTE
    if cases and "failed_cases" in found:
        settings["failed_cases"] = dict.fromkeys(found["failed_cases"], "left out")
    kept = ("mean", "mean_ci95", "classes")
    scores = {name: _figures({key: report[name].get(key) for key in kept}) for name in ("standard", "samed")}
    rows = list(report["cases"]) if cases else []
    return {**scores, "cases": rows, "n_cases": len(report["cases"]), "settings": settings}


def _figures(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are numbers, lists of numbers or undefined, at any depth."""
    figures: dict[str, Any] = {}
    for name, value in scores.items():
        entries = value if isinstance(value, list) else [value]
        if isinstance(value, dict):
            figures[name] = _figures(value)
        elif all(entry is None or isinstance(entry, int | float) for entry in entries):
            figures[name] = value
    return figures


def _markdown(report: Mapping[str, Any]) -> str:
    """The published report to read, from nothing but itself."""
    from samed_peft.evaluation.report import CONVENTION_NOTES, markdown_cell, markdown_table
    from samed_peft.metrics import CONVENTIONS, METRICS, format_metric

    def scores(found: Mapping[str, Any]) -> list[str]:
        values = {key: found.get(key) for key in METRICS}
        return [format_metric(key, value) for key, value in values.items()]

    settings = report["settings"]
    parts = ["# Evaluation", *([settings["note"]] if "note" in settings else [])]
    parts.append(f"{report['n_cases']} cases" + (f" of {settings['dataset']}." if "dataset" in settings else "."))
    for convention in CONVENTIONS:
        summary = report[convention]
        rows = [
            [markdown_cell(name), *scores(found), f"{found['n_valid']}/{found['n_cases']}"]
            for name, found in summary["classes"].items()
        ]
        rows.append(["mean", *scores(summary["mean"]), ""])
        table = markdown_table(["Class", *METRICS, "n"], rows)
        parts += [f"## {convention}", CONVENTION_NOTES[convention], table]
        rows = [
            [markdown_cell(row["case"]), markdown_cell(name), *scores(found[convention])]
            for row in report["cases"]
            for name, found in row["classes"].items()
        ]
        parts += [markdown_table(["Case", "Class", *METRICS], rows)] if rows else []
    return "\n\n".join(parts) + "\n"


def _pictures(folder: Path, *, named: bool) -> dict[str, bytes]:
    files = [path for path in list_folder(folder) if path.suffix == ".png"] if folder.is_dir() else []
    if not files:
        raise InputError(f"expected a report's pictures in {folder} or around it, found none; leave pictures out")
    return {
        f"pictures/{path.name if named else f'case-{number:03}.png'}": _plain_png(path)
        for number, path in enumerate(files, start=1)
    }


def _plain_png(path: Path) -> bytes:
    """A PNG with its pixels alone."""
    data = _read(path)
    kept, position = [data[:8]], 8
    while position < len(data) and kept[-1][4:8] != b"IEND":
        (length,) = struct.unpack(">I", data[position : position + 4].rjust(4, b"\xff"))
        chunk = data[position : position + 12 + length]
        position += len(chunk)
        if len(chunk) < 12 + length or zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:]):
            break
        kept += [chunk] if chunk[4:8] in _SAFE_CHUNKS else []
    if data[:8] != b"\x89PNG\r\n\x1a\n" or kept[-1][4:8] != b"IEND":
        raise InputError(f"expected a PNG in {path}, found something else or a part of one; make the report again")
    return b"".join(kept)
