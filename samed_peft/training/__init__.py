"""Train adapters: `start_run`, `fit` and `finish_run` for a whole run, and the steps they are made of.

`__init__.pyi` lists the public names. Each is imported on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
