"""`assert_unbiased` on estimators as people write them: one that is right, and some that are not."""

from collections.abc import Iterable, Sequence

import pytest
import torch

from rlr_peft.chain import Chain, Segment
from rlr_peft.estimators import Coverage, Estimator, Objective, Rollout
from rlr_peft.testing import assert_unbiased


class ScoreFunction(Estimator):
    """The score function on every step that has noise; rewards that are not compared are its advantages."""

    scale = 1.0

    def describe(self, has_gradient: bool | None = None) -> str:
        return "a score term on every step"

    def coverage(self, chain: Chain, has_gradient: bool) -> Coverage:
        return Coverage(torch.ones(chain.num_steps, dtype=torch.float64), {})

    def advantages(self, rewards: torch.Tensor, prompts: Sequence[str], group_size: int) -> torch.Tensor:
        return rewards

    def segments(
        self, chain: Chain, objective: Objective, rollout: Rollout, advantages: torch.Tensor, generator: torch.Generator
    ) -> Iterable[Segment]:
        for t in range(1, chain.num_steps + 1):
            yield Segment("score", (t,), rollout.score_cotangent(t, advantages), self.scale)


class Scaled(ScoreFunction):
    """A mistake in a factor."""

    scale = 0.8


class Pathwise(ScoreFunction):
    """Backpropagation through the last K steps."""

    uses_reward_gradient = True

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def segments(
        self, chain: Chain, objective: Objective, rollout: Rollout, advantages: torch.Tensor, generator: torch.Generator
    ) -> Iterable[Segment]:
        assert rollout.reward_gradient is not None
        return [Segment("pathwise", range(1, self.steps + 1), rollout.reward_gradient)]


def test_an_unbiased_estimator_passes() -> None:
    bias = assert_unbiased(ScoreFunction(), last_std=0.2)
    assert bias.projection == pytest.approx(1, abs=0.1)
    assert assert_unbiased(Pathwise(6), calls=100).projection_error < 0.01


@pytest.mark.parametrize(
    ("estimator", "options"),
    [(Scaled(), {"last_std": 0.2}), (Pathwise(3), {"calls": 30}), (Pathwise(1), {"calls": 30})],
)
def test_a_biased_estimator_fails_with_its_numbers(estimator: ScoreFunction, options: dict) -> None:
    with pytest.raises(
        AssertionError, match=r"is biased: component \d+ of 12 is .* in closed form: a bias of"
    ) as caught:
        assert_unbiased(estimator, **options)
    message = str(caught.value)
    assert (
        "in closed form" in message
        and "with standard error" in message
        and "Along the gradient the mean is 0." in message
    )


def test_the_answer_is_the_same_every_time() -> None:
    first, second = (assert_unbiased(Pathwise(6), calls=20) for _ in range(2))
    assert torch.equal(first.mean, second.mean)


def test_too_few_estimates_prove_nothing() -> None:
    with pytest.raises(AssertionError, match=r"too noisy to tell: its mean is known to \d+.\d% of the gradient"):
        assert_unbiased(ScoreFunction(), last_std=0.2, calls=3, replicates=2)
