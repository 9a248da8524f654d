"""Forward-process RL: its losses by plain autograd, its direction, and how far that is the score function's."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from rlr_peft.byte_counters import counted_tape
from rlr_peft.chain import GaussianStep, PathPoint, ReplayedStep, step_std
from rlr_peft.config import AWMArguments, NFTArguments, RAMArguments
from rlr_peft.estimators import (
    ForwardEstimator,
    HalfOrder,
    LevelOutputs,
    RLREstimator,
    RLRSettings,
    Rollout,
    RunShape,
    awm_pull,
    build_estimator,
    leave_one_out,
    nft_pull,
    ram_pull,
)
from rlr_peft.lora import attach_lora
from rlr_peft.prompt import as_prompts
from rlr_peft.testing import LinearGaussianChain, QuadraticReward, ReplicatedChain
from tests.estimators.chains import adapted_chain, flat, gradient_of, move_parameters, rollout_of
from tests.families.image_pipelines import sd3
from tests.pipelines import chain_over, tiny_stable_diffusion

SHAPE = (6, 2, 3)
SIZE = 6
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -0.25, 0.0, 0.75], dtype=torch.float64)
FREE = AWMArguments(
    noise_levels=5, advantage_clip=5.0, old_pull=0.0, old_decay=0.0, base_pull=1e-30
)  # so faint that the base is asked, and nothing pulls
METHODS = {"ram": RAMArguments, "nft": NFTArguments, "awm": AWMArguments}


def mean_square(values: torch.Tensor) -> torch.Tensor:
    return values.square().mean((1, 2))


def loss_of(name: str, output, old, base, target, share: float) -> torch.Tensor:
    """The table of the docstring, sample by sample, for the settings of the test below."""
    if name == "ram":
        aim = (base + 30 * ADVANTAGES[:, None, None] * (target - old)).detach()
        return mean_square(output - aim)
    if name == "nft":  # as published for flow models: in x_0, whose error is the share of noise times the velocity's
        beta, clip = 0.4, 2.0
        chance = ADVANTAGES / (2 * clip) + 0.5
        good, bad = ((1 - beta) * old + beta * output, (1 + beta) * old - beta * output)
        errors = [share * (velocity - target) for velocity in (good, bad)]
        sizes = [error.abs().mean((1, 2)).detach() for error in errors]
        good, bad = (mean_square(error) / size for error, size in zip(errors, sizes, strict=True))
        return clip / beta * (chance * good + (1 - chance) * bad)
    ratio = (-mean_square(output - target) + mean_square(old - target)).exp()
    policy = torch.minimum(ADVANTAGES * ratio, ADVANTAGES * ratio.clamp(1 - 0.05, 1 + 0.05))
    return -policy + 0.7 * mean_square(output - old)


@pytest.mark.parametrize(
    ("name", "pull"),
    [
        ("ram", lambda compared: ram_pull(compared, scale=30)),
        ("nft", lambda compared: nft_pull(compared, beta=0.4, clip=2.0)),
        ("awm", lambda compared: awm_pull(compared, clip=0.05, old_pull=0.7)),
    ],
)
def test_a_pull_is_minus_the_losss_derivative(name: str, pull) -> None:
    generator = torch.Generator().manual_seed(0)
    old, base, target, step = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(4))
    output = (old + 0.2 * step).requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(name, output, old, base, target, 0.3).sum(), output)
    now = output.detach()
    got, numbers = pull(LevelOutputs(now - old, target - old, now - base, ADVANTAGES, 0.3))
    torch.testing.assert_close(got / SIZE, -expected, rtol=1e-9, atol=1e-12)
    if name == "awm":
        assert numbers["policy_ratio_deviation"] > 0.05
        pulled_only = [bool(torch.allclose(row, -1.4 * moved)) for row, moved in zip(got, now - old, strict=True)]
        assert sum(pulled_only) in (2, 3, 4), "ratios of some samples are clipped, beside the one without advantage"


@pytest.mark.parametrize("name", METHODS)
def test_on_policy_all_three_follow_the_same_direction(name: str) -> None:
    """``sum_i c_i A_i J^T (u - o_old)``, with c = 2 m / D, 2 s / (D w) and 2 / D of RAM, NFT and AWM."""
    chain = LinearGaussianChain(num_steps=3)
    rollout, advantages = rollout_of(chain, 8, 4)
    advantages = advantages.clamp(-1, 1)
    estimator = build_estimator(METHODS[name](noise_levels=3), RunShape(3))
    estimator.accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator().manual_seed(1))
    got = gradient_of(chain)
    generator, expected = torch.Generator().manual_seed(1), torch.zeros_like(got)
    assert estimator._draw(chain, generator) == [1, 2, 3]
    clean = rollout.trajectory.latents[0]
    for t in (1, 2, 3):
        point = chain.path_point(t)
        noise = torch.randn((1, *clean.shape[1:]), generator=generator, dtype=clean.dtype)  # all are of one prompt
        noised = point.alpha * clean + point.sigma * noise
        slope = 1 / chain.prediction_sensitivity(t)
        output = -slope * chain.step(noised, t, chain.parameters).pred_original_sample
        residual = -slope * clean - output.detach()
        factors = {
            "ram": torch.full((8,), 2 * 100.0),
            "nft": 2 * point.noise_share / residual.abs().mean(1),
            "awm": torch.full((8,), 2.0),
        }[name]
        weighted = (factors * advantages)[:, None] * residual / chain.dimension / 3
        expected += flat(torch.autograd.grad((weighted * output).sum(), chain.parameters))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


class GaussianDataChain(ReplicatedChain):
    """Ancestral steps on the flow path over data ``N(0, diag(s^2))``, with the exact posterior mean ``G_t x + b_t``.

    Every step has parameters of its own, (T, d, d) and (T, d), so that steps can be compared. The score-function term
    of a step is exact for whatever the chain samples; a forward-process direction assumes that noised images are
    distributed as the chain's own latents.
    """

    def __init__(self, num_steps: int, scales: Sequence[float]) -> None:
        variances = torch.tensor(scales, dtype=torch.float64) ** 2
        self.points = [PathPoint(1 - t / num_steps, t / num_steps) for t in range(num_steps + 1)]
        gains = [p.alpha * variances / (p.alpha**2 * variances + p.sigma**2) for p in self.points[1:]]
        stds = [
            step_std("ancestral", current, following, 1.0)
            for following, current in zip(self.points, self.points[1:], strict=False)
        ]
        matrices = torch.stack([torch.diag(gain) for gain in gains])
        super().__init__(stds, len(scales), [matrices, torch.zeros(num_steps, len(scales), dtype=torch.float64)], 1)

    def output_sensitivity(self, t: int) -> float:
        return 0.0  # for a warning alone

    def input_sensitivity(self, t: int) -> float:
        return 0.0  # no cotangent travels

    def prediction_sensitivity(self, t: int) -> float:
        return self.points[t].sigma

    def path_point(self, t: int) -> PathPoint:
        return self.points[t]

    def step(self, latents: torch.Tensor, t: int, parameters: Sequence[torch.Tensor]) -> GaussianStep:
        matrices, shifts = parameters
        current, following = self.points[t], self.points[t - 1]
        prediction = latents @ matrices[0, t - 1].T + shifts[0, t - 1]
        noise = (latents - current.alpha * prediction) / current.sigma
        kept = max(0.0, following.sigma**2 - self.std(t) ** 2) ** 0.5
        return GaussianStep(following.alpha * prediction + kept * noise, self.std(t), prediction)


def directions(chain: GaussianDataChain, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Score-function gradient and AWM's on-policy direction of steps 2..T, (T - 1, parameters of a step)."""
    slope = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    trajectory = chain.sample([str(i) for i in range(samples)], [0] * samples)  # each with noise of its own
    rewards = trajectory.latents[0] @ slope - 0.2 * trajectory.latents[0].square().sum(1)
    rollout, advantages = Rollout(trajectory, rewards, None), leave_one_out(rewards, samples)
    score = RLREstimator(RLRSettings(0, HalfOrder(1, "all")))
    forward = ForwardEstimator(replace(FREE, noise_levels=chain.num_steps, base_pull=0.0))
    gradients = []
    for estimator in (score, forward):
        estimator.accumulate(chain, None, rollout, advantages, torch.Generator().manual_seed(1))
        matrices, shifts = (parameter.grad[0] for parameter in chain.parameters)
        gradients.append(torch.cat([matrices.flatten(1), shifts], dim=1)[1:])
        for parameter in chain.parameters:
            parameter.grad = None
    return gradients[0], gradients[1]


