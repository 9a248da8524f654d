"""Distilled models of few steps: the chain draws as their own samplers do."""

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, LCMScheduler

from tests.pipelines import chain_over, tiny_stable_diffusion

PROMPTS = ["red", "a blue b"]


def replaying(noises: list[torch.Tensor]):
    """In place of diffusers' `randn_tensor`: these numbers, one after the other."""
    left = iter(noises)
    return lambda *arguments, **options: next(left)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(
    ("scheduler", "kind", "tolerance"),
    [
        # The first of its sigmas, 14.6, is not quite pure noise, from which the chain starts.
        (EulerAncestralDiscreteScheduler, "ancestral", 1e-2),
        (LCMScheduler, "cps", 1e-4),
    ],
    ids=["Turbo", "LCM"],
)
def test_with_eta_1_the_chain_draws_as_the_models_own_sampler(
    monkeypatch: pytest.MonkeyPatch, scheduler: type, kind: str, tolerance: float, steps: int
) -> None:
    pipeline = tiny_stable_diffusion()
    pipeline.scheduler = scheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    pipeline.set_progress_bar_config(disable=True)
    chain = chain_over(
        pipeline, num_inference_steps=steps, step_kind=kind, guidance_scale=0.0, timestep_spacing="trailing"
    )
    trajectory = chain.sample(PROMPTS, [3, 4])
    noises = [trajectory.noise(t) for t in range(steps, 0, -1)]
    module = __import__(scheduler.__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", replaying(noises))
    # LCM's own timesteps lie up to ten apart from the chain's, which are an even division.
    asked = {"timesteps": [1000 * (steps - i) // steps - 1 for i in range(steps)]} if kind == "cps" else {}
    own = pipeline(
        PROMPTS,
        latents=trajectory.latents[steps],
        num_inference_steps=steps,
        guidance_scale=0.0,
        output_type="latent",
        **asked,
    ).images
    scale = float(own.std())
    assert float((trajectory.latents[0] - own).abs().max()) < tolerance * scale
    if steps > 1:
        plain = chain_over(
            pipeline, num_inference_steps=steps, step_kind="ode", guidance_scale=0.0, timestep_spacing="trailing"
        ).sample(PROMPTS, [3, 4], trajectory.noises)
        assert float((plain.latents[0] - own).abs().max()) > 20 * tolerance * scale, "without noise it draws otherwise"
