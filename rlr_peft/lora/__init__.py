"""LoRA weights of a denoiser: attaching them, saving them so that diffusers loads them, and proving that it does."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
