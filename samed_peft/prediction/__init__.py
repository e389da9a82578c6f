"""Segment scans: volumes in memory, files and folders, held-out cases.

`__init__.pyi` lists the public names. Each is imported on first use, so that prediction does not load Datasets.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
