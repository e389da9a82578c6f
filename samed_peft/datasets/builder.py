"""Cases as rows of a dataset, prepared once in several processes and kept in the cache of Datasets."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError

from samed_peft.config import Windows, windows_of
from samed_peft.datasets.cases import check_cases, naming_files, read_pair
from samed_peft.datasets.channels import scaled_slices
from samed_peft.datasets.folder import Case, LabelledFolder
from samed_peft.datasets.label_scheme import foreground, is_ignored
from samed_peft.datasets.preprocessing import reorientation, reoriented, slice_spacing_mm
from samed_peft.datasets.row_cache import discard_if_damaged, record_checksums
from samed_peft.datasets.rows import SLICE_FEATURES, VOLUME_FEATURES
from samed_peft.errors import InputError, StopSignal
from samed_peft.io import IGNORED, SharedFlag


@dataclass
class RowsConfig(datasets.BuilderConfig):
    """Everything that rows depend on; Datasets names the cache folder after a hash of it.

    Attributes:
        name: holds a fingerprint of the files, so that an edited one is prepared again.
        split: "train" for rows of slices, "test" for rows of whole volumes.
        cases: their files.

    The others are those of `load_slices`.
    """

    split: str = "train"
    cases: tuple[Case, ...] = ()
    num_classes: int = 1
    orientation: str | None = None
    window: Windows = None
    empty_share: float = 1.0


class RowsBuilder(datasets.GeneratorBasedBuilder):
    """Prepares one split; made by `prepared_rows`. Its `InputError`s are not wrapped in errors of Datasets.

    Args:
        verify: whether to compare rows that are in the cache with their checksums, and to discard damaged ones.
        stopped: raised to stop all processes that prepare rows.
        options: of Datasets' builders, and fields of `RowsConfig`.
    """

    # Part of the cache's name: raised when equal files come to give other rows.
    VERSION = datasets.Version("3.0.0")
    BUILDER_CONFIG_CLASS = RowsConfig

    def __init__(self, *, verify: bool, stopped: SharedFlag, **options: Any) -> None:
        self._verify = verify
        self._stopped = stopped
        super().__init__(**options)

    def _build_cache_dir(self) -> str:
        # Here, since Datasets reads the folder as soon as it knows its name.
        folder: str = super()._build_cache_dir()
        if self._verify:
            discard_if_damaged(Path(folder), split=self.config.split)
        return folder

    def _save_info(self) -> None:
        super()._save_info()
        record_checksums(Path(self._output_dir))

    def _info(self) -> datasets.DatasetInfo:
        features = SLICE_FEATURES if self.config.split == "train" else VOLUME_FEATURES
        return datasets.DatasetInfo(description="Labelled scans", features=features)

    def _split_generators(self, dl_manager: object) -> list[datasets.SplitGenerator]:
        del dl_manager  # the files are on disk
        # Datasets deals out a list to its processes, in order.
        return [datasets.SplitGenerator(name=self.config.split, gen_kwargs={"cases": list(self.config.cases)})]

    def _generate_examples(self, cases: list[Case]) -> Iterator[tuple[str, dict[str, Any]]]:
        rows = _slice_rows if self.config.split == "train" else _volume_rows
        for case in cases:
            for number, row in rows(case, self.config):
                if self._stopped.is_raised():
                    raise InterruptedError("stopped by a signal")
                yield f"{case.name}_{number:05d}", row

    def _prepare_split_single(self, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from super()._prepare_split_single(**kwargs)
        except DatasetGenerationError as error:
            # Unwrapped in here, since a worker process hands on the outer error alone.
            if isinstance(error.__cause__, InputError):
                raise error.__cause__ from None
            raise
        except RuntimeError as error:
            # Datasets yields once more where a generator is closed, as in workers whose main process ends.
            if str(error) != "generator ignored GeneratorExit":
                raise


def _slice_rows(case: Case, config: RowsConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    """Slice numbers and rows of a case; of the slices without foreground, the share to keep, evenly spread.

    Slices that are to be ignored in full are left out.
    """
    slices: list[tuple[np.ndarray, np.ndarray, dict[str, Any]]] = []
    ignored_label = None
    for part in case.parts:
        with naming_files(part.scans[0], part.labels[0]):
            scan, labels = read_pair(part, num_classes=config.num_classes)
            if case.numbers and len(labels.array) != 1:
                raise InputError(
                    f"expected one slice, found {len(labels.array)} in {scan.path}; preprocess the case again"
                )
            there, _ = reorientation(scan, config.orientation)
            images = reoriented(scaled_slices(scan, config.window, channels=case.channels), there)
            label = reoriented(labels.array.astype(np.uint8, copy=False), there)
        facts = {
            "orientation": config.orientation or scan.orientation,
            "slice_spacing_mm": slice_spacing_mm(scan, there),
        }
        ignored_label = labels.ignored_label
        slices += [(*arrays, facts) for arrays in zip(images, label, strict=True)]
    # Slices without annotation teach nothing.
    silent = {place for place, (_, label, _) in enumerate(slices) if is_ignored(label, ignored_label)}
    without = [place for place, (_, label, _) in enumerate(slices) if not foreground(label, ignored_label).any()]
    empty = np.array([place for place in without if place not in silent], int)
    kept = np.linspace(0, len(empty) - 1, round(config.empty_share * len(empty))).round().astype(int)
    dropped = silent.union(np.delete(empty, kept).tolist())
    for place, (image, label, facts) in enumerate(slices):
        if place not in dropped:
            number = case.numbers[place] if case.numbers else place
            yield number, {"image": image, "label": label, "case": case.name, "slice": number, **facts}


def _volume_rows(case: Case, config: RowsConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    with naming_files(case.scans[0], case.labels[0]):
        scan, labels = read_pair(case, num_classes=config.num_classes)
        image, label = scaled_slices(scan, config.window, channels=case.channels), labels.array
    yield 0, {"image": image, "label": label, "case": case.name, "affine": scan.affine, "path": str(scan.path)}


def prepared_rows(
    folder: LabelledFolder,
    cases: Sequence[str],
    *,
    name: str,
    split: str,
    window: Windows,
    cache_dir: str | Path | None = None,
    num_proc: int | None = None,
    **options: Any,
) -> datasets.Dataset:
    """The rows of a split, prepared unless they are in the cache, by as many processes as there are cases or cores.

    `name` becomes their `config_name`; `options` are `verify` and further fields of `RowsConfig`.
    """
    processes = min(num_proc or os.cpu_count() or 1, len(cases))
    files = tuple(folder.case(case, as_slices=split == "train") for case in cases)
    stopped = SharedFlag.new_in(Path(tempfile.gettempdir()))
    try:
        builder = RowsBuilder(
            stopped=stopped,
            config_name=name,
            cache_dir=None if cache_dir is None else str(cache_dir),
            # Rows kept in memory before they are written; a volume is a few hundred megabytes.
            writer_batch_size=16 if split == "train" else 1,
            split=split,
            cases=files,
            window=_floats(window),
            **options,
        )
        if processes > 1:
            _prepare_in_processes(builder, processes, stopped)
        else:
            builder.download_and_prepare()
    except OSError as error:  # never one about a scan, which is an `InputError`
        root = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).absolute()
        raise InputError(
            f"Datasets keeps prepared scans in {root}, which cannot be written: {error.strerror or error}; set the "
            "variable HF_HOME, or HF_DATASETS_CACHE for prepared scans alone, to a folder with room that may be written"
        ) from error
    except RuntimeError as error:
        if "abruptly died" not in str(error):  # as Datasets says it
            raise
        raise InputError(
            f"a process that prepared scans of {folder.root} was ended by the system, for lack of memory perhaps, or "
            "by one of the files; free memory, or leave cases out to find the one"
        ) from error
    if not builder.info.splits[split].num_examples:
        ignored = ", or annotate some of those that are to be ignored" * (IGNORED in (folder.label_table or ()))
        raise InputError(f"no slice is left of {len(cases)} cases; keep some of those without foreground{ignored}")
    return builder.as_dataset(split=split)


def _floats(window: Windows) -> Windows:
    """Windows as the cache's name has them, whatever numbers they were given as."""
    windows = windows_of(window)
    return windows if len(windows) > 1 else next(iter(windows), None)


