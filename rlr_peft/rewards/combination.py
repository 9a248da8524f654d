"""Several rewards as one: weighted, each on its own running scale, with hard minimums; or only measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rlr_peft.errors import RewardError
from rlr_peft.rewards.base import Metadata, Reward, Scored, measure_images
from rlr_peft.rewards.scores import Info

Scaling = Literal["running", "first", "group", "none"]
DECAY = 0.9
# A variance below this share of the mean square is what float32 networks round by: the scores are all equal.
ROUNDING = 1e-10
# Fewer scores say too little: the deviation of four is below a third of the true one in one case of twenty.
MIN_SCORES = 16


class RunningScale:
    """The standard deviation of a reward in earlier batches, by which the scores of a batch can be divided.

    Attributes:
        first: the scale of the first `MIN_SCORES` scores or more in a row that differed; 1 until then.
    """

    def __init__(self) -> None:
        self._variance = 0.0
        self._early: list[float] = []  # latest scores, as long as they are too few or too equal for a scale
        self.first = 1.0

    @property
    def current(self) -> float:
        """The scale of the batches so far; 1 as long as their scores were fewer than `MIN_SCORES`, or all equal."""
        return self._variance**0.5 if self._variance > 0 else 1.0

    def learn(self, scores: Tensor) -> None:
        """Adds the scores (N,) of a batch to the past; once there is a scale, a single one tells nothing."""
        if self._variance > 0:
            if len(scores) > 1:
                self._variance = DECAY * self._variance + (1 - DECAY) * _variance(scores)
            return
        early = torch.cat([torch.tensor(self._early, dtype=torch.float64), scores.double().cpu()])
        early = early[-max(MIN_SCORES, len(scores)) :]
        if len(early) >= MIN_SCORES and (own := _variance(early)) > 0:
            self._variance, self._early, self.first = own, [], own**0.5
        else:
            self._early = early.tolist()

    def state_dict(self) -> dict[str, Any]:
        """All that it goes by."""
        return {"variance": self._variance, "early": self._early, "first": self.first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._variance, self._early, self.first = state["variance"], list(state["early"]), state["first"]


def _variance(scores: Tensor) -> float:
    """Sample variance of scores (N,) in float64; 0 where they are equal up to rounding, or fewer than two."""
    values = scores.double()
    spread = float(values.var()) if len(values) > 1 else 0.0
    return spread if spread > ROUNDING * float(values.square().mean()) else 0.0


class _SeveralRewards(Reward):
    """Rewards that score the same images."""

    def __init__(self, rewards: Sequence[Reward]) -> None:
        self._rewards = dict(zip(unique_names(rewards), rewards, strict=True))
        # Each gets whole videos or their frames as it likes; `measure_images` sees to it.
        self.takes_video = any(reward.takes_video for reward in rewards)
        self.takes_latents = any(reward.takes_latents for reward in rewards)
        if self.takes_latents and not all(reward.takes_latents for reward in rewards):
            raise RewardError(
                "expected several rewards that all judge images or all judge latents (takes_latents), got "
                f"{', '.join(f'{r.name} (latents)' if r.takes_latents else r.name for r in rewards)}; train on one kind"
            )
        self.takes_images = all(reward.takes_images or not reward.takes_video for reward in rewards)
        self.overlaps = all(reward.overlaps for reward in rewards)

    @property
    def parts(self) -> list[Reward]:
        return list(self._rewards.values())

    @property
    def part_names(self) -> list[str]:
        return list(self._rewards)

    def _measure(self, images: Tensor, prompts: list[str], metadata: Metadata) -> tuple[dict[str, Tensor], Scored]:
        """The scores of all, attached to the images where they can be; and all numbers, with the first one's scores."""
        measured = {name: measure_images(r, images, prompts, metadata) for name, r in self._rewards.items()}
        scores = {name: scored.scores for name, scored in measured.items()}
        return scores, Scored(
            next(iter(scores.values())),
            {name: values.detach().cpu() for name, values in scores.items()},
            {f"{name}/{key}": values for name, scored in measured.items() for key, values in scored.info.items()},
        )

    def state_dict(self) -> dict[str, Any]:
        return {name: reward.state_dict() for name, reward in self._rewards.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, of the rewards that were there."""
        for name, reward in self._rewards.items():
            reward.load_state_dict(state.get(name, {}))


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


class WeightedRewards(_SeveralRewards):
    """``sum_i w_i r_i / s_i  -  penalty * sum_i max(0, (m_i - r_i) / s_i)``.

    The scale s_i is the standard deviation of r_i over earlier updates, never over the batch that it divides, so that
    the gradient of a batch stays unbiased for the sum as it stood when the batch was drawn. Beneath its minimum m_i a
    reward loses `penalty` more for every standard deviation, which outweighs what others gain there; the sum stays
    continuous, as a sudden loss would have no gradient for the first-order term to see.

    It is differentiable if all of its rewards are.

    Args:
        terms: one or more.
        scaling: "running" moves the scales with training, "first" keeps those of the first scores, "none" leaves the
            rewards in their own units; "group" is "first" for the logs, and the advantages are made of each by itself.
        penalty: weight of what lacks to a minimum.
    """

    def __init__(self, terms: Sequence[Term], scaling: Scaling = "running", penalty: float = 10.0) -> None:
        super().__init__([term.reward for term in terms])
        self._terms = dict(zip(self._rewards, terms, strict=True))
        self._scaling = scaling
        self._penalty = penalty
        self.name = " + ".join(f"{term.weight:g} {name}" for name, term in self._terms.items())
        self._join_differentiable()

    def settle(self, images: Tensor, prompts: list[str], metadata: Metadata) -> bool:
        """Whether all rewards are differentiable, after finding out about each."""
        settled = [reward.settle(images, prompts, metadata) for reward in self.parts]
        self.differentiable = all(settled)
        return self.differentiable

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        """The sum, every reward in its own units, and as info the share of images below a minimum.

        Raises:
            RewardError: of any of the rewards.
        """
        scores, measured = self._measure(images, prompts, metadata)
        below: Info = {
            f"{name}/below_minimum": (measured.raw[name] < term.minimum).float()
            for name, term in self._terms.items()
            if term.minimum is not None
        }
        return Scored(self._sum(scores), measured.raw, measured.info | below)

    def scales(self) -> dict[str, float]:
        return {} if self._scaling == "none" else {name: self._divisor(term) for name, term in self._terms.items()}

    def learn(self, raw: Mapping[str, Tensor]) -> None:
        """Adds an update's scores to the past, by which later ones are divided."""
        for name, term in self._terms.items():
            term.scale.learn(raw[name])

    def on_first_scales(self) -> WeightedRewards:
        """The same sum on the scales of the first scores; it goes on as this one learns."""
        if self._scaling == "none":
            return self
        return WeightedRewards(list(self._terms.values()), "first", self._penalty)

    def scores_on_first_scales(self, scores: Tensor, raw: Mapping[str, Tensor]) -> Tensor:
        """The sum of these rewards on the first scales, (N,)."""
        return self.on_first_scales()._sum(raw)

    def state_dict(self) -> dict[str, Any]:
        states = super().state_dict()
        return {name: {**term.scale.state_dict(), "reward": states[name]} for name, term in self._terms.items()}

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
        super().load_state_dict({name: state[name]["reward"] for name in state})
        self._join_differentiable()

    def _join_differentiable(self) -> None:
        known = {reward.differentiable for reward in self.parts}
        self.differentiable = False if False in known else None if None in known else True

    def _sum(self, scores: Mapping[str, Tensor]) -> Tensor:
        total = torch.zeros_like(next(iter(scores.values())))
        for name, term in self._terms.items():
            divisor = self._divisor(term)
            total = total + term.weight * scores[name] / divisor
            if term.minimum is not None:
                total = total - self._penalty * (term.minimum - scores[name]).clamp(min=0) / divisor
        return total

    def _divisor(self, term: Term) -> float:
        return {
            "running": term.scale.current,
            "first": term.scale.first,
            "group": term.scale.first,
            "none": 1.0,
        }[self._scaling]


class HeldoutRewards(_SeveralRewards):
    """Rewards that are only measured: the score is that of the first one, which may stop training.

    Args:
        rewards: two or more.
    """

    def __init__(self, rewards: Sequence[Reward]) -> None:
        super().__init__(rewards)
        self.name = self.part_names[0]

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        """The first reward's scores, and those of all."""
        return self._measure(images, prompts, metadata)[1]


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
