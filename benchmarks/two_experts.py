"""tiny-shapes with two experts, as Wan 2.2 has: each half of the steps has an adapter of its own."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from rlr_peft.chain import DenoisingChain

# Timesteps from here on, of the 1000 that the pipeline was trained on, are the noisy expert's.
BOUNDARY = 500


class TwoExperts(UNet2DConditionModel):
    """A UNet that leaves the cleaner half of the timesteps to `low_noise`, another UNet."""

    @classmethod
    def from_config(cls, config: Any, **options: Any) -> "TwoExperts":
        """Both experts of that config, with weights of their own."""
        experts = super().from_config(config, **options)
        assert isinstance(experts, TwoExperts)
        experts.low_noise = UNet2DConditionModel.from_config(config, **options)
        return experts

    def forward(self, sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, **options: Any) -> Any:
        """As of a UNet, for timesteps of one half."""
        noisy = torch.as_tensor(timestep).expand(len(sample)) >= BOUNDARY
        if noisy.all():
            return super().forward(sample, timestep, encoder_hidden_states, **options)
        if not noisy.any():
            return self.low_noise(sample, timestep, encoder_hidden_states, **options)
        raise ValueError("Expected timesteps of one expert in a call, got both; race methods that replay single steps.")


class TwoExpertChain(DenoisingChain):
    """Here both experts are parts of one module, where a chain sees a single model."""

    trained_models = 2


def two_expert_pipeline(path: str | Path) -> DiffusionPipeline:
    """The pipeline of that folder with two experts in the UNet's place, both with its weights."""
    pipeline = DiffusionPipeline.from_pretrained(path)
    experts = TwoExperts.from_config(pipeline.unet.config)
    weights = pipeline.unet.state_dict()
    experts.load_state_dict(weights | {f"low_noise.{name}": value for name, value in weights.items()})
    pipeline.unet = experts
    return pipeline
