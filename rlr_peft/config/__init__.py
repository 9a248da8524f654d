"""The configuration of a run: typed knobs, flags and YAML of the same flat names, checked before anything is loaded.

Nothing here imports torch or diffusers, so `--help` and a refusal are immediate.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