def _prepare_in_processes(builder: RowsBuilder, processes: int, stopped: SharedFlag) -> None:
    """Prepare rows; a signal ends that after the slices at hand, since Datasets' processes may hang otherwise."""
    try:
        with StopSignal(on_first=stopped.raise_) as stop:
            builder.download_and_prepare(num_proc=processes)
        if stop.received is not None:
            raise KeyboardInterrupt(stop.received)
    finally:
        stopped.remove()


def load_slices(
    folder: LabelledFolder,
    cases: Sequence[str],
    *,
    num_classes: int,
    orientation: str | None,
    window: Windows,
    empty_share: float = 1.0,
    held_out: Sequence[str] = (),
    verify: bool = True,
) -> datasets.Dataset:
    """Training slices of some cases, prepared once; files that are edited later are noticed.

    Rows in the cache that are damaged are prepared again, with a warning.

    Args:
        folder: from `open_folder`.
        cases: which of its cases.
        num_classes: K, background left out.
        orientation: from `choose_orientation`.
        window: intensities scaled to [0, 1], two or three such windows for the encoder's channels, or None for each
            scan's 0.5 and 99.5 percentiles.
        empty_share: share of the slices without foreground to keep, 0 to 1.
        held_out: cases to read first, see `check_cases`.
        verify: compare rows in the cache with their checksums; False in processes that open what another one has just
            verified on this machine.

    Returns:
        rows of `image` (H, W) float32 in [0, 1], or (H, W, 3) in colour and of several channels or windows, `label`
        (H, W) uint8, `case`, `slice`, `orientation` and `slice_spacing_mm`.

    Raises:
        InputError: a file is damaged, a pair does not fit, a label has no name, or no slice is left.
    """
    if not 0 <= empty_share <= 1:
        raise InputError(f"expected a share of empty slices from 0 to 1, found {empty_share}")
    check_cases(folder, held_out, num_classes=num_classes, window=window)
    return prepared_rows(
        folder,
        cases,
        name=f"{folder.data_name('slices', cases, as_slices=True)}-empty-{float(empty_share)}",
        split="train",
        window=window,
        verify=verify,
        num_classes=num_classes,
        orientation=orientation,
        empty_share=float(empty_share),
    )
