"""RLR fine-tuning of LoRA adapters of diffusers pipelines on rewards."""

__version__ = "0.1.0"
