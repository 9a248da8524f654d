"""Clipped policy gradients against REINFORCE, and against plain autograd of the clipped surrogate."""

from dataclasses import replace

import pytest
import torch

from rlr_peft.chain import Chain
from rlr_peft.config import DDPOArguments, GRPOArguments
from rlr_peft.estimators import (
    Book,
    HalfOrder,
    PolicyGradientEstimator,
    RLREstimator,
    RLRSettings,
    Rollout,
    RunShape,
    clipped_cotangent,
    group_normalized,
    single_steps,
)
from rlr_peft.testing import LinearGaussianChain, QuadraticReward
from tests.estimators.chains import adapted_chain, flat, gradient_of, move_parameters, rollout_of

SINGLE = HalfOrder(1, "all")
CLIP = 0.2


def sampled(samples: int = 16) -> tuple[LinearGaussianChain, Rollout, torch.Tensor]:
    chain = LinearGaussianChain(num_steps=4)
    rollout, _ = rollout_of(chain, samples, 4)
    return chain, rollout, group_normalized(rollout.rewards, 4)


def policy_gradient(steps: HalfOrder = SINGLE, **knobs) -> PolicyGradientEstimator:
    drawn = {"ho_blocks": steps.blocks, "ho_start": steps.start, "ho_window": steps.window}
    return PolicyGradientEstimator(GRPOArguments(**{"clip_range": CLIP, **drawn, **knobs}), RunShape(4))


def log_density(chain: Chain, rollout: Rollout, t: int) -> torch.Tensor:
    """log p(x_{t-1} | x_t) under the present weights, summed over latent dimensions, (B,)."""
    step = chain.replay(rollout.trajectory, t)
    normal = torch.distributions.Normal(step.mean, step.std)
    return normal.log_prob(rollout.trajectory.latents[t - 1]).flatten(1).sum(1)


@pytest.mark.parametrize("steps", [SINGLE, HalfOrder(1, 2), HalfOrder(1, 1, "window", (2, 3))])
def test_with_the_sampling_weights_it_is_reinforce_with_the_same_advantages(steps: HalfOrder) -> None:
    chain, rollout, advantages = sampled()
    objective = QuadraticReward(chain)
    book = policy_gradient(steps).accumulate(chain, objective, rollout, advantages, torch.Generator().manual_seed(1))
    actual = gradient_of(chain)
    RLREstimator(RLRSettings(0, steps)).accumulate(
        chain, objective, rollout, advantages, torch.Generator().manual_seed(1)
    )
    torch.testing.assert_close(actual, gradient_of(chain), rtol=1e-9, atol=1e-9)
    assert book.numbers()["policy_ratio_deviation"] < 1e-12
    assert book.numbers()["policy_clip_fraction"] == 0


def test_on_stable_diffusion_too_the_ratio_is_1_and_it_is_reinforce() -> None:
    chain = adapted_chain(3)
    move_parameters(chain, 0.1)
    trajectory = chain.sample(["red", "blue b"], [0, 1])
    rollout, advantages = Rollout(trajectory, torch.zeros(2), None), torch.tensor([0.7, -1.1])
    book = policy_gradient().accumulate(chain, None, rollout, advantages, torch.Generator())
    actual = gradient_of(chain)
    assert book.numbers()["policy_ratio_deviation"] < 1e-6
    RLREstimator(RLRSettings(0, SINGLE)).accumulate(chain, None, rollout, advantages, torch.Generator())
    expected = gradient_of(chain)
    assert expected.norm() > 0 and (actual - expected).norm() <= 1e-6 * expected.norm()


