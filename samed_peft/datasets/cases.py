"""Whole volumes by case, one in memory at a time."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Self

from datasets import Dataset

from samed_peft.io import Volume, read_labels, read_volume


class CaseVolumes(Mapping[str, Volume]):
    """case -> `Volume`, read whenever it is asked for.

    Args:
        readers: case -> function that reads its volume.
    """

    def __init__(self, readers: Mapping[str, Callable[[], Volume]]) -> None:
        self._readers = readers

    @classmethod
    def of_rows(cls, rows: Dataset, column: str) -> Self:
        """The "image" (in [0, 1]) or "label" of each row of a split of whole volumes."""
        needed = rows.select_columns([column, "affine", "path"])  # the other array is not decoded

        def reader(index: int) -> Callable[[], Volume]:
            def read() -> Volume:
                row = needed[index]
                return Volume(row[column], row["affine"], Path(row["path"]), normalized=column == "image")

            return read

        return cls({case: reader(index) for index, case in enumerate(rows.with_format(None)["case"])})

    @classmethod
    def pairs(cls, rows: Dataset) -> tuple[Self, Self]:
        """Scans and references of a split of whole volumes."""
        return cls.of_rows(rows, "image"), cls.of_rows(rows, "label")

    @classmethod
    def of_scans(cls, files: Mapping[str, Path], *, channel: int | None = None) -> Self:
        """Scans from files, as they are; `channel` of those that are 4-D."""
        return cls({case: partial(read_volume, path, channel=channel) for case, path in files.items()})

    @classmethod
    def of_masks(cls, files: Mapping[str, Path]) -> Self:
        """Label maps from files."""
        return cls({case: partial(read_labels, path) for case, path in files.items()})

    def __getitem__(self, case: str) -> Volume:
        return self._readers[case]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)