@pytest.mark.parametrize(("num_steps", "whole"), [(5, 0.91), (10, 0.82), (20, 0.71)])
def test_where_the_model_is_exact_every_step_points_along_the_score_function_and_levels_count_otherwise(
    num_steps: int, whole: float
) -> None:
    score, forward = directions(GaussianDataChain(num_steps, [1.0, 0.5, 0.2]), 50_000)
    cosines = torch.cosine_similarity(score, forward, dim=1)
    assert cosines.min() > (0.96 if num_steps < 20 else 0.9), "0.991 to 0.9997 with T = 10 and 200,000 samples"
    lengths = forward.norm(dim=1) / score.norm(dim=1)
    assert torch.all(lengths[1:] > lengths[:-1]), "noisy levels count more"
    assert num_steps != 10 or 35 < lengths[-1] / lengths[0] < 60
    got = torch.cosine_similarity(score.flatten(), forward.flatten(), dim=0)
    assert float(got) == pytest.approx(whole, abs=0.04), "less than 1 for that reason alone"


def test_where_the_model_is_not_exact_it_estimates_something_else() -> None:
    """Noised images are not distributed as the chain's own latents, nor are rewards given them."""
    chain = GaussianDataChain(10, [1.0, 0.5, 0.2])
    move_parameters(chain, 0.3)
    score, forward = directions(chain, 50_000)
    assert float(torch.cosine_similarity(score.flatten(), forward.flatten(), dim=0)) == pytest.approx(0.46, abs=0.08)


