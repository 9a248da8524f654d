"""The divergence from the base: closed form, gradient, drawn steps, and the reference model inside a pipeline."""

import pytest
import torch

from rlr_peft.chain import adjoint
from rlr_peft.estimators import (
    KLPenalty,
    NoDivergenceError,
    Rollout,
    kl_segments,
    path_kl,
    reference_mean,
    reference_steps,
    step_kl,
)
from rlr_peft.testing import LinearGaussianChain
from tests.estimators.chains import adapted_chain, flat, gradient_of, move_parameters, rollout_of
from tests.pipelines import chain_over, tiny_stable_diffusion

BETA = 0.3


def moved_chain() -> tuple[LinearGaussianChain, Rollout]:
    chain = LinearGaussianChain(num_steps=4)
    move_parameters(chain, 0.2)
    return chain, rollout_of(chain, 8, 4)[0]


def exact_kl(chain: LinearGaussianChain, rollout: Rollout) -> torch.Tensor:
    """Sum over the steps with noise of the KL by torch.distributions, (B,), on the tape."""
    total = torch.zeros(8, dtype=torch.float64)
    for t in (2, 3, 4):
        step = chain.replay(rollout.trajectory, t)
        present = torch.distributions.Normal(step.mean, step.std)
        reference = torch.distributions.Normal(reference_mean(chain, rollout.trajectory, t), step.std)
        total = total + torch.distributions.kl_divergence(present, reference).sum(1)
    return total


def accumulate(chain, rollout: Rollout, penalty: KLPenalty, seed: int = 0) -> torch.Tensor:
    references = reference_steps(chain, rollout.trajectory, penalty.steps, torch.Generator().manual_seed(seed))
    for segment in kl_segments(rollout.trajectory, references, penalty.beta) if penalty.beta else ():
        adjoint.run(chain, rollout.trajectory, segment)
    return path_kl(rollout.trajectory, references)


def test_a_steps_kl_is_that_of_its_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, reference = torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64)
    normals = [torch.distributions.Normal(m, 0.4) for m in (mean, reference)]
    torch.testing.assert_close(
        step_kl(mean, reference, 0.4), torch.distributions.kl_divergence(*normals).flatten(1).sum(1)
    )


def test_value_and_gradient_are_those_of_the_closed_form() -> None:
    chain, rollout = moved_chain()
    kl = exact_kl(chain, rollout)
    expected = flat(torch.autograd.grad(-BETA * kl.sum(), chain.parameters))
    torch.testing.assert_close(accumulate(chain, rollout, KLPenalty(BETA, "all")), kl.detach())
    torch.testing.assert_close(gradient_of(chain), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(accumulate(chain, rollout, KLPenalty(0.0, "all")), kl.detach())
    assert not gradient_of(chain).any(), "with beta 0 it is only measured"
    torch.testing.assert_close(accumulate(chain, rollout, KLPenalty(BETA, 50)), kl.detach())  # more than there are


@pytest.mark.parametrize("steps", ["all", 1])
def test_a_chain_whose_only_step_ends_clean_has_no_divergence(steps) -> None:
    chain = LinearGaussianChain(num_steps=1)
    with pytest.raises(NoDivergenceError, match=r"Expected noise in the chain.*got none in its 1 step\(s\)"):
        accumulate(chain, rollout_of(chain, 4, 4)[0], KLPenalty(BETA, steps))


@pytest.mark.parametrize("steps", [1, 2])
def test_drawn_steps_average_to_all_steps(steps: int) -> None:
    """Over 600 draws, within 5 standard errors in every component of the gradient and for every sample's KL."""
    chain, rollout = moved_chain()
    exact = torch.cat([accumulate(chain, rollout, KLPenalty(BETA, "all")), gradient_of(chain)])
    drawn = torch.stack(
        [
            torch.cat([accumulate(chain, rollout, KLPenalty(BETA, steps), seed), gradient_of(chain)])
            for seed in range(600)
        ]
    )
    error = drawn.std(0) / 600**0.5
    assert torch.all(error < 0.1 * exact.abs().max()), "the test must resolve a bias of half of the largest"
    assert torch.all((drawn.mean(0) - exact).abs() <= 5 * error)


def test_on_stable_diffusion_it_is_zero_at_the_start_and_positive_after_an_update() -> None:
    chain = adapted_chain(4)
    for beta in (BETA, 0.0):
        rollout = Rollout(chain.sample(["red", "blue b"], [0, 1]), torch.zeros(2), None)
        divergence = accumulate(chain, rollout, KLPenalty(beta, "all"))
        assert torch.all(divergence < 1e-20)  # the present mean is recovered from the samples, up to rounding
        assert not gradient_of(chain).any()
    move_parameters(chain, 0.1)
    rollout = Rollout(chain.sample(["red", "blue b"], [0, 1]), torch.zeros(2), None)
    divergence = accumulate(chain, rollout, KLPenalty(BETA, "all"))
    assert torch.all(divergence > 1e-6) and gradient_of(chain).norm() > 0
    torch.testing.assert_close(accumulate(chain, rollout, KLPenalty(0.0, "all")), divergence)


def test_a_step_along_the_gradient_lowers_the_divergence() -> None:
    chain, rollout = moved_chain()
    before = accumulate(chain, rollout, KLPenalty(BETA, "all"))
    torch.testing.assert_close(before, exact_kl(chain, rollout).detach())
    with torch.no_grad():
        for parameter in chain.parameters:
            parameter.add_(parameter.grad, alpha=0.01 / float(parameter.grad.norm()))
    gradient_of(chain)
    assert exact_kl(chain, rollout).sum() < before.sum()


def test_the_reference_is_the_base_and_leaves_the_adapter_as_it_was() -> None:
    chain = adapted_chain(4)
    move_parameters(chain, 0.1)
    trajectory = chain.sample(["red", "blue b"], [0, 1])
    trainable = [parameter.requires_grad for parameter in chain.denoiser.parameters()]
    assert any(trainable) and not all(trainable)
    base = tiny_stable_diffusion("v_prediction", timestep_spacing="trailing", dtype=torch.float64)
    bare_chain = chain_over(base, num_inference_steps=4, guidance_scale=3.0)
    for t in range(1, 5):
        reference = reference_mean(chain, trajectory, t)
        assert not reference.requires_grad
        with torch.no_grad():
            torch.testing.assert_close(reference, bare_chain.replay(trajectory, t).mean, rtol=0, atol=1e-12)
        assert [parameter.requires_grad for parameter in chain.denoiser.parameters()] == trainable
        step = chain.replay(trajectory, t)
        assert torch.equal(step.next_latents(trajectory.noise(t)), trajectory.latents[t - 1]), "the adapter is on again"
        assert not torch.equal(step.mean, reference)
        gradients = torch.autograd.grad(step.mean.square().sum(), chain.parameters)
        assert all(gradient.norm() > 0 for gradient in gradients)


def test_a_chain_without_reference_says_so() -> None:
    chain = chain_over(tiny_stable_diffusion(), num_inference_steps=2)
    with pytest.raises(RuntimeError, match="a chain with a reference model"):
        reference_mean(chain, chain.sample(["red"], [0]), 1)
