"""RLR fine-tuning of LoRA adapters of diffusers pipelines on rewards."""

import lazy_loader

__version__ = "0.1.0"

# Names come from their modules when they are asked for: `--help` and refusals wait for no torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
