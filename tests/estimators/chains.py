"""Small chains with rollouts, and their gradients as one vector."""

from collections.abc import Mapping, Sequence

import torch

from rlr_peft.chain import Booking, Chain, DenoisingChain
from rlr_peft.estimators import Book, Objective, Rollout, leave_one_out
from rlr_peft.lora import adapter_disabled, attach_lora
from rlr_peft.testing import LinearGaussianChain, QuadraticReward
from tests.pipelines import chain_over, tiny_stable_diffusion


def rollout_of(
    chain: LinearGaussianChain, samples: int, group_size: int, seed: int = 0, objective: Objective | None = None
) -> tuple[Rollout, torch.Tensor]:
    """Samples of one seed, scored by the quadratic reward or another, and their leave-one-out advantages."""
    trajectory = chain.sample([""] * samples, list(range(seed, seed + samples)))
    objective = QuadraticReward(chain) if objective is None else objective
    rewards, gradient = objective.score_with_gradient(trajectory.latents[0], trajectory.prompts)
    return Rollout(trajectory, rewards, gradient), leave_one_out(rewards, group_size)


def book_of_blocks(norms: Mapping[int, float]) -> Book:
    """A book of one sample that holds half-order blocks with these norms by first step."""
    return Book([""], [0.0], [0.0], None, [Booking("half_order", (t,), 1.0, norm) for t, norm in norms.items()], {})


def gradient_of(chain: Chain) -> torch.Tensor:
    """All ``.grad`` in one vector, which are cleared."""
    gradient = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in chain.parameters]
    )
    for parameter in chain.parameters:
        parameter.grad = None
    return gradient


def flat(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor per parameter, as one vector."""
    return torch.cat([gradient.flatten() for gradient in gradients])


def move_parameters(chain: Chain, scale: float, seed: int = 0) -> None:
    """Adds normal noise to the parameters, as an update would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in chain.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=scale)


def adapted_chain(num_steps: int = 4, dtype: torch.dtype = torch.float64, **arguments) -> DenoisingChain:
    """Tiny Stable Diffusion with a fresh LoRA in the attention layers and its base as reference."""
    pipeline = tiny_stable_diffusion("v_prediction", timestep_spacing="trailing", dtype=dtype)
    parameters = attach_lora(pipeline.unet, target_modules=["to_q", "to_v", "to_out.0"], rank=2)
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
    return chain_over(
        pipeline,
        parameters=parameters,
        num_inference_steps=num_steps,
        guidance_scale=3.0,
        reference=adapter_disabled,
        **arguments,
    )
