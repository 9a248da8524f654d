"""Assembly: from a config to the pipeline, the chain, the rewards, the prompts and the optimiser of a run."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
