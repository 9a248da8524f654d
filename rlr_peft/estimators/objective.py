"""The objective R(x_0): clean latents to rewards, and rewards back to latents."""

from collections.abc import Sequence
from typing import Protocol

import torch

from rlr_peft.chain.denoising_chain import DenoisingChain
from rlr_peft.rewards.base import Reward, check_scores


class Objective(Protocol):
    """What estimators know of a reward.

    Attributes:
        differentiable: whether ``score_with_gradient`` may be called.
    """

    differentiable: bool

    def score(self, latents: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Rewards (B,) of clean latents (B, ...), without a tape."""

    def score_with_gradient(self, latents: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards (B,) and the derivative of every sample's reward by its clean latents, (B, ...)."""


class DecodedReward:
    """Decodes clean latents and scores the images; the tape lives for ``batch_size`` images and no longer.

    Args:
        chain: decodes latents.
        reward: scores images.
        batch_size: images decoded and scored at once.
    """

    def __init__(self, chain: DenoisingChain, reward: Reward, batch_size: int) -> None:
        self._chain = chain
        self._reward = reward
        self._batch_size = batch_size
        self.differentiable = reward.differentiable

    @torch.no_grad()
    def score(self, latents: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Rewards (B,) of clean latents (B, ...), without a tape."""
        scores = [self._score(part, texts) for part, texts in self._parts(latents, prompts)]
        return torch.cat(scores)

    def score_with_gradient(self, latents: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards (B,) and the derivative of every sample's reward by its clean latents, (B, ...).

        Raises:
            RewardError: the scores are not finite, of the wrong shape, or not differentiable after all.
        """
        scores, gradients = [], []
        for part, texts in self._parts(latents, prompts):
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                part_scores = self._score(leaf, texts)
            (gradient,) = torch.autograd.grad(part_scores.sum(), leaf)
            scores.append(part_scores.detach())
            gradients.append(gradient)
        return torch.cat(scores), torch.cat(gradients)

    def _score(self, latents: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        images = self._chain.decode(latents, prompts).float()
        return check_scores(self._reward.name, self._reward(images, prompts, [{} for _ in prompts]), prompts)

    def _parts(self, latents: torch.Tensor, prompts: Sequence[str]) -> list[tuple[torch.Tensor, list[str]]]:
        starts = range(0, len(prompts), self._batch_size)
        return [(latents[i : i + self._batch_size], list(prompts[i : i + self._batch_size])) for i in starts]