def test_after_an_update_it_is_the_gradient_of_the_clipped_surrogate() -> None:
    """min(A r, A clip(r)) with r = exp(log p_new - log p_old), densities by torch.distributions, on the tape."""
    chain, rollout, advantages = sampled(64)
    with torch.no_grad():
        old = {t: log_density(chain, rollout, t) for t in (2, 3, 4)}
    move_parameters(chain, 0.04)
    surrogate, ratios = torch.zeros(()), {}
    for t in (2, 3, 4):
        ratios[t] = (log_density(chain, rollout, t) - old[t]).exp()
        clipped = ratios[t].clamp(1 - CLIP, 1 + CLIP)
        surrogate = surrogate + torch.minimum(advantages * ratios[t], advantages * clipped).sum()
    expected = flat(torch.autograd.grad(surrogate, chain.parameters))
    book = policy_gradient().accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator())
    torch.testing.assert_close(gradient_of(chain), expected, rtol=1e-9, atol=1e-9)

    deviations = torch.stack([(ratio - 1).abs() for ratio in ratios.values()]).detach()
    assert book.numbers()["policy_ratio_deviation"] == pytest.approx(float(deviations.mean()))
    assert book.numbers()["policy_clip_fraction"] == pytest.approx(float((deviations > CLIP).double().mean()))
    positive, above, below = advantages > 0, ratios[2] > 1 + CLIP, ratios[2] < 1 - CLIP
    for kind in (positive & above, positive & below, ~positive & above, ~positive & below):
        assert kind.any(), "the case must occur"
    mean = chain.replay(rollout.trajectory, 2).mean.detach()
    cotangent, numbers = clipped_cotangent(rollout.trajectory, advantages, 2, mean, clip_range=CLIP)
    assert numbers["policy_ratio_deviation"] == pytest.approx(float((ratios[2].detach() - 1).abs().mean()), rel=1e-9)
    is_clipped = (positive & above) | (~positive & below)
    assert torch.all(cotangent[is_clipped] == 0) and torch.all(cotangent[~is_clipped] != 0)


def test_beyond_the_divergence_limit_samples_are_masked_that_would_move_further_away() -> None:
    """The gradient of A r of all others, whatever their ratio."""
    chain, rollout, advantages = sampled(64)
    with torch.no_grad():
        old = log_density(chain, rollout, 2)
    move_parameters(chain, 0.04)
    mean = chain.replay(rollout.trajectory, 2).mean.detach().requires_grad_()
    std, taken = rollout.trajectory.std(2), rollout.trajectory.latents[1]
    ratio = (torch.distributions.Normal(mean, std).log_prob(taken).flatten(1).sum(1) - old).exp()
    (expected,) = torch.autograd.grad((advantages * ratio).sum(), mean)
    before = torch.distributions.Normal(taken - std * rollout.trajectory.noise(2), std)
    divergences = torch.distributions.kl_divergence(torch.distributions.Normal(mean.detach(), std), before).sum(1)
    limit = float(divergences.median())
    masked = (divergences > limit) & ((advantages > 0) == (ratio.detach() > 1))
    assert 0.1 < masked.double().mean() < 0.4
    cotangent, numbers = clipped_cotangent(
        rollout.trajectory, advantages, 2, mean.detach(), clip_range=CLIP, divergence_limit=limit
    )
    assert torch.all(cotangent[masked] == 0)
    torch.testing.assert_close(cotangent[~masked], expected[~masked], rtol=1e-9, atol=1e-12)
    assert numbers["policy_clip_fraction"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("knobs", "word"), [({}, "clipped"), ({"divergence_limit": 1.0}, "masked")])
def test_what_holds_later_epochs_is_said(knobs: dict, word: str) -> None:
    estimator = policy_gradient(inner_epochs=2, **knobs)
    assert f"with {word} ratios" in estimator.coverage(sampled()[0], False).describe()
    assert ("clipped" in estimator.describe()) == (word == "clipped")