def test_noise_that_a_prompts_images_share_cancels_and_the_mean_stays() -> None:
    """300 updates of two prompts with four images each, against noises of their own for the same images."""
    chain, estimator = GaussianDataChain(5, [1.0, 0.5, 0.2]), ForwardEstimator(replace(FREE, base_pull=0.0))
    move_parameters(chain, 0.3)
    slope = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    shared, own = [], []
    for update in range(300):
        trajectory = chain.sample(["red"] * 4 + ["blue"] * 4, list(range(8 * update, 8 * update + 8)))
        advantages = leave_one_out(trajectory.latents[0] @ slope, 4)
        for prompts, gradients in ((trajectory.prompts, shared), ([str(i) for i in range(8)], own)):
            drawn = replace(trajectory, prompts=as_prompts(prompts))
            rollout = Rollout(drawn, torch.zeros(8), None)
            estimator.accumulate(chain, None, rollout, advantages, torch.Generator().manual_seed(update))
            gradients.append(gradient_of(chain))
    shared, own = torch.stack(shared), torch.stack(own)
    errors = ((shared.var(0) + own.var(0)) / 300).sqrt()
    assert ((shared.mean(0) - own.mean(0)).abs() < 4 * errors).all()
    assert shared.var(0).sum() < 0.8 * own.var(0).sum()


def trained(knobs: AWMArguments, updates: int, rate: float = 0.02) -> dict[str, float]:
    """The last numbers of a run by plain ascent on a linear reward; the base is what it started from."""
    chain, estimator = GaussianDataChain(5, [1.0, 0.5, 0.2]), ForwardEstimator(knobs)
    slope = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    for update in range(updates):
        trajectory = chain.sample([""] * 64, [update] * 64)
        rewards = trajectory.latents[0] @ slope
        rollout, advantages = Rollout(trajectory, rewards, None), estimator.advantages(rewards, [""] * 64, 64)
        book = estimator.accumulate(chain, None, rollout, advantages, torch.Generator().manual_seed(update))
        estimator.learn([book])
        with torch.no_grad():
            for parameter in chain.parameters:
                parameter.add_(parameter.grad, alpha=rate / 64)
                parameter.grad = None
    return book.numbers() | {"reward": float(rewards.mean())}


def test_each_guard_prevents_what_it_is_for() -> None:
    free = trained(FREE, 60)
    assert free["velocity_growth"] > 0.3 and free["base_distance"] > 0.08, "without any the velocity grows and grows"
    short = trained(replace(FREE, norm_penalty=0.1), 60)
    assert short["velocity_growth"] < 0.1 and short["reward"] > 0.25
    near = trained(replace(FREE, base_pull=1.0), 60)
    assert near["base_distance"] < 0.03 and near["reward"] > 0.2
    clipping = replace(FREE, clip_range=0.01, old_decay=0.9, old_decay_growth=0.9)
    clipped, lagging = trained(clipping, 60), trained(replace(clipping, clip_range=1.0), 60)
    assert clipped["policy_ratio_deviation"] < 0.01 < 0.02 < lagging["policy_ratio_deviation"]


def test_old_weights_lag_behind_and_are_restored() -> None:
    """``old <- a old + (1 - a) present`` with ``a = min(limit, N growth)`` after N updates, once an update."""
    chain, knobs = LinearGaussianChain(num_steps=3), replace(FREE, old_decay=0.5, old_decay_growth=0.2)
    estimator, (rollout, advantages) = ForwardEstimator(knobs), rollout_of(chain, 8, 4)
    expected = [parameter.detach().clone() for parameter in chain.parameters]
    for update in range(1, 5):
        for _ in range(2):  # micro-batches
            estimator.accumulate(chain, None, rollout, advantages, torch.Generator())
        torch.testing.assert_close(estimator.state_dict()["old"], expected)
        move_parameters(chain, 0.1, seed=update)
        estimator.learn([])
        decay = min(0.5, 0.2 * update)
        expected = [decay * old + (1 - decay) * now.detach() for old, now in zip(expected, chain.parameters)]
    gradient_of(chain)
    again = ForwardEstimator(knobs)
    again.load_state_dict(estimator.state_dict())
    for each in (estimator, again):
        each.accumulate(chain, None, rollout, advantages, torch.Generator())
    twice = gradient_of(chain)
    estimator.accumulate(chain, None, rollout, advantages, torch.Generator())
    torch.testing.assert_close(twice, 2 * gradient_of(chain))


