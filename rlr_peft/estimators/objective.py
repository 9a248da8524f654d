"""The objective R(x_0): clean latents to rewards, and rewards back to latents; and the scored samples of an update.

With a limit it is ``min(R(x_0), limit)``, for every gradient, score and advantage alike: they all ask for it here.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch

from rlr_peft.chain.adjoint import per_sample, scaled_gradients
from rlr_peft.chain.steps import Chain, Decoder, Trajectory
from rlr_peft.errors import RewardError
from rlr_peft.prompt import Prompt, PromptLike, texts_of
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
            scores.append(score_images(self._reward, self._judged(part, texts).float(), texts))
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

    def begin(
        self, latents: torch.Tensor, prompts: Sequence[PromptLike], differentiate: bool = True
    ) -> Callable[[], Measurement]:
        """Begins to ``measure``; what it returns waits for the result, and raises what went wrong.

        A reward that ``overlaps`` is asked meanwhile: wait for it before beginning again. Any other, and one with a
        gradient, has been asked.
        """
        if not self._reward.overlaps or self.has_gradient:
            measured = self.measure(latents, prompts, differentiate)
            return lambda: measured
        parts = [(self._decode(part, texts), texts) for part, texts in self._parts(latents, prompts)]
        scored = _begin_asking(self._reward, parts)
        heldout = None if self._heldout is None else _begin_asking(self._heldout, parts)

        def finish() -> Measurement:
            answer = scored()
            return Measurement(answer, self.limited(answer.scores), None, None if heldout is None else heldout())

        return finish

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
            images = self._judged(latents, prompts)
            # Cut here: the reward's tape is gone before the decoder's backward pass, whose cotangent is then scaled.
            pixels = images.detach().float().requires_grad_(differentiate)
            scored = measure_images(self._reward, pixels, prompts)
        rewards, gradient = self.limited(scored.scores), None
        if rewards.requires_grad:
            (pixel_gradient,) = torch.autograd.grad(rewards.sum(), pixels)
            if self._reward.takes_latents:
                gradient = pixel_gradient.to(latents)
            else:
                (gradient,) = scaled_gradients(images, [latents], pixel_gradient, f"the images of {self._reward.name}")
        heldout_scored = None
        if heldout is not None:
            seen = self._decode(latents, prompts) if self._reward.takes_latents else pixels.detach()
            heldout_scored = measure_images(heldout, seen, prompts)
        return Measurement(replace(scored, scores=scored.scores.detach()), rewards.detach(), gradient, heldout_scored)

    def _judged(self, latents: torch.Tensor, prompts: Sequence[PromptLike]) -> torch.Tensor:
        """What the reward looks at: the latents themselves, or what is decoded of them."""
        return latents if self._reward.takes_latents else self._decoder.decode(latents, prompts)

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor, prompts: Sequence[PromptLike]) -> torch.Tensor:
        return self._decoder.decode(latents.detach(), prompts).float()

    def _parts(
        self, latents: torch.Tensor, prompts: Sequence[PromptLike]
    ) -> list[tuple[torch.Tensor, list[PromptLike]]]:
        starts = range(0, len(prompts), self._batch_size)
        return [(latents[i : i + self._batch_size], list(prompts[i : i + self._batch_size])) for i in starts]


@dataclass(frozen=True)
class Rollout:
    """One micro-batch of scored samples.

    Attributes:
        trajectory: the samples, batch size B.
        rewards: R(x_0) of every sample, (B,).
        reward_gradient: dR/dx_0 of every sample, (B, ...); None for a reward without gradient.
    """

    trajectory: Trajectory
    rewards: torch.Tensor
    reward_gradient: torch.Tensor | None

    def select(self, samples: list[int]) -> "Rollout":
        """The rollout of some of the samples."""
        return Rollout(
            trajectory=self.trajectory.select(samples),
            rewards=self.rewards[samples],
            reward_gradient=None if self.reward_gradient is None else self.reward_gradient[samples],
        )

    def score_cotangent(self, t: int, advantages: torch.Tensor) -> torch.Tensor:
        """``A eps_t / sigma_t``, the cotangent at the mean of step t of a score-function term, (B, ...).

        Args:
            advantages: A, (B,).

        Raises:
            ValueError: step t is deterministic, so that it has no likelihood ratio.
        """
        std = self.trajectory.std(t)
        if std == 0:
            raise ValueError(f"Expected noise at step {t}, got std = 0: a score-function term is undefined there.")
        return per_sample(advantages, self.trajectory.noise(t)) * self.trajectory.noise(t) / std


@dataclass(frozen=True)
class Batch:
    """The scored samples of one process for one update.

    Attributes:
        micro_batches: the samples and what they scored.
    """

    micro_batches: list[tuple[Trajectory, Measurement]]

    @property
    def prompts(self) -> list[str]:
        """The texts of all samples, (N,)."""
        return [text for trajectory, _ in self.micro_batches for text in texts_of(trajectory.prompts)]

    @cached_property
    def scored(self) -> Scored:
        """All samples, by the reward."""
        return join_scored([measured.scored for _, measured in self.micro_batches])

    @cached_property
    def rewards(self) -> torch.Tensor:
        """What is raised of all samples, (N,)."""
        return torch.cat([measured.rewards for _, measured in self.micro_batches])

    @cached_property
    def heldout(self) -> Scored | None:
        """The same by the held-out reward; None without one."""
        parts = [measured.heldout for _, measured in self.micro_batches if measured.heldout is not None]
        return join_scored(parts) if parts else None

    @property
    def rollouts(self) -> list[Rollout]:
        """What an estimator gets to see, micro-batch by micro-batch."""
        return [
            Rollout(trajectory, measured.rewards, measured.reward_gradient)
            for trajectory, measured in self.micro_batches
        ]


def sample_batch(
    chain: Chain,
    objective: DecodedReward,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    micro_batch_size: int,
    antithetic: bool = False,
    differentiate: bool = True,
) -> Batch:
    """Samples and scores every prompt; a reward that ``overlaps`` is asked while the next micro-batch is sampled.

    Args:
        prompts: one per sample, those of a group side by side.
        seeds: one per sample.
        micro_batch_size: samples per trajectory.
        antithetic: every second sample gets the negated noises of the one before.
        differentiate: whether the rewards' gradients are wanted.
    """
    trajectories: list[Trajectory] = []
    finishing: list[Callable[[], Measurement]] = []
    measured: list[Measurement] = []
    for start in range(0, len(prompts), micro_batch_size):
        part = slice(start, start + micro_batch_size)
        noises = mirrored_pairs(chain.draw_noises(seeds[part][::2])) if antithetic else None
        trajectory = chain.sample(prompts[part], seeds[part], noises)
        measured += [finish() for finish in finishing]  # one question at a time, and no more images than those wait
        finishing = [objective.begin(trajectory.latents[0], trajectory.prompts, differentiate)]
        trajectories.append(trajectory)
    measured += [finish() for finish in finishing]
    return Batch(list(zip(trajectories, measured, strict=True)))


def _begin_asking(reward: Reward, parts: list[tuple[torch.Tensor, list[PromptLike]]]) -> Callable[[], Scored]:
    """Asks for the scores of images, in a thread of its own if the reward ``overlaps``; returns what waits for them."""
    if not reward.overlaps:
        answer = join_scored([measure_images(reward, images, texts) for images, texts in parts])
        return lambda: answer
    device = parts[0][0].device
    # Copied here: in the other thread, the copies would queue behind what this one gives the GPU to do next.
    copies = [(images.cpu(), texts) for images, texts in parts]
    future: Future[Scored] = Future()

    def ask() -> None:
        try:
            future.set_result(join_scored([measure_images(reward, images, texts) for images, texts in copies]))
        except BaseException as error:
            future.set_exception(error)

    # Not an executor, which would hold up the end of a program that was told to stop until the server answers.
    threading.Thread(target=ask, daemon=True).start()

    def wait() -> Scored:
        answer = future.result()
        return replace(answer, scores=answer.scores.to(device))

    return wait


def mirrored_pairs(noises: torch.Tensor) -> torch.Tensor:
    """Every sample's noises followed by their negatives: (T + 1, B, ...) becomes (T + 1, 2 B, ...)."""
    return torch.stack([noises, -noises], dim=2).flatten(1, 2)
