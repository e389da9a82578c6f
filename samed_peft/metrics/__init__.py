"""Score masks and label maps, in two conventions side by side.

`METRICS` has one record for each metric. Distances run between border voxels, as in medpy, whose values they have.

`standard`: millimetres; a class absent from both masks has no score (NaN), one absent from a single mask has shares
of 0, such as Dice, and no distance (NaN).
`samed`: the convention of the code of SAMed (arXiv 2304.13785): voxels; a prediction without reference scores
Dice 1 and HD95 0; a missed organ, or one absent from both, scores 0 and 0. That code has no other metric; here IoU and
surface Dice follow its Dice and ASSD its HD95, and the tolerance of the surface Dice is a number of voxels.

`samed_peft.metrics.gather.SegmentationScores` offers both as an `evaluate.Metric`; it is kept apart because
importing `evaluate` takes seconds. `__init__.pyi` lists the public names, each imported on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
