"""What the builders of this package share: errors that reach the user, and preparation in several processes."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from samed_peft.datasets.rows import decode_rows
from samed_peft.errors import InputError


class RowsBuilder(datasets.GeneratorBasedBuilder):
    """A builder of packed rows whose `InputError`s are not wrapped in errors of Datasets."""

    def __init__(self, cache_dir: str | None = None, **options: Any) -> None:
        with _cache_errors(cache_dir):
            super().__init__(cache_dir=cache_dir, **options)

    def download_and_prepare(self, *args: Any, **options: Any) -> None:
        """As Datasets', where a cache that cannot be written is an `InputError`."""
        with _cache_errors(self._cache_dir_root):
            super().download_and_prepare(*args, **options)

    def _prepare_split_single(self, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from super()._prepare_split_single(**kwargs)
        except DatasetGenerationError as error:
            # Unwrapped in here, since a worker process hands on the outer error alone.
            if isinstance(error.__cause__, InputError):
                raise error.__cause__ from None
            raise


@contextlib.contextmanager
def _cache_errors(cache_dir: str | Path | None = None) -> Iterator[None]:
    """Say of a cache that cannot be written how to have another; what is wrong with scans are no `OSError`s here.

    Raises:
        InputError: the folder is read-only, below a file, or full.
    """
    try:
        yield
    except OSError as error:
        folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).absolute()
        raise InputError(
            f"Datasets keeps prepared scans in {folder}, which cannot be written: {error.strerror or error}; set the "
            "variable HF_HOME, or HF_DATASETS_CACHE for prepared scans alone, to a folder with room that may be written"
        ) from error


def prepared(builder: RowsBuilder, split: str, *, num_cases: int, num_proc: int | None = None) -> datasets.Dataset:
    """The rows of a split, made if they are not in the cache, as arrays.

    Args:
        builder: of this split alone.
        split: its name.
        num_cases: cases in it, which are dealt out to processes.
        num_proc: processes; by default one a case, up to the number of cores.

    Raises:
        InputError: from the builder, or there are no rows.
    """
    processes = min(num_proc or os.cpu_count() or 1, num_cases)
    builder.download_and_prepare(num_proc=processes if processes > 1 else None)
    if not builder.info.splits[split].num_examples:
        raise InputError(f"no slice is left of {num_cases} cases; keep some of those without foreground")
    return builder.as_dataset(split=split).with_transform(decode_rows)
