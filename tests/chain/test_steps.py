"""The step formulas against closed forms and against diffusers' own DDIM step."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from rlr_peft.chain import (
    PathPoint,
    diffusion_grid,
    gaussian_step,
    output_sensitivity,
    prediction_sensitivity,
    step_std,
)

KINDS = ("ancestral", "flow-sde", "cps", "ode")
DIFFUSION = PathPoint(0.6, 0.8), PathPoint(0.8, 0.6)
FLOW = PathPoint(0.3, 0.7), PathPoint(0.5, 0.5)


def model_output_of(
    prediction_type: str, original: torch.Tensor, noise: torch.Tensor, point: PathPoint
) -> torch.Tensor:
    return {
        "epsilon": noise,
        "v_prediction": point.alpha * noise - point.sigma * original,
        "flow_prediction": noise - original,
    }[prediction_type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prediction_type", "points"), [("epsilon", DIFFUSION), ("v_prediction", DIFFUSION), ("flow_prediction", FLOW)]
)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_a_perfect_denoiser_keeps_the_marginal(kind: str, prediction_type: str, points: tuple, eta: float) -> None:
    """With the true x_0 and eps known, mean + std z must be distributed as alpha' x_0 + sigma' eps' (exactly, for a
    point mass; the flow SDE only to first order in the step, so its step is made small)."""
    current, following = points
    tolerance = 1e-12
    if kind == "flow-sde":
        following = PathPoint(
            current.alpha + 1e-4 * (following.alpha - current.alpha),
            current.sigma + 1e-4 * (following.sigma - current.sigma),
        )
        tolerance = 1e-6
    original = torch.tensor([0.7, -1.2], dtype=torch.float64)
    # The mean is affine in eps: its coefficient and std must add up to sigma'^2, its offset must be alpha' x_0.
    offset, slope = [], []
    for noise in (torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)):
        sample = current.alpha * original + current.sigma * noise
        output = model_output_of(prediction_type, original, noise, current)
        step = gaussian_step(kind, prediction_type, sample, output, current, following, eta)
        torch.testing.assert_close(step.pred_original_sample, original, rtol=0, atol=1e-12)
        (slope if noise.any() else offset).append(step.mean)
    coefficient = slope[0] - offset[0]
    torch.testing.assert_close(offset[0], following.alpha * original, rtol=0, atol=tolerance)
    torch.testing.assert_close(
        coefficient**2 + step.std**2, torch.full_like(original, following.sigma**2), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("kind", KINDS)
def test_eta_zero_is_the_ode(kind: str) -> None:
    sample, output = torch.randn(2, 5, dtype=torch.float64).unbind()
    steps = [gaussian_step(k, "v_prediction", sample, output, *DIFFUSION, eta=0.0) for k in (kind, "ode")]
    assert steps[0].std == steps[1].std == 0
    torch.testing.assert_close(steps[0].mean, steps[1].mean, rtol=1e-12, atol=1e-12)


def test_flow_sde_is_flow_grpo_on_the_flow_path() -> None:
    """Flow-GRPO, equation of its SDE sampler, written out independently."""
    sigma, next_sigma, eta = 0.7, 0.5, 0.7
    x, v = torch.randn(2, 6, dtype=torch.float64).unbind()
    step = gaussian_step("flow-sde", "flow_prediction", x, v, PathPoint(0.3, 0.7), PathPoint(0.5, 0.5), eta)
    g, dt = eta * math.sqrt(sigma / (1 - sigma)), next_sigma - sigma
    mean = x * (1 + g**2 / (2 * sigma) * dt) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    torch.testing.assert_close(step.mean, mean, rtol=1e-12, atol=1e-12)
    assert step.std == pytest.approx(g * math.sqrt(-dt), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_finite_from_pure_noise_and_ends_clean(kind: str) -> None:
    noise, middle, clean = PathPoint(0.0, 1.0), PathPoint(0.6, 0.8), PathPoint(1.0, 0.0)
    sample, output = torch.randn(2, 5).unbind()
    first = gaussian_step(kind, "v_prediction", sample, output, noise, middle, 1.0)
    assert first.mean.isfinite().all() and math.isfinite(first.std)
    last = gaussian_step(kind, "v_prediction", sample, output, middle, clean, 1.0)
    assert last.std == 0
    torch.testing.assert_close(last.mean, last.pred_original_sample)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "points", [DIFFUSION, (PathPoint(0.0, 1.0), PathPoint(0.6, 0.8)), (PathPoint(0.6, 0.8), PathPoint(1.0, 0.0))]
)
def test_std_is_known_without_the_latents(kind: str, points: tuple) -> None:
    x = torch.randn(4)
    assert gaussian_step(kind, "v_prediction", x, x, *points, 0.8).std == step_std(kind, *points, 0.8)


def test_output_sensitivity_is_the_derivative() -> None:
    output = torch.randn(1, dtype=torch.float64, requires_grad=True)
    step = gaussian_step("ancestral", "epsilon", torch.randn(1, dtype=torch.float64), output, *DIFFUSION, 1.0)
    (derivative,) = torch.autograd.grad(step.mean.sum(), output)
    assert output_sensitivity("ancestral", "epsilon", *DIFFUSION, 1.0) == pytest.approx(
        abs(derivative.item()), rel=1e-12
    )


def test_clear_errors() -> None:
    x = torch.zeros(1)
    with pytest.raises(ValueError, match="alpha > 0 for epsilon"):
        gaussian_step("ancestral", "epsilon", x, x, PathPoint(0.0, 1.0), DIFFUSION[1], 1.0)
    with pytest.raises(ValueError, match="step_kind"):
        gaussian_step("euler", "epsilon", x, x, *DIFFUSION, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prediction_type"):
        gaussian_step("ode", "sample", x, x, *DIFFUSION, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eta"):
        gaussian_step("ancestral", "epsilon", x, x, *DIFFUSION, 1.5)
    assert gaussian_step("flow-sde", "epsilon", x, x, *DIFFUSION, 1.5).std > 0


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_grid_has_t_steps_for_every_t(spacing: str) -> None:
    scheduler = DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
    for num_steps in (*range(1, 130), 201, 1000):  # diffusers gives 62 trailing timesteps for T = 61, the last is -1
        grid = diffusion_grid(scheduler, num_steps)
        assert grid.num_steps == len(grid.timesteps) == num_steps
        assert grid.timesteps.min() >= 0 and all(point.sigma > 0 for point in grid.points)
        assert all(math.isfinite(step_std("ancestral", *grid.step_points(t), 1.0)) for t in range(1, num_steps + 1))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_equals_ddim_step_with_the_same_noise(
    spacing: str, prediction_type: str, set_alpha_to_one: bool, eta: float
) -> None:
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        clip_sample=False,
        set_alpha_to_one=set_alpha_to_one,
    )
    grid = diffusion_grid(scheduler, 7)
    sample, output, noise = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64).unbind()
    for t in range(7, 0, -1):
        step = gaussian_step("ancestral", prediction_type, sample, output, *grid.step_points(t), eta)
        expected = scheduler.step(output, int(grid.timesteps[7 - t]), sample, eta=eta, variance_noise=noise)
        torch.testing.assert_close(step.next_latents(noise), expected.prev_sample, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(step.pred_original_sample, expected.pred_original_sample, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction"])
def test_prediction_sensitivity_is_the_derivative(prediction_type: str) -> None:
    sample = torch.tensor([1.0, -2.0], dtype=torch.float64)
    one, other = (
        gaussian_step("ode", prediction_type, sample, torch.full_like(sample, output), *DIFFUSION, 0.0)
        for output in (0.5, 1.5)
    )
    change = (other.pred_original_sample - one.pred_original_sample).abs()
    torch.testing.assert_close(change, torch.full_like(sample, prediction_sensitivity(prediction_type, DIFFUSION[0])))
