"""Recognise label maps whose numbers tell objects apart, such as single nuclei, and not classes."""

import numpy as np

_MANY, _VERY_MANY = 8, 20
"""Labels of a map: so many are classes; more than the latter hardly ever are if nothing names them."""

_LARGEST = 2**16
"""Larger numbers are replaced by their ranks: SciPy makes a box for each number up to the largest."""

_MOST_GAPS, _LEAST_WHOLE = 0.1, 0.95
"""Share of numbers that may lack, as of objects that were cut away; share of objects that are in one piece."""

_MOST_OVERLAP = 5
"""Volume of all objects' boxes, in scans. The boxes of a scan's intensities, taken for labels, are far larger."""

_LEAST_VOXELS = 10
"""Median size of an object; single greys of smooth edges are smaller."""

INSTANCE_ADVICE = (
    "each number looks like one object and not like a class: make the masks semantic, with one number for all objects "
    "of a kind (mask = mask > 0 for a single kind), or name the classes if they are classes, with class_names or "
    "dataset.json"
)
"""What to do about label maps of instances."""


def has_whole_objects(array: np.ndarray) -> bool:
    """Whether a label map has more than eight labels, of which nearly all are one connected object of some size.

    Args:
        array: (D, H, W) labels, 0 is background.
    """
    from scipy import ndimage  # takes longer to import than all the rest of `io`

    positive = np.maximum(array, 0)
    if positive.max() > _LARGEST:
        positive = np.unique(positive, return_inverse=True)[1].reshape(array.shape)
    boxes = {label: box for label, box in enumerate(ndimage.find_objects(positive), start=1) if box is not None}
    in_boxes = sum(positive[box].size for box in boxes.values())
    if len(boxes) <= _MANY or in_boxes > _MOST_OVERLAP * positive.size:
        return False
    inside = [positive[box] == label for label, box in boxes.items()]
    whole = sum(ndimage.label(one, structure=np.ones((3, 3, 3)))[1] == 1 for one in inside)
    return whole >= _LEAST_WHOLE * len(boxes) and float(np.median([one.sum() for one in inside])) >= _LEAST_VOXELS


class InstanceCheck:
    """Gathers label maps one at a time and tells whether their numbers are likely those of instances.

    Numbers of instances run from 1 on in every map, each is one object, and hardly two maps have as many: the same
    classes are in most scans of a data set. Up to eight labels are classes, and up to twenty need three maps.
    """

    def __init__(self) -> None:
        self._counts: list[int] = []
        self._run_from_1 = True
        self._objects: list[bool] = []

    def add(self, array: np.ndarray, labels: set[int]) -> None:
        """Note one map, whose labels above 0 are known."""
        if not labels:
            return
        self._counts.append(len(labels))
        self._run_from_1 &= len(labels) >= (1 - _MOST_GAPS) * max(labels)
        # Looked at until one map of many labels has none: for dozens of classes in a large scan it takes seconds.
        if len(labels) > _MANY and all(self._objects):
            self._objects.append(has_whole_objects(array))

    def are_likely(self, *, numbers_are_odd: bool) -> bool:
        """Whether the maps that were added hold instances.

        Args:
            numbers_are_odd: whether the numbers cannot be those of classes in any case.
        """
        if not self._objects or not all(self._objects):
            return False
        least_maps = 2 if max(self._counts) > _VERY_MANY else 3
        is_varied = len(self._counts) >= least_maps and len(set(self._counts)) > len(self._counts) / 2
        return numbers_are_odd or (self._run_from_1 and is_varied)
