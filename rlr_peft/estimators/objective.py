"""The objective R(x_0): clean latents to rewards, and rewards back to latents.

With a limit it is ``min(R(x_0), limit)``, for every gradient, score and advantage alike: they all ask for it here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from rlr_peft.chain.adjoint import scaled_gradients
from rlr_peft.chain.interface import Decoder
from rlr_peft.errors import RewardError
from rlr_peft.prompt import PromptLike
from rlr_peft.rewards.base import Reward, Scored, join_scored, measure_images, score_images


class Objective(Protocol):
    """What estimators know of a reward beyond the rewards of their rollout."""

    def score(self, latents: torch.Tensor, prompts: Sequence[PromptLike]) -> torch.Tensor:
        """Rewards (B,) of clean latents (B, ...), without a tape."""

    def score_with_gradient(
        self, latents: torch.Tensor, prompts: Sequence[PromptLike]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards (B,) of clean latents (B, ...), and every sample's derivative by its own, (B, ...)."""


@dataclass(frozen=True)
class Measurement:
    """What a batch of clean latents earned.

    Attributes:
        scored: by the reward itself, without the limit, detached.
        rewards: what is raised, (B,): the scores up to the limit.
        reward_gradient: derivative of every sample's own by its clean latents, (B, ...); None if it has none.
        heldout: by the held-out reward; None without one.
    """

    scored: Scored
    rewards: torch.Tensor
    reward_gradient: torch.Tensor | None
    heldout: Scored | None


class DecodedReward:
    """Decodes clean latents and scores the images; the tape lives for ``batch_size`` images and no longer.

    Args:
        decoder: decodes latents.
        reward: scores images.
        batch_size: images decoded and scored at once.
        heldout: a reward that is only measured, never differentiated.
        limit: rewards count up to it; None for no limit.
    """

    def __init__(
        self,
        decoder: Decoder,
        reward: Reward,
        batch_size: int,
        heldout: Reward | None = None,
        limit: float | None = None,
    ) -> None:
        self._decoder = decoder
        self._reward = reward
        self._batch_size = batch_size
        self._heldout = heldout
        self._limit = limit

    @property
    def has_gradient(self) -> bool:
        """Whether the reward has a gradient; one that does not know yet is taken to have one, until ``measure``."""
        return self._reward.differentiable is not False

    def satisfied(self, scores: torch.Tensor) -> torch.Tensor | None:
        """Which of the reward's scores (N,) are at the limit or above; None without a limit."""
        return None if self._limit is None else scores >= self._limit

    def limited(self, scores: torch.Tensor) -> torch.Tensor:
        """What is raised, (N,): the reward's scores (N,) up to the limit."""
        if self._limit is None:
            return scores
        # Not `clamp`, which has a gradient at the limit itself.
        return torch.where(scores < self._limit, scores, torch.full_like(scores, self._limit))

    @torch.no_grad()
    def score(self, latents: torch.Tensor, prompts: Sequence[PromptLike]) -> torch.Tensor:
        """Rewards (B,) of clean latents (B, ...), without a tape."""
        scores = []
        for part, texts in self._parts(latents, prompts):
            scores.append(score_images(self._reward, self._decoder.decode(part, texts).float(), texts))
        return self.limited(torch.cat(scores))

    def measure(self, latents: torch.Tensor, prompts: Sequence[PromptLike], differentiate: bool = True) -> Measurement:
        """Rewards, their gradients by the latents where there are any, and held-out scores.

        A reward that does not know yet whether it is differentiable finds out on the first batch.

        Args:
            latents: clean latents (B, ...).
            prompts: one per sample.
            differentiate: False spares the tape of decoder and reward where no gradient is wanted.

        Raises:
            RewardError: the scores are not finite, of the wrong shape, or not differentiable after all.
        """
        return self._measure(latents, prompts, differentiate, self._heldout)

    def score_with_gradient(
        self, latents: torch.Tensor, prompts: Sequence[PromptLike]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards (B,) of clean latents (B, ...), and every sample's derivative by its own, (B, ...).

        Raises:
            RewardError: the reward has no gradient.
        """
        measured = self._measure(latents, prompts, differentiate=True, heldout=None)
        if measured.reward_gradient is None:
            raise RewardError(f"reward '{self._reward.name}': expected a gradient, but it is not differentiable.")
        return measured.rewards, measured.reward_gradient

    def _measure(
        self, latents: torch.Tensor, prompts: Sequence[PromptLike], differentiate: bool, heldout: Reward | None
    ) -> Measurement:
        parts = [self._measure_part(*part, differentiate, heldout) for part in self._parts(latents, prompts)]
        gradients = [part.reward_gradient for part in parts if part.reward_gradient is not None]
        heldout_scored = [part.heldout for part in parts if part.heldout is not None]
        return Measurement(
            join_scored([part.scored for part in parts]),
            torch.cat([part.rewards for part in parts]),
            torch.cat(gradients) if gradients else None,
            join_scored(heldout_scored) if heldout_scored else None,
        )

    def _measure_part(
        self, latents: torch.Tensor, prompts: list[PromptLike], differentiate: bool, heldout: Reward | None
    ) -> Measurement:
        differentiate = differentiate and self.has_gradient
        latents = latents.detach().requires_grad_(differentiate)
        with torch.set_grad_enabled(differentiate):
            images = self._decoder.decode(latents, prompts)
            # Cut here: the reward's tape is gone before the decoder's backward pass, whose cotangent is then scaled.
            pixels = images.detach().float().requires_grad_(differentiate)
            scored = measure_images(self._reward, pixels, prompts)
        rewards, gradient = self.limited(scored.scores), None
        if rewards.requires_grad:
            (pixel_gradient,) = torch.autograd.grad(rewards.sum(), pixels)
            (gradient,) = scaled_gradients(images, [latents], pixel_gradient, f"the images of {self._reward.name}")
        heldout_scored = None if heldout is None else measure_images(heldout, pixels.detach(), prompts)
        return Measurement(replace(scored, scores=scored.scores.detach()), rewards.detach(), gradient, heldout_scored)

    def _parts(
        self, latents: torch.Tensor, prompts: Sequence[PromptLike]
    ) -> list[tuple[torch.Tensor, list[PromptLike]]]:
        starts = range(0, len(prompts), self._batch_size)
        return [(latents[i : i + self._batch_size], list(prompts[i : i + self._batch_size])) for i in starts]
