"""Stepwise backpropagation against plain autograd, and its memory."""

import pytest
import torch

from rlr_peft.byte_counters import counted_tape
from rlr_peft.chain import DenoisingChain, IntoParameters, ReplayedStep, Segment, run, scaled_gradients
from tests.pipelines import chain_over, tiny_stable_diffusion


def small_chain(num_steps: int, dtype: torch.dtype = torch.float64, **arguments) -> DenoisingChain:
    pipeline = tiny_stable_diffusion("v_prediction", dtype=dtype)
    pipeline.unet.requires_grad_(False)
    for name, parameter in pipeline.unet.named_parameters():
        parameter.requires_grad_("attn2.to_" in name)
    return chain_over(pipeline, num_inference_steps=num_steps, guidance_scale=3.0, **arguments)


def through_the_whole_tape(chain: DenoisingChain, trajectory, first: int, length: int, cotangent: torch.Tensor) -> list:
    """Plain autograd: the steps in sequence on one tape, x at the noisy end held fixed."""
    latents = trajectory.latents[first + length - 1]
    for t in range(first + length - 1, first - 1, -1):
        step = chain.replay(trajectory, t, latents)
        latents = step.mean if t == first else step.next_latents(trajectory.noise(t))
    return torch.autograd.grad((latents * cotangent).sum(), chain.parameters)


