"""RLR fine-tuning of LoRA adapters of diffusers pipelines on rewards."""

import os

import lazy_loader

__version__ = "0.1.0"

# Threads of torch that wait for others must not spin: beside another busy process that cost most of the time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Names come from their modules when they are asked for: `--help` and refusals wait for no torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
