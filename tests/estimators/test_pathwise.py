"""The members of the pathwise family against plain autograd and against the formula of the family."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.guided_mixture import GuidedMixtureChain
from rlr_peft.byte_counters import counted_tape
from rlr_peft.chain import Segment
from rlr_peft.config import METHODS
from rlr_peft.estimators import (
    CoverageError,
    DecodedReward,
    PathwiseEstimator,
    Rollout,
    RunShape,
    build_estimator,
    leap_weights,
    reference_mean,
    step_sizes,
)
from rlr_peft.rewards import CallableReward
from rlr_peft.testing import LinearGaussianChain, QuadraticReward
from tests.estimators.chains import adapted_chain, flat, gradient_of, move_parameters, rollout_of


def member(estimator: str, **knobs: Any) -> PathwiseEstimator:
    built = build_estimator(METHODS[estimator](**knobs), RunShape(6))
    assert isinstance(built, PathwiseEstimator)
    return built


def gradients_by_step(chain: LinearGaussianChain, rollout: Rollout) -> dict[int, torch.Tensor]:
    """The reward of the prediction at every step, differentiated through that step on the tape."""
    gradients = {}
    for t in range(1, chain.num_steps + 1):
        predicted = chain.replay(rollout.trajectory, t).pred_original_sample
        reward = QuadraticReward(chain).score(predicted, rollout.trajectory.prompts).sum()
        gradients[t] = flat(torch.autograd.grad(reward, chain.parameters))
    return gradients


@pytest.mark.parametrize(("last_steps", "expected"), [(1, {1}), (3, {1, 2, 3}), (None, {1, 2})])
def test_it_differentiates_the_reward_of_the_prediction_at_one_of_the_last_steps(
    last_steps: int | None, expected: set[int]
) -> None:
    """Without a number it is one of the last quarter, rounded up: 2 of 6."""
    chain = LinearGaussianChain(num_steps=6)
    rollout, advantages = rollout_of(chain, 8, 4)
    candidates = gradients_by_step(chain, rollout)
    drawn = []
    for seed in range(30):
        evaluations = chain.denoiser_evaluations
        member("refl", fo_steps=last_steps).accumulate(
            chain, QuadraticReward(chain), rollout, advantages, torch.Generator().manual_seed(seed)
        )
        assert chain.denoiser_evaluations == evaluations + 8, "it costs one replay"
        gradient = gradient_of(chain)
        drawn += [t for t, candidate in candidates.items() if torch.allclose(gradient, candidate, rtol=1e-9)]
    assert len(drawn) == 30 and set(drawn) == expected


def test_on_stable_diffusion_it_is_plain_autograd_through_denoiser_and_decoder() -> None:
    chain = adapted_chain(4)
    move_parameters(chain, 0.1)
    trajectory = chain.sample(["red", "blue b"], [0, 1])

    def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.square().mean((1, 2, 3))

    objective = DecodedReward(chain, CallableReward("brightness", brightness), 1)
    measured = objective.measure(trajectory.latents[0], trajectory.prompts)
    rollout = Rollout(trajectory, measured.scored.scores, measured.reward_gradient)
    member("refl", fo_steps=1).accumulate(chain, objective, rollout, rollout.rewards, torch.Generator())
    actual = gradient_of(chain)
    predicted = chain.replay(trajectory, 1).pred_original_sample
    reward = brightness(chain.decode(predicted, trajectory.prompts), trajectory.prompts).sum()
    expected = flat(torch.autograd.grad(reward, chain.parameters))
    assert (actual - expected).norm() <= 1e-6 * expected.norm()  # the pixels are float32


PATHWISE = ["full-bp", "truncated-bp", "draft-lv", "drtune", "leap", "flowbp-sparse", "flowbp-bridge", "refl", "rsm"]


@pytest.mark.parametrize("name", [*PATHWISE, "adjoint-matching"])
def test_a_reward_without_gradient_is_refused(name: str) -> None:
    with pytest.raises(CoverageError, match=f"differentiable reward for {name}"):
        build_estimator(METHODS[name](), RunShape(6)).coverage(LinearGaussianChain(), has_gradient=False)


def held_through(
    chain: LinearGaussianChain, rollout: Rollout, chosen: dict[int, float], bridge: int = 0
) -> torch.Tensor:
    """The family's formula on one tape: steps are detached from their inputs but for the held velocity.

    Args:
        chain: the chain.
        rollout: of it.
        chosen: weight by step.
        bridge: the step through whose denoiser half of the gradient passes; 0 for none.
    """
    total = 0
    for t, weight in chosen.items():
        latents = chain.replay(rollout.trajectory, t).mean
        for s in range(t - 1, 0, -1):
            kept = rollout.trajectory.latents[s]
            held = chain.input_sensitivity(s) * (latents - latents.detach())
            step = chain.replay(rollout.trajectory, s, kept).mean.detach() + held
            if s == bridge:
                leaf = kept + latents - latents.detach()
                frozen = [parameter.detach() for parameter in chain.parameters]
                step = 0.5 * chain.step(leaf, s, frozen).mean + 0.5 * step
            latents = step
        total = total + weight * (latents * rollout.reward_gradient).sum()
    return flat(torch.autograd.grad(total, chain.parameters))


def drawn_sets(chain: LinearGaussianChain, count: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(1, chain.num_steps + 1), count))


def test_sparse_steps_follow_the_formula_with_the_velocity_held() -> None:
    chain = LinearGaussianChain(num_steps=5)
    rollout, advantages = rollout_of(chain, 8, 4)
    sizes, estimator = step_sizes(chain), member("flowbp-sparse", fo_steps=2, step_correction=0.5)
    seen = set()
    for seed in range(25):
        chain.denoiser_evaluations = 0
        book = estimator.accumulate(
            chain, QuadraticReward(chain), rollout, advantages, torch.Generator().manual_seed(seed)
        )
        assert chain.denoiser_evaluations == 2 * 8 and book.backward_passes == 2 and book.first_order_steps == 2
        gradient = gradient_of(chain)
        for steps in drawn_sets(chain, 2):
            weight = 1 + 0.5 * (sum(sizes) / sum(sizes[t - 1] for t in steps) - 1)
            if torch.allclose(gradient, held_through(chain, rollout, dict.fromkeys(steps, weight)), rtol=1e-9):
                seen.add(steps)
                break
        else:
            pytest.fail("the gradient is that of no pair of steps")
    assert len(seen) >= 5


def test_a_bridge_passes_one_denoiser_by_half() -> None:
    chain = LinearGaussianChain(num_steps=4)
    rollout, advantages = rollout_of(chain, 8, 4)
    estimator = member("flowbp-bridge", fo_steps=4, step_correction=0.0)
    bridges = set()
    for seed in range(12):
        book = estimator.accumulate(
            chain, QuadraticReward(chain), rollout, advantages, torch.Generator().manual_seed(seed)
        )
        assert book.backward_passes == 4
        gradient = gradient_of(chain)
        bridges |= {
            bridge
            for bridge in range(1, 4)
            if torch.allclose(
                gradient, held_through(chain, rollout, dict.fromkeys(range(1, 5), 1.0), bridge), rtol=1e-9
            )
        }
    assert bridges == {1, 2, 3}, "the last step leads nowhere"


def test_drtune_follows_the_prediction_of_a_late_step() -> None:
    chain = LinearGaussianChain(num_steps=5)
    rollout, advantages = rollout_of(chain, 8, 4)
    member("drtune", fo_steps=2, stop_share=0.2).accumulate(
        chain, QuadraticReward(chain), rollout, advantages, torch.Generator().manual_seed(0)
    )
    gradient = gradient_of(chain)
    trajectory = rollout.trajectory
    at_stop = chain.replay(trajectory, 1).pred_original_sample
    _, cotangent = QuadraticReward(chain).score_with_gradient(at_stop.detach(), trajectory.prompts)
    last = chain.replay(trajectory, 5).mean
    point = chain.path_point(1)  # with the velocity held, x_1 moves its prediction by 1 / (alpha + sigma)
    factor = chain.input_sensitivity(2) * chain.input_sensitivity(3) * chain.input_sensitivity(4)
    total = (at_stop * cotangent).sum() + factor / (point.alpha + point.sigma) * (last * cotangent).sum()
    expected = flat(torch.autograd.grad(total, chain.parameters))
    assert (gradient - expected).norm() <= 1e-9 * expected.norm()


def test_two_leaps_stand_in_for_the_chain() -> None:
    """On the mixture, whose predictions lie on a path: x_k leaps to x_j, x_j to the clean end, straight through."""
    chain = GuidedMixtureChain(num_steps=4, dimension=3)
    trajectory = chain.sample(["a", "b"], [0, 1])
    rollout = Rollout(trajectory, torch.zeros(2), torch.randn(2, 3, dtype=torch.float64))
    member("leap", fo_carry=0.3).accumulate(chain, None, rollout, rollout.rewards, torch.Generator().manual_seed(3))
    gradient = gradient_of(chain)
    candidates = []
    for later, earlier in itertools.combinations(range(1, 5), 2):
        weights = leap_weights(chain, rollout, later, earlier)
        cotangent = weights[:, None] * rollout.reward_gradient
        start, end = chain.path_point(earlier), chain.path_point(later)
        reached = trajectory.latents[later].clone().requires_grad_()
        second = chain.replay(trajectory, later, reached).pred_original_sample
        held = cotangent / (end.alpha + end.sigma)
        *into_parameters, into_latents = torch.autograd.grad((second * cotangent).sum(), [*chain.parameters, reached])
        carried = 0.3 * into_latents + 0.7 * held
        predicted = chain.replay(trajectory, earlier).pred_original_sample
        first = (end.alpha - end.sigma * start.alpha / start.sigma) * predicted
        leapt = torch.autograd.grad((first * carried).sum(), chain.parameters)
        candidates.append(flat(into_parameters) + flat(leapt))
    assert any(torch.allclose(gradient, candidate, rtol=1e-9) for candidate in candidates)


def test_renoised_copies_are_averaged_with_the_image() -> None:
    """A linear reward has the same gradient everywhere, so that copies differ in their inputs alone."""
    chain = LinearGaussianChain(num_steps=3)
    rollout, advantages = rollout_of(chain, 4, 4)
    book = member("draft-lv", renoised_copies=3).accumulate(
        chain, QuadraticReward(chain), rollout, advantages, torch.Generator().manual_seed(0)
    )
    assert [booking.weight for booking in book.bookings] == [0.25] * 4 and book.backward_passes == 4
    gradient_of(chain)
    inputs = [segment.trajectory for segment in renoised(chain, rollout, 2)]
    point = chain.path_point(1)
    noises = [(copy.latents[1] - point.alpha * copy.latents[0]) / point.sigma for copy in inputs]
    assert not torch.allclose(noises[0], noises[1])
    assert all(noise.std() == pytest.approx(1, abs=0.5) for noise in noises)


def renoised(chain: LinearGaussianChain, rollout: Rollout, copies: int) -> list[Segment]:
    generator = torch.Generator().manual_seed(0)
    segments = member("draft-lv", renoised_copies=copies).segments(
        chain, QuadraticReward(chain), rollout, rollout.rewards, generator
    )
    return list(segments)[1:]


def test_rsm_clips_long_reward_gradients_at_their_running_quantile() -> None:
    chain = LinearGaussianChain(num_steps=3, last_std=0.2)
    rollout, advantages = rollout_of(chain, 10, 10)
    gradient = rollout.reward_gradient.clone()
    gradient[0] *= 1000
    estimator = member("rsm", fo_steps=3)
    steep = replace(rollout, reward_gradient=gradient)
    segments = estimator.segments(chain, QuadraticReward(chain), steep, advantages, torch.Generator())
    (segment,) = segments
    norms = gradient.norm(dim=1)
    limit = norms.quantile(0.8)
    torch.testing.assert_close(segment.cotangent.norm(dim=1), norms.clamp(max=limit))
    assert segment.sample_weights[:, 0].mean() == pytest.approx(1) and segment.note == pytest.approx(norms.tolist())
    restored = member("rsm")
    estimator.learn(
        [estimator.accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator().manual_seed(0))]
    )
    restored.load_state_dict(estimator.state_dict())
    assert restored.state_dict() == estimator.state_dict() and len(estimator.state_dict()["norms"]) == 10


def test_adjoint_matching_sweeps_through_the_base_and_pulls_towards_it() -> None:
    chain = LinearGaussianChain(num_steps=3, last_std=0.2)
    with torch.no_grad():
        chain.parameters[0].add_(0.1)
    rollout, advantages = rollout_of(chain, 8, 8)
    trajectory = rollout.trajectory
    estimator = build_estimator(METHODS["adjoint-matching"](fo_steps=3, reward_scale=10.0), RunShape(3))
    estimator.accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator().manual_seed(0))
    actual = gradient_of(chain)
    total, cotangent = 0, rollout.reward_gradient
    for t in (1, 2, 3):
        mean, base = chain.replay(trajectory, t).mean, reference_mean(chain, trajectory, t)
        pull = cotangent - (mean.detach() - base) / (10 * chain.std(t) ** 2)
        total = total + (mean * pull).sum()
        leaf = trajectory.latents[t].clone().requires_grad_()
        (cotangent,) = torch.autograd.grad((chain.replay_reference(trajectory, t, leaf).mean * cotangent).sum(), leaf)
    expected = flat(torch.autograd.grad(total, chain.parameters))
    assert (actual - expected).norm() <= 1e-9 * expected.norm()


def test_adjoint_matching_holds_one_tape_at_a_time() -> None:
    """Each of the base's is gone before one of the adapter's is made."""
    chain, peaks = adapted_chain(num_steps=3), []
    objective = DecodedReward(chain, CallableReward("unasked", lambda images, prompts: images), 2)
    trajectory = chain.sample(["red", "blue"], [0, 1])
    rollout = Rollout(trajectory, torch.zeros(2), torch.ones_like(trajectory.latents[0]))
    for estimator in (METHODS["full-bp"](), METHODS["adjoint-matching"](fo_steps=3)):
        with counted_tape() as tape:
            build_estimator(estimator, RunShape(3)).accumulate(
                chain, objective, rollout, torch.zeros(2), torch.Generator().manual_seed(0)
            )
        peaks.append(tape.peak)
    assert peaks[1] <= peaks[0]


def test_at_the_base_adjoint_matching_is_full_backpropagation() -> None:
    chain = LinearGaussianChain(num_steps=3, last_std=0.2)
    rollout, advantages = rollout_of(chain, 8, 8)
    for estimator in (build_estimator(METHODS["adjoint-matching"](fo_steps=3), RunShape(3)), member("full-bp")):
        estimator.accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator().manual_seed(0))
    both = gradient_of(chain)
    member("full-bp").accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator())
    torch.testing.assert_close(both, 2 * gradient_of(chain))


def test_a_random_tail_is_drawn_evenly() -> None:
    chain = LinearGaussianChain(num_steps=4)
    (rollout, advantages), generator = rollout_of(chain, 4, 4), torch.Generator().manual_seed(0)
    estimator = member("truncated-bp", fo_steps="random")
    segments = [
        next(estimator.segments(chain, QuadraticReward(chain), rollout, advantages, generator)) for _ in range(400)
    ]
    counts = torch.bincount(torch.tensor([len(segment.steps) for segment in segments]), minlength=5)
    # 400 draws of probability 1/4 have a standard deviation of 8.7
    assert counts[0] == 0 and all(abs(int(count) - 100) < 5 * 8.7 for count in counts[1:])
    weights = estimator.coverage(chain, True).weights
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64))


def test_the_coverage_of_drawn_steps_is_simulated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every update asks for it."""
    estimator, drawn = member("flowbp-sparse"), [0]
    own = estimator.choose

    def choose(*arguments: Any) -> Any:
        drawn[0] += 1
        return own(*arguments)

    monkeypatch.setattr(estimator, "choose", choose)
    chain = LinearGaussianChain(num_steps=6)
    weights = estimator.coverage(chain, True).weights
    once = drawn[0]
    assert torch.equal(estimator.coverage(chain, True).weights, weights) and drawn[0] == once
    assert len(estimator.coverage(LinearGaussianChain(num_steps=8), True).weights) == 8 and drawn[0] == 2 * once


def test_what_is_left_out_and_what_is_weighted_otherwise_is_told_apart() -> None:
    chain = LinearGaussianChain(num_steps=4)
    words = member("truncated-bp", fo_steps=2, fo_coefficient=0.5).coverage(chain, True).describe()
    assert "steps 1-2 of 4 are given another weight than 1 on purpose" in words
    assert "steps 3-4 of 4 are left out because the gradient is truncated" in words
