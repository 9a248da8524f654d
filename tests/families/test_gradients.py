"""Full backpropagation of a reward through every family's chain and decoder against central differences."""

from collections.abc import Callable

import pytest
import torch

from rlr_peft.chain import DenoisingChain, Segment, run, walk
from rlr_peft.config import METHODS
from rlr_peft.estimators import Estimator, Rollout, RunShape, build_estimator
from tests.families.table import CASES, NUM_STEPS, load, prompts_of
from tests.pipelines import chain_over


def trained_chain(name: str, folder_of: Callable[[str], str]) -> DenoisingChain:
    """With two weights of attention to train; of two experts the first has one and the second the other."""
    case = CASES[name]
    pipeline = load(folder_of(name))
    if case.double:
        # not the text encoders: their attention masks may overflow
        for part in ("unet", "transformer", "transformer_2", "connectors", "vae", "audio_vae", "vocoder"):
            if getattr(pipeline, part, None) is not None:
                getattr(pipeline, part).double()
    chain = chain_over(pipeline, num_inference_steps=NUM_STEPS, **case.options)
    chain.denoiser.requires_grad_(False)
    named = [
        (key, weight)
        for key, weight in chain.denoiser.named_parameters()
        if key.endswith(("to_q.weight", "to_v.weight"))
    ]
    chain.parameters = [named[0][1], named[-1][1]]
    for weight in chain.parameters:
        weight.requires_grad_()
    return chain


@pytest.mark.parametrize("name", [name for name in CASES if name != "sd-v"])
def test_segment_gradients_equal_central_differences(name: str, folder_of: Callable[[str], str]) -> None:
    case, chain = CASES[name], trained_chain(name, folder_of)
    trajectory = chain.sample(prompts_of(name)[:1], [0])
    generator = torch.Generator().manual_seed(1)

    def normal(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    leaf = trajectory.latents[0].clone().requires_grad_()
    images = chain.decode(leaf, trajectory.prompts)
    pixels = normal(images) * ((images - 0.5).abs() < 0.45)  # away from the kinks where pixels are clamped
    (cotangent,) = torch.autograd.grad((images * pixels).sum(), leaf)
    run(chain, trajectory, Segment("term", range(1, NUM_STEPS + 1), cotangent))
    gradients = [weight.grad.double() for weight in chain.parameters]
    assert all(gradient.norm() > 0 for gradient in gradients)
    directions = [
        normal(gradient) / gradient.numel() ** 0.5 + gradient / gradient.norm() for gradient in gradients
    ]  # the gradient's own direction, so that the derivative is not small by accident

    @torch.no_grad()
    def reward(shift: float) -> float:
        originals = [weight.clone() for weight in chain.parameters]
        for weight, direction in zip(chain.parameters, directions, strict=True):
            weight.add_(direction.to(weight.dtype), alpha=shift)
        latents = chain.denoise(trajectory, NUM_STEPS, trajectory.latents[NUM_STEPS])
        value = (chain.decode(latents, trajectory.prompts).double() * pixels.double()).sum().item()
        for weight, original in zip(chain.parameters, originals, strict=True):
            weight.copy_(original)
        return value

    h = 3e-3
    difference = (8 * (reward(h) - reward(-h)) - (reward(2 * h) - reward(-2 * h))) / (12 * h)
    expected = sum((gradient * direction).sum().item() for gradient, direction in zip(gradients, directions))
    assert difference == pytest.approx(expected, rel=case.gradient_tolerance)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("sd-v", "wan-i2v")])
def test_gradients_of_separated_samples_are_those_of_single_ones(name: str, folder_of: Callable[[str], str]) -> None:
    chain = trained_chain(name, folder_of)
    trajectory = chain.sample(prompts_of(name), [0, 1])
    cotangent = torch.randn(trajectory.latents[0].shape, generator=torch.Generator().manual_seed(1)).to(
        chain.latents_dtype
    )
    steps = range(1, NUM_STEPS + 1)
    alone = []
    for i in range(2):
        sample = trajectory.select([i])
        alone.append([step.gradients for step in walk(chain, sample, Segment("term", steps, cotangent[[i]]))])
    shared, separated = chain.parameters, chain.separate_samples(2)
    assert separated is not None
    with separated:
        together = [step.gradients for step in walk(chain, trajectory, Segment("term", steps, cotangent))]
    assert chain.parameters is shared
    for t, gradients in enumerate(together):
        for parameter, gradient in enumerate(gradients):
            expected = torch.stack([alone[i][t][parameter] for i in range(2)])
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["wan-2.2", "wan-2.1"])
def test_auto_takes_what_trains_every_expert(name: str, folder_of: Callable[[str], str]) -> None:
    """It measures nothing there; with one expert alone it does, and the last step promises most."""
    chain = trained_chain(name, folder_of)
    assert chain.trained_models == (2 if name == "wan-2.2" else 1)
    trajectory = chain.sample(2 * prompts_of(name), range(4))
    rollout = Rollout(trajectory, torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.ones_like(trajectory.latents[0]))

    def calibrated() -> Estimator:
        estimator = build_estimator(METHODS["auto"](), RunShape(NUM_STEPS, samples=2))
        assert estimator.wants_calibration(True) and not estimator.is_calibrated
        estimator.calibrate(chain, [rollout], torch.tensor([-0.5, 0.5, -0.5, 0.5]), decay=0.0)
        return estimator

    if name == "wan-2.2":
        estimator, restored = calibrated(), build_estimator(METHODS["auto"](), RunShape(NUM_STEPS, samples=2))
        restored.load_state_dict(estimator.state_dict())
        for one in (estimator, restored):
            assert one.describe(True).startswith("as several models share out the steps, reward gradient through 3 st")
            assert one.is_calibrated and not one.wants_calibration(True) and not one.needs_noise
            assert one.coverage(chain, True).describe() == one.chosen.coverage(chain, True).describe()
        chain.parameters = chain.parameters[-1:]  # of the last steps' expert
        assert chain.trained_models == 1
    assert calibrated().describe(True).startswith("by measurement, reward gradient through the last step; ")
