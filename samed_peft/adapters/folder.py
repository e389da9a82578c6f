"""Find an adapter's files on this disk or on the Hub, and read its config and report; without PyTorch."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from samed_peft.config import SamedConfig, is_hub_id
from samed_peft.errors import InputError
from samed_peft.io import check_files, file_sha256, read_json, read_text, with_checksums, without_checksums, write_json

if TYPE_CHECKING:
    from samed_peft.evaluation.report import Report

WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_FILE = "adapter_config.json"
CONFIG_FILE = "samed_config.json"
CARD_FILE = "README.md"
REPORT_FILE = "report.json"

ADAPTER_FILES = (WEIGHTS_FILE, PEFT_FILE, CONFIG_FILE, CARD_FILE)
"""All files of an adapter; checkpoints and other files beside it do not belong to it."""


def read_config(folder: Path) -> SamedConfig:
    """Read `samed_config.json` of an adapter directory.

    Raises:
        InputError: the file is missing or damaged.
    """
    values = without_checksums(_recorded(folder), folder / CONFIG_FILE)
    try:
        return SamedConfig.from_dict(values)
    except InputError as error:
        raise InputError(f"{folder / CONFIG_FILE}: {error}") from error


def _recorded(folder: Path) -> dict[str, Any]:
    """All values of `samed_config.json`, its checksums among them."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise InputError(
            f"{folder} is not an adapter directory: it lacks {CONFIG_FILE}; save_adapter writes one, and SAMed's own "
            ".pth files must be converted first"
        )
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected an object of fields, found {type(values).__name__}; save the adapter again")
    return values


def require_complete(folder: Path) -> None:
    """Require an adapter's weights and settings.

    Raises:
        InputError: naming those that are missing.
    """
    if missing := [name for name in (WEIGHTS_FILE, PEFT_FILE) if not (folder / name).is_file()]:
        raise InputError(f"{folder} is not a complete adapter: it lacks {' and '.join(missing)}; save it again")


def check_adapter_files(folder: Path) -> None:
    """Compare an adapter's weights and settings with the checksums in its `samed_config.json`, if it has any.

    Model card and report are not covered: they change when the adapter is scored.

    Raises:
        InputError: naming the file that was damaged or edited.
    """
    check_files(_recorded(folder), folder / CONFIG_FILE, (WEIGHTS_FILE, PEFT_FILE))


def config_values(config: SamedConfig, *, weights: str, settings: str) -> dict[str, Any]:
    """The content of `samed_config.json`, with checksums.

    Args:
        config: the adapter's config.
        weights: SHA-256 of its weights' file.
        settings: SHA-256 of PEFT's file.
    """
    return with_checksums(config.to_dict(), CONFIG_FILE, {WEIGHTS_FILE: weights, PEFT_FILE: settings})


def write_config(config: SamedConfig, folder: Path) -> None:
    """Write `samed_config.json` beside an adapter's weights and PEFT's file, with checksums of all three."""
    weights, settings = (file_sha256(folder / name) for name in (WEIGHTS_FILE, PEFT_FILE))
    write_json(folder / CONFIG_FILE, config_values(config, weights=weights, settings=settings))


def adapter_folder(source: str | Path, *, revision: str | None = None) -> Path:
    """The folder of an adapter's files; those of a Hub id are fetched, or found in the cache when offline.

    Args:
        source: folder, also that of the run that trained the adapter, or Hub id.
        revision: branch, tag or commit of the Hub's repository; None for its main branch.

    Raises:
        InputError: `source` is neither a folder nor a Hub id, or cannot be fetched.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise InputError(
                f"expected no revision for the folder {source}, found {revision!r}: only repositories on the Hub have "
                "revisions; leave it out"
            )
        return adapter_within(folder)
    if not is_hub_id(str(source)):
        raise InputError(f"{source} is neither an adapter directory nor a Hub id such as name/adapter")
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=[*ADAPTER_FILES, REPORT_FILE]))
    except (httpx2.HTTPError, OSError, RuntimeError) as error:  # the last from xet
        raise InputError(_fetch_problem(str(source), revision, error)) from error


def adapter_within(folder: Path) -> Path:
    """The folder of an adapter, given itself or the folder of the run that trained it.

    Raises:
        InputError: the run has no adapter yet or two, or the folder is a checkpoint.
    """
    if (folder / CONFIG_FILE).is_file():
        return folder
    found = [path for name in ("adapter_best", "adapter") if ((path := folder / name) / CONFIG_FILE).is_file()]
    if len(found) > 1:
        raise InputError(
            f"{folder} holds two adapters, {found[0].name} of the best validation and {found[1].name} of the last "
            f"epoch; give {found[0]} or {found[1]}"
        )
    around = folder.parent.parent if folder.name.startswith("step-") else folder.parent
    run = around if (folder / "state.json").is_file() or folder.name == "checkpoints" else folder
    if not found and (run / "run.json").is_file():
        ready = f"give {run / 'adapter'}" if (run / "adapter").is_dir() else "resume the training with --resume"
        raise InputError(
            f"expected an adapter, found {'a training run' if run == folder else 'checkpoints of a training'} in "
            f"{folder}; adapters are saved at the end of each epoch, checkpoints only resume a training: {ready}"
        )
    return found[0] if found else folder


def _fetch_problem(source: str, revision: str | None, error: Exception) -> str:
    fetched = f"the adapter {source}" + ("" if revision is None else f" at revision {revision}")
    problem = f"{fetched} cannot be fetched from the Hub: "
    if isinstance(error, RevisionNotFoundError):
        return f"{problem}it has no such revision; give one of its branches, tags or commits"
    if isinstance(error, RepositoryNotFoundError) or (
        isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
    ):
        return f"{problem}it does not exist or is private; check its name, and your token if it is private"
    return f"{problem}{first_line(error)}; check its name, your connection and HF_TOKEN, or give its folder"


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type if the text is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def find_report(directory: Path, config: SamedConfig) -> "tuple[Path, Report | None]":
    """Find the folder of the adapter's report, and the report; None if the adapter was not evaluated.

    A report counts as the adapter's if it names the same classes and lies in its folder, or in the folder around it
    where the model card shows scores.

    Raises:
        InputError: the report is damaged.
    """
    around = Path(os.path.abspath(directory)).parent
    card = directory / CARD_FILE
    scored = card.is_file() and "model-index:" in read_text(card)
    for folder in (directory, *([around] if scored else [])):
        if (folder / REPORT_FILE).is_file():
            values = read_json(folder / REPORT_FILE)
            if isinstance(values, dict) and _is_report_of(values, config):
                return folder, _report(values, folder / REPORT_FILE)
    return directory, None


def _is_report_of(values: Mapping[str, Any], config: SamedConfig) -> bool:
    kinds = {"standard": dict, "samed": dict, "cases": list, "settings": dict}
    complete = all(isinstance(values.get(key), kind) for key, kind in kinds.items())
    classes = values["standard"].get("classes") if complete else None
    return isinstance(classes, dict) and tuple(classes) == config.class_names


def _report(values: Mapping[str, Any], path: Path) -> "Report":
    from samed_peft.evaluation.report import Report  # imports SciPy, which adapters without a report do not need

    try:
        return Report.from_dict(values)
    except InputError as error:
        raise InputError(
            f"expected a report of this package in {path}, found another ({error}); make it again, or move it elsewhere"
        ) from error
