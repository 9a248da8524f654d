"""Console commands: `rlr-peft COMMAND`. Each is a thin file that calls the library."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
