"""samed_peft: parameter-efficient finetuning of the Segment Anything Model on medical scans.

`__init__.pyi` lists the public names. Each is imported on first use, so `import samed_peft` costs nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
