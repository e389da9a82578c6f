"""Load several adapters that are averaged, and record which ones made the masks of a folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from samed_peft.adapters.folder import WEIGHTS_FILE, adapter_folder, read_config, require_complete
from samed_peft.config import SamedConfig
from samed_peft.errors import InputError
from samed_peft.io import file_sha256, read_json, read_whole, write_json

RECORD_FILE = "adapters.json"
"""File beside masks that names the adapters whose mean they show."""


@dataclass(frozen=True)
class AdapterSource:
    """An adapter that is found, and not loaded yet.

    Attributes:
        source: folder or Hub id, as it was given.
        folder: its files on this machine.
        config: what it is.
    """

    source: str
    folder: Path
    config: SamedConfig

    @cached_property
    def weights_sha256(self) -> str:
        """Fingerprint of its weights."""
        return file_sha256(self.folder / WEIGHTS_FILE)


def find_adapters(sources: Sequence[str | Path], *, revision: str | None = None) -> tuple[AdapterSource, ...]:
    """Find adapters to average, before their bases are loaded.

    Args:
        sources: folders or Hub ids.
        revision: branch, tag or commit of those on the Hub.

    Raises:
        InputError: one is not an adapter, has other classes than the first, or is given twice.
    """
    found: list[AdapterSource] = []
    for source in sources:
        folder = adapter_folder(source, revision=revision)
        config = read_whole(folder, read_config)
        require_complete(folder)
        found.append(AdapterSource(str(source), folder, config))
        first = found[0]
        if config.class_names != first.config.class_names:
            raise InputError(
                f"expected adapters of the same classes in the same order, found {', '.join(first.config.class_names)} "
                f"in {first.source} and {', '.join(config.class_names)} in {source}; average adapters of one task, or "
                "segment with one after the other"
            )
        if _stored(config) != _stored(first.config):
            raise InputError(
                f"expected adapters that write the same numbers into masks, found {_stored(first.config)} in "
                f"{first.source} and {_stored(config)} in {source}; average adapters of one task"
            )
        for other in found[:-1]:
            if other.weights_sha256 == found[-1].weights_sha256:
                raise InputError(
                    f"expected different adapters to average, found the same weights in {other.source} and {source}; "
                    "give each adapter once"
                )
    return tuple(found)


def _stored(config: SamedConfig) -> list[int]:
    """Numbers of the classes in masks."""
    return list(config.label_values or range(1, config.num_labels))


def common_channel(
    adapters: Sequence[AdapterSource], given: Sequence[int] | None
) -> tuple[int | tuple[int, ...] | None, bool | None]:
    """The channel that adapters segment, or several, and whether files hold one each, None if they disagree on that.

    Args:
        adapters: from `find_adapters`.
        given: the channels of these scans that the user chose, in the order of the adapters', or None.

    Raises:
        InputError: the adapters were trained on different channels, and the user chose none; or the user chose more or
            fewer channels than the adapters see.
    """
    channels = [adapter.config.channels or adapter.config.channel for adapter in adapters]
    counts = {len(adapter.config.channels or "1") for adapter in adapters}
    if len(counts) > 1 or (given is None and len(set(channels)) > 1):
        found = ", ".join(f"{a.config.channel_text or a.config.channel} in {a.source}" for a in adapters)
        expected, way_out = "that see the same channels", "average adapters of the same input"
        if counts == {1}:
            expected, way_out = "of one channel", "choose one with channel, --channel on the command line"
        raise InputError(f"expected adapters {expected}, found {found}; {way_out}")
    (count,) = counts
    if given is not None and len(given) != count:
        seen = adapters[0].config.channel_text or "a single channel"
        raise InputError(
            f"expected {count} channel{'s' * (count > 1)} for {adapters[0].source}, which sees {seen}, found "
            f"{len(given)}: {', '.join(map(str, given))}; give their numbers in these scans in that order, or leave "
            "channel out"
        )
    of_files = {adapter.config.channel_files for adapter in adapters}
    chosen = channels[0] if given is None else given[0] if count == 1 else tuple(given)
    return chosen, of_files.pop() if len(of_files) == 1 else None


def require_same_adapters(folder: Path, adapters: Sequence[AdapterSource]) -> None:
    """Refuse to go on with masks that other adapters made, or a single one where several are averaged now.

    Args:
        folder: of masks, of which some are finished.
        adapters: from `find_adapters`.

    Raises:
        InputError: `RECORD_FILE` names others, or it is missing and several are averaged.
    """
    path = folder / RECORD_FILE
    if len(adapters) == 1 and not path.is_file():
        return
    recorded = _recorded(path)
    if {digest for _, digest in recorded} != {adapter.weights_sha256 for adapter in adapters}:
        before = ", ".join(name for name, _ in recorded) or f"an adapter that {RECORD_FILE} does not name"
        raise InputError(
            f"finished masks in {folder} were made with {before}, found {', '.join(a.source for a in adapters)} now; "
            "choose another output, or segment all again with overwrite, --overwrite on the command line"
        )


def record_adapters(folder: Path, adapters: Sequence[AdapterSource]) -> None:
    """Write `RECORD_FILE` for several adapters, and replace one that is there for a single adapter."""
    path = folder / RECORD_FILE
    if len(adapters) > 1 or path.is_file():
        _recorded(path)  # refuses a file of another kind
        values = [{"adapter": a.source, "weights_sha256": a.weights_sha256} for a in adapters]
        write_json(path, {"averaged": values})


def _recorded(path: Path) -> list[tuple[str, str]]:
    """Names and fingerprints in a record; none without a file."""
    if not path.is_file():
        return []
    values: Any = read_json(path)
    entries = values.get("averaged") if isinstance(values, Mapping) else None
    keys = {"adapter", "weights_sha256"}
    if not isinstance(entries, list) or not all(isinstance(e, Mapping) and keys <= e.keys() for e in entries):
        raise InputError(f"expected a record of adapters in {path}, found another file; move it elsewhere")
    return [(str(entry["adapter"]), str(entry["weights_sha256"])) for entry in entries]
