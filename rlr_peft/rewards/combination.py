"""Several rewards as one: weighted, each on its own scale, with hard minimums; and several that are only measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rlr_peft.rewards.base import Reward, RewardError, measure_images, settle_differentiable
from rlr_peft.rewards.info import Info
from rlr_peft.rewards.running_scale import RunningScale

Scaling = Literal["running", "first", "none"]
# Info that holds the weighted sum on the first scales, which do not move while training: curves show this one.
ON_FIRST_SCALES = "total"
BELOW_MINIMUM = "below_minimum"


@dataclass(frozen=True)
class Term:
    """One reward of a weighted sum.

    Attributes:
        reward: scores images.
        weight: factor of its scaled score; negative to lower it, 0 to only hold it above its minimum.
        minimum: in the reward's own units; None for none.
        scale: the standard deviation that it is divided by.
    """

    reward: Reward
    weight: float
    minimum: float | None = None
    scale: RunningScale = field(default_factory=RunningScale)


class WeightedRewards:
    """``sum_i w_i r_i / s_i  -  penalty * sum_i max(0, (m_i - r_i) / s_i)``.

    The scale s_i is the standard deviation of r_i over earlier updates, never over the batch that it divides, so that
    the gradient of a batch stays unbiased for the sum as it stood when the batch was drawn. Beneath its minimum m_i a
    reward loses `penalty` more for every standard deviation, which outweighs what others gain there; the sum stays
    continuous, as a sudden loss would have no gradient for the first-order term to see.

    It is differentiable if all of its rewards are.

    Args:
        terms: two or more, or one with a minimum.
        scaling: "running" moves the scales with training, "first" keeps those of the first scores, "none" leaves the
            rewards in their own units.
        penalty: weight of what lacks to a minimum.
    """

    def __init__(self, terms: Sequence[Term], scaling: Scaling = "running", penalty: float = 10.0) -> None:
        self._terms = dict(zip(unique_names([term.reward for term in terms]), terms, strict=True))
        self._scaling = scaling
        self._penalty = penalty
        # Every term gets whole videos or their frames as it likes; `measure_images` sees to it.
        self.takes_video = any(getattr(term.reward, "takes_video", False) for term in terms)
        self.name = " + ".join(f"{term.weight:g} {name}" for name, term in self._terms.items())

    @property
    def differentiable(self) -> bool:
        """Whether all terms are.

        Raises:
            RewardError: not known yet of a user's callable; `probe` will find out.
        """
        known = [_known_differentiable(term.reward) for term in self._terms.values()]
        if False in known:
            return False
        if None in known:
            raise RewardError(f"reward '{self.name}': not known yet whether it is differentiable")
        return True

    @property
    def parts(self) -> list[Reward]:
        """The rewards that are summed."""
        return [term.reward for term in self._terms.values()]

    def probe(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> bool:
        """`differentiable`, after finding out about every user's callable on these images."""
        return all([settle_differentiable(term.reward, images, prompts, metadata) for term in self._terms.values()])

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> tuple[Tensor, Info]:
        """(B,) float32; and as info every reward in its own units, and the sum on the first scales.

        Raises:
            RewardError: of any of the rewards.
        """
        measured = {name: measure_images(t.reward, images, prompts, metadata) for name, t in self._terms.items()}
        scores = {name: scored.scores for name, scored in measured.items()}
        info: Info = {}
        for name, scored in measured.items():
            info[name] = scored.scores.detach().cpu()
            info.update({f"{name}/{key}": values for key, values in scored.info.items()})
            minimum = self._terms[name].minimum
            if minimum is not None:
                info[f"{name}/{BELOW_MINIMUM}"] = (info[name] < minimum).float()
        info[ON_FIRST_SCALES] = self._sum({name: values.detach() for name, values in scores.items()}, first=True).cpu()
        return self._sum(scores, first=False), info

    def observe(self, info: Mapping[str, Tensor]) -> None:
        """Adds an update's scores to the past; every process must give those of all processes.

        Args:
            info: of this reward, name -> (N,).
        """
        for name, term in self._terms.items():
            term.scale.observe(info[name])

    @property
    def needs_scales(self) -> bool:
        """Whether the rewards are scaled."""
        return self._scaling != "none"

    def scales(self) -> dict[str, float]:
        """What every reward is divided by now."""
        return {name: self._divisor(term, first=False) for name, term in self._terms.items()}

    def state_dict(self) -> dict[str, Any]:
        """The scales."""
        return {name: term.scale.state_dict() for name, term in self._terms.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            RewardError: it is that of other rewards.
        """
        if state.keys() != self._terms.keys():
            raise RewardError(
                f"expected the running scales of {', '.join(self._terms)}, got those of {', '.join(state) or 'none'}; "
                "resume with the rewards that the run was started with"
            )
        for name, term in self._terms.items():
            term.scale.load_state_dict(state[name])

    def _sum(self, scores: Mapping[str, Tensor], first: bool) -> Tensor:
        total = torch.zeros_like(next(iter(scores.values())))
        for name, term in self._terms.items():
            divisor = self._divisor(term, first)
            total = total + term.weight * scores[name] / divisor
            if term.minimum is not None:
                total = total - self._penalty * (term.minimum - scores[name]).clamp(min=0) / divisor
        return total

    def _divisor(self, term: Term, first: bool) -> float:
        if self._scaling == "none":
            return 1.0
        return term.scale.first if first or self._scaling == "first" else term.scale.current


class OnFirstScales:
    """A `WeightedRewards` as its curves show it, on the scales of the first scores: comparable over a whole run."""

    def __init__(self, rewards: WeightedRewards) -> None:
        self._rewards = rewards
        self.name = rewards.name
        self.takes_video = rewards.takes_video
        self.parts = rewards.parts
        self.differentiable = False

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> tuple[Tensor, Info]:
        """(B,) float32, and every reward in its own units."""
        _, info = self._rewards(images, prompts, metadata)
        scores = info.pop(ON_FIRST_SCALES)
        return scores.to(images.device), info


class HeldoutRewards:
    """Rewards that are only measured: the first one is the score, which may stop training; the others are info.

    Args:
        rewards: two or more.
    """

    differentiable = False

    def __init__(self, rewards: Sequence[Reward]) -> None:
        self._rewards = dict(zip(unique_names(rewards), rewards, strict=True))
        self.parts = list(rewards)
        self.name = next(iter(self._rewards))
        self.takes_video = any(getattr(reward, "takes_video", False) for reward in rewards)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> tuple[Tensor, Info]:
        """(B,) float32 of the first reward, and the scores of all."""
        measured = {name: measure_images(r, images, prompts, metadata) for name, r in self._rewards.items()}
        info: Info = {}
        for name, scored in measured.items():
            info[name] = scored.scores.cpu()
            info.update({f"{name}/{key}": values for key, values in scored.info.items()})
        return measured[self.name].scores, info

    @property
    def names(self) -> list[str]:
        """Of all the rewards."""
        return list(self._rewards)


def unique_names(rewards: Sequence[Reward]) -> list[str]:
    """Their names; those that come again get a number."""
    names: list[str] = []
    for reward in rewards:
        name, number = reward.name, 1
        while name in names:
            number += 1
            name = f"{reward.name} ({number})"
        names.append(name)
    return names


def _known_differentiable(reward: Reward) -> bool | None:
    try:
        return reward.differentiable
    except RewardError:
        return None
