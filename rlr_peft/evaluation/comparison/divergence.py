"""How far the adapter's chain has moved from the base's: the KL of the whole path, in nats."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rlr_peft.chain.interface import Chain
from rlr_peft.estimators.kl_penalty import KLPenalty, accumulate_kl_penalty
from rlr_peft.estimators.rollout import Rollout
from rlr_peft.prompt import Prompt

# Samples every prompt from its seed and measures: (prompts, seeds) -> (B,) nats.
MeasureDivergence = Callable[[list[Prompt], list[int]], Tensor]


@torch.no_grad()
def path_divergence(chain: Chain, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Tensor:
    """``KL(adapter || base)`` of sampled paths: the steps' KL in closed form, summed over all steps with noise.

    Averaged over samples this estimates, without bias, the KL of the paths' distributions, which bounds the KL of the
    images' from above.

    Args:
        chain: with the adapter, a reference (the base), and noise in at least one step.
        prompts: B prompts, sampled at once.
        seeds: B seeds.

    Returns:
        (B,) float32 in nats, on the CPU.

    Raises:
        ValueError: a chain without noise, whose paths have no density.
    """
    if not has_noise(chain):
        raise ValueError("expected a chain with noise: without it the divergence from the base is not defined")
    trajectory = chain.sample(prompts, seeds)
    zeros = torch.zeros(len(prompts), device=trajectory.latents.device)
    rollout = Rollout(trajectory, rewards=zeros, advantages=zeros, reward_gradient=None)
    # beta = 0 only measures, and all steps count with weight 1: nothing is drawn at random.
    return accumulate_kl_penalty(chain, rollout, KLPenalty(0.0, "all"), torch.Generator()).float().cpu()


def has_noise(chain: Chain) -> bool:
    """Whether any step of the chain is stochastic."""
    return any(chain.std(t) > 0 for t in range(1, chain.num_steps + 1))


def measure_divergence(
    measure: MeasureDivergence,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    batch_size: int,
    *,
    description: str = "Measuring KL",
    show_progress: bool = True,
) -> Tensor:
    """The divergence of every sample of a plan, (n,) in nats.

    Args:
        measure: of one batch, such as `path_divergence` on a chain.
        prompts: n prompts.
        seeds: n seeds.
        batch_size: samples at once.
        description: of the tqdm bar.
        show_progress: False hides the bar.
    """
    parts = []
    with tqdm(total=len(prompts), desc=description, unit="image", disable=not show_progress) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = list(prompts[start : start + batch_size])
            parts.append(measure(batch, list(seeds[start : start + batch_size])))
            bar.update(len(batch))
    return torch.cat(parts)