@pytest.mark.parametrize("clip_range", [0.05, 1e9])
def test_the_normalised_ratio_is_grpo_guards(clip_range: float) -> None:
    """min(A r, A clip(r)) / dt with r = exp((log p - log p_old + KL) std), densities by torch.distributions."""
    chain, rollout, advantages = sampled(64)
    with torch.no_grad():
        old = {t: log_density(chain, rollout, t) for t in (2, 3, 4)}
    move_parameters(chain, 0.04)
    surrogate, ratios = torch.zeros(()), []
    for t in (2, 3, 4):
        start, end = chain.path_point(t), chain.path_point(t - 1)
        length = start.sigma / (start.alpha + start.sigma) - end.sigma / (end.alpha + end.sigma)
        std, noise = rollout.trajectory.std(t), rollout.trajectory.noise(t)
        mean, before = chain.replay(rollout.trajectory, t).mean, rollout.trajectory.latents[t - 1] - std * noise
        kl = torch.distributions.kl_divergence(
            torch.distributions.Normal(before, std), torch.distributions.Normal(mean, std)
        ).sum(1)
        log_ratio = log_density(chain, rollout, t) - old[t]
        log_normalised = (log_ratio + kl) * std / (end.alpha + end.sigma)
        assert log_ratio.mean() < 0 and log_normalised.mean().abs() < 0.3 * log_normalised.std(), "the bias is gone"
        ratios.append(log_normalised.exp())
        clipped = ratios[-1].clamp(1 - clip_range, 1 + clip_range)
        kept = torch.minimum(advantages * ratios[-1], advantages * clipped)
        surrogate = surrogate + kept.sum() / length
    expected = flat(torch.autograd.grad(surrogate, chain.parameters))
    estimator = policy_gradient(clip_range=clip_range, ratio_norm=True)
    book = estimator.accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator())
    torch.testing.assert_close(gradient_of(chain), expected, rtol=1e-9, atol=1e-9)
    share = float(((torch.stack(ratios) - 1).abs() > clip_range).double().mean())
    assert book.numbers()["policy_clip_fraction"] == pytest.approx(share) and (share > 0.1) == (clip_range < 1)


def test_a_ratio_that_overflows_harms_only_samples_that_want_to_leave() -> None:
    _, rollout, _ = sampled(4)
    advantages = torch.tensor([0.0, 1.0, -1.0, 0.0])
    # samples that were very unlikely when they were drawn, and are not any more
    trajectory = replace(rollout.trajectory, noises=1e3 * torch.ones_like(rollout.trajectory.noises))
    mean = trajectory.latents[1] + 1e-3
    cotangent, numbers = clipped_cotangent(trajectory, advantages, 2, mean, clip_range=CLIP)
    assert numbers["policy_ratio_deviation"] == torch.inf
    assert torch.all(cotangent[[0, 1, 3]] == 0)
    assert not torch.isfinite(cotangent[2]).any(), "the next step of the walk stops with a clear error"


def test_drawn_steps_average_to_all_steps() -> None:
    chain, rollout, advantages = sampled()
    move_parameters(chain, 0.04)
    policy_gradient().accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator())
    expected = gradient_of(chain)
    by_step: dict[int, torch.Tensor] = {}
    for seed in range(20):
        estimator = policy_gradient(HalfOrder(1, 1))
        ((block, weight),) = single_steps(estimator.steps, chain).draw(torch.Generator().manual_seed(seed))[0]
        assert weight == pytest.approx(3)  # steps 2, 3 and 4 have noise, one of them is drawn
        estimator.accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator().manual_seed(seed))
        by_step[block[0]] = gradient_of(chain)
    assert set(by_step) == {2, 3, 4}
    torch.testing.assert_close(torch.stack(list(by_step.values())).mean(0), expected)


def test_advantages_are_clipped_and_ddpo_keeps_statistics() -> None:
    rewards = torch.tensor([0.0, 0.0, 0.0, 10.0, 1.0, 1.0, 1.0, 1.0])
    prompts = ["a"] * 4 + ["b"] * 4
    grpo = policy_gradient(advantage_clip=1.0)
    torch.testing.assert_close(grpo.advantages(rewards, prompts, 4), group_normalized(rewards, 4).clamp(-1, 1))
    knobs = DDPOArguments(per_prompt_stat_tracking_buffer_size=8, per_prompt_stat_tracking_min_count=6)
    ddpo = PolicyGradientEstimator(knobs, RunShape(4))
    first = ddpo.advantages(rewards, prompts, 4)
    torch.testing.assert_close(ddpo.advantages(rewards, prompts, 4), first, msg="asking teaches nothing")
    ddpo.learn([Book(prompts, rewards.tolist(), first.tolist(), None, [], {})])
    torch.testing.assert_close(first, (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4))
    ddpo.learn([Book(["a"], [5.0], [0.0], None, [], {})])
    restored = PolicyGradientEstimator(knobs, RunShape(4))
    restored.load_state_dict(ddpo.state_dict())
    known = torch.tensor([0.0, 0.0, 0.0, 10.0, 5.0, 5.0])
    for each in (ddpo, restored):
        second = each.advantages(torch.tensor([5.0]), ["a"], 1)
        assert float(second) == pytest.approx(float((5 - known.mean()) / (known.std(correction=0) + 1e-4)), abs=1e-5)
