"""The objective R(x_0): clean latents to rewards, and rewards back to latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rlr_peft.chain.denoising_chain import DenoisingChain
from rlr_peft.rewards.base import Reward, score_images


class Objective(Protocol):
    """What estimators know of a reward beyond the rewards of their rollout."""

    def score(self, latents: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Rewards (B,) of clean latents (B, ...), without a tape."""


@dataclass(frozen=True)
class Measurement:
    """What a batch of clean latents earned.

    Attributes:
        rewards: (B,) float32.
        reward_gradient: derivative of every sample's reward by its clean latents, (B, ...); None if it has none.
        heldout: scores of the held-out reward, (B,) float32; None without one.
    """

    rewards: torch.Tensor
    reward_gradient: torch.Tensor | None
    heldout: torch.Tensor | None


class DecodedReward:
    """Decodes clean latents and scores the images; the tape lives for ``batch_size`` images and no longer.

    Args:
        chain: decodes latents.
        reward: scores images.
        batch_size: images decoded and scored at once.
        heldout: a reward that is only measured, never differentiated.
    """

    def __init__(self, chain: DenoisingChain, reward: Reward, batch_size: int, heldout: Reward | None = None) -> None:
        self._chain = chain
        self._reward = reward
        self._batch_size = batch_size
        self._heldout = heldout
        self._has_gradient = getattr(reward, "probe", None) is not None or reward.differentiable

    @torch.no_grad()
    def score(self, latents: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Rewards (B,) of clean latents (B, ...), without a tape."""
        scores = []
        for part, texts in self._parts(latents, prompts):
            scores.append(score_images(self._reward, self._chain.decode(part, texts).float(), texts))
        return torch.cat(scores)

    def measure(self, latents: torch.Tensor, prompts: Sequence[str]) -> Measurement:
        """Rewards, their gradients by the latents where there are any, and held-out scores.

        A user's callable that does not say whether it is differentiable is found out about on the first batch.

        Raises:
            RewardError: the scores are not finite, of the wrong shape, or not differentiable after all.
        """
        parts = [self._measure_part(part, texts) for part, texts in self._parts(latents, prompts)]
        rewards, gradients, heldout = zip(*parts, strict=True)
        self._has_gradient = gradients[0] is not None
        return Measurement(
            torch.cat(rewards),
            torch.cat(gradients) if self._has_gradient else None,
            torch.cat(heldout) if self._heldout is not None else None,
        )

    def _measure_part(
        self, latents: torch.Tensor, prompts: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        latents = latents.detach().requires_grad_(self._has_gradient)
        with torch.set_grad_enabled(self._has_gradient):
            images = self._chain.decode(latents, prompts).float()
            rewards = score_images(self._reward, images, prompts)
        heldout = None if self._heldout is None else score_images(self._heldout, images.detach(), prompts)
        gradient = torch.autograd.grad(rewards.sum(), latents)[0] if rewards.requires_grad else None
        return rewards.detach(), gradient, heldout

    def _parts(self, latents: torch.Tensor, prompts: Sequence[str]) -> list[tuple[torch.Tensor, list[str]]]:
        starts = range(0, len(prompts), self._batch_size)
        return [(latents[i : i + self._batch_size], list(prompts[i : i + self._batch_size])) for i in starts]
