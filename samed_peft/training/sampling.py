"""Order in which slices are seen: SAMed's plain permutation, or one in which rare classes come more often."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from samed_peft.datasets.preprocessing import neighbour_step
from samed_peft.errors import InputError


@dataclass(frozen=True)
class ClassBalance:
    """Draw a share of each epoch's slices by class, so that rare ones are seen as often as frequent ones.

    Attributes:
        share: of an epoch's slices, 0 to 1.
        members: for each class that has any, the numbers of the rows that show it.
    """

    share: float
    members: tuple[np.ndarray, ...]

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]], *, share: float) -> "ClassBalance":
        """Read the labels of all rows.

        Raises:
            InputError: no row has any label.
        """
        shown = np.stack([np.bincount(row["label"].ravel(), minlength=256)[1:255] > 0 for row in rows])
        members = tuple(np.flatnonzero(column) for column in shown.T if column.any())
        if not members:
            raise InputError(f"none of the {len(shown)} training slices shows any class; check labels and names")
        return cls(share, members)

    def order(self, num_rows: int, rng: np.random.Generator) -> np.ndarray:
        """Rows of an epoch (num_rows,): a permutation, of which a share is replaced by draws."""
        order = rng.permutation(num_rows)
        drawn = rng.permutation(num_rows)[: round(self.share * num_rows)]
        classes = rng.integers(len(self.members), size=len(drawn))
        order[drawn] = [rng.choice(self.members[number]) for number in classes]
        return order


def neighbour_rows(rows: Any, neighbour_mm: float) -> np.ndarray:
    """Rows of the slices before and after each, at a distance of about `neighbour_mm`, at least the next slice.

    Args:
        rows: of a training split.
        neighbour_mm: distance.

    Returns:
        (N, 2) numbers of rows; at the ends of a scan, and where a slice was left out, the row's own.

    Raises:
        InputError: a scan's spacing is unknown.
    """
    plain = rows.with_format(None).select_columns(["case", "slice", "slice_spacing_mm"])
    keys = list(zip(plain["case"], plain["slice"], strict=True))
    places = {key: place for place, key in enumerate(keys)}
    found = np.empty((len(keys), 2), np.int64)
    for place, ((case, number), spacing) in enumerate(zip(keys, plain["slice_spacing_mm"], strict=True)):
        step = neighbour_step(spacing, neighbour_mm, name=case)
        found[place] = [places.get((case, number + side), place) for side in (-step, step)]
    return found