@pytest.mark.parametrize(("first", "length"), [(1, 5), (1, 1), (2, 3), (4, 2)])
def test_segment_gradient_is_that_of_plain_autograd(first: int, length: int) -> None:
    chain = small_chain(5)
    trajectory = chain.sample(["red", "blue"], [0, 1])
    cotangent = torch.randn_like(trajectory.latents[0])
    run(chain, trajectory, Segment("term", range(first, first + length), cotangent, weight=2.5))
    expected = through_the_whole_tape(chain, trajectory, first, length, 2.5 * cotangent)
    for parameter, gradient in zip(chain.parameters, expected, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-8 * gradient.norm()


def test_full_backpropagation_of_a_reward_equals_plain_autograd() -> None:
    chain = small_chain(4)
    trajectory = chain.sample(["red", "blue"], [0, 1])
    latents = trajectory.latents[4]
    for t in range(4, 0, -1):
        latents = chain.replay(trajectory, t, latents).next_latents(trajectory.noise(t))
    reward = chain.decode(latents, trajectory.prompts).square().sum()
    expected = torch.autograd.grad(reward, chain.parameters)

    leaf = trajectory.latents[0].clone().requires_grad_()
    (cotangent,) = torch.autograd.grad(chain.decode(leaf, trajectory.prompts).square().sum(), leaf)
    run(chain, trajectory, Segment("term", range(1, 5), cotangent))
    for parameter, gradient in zip(chain.parameters, expected, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-8 * gradient.norm()


def test_another_cotangent_may_go_into_the_parameters_than_travels_on() -> None:
    """At every step: the sum of two walks whose parts are known, by linearity."""
    chain = small_chain(4)
    trajectory = chain.sample(["red", "blue"], [0, 1])
    travelling, extra = torch.randn(2, *trajectory.latents[0].shape, dtype=torch.float64)
    seen = []

    def into_parameters(t: int, mean: torch.Tensor, cotangent: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        seen.append(t)
        assert not mean.requires_grad
        torch.testing.assert_close(mean, chain.replay(trajectory, t).mean.detach())
        return cotangent + t * extra, {}

    run(chain, trajectory, Segment("term", range(1, 4), travelling, weight=0.5, into_parameters=into_parameters))
    assert seen == [1, 2, 3]
    actual = [parameter.grad for parameter in chain.parameters]
    for parameter in chain.parameters:
        parameter.grad = None
    run(chain, trajectory, Segment("term", range(1, 4), travelling, weight=0.5))
    for t in (1, 2, 3):
        run(chain, trajectory, Segment("term", (t,), extra, weight=0.5 * t))
    for parameter, gradient in zip(chain.parameters, actual, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-8 * gradient.norm()


def test_a_replayed_step_gives_its_cotangents_together_or_one_after_the_other() -> None:
    chain = small_chain(3)
    trajectory = chain.sample(["red"], [0])
    cotangent = torch.randn_like(trajectory.latents[0])
    gradients, into_latents = ReplayedStep(chain, trajectory, 2).into_both(cotangent)
    step = ReplayedStep(chain, trajectory, 2)
    separate = step.into_parameters(cotangent, keep=True)
    assert torch.equal(step.into_latents(cotangent), into_latents)
    assert all(torch.equal(a, b) for a, b in zip(separate, gradients, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        step.into_latents(cotangent)  # the tape is gone


def test_gradients_add_up() -> None:
    chain = small_chain(3)
    trajectory = chain.sample(["red"], [0])
    cotangent = torch.randn_like(trajectory.latents[0])
    norm = run(chain, trajectory, Segment("term", (1, 2), cotangent)).norm
    once = [parameter.grad.clone() for parameter in chain.parameters]
    assert norm == pytest.approx(torch.cat([gradient.flatten() for gradient in once]).norm().item())
    run(chain, trajectory, Segment("term", (1, 2), cotangent))
    for parameter, gradient in zip(chain.parameters, once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


def test_tiny_cotangents_survive_half_precision() -> None:
    """A cotangent below the smallest fp16 number gives the scaled gradient, bit for bit."""
    chain = small_chain(2, torch.float16)
    trajectory = chain.sample(["red"], [0])
    cotangent = torch.randn_like(trajectory.latents[0])
    run(chain, trajectory, Segment("term", (1, 2), cotangent))
    expected = [parameter.grad.clone() for parameter in chain.parameters]
    for parameter in chain.parameters:
        parameter.grad = None
    run(chain, trajectory, Segment("term", (1, 2), cotangent * 2.0**-60))
    for parameter, gradient in zip(chain.parameters, expected, strict=True):
        assert torch.equal(parameter.grad, gradient * 2.0**-60)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 3e38), (torch.float32, 1e-44), (torch.float64, 1e308)])
def test_cotangents_at_the_ends_of_their_format_are_scaled_within_it(dtype: torch.dtype, size: float) -> None:
    leaf = torch.ones(2, dtype=dtype, requires_grad=True)
    cotangent = torch.tensor([size, 0.0], dtype=dtype)
    (gradient,) = scaled_gradients(leaf / 2, [leaf], cotangent, "here")
    assert torch.equal(gradient, cotangent / 2)


def test_bad_segments_and_derivatives_are_refused() -> None:
    chain = small_chain(3)
    trajectory = chain.sample(["red"], [0])
    cotangent = torch.zeros_like(trajectory.latents[0])
    for first, length in [(0, 1), (2, 3), (1, 0)]:
        with pytest.raises(ValueError, match=r"within steps 1\.\.3"):
            run(chain, trajectory, Segment("term", range(first, first + length), cotangent))
    with pytest.raises(FloatingPointError, match="finite derivatives at step 2"):
        run(chain, trajectory, Segment("term", (2,), cotangent * float("nan")))


def peak_bytes(num_steps: int, first: int, length: int, into_parameters: IntoParameters | None = None) -> int:
    chain = small_chain(num_steps)
    trajectory = chain.sample(["red", "blue"], [0, 1])
    cotangent = torch.ones_like(trajectory.latents[0])
    with counted_tape() as tape:
        run(
            chain, trajectory, Segment("term", range(first, first + length), cotangent, into_parameters=into_parameters)
        )
    return tape.peak


def test_peak_memory_grows_neither_with_t_nor_k_nor_h() -> None:
    """The tape holds one denoiser step: the peak of a two-step walk is that of any longer one, at any T."""
    two_steps = peak_bytes(4, 1, 2)
    assert two_steps > 0
    for num_steps, first, length in [(4, 1, 4), (12, 1, 12), (12, 1, 3), (12, 5, 2), (12, 3, 8)]:
        assert peak_bytes(num_steps, first, length) == two_steps
    for num_steps, length in [(4, 2), (4, 4), (12, 12)]:  # nor where two backward passes share a step's tape
        assert peak_bytes(num_steps, 1, length, lambda t, mean, cotangent: (cotangent + mean, {})) == two_steps
    chain = small_chain(4)  # and plain autograd does grow, by this very count
    trajectory = chain.sample(["red", "blue"], [0, 1])
    with counted_tape() as tape:
        through_the_whole_tape(chain, trajectory, 1, 4, torch.ones_like(trajectory.latents[0]))
    assert tape.peak > 3.5 * two_steps
