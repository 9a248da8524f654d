"""The objective R(x_0): clean latents to rewards, and rewards back to latents."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from rlr_peft.chain.adjoint import scaled_gradients
from rlr_peft.chain.interface import Decoder
from rlr_peft.prompt import PromptLike
from rlr_peft.rewards.base import Reward, RewardError, Scored, measure_images, score_images
from rlr_peft.rewards.scores import Info, join_info


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
        rewards: (B,) float32.
        reward_gradient: derivative of every sample's reward by its clean latents, (B, ...); None if it has none.
        heldout: scores of the held-out reward, (B,) float32; None without one.
        info: numbers that the reward gives beside its scores, name -> (B,).
        heldout_info: the same of the held-out reward.
    """

    rewards: torch.Tensor
    reward_gradient: torch.Tensor | None
    heldout: torch.Tensor | None
    info: Info = field(default_factory=dict)
    heldout_info: Info = field(default_factory=dict)


class DecodedReward:
    """Decodes clean latents and scores the images; the tape lives for ``batch_size`` images and no longer.

    Args:
        decoder: decodes latents.
        reward: scores images.
        batch_size: images decoded and scored at once.
        heldout: a reward that is only measured, never differentiated.

    Attributes:
        has_gradient: whether the reward has a gradient; of a callable that does not say so itself it is taken to have
            one until the first ``measure``.
    """

    def __init__(self, decoder: Decoder, reward: Reward, batch_size: int, heldout: Reward | None = None) -> None:
        self._decoder = decoder
        self._reward = reward
        self._batch_size = batch_size
        self._heldout = heldout
        self.has_gradient = _may_have_gradient(reward)

    @torch.no_grad()
    def score(self, latents: torch.Tensor, prompts: Sequence[PromptLike]) -> torch.Tensor:
        """Rewards (B,) of clean latents (B, ...), without a tape."""
        scores = []
        for part, texts in self._parts(latents, prompts):
            scores.append(score_images(self._reward, self._decoder.decode(part, texts).float(), texts))
        return torch.cat(scores)

    def measure(self, latents: torch.Tensor, prompts: Sequence[PromptLike], differentiate: bool = True) -> Measurement:
        """Rewards, their gradients by the latents where there are any, and held-out scores.

        A user's callable that does not say whether it is differentiable is found out about on the first batch.

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
        differentiate = differentiate and self.has_gradient
        parts = [self._measure_part(*part, differentiate, heldout) for part in self._parts(latents, prompts)]
        scored, gradients, heldout_scored = zip(*parts, strict=True)
        if differentiate:
            self.has_gradient = gradients[0] is not None
        return Measurement(
            torch.cat([part.scores for part in scored]),
            torch.cat(gradients) if gradients[0] is not None else None,
            torch.cat([part.scores for part in heldout_scored]) if heldout is not None else None,
            join_info((part.info, len(part.scores)) for part in scored),
            join_info((part.info, len(part.scores)) for part in heldout_scored if part is not None),
        )

    def _measure_part(
        self, latents: torch.Tensor, prompts: list[PromptLike], differentiate: bool, heldout: Reward | None
    ) -> tuple[Scored, torch.Tensor | None, Scored | None]:
        latents = latents.detach().requires_grad_(differentiate)
        with torch.set_grad_enabled(differentiate):
            images = self._decoder.decode(latents, prompts)
            # Cut here: the reward's tape is gone before the decoder's backward pass, whose cotangent is then scaled.
            pixels = images.detach().float().requires_grad_(differentiate)
            scored = measure_images(self._reward, pixels, prompts)
        gradient = None
        if scored.scores.requires_grad:
            (pixel_gradient,) = torch.autograd.grad(scored.scores.sum(), pixels)
            (gradient,) = scaled_gradients(images, [latents], pixel_gradient, f"the images of {self._reward.name}")
        heldout_scored = None if heldout is None else measure_images(heldout, pixels.detach(), prompts)
        return Scored(scored.scores.detach(), scored.info), gradient, heldout_scored

    def _parts(
        self, latents: torch.Tensor, prompts: Sequence[PromptLike]
    ) -> list[tuple[torch.Tensor, list[PromptLike]]]:
        starts = range(0, len(prompts), self._batch_size)
        return [(latents[i : i + self._batch_size], list(prompts[i : i + self._batch_size])) for i in starts]


def _may_have_gradient(reward: Reward) -> bool:
    try:
        return reward.differentiable
    except RewardError:  # a user's callable that does not say; the first images will tell
        return True
