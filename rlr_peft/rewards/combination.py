"""Several rewards as one: weighted, each on its own running scale, with hard minimums; or only measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rlr_peft.rewards.base import Reward, RewardError, measure_images, settle_differentiable
from rlr_peft.rewards.scores import Info

Scaling = Literal["running", "first", "none"]
DECAY = 0.9
# A variance below this share of the mean square is what float32 networks round by: the scores are all equal.
ROUNDING = 1e-10
# Fewer scores say too little: the deviation of four is below a third of the true one in one case of twenty.
MIN_SCORES = 16
# Info that holds the weighted sum on the first scales, which do not move while training: curves show this one.
ON_FIRST_SCALES = "total"
BELOW_MINIMUM = "below_minimum"


class RunningScale:
    """Remembers variances of batches; a batch can be divided by the scale of those before it.

    Args:
        decay: weight of the past.

    Attributes:
        first: the scale of the first `MIN_SCORES` scores or more in a row that differed; 1 until then.
    """

    def __init__(self, decay: float = DECAY) -> None:
        self._decay = decay
        self._variance = 0.0
        self._early: list[float] = []  # latest scores, as long as they are too few or too equal for a scale
        self.first = 1.0

    @property
    def current(self) -> float:
        """The scale of the batches so far; 1 as long as their scores were fewer than `MIN_SCORES`, or all equal."""
        return self._variance**0.5 if self._variance > 0 else 1.0

    def observe(self, scores: Tensor) -> None:
        """Adds the scores (N,) of a batch to the past; once there is a scale, a single one tells nothing."""
        if self._variance > 0:
            if len(scores) > 1:
                self._variance = self._decay * self._variance + (1 - self._decay) * variance(scores)
            return
        early = torch.cat([torch.tensor(self._early, dtype=torch.float64), scores.double().cpu()])
        early = early[-max(MIN_SCORES, len(scores)) :]
        if len(early) >= MIN_SCORES and (own := variance(early)) > 0:
            self._variance, self._early, self.first = own, [], own**0.5
        else:
            self._early = early.tolist()

    def state_dict(self) -> dict[str, Any]:
        """All that was remembered."""
        return {"variance": self._variance, "early": self._early, "first": self.first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._variance, self._early, self.first = state["variance"], list(state["early"]), state["first"]


def variance(scores: Tensor) -> float:
    """Sample variance of scores (N,) in float64; 0 where they are equal up to rounding, or fewer than two."""
    values = scores.double()
    spread = float(values.var()) if len(values) > 1 else 0.0
    return spread if spread > ROUNDING * float(values.square().mean()) else 0.0


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
