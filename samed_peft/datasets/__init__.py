"""Labelled scans as Hugging Face Datasets: layouts, preprocessing, slices, splits and synthetic phantoms.

`__init__.pyi` lists the public names. Each is imported on first use: prediction takes the preprocessing from here
without loading Datasets. To load saved rows with `datasets.load_from_disk` in a fresh process, import `ArrayFeature`,
which registers their column type.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
