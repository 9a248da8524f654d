"""A bounded reward with a fine structure, for chains that amplify."""

from collections.abc import Sequence
from typing import Protocol

import torch

from rlr_peft.prompt import PromptLike


class HasSlope(Protocol):
    """A chain that lends the direction w, (d,)."""

    reward_slope: torch.Tensor


class WaveReward:
    """``R = sin(w . x_0)``: bounded, but as steep as the chain amplifies, so that pathwise gradients become noise.

    Args:
        chain: holds w.
        differentiable: whether the estimators may use the gradient.
    """

    def __init__(self, chain: HasSlope, differentiable: bool = True) -> None:
        self._slope = chain.reward_slope
        self.differentiable = differentiable

    def score(self, latents: torch.Tensor, prompts: Sequence[PromptLike]) -> torch.Tensor:
        """Rewards (B,)."""
        return torch.sin(latents @ self._slope)

    def score_with_gradient(
        self, latents: torch.Tensor, prompts: Sequence[PromptLike]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards (B,) and their gradients (B, d)."""
        return self.score(latents, prompts), torch.cos(latents @ self._slope)[:, None] * self._slope
