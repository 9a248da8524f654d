"""Evidence and diagnoses of small chains with known gradients."""

from collections.abc import Sequence

import torch

from rlr_peft.config import Config, load_config
from rlr_peft.diagnose import Diagnosis, Evidence, MethodResult, diagnose, gather_evidence
from rlr_peft.estimators import GradientSketch, Objective, Rollout, leave_one_out
from rlr_peft.testing import LinearGaussianChain, QuadraticReward

GROUP = 4
SAMPLES = 1600
REQUIRED = "--pretrained_model_name_or_path tiny-shapes --prompt_path tiny-shapes/train --reward_fn tiny-shapes".split()


class WavyReward:
    """``R = sin(2 w . x_0)``: bounded, so only the chain's amplification makes its gradient large."""

    def __init__(self, chain: LinearGaussianChain) -> None:
        self.slope = 2 * chain.reward_slope

    def score(self, latents: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return (latents @ self.slope).sin()

    def score_with_gradient(self, latents: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.score(latents, prompts), (latents @ self.slope).cos()[:, None] * self.slope


def rollout_of(
    chain: LinearGaussianChain, objective: Objective, samples: int, seed: int = 0, differentiable: bool = True
) -> Rollout:
    trajectory = chain.sample([f"prompt {i // GROUP}" for i in range(samples)], list(range(seed, seed + samples)))
    rewards, gradient = objective.score_with_gradient(trajectory.latents[0], trajectory.prompts)
    return Rollout(trajectory, rewards, gradient if differentiable else None)


def chaotic_chain() -> LinearGaussianChain:
    """Its first steps, next to the noise, stretch everything, and the parameters matter most there."""
    return LinearGaussianChain(num_steps=6, last_std=0.2, decay=(0.5, 2.0), gain=(0.06, 10.0))


def sketch_of(chain: LinearGaussianChain) -> GradientSketch:
    """Small, and exact: no two of the 12 parameters share a bucket."""
    return GradientSketch(chain.parameters, dimension=1024)


def evidence_of(samples: int, differentiable: bool = True, seed: int = 0) -> Evidence:
    chain = LinearGaussianChain(num_steps=6, last_std=0.2)
    objective = QuadraticReward(chain)
    rollout = rollout_of(chain, objective, samples, seed, differentiable)
    advantages = leave_one_out(rollout.rewards, GROUP)
    return gather_evidence(chain, objective, [rollout], advantages, sketch_of(chain), GROUP)


def config_with(*flags: str) -> Config:
    return load_config([*REQUIRED, "--num_inference_steps", "6", *flags])


def diagnosis_of(
    chain: LinearGaussianChain,
    objective: Objective,
    samples: int,
    *flags: str,
    differentiable: bool = True,
) -> Diagnosis:
    rollout = rollout_of(chain, objective, samples, differentiable=differentiable)
    config = load_config([*REQUIRED, "--num_inference_steps", str(chain.num_steps), *flags])
    return diagnose(
        chain,
        objective,
        [rollout],
        config,
        group_size=GROUP,
        sampling_seconds=0.5,
        facts={"base": "linear <chain>"},
    )


def result_of(diagnosis: Diagnosis, name: str) -> MethodResult:
    return next(result for result in diagnosis.results if result.method.name == name)