@pytest.mark.parametrize("space", ["epsilon", "v_prediction", "flow"])
def test_on_policy_it_is_the_pretraining_loss_weighted_by_advantages(space: str) -> None:
    """``-sum A mean |o - u|^2`` by autograd of the denoiser alone, u being what such a model was trained on."""
    pipeline = sd3() if space == "flow" else tiny_stable_diffusion(space, dtype=torch.float64)
    denoiser = pipeline.transformer if space == "flow" else pipeline.unet
    parameters = attach_lora(denoiser, target_modules=["to_q", "to_v"], rank=2)
    for parameter in parameters:
        parameter.data = parameter.data.to(denoiser.dtype)
    chain = chain_over(pipeline, parameters=parameters, num_inference_steps=3, guidance_scale=3.0, step_kind="ode")
    move_parameters(chain, 0.1)
    trajectory = chain.sample(["red", "red", "blue b", "blue b"], [0, 1, 2, 3])
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.25], dtype=denoiser.dtype)
    calls: list[dict] = []

    def keep(_: torch.nn.Module, arguments: tuple, named: dict) -> None:
        if torch.is_grad_enabled():
            calls.append({**dict(zip(("sample", "timestep"), arguments, strict=False)), **named})

    handle = denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    estimator = ForwardEstimator(replace(FREE, noise_levels=2, base_pull=0.0))
    estimator.accumulate(chain, None, Rollout(trajectory, torch.zeros(4), None), advantages, torch.Generator())
    handle.remove()
    got, generator, loss = gradient_of(chain), torch.Generator(), torch.zeros(())
    estimator._draw(chain, generator)
    assert len(calls) == 2
    for call in calls:
        noised, timestep = call.pop("sample" if space != "flow" else "hidden_states"), call.pop("timestep")
        clean = trajectory.latents[0]
        drawn = torch.randn((2, *clean.shape[1:]), generator=generator, dtype=clean.dtype)
        noise = drawn.repeat_interleave(2, dim=0)
        sigma = float(timestep.flatten()[0]) / 1000
        alpha = 1 - sigma
        if space != "flow":
            alpha = float(pipeline.scheduler.alphas_cumprod[int(timestep.flatten()[0])]) ** 0.5
            sigma = (1 - alpha**2) ** 0.5
        torch.testing.assert_close(noised, alpha * clean + sigma * noise, rtol=1e-5, atol=1e-5)
        target = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "flow": noise - clean}[space]
        output = denoiser(noised, timestep=timestep, **call)[0]
        loss = loss + (advantages * (output - target).square().flatten(1).mean(1)).sum() / len(calls)
    expected = -flat(torch.autograd.grad(loss, chain.parameters))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("name", METHODS)
def test_of_a_pipeline_the_conditional_prediction_is_trained(name: str) -> None:
    """Guided sampling, unguided training; two or three evaluations and one backward pass for every level."""
    chain = adapted_chain(3, step_kind="ode")
    move_parameters(chain, 0.05)
    trajectory = chain.sample(["red", "red", "blue b", "blue b"], [0, 1, 2, 3])
    rollout, advantages = Rollout(trajectory, torch.zeros(4), None), torch.tensor([1.0, -1.0, 0.5, -0.5])
    estimator = build_estimator(METHODS[name](noise_levels=2), RunShape(3))
    with counted_tape() as one_step, chain.without_guidance():
        ReplayedStep(chain, trajectory, 1, "prediction", with_latents=False)
    before = chain.denoiser_evaluations
    with counted_tape() as tape:
        book = estimator.accumulate(chain, None, rollout, advantages, torch.Generator().manual_seed(0))
    assert tape.peak == one_step.peak > 0, "old and base leave nothing on the tape, and levels come one by one"
    gradient = gradient_of(chain)
    assert book.backward_passes == 2 and gradient.norm() > 0
    assert chain.denoiser_evaluations - before == 4 * 2 * 3  # present, old and base
    unguided = build_estimator(METHODS[name](noise_levels=2), RunShape(3))
    unguided.accumulate(chain.at(guidance=1.0), None, rollout, advantages, torch.Generator().manual_seed(0))
    torch.testing.assert_close(gradient_of(chain), gradient)
    assert torch.equal(chain.sample(trajectory.prompts, [0, 1, 2, 3]).latents, trajectory.latents), "all is put back"
