"""Rewards back to latents: against plain autograd, in half precision, and for rewards of every kind."""

import pytest
import torch

from rlr_peft.chain import DenoisingChain
from rlr_peft.errors import RewardError
from rlr_peft.estimators import DecodedReward, leave_one_out
from rlr_peft.rewards import CallableReward, load_reward
from tests.pipelines import chain_over, tiny_stable_diffusion

PROMPTS = ["red", "blue b", "c"]


def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))


def chain_and_latents(dtype: torch.dtype = torch.float32) -> tuple[DenoisingChain, torch.Tensor]:
    chain = chain_over(tiny_stable_diffusion().to(dtype), num_inference_steps=2)
    return chain, chain.draw_noises([0, 1, 2])[2]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_gradient_is_that_of_plain_autograd_in_every_batch_size(batch_size: int) -> None:
    chain, latents = chain_and_latents(torch.float64)
    objective = DecodedReward(
        chain, CallableReward("redness", redness), batch_size, load_reward("jpeg-compressibility")
    )
    measured = objective.measure(latents, PROMPTS)
    leaf = latents.clone().requires_grad_()
    rewards = redness(chain.decode(leaf, PROMPTS), PROMPTS)
    (expected,) = torch.autograd.grad(rewards.sum(), leaf)
    torch.testing.assert_close(measured.scored.scores, rewards.float())
    assert (measured.reward_gradient - expected).norm() <= 1e-6 * expected.norm()  # the pixels are float32
    assert measured.heldout is not None and measured.heldout.scores.shape == (3,)
    torch.testing.assert_close(objective.score(latents, PROMPTS), measured.scored.scores)


def test_faint_gradients_survive_a_half_precision_decoder() -> None:
    """A mean over a 512 x 512 image has pixel gradients of 4e-6, which float16 alone rounds to nothing."""

    def faint_redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return redness(images, prompts) * 1e-3

    gradients = []
    for dtype in (torch.float32, torch.float16):
        chain, latents = chain_and_latents(dtype)
        objective = DecodedReward(chain, CallableReward("faint", faint_redness), 3)
        gradients.append(objective.measure(latents, PROMPTS).reward_gradient)
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def test_a_reward_without_gradient_leaves_no_tape() -> None:
    chain, latents = chain_and_latents()
    objective = DecodedReward(chain, load_reward("jpeg-compressibility"), 2)
    assert not objective.has_gradient
    decoded_with_tape = []
    chain.pipeline.vae.decoder.register_forward_hook(lambda *_: decoded_with_tape.append(torch.is_grad_enabled()))
    measured = objective.measure(latents, PROMPTS)
    assert measured.reward_gradient is None and measured.heldout is None
    assert decoded_with_tape == [False, False]


def test_no_tape_where_no_gradient_is_wanted() -> None:
    chain, latents = chain_and_latents()
    objective = DecodedReward(chain, CallableReward("redness", redness), 2)
    taped = []
    chain.pipeline.vae.decoder.register_forward_hook(lambda *_: taped.append(torch.is_grad_enabled()))
    measured = objective.measure(latents, PROMPTS, differentiate=False)
    assert taped == [False, False] and measured.reward_gradient is None
    assert objective.has_gradient, "nothing was found out"
    differentiated = objective.measure(latents, PROMPTS)
    assert taped[2:] == [True, True] and differentiated.reward_gradient is not None
    torch.testing.assert_close(measured.scored.scores, differentiated.scored.scores)


def test_an_undeclared_callable_is_found_out_about() -> None:
    chain, latents = chain_and_latents()
    objective = DecodedReward(
        chain, CallableReward("blind", lambda images, prompts: images.detach().mean((1, 2, 3))), 3
    )
    assert objective.has_gradient
    assert objective.measure(latents, PROMPTS).reward_gradient is None
    assert not objective.has_gradient


def test_bad_scores_stop_the_measurement() -> None:
    chain, latents = chain_and_latents()
    reward = CallableReward("broken", lambda images, prompts: images.mean((1, 2, 3)) / 0)
    with pytest.raises(RewardError, match=r"reward 'broken': expected finite scores.*\"blue b\""):
        DecodedReward(chain, reward, 3).measure(latents, PROMPTS)


class Identity:
    """Latents that are images already."""

    def decode(self, latents: torch.Tensor, prompts: object) -> torch.Tensor:
        return latents


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.mean((1, 2, 3))


def test_at_or_above_the_limit_there_is_no_gradient_and_below_all_is_as_without() -> None:
    images = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    limit = float(brightness(images, [])[1])  # exactly that of one
    prompts = ["a"] * 4
    plain = DecodedReward(Identity(), CallableReward("brightness", brightness), 2)
    limited = DecodedReward(Identity(), CallableReward("brightness", brightness), 2, limit=limit)
    without, measured = plain.measure(images, prompts), limited.measure(images, prompts)
    assert torch.equal(without.scored.scores, measured.scored.scores), "what is logged stays"
    is_satisfied = without.scored.scores >= limit
    assert 1 < is_satisfied.sum() < 4 and torch.equal(limited.satisfied(without.scored.scores), is_satisfied)
    assert measured.reward_gradient[is_satisfied].abs().max() == 0
    assert torch.equal(measured.reward_gradient[~is_satisfied], without.reward_gradient[~is_satisfied])
    expected = without.scored.scores.clamp(max=limit)
    for rewards in (
        measured.rewards,
        limited.score(images, prompts),
        limited.score_with_gradient(images, prompts)[0],
        limited.limited(without.scored.scores),
    ):
        assert torch.equal(rewards, expected)
    assert torch.equal(limited.score_with_gradient(images, prompts)[1], measured.reward_gradient)


def test_pathwise_gradients_and_score_terms_agree_with_the_limited_objective_in_closed_form() -> None:
    """x ~ N(theta, 1), R(x) = x: the derivative of E min(x, L) by theta is P(x < L)."""
    noise = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    theta, limit = 0.3, 0.5
    images = (theta + noise).reshape(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    objective = DecodedReward(Identity(), CallableReward("brightness", brightness), len(noise), limit=limit)
    measured = objective.measure(images, ["a"] * len(noise))
    exact = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(limit - theta))
    scores = leave_one_out(measured.rewards, 4) * noise
    for estimates in (measured.reward_gradient.sum((1, 2, 3)), scores):
        assert (estimates.mean() - exact).abs() < 4 * estimates.std() / len(noise) ** 0.5
    unlimited = leave_one_out(measured.scored.scores, 4) * noise  # of the raw scores: another objective
    assert (unlimited.mean() - exact).abs() > 20 * unlimited.std() / len(noise) ** 0.5
