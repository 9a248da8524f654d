"""How much memory a run will need, worked out on the meta device before anything is downloaded."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
