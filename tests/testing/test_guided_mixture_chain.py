"""The mixture chain against quadrature, against the mixture that it must sample, and against itself."""

import pytest
import torch

from benchmarks.guided_mixture import GuidedMixtureChain, WaveReward
from rlr_peft.estimators import Rollout, leave_one_out


def test_the_prediction_is_the_posterior_mean() -> None:
    """In one dimension, against the integral over all x_0."""
    chain = GuidedMixtureChain(num_steps=5, dimension=1, components=2, width=0.3)
    clean = torch.linspace(-6, 6, 20_001, dtype=torch.float64)
    prior = torch.exp(-((clean[:, None] - chain.parameters[0][0, :, 0]) ** 2) / (2 * chain.width**2)).sum(1)
    latents = torch.tensor([[-0.7], [0.1], [1.3]], dtype=torch.float64)
    trajectory = chain.sample(["", "", ""], [0, 1, 2])
    for t in (1, 3, 5):
        alpha, sigma = chain._points[t].alpha, chain._points[t].sigma
        posterior = prior * torch.exp(-((latents - alpha * clean) ** 2) / (2 * sigma**2))
        expected = (posterior * clean).sum(1) / posterior.sum(1)
        prediction = chain.replay(trajectory, t, latents).pred_original_sample[:, 0]
        assert torch.allclose(prediction, expected, atol=1e-9)


def test_without_guidance_it_samples_the_mixture() -> None:
    chain = GuidedMixtureChain(num_steps=100, dimension=2, components=4, width=0.3)
    samples = chain.sample([""] * 20_000, list(range(20_000))).latents[0]
    means = chain.parameters[0][0].detach()
    assert torch.allclose(samples.mean(0), means.mean(0), atol=0.05)
    within = chain.width**2 * torch.eye(2, dtype=torch.float64)
    assert torch.allclose(samples.T.cov(), means.T.cov(correction=0) + within, atol=0.06)


def test_guidance_leads_to_the_condition() -> None:
    chain = GuidedMixtureChain(num_steps=20, guidance_scale=4.0)
    samples = chain.sample([""] * 500, list(range(500))).latents[0]
    nearest = torch.cdist(samples, chain.parameters[0][0].detach()).argmin(1)
    assert float((nearest < 2).double().mean()) > 0.99


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_score_terms_and_pathwise_gradients_agree_on_average(guidance_scale: float) -> None:
    """Two unbiased estimates of the same gradient, at 99.9 % over all components of the means together."""
    chain = GuidedMixtureChain(8, dimension=2, components=2, guidance_scale=guidance_scale, replicates=20_000)
    rollout = _rollout(chain, 4 * 20_000)
    for t in range(2, 9):
        pathwise, score = _gradients(chain, rollout, t)
        difference = score - pathwise
        z = difference.mean(0) / difference.std(0) * len(difference) ** 0.5
        assert float(z.abs().max()) < 4.5, f"step {t}"


def test_early_steps_are_chaotic() -> None:
    """There pathwise gradients are noisier than score terms, by a few samples; at the clean end they are quieter."""
    chain = GuidedMixtureChain(20, width=0.8, replicates=4000)
    rollout = _rollout(chain, 4000)
    for t, is_chaotic in ((2, False), (14, True)):
        pathwise, score = _gradients(chain, rollout, t)
        ratio = float(pathwise.var(0).sum() / score.var(0).sum())
        assert ratio > 2 if is_chaotic else ratio < 0.1
    squares = pathwise.square().sum(1).sort(descending=True).values
    assert float(squares[:40].sum() / squares.sum()) > 0.5, "one sample in a hundred makes up most of it"


def _rollout(chain: GuidedMixtureChain, samples: int) -> Rollout:
    trajectory = chain.sample([""] * samples, list(range(samples)))
    rewards, gradient = WaveReward(chain).score_with_gradient(trajectory.latents[0], trajectory.prompts)
    return Rollout(trajectory, rewards, gradient)


def _gradients(chain: GuidedMixtureChain, rollout: Rollout, t: int) -> list[torch.Tensor]:
    """Pathwise gradient and score term of step t, (R, number of parameters) each."""
    gradients, advantages = [], leave_one_out(rollout.rewards, 4)
    for cotangent in (_pathwise_cotangent(chain, rollout, t), rollout.score_cotangent(t, advantages)):
        mean = chain.replay(rollout.trajectory, t).mean
        gradients.append(torch.autograd.grad((mean * cotangent).sum(), chain.parameters)[0].flatten(1))
    return gradients


def _pathwise_cotangent(chain: GuidedMixtureChain, rollout: Rollout, t: int) -> torch.Tensor:
    """d R(x_0) / d x_{t-1}, by plain backpropagation through the later steps."""
    start = rollout.trajectory.latents[t - 1].clone().requires_grad_()
    latents = start
    for later in range(t - 1, 0, -1):
        latents = chain.step(latents, later, chain.parameters).next_latents(rollout.trajectory.noise(later))
    return torch.autograd.grad(WaveReward(chain).score(latents, []).sum(), start)[0]
