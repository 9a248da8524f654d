"""Paired comparison against scipy, and the evaluation loop against direct calls."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from rlr_peft.compare import (
    Evaluation,
    evaluate,
    flat_metrics,
    mean_and_standard_error,
    paired_gains,
    prompts_and_seeds,
)
from rlr_peft.errors import RewardError
from rlr_peft.rewards import Reward, Scored, load_reward


class Brightness(Reward):
    name = "brightness"
    differentiable = True

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Scored:
        return Scored(images.mean(dim=(1, 2, 3)))


def render(prompts: list[str], seeds: list[int]) -> Tensor:
    """Noise of each image's own generator, shifted by the length of its prompt: depends on all that it should."""
    noise = [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    shift = torch.tensor([len(prompt) / 100 for prompt in prompts])
    return (torch.stack(noise) * 0.5 + shift[:, None, None, None]).clamp(0, 1)


def evaluation(scores: np.ndarray) -> Evaluation:
    count = len(scores)
    return Evaluation(
        [f"p{i}" for i in range(count)], list(range(count)), {"reward": torch.tensor(scores)}, torch.empty(0)
    )


def test_paired_statistics_equal_scipys() -> None:
    rng = np.random.default_rng(0)
    old = rng.normal(0.5, 0.3, 200).astype(np.float32)
    new = (old + rng.normal(0.02, 0.05, 200)).astype(np.float32)
    new[:10] = old[:10]
    result = paired_gains(evaluation(old), evaluation(new))["reward"]
    old, new = old.astype(np.float64), new.astype(np.float64)
    assert result["before"] == pytest.approx(old.mean())
    assert result["before_se"] == pytest.approx(stats.sem(old))
    assert result["after_se"] == pytest.approx(stats.sem(new))
    assert result["gain"] == pytest.approx((new - old).mean())
    assert result["gain_se"] == pytest.approx(stats.sem(new - old))
    assert result["gain"] / result["gain_se"] == pytest.approx(stats.ttest_rel(new, old).statistic)
    assert result["gain_se"] < 0.3 * result["after_se"]  # what pairing is for
    assert result["win_rate"] == pytest.approx(((new > old).sum() + 5) / 200)
    assert result["n"] == 200


def test_large_offsets_do_not_cost_digits() -> None:
    mean, error = mean_and_standard_error(torch.tensor([16777216.0, 16777218.0, 16777220.0]))
    assert mean == 16777218.0
    assert error == pytest.approx(2 / 3**0.5)


def test_one_score_has_no_standard_error() -> None:
    with pytest.raises(ValueError, match="at least 2 scores"):
        paired_gains(evaluation(np.array([0.5])), evaluation(np.array([0.6])))


def test_comparing_different_plans_is_refused() -> None:
    first = evaluation(np.array([0.5, 0.6]))
    for change in ({"seeds": [0, 2]}, {"prompts": ["p0", "other"]}, {"scores": {"heldout": torch.zeros(2)}}):
        other = Evaluation(**{**first.__dict__, **change})
        with pytest.raises(ValueError, match="same prompts, seeds and rewards"):
            paired_gains(first, other)


def test_flat_metrics_have_the_names_of_the_metrics_file() -> None:
    both = Evaluation(["a", "b"], [0, 1], {"reward": torch.rand(2), "heldout": torch.rand(2)}, torch.empty(0))
    flat = flat_metrics(paired_gains(both, both))
    for name in ("reward", "heldout"):
        for key in ("before", "before_se", "after", "after_se", "gain", "gain_se"):
            assert isinstance(flat[f"{name}_{key}"], float)
        assert flat[f"{name}_gain"] == 0.0
        assert flat[f"{name}_win_rate"] == 0.5
    assert flat["n"] == 2
    assert flat_metrics({}) == {}


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_scores_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    prompts, seeds = prompts_and_seeds(["a", "bb", "ccc"], 7, seed=1)
    rewards = {"reward": Brightness(), "heldout": load_reward("jpeg-compressibility")}
    result = evaluate(render, prompts, seeds, rewards, batch_size, num_kept_images=4)
    images = torch.cat([render([prompt], [seed]) for prompt, seed in zip(prompts, seeds, strict=True)])
    assert torch.allclose(result.scores["reward"], images.mean(dim=(1, 2, 3)))
    assert torch.equal(result.scores["heldout"], load_reward("jpeg-compressibility")(images, prompts, []).scores)
    assert torch.equal(result.images, images[:4])
    assert result.prompts == prompts
    assert result.seeds == seeds


def test_nothing_is_recorded_for_a_gradient() -> None:
    weight = torch.ones(1, requires_grad=True)
    result = evaluate(lambda prompts, seeds: render(prompts, seeds) * weight, ["a"], [0], {"r": Brightness()}, 1)
    assert not result.scores["r"].requires_grad
    assert not result.images.requires_grad


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 8, 8), r"return \(2, 3, height, width\)"),
        (torch.zeros(2, 1, 8, 8), r"return \(2, 3, height, width\)"),
        (torch.full((2, 3, 8, 8), 255.0), r"in \[0, 1\], got values from 255"),
        (torch.full((2, 3, 8, 8), -1.0), "decode and clamp"),
        (torch.full((2, 3, 8, 8), float("nan")), "nan"),
    ],
)
def test_a_renderer_that_returns_something_else_is_refused(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(lambda prompts, seeds: images, ["a", "b"], [0, 1], {"r": Brightness()}, 2)


def test_a_plan_needs_a_seed_per_prompt() -> None:
    with pytest.raises(ValueError, match="2 prompts, 1 seeds"):
        evaluate(render, ["a", "b"], [0], {"r": Brightness()}, 2)


def test_a_bad_reward_stops_the_evaluation() -> None:
    class Broken(Brightness):
        def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Scored:
            return Scored(super().__call__(images, prompts, metadata).scores / 0.0)

    with pytest.raises(RewardError, match="expected finite scores"):
        evaluate(render, ["a", "b"], [0, 1], {"r": Broken()}, 1)


def test_a_plan_uses_every_prompt_equally_often_and_every_seed_once() -> None:
    prompts = [f"p{index}" for index in range(10)]
    chosen, seeds = prompts_and_seeds(prompts, 256, seed=0)
    assert len(set(seeds)) == 256
    assert set(Counter(chosen).values()) == {25, 26}
    assert len(set(prompts_and_seeds(prompts, 7, seed=0)[0])) == 7


def test_plans_are_reproducible_nested_and_differ_between_seeds() -> None:
    prompts = [f"p{index}" for index in range(10)]
    long_prompts, long_seeds = prompts_and_seeds(prompts, 64, seed=3)
    assert prompts_and_seeds(prompts, 64, seed=3) == (long_prompts, long_seeds)
    assert prompts_and_seeds(prompts, 20, seed=3) == (long_prompts[:20], long_seeds[:20])
    other_prompts, other_seeds = prompts_and_seeds(prompts, 64, seed=4)
    assert other_prompts != long_prompts
    assert not set(other_seeds) & set(long_seeds)
    with pytest.raises(ValueError, match="at least one"):
        prompts_and_seeds([], 3, seed=0)


def test_images_of_one_prompt_do_not_count_as_prompts() -> None:
    """Gains that differ between prompts and hardly between seeds: 300 sets of prompts tell how much the mean varies."""
    generator = torch.Generator().manual_seed(0)
    prompts = [f"p{index // 4}" for index in range(64)]

    def gains() -> Tensor:
        of_prompts = torch.randn(16, generator=generator).repeat_interleave(4)
        return of_prompts + 0.3 * torch.randn(64, generator=generator)

    drawn = [mean_and_standard_error(gains(), prompts) for _ in range(300)]
    spread = np.std([mean for mean, _ in drawn])
    assert np.mean([error for _, error in drawn]) == pytest.approx(spread, rel=0.1)
    assert mean_and_standard_error(gains())[1] < 0.65 * spread, "as if all were prompts of their own"


def test_a_single_prompt_is_judged_by_its_images() -> None:
    scores = torch.tensor([0.0, 1.0, 3.0])
    assert mean_and_standard_error(scores, ["a"] * 3) == pytest.approx((4 / 3, stats.sem([0, 1, 3])))
    two = Evaluation(["a", "b", "b"], [0, 1, 2], {"reward": scores}, torch.empty(0))
    assert paired_gains(two, two)["reward"]["prompts"] == 2 and paired_gains(two, two)["reward"]["n"] == 3
    # Sums over prompts of what is left of the mean 4/3: -4/3 and 4/3.
    assert paired_gains(two, two)["reward"]["before_se"] == pytest.approx((2 * 2 * (4 / 3) ** 2) ** 0.5 / 3)
