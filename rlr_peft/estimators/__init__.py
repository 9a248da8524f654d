"""Gradient estimators of the expected reward, written as backward segments over a chain."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
