"""The only place that opens or writes user files: scans, masks, folders, JSON and weights.

No pickle is ever executed here, and nothing is left half-written: every artefact is written to a temporary sibling,
synced to disk and renamed into place. `__init__.pyi` lists the public names. Each is imported on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
