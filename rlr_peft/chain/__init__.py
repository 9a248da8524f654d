"""A diffusion pipeline as a chain of Gaussian steps that can be sampled, replayed and differentiated."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
